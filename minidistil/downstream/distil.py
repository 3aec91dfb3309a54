"""Distillation during fine-tuning: fine-tuned teachers, the loss, and data augmentation.

A few thousand examples are a small sample of the teacher's behaviour. Learning the teacher's probabilities needs no
true labels, so the teacher alone labels other texts of the kind, and augmented copies of the examples, in which words
are masked or replaced.
Source: Tang et al. 2019, arXiv 1903.12136, "Data augmentation for distillation", without its tagger and n-grams.
"""

import dataclasses
import math
import pathlib
import re

import numpy as np
import torch
import torch.nn.functional as F

from kernels.distill_kl import distill_kl
from minidistil.checks import check_vocabulary
from minidistil.data import IGNORE
from minidistil.downstream.batches import predict_shared
from minidistil.downstream.heads import MASKED_LOGIT, SpanReader, VectorClassifier, load_finetuned, read_finetuned
from minidistil.downstream.tasks import check_model, check_positions
from minidistil.errors import UserError
from minidistil.precision import cast_products
from minidistil.rng import mix, uniform
from minidistil.tokenizer import Tokenizer

MASKED, REPLACED = 0.1, 0.1  # shares of the tokens, as in Tang et al.


def augment(items, copies, tokenizer):
    """Returns `copies` augmented copies of each item: the first copies of all items, then the second copies, and so on.

    items: (ids, types), int32 and int8 arrays (n,). A token becomes [MASK], or a token drawn from all items, frequent
    ones more often; [CLS] and [SEP] stay. A pure function of its arguments.
    """
    ids = np.concatenate([ids for ids, _ in items])  # (all tokens,)
    free = ~np.isin(ids, [tokenizer.cls_id, tokenizer.sep_id])
    words, position = ids[free], np.arange(len(ids))
    ends = np.cumsum([len(ids) for ids, _ in items])[:-1]
    result = []
    for copy in range(copies):
        draw = uniform(0, 10, copy, position)
        others = words[mix(0, 11, copy, position) % np.uint64(len(words))] if len(words) else ids
        changed = np.where(free & (draw < MASKED + REPLACED), others, ids)
        changed = np.where(free & (draw < MASKED), tokenizer.mask_id, changed).astype(ids.dtype)
        result += zip(np.split(changed, ends), (types for _, types in items), strict=True)
    return result


def with_unlabelled(task, copies, tokenizer):
    """Returns (items, targets) of a training set, its unlabelled texts and augmented copies, marked as unlabelled."""
    items, targets = [*task.train[0], *task.unlabelled, *augment(task.train[0], copies, tokenizer)], task.train[1]
    no_label = math.nan if task.regression else IGNORE
    none = targets.new_full((len(items) - len(targets), *targets.shape[1:]), no_label)
    return items, torch.cat([targets, none])


def find_teachers(folders, task):
    """Returns the folders of a task's teachers: `folders`, or their subfolders named after the task."""
    if not all(folders):
        raise UserError(f"--teacher {','.join(folders)}: name one folder, or several with commas between them")
    pairs = [(pathlib.Path(folder) / task.name, pathlib.Path(folder)) for folder in folders]
    return [inner if inner.is_dir() else outer for inner, outer in pairs]


def label_order(folder, labels, task):
    """Returns the index of each of a task's labels in a classifier, however spelt; UserError where it has others."""
    found, wanted = labels, task.labels
    if sorted(found) != sorted(wanted):
        found, wanted = ([re.sub(r"[\W_]+", "_", label.casefold()) for label in side] for side in (labels, wanted))
    if len(wanted) == 1 and len(found) <= 1:
        return [0]  # a regression's one number, by whatever name
    if sorted(found) != sorted(wanted) or len(set(found)) < len(found):
        sides = f"labels found: {', '.join(labels) or 'none'}; wanted: {', '.join(task.labels)}"
        way = "give a model that was, or name its labels, in its own order, in id2label of its config.json"
        raise UserError(f"{folder} was not fine-tuned for {task.name}, or does not say so ({sides}): {way}")
    return [found.index(label) for label in wanted]


def check_teacher(folder, task, tokenizer):
    """Raises UserError for a teacher that was fine-tuned for something else than a task, or has another vocabulary."""
    config, kind, labels = read_finetuned(folder)
    if kind is not task.kind:
        what = f"it is a ...{kind.hub_name}, not a ...{task.kind.hub_name}"
        if VectorClassifier in (kind, task.kind):
            what += ": teacher and student both learn with --vectors, or neither does"
        raise UserError(f"{folder} was not fine-tuned for {task.name} ({what}): give a model that was")
    if kind is not SpanReader:
        label_order(folder, labels, task)
    if Tokenizer.load(folder).digest != tokenizer.digest:
        raise UserError(f"{folder} and the student have different vocabularies: they must agree word for word")
    check_vocabulary(f"teacher {folder}", config, tokenizer)
    check_model(f"the teacher {folder}", config, tokenizer, task)


def load_teachers(folders, task):
    """Returns a task's teachers, frozen, with their labels in the task's order; see `check_teacher`."""
    models = []
    for folder in find_teachers(folders, task):
        model, labels = load_finetuned(folder)
        check_positions(f"the teacher {folder}", model.config, task)
        if isinstance(model, VectorClassifier) and model.pair != task.task.pair:
            what = "pairs of texts" if model.pair else "single texts"
            raise UserError(f"{folder} classifies {what}, which {task.name} has not: give a teacher of this task")
        if task.kind is not SpanReader:
            order = label_order(folder, labels, task)
            state = {name: t[order] if name.startswith("classify.") else t for name, t in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
        models.append(model.requires_grad_(False))
    return models


def ensemble(logits, tau):
    """Combines teachers' lists of arrays: returns (logits whose softmax at tau is the mean of theirs, mean logits)."""
    if len(logits) == 1:
        return logits[0], logits[0]
    soft, mean = [], []
    for item_logits in zip(*logits, strict=True):
        z = torch.from_numpy(np.stack(item_logits)).double()
        soft.append((tau * torch.log_softmax(z / tau, -1).logsumexp(0)).float().numpy())
        mean.append(z.mean(0).float().numpy())
    return soft, mean


def teacher_logits(folders, task, tokenizer, tau, device, dtype, ranks):
    """Returns the `ensemble` of the teachers' logits on each training item; prints their dev scores.

    dtype, by name, is the precision of matrix products.
    """
    logits = []
    for teacher in load_teachers(folders, task):
        cast_products(teacher.to(device), dtype)
        how = tokenizer.pad_id, device, dtype, ranks
        found = predict_shared(teacher, task.train[0], *how)
        logits.append([(z - task.shift) / task.scale for z in found] if task.regression else found)
        dev_logits = [predict_shared(teacher, split, *how) for split in task.dev]
        ranks.print0(f"{task.name}: the teacher's dev score is {task.evaluate(dev_logits)['score']:.2f}")
    return ensemble(logits, tau)


def pad_logits(arrays, shape, device):
    """Returns the arrays of a batch's items as one tensor of `shape`, padded with MASKED_LOGIT."""
    stack = np.full(shape, MASKED_LOGIT, np.float32)
    for row, array in enumerate(arrays):
        stack[row, ..., : array.shape[-1]] = array
    return torch.from_numpy(stack).to(device)


@dataclasses.dataclass(frozen=True)
class TaskObjective:
    """The fine-tuning loss; the weights apply only with a teacher (Sanh et al. 2019, section 4.1; Tang et al.).

    alpha_task * the task's own loss + alpha_ce * tau^2 KL(teacher || student) + alpha_mse * squared difference
    """

    regression: bool = False
    alpha_task: float = 0.5
    alpha_ce: float = 0.5
    alpha_mse: float = 0.0
    temperature: float = 2.0

    def loss(self, logits, targets, soft=None, mean=None):
        """Returns the mean loss over the examples of a batch (over starts and ends of spans).

        logits (B, K) or (B, 2, T); targets (B,) or (B, 2): NaN (regression) or IGNORE where there is no label, and
        hence no task loss; with a teacher, `soft` and `mean` of `ensemble` have the shape of the logits.
        """
        logits = logits.float()
        rows, targets = logits.flatten(0, -2), targets.flatten()
        if self.regression:
            loss = F.mse_loss(rows[:, 0], targets.where(targets.isfinite(), rows[:, 0].detach()))
        else:
            loss = F.cross_entropy(rows, targets, ignore_index=IGNORE, reduction="sum") / len(rows)
        if soft is None:
            return loss
        loss = self.alpha_task * loss
        if self.alpha_ce and self.regression:  # a single number is no distribution
            loss = loss + self.alpha_ce * F.mse_loss(logits, mean)
        elif self.alpha_ce:
            kl, _ = distill_kl(rows, soft.flatten(0, -2), None, self.temperature)
            loss = loss + self.alpha_ce * kl / len(rows)
        if self.alpha_mse:
            loss = loss + self.alpha_mse * F.mse_loss(logits, mean)
        return loss

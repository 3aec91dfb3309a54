"""Distillation while fine-tuning: teachers that were fine-tuned for the task, the loss, and augmented examples.

A few thousand examples show a student little of what its teacher makes of other sentences, and a student that is given
a probability instead of a label needs no true label: copies of the examples, in which words are masked or exchanged,
are labelled by the teacher alone. After Tang et al. 2019, arXiv 1903.12136, "Data augmentation for distillation",
without their part-of-speech tagger and n-grams.
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
from minidistil.downstream.batches import predict
from minidistil.downstream.heads import MASKED_LOGIT, Classifier, load_finetuned, read_finetuned
from minidistil.downstream.tasks import check_pairs, check_positions
from minidistil.errors import UserError
from minidistil.rng import mix, uniform
from minidistil.tokenizer import Tokenizer

MASKED, EXCHANGED = 0.1, 0.1  # share of the tokens, as Tang et al. have them


def augment(items, copies, tokenizer):
    """Returns `copies` augmented copies of each item: first one of all of them, then a second one, and so on.

    items: (ids, types), int32 and int8 arrays (n,). A token becomes [MASK], or a random one out of all items, frequent
    ones more often; those that frame a text stay. A pure function of its arguments.
    """
    ids = np.concatenate([ids for ids, _ in items])  # (all tokens,)
    free = ~np.isin(ids, [tokenizer.cls_id, tokenizer.sep_id])
    words, place = ids[free], np.arange(len(ids))
    ends = np.cumsum([len(ids) for ids, _ in items])[:-1]
    result = []
    for copy in range(copies):
        draw = uniform(0, 10, copy, place)
        others = words[mix(0, 11, copy, place) % np.uint64(len(words))] if len(words) else ids
        changed = np.where(free & (draw < MASKED + EXCHANGED), others, ids)
        changed = np.where(free & (draw < MASKED), tokenizer.mask_id, changed).astype(ids.dtype)
        result += zip(np.split(changed, ends), (types for _, types in items), strict=True)
    return result


def with_copies(task, copies, tokenizer):
    """(items, targets) of a task's training set with augmented copies, whose target says that they have no label."""
    items, targets = task.train[0] + augment(task.train[0], copies, tokenizer), task.train[1]
    no_label = math.nan if task.regression else IGNORE
    none = targets.new_full((len(items) - len(targets), *targets.shape[1:]), no_label)
    return items, torch.cat([targets, none])


# ---- teachers


def find_teachers(places, task):
    """Returns the folders of a task's teachers: some folders, or their subfolders named after the task."""
    folders = [(pathlib.Path(place) / task.name, pathlib.Path(place)) for place in places]
    return [inner if inner.is_dir() else outer for inner, outer in folders]


def label_order(folder, labels, task):
    """Returns where a classifier has each of a task's labels, which it may spell or order in another way.

    Raises UserError where it has other labels, or does not name them.
    """
    found, wanted = ([re.sub(r"[^a-z0-9]+", "_", label.casefold()) for label in side] for side in (labels, task.labels))
    if len(wanted) == 1 and len(found) <= 1:
        return [0]  # a regression's one number, by whatever name
    if sorted(found) != sorted(wanted):
        raise UserError(
            f"{folder} was not fine-tuned for {task.name}, or does not say so (labels found: "
            f"{', '.join(labels) or 'none'}; wanted: {', '.join(task.labels)}): give a teacher that was, or name its "
            "labels, in its own order, in id2label of its config.json"
        )
    return [found.index(label) for label in wanted]


def check_teacher(folder, task, tokenizer):
    """Raises UserError for a teacher that was fine-tuned for something else than a task, or has another vocabulary."""
    config, kind, labels = read_finetuned(folder)
    if kind is not task.kind:
        what = f"it is a ...For{kind.hub_name}, not a ...For{task.kind.hub_name}"
        raise UserError(f"{folder} was not fine-tuned for {task.name} ({what}): give a teacher that was")
    if kind is Classifier:
        label_order(folder, labels, task)
    if Tokenizer.load(folder).digest != tokenizer.digest:
        raise UserError(f"{folder} and the student have different vocabularies: they must agree word for word")
    check_vocabulary(f"teacher {folder}", config, tokenizer)
    check_pairs(f"the teacher {folder}", config, task)


def load_teachers(places, task):
    """Returns the teachers of a task in some places, frozen, their labels in the task's order; see `check_teacher`."""
    models = []
    for folder in find_teachers(places, task):
        model, labels = load_finetuned(folder)
        check_positions(f"the teacher {folder}", model.config, task)
        if type(model) is Classifier:
            order = label_order(folder, labels, task)
            state = {name: t[order] if name.startswith("classify.") else t for name, t in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
        models.append(model.requires_grad_(False))
    return models


def ensemble(logits, tau):
    """One teacher out of several: (logits whose softmax at tau is the mean of theirs, mean logits), each a list.

    `logits` holds one list a teacher, of an array an item.
    """
    if len(logits) == 1:
        return logits[0], logits[0]
    soft, mean = [], []
    for of_item in zip(*logits, strict=True):
        z = torch.from_numpy(np.stack(of_item)).double()
        soft.append((tau * torch.log_softmax(z / tau, -1).logsumexp(0)).float().numpy())
        mean.append(z.mean(0).float().numpy())
    return soft, mean


def teacher_logits(places, task, tokenizer, tau, device):
    """Returns `ensemble` of what the teachers in `places` say of each training item; prints their dev scores."""
    logits = []
    for teacher in load_teachers(places, task):
        logits.append(predict(teacher.to(device), task.train[0], tokenizer.pad_id, device))
        on_dev = [predict(teacher, split, tokenizer.pad_id, device) for split in task.dev]
        print(f"{task.name}: the teacher's dev score is {task.evaluate(on_dev)['score']:.2f}", flush=True)
    return ensemble(logits, tau)


def pad_logits(arrays, shape, device):
    """The arrays of a batch's items as one tensor of the shape of its logits; padding is MASKED_LOGIT."""
    stack = np.full(shape, MASKED_LOGIT, np.float32)
    for row, array in enumerate(arrays):
        stack[row, ..., : array.shape[-1]] = array
    return torch.from_numpy(stack).to(device)


# ---- loss


@dataclasses.dataclass(frozen=True)
class TaskObjective:
    """The loss of fine-tuning; the weights count where there is a teacher (Sanh et al. 2019, section 3; Tang et al.).

    alpha_task * the task's own loss + alpha_ce * tau^2 KL(teacher || student) + alpha_mse * squared difference
    """

    regression: bool = False
    alpha_task: float = 0.5
    alpha_ce: float = 0.5
    alpha_mse: float = 0.0
    temperature: float = 2.0

    def loss(self, logits, targets, soft=None, mean=None):
        """The mean over a batch's examples (over starts and ends of spans).

        logits (B, K) or (B, 2, T); targets (B,) or (B, 2): NaN (of a regression) or IGNORE where there is no label, and
        so no loss of the task's own; soft and mean, of `ensemble`, like logits, where there is a teacher.
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
        if self.alpha_ce and self.regression:  # one number has no distribution
            loss = loss + self.alpha_ce * F.mse_loss(logits, mean)
        elif self.alpha_ce:
            kl, _ = distill_kl(rows, soft.flatten(0, -2), None, self.temperature)
            loss = loss + self.alpha_ce * kl / len(rows)
        if self.alpha_mse:
            loss = loss + self.alpha_mse * F.mse_loss(logits, mean)
        return loss

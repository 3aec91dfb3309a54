"""The model of a task: a new head on a pretrained encoder, or a BiLSTM on its word vectors; optimiser and export."""

import functools

import torch

from minidistil import weights
from minidistil.downstream import bilstm
from minidistil.downstream.heads import Classifier, VectorClassifier, load_pretrained
from minidistil.pooling import read_pooling, write_pooling


def build_model(folder, task, seed, as_bilstm=False):
    """Returns a model for the task in training mode; its head, or the whole BiLSTM, has initial weights.

    The bias of a regression head starts at the mean target, which would otherwise take hundreds of updates to learn. A
    classifier of vectors starts at 0: its features are not small, and unlearning random weights takes a few thousand
    examples (LOG.md). The score of two vectors starts as their cosine.
    """
    if as_bilstm:
        words = load_pretrained(folder, Classifier, 1).encoder.embeddings.words.weight
        model = bilstm.BiLSTM(words, len(task.labels), pair=task.task.pair, seed=seed).train()
    else:
        kind = task.kind
        if kind is VectorClassifier:
            kind = functools.partial(kind, pooling=read_pooling(folder), pair=task.task.pair)
        model = load_pretrained(folder, kind, len(task.labels) or 2, seed)
    if isinstance(model, VectorClassifier):
        torch.nn.init.zeros_(model.classify.weight)
    if task.regression:
        *_, bias = model.parameters()
        torch.nn.init.constant_(bias, task.train[1].nanmean().item())
        if isinstance(model, VectorClassifier) and model.pair:
            known = task.train[1][task.train[1].isfinite()]
            model.start_as_cosine(known.min().item(), known.max().item())
    return model


def adamw(model):
    """Returns AdamW with BERT's fine-tuning settings: betas (0.9, 0.999), weight decay 0.01 on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=True)


def export(folder, model, task, tokenizer, config):
    """Writes a fine-tuned model and its vocabulary in transformers' format; a BiLSTM in our own.

    A VectorClassifier's folder is one of sentence-transformers too, which reads its encoder.

    The last layer of a regression is changed in place, so that the model gives scores, and not what it learnt of them.
    """
    if task.regression:
        *_, weight, bias = (parameter.data for parameter in model.parameters())
        weight.mul_(task.scale)
        bias.mul_(task.scale).add_(task.shift)
    if isinstance(model, bilstm.BiLSTM):
        bilstm.save(folder, model, task.labels)
        tokenizer.save(folder, "distilbert")
        return
    extra = {"finetuning_task": task.name}
    if task.labels:
        extra["id2label"] = {str(i): label for i, label in enumerate(task.labels)}
        extra["label2id"] = {label: i for i, label in enumerate(task.labels)}
        extra["problem_type"] = "regression" if task.regression else "single_label_classification"
    if isinstance(model, VectorClassifier):
        extra["text_pair"] = model.pair
    weights.save_model(folder, model, **extra)
    tokenizer.max_length = config.positions
    tokenizer.save(folder, config.family)
    if isinstance(model, VectorClassifier):
        write_pooling(folder, model.pooling, config)

"""Fine-tuning heads on an encoder: a sentence classifier and a span reader.

Both are the heads of transformers, so their checkpoints load there:

    Classifier   [CLS] -> (RoBERTa: dropout) dense -> tanh (DistilBERT: ReLU) -> dropout -> one logit per label
    SpanReader   each token -> two logits: the answer starts here, the answer ends here

Legend as in model.py:  B batch   T tokens per sequence   C width   K labels, 1 for a regression
"""

import pathlib

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.dropout import dropout
from minidistil import weights
from minidistil.errors import UserError
from minidistil.families import FAMILIES
from minidistil.model import Encoder, initialise

MASKED_LOGIT = -1e4  # logit of a padding token; finite, so that differences of logits are finite


class Classifier(nn.Module):
    """ids (B, T) -> logits (B, K), from the hidden state of [CLS]."""

    hub_name = "ForSequenceClassification"

    def __init__(self, config, outputs, seed=None):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.pool = nn.Linear(config.width, config.width)
        self.classify = nn.Linear(config.width, outputs)
        self.family = FAMILIES[config.family]
        self.dropout = config.dropout if self.family.classifier_dropout is None else self.family.classifier_dropout
        initialise(self, config.init_range, seed)

    def forward(self, ids, mask=None, types=None):
        x = self.encoder(ids, mask, types, first=1)[:, 0]  # (B, C)
        x = self.pool(dropout(x, self.dropout, self.training) if self.family.drops_cls else x)
        x = torch.tanh(x) if self.family.head_activation == "tanh" else F.relu(x)
        return self.classify(dropout(x, self.dropout, self.training))


class SpanReader(nn.Module):
    """ids (B, T) -> logits (B, 2, T) of the answer's first token and of its last."""

    hub_name = "ForQuestionAnswering"

    def __init__(self, config, outputs=2, seed=None):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.answer = nn.Linear(config.width, outputs)
        self.dropout = FAMILIES[config.family].span_dropout
        initialise(self, config.init_range, seed)

    def forward(self, ids, mask=None, types=None):
        x = dropout(self.encoder(ids, mask, types), self.dropout, self.training)
        logits = self.answer(x).transpose(1, 2)  # (B, 2, T)
        return logits if mask is None else logits.masked_fill(~mask[:, None], MASKED_LOGIT)


def load_pretrained(folder, kind, outputs, seed=0):
    """Returns a `kind` (Classifier or SpanReader) on the encoder of any folder, fp32, in training mode.

    The head is random, but BERT's pooler, trained with the next-sentence head, is loaded where the file has one.
    """
    config = weights.read_config(folder)
    with torch.device("meta"):
        model = kind(config, outputs)
    source, names = weights.named_weights(folder, model)
    generator, fresh = torch.Generator().manual_seed(seed), {}
    for ours, tensor in model.state_dict().items():
        known = FAMILIES[config.family].keeps_pooler and ours.startswith("pool.") and names[ours][0] in source
        if not (ours.startswith("encoder.") or known):
            fresh[ours] = torch.zeros(tensor.shape)
            if tensor.ndim > 1:
                fresh[ours].normal_(0.0, config.init_range, generator=generator)
    return weights.fill(folder, model, source, names, fresh).train()


def read_finetuned(folder):
    """Returns (Config, Classifier or SpanReader, label names) of a fine-tuned folder, from its config.json."""
    config = weights.read_config(folder)
    values = weights.read_json(pathlib.Path(folder) / "config.json")
    architecture = str((values.get("architectures") or [""])[0])
    kind = next((kind for kind in (Classifier, SpanReader) if architecture.endswith(kind.hub_name)), None)
    if kind is None:
        raise UserError(f"{folder} is not a fine-tuned model: make one with finetune.py")
    labels = values.get("id2label") or {}
    if not isinstance(labels, dict) or set(labels) != {str(i) for i in range(len(labels))}:
        raise UserError(f"{folder}/config.json: id2label does not count 0, 1, 2, ...: correct it")
    return config, kind, tuple(str(labels[str(i)]) for i in range(len(labels)))


def load_finetuned(folder):
    """Returns (model, labels) of a fine-tuned folder: a Classifier or SpanReader in eval mode, its labels' names."""
    config, kind, labels = read_finetuned(folder)
    with torch.device("meta"):
        model = kind(config, len(labels) if labels and kind is Classifier else 2)
    return weights.fill(folder, model, *weights.named_weights(folder, model)).eval(), labels

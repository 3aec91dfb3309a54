"""Fine-tuning heads on an encoder: two classifiers of texts and a span reader.

    Classifier         [CLS] -> (RoBERTa: dropout) dense -> tanh (DistilBERT: ReLU) -> dropout -> one logit per label
    SpanReader         each token -> two logits: the answer starts here, the answer ends here
    VectorClassifier   sentence vector u, or [u; v; |u - v|; u * v] of a pair -> one logit per label

The first two are the heads of transformers, so their checkpoints load there, and read a pair as one sequence. The third
is for sentence encoders: it encodes the texts of a pair one by one, as they do, and so begins with what they know.
Sources: Reimers and Gurevych 2019, arXiv 1908.10084 (their softmax objective); the product of the vectors is Conneau et
al. 2017, arXiv 1705.02364.

Legend as in model.py:  B batch   T tokens per sequence   C width   K labels, 1 for a regression
"""

import functools
import pathlib

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.dropout import dropout
from minidistil import weights
from minidistil.errors import UserError
from minidistil.families import FAMILIES
from minidistil.model import Encoder, initialise
from minidistil.pooling import read_pooling

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


class VectorClassifier(nn.Module):
    """ids (B, T) -> logits (B, K) of the sentence vectors that `pooling` makes; with `pair`, of two in each row.

    A row is an item of `encode_apart`. Vectors have length sqrt(C), and so features of about the same size as [CLS].
    """

    hub_name = "ForSentenceVectors"  # ours: transformers and sentence-transformers read the encoder alone

    def __init__(self, config, outputs, pooling, pair, seed=None):
        super().__init__()
        self.config, self.pooling, self.pair = config, pooling, pair
        self.encoder = Encoder(config)
        self.classify = nn.Linear((4 if pair else 1) * config.width, outputs)
        initialise(self, config.init_range, seed)

    def forward(self, ids, mask, types):
        if not self.pair:
            return self.classify(self.vectors(ids, mask))
        ids, mask = split_pairs(ids, mask, types)
        u, v = self.vectors(ids, mask).chunk(2)
        return self.classify(torch.cat([u, v, (u - v).abs(), u * v], dim=1))

    def vectors(self, ids, mask):
        """Returns the vectors (B, C) of sentences, fp32."""
        vectors = self.pooling(self.encoder(ids, mask), mask)
        return F.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5

    @torch.no_grad()
    def start_as_cosine(self, lowest, highest):
        """Makes the one logit of a pair `lowest` where the cosine of its vectors is 0, and `highest` where it is 1."""
        width = self.config.width
        self.classify.bias.fill_(lowest)
        self.classify.weight.zero_()[:, 3 * width :] = (highest - lowest) / width  # of u * v, the last feature


def split_pairs(ids, mask, types):
    """Returns (ids, mask), both (2B, T'), of the texts of type 0, then those of type 1, in ids, mask, types (B, T)."""
    inside = torch.cat([mask & (types == 0), mask & (types == 1)])
    order = (~inside).long().argsort(dim=1, stable=True)  # moves these tokens to the front, in order
    lengths = inside.sum(1, keepdim=True)
    T = int(lengths.max())
    return ids.repeat(2, 1).gather(1, order)[:, :T], torch.arange(T, device=ids.device) < lengths


def load_pretrained(folder, kind, outputs, seed=0):
    """Returns a `kind(config, outputs)`, a model of this module on the encoder of any folder, fp32, in training mode.

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
    """Returns (Config, class of the model, label names) of a fine-tuned folder, from its config.json."""
    config = weights.read_config(folder)
    values = weights.read_json(pathlib.Path(folder) / "config.json")
    architecture = str((values.get("architectures") or [""])[0])
    kinds = Classifier, SpanReader, VectorClassifier
    kind = next((kind for kind in kinds if architecture.endswith(kind.hub_name)), None)
    if kind is None:
        raise UserError(f"{folder} is not a fine-tuned model: make one with finetune.py")
    labels = values.get("id2label") or {}
    if not isinstance(labels, dict) or set(labels) != {str(i) for i in range(len(labels))}:
        raise UserError(f"{folder}/config.json: id2label does not count 0, 1, 2, ...: correct it")
    return config, kind, tuple(str(labels[str(i)]) for i in range(len(labels)))


def load_finetuned(folder):
    """Returns (model, labels) of a fine-tuned folder: a model of this module in eval mode, its labels' names."""
    config, kind, labels = read_finetuned(folder)
    outputs = len(labels) if labels and kind is not SpanReader else 2
    if kind is VectorClassifier:
        pair = bool(weights.read_json(pathlib.Path(folder) / "config.json").get("text_pair"))
        kind = functools.partial(kind, pooling=read_pooling(folder), pair=pair)
    with torch.device("meta"):
        model = kind(config, outputs)
    return weights.fill(folder, model, *weights.named_weights(folder, model)).eval(), labels

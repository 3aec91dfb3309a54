"""What fine-tuning puts on an encoder: a head that names a sentence, and one that points at a span.

Both are those of transformers, so that what is trained here loads there:

    Classifier   [CLS] -> dense, tanh (BERT) or ReLU (DistilBERT) -> dropout -> one number a label
    SpanReader   each token -> two numbers: does the answer start here, does it end here?

Legend as in model.py:  B batch   T tokens per sequence   C width   K labels, 1 for a regression
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.layer_norm import dropout
from minidistil.model import Encoder, initialise

NOWHERE = -1e4  # logit of a token that is padding; finite, so that differences of logits are


class Classifier(nn.Module):
    """ids (B, T) -> logits (B, K), from the hidden state of [CLS]."""

    def __init__(self, config, outputs, seed=None):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.pool = nn.Linear(config.width, config.width)
        self.classify = nn.Linear(config.width, outputs)
        self.dropout = config.dropout if config.token_types else 0.2  # DistilBERT's own, Sanh et al. 2019
        initialise(self, config.init_range, seed)

    def forward(self, ids, mask=None, types=None):
        x = self.pool(self.encoder(ids, mask, types, first=1)[:, 0])  # (B, C)
        x = torch.tanh(x) if self.config.token_types else F.relu(x)
        return self.classify(dropout(x, self.dropout, self.training))


class SpanReader(nn.Module):
    """ids (B, T) -> logits (B, 2, T) of the answer's first token and of its last."""

    def __init__(self, config, outputs=2, seed=None):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.answer = nn.Linear(config.width, outputs)
        self.dropout = 0.0 if config.token_types else 0.1  # DistilBERT's own
        initialise(self, config.init_range, seed)

    def forward(self, ids, mask=None, types=None):
        x = dropout(self.encoder(ids, mask, types), self.dropout, self.training)
        logits = self.answer(x).transpose(1, 2)  # (B, 2, T)
        return logits if mask is None else logits.masked_fill(~mask[:, None], NOWHERE)

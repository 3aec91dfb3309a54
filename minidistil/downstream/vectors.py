"""Sentence vectors of a folder's model."""

import numpy as np
import torch

from minidistil import weights
from minidistil.downstream import glue, metrics
from minidistil.downstream.batches import encode_pair, predict
from minidistil.pooling import SentenceEncoder, read_pooling
from minidistil.tokenizer import Tokenizer


class Vectors(torch.nn.Module):
    """ids (B, T), mask -> vectors (B, C) fp32: a model and its pooling, normalised where the folder says so."""

    def __init__(self, model, pooling):
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, ids, mask, types=None):
        vectors = self.pooling(self.model(ids, mask, types), mask)
        return torch.nn.functional.normalize(vectors, dim=-1) if self.pooling.normalize else vectors


def embed(folder, texts, device="cpu", dtype="fp32", prefix=""):
    """Returns the sentence vectors (N, C) fp32 of N texts, each after `prefix`, of the model in a folder.

    Raises UserError for a model that is none of an encoder with a pooling that read_pooling knows.
    """
    tokenizer, pooling = Tokenizer.load(folder), read_pooling(folder)
    model = weights.load_model(folder, kind=SentenceEncoder).to(device).requires_grad_(False)
    T = min(pooling.max_length or model.config.positions, model.config.positions // 8 * 8)  # batches have such lengths
    items = [encode_pair(tokenizer, prefix + text, None, T) for text in texts]
    vectors = predict(Vectors(model, pooling), items, tokenizer.pad_id, torch.device(device), dtype)
    return np.stack(vectors)


def zero_shot(folder, data, prefix=""):
    """Returns how well a model's vectors tell similar sentences, untrained for it: percent, on STS-B's dev set.

    It is the Spearman correlation of their cosine with the scores. `data` is the GLUE folder or that of STS-B.
    """
    examples = glue.load("stsb", data)[1]["dev"]
    both = embed(folder, [text for pair in examples for text in pair[:2]], prefix=prefix)  # (2 N, C)
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    cosines = (both[::2] * both[1::2]).sum(1)
    return 100 * metrics.spearman(cosines, [example.label for example in examples])

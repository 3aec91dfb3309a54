"""The baseline without attention: a bidirectional LSTM on the teacher's word embeddings.

    student of BERT    Tang et al. 2019, arXiv 1903.12136: single texts and siamese pairs
    pair features      Conneau et al. 2017, arXiv 1705.02364: [u; v; |u - v|; u * v]

Legend:  B batch   T tokens per sequence   N sentences   V vocabulary   C embedding width   H hidden width
"""

import contextlib
import json
import pathlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from kernels.dropout import dropout
from minidistil.errors import UserError
from minidistil.files import write_json
from minidistil.safetensors import read_safetensors, write_safetensors

MODEL_TYPE = "minidistil-bilstm"


class BiLSTM(nn.Module):
    """A classifier of texts or pairs of texts, with the interface of `heads.Classifier`.

    The word vectors `words` (V, C) are copied and trained; other weights start uniform within 1 / sqrt(columns).
    """

    def __init__(self, words, outputs, pair, hidden=256, dropout=0.1, seed=None):
        super().__init__()
        self.pair, self.dropout = pair, dropout
        self.words = nn.Embedding.from_pretrained(words.detach().float().clone(), freeze=False)
        self.lstm = nn.LSTM(words.shape[1], hidden, num_layers=2, bidirectional=True, dropout=dropout)
        self.dense = nn.Linear((8 if pair else 2) * hidden, hidden)
        self.out = nn.Linear(hidden, outputs)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for module in (self.lstm, self.dense, self.out):
            for parameter in module.parameters():
                bound = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.0
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, ids, mask, types):
        """Returns logits (B, outputs) of ids (B, T) int64: [CLS] a [SEP], or [CLS] a [SEP] b [SEP].

        mask (B, T) bool is True at real tokens, of which [SEP] is the last; [CLS] and [SEP] count as words. The second
        text is what follows the first [SEP], since RoBERTa's `types` do not tell the texts apart.
        """
        if not self.pair:
            features = self.encode(ids, mask)  # (B, 2H)
        else:
            ends = ids == ids.gather(1, mask.sum(1, keepdim=True) - 1)
            second = ends.cumsum(1) > ends.long()
            segments = torch.cat([mask & ~second, mask & second])  # (2B, T)
            u, v = self.encode(torch.cat([ids, ids]), segments).chunk(2)
            features = torch.cat([u, v, (u - v).abs(), u * v], dim=1)  # (B, 8H)
        x = F.relu(self.dense(self._drop(features)))
        return self.out(self._drop(x))

    def encode(self, ids, inside):
        """Returns sentence vectors (N, 2H): last states of both directions over the tokens `inside` (N, T) bool."""
        order = (~inside).long().argsort(dim=1, stable=True)  # moves these tokens to the front, in order
        lengths = inside.sum(1).cpu()  # packing needs them on the CPU
        packed = pack_padded_sequence(ids.gather(1, order), lengths, batch_first=True, enforce_sorted=False)
        packed = packed._replace(data=self._drop(self.words(packed.data)))  # (tokens, C), without padding
        # autocast computes it in fp16 on a GPU, even for bf16, and its gradients would vanish
        with torch.autocast("cuda", enabled=False) if ids.is_cuda else contextlib.nullcontext():
            _, (last, _) = self.lstm(packed)  # (4, N, H): layer, then direction
        return torch.cat([last[2], last[3]], dim=1)

    def _drop(self, x):
        return dropout(x, self.dropout, self.training)


def save(folder, model, labels):
    """Writes config.json and model.safetensors, for `load`; a regression has labels ()."""
    (vocab, width), hidden = model.words.weight.shape, model.lstm.hidden_size
    sizes = {"vocab_size": vocab, "width": width, "hidden": hidden, "dropout": model.dropout, "pair": model.pair}
    write_json(pathlib.Path(folder) / "config.json", {"model_type": MODEL_TYPE, **sizes, "labels": list(labels)})
    write_safetensors(pathlib.Path(folder) / "model.safetensors", model.state_dict())


def load(folder):
    """Returns (BiLSTM in eval mode, tuple of labels) of a folder that `save` wrote; UserError for a damaged one."""
    config, weights = pathlib.Path(folder) / "config.json", pathlib.Path(folder) / "model.safetensors"
    if not (config.is_file() and weights.is_file()):
        raise UserError(f"{folder} lacks {config.name} or {weights.name}: give the folder of a trained BiLSTM")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        if values["model_type"] != MODEL_TYPE:
            raise UserError(f"{config} describes a {values['model_type']!r}: give the folder of a trained BiLSTM")
        labels = tuple(values["labels"])
        with torch.device("meta"):  # allocates nothing: every tensor is replaced below
            words = torch.empty(values["vocab_size"], values["width"])
            model = BiLSTM(words, len(labels) or 1, values["pair"], values["hidden"], values["dropout"])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{config} is damaged ({type(error).__name__}): train again or copy it again") from None
    tensors, _ = read_safetensors(weights)
    if _shapes(tensors) != _shapes(model.state_dict()):
        raise UserError(f"{weights} and {config.name} are of different models: take both from one training")
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return model.eval(), labels


def _shapes(tensors):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

"""A fresh model whose first heads look at neighbouring words: where the demo's teacher starts.

    python data/demo/start.py runs/start

Masked-LM training from BERT's usual start spends millions of tokens on a plateau, at the frequencies of words, until
some heads have found that the word beside a blank matters. Here two blocks begin with that knowledge and no other: the
position table holds sines and cosines, and q and k are set so that a head scores position i + offset highest. All of
it is trained from there. The rest is random, as ever.
"""

import math
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from minidistil import weights  # noqa: E402
from minidistil.model import MaskedLM, initialise  # noqa: E402
from minidistil.tokenizer import Tokenizer  # noqa: E402

OFFSETS = [(-1, 1, -2, 2), (-3, 3, -4, 4)]  # a block, its heads
WORD_STD = 0.05  # of all random matrices: about 1 / sqrt(width)
AMPLITUDE = 0.15  # of the sines: beside words of 0.05, about half of an embedding's variance is its position
GAIN = 0.7  # of q and k: neighbours then score about 8 above the rest, which softmax turns into most of the weight


def fresh(config, seed=0):
    """Returns a `MaskedLM` of this shape with positional heads; head width D uses D / 2 frequencies."""
    model = MaskedLM(config, seed)
    initialise(model, WORD_STD, seed)
    D = config.width // config.heads
    # odd multiples of half a step: a sum of cosines that peaks at 0 and nowhere else within 2 D positions
    frequencies = math.pi * (torch.arange(D // 2) + 0.5) / (D // 2)
    angles = torch.arange(config.positions)[:, None] * frequencies  # (positions, D / 2)
    with torch.no_grad():
        positions = model.encoder.embeddings.positions.weight.zero_()
        positions[:, : D // 2], positions[:, D // 2 : D] = AMPLITUDE * angles.sin(), AMPLITUDE * angles.cos()
        for block, offsets in zip(model.encoder.blocks, OFFSETS, strict=False):
            q, k, _ = block.attention.qkv.weight.chunk(3)  # views, (C, C) each
            for h, offset in enumerate(offsets[: config.heads]):
                rows = slice(h * D, (h + 1) * D)
                turn, n = offset * frequencies, D // 2
                q[rows], k[rows] = 0.0, 0.0
                k[rows, :D] = GAIN * torch.eye(D)
                # sin(a + b) and cos(a + b) from sin a and cos a
                rotation = torch.zeros(D, D)
                rotation[:n, :n], rotation[:n, n:] = turn.cos().diag(), turn.sin().diag()
                rotation[n:, :n], rotation[n:, n:] = -turn.sin().diag(), turn.cos().diag()
                q[rows, :D] = GAIN * rotation
    return model


if __name__ == "__main__":
    config = weights.read_config(ROOT / "data" / "demo")
    weights.save_model(sys.argv[1], fresh(config))
    vocab = Tokenizer.load(ROOT / "data" / "demo" / "vocab.txt").vocab
    Tokenizer(vocab, max_length=config.positions).save(sys.argv[1], "bert")

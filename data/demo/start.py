"""The initial weights of the demo's teacher: a random model whose first heads attend to neighbouring words.

    python data/demo/start.py runs/start

From BERT's usual initialisation, masked-LM training spends millions of tokens on a plateau, where it predicts word
frequencies, until some heads attend to the words beside a blank. Here two blocks start with such heads: the position
table holds sines and cosines, and q and k give position i + offset the highest score. All other weights are random, and
all weights are trained.
"""

import math
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from minidistil import weights  # noqa: E402
from minidistil.model import LanguageModel, initialise  # noqa: E402
from minidistil.tokenizers.wordpiece import WordPiece  # noqa: E402

OFFSETS = [(-1, 1, -2, 2), (-3, 3, -4, 4)]  # per block, per head
WORD_STD = 0.05  # of all random matrices: about 1 / sqrt(width)
AMPLITUDE = 0.15  # of the sines: with word vectors of std 0.05, the position is about half of an embedding's variance
GAIN = 0.7  # of q and k: neighbours then score about 8 above the rest, and softmax gives them most of the weight


def fresh(config, seed=0):
    """Returns a `LanguageModel` of this shape with positional heads; head width D uses D / 2 frequencies."""
    model = LanguageModel(config, seed)
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
                angle, n = offset * frequencies, D // 2
                q[rows], k[rows] = 0.0, 0.0
                k[rows, :D] = GAIN * torch.eye(D)
                # sin(a + b) and cos(a + b) from sin a and cos a
                rotation = torch.zeros(D, D)
                rotation[:n, :n], rotation[:n, n:] = angle.cos().diag(), angle.sin().diag()
                rotation[n:, :n], rotation[n:, n:] = -angle.sin().diag(), angle.cos().diag()
                q[rows, :D] = GAIN * rotation
    return model


if __name__ == "__main__":
    config = weights.read_config(ROOT / "data" / "demo")
    weights.save_model(sys.argv[1], fresh(config))
    vocab = WordPiece.load(ROOT / "data" / "demo" / "vocab.txt").vocab
    WordPiece(vocab, max_length=config.positions).save(sys.argv[1], "bert")

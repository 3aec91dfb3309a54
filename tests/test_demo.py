"""The demo's teacher as it is shipped, and the start that it was trained from."""

import importlib.util
import pathlib

import torch

from minidistil import weights
from minidistil.model import Config
from minidistil.tokenizer import Tokenizer

DEMO = pathlib.Path(__file__).resolve().parent.parent / "data" / "demo"


def test_the_teacher_is_small_and_knows_its_words():
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) < 16e6
    model, tokenizer = weights.load_model(DEMO), Tokenizer.load(DEMO)
    assert (model.config.layers, model.config.width, model.config.token_types) == (4, 256, 2)
    assert model.config.vocab_size == len(tokenizer.vocab) == 8192 and tokenizer.max_length == model.config.positions
    for prompt, expected in (
        ("if none, the default value is [MASK].", "none false true"),
        ("a list of keyword [MASK].", "arguments"),
        ("raise an [MASK] if the file does not exist.", "error exception"),
    ):
        ids = tokenizer.encode_prompt(prompt)
        with torch.no_grad():
            row = model(torch.tensor([ids]))[0, ids.index(tokenizer.mask_id)]
            guesses = [tokenizer.vocab[i] for i in model.logits(row[None])[0].topk(5).indices.tolist()]
        assert set(expected.split()) & set(guesses), (prompt, guesses)


def test_the_start_looks_at_neighbours():
    """In each positional head of the first block, most attention goes to its one offset, at all of 128 positions."""
    spec = importlib.util.spec_from_file_location("start", DEMO / "start.py")
    start = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(start)
    model = start.fresh(Config(vocab_size=1000, positions=128, layers=4, heads=4, width=256, mlp_width=64))
    ids = torch.randint(0, 1000, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = model.encoder.embeddings(ids)
        q, k, _ = model.encoder.blocks[0].attention.qkv(x).view(2, 128, 3, 4, 64).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-1, -2) / 8, -1)  # (B, H, T, T)
    for h, offset in enumerate(start.OFFSETS[0]):
        assert torch.diagonal(attention[:, h], offset, dim1=-2, dim2=-1).mean() > 0.5, offset

"""Fixtures shared by all tests."""

import importlib.util
import os
import pathlib

import interpreter
import pytest
import torch

if os.environ.get("MINIDISTIL_PTX"):  # sm_90, say: kernels are compiled for it, and what comes out is executed
    import ptx

    ptx.install(os.environ["MINIDISTIL_PTX"])
elif not torch.cuda.is_available():  # Triton decides once, when it is imported, whether its kernels are interpreted
    os.environ["TRITON_INTERPRET"] = "1"
    import kernels.cosine
    import kernels.dropout
    import kernels.layer_norm
    import kernels.linear_distill_kl  # noqa: F401

    if importlib.util.find_spec("triton"):
        interpreter.prepare_once_a_launch()
    del os.environ["TRITON_INTERPRET"]  # processes that tests start, and tests that do not ask for it, use no kernels

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # each worker, and each process that it starts, has its share of the cores
    threads = max(1, (os.cpu_count() or 1) // WORKERS)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    """The file that takes longest first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: "test_readme" not in item.nodeid)


@pytest.fixture(scope="session")
def assets():
    """Folder of real checkpoints and data; not part of a clone, so that tests which need it may skip."""
    folder = pathlib.Path(os.environ.get("MINIDISTIL_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip("real assets are absent: set MINIDISTIL_ASSETS to their folder")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A world in which an update takes milliseconds: `tiny / "teacher"` (random, 4 layers x 32), `tiny / "corpus"`."""
    import random

    from data.prepare import prepare
    from minidistil import weights
    from minidistil.model import Config, LanguageModel
    from minidistil.tokenizers.wordpiece import WordPiece
    from minidistil.tokenizers.wordpiece_files import SPECIAL_TOKENS

    folder = tmp_path_factory.mktemp("tiny")
    rng = random.Random(0)
    words = sorted({"".join(rng.choices("abcdefgh", k=rng.randint(1, 4))) for _ in range(400)})
    vocab = [*SPECIAL_TOKENS.values(), *words]
    tokenizer = WordPiece(vocab, max_length=32)
    config = Config(vocab_size=len(vocab), positions=32, layers=4, heads=2, width=32, mlp_width=64)
    weights.save_model(folder / "teacher", LanguageModel(config, seed=1))
    tokenizer.save(folder / "teacher", "bert")
    # words that predict their neighbours, so that there is something to learn
    text = "\n".join(
        " ".join(words[(start + step * i) % len(words)] for i in range(rng.randint(5, 60)))
        for start, step in ((rng.randrange(len(words)), rng.randint(1, 3)) for _ in range(300))
    )
    (folder / "text.txt").write_text(text)
    prepare([str(folder / "text.txt")], folder / "teacher", folder / "corpus", val_share=0.1, workers=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def glue(tiny, tmp_path_factory):
    """SST-2 in which one of two words decides, STS-B in which shared words do, and RTE; in the tiny model's words."""
    import random

    folder = tmp_path_factory.mktemp("glue")
    rng, words = random.Random(0), (tiny / "teacher" / "vocab.txt").read_text().split()[5:]
    good, bad, *rest = words

    def text(n):
        return rng.sample(rest, n)

    def write(task, header, train, dev):
        (folder / task).mkdir()
        for name, rows in (("train", train), ("dev", dev)):
            lines = ["\t".join(map(str, row)) for row in [header, *rows]]
            (folder / task / f"{name}.tsv").write_text("\n".join(lines) + "\n")

    def sentiment(label):
        sentence = text(rng.randint(2, 8))
        sentence.insert(rng.randrange(len(sentence)), good if label else bad)
        return " ".join(sentence), label

    def similarity(score):
        one = text(5)
        return " ".join(one), " ".join(one[:score] + text(5 - score)), float(score)

    write("SST-2", ("sentence", "label"), [sentiment(i % 2) for i in range(400)], [sentiment(i % 2) for i in range(60)])
    pairs = [[similarity(rng.randrange(6)) for _ in range(n)] for n in (160, 40)]
    write("STS-B", ("sentence1", "sentence2", "score"), *pairs)
    rte = [[(i, a, b, "entailment" if s > 2 else "not_entailment") for i, (a, b, s) in enumerate(p)] for p in pairs]
    write("RTE", ("index", "sentence1", "sentence2", "label"), *rte)
    return folder

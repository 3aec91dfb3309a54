"""What a GPU day needs beside a checkout: the corpora, the revision where git is not, and Liger's wheel."""

import json
import os
import pathlib
import subprocess
import sys

from benches import ROOT

FOLDER = ROOT / "data" / "cache" / "gpu-day"  # git ignores it
WORDS = 2_000_000  # of the step's corpus
RUNS = (("first run", 500, 530, ""), ("second run, while the machine is warm", 190, 210, " --second"))  # budget, limit


def make_corpora():
    """Makes the step's corpus and the demo's where they are missing; returns their folders."""
    import train
    from benches.step import BERT_STEP, make_corpus
    from minidistil import hub
    from minidistil.tokenizer import Tokenizer

    folder, demo = FOLDER / "corpus", hub.resolve("demo")
    if not (folder / "meta.json").exists():
        make_corpus(folder, BERT_STEP, WORDS)
    docs = train.open_corpus(train.Settings(), Tokenizer.load(demo), demo)
    return folder, pathlib.Path(docs.folder)


def fetch_liger():
    """Downloads Liger's wheel, which is pure Python; says so where it cannot."""
    if not any(FOLDER.glob("liger_kernel-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(FOLDER)]
        if subprocess.run([*command, "liger-kernel"]).returncode:
            print("there is no wheel of liger-kernel: the comparison will do without Liger", file=sys.stderr)


def commands(folders):
    """How to use a machine that has neither network nor git: what to carry, and the two commands."""
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    carried = json.dumps([str(folder.relative_to(ROOT)) for folder in folders])
    lines = [f"carry {carried}: {size / 2**20:.1f} MiB"]
    for name, budget, limit, flags in RUNS:
        lines += [f"{name}, limit {limit} s:", f"    python3 bench.py gpu --out $OUT --budget {budget}{flags}"]
    lines += ["the output ends with summary.md; copy the files of $OUT before the second run empties it",
              "with less time, budget = limit - 30; single stages: --only 'sweeps;compare'"]  # fmt: skip
    return "\n".join(lines)


def main():
    from minidistil.device import versions

    os.environ["MINIDISTIL_CACHE"] = str(FOLDER.parent)  # what travels lies in the checkout
    FOLDER.mkdir(parents=True, exist_ok=True)
    corpus, docs = make_corpora()
    fetch_liger()
    (FOLDER / "revision.json").write_text(json.dumps(versions()["git"]))
    print(commands([corpus.parent, docs]))

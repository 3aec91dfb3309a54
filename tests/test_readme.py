"""The README's commands, run as a newcomer would in a fresh copy of the repository; its figures against results/."""

import importlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from conftest import WORKERS
from hub_server import hub_server

from minidistil import weights
from minidistil.model import Config, LanguageModel
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers.wordpiece import WordPiece

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a stranger has after `git clone`: the files of this tree that git would keep, no cache, no runs."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("clone")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def python(clone, arguments, **environment):
    """Runs one of the README's python commands offline; returns the finished process."""
    ours = r"(?i)HF_|HUGGINGFACE_|TRANSFORMERS_OFFLINE|MINIDISTIL_CACHE|.*proxy"  # what a stranger may not have
    theirs = {name: value for name, value in os.environ.items() if not re.match(ours, name)}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(clone / "no-hub"), **environment}
    return subprocess.run(
        [sys.executable, *arguments.split()], cwd=clone, env=theirs | offline, capture_output=True, text=True
    )


def promised(first_word):
    """The JSON line of the README that begins so."""
    (line,) = re.findall(rf"^ *(\{{\"{first_word}\".*\}})$", README, re.MULTILINE)
    return json.loads(line)


def gflops():
    """What matrix products reach here, two threads or however many there are: the demo is little else."""
    a, b = torch.randn(1024, 256), torch.randn(256, 8192)
    took = []
    for _ in range(11):
        start = time.perf_counter()
        a @ b
        took.append(time.perf_counter() - start)
    return 2 * a.numel() * b.shape[1] / statistics.median(took) / 1e9


def test_the_first_command(clone):
    """`python train.py`, nothing else: soon done, under 2 GiB, half the layers, 90 % of the teacher's accuracy.

    Soon is 3 minutes where two cores do 200 GFLOP/s (the README's do 290 and take 2), and as much more as they do less.
    """
    assert "    python train.py\n" in README
    limit = 180 * max(1, 200 / gflops()) * (1 if WORKERS == 1 else 2)  # other tests run beside it
    start = time.monotonic()
    done = python(clone, "train.py")
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    summary, shown = json.loads(done.stdout.splitlines()[-1]), promised("out")
    assert seconds < limit and summary["peak_rss_mib"] < 2048
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20  # KiB; the largest of all children

    def shape(value):
        return {k: shape(v) for k, v in value.items()} if isinstance(value, dict) else type(value)

    assert shape(summary) == shape(shown) and list(summary) == list(shown)
    for fixed in ("out", "steps", "tokens"):
        assert summary[fixed] == shown[fixed]
    teacher, student = summary["teacher"], summary["student"]
    layers = [weights.read_config(clone / folder).layers for folder in ("data/demo", summary["out"])]
    assert layers[1] * 2 == layers[0]
    assert student["top1"] >= 0.9 * teacher["top1"]
    # the figures of the README, give or take other versions of the packages whose documentation is the corpus
    for who in ("teacher", "student"):
        assert abs(summary[who]["top1"] - shown[who]["top1"]) < 0.03

    # the second command proves the first: the student fills in a blank
    assert "    python sample.py " in README
    done = python(clone, "sample.py -k 3 --json")
    assert done.returncode == 0, done.stderr
    predictions = json.loads(done.stdout.splitlines()[-1])["predictions"]
    assert len(predictions["student"]) == len(predictions["teacher"]) == 3


def test_every_command_is_a_real_one(capsys):
    """Each flag that the README uses exists; each file that it names does, too."""
    helps, joined = {}, README.replace("\\\n", "")
    begins = r"^ {4}(?:python|torchrun --nproc-per-node \d+) ((?:data/)?\w+\.py)(.*)$"
    for script, arguments in re.findall(begins, joined, re.MULTILINE):
        flags = re.findall(r"(?<!\w)--?[a-z][\w-]*", re.sub(r"\".*?\"|#.*", "", arguments))
        command = [script, *arguments.split()[: script == "bench.py"]]  # whose cases have flags of their own
        if flags and str(command) not in helps:
            main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
            with pytest.raises(SystemExit) as ended:
                main([*command[1:], "--help"])
            assert ended.value.code in (None, 0), command
            helps[str(command)] = capsys.readouterr().out
        for flag in flags:
            assert re.search(rf"(?<![\w-]){flag}\b", helps[str(command)]), (command, flag)
    for name in re.findall(r"^ {4}((?:[\w.-]+/)*[\w-]+\.(?:py|md|txt)) {2,}", README, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_tables_are_those_of_the_results():
    """README tables are written by `python bench.py readme`, from results/*.json alone."""
    done = subprocess.run([sys.executable, ROOT / "bench.py", "readme"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = done.stdout.strip().split("\n\n")
    assert len(tables) >= 3
    for table in tables:
        assert table in README, f"README.md lacks this table:\n{table}"


# ---- `python train.py --teacher bert-base-uncased --accum 64`, exactly as written, with a BERT that fits a test


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder like bert-base-uncased's, of another size: random weights, 512 positions, the commonest words."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = WordPiece(Tokenizer.load(ROOT / "data" / "demo").vocab[:1200], max_length=512)
    config = Config(vocab_size=len(tokenizer.vocab), layers=4, heads=2, width=16, mlp_width=32)
    weights.save_model(folder, LanguageModel(config, seed=0))
    tokenizer.save(folder, "bert")
    return folder


COMMAND = "train.py --teacher bert-base-uncased --accum 64"


def interrupted(clone, updates, **environment):
    """Starts the command, waits for some updates, interrupts it as a person would; returns its stdout."""
    earlier = set(clone.glob("runs/*"))
    process = subprocess.Popen(
        [sys.executable, *COMMAND.split()], cwd=clone, env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None:
        logs = [run / "metrics.jsonl" for run in set(clone.glob("runs/*")) - earlier]
        if any(log.exists() and log.read_text().count('"loss"') >= updates for log in logs):
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.2)
    lines = process.stdout.readlines()
    stderr = process.stderr.read()
    assert process.wait(60) == 130, (lines, stderr)
    return "".join(lines)


def test_teacher_by_name_from_the_cache(clone, bert, tmp_path):
    assert f"    python {COMMAND}\n" in README
    snapshot = tmp_path / "hub" / "models--google-bert--bert-base-uncased" / "snapshots" / "abc"
    shutil.copytree(bert, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    output = interrupted(clone, 1, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert "for the published result take Wikipedia + books: python data/prepare.py wikipedia:" in output
    assert "updates of 64 x 5 x 512 = 163,840 tokens" in output
    assert re.search(r"tokens/s .* left\n", output)
    assert re.search(r"resume with: \S+ train.py --out runs/\S+ --resume\n", output)


def test_teacher_by_name_from_a_server(clone, bert, tmp_path):
    pytest.importorskip("huggingface_hub")
    with hub_server({"bert-base-uncased": bert, "google-bert/bert-base-uncased": bert}) as (endpoint, requests):
        online = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        output = interrupted(clone, 1, **online)
        assert any("model.safetensors" in request for request in requests)
    assert "updates of 64 x 5 x 512 = 163,840 tokens" in output


def test_teacher_by_name_absent_and_offline(clone):
    start = time.monotonic()
    done = python(clone, COMMAND)
    assert done.returncode == 1 and time.monotonic() - start < 30
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("train.py: error: ")
    assert "bert-base-uncased is not a folder, nor whole in the cache" in done.stderr
    assert "or name another model: a folder, or `demo`" in done.stderr

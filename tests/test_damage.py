"""Damaged files of other programs: each reader gives a result or an error of one line, and nothing else.

Weights, pickles and indices are in test_weights.py, corpora in test_data.py, checkpoints in test_train.py.
"""

import copy
import gzip
import json
import math
import random

import pytest
from test_weights import mutations

from minidistil import weights
from minidistil.downstream import glue, squad
from minidistil.downstream.grid import next_run, summarise
from minidistil.downstream.scores import read_scores
from minidistil.energy import Energy
from minidistil.errors import UserError
from minidistil.model import Config, LanguageModel
from minidistil.run import read_metrics
from minidistil.tokenizer import Tokenizer
from minidistil.tokenizers.added_tokens import AddedToken
from minidistil.tokenizers.wordpiece import WordPiece
from minidistil.tokenizers.wordpiece_files import SPECIAL_TOKENS, tokenizer_json

MUTATIONS = 200  # of bytes, and as many of values, for each file
WORDS = [*SPECIAL_TOKENS.values(), *"a b ab cd ##a ##b ##c ##d é".split()]
VALUES = [None, True, False, 0, -1, 1, 0.5, float("inf"), float("nan"), 2**70, "", "x", "[MASK]", "\ud800", [], {},
          [[]], {"a": 1}, ["x"], [None]]  # fmt: skip


def places(value, place=()):
    """Yields the path of each value inside a JSON value."""
    yield place
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*place, key))


def value_mutations(raw, n, seed):
    """Yields n versions of a JSON file in which a value is replaced, removed, or under another key."""
    rng, good = random.Random(seed), json.loads(raw)
    nodes = list(places(good))
    for _ in range(n):
        value, (*above, last) = copy.deepcopy(good), rng.choice(nodes) or (None,)
        parent = value
        for key in above:
            parent = parent[key]
        kind = rng.choice(["replaced", "replaced", "removed", "renamed"])
        if last is None:
            value = rng.choice(VALUES)
        elif kind == "replaced":
            parent[last] = copy.deepcopy(rng.choice(VALUES))
        elif kind == "removed":
            del parent[last]
        elif isinstance(parent, dict):
            parent[rng.choice(["x", "", *parent])] = parent.pop(last)
        yield json.dumps(value).encode()


def survives(path, load, n=MUTATIONS):
    """Asserts that each damaged version of a file loads or raises UserError in one line, and that some do not load."""
    raw, refused = path.read_bytes(), 0
    load()
    damaged = list(mutations(raw, len(raw), n, seed=1))
    if path.suffix == ".json":
        damaged += value_mutations(raw, n, seed=2)
    for data in damaged:
        path.write_bytes(data)
        try:
            load()
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"{path.name} with the bytes {data!r}") from error
    path.write_bytes(raw)
    assert refused


def use(folder):
    """Reads a tokenizer and makes of it ids and the contents of its files."""
    tokenizer = Tokenizer.load(folder)
    tokenizer.encode_with_offsets("ab cd <url> [MASK] é"), tokenizer.encode_prompt("a [MASK]")
    "".join(tokenizer.base).encode(), json.dumps(tokenizer_json(tokenizer, None))
    assert len(tokenizer.digest) == 64 and not {"\n", "\r"} & set("".join(tokenizer.base))


@pytest.fixture
def folder(tmp_path):
    """A small model whose vocabulary has an added token."""
    folder = tmp_path / "model"
    config = Config(vocab_size=len(WORDS) + 1, positions=32, layers=1, heads=1, width=4, mlp_width=4)
    weights.save_model(folder, LanguageModel(config))
    WordPiece(WORDS, max_length=32, added=[AddedToken("<url>", special=False)]).save(folder, "bert")
    return folder


def change(path, **values):
    """Changes some values of a JSON file; None removes one."""
    changed = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


@pytest.mark.parametrize("kind", ["BertTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_tokenizers(folder, name, kind):
    change(folder / "tokenizer_config.json", tokenizer_class=kind)
    survives(folder / name, lambda: use(folder))


def test_a_tokenizer_json_alone(folder):
    (folder / "vocab.txt").unlink()
    survives(folder / "tokenizer.json", lambda: use(folder))


def test_a_vocabulary_alone(folder, tmp_path):
    (folder / "vocab.txt").rename(tmp_path / "words.txt")
    survives(tmp_path / "words.txt", lambda: use(tmp_path / "words.txt"))


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"])
def test_old_lists_of_tokens(folder, name):
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text(json.dumps({"<url>": len(WORDS)}))
    change(folder / "tokenizer_config.json", added_tokens_decoder=None, extra_special_tokens={"user": "<user>"})
    change(folder / "special_tokens_map.json", additional_special_tokens=["<url>", {"content": "<w>", "lstrip": True}])
    survives(folder / name, lambda: use(folder))


def test_configs_of_models(folder):
    survives(folder / "config.json", lambda: weights.load_model(folder))


def test_settings_are_not_guessed(folder):
    """Values that are true or false in Python only, and lists that are text."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    for name, key, value in (
        ("tokenizer_config.json", "do_lower_case", 1),
        ("tokenizer_config.json", "model_max_length", True),
        ("tokenizer_config.json", "model_max_length", float("nan")),
        ("tokenizer_config.json", "extra_special_tokens", "<url>"),
        ("tokenizer_config.json", "added_tokens_decoder", {"14": {"content": "<url>", "lstrip": "no"}}),
        ("tokenizer_config.json", "added_tokens_decoder", {"14.5": {"content": "<url>"}}),
        ("tokenizer.json", "model", model | {"vocab": {"a\n": 0}}),
        ("tokenizer.json", "added_tokens", [{"content": "<url>", "id": True}]),
    ):
        raw = (folder / name).read_text()
        change(folder / name, **{key: value})
        if name == "tokenizer.json":
            change(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend", added_tokens_decoder=None)
        with pytest.raises(UserError):
            Tokenizer.load(folder)
        (folder / name).write_text(raw)


def test_squad(tmp_path):
    text = "ab cd ab cd ab"
    questions = [{"id": str(i), "question": "ab?", "answers": [{"text": "cd", "answer_start": 3}]} for i in range(20)]
    articles = [{"title": q["id"], "paragraphs": [{"context": text, "qas": [q]}]} for q in questions]
    (tmp_path / "all.json").write_text(json.dumps({"data": articles}))
    tokenizer = WordPiece(WORDS, max_length=80)

    def load():
        for part in squad.load(tmp_path / "all.json"):
            for question in part:
                squad.windows(question, tokenizer, 80, 27)

    survives(tmp_path / "all.json", load)


@pytest.mark.parametrize("name", glue.TASKS)
def test_glue(tmp_path, name):
    task = glue.TASKS[name]
    columns = task.header or ("index", *task.texts, task.label)
    labels = list(task.codes or task.labels) or ["0.0", "2.5"]
    rows = [[labels[i % len(labels)] if c == task.label else f"ab cd{i} é" for c in columns] for i in range(20)]
    text = "".join("\t".join(row) + "\n" for row in ([] if task.header else [columns]) + rows)
    folder = tmp_path / task.folder
    folder.mkdir()
    for file in ("train.tsv", "test.tsv", *(file for _, file in task.dev)):
        (folder / file).write_text(text)
    survives(folder / "train.tsv", lambda: glue.load(name, tmp_path))
    (folder / "train.tsv").unlink()
    (folder / "train.tsv.gz").write_bytes(gzip.compress(text.encode()))
    survives(folder / "train.tsv.gz", lambda: glue.load(name, tmp_path))


def test_scores_of_a_fine_tuning(tmp_path):
    path, rates = tmp_path / "scores.json", (1e-4, 2e-4)
    runs = [{"lr": lr, "seed": 0, "epochs": [{"score": 50.0, "accuracy": 50.0}], "updates": 9} for lr in rates]
    path.write_text(json.dumps({"identity": {}, "dtype": "fp32", "data": {}, "teachers": {}, "runs": {"rte": runs},
                                "joules": [0.0, 5.5, 0.0, 7.5, 7.5]}))  # fmt: skip

    def load():
        state = read_scores(path)
        assert math.isfinite(Energy(*state["joules"]).kwh)
        for name, runs in state["runs"].items():
            assert isinstance(name, str) and (next_run(runs, rates, 0, 2) or True) and (not runs or summarise(runs))

    survives(path, load)


def test_metrics_of_a_run(tmp_path):
    """A record that was cut at the end is dropped; damage before it is no reason to drop what follows."""
    path = tmp_path / "metrics.jsonl"
    good = [{"step": i, "loss": 1.0 / i, "lr": 0.1} for i in range(1, 9)]
    good += [{"step": 8, "held_out": {"mlm_loss": 2.5, "top1": 0.5}}]
    path.write_text("".join(json.dumps(record) + "\n" for record in good))
    survives(path, lambda: [record["step"] + 1 for record in read_metrics(path)])
    raw = path.read_bytes()
    for cut in (3, 20, len(raw.splitlines()[-1]) + 1):
        path.write_bytes(raw[:-cut])
        assert read_metrics(path) == good[:-1]
    path.write_bytes(raw[:-20] + b"\0" * 20)  # what a power cut may leave
    assert read_metrics(path) == good[:-1]
    path.write_bytes(raw.replace(b'{"step": 4', b'{"step: 4'))
    with pytest.raises(UserError, match=r"metrics.jsonl, line 4: .*remove that line"):
        read_metrics(path)


@pytest.mark.parametrize("lacking", [
    {"step": 2, "held_out": {"mlm_loss": 2.5}}, {"step": 2, "held_out": {"mlm_loss": 2.5, "top1": 0.5, "kl": 0.1}},
    {"step": 2, "held_out": {"mlm_loss": None, "top1": 0.5}}, {"step": 2, "held_out": 5}, {"step": 2, "held_out": None},
    {"loss": 1.0}, {"step": "2", "loss": 1.0}, {"step": 2, "loss": None}, {"step": 2, "loss": 1.0, "kl": "x"}, 5, None,
])  # fmt: skip
def test_a_record_that_lacks_a_metric(lacking, tmp_path):
    """It is named before the curve of a long run needs it; at the end, it is as if cut."""
    path, good = tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 0.5, "cost": None}]
    path.write_text("\n".join(map(json.dumps, [good[0], lacking, good[1]])))
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: .*remove that line"):
        read_metrics(path)
    path.write_text("\n".join(map(json.dumps, [*good, lacking])))
    assert read_metrics(path) == good

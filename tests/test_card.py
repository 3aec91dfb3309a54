"""Model cards: valid for any name, silent about local paths, true to the run; the code runs; an edited one is kept."""

import contextlib
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import test_causal
import test_finetune
import test_sentence_distillation
from forked import call
from test_causal import causal  # noqa: F401
from test_finetune import tuned
from test_sentence_distillation import world  # noqa: F401
from test_train import settings

import train
from data.prepare import prepare
from minidistil import card as cards
from minidistil import energy, weights
from minidistil.downstream import card as task_cards
from minidistil.hub import published_name
from minidistil.tokenizer import Tokenizer

ROOT = pathlib.Path(train.__file__).parent
hub = pytest.importorskip("huggingface_hub")


def loaded(folder):
    """The card in a folder as the Hub reads it: (its head as a dict, its text)."""
    card = hub.ModelCard.load(pathlib.Path(folder) / "README.md")
    return card.data.to_dict(), card.text


def cached(monkeypatch, tmp_path, name, folder):
    """A model of the Hub in the Hugging Face cache."""
    place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def code_of(folder):
    """The Python in a card."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL))


def python_of(folder):
    """What the Python in a card prints when it runs in its folder, here, where the libraries are imported once."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code_of(folder), "the card", "exec"), {})
    finally:
        os.chdir(before)
    return printed.getvalue()


def command_of(folder):
    """The words of the command in a card, the model's name replaced by its folder."""
    line = re.search(r"```\n(python .*)\n```", (folder / "README.md").read_text())[1]
    return line.replace("USER/NAME", str(folder))


@pytest.fixture(scope="module")
def plain_run(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("card") / "mine"
    train.train(settings(tiny, out))
    return out


# ---- what a card says


def test_a_card_says_what_its_run_says(plain_run, tiny):
    head, text = loaded(plain_run)
    assert head == {
        "library_name": "transformers", "pipeline_tag": "fill-mask", "tags": ["minidistil", "distillation"],
    }  # fmt: skip
    run = json.loads((plain_run / "run.json").read_text())
    student, teacher = run["summary"]["student"], run["summary"]["teacher"]
    sizes = f"{student['parameters']:,} parameters, {student['parameters'] / teacher['parameters']:.0%} of its teacher"
    assert "# mine\n" in text and sizes in text and "The teacher is a model that is not on the Hub." in text
    assert "trained for 5 updates, 1,280 tokens," in text and "| 5 | tau^2 KL" in text and "| 1 | 1 - cosine" in text
    data = run["data"]
    assert f"{data['documents']['train']:,} documents, {data['tokens']['train']:,} tokens (local files)" in text
    rows = re.findall(r"^\| (before training|after 5 updates|teacher) \| ([\d.]+) \|", text, re.MULTILINE)
    losses = run["before"]["mlm_loss"], student["mlm_loss"], teacher["mlm_loss"]
    assert [row[1] for row in rows] == [f"{loss:.3f}" for loss in losses] and losses[0] != losses[1]
    assert "(curve.svg)" in text and (plain_run / "curve.svg").is_file()
    raw = (plain_run / "README.md").read_text()
    assert "\n# license: " in raw.split("---")[1]
    uploaded = {path.name: path.read_bytes() for path in plain_run.iterdir() if path.is_file()}
    del uploaded["run.json"]  # as README's command for the Hub does, with the folder of the checkpoint
    assert len(uploaded) > 6
    for folder in (tiny, plain_run.parent):
        assert not [name for name, data in uploaded.items() if str(folder).encode() in data]


def test_its_code_and_command_run(plain_run):
    """In a process of its own, as the reader of the card runs it, with minidistil's checkout at hand."""
    pytest.importorskip("transformers")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code_of(plain_run)]
    done = subprocess.run(words, cwd=plain_run, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "token_str" in done.stdout, done.stderr
    python, *command = shlex.split(command_of(plain_run))
    done = call([*command, "--teacher", "none"], cwd=ROOT)
    assert python == "python" and done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [
    "it's: a \"name\" # no", "größe 模型", "two\nlines", "- [x](y) *b* | `c` <i>", b"not \xe9 utf-8", "---", "null",
    "{a: b}",
])  # fmt: skip
def test_any_name_gives_a_valid_card(name, plain_run, glue, tiny, tmp_path):
    """That of the folder is the title, and in a task's card it is in the head, too."""
    name = os.fsdecode(name)
    shutil.copytree(plain_run, tmp_path / name)
    cards.write_card(tmp_path / name, cards.card(tmp_path / name))
    head, text = loaded(tmp_path / name)
    assert head["pipeline_tag"] == "fill-mask" and re.search(r"^# \S.*$", text, re.MULTILINE)
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1 and "# - [x]" not in text and "<i>" not in text
    scores = {"settings": {"model": "somewhere: \"else\"", "data": str(glue), "teacher": None, "examples": None,
                           "batch": 8, "epochs": 1.0}, "dtype": "fp32", "energy": None,
              "runs": {"sst2": [{"lr": 1e-3, "seed": 0, "epochs": [{"score": 91.5, "accuracy": 91.5}],
                                 "updates": 3, "seconds": 1.0}]}}  # fmt: skip
    (tmp_path / name / "sst2").mkdir()
    (tmp_path / name / "scores.json").write_text(json.dumps(scores))
    cards.write_card(tmp_path / name / "sst2", task_cards.card(tmp_path / name / "sst2"))
    shown = hub.ModelCard.load(tmp_path / name / "sst2" / "README.md").data
    assert shown.model_name == name.replace("\n", " ").replace("\udce9", r"\udce9") + "-sst2"
    (result,) = shown.eval_results
    assert (result.dataset_type, result.dataset_config, result.metric_type) == ("nyu-mll/glue", "sst2", "accuracy")
    assert result.metric_value == 0.915 and "somewhere" not in (tmp_path / name / "sst2" / "README.md").read_text()


def test_a_teacher_of_the_hub_is_the_base_model(tiny, tmp_path, monkeypatch):
    cached(monkeypatch, tmp_path, "google-bert/bert-base-uncased", tiny / "teacher")
    for out, changes, base in (
        ("copied", {}, "google-bert/bert-base-uncased"), ("random", dict(student_init="random"), None),
        ("further", dict(teacher="none", student_init="bert-base-uncased"), "google-bert/bert-base-uncased"),
    ):  # fmt: skip
        train.train(settings(tiny, tmp_path / out, **dict(teacher="bert-base-uncased", steps=1) | changes))
        head, text = loaded(tmp_path / out)
        assert head.get("base_model") == base and head.get("base_model_relation") == (base and "finetune")
        assert ("distillation" in head["tags"]) == (out != "further")
        shown = "(https://huggingface.co/google-bert/bert-base-uncased)" in text
        assert shown == (out != "further"), text


def test_names_on_the_hub(tiny, tmp_path, monkeypatch):
    """A folder may look like a name: only what lies in the cache, where `resolve` finds it, has one."""
    cached(monkeypatch, tmp_path, "me/mine", tiny / "teacher")
    monkeypatch.chdir(tmp_path)
    assert published_name("me/mine") == "me/mine"
    for other in ("runs/teacher", "me/other", "", None, "demo", "../hub", str(tiny / "teacher")):
        assert published_name(other) is None
    (tmp_path / "me" / "mine").mkdir(parents=True)
    assert published_name("me/mine") is None  # now it is that folder


@pytest.mark.parametrize("source, data_set, shown, language", [
    ("docstrings", None, "documentation strings", "en"),
    ("wikipedia:/home/me/dewiki-latest-pages-articles.xml.bz2", None, "a dump of Wikipedia (de)", "de"),
    ("wikipedia:/home/me/secret/dump.xml", None, "a dump of Wikipedia", None),
    ("hf:Salesforce/wikitext:wikitext-2-raw-v1", "Salesforce/wikitext", "[Salesforce/wikitext]", None),
    ("hf:/home/me/secret", None, "local files", None), ("hf:secret", None, "local files", None),
    ("secret/books", None, "local files", None),
])  # fmt: skip
def test_sources_of_text(source, data_set, shown, language, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").mkdir()
    found = cards._source(source)
    assert (found[0], found[2]) == (data_set, language) and found[1].startswith(shown)
    assert "secret" not in found[1] and "home" not in found[1]


def test_languages_are_named_where_all_are_known(plain_run, tmp_path):
    for sources, language in ((["docstrings"], ["en"]), (["docstrings", "books.txt"], None)):
        folder = tmp_path / str(len(sources))
        shutil.copytree(plain_run, folder)
        run = json.loads((folder / "run.json").read_text())
        run["data"]["sources"] = sources
        (folder / "run.json").write_text(json.dumps(run))
        cards.write_card(folder, cards.card(folder))
        assert loaded(folder)[0].get("language") == language


def test_sentence_encoders(world, tmp_path):  # noqa: F811
    library = pytest.importorskip("sentence_transformers")
    train.train(test_sentence_distillation.settings(world, tmp_path / "out"))
    head, text = loaded(tmp_path / "out")
    assert (head["library_name"], head["pipeline_tag"]) == ("sentence-transformers", "sentence-similarity")
    assert "feature-extraction" in head["tags"] and " sentences, " in text and "sample.py" not in text
    assert "| 1 | squared distance of sentence vectors" in text and "tensor(" in python_of(tmp_path / "out")
    assert command_of(tmp_path / "out").startswith(f"python train.py --teacher {tmp_path / 'out'} ")
    library.SentenceTransformer(str(tmp_path / "out"), device="cpu").save(str(tmp_path / "saved"))  # with its own card
    assert (tmp_path / "saved" / "README.md").exists()


def test_causal_models(tiny, causal, tmp_path):  # noqa: F811
    pytest.importorskip("transformers")
    train.train(test_causal.settings(tiny, causal, tmp_path / "out"))
    head, text = loaded(tmp_path / "out")
    assert (head["pipeline_tag"], head["metrics"]) == ("text-generation", ["perplexity"])
    assert "causal language model" in text and "| perplexity |" in text and "cross-entropy of the next tokens" in text
    assert "generated_text" in python_of(tmp_path / "out") and "[MASK]" not in command_of(tmp_path / "out")


def test_energy_is_in_the_card(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    train.train(settings(tiny, tmp_path / "out", watts=100.0, grams_per_kwh=400.0))
    record = json.loads((tmp_path / "out" / "run.json").read_text())["energy"]
    assert f"## Energy\n\n{energy.describe(record)}.\n" in loaded(tmp_path / "out")[1]


# ---- a card that somebody has edited


def test_a_card_is_rewritten_until_it_is_edited(tiny, tmp_path, capsys):
    out, readme = tmp_path / "out", tmp_path / "out" / "README.md"
    train.train(settings(tiny, out, steps=60, time_limit=1e-4))
    first = readme.read_text()
    assert "60 updates were planned, but a time limit ended the run before." in first
    train.train(settings(tiny, out, steps=60, time_limit=1e-4, resume=True))
    second = readme.read_text()
    assert second != first and "was edited" not in capsys.readouterr().out
    readme.write_text(second.replace("# license: ", "license: mit # "))
    train.train(settings(tiny, out, steps=60, resume=True))
    assert "license: mit" in readme.read_text() and "a time limit ended" in readme.read_text()
    assert f"{readme} was edited and is kept; the card of this run is README.new.md" in capsys.readouterr().out
    assert "trained for 60 updates" in (out / "README.new.md").read_text()


@pytest.mark.parametrize("edit", [
    lambda raw: raw + b"mine\n", lambda raw: raw.replace(b"\n", b"\r\n"), lambda raw: raw[:-100],
    lambda raw: b"mine", lambda raw: b"", lambda raw: raw.replace(b"curve", b"c\xff"), lambda raw: b"x" + raw,
])  # fmt: skip
def test_any_edit_is_kept(edit, tmp_path):
    cards.write_card(tmp_path, "one curve\n")
    cards.write_card(tmp_path, "two curves\n")
    readme = tmp_path / "README.md"
    assert readme.read_text().startswith("two") and not (tmp_path / "README.new.md").exists()
    edited = edit(readme.read_bytes())
    readme.write_bytes(edited)
    cards.write_card(tmp_path, "three\n")
    assert readme.read_bytes() == edited and (tmp_path / "README.new.md").read_text().startswith("three\n")


def test_without_the_library_only_the_card_is_missing(tiny, glue, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    train.train(settings(tiny, tmp_path / "out", steps=1))
    tuned(tiny, glue, tmp_path / "task", examples=24, epochs=1.0)
    for folder in (tmp_path / "out", tmp_path / "task" / "sst2"):
        assert (folder / "model.safetensors").exists() and not (folder / "README.md").exists()
    assert capsys.readouterr().err.count("is not written, for want of huggingface_hub: pip install") == 2


# ---- tasks


def test_cards_of_tasks(tiny, glue, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    cached(monkeypatch, tmp_path, "me/small-bert", tiny / "teacher")
    few = dict(model="me/small-bert", examples=24, epochs=1.0, seeds=2, watts=60.0)
    summary = tuned(tiny, glue, tmp_path / "out", "sst2,stsb", **few)
    state = json.loads((tmp_path / "out" / "scores.json").read_text())
    expected = {
        "sst2": [("accuracy", "accuracy")], "stsb": [("pearsonr", "pearson"), ("spearmanr", "spearman")],
    }  # fmt: skip
    for task, metrics in expected.items():
        folder = tmp_path / "out" / task
        head, text = loaded(folder)
        assert head["base_model"] == "me/small-bert" and head["base_model_relation"] == "finetune"
        assert head["datasets"] == ["nyu-mll/glue"] and head["language"] == "en"
        assert head["pipeline_tag"] == "text-classification" and head["metrics"] == [hubs for hubs, _ in metrics]
        best = max((r["epochs"][-1] for r in state["runs"][task]), key=lambda last: last["score"])
        found = hub.ModelCard.load(folder / "README.md").data.eval_results
        assert [(r.metric_type, r.metric_value) for r in found] == [
            (hubs, pytest.approx(best[ours] / 100, abs=1e-6)) for hubs, ours in metrics
        ]
        assert {(r.dataset_config, r.dataset_split) for r in found} == {(task, "validation")}
        assert f"median {summary['tasks'][task]['score']:.2f}" in text and str(glue) not in text
        assert "score" in python_of(folder) and "Of 4 training runs on 2 tasks together: " in text
    assert state["energy"]["estimated_kwh"] > 0 and len(state["joules"]) == 5


def test_cards_of_sentence_vectors(tiny, glue, tmp_path):
    """They say how to get the vector, by the library, and the label or the score, by minidistil."""
    pytest.importorskip("sentence_transformers")
    tuned(tiny, glue, tmp_path / "out", "sst2,stsb", vectors=True, examples=24, epochs=1.0)
    for task, labels in {"sst2": "('negative', 'positive')", "stsb": "('score',)"}.items():
        head, _ = loaded(tmp_path / "out" / task)
        assert (head["library_name"], head["pipeline_tag"]) == ("sentence-transformers", "text-classification")
        assert f"{labels} [array([" in python_of(tmp_path / "out" / task)
        assert command_of(tmp_path / "out" / task).endswith(" --vectors")


def test_a_file_in_the_form_of_squad_is_no_squad(tiny, tmp_path):
    pytest.importorskip("transformers")
    test_finetune.test_squad(tiny, tmp_path)
    for out in ("out", "second"):
        head, text = loaded(tmp_path / out / "squad")
        assert "model-index" not in head and "datasets" not in head and "language" not in head
        assert head["pipeline_tag"] == "question-answering" and "| em | " in text
        assert "distillation" in head["tags"] or out == "out"
        assert ("guided by 1 fine-tuned teacher." in text) == (out == "second") and str(tmp_path) not in text
    python_of(tmp_path / "out" / "squad")


def test_official_squad_and_mnli_have_their_names():
    (em, f1) = task_cards.results("squad", {"em": 80.5, "f1": 88.25}, task_cards.data_set("squad", str(ROOT)))
    assert (em.metric_type, em.metric_value, f1.metric_value) == ("exact_match", 80.5, 88.25)
    assert em.dataset_type == "rajpurkar/squad" and em.task_type == "question-answering"
    both = task_cards.results("mnli", {"accuracy_matched": 82.0, "accuracy_mismatched": 83.0, "other": 1.0},
                              task_cards.data_set("mnli", "x"))  # fmt: skip
    assert [r.dataset_split for r in both] == ["validation_matched", "validation_mismatched"]
    assert task_cards.data_set("my own", "x") is None


def test_a_bilstm_has_a_card_without_transformers(tiny, glue, tmp_path):
    tuned(tiny, glue, tmp_path / "out", model="bilstm", words=str(tiny / "teacher"), examples=24, epochs=1.0)
    head, text = loaded(tmp_path / "out" / "sst2")
    assert "library_name" not in head and "from transformers" not in text and "A BiLSTM on word vectors" in text


def test_an_interrupted_grid_has_cards_of_what_is_done(tiny, glue, tmp_path, monkeypatch):
    few = dict(task="sst2,stsb", examples=24, epochs=2.0, watts=5e6)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        test_finetune.interrupted_at(10, patch)  # in the second task
        tuned(tiny, glue, tmp_path / "out", **few)
    assert ended.value.code == 128 + signal.SIGTERM
    assert loaded(tmp_path / "out" / "sst2")[0]["datasets"] == ["nyu-mll/glue"]
    assert not (tmp_path / "out" / "stsb").exists()
    scores = tmp_path / "out" / "scores.json"
    state = json.loads(scores.read_text())
    assert state["energy"]["kwh"] == state["energy"]["estimated_kwh"] > 0
    scores.write_text(json.dumps(state | {"joules": [0.0, 0.0, 9e9, 4000.0, 4000.0]}))
    tuned(tiny, glue, tmp_path / "out", **few, resume=True)
    after = json.loads(scores.read_text())["joules"]
    assert after[2] > 9e9 and 4000 < after[3] == after[4] < 8000
    assert loaded(tmp_path / "out" / "stsb")[0]["metrics"] == ["pearsonr", "spearmanr"]


def test_our_folders_still_open(plain_run):
    """With a README.md in it: here, and in transformers."""
    transformers = pytest.importorskip("transformers")
    assert weights.load_model(plain_run) is not None and Tokenizer.load(plain_run) is not None
    transformers.AutoModelForMaskedLM.from_pretrained(plain_run)
    prepare([str(plain_run / "README.md")], plain_run, plain_run.parent / "corpus", workers=1, progress=False)

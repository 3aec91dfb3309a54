"""Names become folders: local first, then the cache in both its layouts, then a Hub of our own on 127.0.0.1."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest
from hub_server import COMMIT, hub_server

from minidistil import hub
from minidistil.errors import UserError
from minidistil.hub import cache_folder, resolve
from minidistil.model import Config, LanguageModel
from minidistil.pooling import read_pooling
from minidistil.weights import save_model

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTINGS = [
    "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
]  # fmt: skip


@pytest.fixture(autouse=True)
def clean_environment(tmp_path, monkeypatch):
    """An empty home and working folder, and no network."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def make_model(folder, pickled=False, vocabulary=True):
    """Fills a folder with a model of a few weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(
        folder, LanguageModel(Config(vocab_size=7, positions=4, layers=1, heads=1, width=2, mlp_width=2), seed=0)
    )
    if pickled:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if vocabulary:
        (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n")
    return folder


def make_cached(cache, name, commit=COMMIT, **options):
    """Puts a model into a cache as huggingface_hub does: snapshots of links to blobs; returns the snapshot."""
    place = cache / f"models--{name.replace('/', '--')}"
    blobs = make_model(place / "blobs", **options)
    snapshot = place / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(pathlib.Path("../../blobs") / file.name)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    return snapshot


def refused(name, *wanted):
    with pytest.raises(UserError) as caught:
        resolve(name)
    message = str(caught.value)
    assert "\n" not in message
    for word in wanted:
        assert word in message, message


# ---- without a network


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, "home/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface/hub"),
        ({"XDG_CACHE_HOME": "xdg", "HF_HOME": "hf"}, "hf/hub"),
        ({"XDG_CACHE_HOME": "xdg", "HF_HOME": "hf", "HF_HUB_CACHE": "cache"}, "cache"),
        ({"HF_HOME": "$HOME/hf"}, "home/hf/hub"),
        ({"HF_HUB_CACHE": "~/x"}, "home/x"),
        ({"HF_HUB_CACHE": "", "HF_HOME": ""}, "home/.cache/huggingface/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "older"}, "older"),
        ({"HUGGINGFACE_HUB_CACHE": "~/x", "HF_HOME": "hf"}, "home/x"),
        ({"HUGGINGFACE_HUB_CACHE": "older", "HF_HUB_CACHE": "cache"}, "cache"),
        ({"HUGGINGFACE_HUB_CACHE": "$HOME/older", "HF_HUB_CACHE": ""}, "home/older"),
    ],
)
def test_cache_is_where_huggingface_hub_puts_it(tmp_path, monkeypatch, settings, expected):
    for key, value in settings.items():
        monkeypatch.setenv(key, value if value[:1] in ("", "$", "~") else str(tmp_path / value))
    assert cache_folder() == tmp_path / expected
    snapshot = make_cached(tmp_path / expected, "some/model")
    assert resolve("some/model") == snapshot
    if "" not in settings.values():  # which the library takes for the current folder
        script = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
        library = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert pathlib.Path(library.stdout.strip()) == cache_folder()


@pytest.mark.parametrize(
    "name, cached",
    [
        ("bert-base-uncased", "bert-base-uncased"),
        ("bert-base-uncased", "google-bert/bert-base-uncased"),
        ("google-bert/bert-base-uncased", "bert-base-uncased"),
        ("bert-large-cased-whole-word-masking", "google-bert/bert-large-cased-whole-word-masking"),
        ("distilbert-base-uncased", "distilbert/distilbert-base-uncased"),
        ("distilbert/distilbert-base-uncased", "distilbert-base-uncased"),
        ("someone/bert-base-uncased", "someone/bert-base-uncased"),
        ("gpt2", "gpt2"),
        ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("multi-qa-MiniLM-L6-cos-v1", "sentence-transformers/multi-qa-MiniLM-L6-cos-v1"),
    ],
)
def test_cache_is_searched_under_both_names(name, cached):
    snapshot = make_cached(cache_folder(), cached)
    assert resolve(name) == snapshot


def test_names_of_other_owners_are_not_mixed_up():
    make_cached(cache_folder(), "google-bert/bert-base-uncased")
    refused("someone/bert-base-uncased", "someone/bert-base-uncased", "models--someone--bert-base-uncased: absent")


def test_local_folder_wins(tmp_path):
    snapshot = make_cached(cache_folder(), "bert-base-uncased")
    assert resolve("bert-base-uncased") == snapshot
    make_model(pathlib.Path("bert-base-uncased"))
    assert resolve("bert-base-uncased") == pathlib.Path("bert-base-uncased")
    make_model(tmp_path / "home" / "mine")
    assert resolve("~/mine") == tmp_path / "home" / "mine"
    assert resolve(str(tmp_path / "home" / "mine")) == tmp_path / "home" / "mine"
    make_model(pathlib.Path("demo"))
    assert resolve("demo") == pathlib.Path("demo")


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "here" / "empty").mkdir()
    refused("empty", "empty has no config.json")
    (tmp_path / "here" / "file").write_text("")
    for name in (
        "file",
        "./absent",
        "/absent/folder",
        "~/absent",
        "a/b/c",
        "",
        "a b",
        "a/../b",
        "..",
        "-x",
        "http://a",
    ):
        refused(name, name)


def test_a_cached_model_without_config_is_refused(tmp_path):
    (make_cached(cache_folder(), "some/model") / "config.json").unlink()
    refused("some/model", "no config.json")


def test_demo_is_shipped_or_its_absence_said(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "DEMO", tmp_path / "data" / "demo")
    refused("demo", str(hub.DEMO))
    make_model(hub.DEMO)
    assert resolve("demo") == hub.DEMO


@pytest.mark.parametrize(
    "gone, word",
    [("config.json", "no config.json"), ("model.safetensors", "no weights"), ("vocab.txt", "no vocabulary")],
)
def test_incomplete_snapshot_is_not_taken(gone, word):
    snapshot = make_cached(cache_folder(), "bert-base-uncased")
    (snapshot / gone).resolve().unlink()  # the link stays, broken, as an interrupted download leaves it
    refused("bert-base-uncased", f"models--bert-base-uncased: {word}", "models--google-bert--bert-base-uncased: absent")
    other = make_cached(cache_folder(), "google-bert/bert-base-uncased")
    assert resolve("bert-base-uncased") == other


def test_snapshot_with_a_missing_shard_is_not_taken():
    snapshot = make_cached(cache_folder(), "some/model")
    (snapshot / "model.safetensors").rename(snapshot / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("some/model", "no weights, or not all")
    (snapshot / "model-2.safetensors").symlink_to("model-1.safetensors")
    assert resolve("some/model") == snapshot


@pytest.mark.parametrize("commit", ["", "..", "../../other", "f" * 40, "\xff\n"])
def test_reference_to_no_snapshot_is_not_followed(commit):
    snapshot = make_cached(cache_folder(), "some/model")
    make_model(cache_folder() / "models--some--model" / "other")
    reference = snapshot.parent.parent / "refs" / "main"
    reference.write_bytes(commit.encode("latin-1"))
    refused("some/model", "absent")
    reference.write_text(COMMIT + "\n")
    assert resolve("some/model") == snapshot


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_offline_is_said_at_once(monkeypatch, variable, value):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(variable, value)
    start = time.monotonic()
    refused(
        "bert-base-uncased", "bert-base-uncased is not a folder", str(cache_folder()), variable,
        "models--bert-base-uncased: absent", "models--google-bert--bert-base-uncased: absent",
        "`hf download google-bert/bert-base-uncased --local-dir bert-base-uncased`", "`demo`",
    )  # fmt: skip
    assert time.monotonic() - start < 5


# ---- with a server of our own; in processes of their own, since huggingface_hub reads its settings at import

SCRIPT = """
import json, sys, time
from minidistil import hub
from minidistil.errors import UserError
hub.TIMEOUT = 1
for name in json.load(sys.stdin):
    start = time.monotonic()
    try:
        folder = hub.resolve(name.removeprefix("vectors of "), name.startswith("vectors of "))
        answer = [str(folder), sorted(file.name for file in folder.iterdir())]
    except UserError as error:
        answer = ["UserError", str(error)]
    print(json.dumps([*answer, time.monotonic() - start, "huggingface_hub" in sys.modules]), flush=True)
"""


def resolve_elsewhere(endpoint, *names):
    """Returns [folder or "UserError", files or message, seconds, downloader loaded] of each name."""
    pytest.importorskip("huggingface_hub")
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(names), env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def test_models_are_downloaded_into_the_cache(tmp_path):
    safe, pickled = make_model(tmp_path / "safe"), make_model(tmp_path / "pickled", pickled=True)
    bare = make_model(tmp_path / "bare", vocabulary=False)
    both = make_model(tmp_path / "both")
    for name in ("pytorch_model.bin", "tf_model.h5", "README.md"):
        (both / name).write_text("not to be fetched")
    models = {"google-bert/bert-base-uncased": safe, "a/pickled": pickled, "a/bare": bare, "a/both": both}
    whole = ["config.json", "model.safetensors", "vocab.txt"]
    with hub_server(models) as (endpoint, requests):
        names = ["bert-base-uncased", "a/pickled", "a/both", "a/bare", "a/unknown"]
        first = resolve_elsewhere(endpoint, *names)
        asked = len(requests)
        again = resolve_elsewhere(endpoint, "bert-base-uncased", "google-bert/bert-base-uncased", "a/pickled")
        assert len(requests) == asked, requests[asked:]  # a cached model needs no network
    assert [answer[1] for answer in first[:3]] == [whole, ["config.json", "pytorch_model.bin", "vocab.txt"], whole]
    snapshot = pathlib.Path(first[0][0])
    assert snapshot == cache_folder() / "models--google-bert--bert-base-uncased" / "snapshots" / COMMIT
    assert (snapshot / "model.safetensors").read_bytes() == (safe / "model.safetensors").read_bytes()
    assert first[3][0] == "UserError" and "a/bare has no vocabulary" in first[3][1]
    assert first[4][0] == "UserError" and f"{endpoint} (no such model there)" in first[4][1]
    assert [answer[0] for answer in again] == [first[0][0], first[0][0], first[1][0]]
    assert not any(answer[3] for answer in again)  # nor the library that would use it


@pytest.mark.parametrize("pickled", [False, True])
def test_a_model_of_0_transformer_is_downloaded(tmp_path, pickled):
    """As repositories of sentence-transformers 1 are laid out; what is read of the pooling comes with it."""
    top = tmp_path / "sentences"
    make_model(top / "0_Transformer", pickled)
    types = {"0_Transformer": "models.Transformer", "1_Pooling": "models.Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in types.items()]
    (top / "modules.json").write_text(json.dumps(modules))
    (top / "1_Pooling").mkdir()
    (top / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (top / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 3}))
    (top / "0_Transformer" / "tf_model.h5").write_text("not to be fetched")
    with hub_server({"a/sentences": top}) as (endpoint, requests):
        (folder, names, *_), (again, *_) = resolve_elsewhere(endpoint, "a/sentences", "a/sentences")
    weights = "pytorch_model.bin" if pickled else "model.safetensors"
    assert names == sorted(["config.json", weights, "sentence_bert_config.json", "vocab.txt"]) and again == folder
    snapshot = cache_folder() / "models--a--sentences" / "snapshots" / COMMIT
    assert pathlib.Path(folder) == snapshot / "0_Transformer" == resolve("a/sentences")
    pooling = read_pooling(pathlib.Path(folder))
    assert pooling.mode == "cls" and pooling.max_length == 3
    (snapshot / "0_Transformer" / "vocab.txt").unlink()
    refused("a/sentences", "models--a--sentences: no vocabulary")


def test_a_cache_that_transformers_filled_is_completed_for_vectors(tmp_path, capsys):
    """It has neither modules.json nor the pooling's file; without a network, a line says how vectors are made."""
    top = make_model(tmp_path / "sentences")
    modules = [{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in
               {"": "models.Transformer", "1_Pooling": "models.Pooling"}.items()]  # fmt: skip
    (top / "modules.json").write_text(json.dumps(modules))
    (top / "1_Pooling").mkdir()
    (top / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    snapshot = make_cached(cache_folder(), "a/sentences")
    with hub_server({"a/sentences": top}) as (endpoint, requests):
        ((plain, *_),) = resolve_elsewhere(endpoint, "a/sentences")
        assert pathlib.Path(plain) == snapshot and not requests and read_pooling(snapshot).mode == "mean"
        kept = (snapshot / "model.safetensors").readlink()
    failing = {"a/sentences": (500, "", "1_Pooling")}
    with hub_server({"a/sentences": top}, failing) as (endpoint, requests):
        resolve_elsewhere(endpoint, "vectors of a/sentences")
        assert requests and read_pooling(snapshot).mode == "mean"  # half of the files are none
    with hub_server({"a/sentences": top}) as (endpoint, requests):
        ((folder, *_),) = resolve_elsewhere(endpoint, "vectors of a/sentences")
        assert requests and pathlib.Path(folder) == snapshot and read_pooling(snapshot).mode == "cls"
        assert (snapshot / "model.safetensors").readlink() == kept  # and not the newest ones
        asked = len(requests)
        resolve_elsewhere(endpoint, "vectors of a/sentences")
        assert len(requests) == asked
        (top / "modules.json").unlink()  # of a model that has none there either, it is asked once
        make_cached(cache_folder(), "c/plain")
    with hub_server({"c/plain": top}) as (endpoint, requests):
        resolve_elsewhere(endpoint, "vectors of c/plain")
        asked = len(requests)
        resolve_elsewhere(endpoint, "vectors of c/plain")
        assert 0 < asked == len(requests) and not any("model.safetensors" in request for request in requests)
    make_cached(cache_folder(), "b/sentences")
    ((folder, *_),) = resolve_elsewhere("http://127.0.0.1:9", "vectors of b/sentences")
    said = "b/sentences has no modules.json in the cache, and none could be fetched ("
    assert "b--sentences" in folder and said in capsys.readouterr().out


def test_a_model_that_may_not_be_read_is_not_absent(tmp_path):
    """A private model is refused at once, a gated one only where its files are asked for."""
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    refusals = {
        "a/private": (401, "RepoNotFound", "/api/"), "a/gated": (401, "GatedRepo", "/resolve/"),
        "a/expired": (401, "", "/api/"), "a/forbidden": (403, "", "/resolve/"), "a/asked": (403, "GatedRepo", "/api/"),
        "a/absent": (404, "RepoNotFound", "/api/"),
    }  # fmt: skip
    with hub_server(dict.fromkeys(refusals, make_model(tmp_path / "model")), refusals) as (endpoint, _):
        answers = resolve_elsewhere(endpoint, *refusals)
    for (name, (status, *_)), (kind, message, *_) in zip(refusals.items(), answers, strict=True):
        assert kind == "UserError" and "\n" not in message and f"`hf download {name}" in message
        assert (log_in in message) == (status != 404), message
        assert (f"ask for access on {endpoint}/{name}, then log in" in message) == (status == 403), message
        assert ("no such model there, or one that is private or gated" in message) == (status == 401), message
    assert "(no such model there): where there is a network" in message


def test_failing_networks_are_said_soon(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, then never answers
        port = silent.getsockname()[1]
        [[kind, message, seconds, _]] = resolve_elsewhere(f"http://127.0.0.1:{port}", "bert-base-uncased")
    assert kind == "UserError" and "timed out" in message and "`hf download google-bert/" in message
    assert "\n" not in message and seconds < 30
    [[kind, message, seconds, _]] = resolve_elsewhere(f"http://127.0.0.1:{port}", "a/b")  # now closed
    assert kind == "UserError" and "refused" in message and "models--a--b: absent" in message and seconds < 30

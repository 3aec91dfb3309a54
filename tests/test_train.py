"""train.py: the schedule, the split, the resume, the signals, the refusals."""

import dataclasses
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import sys
import time
import types

import pytest
import torch
from forked import Script, call
from pictures import svg_texts
from same_layers import assert_same_layers
from torch._dynamo.testing import CompileCounterWithBackend

import train
from data import docstrings
from minidistil import distiller, files, progress, run, weights
from minidistil.data import IGNORE, Corpus, Sequences
from minidistil.errors import UserError
from minidistil.folder import CHECKPOINT
from minidistil.losses import Denominators, Objective, distillation_loss
from minidistil.model import Config, LanguageModel, num_params
from minidistil.precision import cast_products
from minidistil.progress import lr_at
from minidistil.report import format_metrics
from minidistil.run import load_checkpoint, read_metrics
from minidistil.safetensors import read_safetensors
from minidistil.student import set_dropout, student_layers
from minidistil.tokenizer import Tokenizer

ROOT = pathlib.Path(train.__file__).parent


def settings(tiny, out, **changes):
    basic = dict(
        teacher=str(tiny / "teacher"), data=str(tiny / "corpus"), steps=5, batch=4, accum=2, seq_len=32, device="cpu",
        dtype="fp32", eval_tokens=512, out=str(out),
    )  # fmt: skip
    return train.Settings(**basic | changes)


def weights_of(folder):
    return read_safetensors(pathlib.Path(folder) / "model.safetensors")[0]


def same_bits(a, b):
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the schedule


@pytest.mark.parametrize("total, warmup", [(1, 0.05), (2, 0.05), (12, 0.05), (100, 0.05), (9, 0.0), (9, 1.0), (7, 0.5)])
def test_learning_rate_wastes_no_update(total, warmup):
    rates = [lr_at(u, total, 5e-4, warmup) for u in range(total)]
    rising = math.ceil(total * warmup)
    assert all(r > 0 for r in rates) and max(rates) <= 5e-4 * (1 + 1e-12)
    assert rates == sorted(rates[:rising]) + sorted(rates[rising:], reverse=True)
    assert rising == 0 or max(rates) == pytest.approx(5e-4)
    if rising < total:  # one more step along the falling line is zero
        step = rates[rising] - rates[rising + 1] if total > rising + 1 else rates[-1]
        assert rates[-1] == pytest.approx(step)


def test_defaults_are_the_published_recipe():
    s = train.Settings()
    assert (s.alpha_ce, s.alpha_mlm, s.alpha_cos, s.alpha_mse, s.temperature, s.kd_rows) == (5, 2, 1, 0, 2, "all")
    assert (s.lr, s.warmup, s.clip, s.epochs, s.batch * s.accum, s.seq_len) == (5e-4, 0.05, 5, 3, 250, 512)
    assert s.mask_smoothing == 0.7
    assert student_layers(12) == [0, 2, 4, 7, 9, 11]


# ---- one update, however it is split


@pytest.mark.parametrize("dropout", [0.0, None, 0.3], ids=["without", "default", "more"])
def test_accumulation_does_not_change_the_update(tiny, tmp_path, dropout):
    """64 x 1 and 1 x 64: every layer equal to 1e-6 of its norm after 5 updates, fp32, with and without dropout."""
    splits = {"wide": (64, 1, None), "long": (1, 64, None), "both": (16, 4, None), "anew": (1, 64, "32")}
    for name, (batch, accum, at_once) in splits.items():
        shape = dict(batch=batch, accum=accum, micro_batch=at_once, dropout=dropout)
        train.train(settings(tiny, tmp_path / name, **shape))
    wide = weights_of(tmp_path / "wide")
    assert weights.read_config(tmp_path / "wide").dropout == 0.1  # of the run, not of the model
    start = weights_of(tiny / "teacher")["bert.embeddings.word_embeddings.weight"]
    assert (wide["distilbert.embeddings.word_embeddings.weight"] - start).norm() > 1e-3 * start.norm()
    for name in ("long", "both", "anew"):
        assert_same_layers(wide, weights_of(tmp_path / name))


def padded(tiny, folder, spare):
    """The tiny teacher with rows to spare that would win every guess, were they scored."""
    model = weights.load_model(tiny / "teacher")
    wide = LanguageModel(dataclasses.replace(model.config, vocab_size=model.config.vocab_size + spare), seed=0)
    state = model.state_dict()
    for name, value in (("encoder.embeddings.words.weight", 3.0), ("head.bias", 40.0)):
        state[name] = torch.cat([state[name], torch.full((spare, *state[name].shape[1:]), value)])
    wide.load_state_dict(state)
    weights.save_model(folder, wide)
    Tokenizer.load(tiny / "teacher").save(folder, "bert")
    return folder


@pytest.mark.parametrize("init", ["teacher", "folder"])
@pytest.mark.parametrize("changes", [{}, dict(kd_rows="masked", alpha_mse=1.0)], ids=["all", "masked"])
def test_rows_without_a_word_change_nothing(tiny, tmp_path, capsys, changes, init):
    """A table of 41 rows more than words: losses, held-out metrics and words are those of the table without them."""
    transformers = pytest.importorskip("transformers")
    wide, n = padded(tiny, tmp_path / "teacher", 41), len(Tokenizer.load(tiny / "teacher").vocab)
    for out, teacher in (("plain", str(tiny / "teacher")), ("wide", str(wide))):
        begin = dict(teacher=teacher, student_init=teacher if init == "folder" else "teacher", dropout=0.0)
        train.train(settings(tiny, tmp_path / out, **begin, **changes))
    assert f"the teacher has {n + 41} rows for {n} words: the last 41 stay unused" in capsys.readouterr().out
    plain, found = (run.read_metrics(tmp_path / out / "metrics.jsonl") for out in ("plain", "wide"))
    for a, b in zip(plain, found, strict=True):
        assert a.get("held_out", {}) == pytest.approx(b.get("held_out", {}), rel=1e-5)
        assert a.keys() == b.keys()
        for name in ("loss", "kl", "ce", "cos", "mse", "grad_norm"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-5, abs=1e-6)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "wide")
    assert model.config.vocab_size == n + 41 >= len(transformers.AutoTokenizer.from_pretrained(tmp_path / "wide"))
    plain, found = weights_of(tmp_path / "plain"), weights_of(tmp_path / "wide")
    before = {tensor.shape: tensor for tensor in weights_of(wide).values()}
    tables = [name for name, tensor in found.items() if len(tensor) == n + 41]
    assert len(tables) == 2
    for name in tables:
        assert torch.equal(found[name][n:], before[found[name].shape][n:])
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name][: len(tensor)], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["distilbert-tiny.json", "config.json", "shape", "config.json.bak", "."])
def test_a_students_shape_may_have_any_name(tiny, tmp_path, name):
    shape = dataclasses.replace(weights.read_config(tiny / "teacher").student(1), width=16)
    weights.write_config(tmp_path, shape)
    (tmp_path / "config.json").rename(tmp_path / (name if name != "." else "config.json"))
    train.train(settings(tiny, tmp_path / "out", student_config=str(tmp_path / name), alpha_cos=0.0, steps=1))
    assert weights.read_config(tmp_path / "out") == shape
    with pytest.raises(UserError, match="nowhere.json has no config.json: give"):
        train.train(settings(tiny, tmp_path / "other", student_config="nowhere.json"))


def test_a_resumed_run_compares_contents(tiny, tmp_path, monkeypatch):
    """Not the spelling of the paths of the teacher, of the student's weights or of its shape."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny / "teacher", "first")
    shutil.copytree(tiny / "teacher", "second")
    few = dict(teacher="first", steps=4)
    for changes in (dict(student_init="first"), dict(student_config="first/config.json")):
        out = tmp_path / next(iter(changes))
        train.train(settings(tiny, out, **few, **changes, time_limit=1e-9))
        again = {name: value.replace("first", "./second") for name, value in changes.items()}
        train.train(settings(tiny, out, **few | dict(teacher="./second"), **again, resume=True))
        assert load_checkpoint(out)[0]["update"] == 4
    weights.save_model("other", LanguageModel(weights.read_config("first"), seed=3))
    shutil.copy("first/vocab.txt", "other")
    shutil.copy("first/tokenizer_config.json", "other")
    for out, changes in (("student_init", dict(student_init="other")), ("student_config", dict(student_init="random"))):
        with pytest.raises(UserError, match=f"begun with other settings \\(.*{out}"):
            train.train(settings(tiny, tmp_path / out, **few, **changes, resume=True))


def test_fewer_rows_than_words_are_refused(tiny, tmp_path):
    n = len(Tokenizer.load(tiny / "teacher").vocab)
    shape = dataclasses.replace(weights.read_config(tiny / "teacher"), vocab_size=n - 1)
    weights.write_config(tmp_path, shape)
    with pytest.raises(UserError, match=f"the student has {n - 1} words, its vocabulary {n}: give it"):
        train.train(settings(tiny, tmp_path / "out", student_config=str(tmp_path), alpha_cos=0.0))


def test_compiled_models_learn_the_same(tiny, tmp_path, monkeypatch):
    """--compile traces both models whole, once, before the clock starts, and changes nothing but rounding."""
    traced, compile = [], torch.compile
    backend = CompileCounterWithBackend("aot_eager")  # all of compiling but generating code

    def quickly(model, **options):
        traced.append(model.training)
        return compile(model, backend=backend, fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", quickly)
    shape = dict(dropout=0.0, micro_batch="8", steps=3)
    train.train(settings(tiny, tmp_path / "eager", **shape))
    assert not traced
    stop, when_it_began = train.SignalFlag, []
    monkeypatch.setattr(train, "SignalFlag", lambda: when_it_began.append(backend.frame_count) or stop())
    train.train(settings(tiny, tmp_path / "compiled", compile=True, **shape))
    assert traced == [False, True] and when_it_began == [2] and backend.frame_count == 2
    eager, compiled = weights_of(tmp_path / "eager"), weights_of(tmp_path / "compiled")
    assert eager.keys() == compiled.keys()
    for key in eager:
        if not key.endswith("k_lin.bias"):
            assert (eager[key] - compiled[key]).norm() <= 1e-4 * eager[key].norm(), key


def test_a_teacher_cast_once_is_one_that_autocast_casts(tiny):
    teacher = weights.load_model(tiny / "teacher").eval().requires_grad_(False)
    ids = torch.randint(5, 200, (2, 32), generator=torch.Generator().manual_seed(0))
    views = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = teacher(ids)
            views += [hidden, teacher.head(hidden)]
        cast_products(teacher, "bf16")
    assert all(torch.equal(a, b) for a, b in zip(views[:2], views[2:], strict=True))
    assert teacher.head.dense.weight.dtype == torch.bfloat16 and teacher.decoder[0].dtype == torch.float32


def test_the_loss_is_told_how_many_tokens_are_masked(tiny, tmp_path, monkeypatch):
    """Masked rows are gathered by their number, which the host knows: all of them, in every micro-batch."""
    loss, told = distiller.distillation_loss, []

    def listening(objective, denominators, labels, *models_and_states):
        told.append((models_and_states[5], int((labels != IGNORE).sum())))
        return loss(objective, denominators, labels, *models_and_states)

    monkeypatch.setattr(distiller, "distillation_loss", listening)
    train.train(settings(tiny, tmp_path / "out", steps=2, kd_rows="masked"))
    assert len(told) == 4 and all(said == counted > 0 for said, counted in told)


def test_saving_does_not_count_as_training(tiny, tmp_path, monkeypatch):
    """Two saves of two seconds each, five updates of milliseconds: tokens/s is that of the updates."""
    save = run.save_checkpoint
    monkeypatch.setattr(run, "save_checkpoint", lambda *a: (time.sleep(2), save(*a)))
    summary = train.train(settings(tiny, tmp_path / "out"))
    assert summary["seconds"] > 4 and summary["tokens_per_second"] > summary["tokens"] / 4


# ---- it learns


def shallow(tiny, folder):
    """A fresh model of 2 layers x 32: narrow and shallow, so that it learns in seconds, at a high rate."""
    tokenizer = Tokenizer.load(tiny / "teacher")
    shape = dict(vocab_size=len(tokenizer.vocab), positions=32, layers=2, heads=2, width=32, mlp_width=64)
    weights.save_model(folder, LanguageModel(Config(**shape), seed=1))
    tokenizer.save(folder, "bert")
    return str(folder)


def test_distillation_beats_training_without_a_teacher(tiny, tmp_path):
    """A teacher that knows the text teaches its half-sized student more than the text alone does."""
    start = shallow(tiny, tmp_path / "start")
    # all that is held out, and enough updates: rounding differs from one number of threads to another
    common = dict(lr=1e-2, mask_smoothing=0.0, dropout=0.0, batch=16, accum=1, eval_tokens=8192, eval_every=1000)
    teacher = train.train(settings(tiny, tmp_path / "teacher", teacher="none", student_init=start, steps=500, **common))
    assert teacher["student"]["top1"] > 0.12 and teacher["teacher"] is None
    common |= dict(teacher=str(tmp_path / "teacher"), steps=120)
    student = train.train(settings(tiny, tmp_path / "student", **common))
    alone = train.train(
        settings(tiny, tmp_path / "alone", student_init="random", alpha_ce=0.0, alpha_cos=0.0, **common)
    )
    assert student["teacher"]["top1"] == pytest.approx(teacher["student"]["top1"])
    assert student["student"]["top1"] > 0.9 * student["teacher"]["top1"]
    assert student["student"]["top1"] > alone["student"]["top1"] + 0.05
    assert student["student"]["kl"] < alone["student"]["kl"] / 2
    assert student["student"]["agreement"] > alone["student"]["agreement"]


def test_overfits_one_batch(tiny, tmp_path):
    """The same sixteen masked sequences again and again: the loss falls to a tenth."""
    student = weights.load_model(shallow(tiny, tmp_path / "start")).train()
    set_dropout(student, 0.0)
    tokenizer = Tokenizer.load(tiny / "teacher")
    sequences = Sequences(Corpus(tiny / "corpus").train, 32, tokenizer, seed=0)
    ids, labels = map(torch.from_numpy, sequences.batch(0, 16))
    counts = Denominators(ids.numel(), int((labels != IGNORE).sum()))
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2, (0.9, 0.98))
    losses = []
    for _ in range(120):
        loss, _ = distillation_loss(Objective(0.0, 1.0, 0.0), counts, labels, student, student(ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# ---- interruption and resume


def command(tiny, out, *more):
    arguments = dict(teacher=tiny / "teacher", data=tiny / "corpus", out=out, steps=12, batch=4, accum=3, dtype="fp32")
    arguments |= {"seq-len": 32, "save-every": 0, "eval-tokens": 256, "eval-every": 5}
    flags = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    return [ROOT / "train.py", *flags, *more]


def comparable(folder):
    """A run's metrics without its clock and memory."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    machine = {"tokens_per_second", "tflops_per_second", "utilisation", "device_hours", "cost", "peak_mib"}
    return [{k: v for k, v in r.items() if k not in machine} for r in records]


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    """A whole run with dropout on, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = call(command(tiny, out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_killed_20_times_and_resumed_is_bitwise_the_same(tiny, uninterrupted, tmp_path):
    """SIGKILL at 20 random moments, each followed by --resume: weights and metrics equal those of one whole run.

    The children are forked from one process that has imported everything, so that a moment is a moment of training
    rather than of importing PyTorch.
    """
    whole, _ = uninterrupted
    script = tmp_path / "run.py"
    script.write_text(KILLER)
    arguments = command(tiny, tmp_path / "run")[1:]
    done = call([script, ROOT, json.dumps(arguments), tmp_path / "run", "20"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kills = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kill')]
    assert len(kills) == 20 and len({k["killed_at"] for k in kills}) > 5
    for i in range(len({k["run"] for k in kills})):
        assert same_bits(whole, tmp_path / f"run{i}")
        assert comparable(tmp_path / f"run{i}") == comparable(whole)


KILLER = """
import json, os, pathlib, random, signal, sys, time

sys.path.insert(0, sys.argv[1])
import train  # PyTorch has started no threads yet, so that a fork is safe



def updates(metrics):
    return metrics.read_text().count("grad_norm") if metrics.exists() else 0


arguments, out, wanted = json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
rng, kills, run, resume = random.Random(20), 0, 0, False
while kills < wanted or resume:
    folder = pathlib.Path(f"{out}{run}")
    resume = (folder / "checkpoint" / "state.safetensors").exists()
    argv = [str(folder) if a == out else a for a in arguments] + ["--resume"] * resume
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train.run_script(train.main, argv)
    metrics = folder / "metrics.jsonl"
    before = updates(metrics)
    # somewhere in the next five updates, and anywhere inside an update, its evaluation or its checkpoint
    target, delay = (before + rng.randint(0, 5) if kills < wanted else 10**9), rng.uniform(0, 0.05)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, argv
            run, resume = run + 1, False
            break
        if updates(metrics) >= target:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            print(json.dumps({"kill": kills, "run": run, "killed_at": updates(metrics)}), flush=True)
            kills, resume = kills + 1, True
            break
        time.sleep(0.001)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(tiny, uninterrupted, tmp_path, number):
    whole, _ = uninterrupted
    out = tmp_path / "out"
    process = Script(command(tiny, out, "--save-every", "60"))
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or '"step": 3' not in metrics.read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and stderr == ""
    record = json.loads((out / "run.json").read_text())
    assert record["ended_by"] == "signal" and 3 <= record["summary"]["steps"] < 12 == record["planned_steps"]
    assert record["evaluated_after"] in (0, 5, 10) and svg_texts(out / "curve.svg")
    halfway = weights.load_model(out).state_dict()  # the student of that moment
    checkpoint = load_checkpoint(out)[1]
    assert all(torch.equal(value, checkpoint[f"student.{name}"]) for name, value in halfway.items())
    *_, last = stdout.splitlines()
    done = call(shlex.split(last.removeprefix("resume with: "))[1:])  # after the interpreter
    assert done.returncode == 0, done.stderr
    assert same_bits(whole, out) and comparable(out) == comparable(whole)


def test_last_line_is_the_promised_object(uninterrupted):
    whole, stdout = uninterrupted
    summary = json.loads(stdout.splitlines()[-1])
    assert list(summary) == ["out", "steps", "tokens", "seconds", "tokens_per_second", "peak_rss_mib", "peak_gpu_mib",
                             "teacher", "student"]  # fmt: skip
    assert list(summary["teacher"]) == ["parameters", "mlm_loss", "top1"]
    assert list(summary["student"]) == ["parameters", "mlm_loss", "top1", "kl", "agreement"]
    assert summary["steps"] == 12 and summary["tokens"] == 12 * 4 * 3 * 32
    run = json.loads((whole / "run.json").read_text())
    assert run["summary"] == summary
    # 12 updates of 384 tokens at that speed, and what is said of them beforehand
    accounts = run["accounting"]
    assert accounts["device_hours"] == pytest.approx(summary["tokens"] / summary["tokens_per_second"] / 3600, abs=1e-4)
    assert f"MFLOP a token; at {summary['tokens_per_second']:,.0f} tokens/s the 12 updates take" in stdout
    # a sentence for people: what came out, where it is, what to run next
    assert re.search(r"the student has 6\d% of its teacher's parameters and\npredicts 0.0% of the masked", stdout)
    commands = [shlex.split(line) for line in stdout.splitlines() if re.match("  .*python", line)]
    assert [pathlib.Path(words[1]).name for words in commands] == ["sample.py", "finetune.py"]
    assert all(pathlib.Path(words[1]).is_file() and str(whole) in words for words in commands)
    assert accounts["tflops_per_second"] > 0 and accounts["cost"] is None
    expected = {"config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json",
                "tokenizer.json", "run.json", "metrics.jsonl", "curve.svg", "checkpoint", "README.md"}  # fmt: skip
    assert {p.name for p in whole.iterdir()} == expected and run["ended_by"] == "completion"
    assert {"training loss", "loss", "held-out accuracy", "student", "teacher"} <= set(svg_texts(whole / "curve.svg"))


def test_a_run_without_matplotlib_lacks_its_curve_alone(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train.train(settings(tiny, tmp_path / "out", steps=1))
    assert "curve.svg is not drawn" in capsys.readouterr().err and not (tmp_path / "out" / "curve.svg").exists()
    assert (tmp_path / "out" / "run.json").exists() and (tmp_path / "out" / "model.safetensors").exists()


def test_every_update_drops_others():
    """Seeds far apart, since a layer's or a sequence's number is added to them, and below 2^62, so that they fit."""
    seeds = sorted(train.dropout_seed(seed, update) for seed in (0, 1) for update in range(500))
    assert min(b - a for a, b in zip(seeds, seeds[1:], strict=False)) > 2**32 and 0 <= seeds[0] <= seeds[-1] < 2**62


def test_a_run_begun_with_other_masks_goes_on_without_dropout_only(tiny, tmp_path, monkeypatch):
    """Before, masks followed the micro-batch, and the identity said nothing of them."""
    identity, name = train.identity_of, "dropout's masks"
    with monkeypatch.context() as before:
        before.setattr(train, "identity_of", lambda *given: {k: v for k, v in identity(*given).items() if k != name})
        for dropout in (None, 0.0):
            train.train(settings(tiny, tmp_path / str(dropout), dropout=dropout, steps=60, time_limit=0.0001))
    with pytest.raises(UserError, match="dropout's masks None -> by sequence") as error:
        train.train(settings(tiny, tmp_path / "None", steps=60, resume=True))
    assert "\n" not in str(error.value)
    went_on = settings(tiny, tmp_path / "0.0", dropout=0.0, steps=60, resume=True)
    assert train.train(went_on)["steps"] == 60


def test_costs_while_it_runs(tiny, tmp_path, monkeypatch, capsys):
    """Each update's line of metrics.jsonl, and of progress, says what the whole run will take and cost."""
    monkeypatch.setenv("COLUMNS", "120")  # a line is not folded
    train.train(settings(tiny, tmp_path / "out", steps=3, price_per_hour=1e6))
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for r in (r for r in records if "loss" in r):
        hours = 3 * 8 * 32 / r["tokens_per_second"] / 3600  # 3 updates of 8 sequences of 32 tokens
        assert r["device_hours"] == pytest.approx(hours, abs=1e-4) and r["cost"] == pytest.approx(1e6 * hours, rel=1e-2)
        assert r["tflops_per_second"] >= 0 and r["utilisation"] is None and r["peak_mib"] > 100
    assert f"tokens/s  {r['cost']:,.2f} in all  0m00s left" in capsys.readouterr().out


def test_resume_of_a_finished_run_changes_nothing(tiny, uninterrupted, tmp_path):
    whole, stdout = uninterrupted
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    again = call(command(tiny, copy, "--resume"))
    assert again.returncode == 0, again.stderr
    assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    last = json.loads(again.stdout.splitlines()[-1])
    assert last == {**json.loads(stdout.splitlines()[-1]), "out": str(copy)}  # where it is, not where it was
    assert f"{copy} is finished: all 12 updates are done" in again.stdout and f"--student-init {copy} " in again.stdout


def test_a_run_that_ended_before_its_result_gets_it(tiny, uninterrupted, tmp_path):
    """All updates are done but run.json is not written: --resume writes it, with the speed of the run before."""
    whole, _ = uninterrupted
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / "run.json").unlink()
    again = call([ROOT / "train.py", "--out", copy, "--resume"])
    assert again.returncode == 0, again.stderr
    then, now = (json.loads((folder / "run.json").read_text()) for folder in (whole, copy))
    assert now["summary"]["student"] == then["summary"]["student"] and same_bits(whole, copy)
    seconds, saved = 12 * 4 * 3 * 32 / now["summary"]["tokens_per_second"], load_checkpoint(whole)[0]["seconds"]
    assert 0.99 * saved < seconds < saved + 1  # and what it takes to go on


@pytest.mark.parametrize("more", [[], ["--eval-every", "4"]])
def test_out_and_resume_are_enough(tiny, uninterrupted, tmp_path, monkeypatch, more):
    """The settings are in the checkpoint, with absolute paths; what is given again counts."""
    whole, _ = uninterrupted
    monkeypatch.chdir(tiny)
    first = command(pathlib.Path("."), tmp_path / "out", "--time-limit", "0.0001")
    done = call(first)
    assert done.returncode == 0 and "--time-limit ended the run after 1 of 12 updates" in done.stdout, done.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["ended_by"], record["planned_steps"], record["evaluated_after"]) == ("time limit", 12, 1)
    monkeypatch.chdir(tmp_path)
    done = call([ROOT / "train.py", "--out", "out", "--resume", *more])
    assert done.returncode == 0, done.stderr
    assert same_bits(whole, tmp_path / "out")
    evaluated = [m["step"] for m in read_metrics(tmp_path / "out" / "metrics.jsonl") if "held_out" in m]
    assert evaluated == ([0, 1, 4, 8, 12] if more else [0, 1, 5, 10, 12])
    with pytest.raises(UserError, match="other settings.*lr 0.0005 -> 0.1"):
        train.main(["--out", "out", "--resume", "--lr", "0.1"])


def test_two_runs_at_once_have_two_folders(tiny, tmp_path):
    """Runs that start together without --out."""
    words = [word for word in command(tiny, "unnamed") if word not in ("--out", "unnamed")]
    runs = [Script(words, cwd=tmp_path) for _ in range(3)]
    outs = {json.loads(run.communicate()[0].splitlines()[-1])["out"] for run in runs}
    assert outs == {os.path.join("runs", name) for name in ("teacher", "teacher-2", "teacher-3")}


def test_time_limit_ends_cleanly_and_resumes(tiny, uninterrupted, tmp_path):
    s = settings(tiny, tmp_path / "out", steps=5000, time_limit=0.02, save_every=60)
    summary = train.train(s)
    assert 0 < summary["steps"] < 5000 and (tmp_path / "out" / "model.safetensors").exists()
    summary2 = train.train(dataclasses.replace(s, resume=True))
    assert summary2["steps"] > summary["steps"]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_same_seed_same_bits(tiny, tmp_path, dtype):
    for name in ("a", "b"):
        train.train(settings(tiny, tmp_path / name, steps=3, dtype=dtype))
    assert same_bits(tmp_path / "a", tmp_path / "b")
    train.train(settings(tiny, tmp_path / "c", steps=3, dtype=dtype, seed=1))
    assert not same_bits(tmp_path / "a", tmp_path / "c")


def test_bf16_trains_like_fp32(tiny, tmp_path):
    a = train.train(settings(tiny, tmp_path / "fp32", steps=30, dropout=0.0))
    b = train.train(settings(tiny, tmp_path / "bf16", steps=30, dropout=0.0, dtype="bf16"))
    assert b["student"]["mlm_loss"] == pytest.approx(a["student"]["mlm_loss"], rel=0.02)


# ---- students


@pytest.mark.parametrize(
    "changes, layers",
    [({}, 2), ({"student_layers": "3"}, 3), ({"student_layers": "3,1"}, 2), ({"student_layers": "0,1,2,3"}, 4),
     ({"student_init": "random"}, 2), ({"student_init": "random", "student_layers": "1"}, 1)],
)  # fmt: skip
def test_student_shapes(tiny, tmp_path, changes, layers):
    summary = train.train(settings(tiny, tmp_path / "out", steps=1, **changes))
    config = weights.read_config(tmp_path / "out")
    assert config.layers == layers and config.family == "distilbert" and config.token_types == 0
    assert Tokenizer.load(tmp_path / "out").digest == Tokenizer.load(tiny / "teacher").digest
    assert summary["student"]["parameters"] < summary["teacher"]["parameters"]


def test_a_narrower_student(tiny, tmp_path):
    config = Config(vocab_size=len(Tokenizer.load(tiny / "teacher").vocab), positions=32, layers=2, heads=2, width=16,
                    mlp_width=32, token_types=0, family="distilbert")  # fmt: skip
    (tmp_path / "shape").mkdir()
    weights.write_config(tmp_path / "shape", config)
    shape = str(tmp_path / "shape" / "config.json")
    train.train(settings(tiny, tmp_path / "out", student_config=shape, steps=2))
    assert weights.read_config(tmp_path / "out") == config


def test_adaptation_keeps_the_whole_model(tiny, tmp_path):
    summary = train.train(settings(tiny, tmp_path / "out", teacher="none", student_init=str(tiny / "teacher"), steps=2))
    assert summary["teacher"] is None and list(summary["student"]) == ["parameters", "mlm_loss", "top1"]
    assert weights.read_config(tmp_path / "out") == weights.read_config(tiny / "teacher")
    student = train.train(settings(tiny, tmp_path / "student", teacher=str(tmp_path / "out"), steps=1))
    assert student["teacher"]["top1"] == summary["student"]["top1"]


def test_epochs_of_the_demo(monkeypatch):
    """They count, although the demo has a number of updates of its own."""
    given = []
    monkeypatch.setattr(train, "train", given.append)
    for more in ([], ["--epochs", "1"], ["--epochs", "1", "--steps", "7"], ["--steps", "7"]):
        train.main(more)
    assert [(s.steps, s.batch) for s in given] == [(1000, 8), (None, 8), (7, 8), (7, 8)]


def test_another_text_to_evaluate_on(tiny, tmp_path):
    """After a resumption the metrics of another one count no more: not in the card, and not as those at the start."""
    out = tmp_path / "out"
    train.train(settings(tiny, out, steps=4, eval_every=1))
    first = json.loads((out / "run.json").read_text())
    same = train.train(settings(tiny, tmp_path / "same", steps=4, eval_tokens=256))
    train.train(settings(tiny, tmp_path / "b", steps=4, time_limit=1e-9, eval_every=1))
    found = train.train(settings(tiny, tmp_path / "b", steps=4, eval_tokens=256, eval_every=1, resume=True))
    run = json.loads((tmp_path / "b" / "run.json").read_text())
    assert first["before"] and run["before"] is None
    assert found["student"] == same["student"] and found["teacher"] == same["teacher"]
    records = read_metrics(tmp_path / "b" / "metrics.jsonl")  # all that was measured
    assert len({str(record["text"]) for record in records if "held_out" in record}) == 2
    assert "before training" not in (tmp_path / "b" / "README.md").read_text()


def test_an_output_folder_named_like_a_model(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for teacher, init, out in (("demo", None, "demo"), ("me/mine", None, "me/mine"), ("none", "x", "./x")):
        with pytest.raises(UserError, match=f"--out {out} is also the name of the model of --.*such as runs/"):
            train.train(settings(tiny, out, teacher=teacher, student_init=init))
    assert not list(tmp_path.iterdir())


def test_out_is_chosen_afresh(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unnamed = dataclasses.replace(settings(tiny, "x", steps=1), out=None)
    outs = [train.train(unnamed)["out"] for _ in range(2)]
    assert outs == [os.path.join("runs", "teacher"), os.path.join("runs", "teacher-2")]


# ---- refusals: one line each, nothing lost


def refused(arguments, contains):
    """Runs train.py, expects exit 1 and one line on stderr."""
    done = call([ROOT / "train.py", *arguments])
    assert done.returncode == 1 and done.stderr.startswith("train.py: error: "), (done.returncode, done.stderr)
    assert done.stderr.count("\n") == 1 and contains in done.stderr, done.stderr


def test_the_docstring_corpus_goes_where_the_environment_says(tiny, tmp_path, monkeypatch):
    """A read-only checkout is one line that names the variable."""
    found = docstrings.python_files()[:60]
    monkeypatch.setattr(docstrings, "python_files", lambda: found)
    folder = tiny / "teacher"
    tokenizer, none = Tokenizer.load(folder), settings(tiny, tmp_path / "out", data=None, teacher="none")
    monkeypatch.delenv("MINIDISTIL_CACHE", raising=False)
    assert files.cache_folder() == ROOT / "data" / "cache"
    (tmp_path / "file").write_text("")  # nobody, root included, can make a folder in it
    monkeypatch.setenv("MINIDISTIL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written to .*: set MINIDISTIL_CACHE to a folder that you may"):
        train.open_corpus(none, tokenizer, folder)
    monkeypatch.setenv("MINIDISTIL_CACHE", str(tmp_path / "cache"))
    corpus = train.open_corpus(none, tokenizer, folder)
    assert corpus.folder.parent == tmp_path / "cache"
    before = corpus.meta["meta_sha256"]
    monkeypatch.setattr(docstrings, "python_files", lambda: [])
    assert train.open_corpus(none, tokenizer, folder).meta["meta_sha256"] == before  # prepared once


@pytest.mark.parametrize("changes, terms", [
    (dict(), {"kl", "ce", "cos"}),
    (dict(alpha_ce=0.0, alpha_cos=0.0), {"ce"}),
    (dict(alpha_mlm=0.0, alpha_mse=1.0), {"kl", "cos", "mse"}),
    (dict(teacher="none", student_config="CONFIG"), {"ce"}),
])  # fmt: skip
def test_terms_that_were_not_computed_are_not_logged(changes, terms, tiny, tmp_path, capsys):
    """Nor is a student spoken of where there is no teacher."""
    config = str(tiny / "teacher" / "config.json")
    changes = {name: config if value == "CONFIG" else value for name, value in changes.items()}
    train.train(settings(tiny, tmp_path / "out", steps=2, student_layers=None, **changes))
    updates = [m for m in run.read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in m]
    assert len(updates) == 2
    for record in updates:
        assert record.keys() & {"kl", "ce", "cos", "mse"} == terms and all(record[name] > 0 for name in terms)
    printed, names = capsys.readouterr().out, svg_texts(tmp_path / "out" / "curve.svg")
    alone = "teacher" in changes
    assert ("student" in printed.replace(str(tmp_path), "")) != alone and ("student" in names) != alone
    assert "held-out, after 2: mlm_loss" in printed
    train.train(settings(tiny, tmp_path / "out", steps=2, student_layers=None, resume=True, **changes))
    printed = capsys.readouterr().out.replace(str(tmp_path), "")
    assert "to train its student further" in printed if not alone else "to train the model further" in printed
    train.train(settings(tiny, tmp_path / "cut", steps=90, student_layers=None, time_limit=1e-4, **changes))
    assert f"holds the {'model' if alone else 'student'} of this moment" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--temperature", "--alpha-ce", "--alpha-cos", "--alpha-mse", "--kd-rows"])
def test_settings_of_a_teacher_need_one(flag):
    with pytest.raises(UserError, match=f"{flag} is for a teacher: name one with --teacher"):
        train.main(["--teacher", "none", flag, "all" if flag == "--kd-rows" else "0"])


def test_no_line_is_wider_than_the_terminal(tiny, tmp_path, monkeypatch, capsys):
    """But for paths and the last one, an object. A narrow terminal shows more lines, of the same words."""
    monkeypatch.setattr(progress.Progress, "line_due", lambda self: True)
    shown = []
    for columns in (80, 60):
        monkeypatch.setenv("COLUMNS", str(columns))
        out = tmp_path / str(columns)
        train.train(settings(tiny, out, steps=3, alpha_mse=1e6, price_per_hour=1e9, lr=1e-30, dropout=0.0))
        lines = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path) not in line]
        assert max(map(len, lines)) <= 80 and all(len(line) <= columns for line in lines if "loss" in line)
        updates = "\n".join(lines).partition("held-out, after 0:")[2].partition("MFLOP")[0]
        shown.append(re.findall(r"(?:loss|mse|kl|cos|top1) [\d.e+-]+", updates))
    assert shown[0] == shown[1] and len(shown[0]) > 15


def test_a_metric_that_is_0_is_shown(capsys):
    assert format_metrics({"kl": 0.0, "top1": 0.25}) == "kl 0  top1 0.25"


def test_seeds_are_refused_or_different(tiny, tmp_path):
    """A negative seed would be another one's equal, as would one of more than 64 bits."""
    for seed in (-1, 2**63, 2**64, 10**30):
        with pytest.raises(UserError, match=f"--seed is {seed}: it must be a whole number from 0 to 92233720368547758"):
            train.train(settings(tiny, tmp_path / "out", seed=seed))
    losses = set()
    for seed in (0, 2**32, 2**63 - 1):
        out = tmp_path / str(seed)
        train.train(settings(tiny, out, seed=seed, steps=1, student_init="random", dropout=0.1))
        losses.add(run.read_metrics(out / "metrics.jsonl")[-1]["held_out"]["mlm_loss"])
    assert len(losses) == 3


def test_wrong_command_line():
    done = call([ROOT / "train.py", "--flags"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--flags" in done.stderr
    done = call([ROOT / "train.py", "--help"])
    assert done.returncode == 0
    for field in dataclasses.fields(train.Settings):
        assert "--" + field.name.replace("_", "-") in done.stdout


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 0}, "--batch"),
        ({"student_width": 0}, "--student-width 0: give a multiple of"),
        ({"lr": float("nan")}, "--lr"),
        ({"warmup": 2.0}, "--warmup"),
        ({"temperature": -1.0}, "--temperature"),
        ({"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 0.0}, "--alpha-"),
        ({"dropout": 1.0}, "--dropout"),
        *(({"mask_share": share}, "--mask-share") for share in (0.0, 1.0, -0.15, 0.999, 0.01, float("nan"), 15.0)),
        ({"seq_len": 64}, "--seq-len 32"),
        ({"seq_len": 4}, "at least 8"),
        ({"batch": 10_000}, "fewer than one update"),
        ({"student_layers": "9"}, "choose 1 to 4"),
        ({"student_layers": "0,9"}, "9"),
        ({"student_layers": "two"}, "neither"),
        ({"data": "nowhere"}, "data/prepare.py"),
        ({"teacher": "none", "student_init": "teacher"}, "--teacher"),
        ({"teacher": "none"}, "--student-config"),
        ({"resume": True, "out": None}, "--out"),
        ({"student_config": "x", "student_init": "y"}, "--student-init"),
        ({"device": "cuda:9"}, "--device cpu"),
        ({"device": "quantum"}, "--device cpu"),
    ],
)
def test_bad_settings(tiny, tmp_path, changes, message):
    wrong = dataclasses.replace(settings(tiny, tmp_path / "out"), **changes)
    with pytest.raises(UserError, match=message) as error:
        train.train(wrong)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_existing_run_is_never_written_over(tiny, uninterrupted):
    whole, _ = uninterrupted
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="--resume"):
        train.train(settings(tiny, whole))
    with pytest.raises(UserError, match="other settings.*sequences in an update 12 -> 24"):
        train.train(settings(tiny, whole, batch=8, accum=3, steps=12, resume=True))
    assert before == {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}


def test_resume_without_a_checkpoint(tiny, tmp_path):
    with pytest.raises(UserError, match="without --resume"):
        train.train(settings(tiny, tmp_path / "out", resume=True))
    assert not (tmp_path / "out").exists()


def test_room_is_checked_before_the_work(tiny, tmp_path, monkeypatch):
    """A model and two checkpoints: seven fp32 numbers a parameter."""
    size = 4 * 7 * num_params(weights.load_model(tiny / "teacher").config.student(2))
    for free in (size - 1, size):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        if free < size:
            with pytest.raises(UserError, match="MiB free, and this run writes .* MiB"):
                train.train(settings(tiny, tmp_path / "out", steps=1))
            assert not (tmp_path / "out").exists()
    assert train.train(settings(tiny, tmp_path / "out", steps=1))["steps"] == 1


def test_another_vocabulary_is_refused(tiny, tmp_path):
    shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    words = (tiny / "teacher" / "vocab.txt").read_text().splitlines()
    words[-1] = "zzzz"  # same size, other contents
    (tmp_path / "teacher" / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "teacher" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="another vocabulary"):
        train.train(settings(tiny, tmp_path / "out", teacher=str(tmp_path / "teacher")))
    with pytest.raises(UserError, match="word for word"):
        train.train(settings(tiny, tmp_path / "out", student_init=str(tmp_path / "teacher")))
    (tmp_path / "teacher" / "vocab.txt").write_text("\n".join(words[:-1]) + "\n")  # another size
    with pytest.raises(UserError, match="vocabulary"):
        train.train(settings(tiny, tmp_path / "out", teacher=str(tmp_path / "teacher")))


def test_nan_stops_with_the_update_named_and_the_checkpoint_kept(tiny, tmp_path, monkeypatch):
    real = distiller.distillation_loss
    calls = 0

    def sabotaged(*arguments):
        nonlocal calls
        calls += 1
        loss, parts = real(*arguments)
        return (loss * float("nan"), parts) if calls == 2 * 3 + 2 else (loss, parts)

    monkeypatch.setattr(distiller, "distillation_loss", sabotaged)
    with pytest.raises(UserError, match=r"update 4: the loss is nan in micro-batch 2 \(sequences 28 to 31\)") as error:
        train.train(settings(tiny, tmp_path / "out", save_every=0.0))
    assert "last good checkpoint" in str(error.value)
    info, tensors = load_checkpoint(tmp_path / "out")
    assert info["update"] == 3 and all(t.isfinite().all() for t in tensors.values())
    monkeypatch.undo()
    assert train.train(settings(tiny, tmp_path / "out", resume=True))["steps"] == 5


def test_a_huge_learning_rate_is_stopped(tiny, tmp_path):
    with pytest.raises(UserError, match="update"):
        train.train(settings(tiny, tmp_path / "out", lr=1e30, steps=20))


def test_500_mutations_of_a_checkpoint_all_show(uninterrupted, tmp_path):
    """Bit flips, cuts, insertions: never resumed from, never a traceback."""
    from test_data import mutate

    whole, _ = uninterrupted
    import numpy as np

    good = (whole / CHECKPOINT).read_bytes()
    path = tmp_path / CHECKPOINT
    path.parent.mkdir()
    rng = np.random.default_rng(5)
    for i in range(500):
        header = i % 2  # every other one in the header, where the structure is
        cut = 4096 if header else len(good)
        bad = mutate(good[:cut], rng) + good[cut:]
        path.write_bytes(bad)
        with pytest.raises(UserError) as error:
            load_checkpoint(tmp_path)
        assert "\n" not in str(error.value)


def test_refusals_from_the_command_line(tiny, tmp_path):
    base = ["--data", tiny / "corpus", "--steps", 2, "--batch", 2, "--accum", 1, "--seq-len", 32]
    (tmp_path / "file").write_text("")
    refused(["--teacher", tiny / "teacher", *base, "--out", tmp_path / "file" / "out"], "choose another path")
    refused(["--teacher", tmp_path, *base, "--out", tmp_path / "out"], "config.json")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs resource limits")
def test_disk_full_loses_nothing(tiny, uninterrupted, tmp_path):
    """A checkpoint that does not fit: one line, the old checkpoint whole, and resume completes the run."""
    whole, _ = uninterrupted
    out = tmp_path / "out"
    first = call(command(tiny, out, "--time-limit", "0.0001"))
    assert first.returncode == 0, first.stderr
    before = (out / CHECKPOINT).read_bytes()
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2); "
    limited += f"sys.path.insert(0, {str(ROOT)!r}); import train; train.run_script(train.main)"
    (tmp_path / "train.py").write_text(limited)
    full = call([tmp_path / "train.py", *command(tiny, out, "--resume")[1:]])
    assert full.returncode == 1 and full.stderr.count("\n") == 1 and "train.py: error: " in full.stderr, full.stderr
    wanted = re.search(r"for ([\d,]+) bytes \((.*)\):", full.stderr)  # a few digits of seconds more or less
    assert abs(int(wanted[1].replace(",", "")) - len(before)) <= 64 and wanted[2] == str(out / CHECKPOINT)
    assert (out / CHECKPOINT).read_bytes() == before
    assert not list(out.rglob("*.tmp"))
    done = call(command(tiny, out, "--resume"))
    assert done.returncode == 0 and same_bits(whole, out)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_trains_like_the_cpu(tiny, tmp_path):
    """Eager mode: fp32 as on the CPU, bf16 and fp16 near it, and an interrupted fp16 run goes on."""
    cpu = train.train(settings(tiny, tmp_path / "cpu", steps=20, dropout=0.0, device="cpu"))
    for dtype, tolerance in (("fp32", 1e-3), ("bf16", 2e-2), ("fp16", 2e-2)):
        gpu = train.train(settings(tiny, tmp_path / dtype, steps=20, dropout=0.0, device="cuda", dtype=dtype))
        assert gpu["student"]["mlm_loss"] == pytest.approx(cpu["student"]["mlm_loss"], rel=tolerance)
        assert gpu["peak_gpu_mib"] > 0
    half = settings(tiny, tmp_path / "half", steps=2000, device="cuda", dtype="fp16", time_limit=0.02, save_every=60.0)
    first = train.train(half)
    second = train.train(dataclasses.replace(half, resume=True))
    assert 0 < first["steps"] < second["steps"]

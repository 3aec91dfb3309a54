"""bench.py runs end to end on small shapes, keeps its contract, and its baseline minimises what the program does."""

import collections
import importlib.util
import json
import re
import shutil
import time
import types

import pytest
import torch
from forked import call
from pictures import svg_texts

import bench
from benches import RESULTS, ROOT, distil, kernels, prepare, roofline, step, tokenizer
from benches.kernel_cases import CASES as KERNEL_CASES
from benches.report import Report, attempt, fitted
from data import docstrings
from kernels import cosine, dropout, layer_norm, linear_distill_kl
from minidistil import distiller, weights
from minidistil.data import IGNORE, Corpus, Prefetcher, Sequences
from minidistil.errors import UserError
from minidistil.losses import Denominators, Objective, distillation_loss
from minidistil.model import LanguageModel
from minidistil.student import student_from_teacher
from minidistil.tokenizer import Tokenizer


def run(case, out, capsys):
    device = ["--device", "cpu"] if case in KERNEL_CASES or case == "step" else []
    assert bench.main([case, "--tiny", *device, "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report) == {"device", "versions", "results"}
    assert json.loads((out / f"{case}.json").read_text())["results"] == report["results"]
    return report["results"]


def test_nothing_to_measure_or_draw_is_said(tmp_path):
    for words, message in (
        (["demo", "--tiny", "--rounds", "0"], "--rounds is 0: it must be at least 1"),
        (["pictures", "--out", str(tmp_path)], "there are no results in"),
        (["readme", "--out", str(tmp_path)], "there are no results in"),
    ):
        with pytest.raises(UserError, match=message):
            bench.main(words)


@pytest.mark.parametrize("name", bench.README)
def test_printed_tables_fit_the_terminal(name):
    """Every word of the README's table is there, in lines of at most 80 columns."""
    table = bench.CASES[name].table(bench.results_of(RESULTS, name))
    for width in (80, 200):
        text = fitted(table, width)
        assert max(map(len, text.splitlines())) <= width
        assert collections.Counter(text.split()) == collections.Counter(re.sub(r"\|(---)?", " ", table).split())
    text = fitted("| | a b c | d |\n|---|---|---|\n| xy | 12 | 3 |\n| failed |", 14)
    assert text.splitlines() == ["        a b  d", "          c", "xy       12  3", "failed"]


def test_step(tmp_path, capsys, monkeypatch):
    # in this process, which is quicker; what the stopwatch replaces is put back afterwards
    monkeypatch.setattr(step, "alone", lambda function, *arguments: getattr(step, function)(*arguments))
    for owner, name in ((Prefetcher, "__call__"), (LanguageModel, "forward"), (distiller, "distillation_loss"),
                        (torch.Tensor, "backward"), (torch.nn.utils, "clip_grad_norm_"),
                        (torch.optim.AdamW, "step")):  # fmt: skip
        monkeypatch.setattr(owner, name, getattr(owner, name))
    results = run("step", tmp_path, capsys)
    assert [r["provider"] for r in results] == ["original's way", "ours, all rows", "ours, masked rows"]
    for r in results:
        low, middle, high = r["tokens_per_second"]
        assert 0 < low <= middle <= high and r["peak_mib"] > 100 and r["speed_up"] > 0
        assert r["published_device_hours"] == pytest.approx(12.6e9 / middle / 3600, rel=1e-3)
    assert step.table(results).count("\n") == 4
    for r in results[1:]:
        assert list(r["phases"]) == list(step.PHASES) and all(ms > 0 for ms in r["phases"].values())
        # about an update of 5 x 2 x 32 tokens, in the same unit: of another run, which may have been disturbed
        whole = 1000 * 5 * 2 * 32 / r["tokens_per_second"][1]
        assert 0.01 * whole < sum(r["phases"].values()) < 100 * whole
    texts = svg_texts(tmp_path / "step.svg")
    assert {"original's way", "ours, all rows", "ours, masked rows", "T = 32", *step.PHASES} <= set(texts)


def test_the_stopwatch_counts_all_updates_but_the_first():
    class Model:
        def forward(self):
            time.sleep(0.01)

    watch = step.Stopwatch(updates=3)
    watch.watch(Model, "forward", "teacher")
    counted = []
    for watch.left in (3, 2, 1, 0):  # the first update, two that count, the evaluation after the last
        before = watch.seconds["teacher"]
        Model().forward()
        counted.append(watch.seconds["teacher"] > before)
    assert counted == [False, True, True, False] and watch.updates == 2


def test_kernels_can_be_left_out(tmp_path, monkeypatch):
    """`no kernels` launches none where they would serve: interpreted here, on a GPU there."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module, name in ((cosine, "_forward"), (layer_norm, "_forward"), (layer_norm, "_forward_kernel")):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(linear_distill_kl, "_loss_and_gradient_kernel", None)
    shape = step.TINY_STEP | dict(accum=1)
    step.make_world(tmp_path, shape, 20_000)
    with pytest.raises(TypeError, match="NoneType"):
        step.ours(tmp_path, shape, "cpu", dict(kd_rows="masked"))
    assert step.ours(tmp_path, shape, "cpu", dict(kd_rows="masked"), kernels=False)["tokens_per_second"] > 0
    assert step.original(tmp_path, shape, "cpu")["tokens_per_second"] > 0
    modules = cosine, dropout, layer_norm, linear_distill_kl
    assert all(module.on_triton(torch.zeros(1)) for module in modules)  # they serve again


def test_prepare(tmp_path, capsys, monkeypatch):
    """The same bytes from one worker, from two, and after a kill in the middle; other bytes are not timed."""
    texts = [f"Returns the {i}th of {i + 1} elements.\n\nSee also: row {i}, column {i % 7}" for i in range(2000)]
    monkeypatch.setattr(docstrings, "harvest", lambda paths: texts)
    one, two = run("prepare", tmp_path, capsys)
    assert one["hashes"] == two["hashes"] and one["shape"]["megabytes"] >= 4
    assert 0 < one["peak_mib"] < two["peak_mib"] < 500 and one["mb_per_second"] > 0
    assert prepare.table([one, two]).count("\n") == 3
    summary = {"seconds": 1.0, "tokens_per_second": 9, "peak_mib": 1.0, "tokens": {"train": 5}}
    monkeypatch.setattr(prepare, "prepared", lambda text, out, workers, kill_after=None: (
        None if kill_after else summary | {"hashes": {"train.bin": str(workers)}}
    ))  # fmt: skip
    *_, two = prepare.bench(prepare.Settings(tiny=True))
    assert "other bytes than one worker" in two["error"] and "mb_per_second" not in two


def test_varied_text_keeps_its_documents(tmp_path, monkeypatch):
    """Repetitions have other words in the same number of documents, none of them empty."""
    texts = [f"word{i} stands\nbefore word{i + 1}" for i in range(300)]
    monkeypatch.setattr(docstrings, "harvest", lambda paths: texts)
    prepare.write_text(tmp_path / "text.txt", 3 * sum(map(len, texts)))
    lines = (tmp_path / "text.txt").read_text().splitlines()
    assert len(lines) % 300 == 0 and len(lines) >= 900 and all(len(line.split()) == 4 for line in lines)
    first, second = lines[:300], lines[300:600]
    assert 0.02 < sum(a != b for a, b in zip(first, second, strict=True)) / 300 < 0.5
    assert sorted(" ".join(first).split()) != sorted(" ".join(texts).split())


def test_tokenizer(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    results = run("tokenizer", tmp_path, capsys)
    assert len(results) == 10 and results[0]["shape"]["tokens"] > 10_000
    assert [row["provider"] for row in results[5:]] == [f"byte-level BPE: {row['provider']}" for row in results[:5]]
    assert results[5]["shape"]["tokens"] != results[0]["shape"]["tokens"]
    with pytest.raises(UserError, match="holds no byte-level BPE"):
        tokenizer.byte_level(ROOT / "data" / "demo", [], 300)


def test_the_original_has_the_same_loss(tmp_path):
    """Where its padding hides nothing and its micro-batch is the update, the baseline's loss is our objective's."""
    shape = step.TINY_STEP | dict(accum=1, updates=0)
    step.make_world(tmp_path, shape, 20_000)
    logged = step.original(tmp_path, shape | {"padding": 0}, "cpu")["loss"]
    teacher = weights.load_model(tmp_path / "teacher").eval().requires_grad_(False)
    student = student_from_teacher(teacher, [0, 3]).eval()
    corpus = Corpus(tmp_path / "corpus")
    sequences = Sequences(corpus.train, shape["T"], Tokenizer.load(tmp_path / "teacher"), 0, corpus.counts, 0.7, True)
    ids, labels = map(torch.from_numpy, sequences.batch(0, shape["batch"]))
    counts = Denominators(ids.numel(), int((labels != IGNORE).sum()))
    ours, _ = distillation_loss(Objective(), counts, labels, student, student(ids), teacher, teacher(ids))
    # dropout is on in the baseline: near, not equal
    assert logged == pytest.approx(ours.item(), rel=0.02)


@pytest.mark.parametrize("case", ["loss", "linear", "layernorm", "cosine"])
def test_kernels(case, tmp_path, capsys):
    """Each provider is right before it is timed, and the figures hold together."""
    results = run(case, tmp_path, capsys)
    expected = {"eager", "torch.compile", "ours"}
    if case == "linear" and importlib.util.find_spec("liger_kernel"):
        expected.add("Liger")  # elsewhere its kernels are for a GPU
    assert {r["provider"] for r in results} == expected
    for r in results:
        low, middle, high = r["ms"]
        assert 0 < low <= middle <= high and r["gb_per_s"] >= 0 and r["peak_mib"] >= 0
        assert r["max_error"] < kernels.WRONG[r["dtype"]]
    assert kernels.table(results).count("\n") == 1 + len(results)
    assert {*expected, "a copy's bandwidth"} <= set(svg_texts(tmp_path / f"{case}.svg"))


def test_roofline(tmp_path, capsys):
    """Each computation beside the lower of the two limits, whose bend is where they are equal."""
    results = run("roofline", tmp_path, capsys)
    by_name = {(r.get("computation"), r["provider"]): r for r in results}
    assert by_name.keys() >= {(case, provider) for case in KERNEL_CASES for provider in ("eager", "ours")}
    bandwidth, rate = roofline.limits(results)
    for r in results[2:]:
        assert 0 < r["ms"] and r["max_error"] < kernels.WRONG["float32"]
        within = min(bandwidth * r["operations"] / r["bytes"], rate)
        assert r["of_limit"] == pytest.approx(r["gflop_per_s"] / within, rel=0.3)  # rounded to three places
    assert {"limit", "ours", "eager", "the loss on logits"} <= set(svg_texts(tmp_path / "roofline.svg"))
    rows = dict(N=10, V=30522, C=768)
    assert roofline.operations("linear", rows) - roofline.operations("loss", rows) == 10 * 30522 * (8 * 768 + 2)
    known = [{"provider": "copy", "gb_per_s": 10}, {"provider": "matrix product", "gflop_per_s": 100}]
    point = dict(computation="cosine", provider="ours", gflop_per_s=10, of_limit=0.2)
    for per_byte, limited in ((9.9, "memory"), (10.1, "products")):
        assert f"| {limited} | 20% |" in roofline.table([*known, dict(point, operations=per_byte, bytes=1)])


def test_the_demo_has_a_row_for_each_start():
    """Each pair of layers that a student begins with is a row, as it is before the first update."""
    teacher, first, *_ = bench.results_of(RESULTS, "demo")
    other = {**first, "provider": "distilled, layers 0 and 1", "curve": [[0, teacher["top1"] / 2, 4.25]]}
    lines = distil.demo_table([teacher, first, other]).splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == ["teacher", *distil.UNTRAINED.values(), *(f"student, {name}" for name in distil.UNTRAINED)]
    assert "| 50.0% | 4.250 | | |" in lines[4] and set(distil.UNTRAINED) <= set(distil.VARIANTS)


def kernel_rows(case, out):
    settings = kernels.Settings(tiny=True, device="cpu", out=str(out))
    return list({id(row): row for row in kernels.bench(case, settings)}.values())


@pytest.mark.parametrize("provider", ["ours", "Liger"])
@pytest.mark.parametrize("error, said", [
    (torch.OutOfMemoryError, "out of memory"), (TypeError, "TypeError: as it would"),
    (None, "a wrong result is not timed"),
])  # fmt: skip
def test_a_provider_may_fail(error, said, provider, tmp_path, monkeypatch):
    """Where it runs out of memory, breaks or is wrong, its row says so, and the others are timed."""
    case = KERNEL_CASES["loss"]

    def bad(s, t, labels, n):
        if error:
            raise error("as it would")
        return 2 * case.eager(s, t, labels, n)

    providers = {"eager": case.eager, "ours": case.ours, "Liger": case.eager} | {provider: bad}
    monkeypatch.setattr(kernels, "providers_of", lambda case, shape, device: providers)
    results = {row["provider"]: row for row in kernel_rows(case, tmp_path)}
    failed = results.pop(provider)
    assert said in failed["error"] and "ms" not in failed and all(row["ms"] for row in results.values())
    table = kernels.table([*results.values(), failed])
    assert said in table and table.count("\n") == 4
    kernels.draw(tmp_path / "loss.svg", [*results.values(), failed])
    texts = svg_texts(tmp_path / "loss.svg")
    assert ("out of memory" if error is torch.OutOfMemoryError else "failed") in texts and "8 rows, fp32" in texts


def test_pictures_are_drawn_again_from_the_files(tmp_path):
    shutil.copy(RESULTS / "loss.json", tmp_path)
    assert bench.main(["pictures", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.json", "loss.svg"]
    assert "512 rows, bf16" in svg_texts(tmp_path / "loss.svg")


# ---- the report


def test_no_row_is_lost(tmp_path, monkeypatch, capsys):
    """A failure and a kill leave what was measured on disk; the exit code and a file say what failed."""

    def rows(settings):
        yield {"case": "loss", "provider": "eager", "ms": [1.0, 1.0, 1.0]}
        row = {"case": "loss", "provider": "ours"}
        with attempt(row):
            raise RuntimeError("no such kernel")
        yield row
        assert [r["provider"] for r in on_disk("loss.partial")] == ["eager", "ours"]
        if killed:
            raise KeyboardInterrupt

    def on_disk(name):
        return json.loads((tmp_path / f"{name}.json").read_text())["results"]

    case = types.SimpleNamespace(Settings=kernels.Settings, bench=rows, table=lambda rows: "| |\n|---|")
    monkeypatch.setitem(bench.CASES, "loss", case)
    killed = False
    assert bench.main(["loss", "--tiny", "--device", "cpu", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "bench.py: loss: ours failed: see" in said.err and json.loads(said.out.splitlines()[-1])["results"]
    assert [r.get("error") for r in on_disk("loss")] == [None, "RuntimeError: no such kernel"]
    failures = (tmp_path / "loss.failures.txt").read_text()
    assert "Traceback" in failures and "in rows" in failures
    case.bench = lambda settings: iter([{"case": "loss", "provider": "ours", "error": "it failed"}])
    assert bench.main(["loss", "--tiny", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "nothing was measured" in capsys.readouterr().out
    case.bench, killed = rows, True
    with pytest.raises(KeyboardInterrupt):
        bench.main(["loss", "--tiny", "--device", "cpu", "--out", str(tmp_path)])
    assert len(on_disk("loss.partial")) == 2


def test_a_row_that_comes_again_is_written_again(tmp_path):
    report, row = Report(tmp_path, "step", {"device": "here"}), {"case": "step", "provider": "ours"}
    report.put(row)
    row["tokens_per_second"] = [1, 2, 3]
    report.put(row)
    report.put({"case": "step", "provider": "eager", "error": "out of memory", "traceback": "long"})
    assert not report.failed
    report.put({"case": "step", "provider": "ours, too", "error": "out of memory", "traceback": "long"})
    report.finish()
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["device"] == "here" and [r["provider"] for r in written["results"]] == ["ours", "eager", "ours, too"]
    assert written["results"][0]["tokens_per_second"] and "traceback" not in written["results"][1]
    assert report.failed == ["ours, too"] and not report.partial.exists()


def test_a_later_failure_keeps_the_earlier_rounds(tmp_path, monkeypatch):
    """The second round of a provider fails: the first one's speed is still there."""
    speeds = iter([10.0, 20.0, 40.0, 11.0, None, 44.0])

    def alone(function, *arguments):
        if function == "phases":
            return {"loss": 1.0}
        speed = next(speeds)
        if speed is None:
            raise UserError("died")
        return {"tokens_per_second": speed, "peak_mib": 1.0, "dtype": "fp32"}

    monkeypatch.setattr(step, "alone", alone)
    monkeypatch.setattr(step, "make_world", lambda *_: None)
    rows = step.bench(step.Settings(tiny=True, device="cpu", rounds=2, out=str(tmp_path)))
    original, every, masked = {id(row): row for row in rows}.values()
    assert original["tokens_per_second"][1] == 10.5 and masked["tokens_per_second"][1] == 42.0
    assert original["dtype"] == "fp32" and "| original's way | fp32 |" in step.table([original])
    assert every["tokens_per_second"][1] == 20.0 and "died" in every["error"]


def test_the_device_stands_in_the_corner(tmp_path, capsys):
    """The rows of a speed bench name their device, and the table does; rows of before, and scores, name none."""
    (row, *_) = run("loss", tmp_path, capsys)
    device = row["device"]
    assert device.endswith(f", {torch.get_num_threads()} threads") and "cpu_name" in torch.cpu.get_capabilities()
    assert torch.cpu.get_capabilities()["cpu_name"] in device
    assert bench.table("loss", [row]).startswith(f"| {device} | shape | ")
    del row["device"]
    assert bench.table("loss", [row]).startswith("| | shape | ")
    workers = bench.table("prepare", [r | {"device": device} for r in bench.results_of(RESULTS, "prepare")])
    assert workers.startswith(f"| workers, {device} | MB/s | ")
    assert bench.main(["readme", "--out", str(RESULTS)]) == 0
    assert capsys.readouterr().out.startswith("| | parameters | held-out top-1 |")


# ---- the command line


@pytest.mark.parametrize("arguments, code, said", [
    (["nosuch"], 2, "there is no case nosuch: choose one of"), (["tokenizer", "--teacher", "x"], 2, "unrecognized"),
    (["loss", "--tiny", "--out", "results"], 1, "name another --out"), (["step", "--profile"], 2, "unrecognized"),
])  # fmt: skip
def test_a_wrong_command_line_is_refused(arguments, code, said):
    done = call(["bench.py", *arguments], cwd=ROOT)
    assert done.returncode == code and said in done.stderr and done.stderr.count("\n") == 1


def test_all_is_every_case_that_needs_no_models(monkeypatch, capsys):
    measured = {}

    def measure(name, settings):
        measured[name] = settings
        return types.SimpleNamespace(head={"device": "here"}, rows=[], failed=[])

    monkeypatch.setattr(bench, "measure", measure)
    assert bench.main(["all", "--tiny", "--device", "cpu"]) == 0
    assert list(measured) == [name for name in bench.CASES if name != "retention"]
    assert all(settings.tiny for settings in measured.values()) and measured["step"].device == "cpu"

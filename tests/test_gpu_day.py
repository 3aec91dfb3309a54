"""A GPU day without a GPU: what a stage does to the next, what is concluded from rows, what travels."""

import importlib
import json
import os
import re
import tarfile
import types

import pytest
import torch
from forked import call

import bench
from benches.gpu import Settings, day, prepare, run, smoke, steps, sweeps, targets, tools, variants
from benches.gpu.day import FIRST, SECOND, SKIPPED, SWEEPS, Day, Stage, flat
from benches.gpu.summary import summary, verdict
from data import docstrings
from minidistil.errors import UserError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted")


def settings(folder, **more):
    return Settings(out=str(folder / "out"), work=str(folder / "work"), **more)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]


def of_stages(folder):
    return {row["stage"]: row for row in rows_of(folder) if "starts" in row}


# ---- processes


def test_a_stage_that_fails_costs_itself_alone(tmp_path, monkeypatch, capsys):
    """It raises, crashes or hangs in one unit; the unit after it is done, in a new process where the first was lost."""
    stages = [Stage(f"pretend:{how}", 60, silence=3) for how in ("raise", "crash", "hang")]
    monkeypatch.setattr(day, "FIRST", [stages])
    started = Day(settings(tmp_path))
    started.go()
    rows, ended = rows_of(tmp_path), of_stages(tmp_path)
    assert {name: row["starts"] for name, row in ended.items()} == {
        "pretend:raise": 1, "pretend:crash": 2, "pretend:hang": 2,
    }  # fmt: skip
    assert {row["status"] for row in ended.values()} == {"failures"}
    bad = {row["stage"]: row["status"] for row in rows if row.get("unit") == "bad"}
    assert bad == {"pretend:raise": "failed", "pretend:crash": "died with -11", "pretend:hang": "hung"}
    assert {row["stage"] for row in rows if row.get("unit") == "after"} == set(bad)
    failures = (tmp_path / "out" / "failures.txt").read_text()
    assert "raised on purpose" in failures and "Traceback" in failures and "arguments: []" in failures
    assert json.loads((tmp_path / "work" / "state.json").read_text()) == started.status
    assert "pretend:hang, bad: hung" in (tmp_path / "out" / "summary.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "code.tar.gz", "failures.txt", "log.txt", "results.jsonl", "summary.md",
    ]  # fmt: skip


def test_the_budget_ends_a_stage_and_skips_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(day, "FIRST", [Stage("pretend:hang", 60, need=1), Stage("pretend:raise", 60, need=1)])
    started = Day(settings(tmp_path, budget=day.LAST + 3.0))
    started.go()
    assert started.status == {"pretend:hang": "out of time", "pretend:raise": SKIPPED}
    assert 0 <= started.left() <= day.LAST


def test_a_stage_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(day, "FIRST", [Stage("pretend:hang", 3, silence=60)])
    started = Day(settings(tmp_path))
    started.go()
    assert started.status == {"pretend:hang": "out of time"}


def test_never_more_than_eight_files(tmp_path, monkeypatch):
    """A machine that is lent returns eight. What pytest and scripts write is packed; nothing of an earlier run is."""
    monkeypatch.setitem(tools.SCRIPTS, "lesson", ("-c", "print('the ladder')"))
    monkeypatch.setattr(day, "FIRST", [])
    started = Day(settings(tmp_path))
    (tmp_path / "work" / "reports").mkdir(parents=True)
    (tmp_path / "work" / "reports" / "old.txt").touch()
    started.go()
    tools.script(run.Run(settings(tmp_path, stage="script:lesson")))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"code.tar.gz", "log.txt", "results.jsonl", "summary.md"}
    started.pack()
    with tarfile.open(tmp_path / "out" / "reports.tar.gz") as tar:
        assert tar.getnames() == ["lesson.txt"] and tar.extractfile("lesson.txt").read() == b"the ladder\n"
    sources = "".join(path.read_text() for path in (day.ROOT / "benches" / "gpu").glob("*.py"))
    named = set(re.findall(r'\w\.out / f?"([^"]+)"', sources))
    assert named == {"results.jsonl", "failures.txt", "log.txt", "summary.md", "trace.json.gz", "code.tar.gz",
                     "{REPORTS}.tar.gz"}  # fmt: skip
    assert not re.search(r"\{\w+\.out\}", sources)  # of an f-string


def test_plans(tmp_path):
    """The second run begins with what the first lost, and ends with what it skipped."""
    names = lambda **more: [stage.name for stage in Day(settings(tmp_path, **more)).stages()]  # noqa: E731
    assert names() == [stage.name for stage in flat(FIRST)]
    assert names(second=True) == [stage.name for stage in flat(SECOND)]
    (tmp_path / "work").mkdir()
    state = {"ceilings": "ok", "smoke:loss": "failures", "warm:step": "hung", "sweeps": "died with 3",
             "compare": "out of time", "demo": SKIPPED, "step:ours, all rows@128": SKIPPED}  # fmt: skip
    (tmp_path / "work" / "state.json").write_text(json.dumps(state))
    assert names(second=True) == ["world", "sweeps", "compare", *(s.name for s in flat(SECOND)[1:]), "demo"]
    assert names(only="demo; smoke:norm") == ["demo", "smoke:norm"]
    assert names(cpu=True) == [f"smoke:{kernel}" for kernel in ("loss", "linear", "norm", "cosine")]


def test_every_stage_is_there():
    for stage in flat([*FIRST, *SECOND]):
        name, _, part = stage.name.removeprefix("warm:").replace("/", ":", "warm:" in stage.name).partition(":")
        module = importlib.import_module(f"benches.gpu.{day.STAGES[name]}")
        assert callable(getattr(module, name))
        if name == "step" and part:
            assert part.partition("@")[0] in (*steps.STEPS, steps.ORIGINAL)
    assert all(callable(getattr(sweeps, name)) for name in SWEEPS)


def test_the_command_line(tmp_path):
    def error_of(*words):
        done = call(["bench.py", "gpu", *words], cwd=day.ROOT)
        return done.returncode, done.stderr

    assert error_of() == (1, "bench.py: error: there is no folder for the results: name one with --out\n")
    with pytest.raises(UserError, match="there is no stage smok: choose from "):
        bench.main(["gpu", "--out", str(tmp_path), "--only", "smoke:loss;smok"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="there is no GPU here: "):
            bench.main(["gpu", "--out", str(tmp_path)])


# ---- smoke and sweeps, interpreted


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield
    torch.use_deterministic_algorithms(False)


@no_gpu
@pytest.mark.parametrize("kernel", ["loss", "linear", "norm", "cosine"])
def test_smoke(kernel, tmp_path, interpreted):
    """The kernels are right; with one element of each result spoilt every case is wrong, and says where."""
    (tmp_path / "out").mkdir()
    for sabotage in (False, True):
        stage = run.Run(settings(tmp_path, cpu=True, stage=f"smoke:{kernel}", sabotage=sabotage))
        smoke.smoke(stage)
        found = [row["ok"] for row in rows_of(tmp_path) if "ok" in row]
        if not sabotage:
            assert len(found) >= 3 and all(found) and not stage.failed
        else:
            half = len(found) // 2
            assert not any(found[half:]) and stage.failed == half
            assert "(index, ours, truth)" in (tmp_path / "out" / "failures.txt").read_text()


@no_gpu
def test_edited_kernels_compute_the_same(tmp_path, interpreted):
    """Each edit finds its place in the source, and changes no result but by rounding."""
    torch.manual_seed(0)
    s, t = (torch.randn(2, 2048).mul_(3) for _ in "st")
    y, V = torch.tensor([5, -100]), 2000

    def linear(module):
        gradient, losses = s.clone(), torch.zeros(2, 3)
        variants.launch_linear(module, gradient, t, y, losses, V, 512, 4)
        return gradient, losses

    def norm(module):
        x, r, w, b = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
                      for shape in ((3, 64), (3, 64), (64,), (64,)))  # fmt: skip
        found = module.dropout_add_layer_norm(x, r, w, b, 1e-12, 0.0)
        return found, *torch.autograd.grad(found.square().sum(), [x, r, w, b])

    for label, edits in variants.SOURCES.items():
        name = list(edits)[-1]
        compute, shipped = {"linear_distill_kl": linear, "layer_norm": norm}[name], f"kernels.{name}"
        module = variants.edited(label, tmp_path)
        assert module is not importlib.import_module(shipped)
        for ours, theirs in zip(compute(importlib.import_module(shipped)), compute(module), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6), label


def test_an_edit_that_finds_nothing_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(variants.SOURCES, "gone", {"layer_norm": [("no such text", "")]})
    with pytest.raises(LookupError, match="mend benches/gpu/variants.py"):
        variants.edited("gone", tmp_path)


# ---- the summary


def test_a_default_changes_for_more_than_two_percent_and_twice_the_noise():
    def change(now, again, other):
        ms = {"a": [0, now, 0], "b": [0, other, 0], "default again": [0, again, 0]}
        return verdict({"default": "a", "ms": ms})[3]

    assert change(1.0, 1.0, 0.97) and not change(1.0, 1.0, 0.981)
    assert change(1.0, 1.01, 0.97) and not change(1.0, 1.02, 0.97) and not change(1.0, 0.98, 0.97)
    assert not change(1.0, 1.0, 1.1)
    ms = {name: [0, time, 0] for name, time in {"a": 1.0, "b": 0.8, "c": 0.7, "default again": 1.0}.items()}
    assert verdict({"default": "a", "ms": ms, "information": ["c"]})[0] == "b"
    best, gain, noise, change = verdict({"default": "a", "ms": {"b": [0, 1.0, 0]}})  # the default failed
    assert best == "b" and gain != gain and not change


def measured():
    """Rows as the stages write them."""
    loss = dict(case="loss", shape=dict(N=4915, V=30522, labelled=1.0, dtype="bfloat16"))
    compared = dict(stage="compare", **loss, peak_mib=286.0, share_of_copy=0.9, host_us=100)
    step = dict(case="step", shape=dict(T=512), peak_mib=2e4, losses=[9, 8])
    dropout = dict(unit="attention dropout", p=0.1)
    ms = {"(4096, 8)": [1, 1.0, 1], "(4096, 16)": [1, 0.9, 1], "default again": [1, 1.01, 1]}
    return [
        dict(stage="ceilings", unit="versions", device="a GPU", torch="2.11"),
        dict(stage="ceilings", unit="copy", gb_per_s=3000.0),
        dict(stage="ceilings", **dropout, backend="ours", mean=0.998, dropped=0.1, right=True),
        dict(stage="ceilings", **dropout, backend="cuDNN", mean=1.04, dropped=0.06, right=False),
        dict(stage="smoke:loss", unit="loss", errors={}, ok=True),
        dict(stage="smoke:norm", unit="norm", status="failed", error="AssertionError: dx, norm"),
        dict(stage="sweeps", unit="kernel of linear", default="(4096, 8)", ms=ms, failed={}, what="launch()"),
        dict(compared, provider="ours", ms=[0.5, 0.5, 0.5]),
        dict(compared, provider="torch.compile", ms=[1.2, 1.2, 1.2]),
        dict(compared, provider="eager", ms=[4.0, 4.0, 4.0]),
        dict(stage="compare", **loss, provider="Liger", error="out of memory"),
        dict(stage="step:ours, all rows", **step, provider="ours, all rows", tokens_per_second=480_000.0),
        dict(stage="step:original's way", **step, provider="original's way", tokens_per_second=170_000.0),
        dict(stage="sweeps", status="ok", seconds=50.0, starts=1, card="1980 MHz"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "# GPU day: a GPU",
        "smoke: 1 of 1 cases right",
        "- smoke:norm, norm: AssertionError: dx, norm",
        "cuDNN 0.1: 1.0400 0.0600 WRONG",
        "| loss, 4,915 rows: x eager | at least 10 | 8 | NO |",
        "| loss, 4,915 rows: x torch.compile | at least 2 | 2.4 | yes |",
        "| loss, 32,768 rows: x eager | at least 10 | not measured | |",
        "| update, all rows: tokens/s | at least 450,000 | 480,000 | yes |",
        "| update, all rows: x the original's way | at least 3 | 2.82 | NO |",
        "| attention: distance of dropout's mean from 1 | at most 0.005 | 0.002 | yes |",
        "- T = 512, ours, all rows: 480,000 tokens/s (predicted 465,000 to 500,000), 2.8x",
        "- kernel of linear: CHANGE (4096, 8), 1.0000 ms; best (4096, 16), 0.9000 ms (10.0%, noise 1.0%); launch()",
        "| loss | 4915 30522 1.0 | ours | 0.5 | 0.55 to 0.6 | 8.0 | 0.9 | 100 | 286.0 | 286 |",
        "| loss | 4915 30522 1.0 | Liger |  |  |  |  |  | out of memory |  |",
    ],
)
def test_summary(line, tmp_path):
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured()))
    assert line in summary(tmp_path / "results.jsonl")


def test_nothing_measured(tmp_path):
    (tmp_path / "results.jsonl").touch()
    assert "device not recorded" in summary(tmp_path / "results.jsonl")
    assert all(value is None for _, value, _, _ in targets.targets([]))


# ---- what travels


def test_prepare(tmp_path, monkeypatch, capsys):
    """The corpora, Liger's wheel and the revision; the commands name their folders and a limit beyond the budget."""
    monkeypatch.setenv("MINIDISTIL_CACHE", str(tmp_path / "elsewhere"))  # does not travel
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    monkeypatch.setattr(prepare, "FOLDER", tmp_path / "data" / "cache" / "gpu-day")
    monkeypatch.setattr(prepare, "WORDS", 40_000)
    wheel = "liger_kernel-1-py3-none-any.whl"
    monkeypatch.setattr(prepare, "fetch_liger", lambda: (prepare.FOLDER / wheel).touch())
    files = docstrings.python_files()[:60]
    monkeypatch.setattr(docstrings, "python_files", lambda: files)
    bench.main(["gpu", "--prepare"])
    printed = capsys.readouterr().out
    (docs,) = (tmp_path / "data" / "cache").glob("docstrings-*")
    assert f'carry ["data/cache/gpu-day", "data/cache/{docs.name}"]' in printed
    assert "limit 530 s" in printed and "limit 210 s" in printed
    assert "python3 bench.py gpu --out $OUT --budget 500\n" in printed
    assert "python3 bench.py gpu --out $OUT --budget 190 --second\n" in printed
    found = {str(path.relative_to(prepare.FOLDER)) for path in prepare.FOLDER.rglob("*") if path.is_file()}
    assert found >= {"revision.json", wheel, "corpus/train.bin", "corpus/meta.json"}
    before = {path: os.stat(path).st_mtime_ns for path in prepare.FOLDER.rglob("*.bin")}
    prepare.make_corpora()  # what is there is left as it is
    assert before == {path: os.stat(path).st_mtime_ns for path in prepare.FOLDER.rglob("*.bin")}


def test_variants_know_the_defaults(monkeypatch):
    card = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    found = variants.defaults()
    assert found["norm programs"] >= 1 and found["norm stages"] in (1, 2, 3) and found["norm warps"] in (1, 2, 4)
    assert found["loss"][0] >= 1024 and found["linear"][0] >= 1024 and found["chunk rows"] >= 1024

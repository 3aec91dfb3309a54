"""The GPU's path where there is no GPU: tests that need one, on a device in name (pretended_gpu.cpp).

It shows that the path runs, to the right numbers, without mixing devices, waiting or running out of memory unnoticed.
It shows nothing of speed, of ptxas, or of torch.compile.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from test_train import same_bits, settings

import train
from benches.kernel_cases import CASES
from benches.kernels import both_passes
from benches.measure import extra_memory_mib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRETENDED = "PRETENDED_GPU" in os.environ
inside = pytest.mark.skipif(not PRETENDED, reason="runs on the device in name, by the tests above")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if sys.platform != "linux" or not shutil.which("g++"):
        pytest.skip("needs Linux and g++")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this build of PyTorch knows real GPUs")
    from pretended_gpu import build

    path = tmp_path_factory.mktemp("pretended") / "gpu.so"
    build(path)
    return path


def python(library, kernels, *arguments):
    """Runs Python with the device in name; returns what it printed."""
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    environment = os.environ | {"PRETENDED_GPU": str(library), "PRETENDED_KERNELS": kernels, "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


KERNELS = "tests/test_distill_kl.py tests/test_linear_distill_kl.py tests/test_layer_norm.py tests/test_cosine.py "
KERNELS += "tests/test_dropout.py tests/test_distiller.py"
TELLING = "(fp32 or autocast or same_bits or without or by_kernel or stride) and not one_graph"
TRAINING = "tests/test_train.py tests/test_micro_batch.py tests/test_finetune.py tests/test_pretended_gpu.py"


@pytest.mark.parametrize(
    "kernels, files, chosen, least",
    [
        ("compiled", KERNELS, TELLING, 100),
        ("off", TRAINING, "not one_wait and not memory_beside", 10),
        ("idle", "tests/test_micro_batch.py tests/test_pretended_gpu.py", "one_wait or memory_beside", 4),
    ],
)
def test_marked_gpu(kernels, files, chosen, least, library):
    pytest_ = ["-m", "pytest", "-q", "-p", "pretended_gpu", "-p", "no:cacheprovider", "-m", "gpu", "-k", chosen]
    printed = python(library, kernels, *pytest_, *files.split())
    assert int(re.search(r"(\d+) passed", printed)[1]) >= least


def test_bench(library, tmp_path):
    """Ours, through the compiled kernels, is as near to fp64 as PyTorch is; memory is the device's own count."""
    cases = ["loss", "linear", "layernorm", "cosine"]
    program = f"import pretended_gpu, bench, sys; [bench.main([case, *sys.argv[1:]]) for case in {cases}]"
    options = ["--tiny", "--device", "cuda", "--rounds", "1", "--out", str(tmp_path)]
    printed = python(library, "compiled", "-c", program, *options)
    assert printed.count("pretended GPU") >= 4 and len(re.findall("^ours  .*x", printed, re.MULTILINE)) >= 4
    assert all((tmp_path / f"{case}.{kind}").exists() for case in cases for kind in ("json", "svg"))


@pytest.mark.parametrize(
    "kernels, stage",
    [
        ("off", "ceilings"),
        ("compiled", "smoke:linear"),
        ("compiled", "sweeps:linear"),
        ("off", "step:ours, all rows"),
    ],
)
def test_gpu_day(kernels, stage, library, tmp_path):
    """A stage of `bench.py gpu`, at small shapes: no unit fails, and each row is complete."""
    program = "import pretended_gpu, sys; from benches.gpu import main; main(sys.argv[1:])"
    python(library, kernels, "-c", program, "--out", str(tmp_path), "--work", str(tmp_path), "--tiny", "--stage", stage)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows and {row["stage"] for row in rows} == {stage} and not any("status" in row for row in rows)
    for row in rows:
        assert row.get("default") in (None, *row.get("ms", [])) and not row.get("failed")
        assert row.get("ok", True) and row.get("right", True) and row.get("tokens_per_second", 1) > 0
        assert all(loss > 0 for loss in row.get("losses", []))


# ---- on the device in name


@inside
@pytest.mark.gpu
def test_it_is_as_strict_as_a_gpu():
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.nn.functional.cross_entropy(torch.ones(2, 3, device="cuda"), torch.tensor([0, 1]))
    assert torch.empty(3, device="cuda").isnan().all()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for wait in (x.sum().item, x.cpu, lambda: torch.ones(3).to("cuda"), x.nonzero, lambda: x[x > 0]):
            with pytest.warns(UserWarning, match="synchronizing"):
                wait()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@inside
@pytest.mark.gpu
@pytest.mark.parametrize("mib, split", [(55, "4 x 8"), (53, "16 x 2")])
def test_the_largest_micro_batch_where_memory_ends(mib, split, tiny, tmp_path, capsys):
    """Less memory, smaller micro-batches, the same update; 51 MiB of the GPU's 1,024 are kept free."""
    from pretended_gpu import MIB, device

    base = settings(tiny, tmp_path / "one", batch=2, accum=16, dropout=0.0, device="cuda", micro_batch="2")
    torch.cuda.reset_peak_memory_stats()
    given = train.train(base)
    device.pretended_limit(mib * MIB)
    try:
        found = train.train(dataclasses.replace(base, out=str(tmp_path / "auto"), micro_batch="auto"))
    finally:
        device.pretended_limit(2**63 - 1)
    assert f"5 updates of {split} x 32" in capsys.readouterr().out
    assert found["student"]["mlm_loss"] == pytest.approx(given["student"]["mlm_loss"], rel=1e-4)
    # the trial's memory is not training's
    assert 0 < given["peak_gpu_mib"] <= found["peak_gpu_mib"] < 20


@inside
@pytest.mark.gpu
@pytest.mark.parametrize("case, most", [("loss", 0.101), ("linear", 0.15)])
def test_memory_beside_that_of_eager(case, most, monkeypatch):
    """At an eighth of BERT-base's width and vocabulary, of a micro-batch's 4,915 masked rows, and of a chunk's rows.

    All that takes memory has two of these factors, so that the shares are those of the whole: 10.0 % and 14.3 %.
    """
    monkeypatch.setattr("kernels.linear_distill_kl.GPU_CHUNK_ROWS", 512)
    device, case = torch.device("cuda"), CASES[case]
    inputs = case.inputs(dict(N=614, V=3840, C=96, labelled=1.0, dtype="bfloat16"), device)
    took = {}
    for provider in ("eager", "ours"):
        arguments = case.prepared(provider, inputs)
        once = both_passes(getattr(case, provider), arguments, case.leaves, "bfloat16")
        took[provider] = extra_memory_mib(once, device)
    assert 0 < took["ours"] <= most * took["eager"]


@inside
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_resume_to_the_same_bits(dtype, tiny, tmp_path):
    whole = settings(tiny, tmp_path / "whole", device="cuda", dtype=dtype)
    train.train(whole)
    parts = dataclasses.replace(whole, out=str(tmp_path / "parts"), time_limit=1e-9)  # an update at a time
    steps = [train.train(parts)["steps"]]
    while steps[-1] < whole.steps:
        steps.append(train.train(dataclasses.replace(parts, resume=True))["steps"])
    assert steps == list(range(1, whole.steps + 1))
    assert same_bits(tmp_path / "whole", tmp_path / "parts")

"""Every shipped kernel, compiled for GPUs that are not here: nothing spills, wide loads, few enough instructions."""

import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")
SCRIPT = pathlib.Path(__file__).parent / "cross_compile.py"

# What an H100 can issue while it moves bytes at 90 % of 3.35 TB/s: 29.7e12 / 3.0e12 = 9.83 thread-instructions a byte
# (kernels/README.md). Bytes per pair of bf16 logits, or per element of a LayerNorm or of a cosine:
BYTES = {
    "distill_kl forward": 4, "distill_kl backward": 6, "linear_distill_kl": 6, "layer_norm forward without": 8,
    "layer_norm forward with": 8, "layer_norm backward without": 6, "layer_norm backward with": 8,
    "layer_norm forward pre-norm": 12, "layer_norm backward pre-norm": 16,
    "cosine forward": 4, "cosine backward": 6, "dropout": 4,
}  # fmt: skip


def test_large_vocabularies_run_the_same_code():
    """A launcher compiles for divisors of the arguments: BERT's, GPT-2's and XLM-R's words have the same ones of 16."""
    from kernels.distill_kl import row_width

    for V in (30522, 50257, 250002, 250037):
        assert V % 16 and row_width(V) % 16 == 0 and row_width(V) < 2**31


ALL, BF16 = 46, 26
KERNELS = {"sm_80": BF16, "sm_90": ALL, "sm_100": BF16, "gfx942": BF16}  # how many are compiled for an architecture


@pytest.fixture(scope="module")
def compilations():
    """{architecture: the finished process that compiled kernels for it}, as many at once as there are cores."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def compile_for(arch):
        words = [sys.executable, SCRIPT, arch, *(["--bf16"] if KERNELS[arch] == BF16 else [])]
        return subprocess.run(words, capture_output=True, text=True, env=environment)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(KERNELS, pool.map(compile_for, KERNELS), strict=True))


def test_the_page_says_what_is_compiled(compilations):
    """kernels/README.md, where it names cross_compile.py: instructions, and registers in its table."""
    if not triton.__version__.startswith("3.9."):
        pytest.skip("the page has the figures of Triton 3.9")
    kernels = [json.loads(line) for line in compilations["sm_90"].stdout.splitlines()]
    compiled = {str(k["instructions"]) for k in kernels if "bf16" in k["kernel"]}
    text = (pathlib.Path(__file__).parent.parent / "kernels" / "README.md").read_text(encoding="utf-8")
    named = [p for p in re.split(r"\n\n(?!\|)", text) if "tests/cross_compile.py sm_90" in p]
    figures = {figure for p in named for figure in re.findall(r"\d+\.\d+", p.replace("Triton 3.9", ""))}
    assert len(named) == 3 and len(figures) > 8 and figures <= compiled
    rows = {k["kernel"]: [str(k["instructions"]), str(k["registers"])] for k in kernels}
    ours = {"forward, padded": "forward, whole padded", "forward, rows 30,522 apart": "forward, whole contiguous rows"}
    for line in re.findall(r"^\| `\w*distill_kl`.*", text, re.MULTILINE):
        if line.count("|") < 6:
            continue  # the list of files
        name, _, *cells = (cell.strip() for cell in line.strip("| ").split("|"))
        name = name.replace("`", "").removesuffix(", both passes").removesuffix(" (with its masked tail)")
        for theirs, other in ours.items():
            name = name.replace(theirs, other)
        assert rows[f"{name.replace('rows 30,522 apart', 'contiguous rows')}, bf16"] == [cells[0], cells[2]], line


@pytest.mark.parametrize("arch", KERNELS)
def test_kernels_compile_well(arch, compilations):
    done = compilations[arch]
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == KERNELS[arch]
    for k in kernels:
        print(json.dumps(k))  # pytest -s shows the figures
        name = f"{k['kernel']} on {arch}"
        assert k["spilled"] == 0, name
        # row * stride passes 2^31, so it has 64 bits; part * width of a row does not, nor do LayerNorm's partial sums
        bounded = "parts of" in name or "layer_norm backward" in name
        of_32_bits, of_64_bits = k["products"]
        assert of_32_bits == bounded and of_64_bits > 0, name
        if "merge" in name:  # a few numbers per row
            continue
        wide = ("128", "256") if arch.startswith("sm_") else ("x4",)
        assert any(x.endswith(wide) for x in k["loads"]), (name, k["loads"])
        if "distill_kl forward" not in name and "cosine forward" not in name:  # these write statistics alone
            assert any(x.endswith(wide) for x in k["stores"]), (name, k["stores"])
        if arch.startswith("sm_") and k["where"] == "loops" and "distill_kl" in name:  # no narrow load in a main loop
            assert all(x.endswith(wide) for x in k["loads"]), (name, k["loads"])
            assert k["barriers"] == 0, name  # no thread waits for another one there
        if arch.startswith("sm_") and "linear_distill_kl" in name:  # the tail's loads are wide, too
            assert k["narrow_loads"] == 2, name  # the label and its logit
        if arch.startswith("sm_") and "layer_norm backward" in name:  # the next row comes while this one is worked on
            assert any(x.startswith("LDGSTS") for x in k["loads"]), (name, k["loads"])
        if arch.startswith("sm_") and "cosine" in name:
            # backward also loads the statistics of a row and the upstream gradient, four bytes each
            narrow = [x for x in k["loads"] if not x.endswith(wide)]
            assert not narrow or ("backward" in name and not any("16" in x or "8" in x for x in narrow)), (name, narrow)
            assert k["shared"] == 0, name  # one warp owns a row: no sum goes through shared memory
        if arch == "sm_90" and "bf16" in name:
            (moved,) = [b for prefix, b in BYTES.items() if name.startswith((f"{prefix},", f"{prefix} "))]
            assert k["instructions"] <= 9.83 * moved, (name, k["instructions"])

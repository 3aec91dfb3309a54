"""Executes the compiled kernels at real sizes, a JSON line a case: errors against fp64, and faults that must be found.

python tests/ptx_cases.py [ARCH ...]      sm_80 sm_90 sm_100
"""

import json
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ptx  # noqa: E402
import torch  # noqa: E402

from kernels import backend  # noqa: E402

backend.on_triton = lambda x: True  # before the kernels import it

from benches.gpu import Settings, smoke, variants  # noqa: E402
from benches.gpu.run import Run  # noqa: E402
from kernels import distill_kl, layer_norm, linear_distill_kl  # noqa: E402
from kernels.backend import tl, triton  # noqa: E402

CASES = [
    (smoke.loss, "bfloat16", 3, True), (smoke.loss, "bfloat16", 3, False), (smoke.loss, "float32", 2, False),
    (smoke.loss, "float16", 2, False), (smoke.linear, "bfloat16", 3), (smoke.linear, "float32", 2),
    (smoke.norm, "bfloat16", 40, 0.1), (smoke.norm, "bfloat16", 40, 0.0), (smoke.norm, "float32", 12, 0.1),
    (smoke.norm, "float16", 12, 0.0), (smoke.cosine, "bfloat16", 12), (smoke.cosine, "float32", 12),
]  # fmt: skip
BARRIER = r" +tl\.debug_barrier\(\).*\n"


@triton.jit
def too_far(x_ptr, V, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, at.to(tl.float32))


def cases():
    """Yields (name, errors) of each kernel; raises where one is wrong."""
    run = Run(Settings(out=".", work=".", cpu=True, stage="smoke"))
    run.V, run.C = 30522, 768
    for case, dtype, *arguments in CASES:
        found = []
        run.emit = lambda found=found, **row: found.append(row["errors"])
        smoke.check(run, "", case, dtype, *arguments)
        yield " ".join(map(str, (case.__name__, dtype, *arguments))), found[0]
    distill_kl._split = lambda N, V, device: (5, 3 * distill_kl.BLOCK_V)  # as of few rows on a GPU
    smoke.check(run, "", smoke.loss, "bfloat16", 2, False)
    yield "loss bfloat16 in 5 parts", found[-1]


def large_mean():
    """Yields the largest error of LayerNorm, fp32, where the mean is a thousand standard deviations."""
    x, r = (torch.randn(20, 768, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    norm = x + 1000, r, torch.ones(768), torch.zeros(768)
    want = layer_norm.dropout_add_layer_norm_ref(*(tensor.double() for tensor in norm), 1e-12)
    found = layer_norm.dropout_add_layer_norm(*norm, 1e-12)
    yield "large mean", (found - want).abs().max().item()


def faults():
    """Yields (name, what is found) of kernels that are wrong on purpose."""
    s, t = (torch.randn(1, 30528).bfloat16() for _ in "st")
    variants.SOURCES["no barrier"] = {"linear_distill_kl": [(BARRIER, "")]}
    with tempfile.TemporaryDirectory() as folder:
        module = variants.edited("no barrier", pathlib.Path(folder))
        for name, of in (("with its barrier", linear_distill_kl), ("without its barrier", module)):
            labels, losses = torch.tensor([5]), torch.zeros(1, 3)
            yield name, found_by(variants.launch_linear, of, s.clone(), t, labels, losses, 30522, 4096, 8)
    yield "beyond the end", found_by(lambda: too_far[(2,)](torch.zeros(100), 100, BLOCK=64))


def found_by(function, *arguments):
    try:
        return function(*arguments)
    except AssertionError as error:
        return str(error)


if __name__ == "__main__":
    for architecture in sys.argv[1:] or ("sm_90",):
        ptx.install(architecture)
        for source in (cases, large_mean, faults):
            for name, found in source():
                print(json.dumps({"case": name, "arch": architecture, "found": found}), flush=True)

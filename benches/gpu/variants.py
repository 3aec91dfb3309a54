"""The kernels' internals that a GPU day uses: constants that a sweep sets, and edited copies of the sources.

Only this file must follow when a constant or a loop of a kernel is renamed; tests/test_gpu_day.py fails then.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import sys
from unittest import mock

import torch

from kernels import distill_kl, dropout, layer_norm, linear_distill_kl

FOLDER = pathlib.Path(distill_kl.__file__).parent


def defaults():
    """Today's constants, by the names of the sweeps."""
    programs = layer_norm._programs(10**9, torch.device("cuda"))
    source = pathlib.Path(layer_norm.__file__).read_text()
    return {
        "loss": (distill_kl.BLOCK_V, distill_kl.WARPS),
        "linear": linear_distill_kl.launch(2),
        "chunk rows": linear_distill_kl.GPU_CHUNK_ROWS,
        "norm warps": layer_norm.split_width(768)[2],
        "norm programs": programs // torch.cuda.get_device_properties(0).multi_processor_count,
        "norm stages": int(re.search(r"num_stages=(\d)", source)[1]),
    }


def loss_block(block, warps):
    return mock.patch.multiple(distill_kl, BLOCK_V=block, WARPS=warps)


def chunk_rows(rows):
    return mock.patch.multiple(linear_distill_kl, GPU_CHUNK_ROWS=rows)


def norm_warps(module, warps, programs=None):
    """LayerNorm's warps of a row, and the backward pass's programs of a multiprocessor where they are given."""
    split, cores = module.split_width, torch.cuda.get_device_properties(0).multi_processor_count
    changed = {"split_width": lambda C: (*split(C)[:2], warps)}
    if programs:
        changed["_programs"] = lambda N, device: min(N, programs * cores)
    return mock.patch.multiple(module, **changed)


@contextlib.contextmanager
def plain_norm():
    """PyTorch's LayerNorm and dropout in place of our kernels."""
    with mock.patch.object(dropout, "on_triton", lambda x: False):
        with mock.patch.object(layer_norm, "on_triton", lambda x: False):
            yield


def launch_linear(module, s, t, labels, losses, V, block, warps):
    """The loss kernel of the projection alone: logits s (R, width) become their gradient."""
    module._loss_and_gradient_kernel[(len(s),)](
        s, t, labels, losses, s.shape[1], V, 2.0, 1.0, 0.2, 0.0, HAS_MSE=False, TAU=2, BLOCK_V=block, num_warps=warps
    )  # fmt: skip


LOOK = r"(tl\.load\([st]_ptr \+ v \+ cols)\)"  # a load in the loop over a row
# begins the second pass where the first one ended
BACKWARDS = r"( +)for v in (range\(0, full, BLOCK_V\)):\n", r"\1for w in \2:\n\1    v = full - BLOCK_V - w\n"
SOURCES = {  # variant: {module: [(regular expression, replacement), ...]}; the last module is used
    # asks the L2 cache to keep a row after the first pass over it, and to drop it after the second
    "evict": {
        "rows": [(LOOK, r'\1, eviction_policy="evict_last")')],
        "linear_distill_kl": [(LOOK, r'\1, eviction_policy="evict_first")')],
    },
    "reversed": {"linear_distill_kl": [BACKWARDS]},
    **{f"stages {n}": {"layer_norm": [(r"num_stages=\d", f"num_stages={n}")]} for n in (1, 2, 3)},
}


def edited(label, folder):
    """The last module of SOURCES[label], edited; Triton needs its source as a file, which is written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, edits in SOURCES[label].items():
        text = (FOLDER / f"{name}.py").read_text()
        for pattern, replacement in edits:
            text, times = re.subn(pattern, replacement, text)
            if not times:
                raise LookupError(f"kernels/{name}.py has no {pattern!r}: mend benches/gpu/variants.py")
        prefix = re.sub(r"\W", "_", label)
        for other in SOURCES[label]:
            text = text.replace(f"from kernels.{other} import", f"from {prefix}_{other} import")
        path = folder / f"{prefix}_{name}.py"
        partly = path.with_suffix(f".{os.getpid()}")  # other processes may write the same file
        partly.write_text(text)
        partly.replace(path)
        module = imported(path, prefix)
    return module


def imported(path, prefix):
    """The module at `path`, imported once. Its operators are registered under `minidistil_PREFIX`."""
    if path.stem in sys.modules:
        return sys.modules[path.stem]
    register = torch.library.custom_op

    def apart(name, *arguments, **options):
        return register(name.replace("::", f"_{prefix}::"), *arguments, **options)

    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(specification)
    try:
        with mock.patch.object(torch.library, "custom_op", apart):
            specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module

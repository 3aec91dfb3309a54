"""A pytest plugin, `-p pretended_gpu`: tests that need a GPU, on the device in name of pretended_gpu.cpp.

It must be imported before torch. What Python asks of a GPU's driver is answered here. Kernels are compiled for an H100,
and ptx.py executes them. Where PRETENDED_KERNELS is `off`, PyTorch does their work, as `bench.py step` has it; where it
is `idle`, they are launched and do nothing, since executing them would take hours: for counting what else happens.
"""

import ctypes
import importlib.util
import os
import pathlib
import subprocess
import sys
import time
import types

SOURCE = pathlib.Path(__file__).with_suffix(".cpp")
MIB = 1 << 20


def build(library):
    """Compiles the device for the installed PyTorch."""
    torch = pathlib.Path(importlib.util.find_spec("torch").origin).parent
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    link = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", *include, str(SOURCE), "-o", str(library), *link]
    subprocess.run(command, check=True, capture_output=True, text=True)


class Event:
    def __init__(self, enable_timing=False):
        pass

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.seconds - self.seconds)


def answer_for_the_driver(library, total_memory=1024 * MIB):
    """Replaces what `torch.cuda` asks of a driver, and torch.compile, which needs nvcc's and Triton's back ends."""
    import torch

    properties = types.SimpleNamespace(name="pretended GPU", multi_processor_count=4, total_memory=total_memory)
    answers = dict(
        is_available=lambda: True, is_initialized=lambda: True, is_bf16_supported=lambda including_emulation=True: True,
        device_count=lambda: 1, current_device=lambda: 0, set_device=lambda device: None, _lazy_init=lambda: None,
        get_device_properties=lambda device=None: properties, get_device_name=lambda device=None: properties.name,
        synchronize=lambda device=None: None, empty_cache=lambda: None, Event=Event,
        memory_allocated=lambda device=None: library.pretended_bytes(),
        max_memory_allocated=lambda device=None: library.pretended_peak(),
        reset_peak_memory_stats=lambda device=None: library.pretended_reset_peak(),
        _sleep=lambda cycles: None,
        set_sync_debug_mode=lambda mode: library.pretended_warn(mode != "default"),
        # random numbers are the CPU's
        manual_seed=lambda seed: None, manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    )  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, value)
    import torch.cuda.amp.common

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.compile = lambda model=None, **options: (lambda function: function) if model is None else model


def load(path):
    """Loads the device, and kernels that serve its tensors alone."""
    assert "torch" not in sys.modules, "the device must be there before torch asks for it"
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    library.pretended_bytes.restype = library.pretended_peak.restype = ctypes.c_int64
    library.pretended_limit.argtypes, library.pretended_warn.argtypes = [ctypes.c_int64], [ctypes.c_bool]
    answer_for_the_driver(library)
    how = os.environ.get("PRETENDED_KERNELS", "compiled")
    import ptx

    from kernels import cosine, distill_kl, dropout, layer_norm, linear_distill_kl

    for module in (cosine, distill_kl, dropout, layer_norm, linear_distill_kl):
        module.on_triton = lambda x: x.is_cuda and how != "off"
    ptx.install("sm_90")
    if how == "idle":
        ptx.JITFunction.run = lambda *arguments, **options: None
        library.pretended_garbage(0)
    return library


if "PRETENDED_GPU" in os.environ:  # the library's path
    device = load(os.environ["PRETENDED_GPU"])

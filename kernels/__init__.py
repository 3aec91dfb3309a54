"""Triton kernels of distillation, each beside its plain PyTorch reference and its CPU path. The lesson is README.md."""

import os
import types

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has wheels for Linux only; elsewhere the CPU paths serve
    triton = types.SimpleNamespace(jit=lambda function: function)
    tl = types.SimpleNamespace(constexpr=lambda value: value)

IGNORE = -100  # PyTorch's label of a row without cross-entropy
FLOOR = -16384.0  # of log2 of a probability over the row's largest: 2 to this power is 0, and KL stays finite


def on_triton(x):
    """True where a kernel serves tensor `x`: on a GPU, or interpreted, where TRITON_INTERPRET=1 asks for that.

    Triton reads the variable too, once, when it is imported: set it before.
    """
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"

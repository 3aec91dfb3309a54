"""Triton where it is installed, and whether it serves a tensor."""

import os
import types

try:
    import triton
    import triton.language as tl

    HERE = True
except ImportError:  # Triton has wheels for Linux only; elsewhere the CPU paths are used
    triton = types.SimpleNamespace(jit=lambda function: function)
    tl = types.SimpleNamespace(constexpr=lambda value: value)
    HERE = False


def on_triton(x):
    """Whether a Triton kernel handles tensor `x`: on a GPU, or in the interpreter with TRITON_INTERPRET=1.

    Triton reads this variable once, at import: set it before.
    """
    return HERE and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")

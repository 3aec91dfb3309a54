"""Triton kernels for distillation, with plain PyTorch references and CPU paths; README.md explains them."""

IGNORE = -100  # PyTorch's label of a row without cross-entropy
FLOOR = -16384.0  # minimum of log2(probability / the row's largest): 2 to this power is 0, and KL stays finite

"""How much arithmetic a run is, how much of the hardware it uses, and what it will cost."""

import torch

from minidistil.data import MASK_SHARE
from minidistil.model import flops_per_token

PUBLISHED_TOKENS = 12.6e9  # of the released DistilBERT: three passes over Wikipedia and books, by arithmetic

# TFLOP/s of dense bf16 or fp16 matrix products with fp32 sums, from the makers' data sheets (those with sparsity are
# twice that); the first name that is part of the device's name counts
PEAKS = [
    ("B200", 2250), ("H200", 989), ("H100 PCIe", 756), ("H100", 989), ("A100", 312), ("L40S", 362), ("L4", 121),
    ("A10", 125), ("T4", 65), ("V100", 125), ("MI300X", 1307),
]  # fmt: skip


def training_flops_per_token(objective, teacher, student, T):
    """FLOPs of one token of training: the student's forward and backward pass (three forwards), the teacher's forward.

    `teacher` and `student` are Configs, teacher None where there is none. Counts the rows that meet the vocabulary.
    """
    rows = 1.0 if objective.on_logits and objective.kd_rows == "all" else MASK_SHARE
    flops = 3 * flops_per_token(student, T, rows)
    if teacher is not None and objective.needs_teacher:
        flops += flops_per_token(teacher, T, rows if objective.on_logits else 0.0)
    return flops


def peak_tflops(device, dtype):
    """Dense peak of a device for matrix products in bf16 or fp16, TFLOP/s; None where we do not know it."""
    if device.type != "cuda" or dtype == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


def account(tokens, tokens_per_second, flops_per_token, peak, ranks, price_per_hour=None):
    """Returns what a run of so many tokens at this speed (of all ranks) amounts to.

    {"tflops_per_second" a rank, "utilisation" of `peak` TFLOP/s (None: unknown), "device_hours", "cost", and
    "published_device_hours", "published_cost" of the published recipe's tokens}; costs None without a price.
    """
    tflops = tokens_per_second * flops_per_token / 1e12 / ranks
    figures = {"tflops_per_second": round(tflops, 3), "utilisation": peak and round(tflops / peak, 4)}
    for name, n in (("", tokens), ("published_", PUBLISHED_TOKENS)):
        hours = n / max(tokens_per_second, 1e-9) * ranks / 3600
        figures[f"{name}device_hours"] = round(hours, 4)
        figures[f"{name}cost"] = None if price_per_hour is None else round(hours * price_per_hour, 2)
    return figures

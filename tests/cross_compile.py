"""Compiles every shipped kernel for GPUs that are not here, and reads off what they would execute.

    python tests/cross_compile.py [ARCH ...]      one JSON line a kernel and architecture: sm_80 sm_90 sm_100 gfx942
    python tests/cross_compile.py --bf16 [ARCH ...]      of the kernels for bf16 alone

kernels/machine_code.py says how they are counted.
"""

import itertools
import json
import os
import pathlib
import sys

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from kernels import cosine, distill_kl, dropout, layer_norm, linear_distill_kl  # noqa: E402
from kernels.machine_code import figures  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
LOGITS = {2: "*bf16", 4: "*fp32"}  # by bytes
BF16 = "--bf16"


def shipped():
    """Yields (name, kernel, types of its arguments, constants, num_warps, elements of a program or loop step)."""
    for itemsize, logits in LOGITS.items():
        half = {2: "bf16", 4: "fp32"}[itemsize]
        block, warps = distill_kl.BLOCK_V, distill_kl.WARPS
        common = dict(s_ptr=logits, t_ptr=logits, labels_ptr="*i64", V="i32:any", tau="fp32")
        row = dict(common, kl_ptr="*fp32", ce_ptr="*fp32", stats_ptr="*fp32", parts_ptr="*fp32", stride_s="i32")
        flags = dict(HAS_LABELS=True, TAU=2)
        # rows that begin at multiples of 16, and rows as PyTorch makes them
        layouts = dict(padded=("i32", False), contiguous=("i32:any", True))
        for (layout, (stride, peel)), split in itertools.product(layouts.items(), (False, True)):
            name = f"distill_kl forward, {'parts of' if split else 'whole'} {layout} rows, {half}"
            yield (name, distill_kl._forward_kernel, dict(row, stride_s=stride, stride_t=stride, width="i32"),
                   dict(flags, SPLIT=split, PEEL=peel, BLOCK_V=block), warps, block)  # fmt: skip
        for parts in (4, 128):  # a single row of 250,037 words has 123
            yield (f"distill_kl merge of {parts}, {half}", distill_kl._merge_kernel,
                   {k: v for k, v in dict(row, P="i32:any").items() if k != "t_ptr"},
                   dict(flags, BLOCK_P=parts), 1, 32)  # fmt: skip
        for layout, (stride, peel) in layouts.items():
            yield (f"distill_kl backward, {layout} rows, {half}", distill_kl._backward_kernel,
                   dict(common, g_kl_ptr="*fp32", g_ce_ptr="*fp32", stats_ptr="*fp32", ds_ptr=logits, stride_s=stride,
                        stride_t=stride, stride_ds=stride, stride_g_kl="i32:any", stride_g_ce="i32:any"),
                   dict(flags, PEEL=peel, BLOCK_V=block), warps, block)  # fmt: skip
        block, warps = linear_distill_kl.launch(itemsize)
        yield (f"linear_distill_kl, {half}", linear_distill_kl._loss_and_gradient_kernel,
               dict(common, losses_ptr="*fp32", stride="i32", kl_weight="fp32", ce_weight="fp32", mse_weight="fp32"),
               dict(HAS_MSE=False, TAU=2, BLOCK_V=block), warps, block)  # fmt: skip
        A, B, warps = layer_norm.split_width(768)
        drop = dict(key_ptr="*i64", site="i32:any", T="i32", C="i32", threshold="i32:any", scale="fp32")
        yield (f"dropout, {half}", dropout._kernel, dict(drop, x_ptr=logits, y_ptr=logits), dict(BLOCK=1024), 1, 1024)
        norm = dict(drop, w_ptr="*fp32", stats_ptr="*fp32")
        # of post-norm blocks, and of pre-norm ones, whose stream is fp32 and passes on a gradient
        streams = {"": (logits, {"g_ptr": None}, {}), "pre-norm ": ("*fp32", {}, {"g_ptr": "*fp32"})}
        for drops, (norms, (stream, no_g, g)) in itertools.product((False, True), streams.items()):
            name = f"{norms}{'with' if drops else 'without'} dropout, {half}"
            flags = dict(HAS_DROPOUT=drops, A=A, B=B)
            yield (f"layer_norm forward {name}", layer_norm._forward_kernel,
                   dict(norm, x_ptr=logits, r_ptr=stream, b_ptr="*fp32", y_ptr=logits, z_ptr=stream, eps="fp32"),
                   dict(flags, HAS_RESIDUAL=True, KEEP_Z=True), warps, A + B)  # fmt: skip
            for C in (768, 1024, 1280, 1600) if g and itemsize == 2 else (768,):  # the widths of GPT-2
                A_, B_, least = layer_norm.split_width(C)
                yield (f"layer_norm backward {name}, of {C}", layer_norm._backward_kernel,
                       dict(norm, dy_ptr=logits, z_ptr=stream, dz_ptr=stream, dx_ptr=logits, dwb_ptr="*fp32",
                            N="i32:any", **g),
                       dict(flags, HAS_G=bool(g), HAS_DX=drops or stream != logits, A=A_, B=B_, **no_g),
                       max(least, layer_norm._backward_warps(C, bool(g))), A_ + B_)  # fmt: skip
        rows = dict(a_ptr=logits, b_ptr=logits, stats_ptr="*fp32", stride_a="i32", stride_b="i32", C="i32")
        flags = dict(BLOCK_1=A, BLOCK_2=B)
        yield (f"cosine forward, {half}", cosine._forward_kernel, dict(rows, distance_ptr="*fp32"), flags, warps, A + B)
        yield (f"cosine backward, {half}", cosine._backward_kernel, dict(rows, g_ptr="*fp32", da_ptr=logits),
               flags, warps, A + B)  # fmt: skip


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != BF16]
    for architecture in words or ARCHITECTURES:
        for name, *what in shipped():
            if BF16 in sys.argv and "bf16" not in name:
                continue
            print(json.dumps({"kernel": name, "arch": architecture, **figures(*what, architecture)}), flush=True)

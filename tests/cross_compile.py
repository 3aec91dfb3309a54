"""Compiles every shipped kernel for GPUs that are not here, and reads off what they would execute.

    python tests/cross_compile.py [ARCH ...]      one JSON line a kernel and architecture: sm_80 sm_90 sm_100 gfx942

Needs neither driver nor toolkit: Triton's wheel brings ptxas, cuobjdump and nvdisasm. Instruction counts are static: of
the loops where a kernel has them, else of the whole kernel (which counts the masked tail, too).
"""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import cosine, distill_kl, dropout, layer_norm, linear_distill_kl  # noqa: E402

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
LOGITS = {2: "*bf16", 4: "*fp32"}  # by bytes


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


def compiled(kernel, types, constants, warps, architecture):
    """Compiles as the launcher would: pointers, and integers not marked `any`, are divisible by 16."""
    names = kernel.arg_names
    assert set(types) | set(constants) == set(names), (set(types) | set(constants)) ^ set(names)
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr").split(":")[0] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, type in types.items()
               if type[0] == "*" or type == "i32"},
    )  # fmt: skip
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture[3:]), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    return triton.compile(source, target=target, options={"num_warps": warps})


def tool(name, *arguments):
    done = subprocess.run([TOOLS / name, *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def spilled(ptx, folder):
    """Bytes that do not fit in registers, by whichever of the bundled assemblers knows this version of PTX."""
    (folder / "k.ptx").write_text(ptx)
    target = re.search(r"\.target\s+(sm_\w+)", ptx)[1]
    for name in ("ptxas", "ptxas-blackwell"):
        if (TOOLS / name).exists():
            code, text = tool(name, "-v", f"--gpu-name={target}", folder / "k.ptx", "-o", folder / "again.cubin")
            found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
            if code == 0 and found:
                return int(found[1]) + int(found[2])
    raise RuntimeError(f"no assembler for {target}: {text}")


def instructions(sass):
    """(opcodes inside loops, all opcodes); a loop ends with a branch to a label above it."""
    lines = [x for x in sass.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/", x) or re.match(r"\.L_x_\d+:", x)]
    labels = {x.split(":")[0]: i for i, x in enumerate(lines) if x.startswith(".L_x_")}
    opcode = re.compile(r"\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_.]*)")
    inside = set()
    for i, line in enumerate(lines):
        branch = re.search(r"BRA.*?`\((\.L_x_\d+)\)", line)
        if branch and labels.get(branch[1], i) < i - 20:  # shorter ones only wait for ever
            inside |= set(range(labels[branch[1]], i + 1))
    found = [(i, m[1]) for i, line in enumerate(lines) if (m := opcode.search(line))]
    return [op for i, op in found if i in inside], [op for _, op in found]


def products(ttir):
    """(32-bit, 64-bit) products of two numbers that are known at run time only, as row * stride is."""
    constants = set(re.findall(r"(%\w+) = arith\.constant", ttir))
    found = re.findall(r"arith\.muli (%\w+), (%\w+) : (?:tensor<[\dx]+x)?(i32|i64)", ttir)
    bits = [of for *factors, of in found if not constants & set(factors)]
    return bits.count("i32"), bits.count("i64")


def figures(kernel, types, constants, warps, elements, architecture):
    """What one program does per element: instructions, registers, spills; waits in loops; widths of global accesses."""
    k = compiled(kernel, types, constants, warps, architecture)
    of_type = products(k.asm["ttir"])
    if architecture.startswith("gfx"):
        text = k.asm["amdgcn"]
        number = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
        loads = sorted(set(re.findall(r"(?:global|buffer)_load_\w+", text)))
        stores = sorted(set(re.findall(r"(?:global|buffer)_store_\w+", text)))
        return dict(
            registers=number["vgpr_count"],
            spilled=number["vgpr_spill_count"],
            loads=loads,
            stores=stores,
            products=of_type,
        )
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "k.cubin").write_bytes(k.asm["cubin"])
        registers = int(re.search(r"REG:(\d+)", tool("cuobjdump", "-res-usage", folder / "k.cubin")[1])[1])
        bytes_spilled = spilled(k.asm["ptx"], folder)
        loop, whole = instructions(tool("nvdisasm", "-c", folder / "k.cubin")[1])
    ops, per_thread = loop or whole, elements / (32 * warps)
    return dict(
        registers=registers,
        spilled=bytes_spilled,
        products=of_type,
        shared=k.metadata.shared,
        where="loops" if loop else "whole kernel",
        instructions=round(len(ops) / per_thread, 1),
        mufu=round(sum(op.startswith("MUFU") for op in ops) / per_thread, 1),
        barriers=sum(op.startswith("BAR") for op in loop),
        loads=sorted({op for op in ops if op.startswith("LDG")}),
        narrow_loads=sum(op.startswith("LDG") and not op.endswith(("128", "256")) for op in whole),
        stores=sorted({op for op in whole if op.startswith("STG")}),
    )


if __name__ == "__main__":
    for architecture in sys.argv[1:] or ARCHITECTURES:
        for name, *what in shipped():
            print(json.dumps({"kernel": name, "arch": architecture, **figures(*what, architecture)}), flush=True)

"""Runs the rungs of lesson.py, or a reader's kernel: error against fp64, traps, and what an H100 would execute."""

import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import warnings

import torch

ARCHITECTURE = "sm_90"
SHIPPED, BACKWARD, BOTH = "6 right for every row", "7 backward", "8 both in one, projected"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = {  # of arguments, as machine_code.compiled takes them
    **dict.fromkeys(("s_ptr", "t_ptr", "ds_ptr"), "*bf16"), "labels_ptr": "*i64", "stride": "i32", "V": "i32:any",
    **dict.fromkeys(("kl_ptr", "ce_ptr", "g_kl_ptr", "g_ce_ptr", "stats_ptr"), "*fp32"), "g_kl": "fp32", "g_ce": "fp32",
}  # fmt: skip
BUDGET = "an H100 has time for 39 instructions a pair forward and 59 backward; the lesson's have 21.5 and 53"
WIDE = ("128", "256")  # bits of a load, at the end of its name


# ---- logits, and a kernel's answer


def padded(x):
    """Returns a copy of logits (N, V) whose rows begin at multiples of 128 bytes; NaN lies between them."""
    N, V = x.shape
    room = torch.full((N, -(-V // 64) * 64), float("nan"), dtype=x.dtype, device=DEVICE)
    room[:, :V] = x
    return room[:, :V]


def logits(N, V, dtype=torch.bfloat16):
    """Returns (s, t, labels): a student whose logits are near its teacher's, and a label in all rows but the first."""
    generator = torch.Generator().manual_seed(V)
    t = 3 * torch.randn(N, V, generator=generator)
    s = t + torch.randn(N, V, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    labels[0] = -100
    return padded(s.to(dtype)), padded(t.to(dtype)), labels.to(DEVICE)


def forward(kernel, s, t, labels, TAU, BLOCK, WARPS):
    """Returns (kl, ce), each (N,)."""
    kl, ce = torch.full((2, len(s)), float("nan"), device=DEVICE)
    kernel[(len(s),)](s, t, labels, kl, ce, s.stride(0), s.shape[1], TAU=TAU, BLOCK=BLOCK, num_warps=WARPS)
    return kl.double(), ce.double()


def backward(kernel, s, t, labels, g_kl, g_ce, TAU, BLOCK, WARPS):
    """Returns the gradient of s (N, V), from statistics that PyTorch makes."""
    x = s.double(), t.double()
    m_s, m_t = (z.amax(1) for z in x)
    rows = (x[0], m_s, TAU), (x[1], m_t, TAU), (x[0], m_s, 1)
    sums = [((z - m[:, None]) / tau).exp().sum(1).log2() for z, m, tau in rows]
    stats, ds = torch.stack([m_s, m_t, *sums], 1).float(), padded(torch.zeros_like(s))
    grid = len(s), -(-s.shape[1] // BLOCK)
    kernel[grid](
        s, t, labels, g_kl, g_ce, stats, ds, s.stride(0), s.shape[1], TAU=TAU, BLOCK=BLOCK, num_warps=WARPS
    )  # fmt: skip
    return ds


def right(found, truth, eager):
    """Whether an error is at most twice eager PyTorch's, and a little."""
    floor = 1e-6 + 1e-6 * truth.abs().max()
    return bool((found - truth).abs().max() <= 2 * (eager - truth).abs().max() + floor)


# ---- checks: each yields (what, where README.md treats it, whether it holds)


def nan_check():
    """Returns the name of the check for NaN, which an older interpreter cannot fail."""
    import triton

    older = DEVICE == "cpu" and triton.__version__.startswith("3.6.")
    return "NaN" + older * " (where a GPU may lose it, the interpreter of Triton 3.6 does not: take a newer one)"


def forward_checks(kernel, BLOCK, WARPS, definition):
    how = dict(BLOCK=BLOCK, WARPS=WARPS)

    def values(V, TAU, dtype):
        s, t, labels = logits(3, V, dtype)
        truth = definition(s.double(), t.double(), labels, TAU)
        eager = definition(s.float(), t.float(), labels, TAU)
        found = forward(kernel, s, t, labels, TAU, **how)
        return all(map(right, found, truth, eager))

    yield "values of 30,522 words", "1", values(30522, 2, torch.bfloat16)
    yield "temperatures", "1", all(values(2 * BLOCK, TAU, torch.bfloat16) for TAU in (1, 2, 5))
    yield "fp32 logits", "1", values(3 * BLOCK, 2, torch.float32)
    lengths = (1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77)
    yield "any length of a row", "2, the main loop has no mask", all(values(V, 2, torch.bfloat16) for V in lengths)

    s, t, labels = logits(5, BLOCK + 77)
    t[1, 3] = s[2, 5] = t[2, 5] = float("-inf")  # ruled out by the teacher; by both
    kl, ce = forward(kernel, s, t, labels, 2, **how)
    truth, _ = definition(s.double(), t.double(), labels, 2)
    yield "-inf", "1, what can go wrong", bool((kl - truth).abs().max() < 1e-4)
    t[1, 5] = 20
    s[1, 5] = s[2, :BLOCK] = float("-inf")  # ruled out by the student alone: infinite, 16,384 or so with the floor
    kl, _ = forward(kernel, s, t, labels, 2, **how)
    yield (
        "-inf of the student alone",
        "1, what can go wrong",
        bool(((kl[1:3] > 1e3) & (kl[1:3] < 1e5)).all() & (kl[3:] < 10).all()),
    )

    s, t, labels = logits(4, BLOCK + 77)
    s[1, 9] = t[2, BLOCK + 50] = float("nan")
    kl, _ = forward(kernel, s, t, labels, 2, **how)
    yield nan_check(), "1, what can go wrong", kl.isnan().tolist() == [False, True, True, False]

    s, t, labels = logits(4, BLOCK - 40)
    labels[1:3] = torch.tensor([BLOCK - 40, -5])
    s.as_strided((4, 24), (s.stride(0), 1), BLOCK - 40).fill_(1.0)  # what lies after a row
    kl, ce = forward(kernel, s, t, labels, 2, **how)
    yield "a label outside the vocabulary", "1, what can go wrong", ce.isnan().tolist() == [False, True, True, False]
    yield "no label", "1", ce[0].item() == 0


def backward_checks(kernel, BLOCK, WARPS, definition):
    how = dict(BLOCK=BLOCK, WARPS=WARPS)

    def values(V, TAU, dtype=torch.bfloat16):
        s, t, labels = logits(3, V, dtype)
        g_kl, g_ce = torch.rand(2, 3, device=DEVICE)
        found = backward(kernel, s, t, labels, g_kl, g_ce, TAU, **how).double()
        truth = autograd(definition, s.double(), t.double(), labels, g_kl, g_ce, TAU)
        eager = autograd(definition, s, t, labels, g_kl, g_ce, TAU).double()
        step = 2**-7 * truth.abs() if dtype is torch.bfloat16 else 0  # the interpreter truncates where a GPU rounds
        return bool(((found - truth).abs() <= 2 * (eager - truth).abs().max() + step + 1e-6).all())

    yield "gradient of 30,522 words", "1, the gradient", values(30522, 2)
    yield "temperatures", "1, the gradient", all(values(BLOCK, TAU) for TAU in (1, 2, 5))
    yield "fp32 logits", "1, the gradient", values(2 * BLOCK, 2, torch.float32)
    yield "any length of a row", "2", all(values(V, 2) for V in (1, 7, BLOCK - 1, BLOCK + 1, 2 * BLOCK + 77))
    s, t, labels = logits(3, BLOCK + 77)
    s[1, 3] = t[2, 5] = float("-inf")
    g = torch.ones(3, device=DEVICE)
    yield "-inf", "1, what can go wrong", bool(backward(kernel, s, t, labels, g, g, 2, **how).isfinite().all())


def autograd(definition, s, t, labels, g_kl, g_ce, TAU):
    """Returns the gradient of the definition, made in fp32 of half-precision logits."""
    s = s.detach().requires_grad_()
    wide = (x.float() if x.dtype is torch.bfloat16 else x for x in (s, t))
    kl, ce = definition(*wide, labels, TAU)
    return torch.autograd.grad((kl * g_kl).sum() + (ce * g_ce).sum(), s)[0]


def projection_checks(projected, definition):
    N, V, C = 7, 3001, 16
    h_s, h_t, W_s, W_t = (torch.randn(n, C, device=DEVICE) for n in (N, N, V, V))
    labels = torch.randint(V, (N,), device=DEVICE)
    labels[0] = -100
    kl, ce, dh, dW = projected(h_s, h_t, W_s, W_t, labels, 0.5, 2.0, TAU=2, rows=3)
    h, W = h_s.double().requires_grad_(), W_s.double().requires_grad_()
    truth = definition(h @ W.T, h_t.double() @ W_t.double().T, labels, 2)
    gradients = torch.autograd.grad(0.5 * truth[0].sum() + 2.0 * truth[1].sum(), (h, W))
    pairs = zip((kl, ce, dh, dW), (*truth, *gradients), strict=True)
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    yield "losses and gradients, 3 rows at a time", "3", max(errors) < 1e-5


# ---- what an H100 would execute


def of_file(path, rungs, BLOCK, WARPS):
    """Returns (kernel, BLOCK, WARPS) of a reader's file; the latter two default to the lesson's."""
    spec = importlib.util.spec_from_file_location("mine", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernels = {"forward": rungs[SHIPPED], "backward": rungs[BACKWARD]}
    name = next((name for name in kernels if hasattr(module, name)), None)
    if name is None:
        sys.exit(f"{path} has no function `forward` or `backward`: write one with the arguments of a rung")
    kernel, wanted = getattr(module, name), kernels[name].arg_names
    if not hasattr(kernel, "arg_names"):
        sys.exit(f"{path}: {name} is no Triton kernel: put @triton.jit above it")
    if kernel.arg_names != wanted:
        sys.exit(f"{path}: {name}({', '.join(kernel.arg_names)}) must have the arguments {', '.join(wanted)}")
    return kernel, getattr(module, "BLOCK", BLOCK), getattr(module, "WARPS", WARPS)


def compiled(kernel, BLOCK, WARPS):
    """Returns the figures of a kernel for an H100, at TAU 2, of bf16 logits in padded rows."""
    from kernels.machine_code import figures

    types = {name: TYPES[name] for name in kernel.arg_names if name in TYPES}
    return figures(kernel, types, dict(TAU=2, BLOCK=BLOCK), WARPS, BLOCK, ARCHITECTURE)


def in_compiler(*words):
    """Returns {rung: figures} from a process without the interpreter, or {FILE: figures} of `check FILE`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, sys.argv[0], "--compile", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"it does not compile: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def described(figures):
    """Returns the figures as a line."""
    loads = [int(name.rsplit(".", 1)[-1]) if name.endswith(WIDE) else 0 for name in figures["loads"]]
    if figures["where"] == "loops":
        where = f"in the loops, {figures['barriers']} barriers there"
        width = f"loads of {min(loads)} bits" if min(loads, default=0) else "narrow loads"
    else:
        where, width = "in all", f"loads of up to {max(loads, default=0)} bits"
    registers = f"{figures['registers']} registers, {figures['spilled']} bytes spilled"
    return f"{figures['instructions']} instructions a pair {where}, {width}, {registers}"


# ---- the command


def timed(kernel, BLOCK, WARPS):
    """Returns the time of a forward kernel on this GPU as text, beside that of a copy of as many bytes."""
    from triton.testing import do_bench

    s, t, labels = logits(4096, 30522)
    ms = do_bench(lambda: forward(kernel, s, t, labels, 2, BLOCK, WARPS), return_mode="median")
    copy = do_bench(lambda: s.copy_(t), return_mode="median")  # reads and writes what the kernel reads
    return f"{ms:.3f} ms, {copy / ms:.0%} of the speed of a copy"


def show(kernel, BLOCK, WARPS, figures, checks):
    """Prints what a kernel is worth; returns whether it passes."""
    failed = False
    in_32_bits, _ = figures["products"]
    stride = "row * stride in 32 bits, which end at 70,345 rows", "1, what can go wrong", False
    for what, where, holds in itertools.chain(checks, [stride] if in_32_bits else []):
        print(f"    right  {what}" if holds else f"    WRONG  {what}: see README.md, section {where}", flush=True)
        failed |= not holds
    print(f"    {described(figures)}")
    if DEVICE == "cuda" and "kl_ptr" in kernel.arg_names and "g_kl" not in kernel.arg_names:
        print(f"    {timed(kernel, BLOCK, WARPS)}")
    return not failed


def main(words, rungs, definition, projected, launch):
    """Returns the exit status of `python kernels/lesson.py words...`.

    rungs {name: kernel}; definition(s, t, labels, TAU) and projected as in lesson.py; launch: BLOCK and WARPS.
    """
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # of the interpreter, where a check has -inf and NaN
    if words[:1] == ["--compile"]:
        mine = {words[2]: of_file(words[2], rungs, *launch)} if words[1:2] == ["check"] else {}
        found = mine or {rung: (rungs[rung], *launch) for rung in words[1:] or rungs}
        print(json.dumps({rung: compiled(*each) for rung, each in found.items()}))
        return 0

    def checks(kernel, *launch):
        of = backward_checks if "ds_ptr" in kernel.arg_names else forward_checks
        return projection_checks(projected, definition) if kernel is rungs[BOTH] else of(kernel, *launch, definition)

    if words[:1] == ["check"]:
        if len(words) != 2 or not pathlib.Path(words[1]).is_file():
            sys.exit("name the file of your kernel: python kernels/lesson.py check mine.py")
        mine = of_file(words[1], rungs, *launch)
        print(f"{words[1]}: {mine[0].__name__}, BLOCK {mine[1]:,}, WARPS {mine[2]}")
        passed = show(*mine, *in_compiler("check", words[1]).values(), checks(*mine))
        print(f"    {'passed' if passed else 'not passed'}; {BUDGET}")
        return 0 if passed else 1
    if unknown := [word for word in words if word not in "12345678"]:
        sys.exit(f"{unknown[0]} is not a rung: choose from 1 to 8, or check FILE")
    print("0 the definition: eager PyTorch, 160 bytes a pair of bf16 logits where 10 would do")
    wanted = {rung: kernel for rung, kernel in rungs.items() if not words or rung[0] in words}
    figures = in_compiler(*wanted)
    for rung, kernel in wanted.items():
        print(rung, flush=True)
        show(kernel, *launch, figures[rung], checks(kernel, *launch))
    return 0

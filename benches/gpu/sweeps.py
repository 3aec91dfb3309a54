"""The shipped kernels with other constants, and the alternatives to attention and the cosine kernel."""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benches.gpu import variants
from benches.gpu.day import SWEEPS
from benches.gpu.timing import sweep
from benches.measure import extra_memory_mib
from kernels.cosine import cosine_distance, cosine_distance_ref
from kernels.distill_kl import distill_kl, padded
from kernels.linear_distill_kl import linear_distill_kl
from minidistil import model

partial = functools.partial


def sweeps(run):
    sizes = {"loss": (4915, 32768), "linear": (4096,), "chunks": (32768, 4915), "norm": (32768,), "attention": (64,),
             "cosine": (122880,)}  # fmt: skip
    for name in SWEEPS:
        chosen = sizes[name][: 1 if run.warm and name == "loss" else None]  # its compiled kernels do not depend on N
        for size in chosen if run.part in ("", name) else ():
            run.attempt(f"{name} {size}", globals()[name], run, 4 if run.tiny else size)
            torch.cuda.empty_cache()


def under(context, function):
    """`function`, called with a context entered."""

    def call():
        with context():
            return function()

    return call


def loss(run, N):
    s, t = (padded(N, run.V, torch.bfloat16, run.device).copy_(run.randn(N, run.V, scale=3)) for _ in "st")
    y, s = run.labels(N), s.requires_grad_()
    kl, ce = distill_kl(s, t, y, 2.0)
    ways = {"forward": torch.no_grad()(lambda: distill_kl(s, t, y, 2.0)),
            "backward": partial(torch.autograd.grad, kl + ce, s, retain_graph=True)}  # fmt: skip
    blocks = [(1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 16)]
    for way, function in ways.items():
        functions = {str(block): under(partial(variants.loss_block, *block), function) for block in blocks}
        default = str(variants.defaults()["loss"])
        sweep(run, f"loss {way}, {N} rows", functions, default, what="BLOCK_V, WARPS of kernels/distill_kl.py")


def linear(run, rows):
    width = -(-run.V // 64) * 64
    first, t = (run.randn(rows, width, dtype=torch.bfloat16, scale=3) for _ in "st")
    s, y, losses = first.clone(), run.labels(rows), torch.zeros(rows, 3, device=run.device)
    modules = {"": variants.linear_distill_kl}
    modules |= {label: variants.edited(label, run.work / "variants") for label in ("evict", "reversed")}
    functions = {
        f"{block} {label}".strip(): partial(variants.launch_linear, module, s, t, y, losses, run.V, *block)
        for label, module in modules.items()
        for block in ((4096, 8), (4096, 16), (8192, 16), (8192, 32))
    }
    sweep(run, f"kernel of linear, {rows} rows", functions, str(variants.defaults()["linear"]),
          before=lambda: s.copy_(first), what="launch() of kernels/linear_distill_kl.py")  # fmt: skip


def chunks(run, N):
    V, C = run.V, run.C
    student, teacher = ([run.randn(N, C), run.randn(V, C, scale=3 / C**0.5), run.randn(V)] for _ in "st")
    leaves, y = [x.requires_grad_() for x in student], run.labels(N)

    def both():
        with torch.autocast(run.device.type, torch.bfloat16):
            value = linear_distill_kl(*leaves, *teacher, y, 2.0, 5 / N, 2 / N)[0]
        torch.autograd.grad(value, leaves)

    functions = {str(n): under(partial(variants.chunk_rows, n), both) for n in (2048, 2816, 4096, 5632, 8192)}
    peak = {} if run.warm else {name: round(extra_memory_mib(f, run.device), 1) for name, f in functions.items()}
    sweep(run, f"linear, {N} rows, by rows of a chunk", functions, str(variants.defaults()["chunk rows"]), rounds=9,
          peak_mib=peak, what="GPU_CHUNK_ROWS of kernels/linear_distill_kl.py")  # fmt: skip


def norm(run, N):
    x, r, dy = (run.randn(N, run.C, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    w, b = run.randn(run.C).requires_grad_(), run.randn(run.C).requires_grad_()
    today = variants.defaults()
    warps, programs, stages = (today[f"norm {name}"] for name in ("warps", "programs", "stages"))

    def forward(module):
        with torch.autocast(run.device.type, torch.bfloat16):
            return module.dropout_add_layer_norm(x, r, w, b, 1e-12, 0.1)

    shipped = variants.layer_norm
    alone = partial(forward, shipped)
    functions = {f"warps {k}": under(partial(variants.norm_warps, shipped, k), alone) for k in (1, 2, 4)}
    sweep(run, "layernorm forward, p = 0.1", functions, f"warps {warps}", what="split_width() of kernels/layer_norm.py")
    functions = {}
    for n_stages in (1, 2, 3):
        module = shipped if n_stages == stages else variants.edited(f"stages {n_stages}", run.work / "variants")
        y = forward(module)
        gradient = partial(torch.autograd.grad, y, [x, r, w, b], dy.detach().to(y.dtype), retain_graph=True)
        for k, n in ((k, n) for k in (1, 2) for n in (4, 8, 16)):
            name = f"warps {k}, programs {n}, stages {n_stages}"
            functions[name] = under(partial(variants.norm_warps, module, k, n), gradient)
    sweep(run, "layernorm backward, p = 0.1", functions, f"warps {warps}, programs {programs}, stages {stages}",
          what="split_width(), _programs() and num_stages of kernels/layer_norm.py")  # fmt: skip


def attention(run, B):
    T, H, D = (512, 12, 64) if not run.tiny else (32, 2, 16)
    qkv = run.randn(B, T, 3, H, D, dtype=torch.bfloat16).requires_grad_()
    dy = run.randn(B, H, T, D, dtype=torch.bfloat16)
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    backends |= {} if run.null else {"cuDNN": SDPBackend.CUDNN_ATTENTION}

    def call(backend, p, backward):
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p) if backend else model.attention(q, k, v, None, p)
        return torch.autograd.grad(y, qkv, dy) if backward else None

    ways = {"ours": None, **backends}
    more = dict(what="attention() of minidistil/model.py", information=["cuDNN"])  # which is never the best choice
    for p in (0.0, 0.1, 0.125):
        functions = {name: partial(call, backend, p, True) for name, backend in ways.items()}
        sweep(run, f"attention, both ways, p = {p}, {B} x {T}", functions, "ours", **more)
    functions = {name: torch.no_grad()(partial(call, backend, 0.0, False)) for name, backend in ways.items()}
    sweep(run, f"attention of the teacher, {B} x {T}", functions, "ours", **more)


def cosine(run, N):
    a, b = run.randn(N, run.C, dtype=torch.bfloat16).requires_grad_(), run.randn(N, run.C, dtype=torch.bfloat16)
    eager = lambda a, b: cosine_distance_ref(a.float(), b.float())  # noqa: E731
    providers = {"ours": cosine_distance, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    functions = {name: (lambda f=f: torch.autograd.grad(f(a, b), a)) for name, f in providers.items()}
    sweep(run, f"cosine, {N} rows", functions, "ours", rounds=9, what="whether kernels/cosine.py is worth its lines")

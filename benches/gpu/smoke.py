"""Each kernel at real shapes against its definition in fp64.

PyTorch fills memory that is not initialised with NaN. A kernel is right if its error is at most twice PyTorch's in the
same dtype, plus a floor; by norm and by the largest element, since a norm may hide one wrong element.
"""

import functools

import torch
import torch.nn.functional as F

from kernels.cosine import cosine_distance, cosine_distance_ref
from kernels.cpu import BITS
from kernels.distill_kl import distill_kl, distill_kl_ref, padded
from kernels.dropout import Key
from kernels.layer_norm import dropout_add_layer_norm
from kernels.linear_distill_kl import linear_distill_kl, linear_distill_kl_ref

DTYPES = ("float32", "bfloat16", "float16")
FLOORS = {"float32": (1e-5, 1e-5), "bfloat16": (1e-3, 2**-7), "float16": (1e-3, 2**-9)}  # of numbers, of tensors
TAU = 2.0


def smoke(run):
    torch.use_deterministic_algorithms(True, warn_only=True)
    N, rows = (6, 6) if run.tiny else (4915, 32768)
    cases = [(loss, dtype, N, wide) for dtype in DTYPES for wide in (True, False)]
    cases += [(loss, "bfloat16", 3, True)]  # 3 rows are cut into parts
    cases += [(linear, dtype, N) for dtype in DTYPES]
    cases += [(norm, dtype, rows, p) for dtype in DTYPES for p in (0.0, 0.1)]
    cases += [(cosine, dtype, rows) for dtype in DTYPES]
    for case, dtype, *arguments in cases:
        if run.part in ("", case.__name__):
            unit = " ".join(map(str, (case.__name__, dtype, *arguments)))
            run.attempt(unit, check, run, unit, case, dtype, *arguments)
            if run.device.type == "cuda":
                torch.cuda.empty_cache()


def check(run, unit, case, dtype, *arguments):
    """Emits errors {name: [ours, PyTorch's, ...]}, by norm and largest element; raises where ours is wrong."""
    ours, truth, others = case(run, dtype, *arguments)
    if run.sabotage:
        name = list(ours)[-1]
        ours[name].view(-1)[7 % ours[name].numel()] += 1
    wrong, errors = [], {}
    for name in ours:
        got, want, other = (x[name].double() for x in (ours, truth, others))
        floor = FLOORS[dtype][got.ndim > 0]
        for kind, size in (("norm", lambda x: x.norm()), ("largest", lambda x: x.abs().max())):
            scale = size(want).clamp_min(1e-300)
            error, of_torch = ((size(x - want) / scale).item() for x in (got, other))
            allowed = (2 * of_torch if of_torch == of_torch else 0) + floor
            errors[name] = errors.get(name, []) + [float(f"{x:.1e}") for x in (error, of_torch)]
            if not error <= allowed and not run.null:  # NaN is wrong
                bad = ~((got - want).abs() <= allowed * want.abs().max())
                first = [(i, got[tuple(i)].item(), want[tuple(i)].item()) for i in bad.nonzero()[:10].tolist()]
                wrong.append(f"{name}, {kind}: error {error:.2e}, allowed {allowed:.2e}; {int(bad.sum())} of "
                             f"{bad.numel()} elements; (index, ours, truth): {first}")  # fmt: skip
    run.emit(unit=unit, errors=errors, ok=not wrong)
    if wrong:
        raise AssertionError("\n".join(wrong))


def differentiated(names, function, rows, shared=(), size=None):
    """{name: values of a sum over rows, then its gradients in rows[0] and in all of `shared`}, `size` rows at a time.

    function(*rows, *shared) returns (what is differentiated, values).
    """
    shared, values, of_rows, of_shared = [x.detach().requires_grad_() for x in shared], None, [], None
    for leaf, *rest in zip(*(x.split(size or len(x)) for x in rows), strict=True):
        leaf = leaf.detach().requires_grad_()
        objective, found = function(leaf, *rest, *shared)
        gradient, *more = torch.autograd.grad(objective, [leaf, *shared])
        found = [x.detach().double() for x in found]
        values = found if values is None else [a + b for a, b in zip(values, found, strict=True)]
        of_shared = more if of_shared is None else [a + b for a, b in zip(of_shared, more, strict=True)]
        of_rows.append(gradient)
    return dict(zip(names, [*values, torch.cat(of_rows), *of_shared], strict=True))


def loss(run, dtype, N, wide):
    half = getattr(torch, dtype)
    s, t = (run.randn(N, run.V, dtype=half, scale=3) for _ in "st")
    if wide:
        s, t = (padded(*x.shape, half, run.device).copy_(x) for x in (s, t))
    y = run.labels(N, 0.7)

    def both(function, s, t, y):
        kl, ce = (x.sum() for x in function(s, t, y, TAU))
        return 0.5 * kl + 0.2 * ce, (kl, ce)

    names, by = ("kl", "ce", "dh"), functools.partial(functools.partial, both)
    ours = differentiated(names, by(distill_kl), (s, t, y))
    truth = differentiated(names, by(distill_kl_ref), (s.double(), t.double(), y), size=512)
    return ours, truth, differentiated(names, by(distill_kl_ref), (s, t, y), size=512)


def linear(run, dtype, N):
    V, C, half = run.V, run.C, getattr(torch, dtype)
    student, teacher = ([run.randn(N, C), run.randn(V, C, scale=3 / C**0.5), run.randn(V)] for _ in "st")
    y = run.labels(N, 0.7)

    def of(function, students, teachers, size=None, autocast=True):
        def call(h_s, h_t, y, W_s, b_s):
            with torch.autocast(run.device.type, half, enabled=autocast and dtype != "float32"):
                value, kl, ce, _ = function(h_s, W_s, b_s, h_t, *teachers[1:], y, TAU, 5 / N, 2 / N)
            return value, (kl, ce)

        rows = students[0], teachers[0], y
        return differentiated(("kl", "ce", "dh", "dW", "db"), call, rows, students[1:], size)

    wide = [[x.double() for x in model] for model in (student, teacher)]
    ours, truth = of(linear_distill_kl, student, teacher), of(linear_distill_kl_ref, *wide, 512, autocast=False)
    return ours, truth, of(linear_distill_kl_ref, student, teacher, 512)


def norm(run, dtype, N, p):
    C, half = run.C, getattr(torch, dtype)
    x, r, dy = (run.randn(N, C, dtype=half) for _ in range(3))
    w, b = run.randn(C), run.randn(C)

    def of(function, x, dy, r, w, b):
        def call(x, dy, r, w, b):
            y = function(x, r, w, b)
            return (y * dy.to(y.dtype)).sum(), (y,)

        return differentiated(("y", "dx", "dr", "dw", "db"), call, (x, dy), (r, w, b))

    key = Key.of(1, 0, run.device)
    ours = of(lambda *inputs: dropout_add_layer_norm(*inputs, 1e-12, p, key=key), x, dy, r, w, b)
    # both passes must drop the same elements: those that the forward pass drops of a row of ones
    ones, q = torch.ones_like(x), round(p * 2**BITS) / 2**BITS
    keep = dropout_add_layer_norm(ones, torch.zeros_like(ones), w, b, 1e-12, p, key=key, with_sum=True)[1] != 0
    share, deviation = 1 - keep.float().mean().item(), (q * (1 - q) / keep.numel()) ** 0.5
    if p and not run.null and abs(share - q) > 6 * deviation:
        raise AssertionError(f"dropout {p} dropped {share:.5f}")

    def plain(x, r, w, b):
        z = x * (keep.to(x.dtype) / (1 - q)) + r
        return F.layer_norm(z, w.shape, w.to(z.dtype), b.to(z.dtype), 1e-12)

    return ours, of(plain, *(x.double() for x in (x, dy, r, w, b))), of(plain, x, dy, r, w, b)


def cosine(run, dtype, N):
    a, b = (run.randn(N, run.C, dtype=getattr(torch, dtype)) for _ in "ab")

    def of(function, *rows):
        def call(a, b):
            distance = function(a, b)
            return distance, (distance,)

        return differentiated(("distance", "da"), call, rows)

    truth = of(cosine_distance_ref, a.double(), b.double())
    return of(cosine_distance, a, b), truth, of(lambda a, b: cosine_distance_ref(a.float(), b.float()), a, b)

"""The distillation loss on logits: kernels (interpreted without a GPU) and CPU path against the definition in fp64."""

import math
import os
import types

import pytest
import torch

from kernels import distill_kl as module
from kernels.distill_kl import IGNORE, distill_kl, distill_kl_ref, padded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []


@pytest.fixture(params=["kernel", "cpu"], autouse=True)
def path(request, monkeypatch):
    """Every test runs twice: through Triton, and through the closed form in PyTorch."""
    if request.param == "kernel":
        pytest.importorskip("triton")
        if DEVICE == "cpu":
            monkeypatch.setenv("TRITON_INTERPRET", "1")
            # the interpreter's time goes by blocks: few large ones, yet V = 30,522 still has a main loop and a tail
            monkeypatch.setattr(module, "BLOCK_V", 16384)
    elif DEVICE == "cuda":
        pytest.skip("the closed form is for the CPU")
    return request.param


def problem(N, V, dtype=torch.float32, scale=1.0, seed=0, pad=True):
    """Random logits (N, V) in padded rows, labels with a third ignored, random upstream gradients and row weights."""
    g = torch.Generator().manual_seed(seed)
    s, t = ((torch.randn(N, V, generator=g) * scale).to(dtype) for _ in range(2))
    if pad:
        s, t = (padded(N, V, dtype, "cpu").copy_(x) for x in (s, t))
    labels = torch.randint(0, V, (N,), generator=g)
    labels[torch.rand(N, generator=g) < 0.3] = IGNORE
    weights = torch.rand(2, N, generator=g)
    return [x.to(DEVICE) for x in (s, t, labels, weights[0], weights[1])], torch.rand(2, generator=g).tolist()


def rows_apart(x, stride, offset=0):
    """x (N, V) with rows `stride` apart, from the `offset`th number of a buffer that is NaN elsewhere."""
    N, V = x.shape
    buffer = torch.full((offset + N * stride,), math.nan, dtype=x.dtype, device=x.device)
    return buffer.as_strided((N, V), (stride, 1), offset).copy_(x)


def values_and_gradient(function, s, t, labels, tau, w_kl, w_ce, upstream):
    s = s.detach().requires_grad_()
    kl, ce = function(s, t, labels, tau, w_kl, w_ce)
    (gradient,) = torch.autograd.grad(upstream[0] * kl + upstream[1] * ce, s)
    return [x.detach().double().cpu() for x in (kl, ce, gradient)]


def by_definition(s, t, labels, tau, w_kl, w_ce):
    kl, ce = distill_kl_ref(s, t, labels, tau)
    return (kl * w_kl.to(kl.dtype)).sum(), (ce * w_ce.to(ce.dtype)).sum()


def check_against_fp64(inputs, upstream, tau, floor):
    """Each of (kl, ce, gradient): at most twice the error of PyTorch in the same dtype, plus `floor` of the largest."""
    s, t, labels, w_kl, w_ce = inputs
    wide = [s.double(), t.double(), labels, w_kl.double(), w_ce.double()]
    truth = values_and_gradient(by_definition, *wide[:3], tau, *wide[3:], upstream)
    ours = values_and_gradient(distill_kl, s, t, labels, tau, w_kl, w_ce, upstream)
    torchs = values_and_gradient(by_definition, s, t, labels, tau, w_kl, w_ce, upstream)
    for name, want, got, other in zip(("kl", "ce", "gradient"), truth, ours, torchs, strict=True):
        if want.numel():
            error, allowed = (got - want).abs().max(), 2 * (other - want).abs().max()
            assert got.isfinite().all()
            # a small KL is what is left of terms of about tau^2, as fp32 rounds them
            allowed += floor * want.abs().max() + (tau**2 * 2**-24 if name == "kl" else 1e-30)
            assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


# fp32: rounding of exponents; half: the gradient is stored in 8 (bf16) or 11 (fp16) bits, and the interpreter truncates
FLOOR = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


# V around the block of 1,024 and the real one; every N with a small V, few rows with the real one (30 ms each)
@pytest.mark.parametrize("N, V", [(0, 7), (1, 1), (3, 7), (64, 7), (37, 1000), (3, 1024), (1, 1025), (3, 30522)])
@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("tau", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_error_is_that_of_pytorch(N, V, dtype, tau, scale):
    check_against_fp64(*problem(N, V, dtype, scale), tau, FLOOR[dtype])


@pytest.mark.parametrize("dtype", FLOOR)
def test_rows_of_the_real_vocabulary(dtype):
    check_against_fp64(*problem(64, 30522, dtype, 3.0), 2.0, FLOOR[dtype])


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("V", [50257, 250037])
@pytest.mark.parametrize("pad", [True, False])
def test_rows_of_larger_vocabularies(V, dtype, pad):
    """GPT-2's words, and a few more than XLM-R's: both odd, so that without padding each row begins elsewhere."""
    check_against_fp64(*problem(3, V, dtype, 3.0, pad=pad), 2.0, FLOOR[dtype])


def test_a_row_of_123_parts(path, monkeypatch):
    """What a GPU makes of a single row of 250,037 words, in blocks of the size that is shipped."""
    if path == "cpu":
        pytest.skip("only the kernel splits rows")
    monkeypatch.setattr(module, "BLOCK_V", 2048)
    monkeypatch.setattr(module, "_split", lambda N, V, device: (123, 2048))
    inputs, upstream = problem(1, 250037, scale=3.0)
    check_against_fp64(inputs, upstream, 2.0, FLOOR[torch.float32])


@pytest.mark.parametrize("block", [64, 1024])
def test_many_blocks_in_a_row(block, monkeypatch):
    """The running maxima move from block to block: logits that rise, fall and jump."""
    monkeypatch.setattr(module, "BLOCK_V", block)
    inputs, upstream = problem(3, 5000)
    ramp = torch.linspace(-40, 40, 5000, device=DEVICE)
    inputs[0] += torch.stack([ramp, -ramp, ramp.sin() * 60])
    inputs[1] += torch.stack([-ramp, ramp, ramp.cos() * 60])
    check_against_fp64(inputs, upstream, 2.0, FLOOR[torch.float32])


@pytest.mark.parametrize("parts", [2, 3, 6])  # of 6 blocks, the last one ragged or full
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("V, stride", [(3000, 3008), (3000, 3003), (3072, 3073)])
def test_rows_split_over_programs(parts, tau, V, stride, path, monkeypatch):
    if path == "cpu":
        pytest.skip("only the kernel splits rows")
    monkeypatch.setattr(module, "BLOCK_V", 512)
    monkeypatch.setattr(module, "_split", lambda N, V, device: (parts, -(-V // (parts * 512)) * 512))
    (s, t, *rest), upstream = problem(3, V, scale=20.0)
    s[:, -1], t[:, -1] = s.max() + 1, t.max() + 2  # a last column that is missed shows
    check_against_fp64([rows_apart(s, stride), rows_apart(t, stride), *rest], upstream, tau, FLOOR[torch.float32])


def test_the_split_fills_a_gpu_and_covers_every_column_once(monkeypatch):
    """On 132 multiprocessors: few rows are cut until four programs sit on each, many rows not at all."""
    monkeypatch.setattr(module, "BLOCK_V", 2048)
    gpu = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    for N in (1, 3, 64, 528, 5000):
        for V in (1, 4096, 30522, 250000):
            parts, width = module._split(N, V, torch.device("cuda"))
            assert (parts - 1) * width < V <= parts * width and width % 2048 == 0
    assert module._split(528, 30522, torch.device("cuda")) == (1, 30720)
    assert module._split(64, 30522, torch.device("cuda")) == (8, 4096)
    assert module._split(1, 30522, torch.device("cuda")) == (15, 2048)
    assert module._split(1, 30522, torch.device("cpu")) == (1, 30720)


LAYOUTS = ["contiguous", "padded", "every second row", "transposed", "all but a row", "all but a column"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    (s, t, *rest), upstream = problem(7, 1003, pad=layout == "padded")
    if layout == "all but a row":
        s, t, *rest = (x[1:] for x in (s, t, *rest))
    if layout == "all but a column":
        s, t, rest[0] = s[:, 1:], t[:, 1:], torch.where(rest[0] > 0, rest[0] - 1, IGNORE)
    if layout == "every second row":
        s, t = (torch.stack([x, torch.full_like(x, float("nan"))], 1).flatten(0, 1)[::2] for x in (s, t))
    if layout == "transposed":
        s, t = (x.t().contiguous().t() for x in (s, t))
        rest[0] = torch.stack([rest[0], torch.zeros_like(rest[0])], 1)[:, 0]
    check_against_fp64([s, t, *rest], upstream, 2.0, FLOOR[torch.float32])


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("V", [5, 64, 200])
def test_rows_off_16_byte_boundaries(V, dtype, path, monkeypatch):
    """Every distance of a row from the boundary below it, in rows shorter than a block and longer."""
    monkeypatch.setattr(module, "BLOCK_V", 64)
    for stride in range(V, V + 17):
        (s, t, *rest), upstream = problem(3, V, dtype, 3.0, seed=stride)
        s, t = (rows_apart(x, stride) for x in (s, t))
        assert module._peel(s, t) == (stride % 16 != 0)
        check_against_fp64([s, t, *rest], upstream, 2.0, FLOOR[dtype])


# (stride, offset) of each, in elements
@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("of_s, of_t, peel", [
    ((203, 0), (211, 0), True), ((208, 0), (216, 0), True), ((203, 16), (203, 0), True),
    ((203, 0), (204, 0), False), ((203, 0), (208, 0), False), ((203, 1), (203, 1), False), ((208, 0), (224, 0), False),
])  # fmt: skip
def test_rows_of_student_and_teacher_laid_out_apart(of_s, of_t, peel, dtype, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_V", 64)
    (s, t, *rest), upstream = problem(5, 200, dtype, 3.0)
    s, t = rows_apart(s, *of_s), rows_apart(t, *of_t)
    assert module._peel(s, t) == peel
    check_against_fp64([s, t, *rest], upstream, 2.0, FLOOR[dtype])


def test_logits_of_two_dtypes():
    (s, t, *rest), upstream = problem(5, 1003, pad=False)
    t = t.bfloat16()
    assert not module._peel(s, t)
    check_against_fp64([s, t, *rest], upstream, 2.0, 2**-7)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("stride", [200, 203, 208])
def test_no_load_before_the_first_logit_or_after_the_last(stride, parts, path, monkeypatch):
    """The teacher's 3 rows lie between two guards: each load of an interpreted kernel is looked at."""
    if path == "cpu" or DEVICE == "cuda" or "MINIDISTIL_PTX" in os.environ:
        pytest.skip("only the interpreter tells what it loads")
    from triton.runtime import interpreter

    memory, loads = interpreter._interpreter, []

    def load(pointers, mask, *rest):
        loads.extend(pointers[mask].tolist())
        return memory.load(pointers, mask, *rest)

    monkeypatch.setattr(interpreter, "_interpreter", types.SimpleNamespace(load=load, store=memory.store))
    monkeypatch.setattr(module, "BLOCK_V", 64)
    monkeypatch.setattr(module, "_split", lambda N, V, device: (parts, 256 // parts))
    (s, t, labels, *_), _ = problem(3, 200)
    t = torch.cat([t.new_zeros(64), rows_apart(t, stride)._base, t.new_zeros(64)])
    guarded = t[64:].as_strided((3, 200), (stride, 1), 64)
    s = rows_apart(s, stride).requires_grad_()
    sum(distill_kl(s, guarded, labels)).backward()
    elements = [(at - guarded.data_ptr()) // 4 for at in loads if 0 <= at - t.data_ptr() < 4 * len(t)]
    assert min(elements) == 0 and max(elements) == 2 * stride + 199


@pytest.mark.parametrize("tau", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("pad", [True, False])
def test_minus_infinity(tau, pad):
    """Words that the teacher rules out, and words that both do, cost nothing and are no NaN."""
    (s, t, labels, *rest), upstream = problem(5, 1003, pad=pad)
    t[::2, ::7] = -math.inf
    s[::2, ::14] = -math.inf
    labels[:] = 1
    check_against_fp64([s, t, labels, *rest], upstream, tau, FLOOR[torch.float32])


def test_a_word_that_only_the_student_rules_out_stays_finite():
    """Infinite by definition: here much and finite, the same in the kernel and on the CPU."""
    s, t = torch.zeros(3, 8, device=DEVICE), torch.zeros(3, 8, device=DEVICE)
    s[1, 2] = -math.inf
    kl, ce = distill_kl(s.requires_grad_(), t, None, 2.0)
    assert kl.item() == pytest.approx(4 * (2**14 * math.log(2) / 8 + math.log(7 / 8)), rel=1e-5)
    (gradient,) = torch.autograd.grad(kl, s)
    expected = torch.full((8,), 2 * (1 / 7 - 1 / 8), device=DEVICE)
    expected[2] = -2 / 8
    torch.testing.assert_close(gradient[1], expected)
    assert (gradient[::2] == 0).all()


@pytest.mark.parametrize("parts", [1, 4])
def test_a_stretch_that_only_the_student_rules_out_costs_the_same(parts, path, monkeypatch):
    """A block, a part of a row, what one thread sees: they begin, end or stay without a finite logit of the student."""
    if path == "kernel":
        monkeypatch.setattr(module, "BLOCK_V", 64)
        monkeypatch.setattr(module, "_split", lambda N, V, device: (parts, 1024 // parts))
    floor = -(2**14) * math.log(2)  # of a softened log-probability
    stretches = [slice(0, 256), slice(768, 1000), slice(300, 310), slice(64, 1000), slice(1, 1000)]
    (_, t, *_), _ = problem(len(stretches), 1000)
    s = padded(*t.shape, t.dtype, t.device).fill_(0.5)
    for row, stretch in zip(s, stretches, strict=True):
        row[stretch] = -math.inf
    kl, _, _ = module._forward(s, t, None, 2.0)
    log_p, log_q = (torch.log_softmax(x.double() / 2, -1) for x in (t, s))
    expected = 4 * (log_p.exp() * (log_p - log_q.clamp(min=floor))).sum(-1)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-3, atol=0)


def test_half_of_the_words_ruled_out_by_the_student_alone():
    """Half of the teacher's probability costs tau^2 2^14 log 2: 22,710; beside -3, exponentials need no maximum."""
    for level in (-3.0, 500.0):
        s, t = (torch.full((2, 3000), level, device=DEVICE) for _ in "st")
        s[:, ::2] = -math.inf
        assert distill_kl(s, t)[0].item() / 2 == pytest.approx(4 * (2**14 / 2 - 1) * math.log(2), rel=1e-6)


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("column", [5, 1002])
@pytest.mark.parametrize("pad", [True, False])
def test_nan_reaches_the_loss_of_its_row_and_of_no_other(which, column, pad):
    (s, t, *_), _ = problem(2, 1003, pad=pad)
    (s if which == "student" else t)[0, column] = math.nan
    kl, _, _ = module._forward(s, t, torch.ones(2, dtype=torch.long, device=DEVICE), 2.0)
    assert kl[0].isnan() and kl[1].isfinite()


def test_ignored_rows():
    (s, t, labels, *_), _ = problem(6, 1003)
    for none in (torch.full_like(labels, IGNORE), None):
        leaf = s.detach().requires_grad_()
        kl, ce = distill_kl(leaf, t, none)
        (gradient,) = torch.autograd.grad(kl + 3 * ce, leaf)
        assert ce == 0
        torch.testing.assert_close(gradient, torch.autograd.grad(distill_kl(leaf, t)[0], leaf)[0], rtol=0, atol=0)
    labels, drop = torch.arange(6, device=DEVICE), torch.tensor([1.0, 0, 1, 0, 0, 1], device=DEVICE)
    leaf = s.detach().requires_grad_()
    kl, ce = distill_kl(leaf, t, labels, 2.0, drop, drop)
    (gradient,) = torch.autograd.grad(kl + ce, leaf)
    assert (gradient[drop == 0] == 0).all() and (gradient[drop == 1] != 0).any()
    some = distill_kl(s[drop == 1], t[drop == 1], labels[drop == 1])
    torch.testing.assert_close(torch.stack([kl, ce]), torch.stack(some))


def test_a_label_outside_the_vocabulary_is_not_silent(path):
    (s, t, labels, *_), _ = problem(2, 50)
    for wrong in (50, -1):
        if path == "cpu":
            with pytest.raises((IndexError, RuntimeError)):
                distill_kl(s, t, torch.full_like(labels, wrong))
        else:
            assert distill_kl(s, t, torch.full_like(labels, wrong))[1].isnan()


@pytest.mark.parametrize("dtype", FLOOR)
def test_kl_of_a_distribution_to_itself(dtype):
    """Zero, with zero gradient (torchtune's is the cross-entropy)."""
    (s, *_), _ = problem(8, 3000, dtype, 5.0)
    leaf = s.detach().requires_grad_()
    kl, _ = distill_kl(leaf, s, None, 2.0)
    assert kl.abs() < 8 * 2.0**2 * 2**-22  # 8 rows of log(Z / Z): a GPU's division errs by 2 units in the last place
    assert torch.autograd.grad(kl, leaf)[0].abs().max() < 1e-6


# by 84 exponentials leave the range in which no maximum is subtracted; logits of 100 are rounded to 4e-6
@pytest.mark.parametrize("step, rtol", [(4.0, 1e-5), (12.0, 5e-5)])
def test_gradient_rows_sum_to_zero_and_shifts_change_nothing(step, rtol):
    (s, t, labels, w_kl, w_ce), upstream = problem(8, 3000, scale=3.0)
    kl, ce, gradient = values_and_gradient(distill_kl, s, t, labels, 2.0, w_kl, w_ce, upstream)
    assert gradient.sum(-1).abs().max() < 1e-6
    shift = torch.arange(8, device=DEVICE)[:, None] * step
    moved = values_and_gradient(distill_kl, s + shift, t - shift, labels, 2.0, w_kl, w_ce, upstream)
    for got, want in zip(moved, (kl, ce, gradient), strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("pad", [True, False])
def test_same_bits_twice_inputs_untouched_nothing_left_unwritten(pad, monkeypatch):
    inputs, upstream = problem(5, 1003, pad=pad)
    before = [x.clone() for x in inputs]
    first = values_and_gradient(distill_kl, *inputs[:3], 2.0, *inputs[3:], upstream)
    # fresh memory is full of NaN: what a kernel does not write would show
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        second = values_and_gradient(distill_kl, *inputs[:3], 2.0, *inputs[3:], upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


def test_second_backward():
    (s, t, labels, *_), _ = problem(5, 1003)
    s.requires_grad_()
    kl, ce = distill_kl(s, t, labels)
    first = torch.autograd.grad(kl + ce, s, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(kl + ce, s)[0])


def test_one_loss_alone():
    """kl and ce are differentiable apart: their gradients add up to that of the sum."""
    (s, t, labels, *_), _ = problem(5, 1003)
    s.requires_grad_()
    kl, ce = distill_kl(s, t, labels)
    apart = sum(torch.autograd.grad(x, s, retain_graph=True)[0] for x in (kl, ce))
    torch.testing.assert_close(apart, torch.autograd.grad(kl + ce, s)[0], rtol=1e-5, atol=1e-7)


def test_registered_as_an_operator():
    (s, t, labels, *_), _ = problem(3, 200)
    for arguments in ((s, t, labels, 2.0), (s.requires_grad_(), t, None, 3.0)):
        torch.library.opcheck(torch.ops.minidistil.distill_kl.default, arguments)


def test_one_graph_under_compile():
    (s, t, labels, *_), _ = problem(3, 200)
    s.requires_grad_()

    def loss(s):
        kl, ce = distill_kl(s, t, labels)
        return kl + 0.5 * ce

    want = torch.autograd.grad(loss(s), s)[0]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(s), s)[0], want)


def test_gradcheck_in_fp64():
    (s, t, labels, *_), _ = problem(4, 11)
    s = s.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: distill_kl(s, t.double(), labels, 2.0), (s,))


def test_wrong_arguments_are_refused():
    (s, t, labels, *_), _ = problem(4, 11)
    for wrong in ((s, t[:, :10], labels), (s, t, labels[:2]), (s[0], t[0], None)):
        with pytest.raises(ValueError, match="must be"):
            distill_kl(*wrong)
    with pytest.raises(ValueError, match="frozen"):
        distill_kl(s, t.requires_grad_(), labels)

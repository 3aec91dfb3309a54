"""Projection and loss in one: kernel (interpreted without a GPU) and CPU path against logits and autograd in fp64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kernels import IGNORE
from kernels import linear_distill_kl as module
from kernels.linear_distill_kl import linear_distill_kl, linear_distill_kl_ref
from minidistil.model import Config, LanguageModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []


@pytest.fixture(params=["kernel", "cpu"])
def path(request, monkeypatch):
    """Through Triton, and through the closed form in PyTorch."""
    if request.param == "kernel":
        pytest.importorskip("triton")
        if DEVICE == "cpu":
            monkeypatch.setenv("TRITON_INTERPRET", "1")
    elif DEVICE == "cuda":
        pytest.skip("the closed form is for the CPU")
    return request.param


def problem(N=37, V=1000, C=24, C_t=16, dtype=torch.float64, scale=1.0, seed=0, masked=0.3):
    """Random hidden rows, decoders and labels: (h_s, W_s, b_s), (h_t, W_t, b_t), labels."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).mul(scale).to(dtype)

    student = [randn(N, C).requires_grad_(), randn(V, C).requires_grad_(), randn(V).requires_grad_()]
    teacher = [randn(N, C_t), randn(V, C_t), randn(V)]
    labels = torch.randint(0, V, (N,), generator=g)
    labels[torch.rand(N, generator=g) > masked] = IGNORE
    return student, teacher, labels


def reference(student, teacher, labels, tau, weights):
    """The same loss through logits and autograd."""
    return linear_distill_kl_ref(*student, *teacher, labels, tau, *weights)[0]


# every term alone and all together; N around the block of 8 rows; V = 30,522 once
@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (5.0, 2.0, 0)])
@pytest.mark.parametrize("N, V", [(0, 7), (1, 1), (3, 7), (8, 1000), (37, 1000)])
@pytest.mark.parametrize("tau", [1.0, 2.0, 8.0])
def test_closed_form_equals_autograd_in_fp64(N, V, tau, weights):
    student, teacher, labels = problem(N, V, scale=0.3)
    upstream = 1.7
    loss, *_ = linear_distill_kl(*student, *teacher, labels, tau, *weights)
    expected = reference(student, teacher, labels, tau, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(loss * upstream, student)
    want = torch.autograd.grad(expected * upstream, student)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_closed_form_at_the_real_vocabulary(monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", 8 * 30522 * 8)  # several chunks, the last one ragged
    monkeypatch.setattr(module, "CPU_CHUNK_ROWS", 1)
    student, teacher, labels = problem(19, 30522, C=8, C_t=8)
    weights = (0.1, 0.2, 0.0)
    loss, *_ = linear_distill_kl(*student, *teacher, labels, 2.0, *weights)
    expected = reference(student, teacher, labels, 2.0, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for g, w in zip(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    (h, W, b), teacher, labels = problem(5, 11, C=3, C_t=4)
    assert torch.autograd.gradcheck(
        lambda h, W, b: linear_distill_kl(h, W, b, *teacher, labels, 2.0, 0.5, 0.3, 0.2)[0], (h, W, b)
    )


def gradients(loss_of, student, teacher, labels, tau, weights, autocast=None):
    """[loss, kl, ce, mse, dh, dW, db] in fp64, with an upstream gradient of 1.7."""
    student = [x.detach().to(DEVICE).requires_grad_() for x in student]
    teacher = [None if x is None else x.to(DEVICE) for x in teacher]
    with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
        values = loss_of(*student, *teacher, labels.to(DEVICE), tau, *weights)
    found = torch.autograd.grad(values[0] * 1.7, student)
    assert all(g.dtype == x.dtype for g, x in zip(found, student, strict=True))
    return [x.detach().double().cpu() for x in (*values, *found)]


def check_against_fp64(arguments, tau, weights, autocast=None, floor=3e-6):
    """Each gradient's error is at most twice that of logits and autograd in the same precision, plus a floor."""
    student, teacher, labels = arguments
    wide = [[None if x is None else x.detach().double() for x in xs] for xs in (student, teacher)]
    truth = gradients(linear_distill_kl_ref, *wide, labels, tau, weights)
    ours = gradients(linear_distill_kl, student, teacher, labels, tau, weights, autocast)
    eager = gradients(linear_distill_kl_ref, student, teacher, labels, tau, weights, autocast)
    names = ("loss", "kl", "ce", "mse", "dh", "dW", "db")
    not_asked_for = {name for name, weight in zip(names[1:4], weights, strict=True) if weight == 0}
    for name, want, got, other in zip(names, truth, ours, eager, strict=True):
        if want.numel() and name not in not_asked_for:
            assert got.isfinite().all(), name
            error, allowed = (got - want).norm(), 2 * (other - want).norm()
            assert error <= allowed + floor * want.norm() + 1e-12, f"{name}: {error:.2e}, eager's {allowed / 2:.2e}"


# every term alone and together; V with and without padding columns, and the real one
@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (5.0, 2.0, 0)])
@pytest.mark.parametrize("N, V", [(0, 7), (1, 1), (3, 1024), (37, 1000)])
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.0])
def test_fp32_is_as_exact_as_autograd_in_fp32(N, V, tau, weights, path):
    check_against_fp64(problem(N, V, dtype=torch.float32, scale=0.5), tau, weights)


def test_the_real_vocabulary_in_fp32(path):
    check_against_fp64(problem(5, 30522, dtype=torch.float32, scale=0.5), 2.0, (0.5, 0.3, 0.0))


@pytest.mark.parametrize("V", [50257, 250037])
@pytest.mark.parametrize("autocast, floor", [(None, 3e-6), (torch.bfloat16, 2**-7)])
def test_larger_vocabularies(V, autocast, floor, path, monkeypatch):
    """GPT-2's words, and a few more than XLM-R's, in two chunks."""
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", 0)
    monkeypatch.setattr(module, "CPU_CHUNK_ROWS", 2)
    arguments = problem(3, V, C=8, C_t=8, dtype=torch.float32, scale=0.5)
    check_against_fp64(arguments, 2.0, (0.5, 0.3, 0.1), autocast, floor)


def test_several_chunks(path, monkeypatch):
    monkeypatch.setattr(module, "GPU_CHUNK_ROWS", 8)
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", 8 * 1000 * 4)
    monkeypatch.setattr(module, "CPU_CHUNK_ROWS", 1)
    monkeypatch.setattr(module.cpu, "rows_in_cache", lambda V, dtype: 3)
    check_against_fp64(problem(37, dtype=torch.float32, scale=0.5), 2.0, (0.5, 0.3, 0.1))


@pytest.mark.parametrize("labelled", [0.0, 1.0])
def test_no_label_and_a_label_everywhere(labelled, path):
    check_against_fp64(problem(dtype=torch.float32, scale=0.5, masked=labelled), 2.0, (0.5, 0.3, 0.1))


def test_without_a_teacher_in_fp32(path):
    student, _, labels = problem(dtype=torch.float32, scale=0.5)
    check_against_fp64((student, (None, None, None), labels), 2.0, (0.0, 0.3, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [(5 / 160_000, 2 / 24_000, 0.0), (0.5, 0.3, 0.0)])
def test_autocast(dtype, weights, path):
    """As good as autograd in half precision; at the published recipe's weights nothing is lost to underflow.

    The floor: the kernel stores gradients in half precision once more, and the interpreter truncates where it does.
    Autograd itself loses gradients of 1e-8 in fp16, so that being as good is not enough: hence fixed tolerances, too.
    """
    arguments = problem(33, 1000, dtype=torch.float32, scale=0.5)
    check_against_fp64(arguments, 2.0, weights, dtype, floor={torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype])
    student, teacher, labels = arguments
    wide = [[x.detach().double() for x in xs] for xs in (student, teacher)]
    truth = gradients(linear_distill_kl_ref, *wide, labels, 2.0, weights)
    ours = gradients(linear_distill_kl, *arguments, 2.0, weights, dtype)
    for want, got in zip(truth[4:], ours[4:], strict=True):
        assert (got - want).norm() <= {torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype] * want.norm()


@pytest.mark.parametrize("dtype, kept, allowed", [
    (torch.float16, torch.float32, 5e-3), (torch.bfloat16, torch.bfloat16, 4e-2)
])  # fmt: skip
def test_rows_in_half_precision(dtype, kept, allowed, path):
    """A loss scale of 2^16 saves gradients that fp16 cannot hold: they are kept in fp32 until it arrives."""
    student, teacher, labels = problem(33, 1000, dtype=dtype, scale=0.5)
    weights = (5e-7, 2e-7, 0.0)
    wide = [[x.detach().double() for x in xs] for xs in (student, teacher)]
    (h, *decoder), teacher = ([x.detach().to(DEVICE) for x in xs] for xs in (student, teacher))
    h.requires_grad_()
    arguments = (h, *decoder, *teacher, labels.to(DEVICE), 2.0, *weights)
    assert module._forward(*arguments, dtype, True, False, False)[2].dtype == kept
    (got,) = torch.autograd.grad(2**16 * linear_distill_kl(*arguments)[0], h)
    want = gradients(linear_distill_kl_ref, *wide, labels, 2.0, weights)[4] / 1.7 * 2**16
    assert got.dtype == dtype and (got.double().cpu() - want).norm() <= allowed * want.norm()


@pytest.mark.parametrize("V", [200, 1200])
def test_minus_infinity_in_the_biases(V, path):
    """A word that both models rule out, and one that the teacher does."""
    student, teacher, labels = problem(9, V, dtype=torch.float32, scale=0.5)
    labels[:] = 1
    with torch.no_grad():
        student[2][7], teacher[2][7], teacher[2][9] = -math.inf, -math.inf, -math.inf
    check_against_fp64((student, teacher, labels), 2.0, (0.5, 0.3, 0.0))


def test_half_of_the_words_ruled_out_by_the_student_alone(path):
    """Infinite by definition: here the same as `distill_kl` makes of it, on both paths."""
    (h, W, b), (h_t, W_t, b_t), labels = problem(5, 1200, dtype=torch.float32, scale=0.0)
    b = b.detach() - 3.0
    b[::2] = -math.inf
    _, kl, *_ = linear_distill_kl(h, W, b, h_t, W_t, b_t, labels, 2.0, 0.5, 0.3)
    assert kl.item() / 5 == pytest.approx(4 * (2**14 / 2 - 1) * math.log(2), rel=1e-5)


# beside -2,000 the kernel's padding columns, logits of 0, would be infinitely likely if they counted at all
@pytest.mark.parametrize("of_student, of_teacher", [(-2000, -2000), (-100, 100), (100, 100), (180, 0), (0, -250)])
@pytest.mark.parametrize("V", [200, 1200])
def test_logits_far_from_zero(V, of_student, of_teacher, path):
    """Exponentials of logits as they are would leave fp32's range, of both models or of one."""
    student, teacher, labels = problem(11, V, dtype=torch.float32, scale=0.5)
    with torch.no_grad():
        student[2].add_(of_student)
        teacher[2].add_(of_teacher)
    floor = 3e-6 + 5e-8 * max(abs(of_student), abs(of_teacher))  # logits are rounded to 2^-24 of their size
    check_against_fp64((student, teacher, labels), 2.0, (0.5, 0.3, 0.1), floor=floor)


def test_a_frozen_decoder_costs_no_gradient(path):
    (h, W, b), teacher, labels = problem(dtype=torch.float32)
    W, b = W.detach(), b.detach()
    loss, *_ = linear_distill_kl(h, W, b, *teacher, labels, 2.0, 0.5, 0.3)
    assert torch.autograd.grad(loss, h)[0].norm() > 0
    for wanted in itertools.product((True, False), repeat=3):
        found = module._forward(h, W, b, *teacher, labels, 2.0, 0.5, 0.3, 0.0, torch.float32, *wanted)
        assert [x.numel() for x in found[2:]] == [x.numel() * w for x, w in zip((h, W, b), wanted, strict=True)]
    asked, forward = [], module._forward
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_forward", lambda *a: (asked.append(a[-3:]), forward(*a))[1])
        torch.testing.assert_close(linear_distill_kl(h, W, b, *teacher, labels, 2.0, 0.5, 0.3)[0], loss)
        with torch.enable_grad():
            linear_distill_kl(h, W, b, *teacher, labels, 2.0, 0.5, 0.3)
    assert asked == [(False, False, False), (True, False, False)]


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest tensor of a call, in bytes, and the shapes of all."""

    biggest, shapes = 0, ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.biggest = max(self.biggest, x.untyped_storage().nbytes())
                self.shapes += (tuple(x.shape),)
        return result


def test_a_decoder_without_a_bias_costs_no_gradient_of_one(path):
    """GPT-2's: the bias is a zero that takes no gradient, so no sum over the rows of a chunk is computed for it."""
    model = LanguageModel(Config(1000, 8, 0, 1, 2, 16, 16, family="gpt2"), seed=0).to(DEVICE)
    (h, *_), teacher, labels = problem(9, C=16, dtype=torch.float32)
    h, teacher, labels = h.detach().to(DEVICE).requires_grad_(), [x.to(DEVICE) for x in teacher], labels.to(DEVICE)
    W, zero = model.decoder
    found, shapes = [], []
    for b in (zero, zero.clone().requires_grad_()):
        with Watch() as watch:
            loss, *_ = linear_distill_kl(h, W, b, *teacher, labels, 2.0, 0.5, 0.3)
            found.append(torch.autograd.grad(loss, [x for x in (h, W, b) if x.requires_grad]))
        shapes.append(watch.shapes)
    assert not zero.requires_grad and [len(x) for x in found] == [2, 3]
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=False))
    # beside db there are the biases themselves, divided by tau or padded
    assert shapes[1].count((1000,)) - shapes[0].count((1000,)) >= 3  # db, a sum, its addition


def test_the_gradient_of_padding_columns_is_zero(path):
    if path == "cpu":
        pytest.skip("only the kernel's rows are padded")
    s, t = (torch.randn(3, 1024, device=DEVICE) for _ in range(2))
    s[:, 1000:] = t[:, 1000:] = math.nan  # whatever is there
    losses, labels = torch.empty(3, 3, device=DEVICE), torch.tensor([7, IGNORE, 999], device=DEVICE)
    module._loss_and_gradient_kernel[(3,)](
        s, t, labels, losses, 1024, 1000, 2.0, 0.5, 0.3, 0.1, HAS_MSE=True, TAU=2, BLOCK_V=512, num_warps=4
    )  # fmt: skip
    assert (s[:, 1000:] == 0).all() and (s[:, :1000] != 0).all() and losses.isfinite().all()


def test_registered_as_an_operator(path):
    student, teacher, labels = problem(5, 100, dtype=torch.float32)
    torch.library.opcheck(
        torch.ops.minidistil.linear_distill_kl.default,
        (*student, *teacher, labels, 2.0, 0.5, 0.3, 0.0, torch.float32, True, True, True),
    )


def test_one_graph_under_compile(path):
    student, teacher, labels = problem(5, 100, dtype=torch.float32)

    def loss(h, W, b):
        return linear_distill_kl(h, W, b, *teacher, labels, 2.0, 0.5, 0.3)[0]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, want in zip(
        torch.autograd.grad(compiled(*student), student), torch.autograd.grad(loss(*student), student), strict=True
    ):
        assert torch.equal(got, want)


def test_kl_is_a_true_kl():
    """Zero, with zero gradient, where student equals teacher (in torchtune 9.8 nats); positive elsewhere."""
    (h, W, b), _, labels = problem(16, 1000)
    frozen = [x.detach().clone() for x in (h, W, b)]
    loss, kl, ce, mse = linear_distill_kl(h, W, b, *frozen, labels, 2.0, 1.0, 0.0, 0.0)
    assert abs(kl.item()) < 1e-12 and ce == 0 and mse == 0
    for gradient in torch.autograd.grad(loss, (h, W, b)):
        assert gradient.abs().max() < 1e-12
    student, teacher, labels = problem(16, 1000)
    assert linear_distill_kl(*student, *teacher, labels, 2.0, 1.0, 0.0)[1] > 0


def test_tau_squared_in_value_and_gradient():
    """d(tau^2 KL)/ds = tau (softmax(s / tau) - softmax(t / tau)), by hand; and the value by the definition of KL."""
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(4, 9, generator=g, dtype=torch.float64) for _ in range(2))
    labels, eye, zero = torch.full((4,), IGNORE), torch.eye(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    for tau in (1.0, 2.0, 8.0):
        s.requires_grad_(True)
        p, q = ([math.exp(x / tau) for x in row] for row in (t[0].tolist(), s[0].tolist()))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        by_hand = tau**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        loss, kl, _, _ = linear_distill_kl(s[:1], eye, zero, t[:1], eye, zero, labels[:1], tau, 1.0, 0.0)
        assert kl.item() == pytest.approx(by_hand, rel=1e-12)
        (gradient,) = torch.autograd.grad(linear_distill_kl(s, eye, zero, t, eye, zero, labels, tau, 1.0, 0.0)[0], s)
        expected = tau * (F.softmax(s / tau, -1) - F.softmax(t / tau, -1))
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
        assert gradient.sum(-1).abs().max() < 1e-12


def test_second_backward_and_untouched_inputs(path):
    student, teacher, labels = problem(dtype=torch.float32)
    before = [x.detach().clone() for x in (*student, *teacher)]
    loss, *_ = linear_distill_kl(*student, *teacher, labels, 2.0, 0.5, 0.3)
    first = [g.clone() for g in torch.autograd.grad(loss, student, retain_graph=True)]
    scaled = torch.autograd.grad(4 * loss, student, retain_graph=True)  # by a power of two: exactly
    second = torch.autograd.grad(loss, student)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(4 * a, b) for a, b in zip(first, scaled, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (*student, *teacher), strict=True))
    # accumulating into .grad must not write into what backward keeps
    loss, *_ = linear_distill_kl(*student, *teacher, labels, 2.0, 0.5, 0.3)
    loss.backward(retain_graph=True)
    loss.backward()
    for x, g in zip(student, first, strict=True):
        torch.testing.assert_close(x.grad, 2 * g)


def test_same_bits_twice(path):
    results = []
    for _ in range(2):
        student, teacher, labels = problem(40, 3000, dtype=torch.float32)
        loss, *_ = linear_distill_kl(*student, *teacher, labels, 2.0, 0.5, 0.3)
        results.append([loss, *torch.autograd.grad(loss, student)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_trainable_teacher_is_refused():
    student, teacher, labels = problem()
    with pytest.raises(ValueError, match="frozen"):
        linear_distill_kl(*student, teacher[0], teacher[1].requires_grad_(), teacher[2], labels, 2.0, 1.0, 1.0)


def test_another_vocabulary_is_refused():
    student, teacher, labels = problem()
    for V in (999, 1001, 1088):
        with pytest.raises(ValueError, match="vocabulary"):
            linear_distill_kl(*student, teacher[0], torch.zeros(V, 16), torch.zeros(V), labels, 2.0, 1.0, 1.0)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_teacher_prepared_once_is_used_as_it_is(autocast, path, monkeypatch):
    student, teacher, labels = problem(9, dtype=torch.float32)
    want = gradients(linear_distill_kl, student, teacher, labels, 2.0, (0.5, 0.3, 0.1), autocast)
    decoder = module.decoder_for(*(x.to(DEVICE) for x in teacher[1:]), autocast or torch.float32)
    assert [len(x) for x in decoder] == [1024 if path == "kernel" else 1000] * 2
    assert all(x.dtype == (autocast or torch.float32) and (x[1000:] == 0).all() for x in decoder)
    results, converted = [], module._converted
    monkeypatch.setattr(module, "_converted", lambda x, *to: results.append((x, converted(x, *to))) or results[-1][1])
    got = gradients(linear_distill_kl, student, [teacher[0], *decoder], labels, 2.0, (0.5, 0.3, 0.1), autocast)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert [given is used for given, used in results[2:]] == [True, True]


def test_logits_are_never_kept():
    """2,048 rows of 30,522 logits would take 250 MB for each model: no tensor of the call is larger than a chunk."""
    student, teacher, labels = problem(2048, 30522, C=8, C_t=8, dtype=torch.float32, masked=0.15)
    with Watch() as watch:
        linear_distill_kl(*student, *teacher, labels, 2.0, 0.5, 0.3)[0].backward()
    assert 30522 * 8 * 4 <= watch.biggest <= module.CPU_CHUNK_BYTES + 30522 * 4


@pytest.mark.parametrize("dtype, on_cpu", [(torch.float32, 412), (torch.bfloat16, 824), (torch.float64, 206)])
def test_rows_of_a_chunk(dtype, on_cpu):
    """At 30,522 words 48 MiB on a CPU, 4,096 rows on a GPU; at 250,037 no less than 128 rows, no more than 1 GiB."""
    assert module._chunk(10 * on_cpu, 30522, dtype, True) == on_cpu
    assert module._chunk(10 * 4096, 30522, dtype, False) == 4096
    assert [module._chunk(1, V, dtype, cpu) for V in (1, 30522, 250037) for cpu in (True, False)] == [1] * 6
    assert module._chunk(1280, 250037, dtype, True) == 128
    gpu = module._chunk(10**6, 250037, dtype, False)
    assert 0.98 * 2**30 <= gpu * 250037 * dtype.itemsize <= 2**30
    assert module._chunk(10**6, 10**9, dtype, False) == 1


def test_without_a_teacher_it_is_cross_entropy():
    student, _, labels = problem()
    loss, kl, ce, mse = linear_distill_kl(*student, None, None, None, labels, 2.0, 5.0, 0.3, 1.0)
    h, W, b = student
    expected = 0.3 * F.cross_entropy(h @ W.T + b, labels, reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert kl == 0 and mse == 0
    for g, w in zip(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_labels_of_any_stride(path):
    *models, labels = problem(19, 50, dtype=torch.float32)
    rows = [x.detach().to(DEVICE) for model in models for x in model]
    losses = [linear_distill_kl(*rows, y.to(DEVICE), 2.0, 0.5, 0.3)[0]
              for y in (labels, torch.stack([labels, torch.zeros_like(labels)], 1)[:, 0])]  # fmt: skip
    assert torch.equal(*losses)

"""The objective: against the published formulas, against autograd in fp64, and against itself split in pieces."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import linear_distill_kl as module
from kernels.linear_distill_kl import linear_distill_kl, linear_distill_kl_ref
from minidistil.data import IGNORE
from minidistil.losses import Counts, Objective, distillation_loss
from minidistil.model import Config, MaskedLM


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


def test_fp32_is_as_exact_as_autograd_in_fp32():
    weights = (0.5, 0.3, 0.0)
    truth = problem(33, 1000, scale=0.5)
    want = torch.autograd.grad(reference(*truth[:2], truth[2], 2.0, weights), truth[0])
    errors = []
    for loss_of in (lambda *a: linear_distill_kl(*a[0], *a[1], a[2], 2.0, *weights)[0],
                    lambda *a: reference(*a, 2.0, weights)):  # fmt: skip
        student, teacher, labels = problem(33, 1000, dtype=torch.float32, scale=0.5)
        got = torch.autograd.grad(loss_of(student, teacher, labels), student)
        errors.append([((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True)])
    for ours, autograd in zip(*errors, strict=True):
        assert ours <= 2 * autograd + 1e-7


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_autocast(dtype, tolerance):
    """Half-precision logits: gradients near fp64's, fp32 in type, not lost to underflow at realistic weights."""
    weights = (5 / 160_000, 2 / 24_000, 0.0)  # the published recipe: 320 sequences of 512 tokens
    truth = problem(33, 1000, scale=0.5)
    want = torch.autograd.grad(reference(*truth[:2], truth[2], 2.0, weights), truth[0])
    student, teacher, labels = problem(33, 1000, dtype=torch.float32, scale=0.5)
    with torch.autocast("cpu", dtype):
        loss, *_ = linear_distill_kl(*student, *teacher, labels, 2.0, *weights)
    got = torch.autograd.grad(loss, student)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        assert (g - w).norm() <= tolerance * w.norm()


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


def test_published_formula():
    """The whole objective against its four published terms, written with PyTorch's loss modules as the original is."""
    objective = Objective(alpha_mse=0.01)
    student, teacher, ids, labels, h_s, h_t = two_models()
    counts = Counts(ids.numel(), int((labels != IGNORE).sum()))
    loss, parts = distillation_loss(objective, counts, labels, student, h_s, teacher, h_t)
    s, t = student.logits(h_s.flatten(0, 1)), teacher.logits(h_t.flatten(0, 1))
    kl = torch.nn.KLDivLoss(reduction="batchmean")(F.log_softmax(s / 2.0, -1), F.softmax(t / 2.0, -1)) * 2.0**2
    ce = torch.nn.CrossEntropyLoss(ignore_index=-100)(s, labels.flatten())
    one = torch.ones(ids.numel(), dtype=torch.float64)
    cos = torch.nn.CosineEmbeddingLoss(reduction="mean")(h_s.flatten(0, 1).double(), h_t.flatten(0, 1).double(), one)
    mse = F.mse_loss(s, t, reduction="sum") / len(s)
    expected = 5 * kl + 2 * ce + cos + 0.01 * mse
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, check_dtype=False)
    torch.testing.assert_close(parts.double(), torch.stack([kl, ce, cos, mse]).detach(), rtol=1e-5, atol=1e-7)
    parameters = [p for n, p in student.named_parameters()]
    got, want = torch.autograd.grad(loss, parameters, retain_graph=True), torch.autograd.grad(expected, parameters)
    for g, w in zip(got, want, strict=True):  # the cosine is taken in fp32
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-7 * w.abs().max().item() + 1e-9)


def two_models(B=6, T=10):
    shape = dict(vocab_size=97, positions=16, layers=2, heads=2, width=16, mlp_width=32)
    config = Config(**shape, dropout=0.0, attention_dropout=0.0)
    teacher = MaskedLM(config, seed=1).double().eval().requires_grad_(False)
    student = MaskedLM(config.student(1), seed=2).double()
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 97, (B, T), generator=g)
    labels = torch.where(torch.rand(B, T, generator=g) < 0.3, ids, IGNORE)
    return student, teacher, ids, labels, student(ids), teacher(ids)


@pytest.mark.parametrize("kd_rows", ["all", "masked"])
def test_split_does_not_matter(kd_rows):
    """Six micro-batches of one sequence give the loss and gradient of one of six, though masks per sequence differ."""
    objective = Objective(kd_rows=kd_rows)
    student, teacher, ids, labels, h_s, h_t = two_models()
    counts = Counts(ids.numel(), int((labels != IGNORE).sum()))
    whole, _ = distillation_loss(objective, counts, labels, student, h_s, teacher, h_t)
    want = torch.autograd.grad(whole, list(student.parameters()))
    pieces = [
        distillation_loss(objective, counts, y[None], student, student(x[None]), teacher, h[None])[0]
        for x, y, h in zip(ids, labels, h_t, strict=True)
    ]
    got = torch.autograd.grad(sum(pieces), list(student.parameters()))
    torch.testing.assert_close(sum(pieces), whole)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-9)


def test_masked_rows_are_the_masked_rows_of_all():
    """`--kd-rows masked` is the published KL restricted to masked positions, as `restrict_ce_to_mask` does."""
    student, teacher, ids, labels, h_s, h_t = two_models()
    counts = Counts(ids.numel(), int((labels != IGNORE).sum()))
    objective = Objective(alpha_mlm=0.0, alpha_cos=0.0, kd_rows="masked")
    loss, _ = distillation_loss(objective, counts, labels, student, h_s, teacher, h_t)
    chosen = labels != IGNORE
    s, t = student.logits(h_s[chosen]), teacher.logits(h_t[chosen])
    kl = F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="batchmean") * 4
    torch.testing.assert_close(loss, 5 * kl)


def test_no_masks_at_all_is_not_nan():
    student, teacher, ids, labels, h_s, h_t = two_models()
    nothing = torch.full_like(labels, IGNORE)
    for objective in (Objective(), Objective(kd_rows="masked"), Objective(alpha_ce=0.0, alpha_cos=0.0)):
        loss, parts = distillation_loss(objective, Counts(ids.numel(), 0), nothing, student, student(ids), teacher, h_t)
        gradients = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
        assert loss.isfinite() and parts.isfinite().all()
        assert all(g is None or g.isfinite().all() for g in gradients)


def test_second_backward_and_untouched_inputs():
    student, teacher, labels = problem()
    before = [x.detach().clone() for x in (*student, *teacher)]
    loss, *_ = linear_distill_kl(*student, *teacher, labels, 2.0, 0.5, 0.3)
    first = [g.clone() for g in torch.autograd.grad(loss, student, retain_graph=True)]
    second = torch.autograd.grad(loss, student)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (*student, *teacher), strict=True))
    # accumulating into .grad must not write into what backward keeps
    loss, *_ = linear_distill_kl(*student, *teacher, labels, 2.0, 0.5, 0.3)
    loss.backward(retain_graph=True)
    loss.backward()
    for x, g in zip(student, first, strict=True):
        torch.testing.assert_close(x.grad, 2 * g)


def test_same_bits_twice():
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


def test_logits_are_never_kept():
    """2,048 rows of 30,522 logits would take 250 MB for each model: no tensor of the call is larger than a chunk."""
    student, teacher, labels = problem(2048, 30522, C=8, C_t=8, dtype=torch.float32, masked=0.15)
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal biggest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor):
                    biggest = max(biggest, x.untyped_storage().nbytes())
            return result

    with Watch():
        linear_distill_kl(*student, *teacher, labels, 2.0, 0.5, 0.3)[0].backward()
    assert 30522 * 8 * 4 <= biggest <= module.CPU_CHUNK_BYTES + 30522 * 4


def test_without_a_teacher_it_is_cross_entropy():
    student, _, labels = problem()
    loss, kl, ce, mse = linear_distill_kl(*student, None, None, None, labels, 2.0, 5.0, 0.3, 1.0)
    h, W, b = student
    expected = 0.3 * F.cross_entropy(h @ W.T + b, labels, reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert kl == 0 and mse == 0
    for g, w in zip(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)

"""The objective: against the published formulas, against autograd in fp64, and against itself split in pieces."""

import math

import pytest
import torch
import torch.nn.functional as F

from minidistil.data import IGNORE
from minidistil.losses import Denominators, Objective, counts, distillation_loss
from minidistil.model import Config, LanguageModel
from minidistil.narrow import Projection, leading_directions, narrower
from minidistil.pooling import Pooling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []


def test_published_formula():
    """The whole objective against its four published terms, written with PyTorch's loss modules as the original is."""
    objective = Objective(alpha_mse=0.01)
    student, teacher, ids, labels, h_s, h_t = two_models()
    counts = Denominators(ids.numel(), int((labels != IGNORE).sum()))
    loss, parts = distillation_loss(objective, counts, labels, student, h_s, teacher, h_t)
    s, t = student.logits(h_s.flatten(0, 1)), teacher.logits(h_t.flatten(0, 1))
    kl = torch.nn.KLDivLoss(reduction="batchmean")(F.log_softmax(s / 2.0, -1), F.softmax(t / 2.0, -1)) * 2.0**2
    ce = torch.nn.CrossEntropyLoss(ignore_index=-100)(s, labels.flatten())
    one = torch.ones(ids.numel(), dtype=torch.float64)
    cos = torch.nn.CosineEmbeddingLoss(reduction="mean")(h_s.flatten(0, 1).double(), h_t.flatten(0, 1).double(), one)
    mse = F.mse_loss(s, t, reduction="sum") / len(s)
    expected = 5 * kl + 2 * ce + cos + 0.01 * mse
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, check_dtype=False)
    terms = torch.stack([kl, ce, cos, mse, mse.new_zeros(())]).detach()
    torch.testing.assert_close(parts.double(), terms, rtol=1e-5, atol=1e-7)
    parameters = [p for n, p in student.named_parameters()]
    got, want = torch.autograd.grad(loss, parameters, retain_graph=True), torch.autograd.grad(expected, parameters)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-7 * w.abs().max().item() + 1e-9)


def two_models(B=6, T=10):
    shape = dict(vocab_size=97, positions=16, layers=2, heads=2, width=16, mlp_width=32)
    config = Config(**shape, dropout=0.0, attention_dropout=0.0)
    teacher = LanguageModel(config, seed=1).double().eval().requires_grad_(False)
    student = LanguageModel(config.student(1), seed=2).double()
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 97, (B, T), generator=g)
    labels = torch.where(torch.rand(B, T, generator=g) < 0.3, ids, IGNORE)
    return student, teacher, ids, labels, student(ids), teacher(ids)


@pytest.mark.parametrize("kd_rows", ["all", "masked"])
def test_split_does_not_matter(kd_rows):
    """Six micro-batches of one sequence give the loss and gradient of one of six, though masks per sequence differ."""
    objective = Objective(kd_rows=kd_rows)
    student, teacher, ids, labels, h_s, h_t = two_models()
    counts = Denominators(ids.numel(), int((labels != IGNORE).sum()))
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
    counts = Denominators(ids.numel(), int((labels != IGNORE).sum()))
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
        none = Denominators(ids.numel(), 0)
        loss, parts = distillation_loss(objective, none, nothing, student, student(ids), teacher, h_t)
        gradients = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
        assert loss.isfinite() and parts.isfinite().all()
        assert all(g is None or g.isfinite().all() for g in gradients)


def test_twenty_updates_with_kernels_are_twenty_without(monkeypatch):
    """The same training with every kernel (interpreted without a GPU) and with none: the parameters stay together.

    In fp32, where both do the same sums in another order. AdamW divides small gradients by their own size, so that the
    rounding of a gradient near zero may show: hence parameters to 1e-3 of the distance they went, and losses to 1e-5.
    """
    pytest.importorskip("triton")
    shape = dict(vocab_size=97, positions=16, layers=2, heads=2, width=16, mlp_width=32)
    config = Config(**shape, dropout=0.0, attention_dropout=0.0)
    objective, g = Objective(), torch.Generator().manual_seed(3)
    batches = [torch.randint(0, 97, (1, 6), generator=g) for _ in range(20)]
    masks = [torch.rand(1, 6, generator=g) < 0.3 for _ in range(20)]
    runs = {}
    for kernels in ("off", "on"):
        if DEVICE == "cpu":
            monkeypatch.setenv("TRITON_INTERPRET", "1" if kernels == "on" else "0")
        elif kernels == "off":
            monkeypatch.setattr("kernels.linear_distill_kl.on_triton", lambda x: False)
            monkeypatch.setattr("kernels.layer_norm.on_triton", lambda x: False)
            monkeypatch.setattr("kernels.cosine.on_triton", lambda x: False)
        else:
            monkeypatch.undo()
        teacher = LanguageModel(config, seed=1).to(DEVICE).eval().requires_grad_(False)
        student = LanguageModel(config.student(1), seed=2).to(DEVICE)
        start = [p.detach().clone() for p in student.parameters()]
        optimizer, losses = torch.optim.AdamW(student.parameters(), 1e-3, eps=1e-6), []
        for ids, mask in zip(batches, masks, strict=True):
            ids, labels = ids.to(DEVICE), torch.where(mask, ids, IGNORE).to(DEVICE)
            counts = Denominators(ids.numel(), int(mask.sum()))
            loss, _ = distillation_loss(objective, counts, labels, student, student(ids), teacher, teacher(ids))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs[kernels] = losses, [p.detach() for p in student.parameters()]
    assert runs["on"][0] == pytest.approx(runs["off"][0], rel=1e-5) and runs["on"][0][-1] < runs["on"][0][0]
    went = math.sqrt(sum((p - s).square().sum().item() for p, s in zip(runs["off"][1], start, strict=True)))
    apart = math.sqrt(sum((p - q).square().sum().item() for p, q in zip(runs["off"][1], runs["on"][1], strict=True)))
    assert 0 < apart < 1e-3 * went


def padded_models(width=16, mode="mean"):
    """Two models in fp64, six sentences of 3 to 10 tokens, and the student's projection where it is narrower."""
    student, teacher, ids, labels, _, _ = two_models()
    if width != 16:
        config = narrower(teacher.config.student(1), width)
        student = LanguageModel(config, seed=2).double()
        student.projection = Projection(teacher, student, True, True).double()
        student.projection.weight.data[0] += 0.1  # it is learnt, and has other directions soon
    mask = torch.arange(10) < torch.tensor([3, 10, 7, 5, 9, 4])[:, None]
    labels = torch.where(mask, labels, IGNORE)
    return student, teacher, ids, labels, mask, Pooling(mode)


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("width", [16, 8])
def test_every_term_on_sentences(mode, width):
    """All five terms of padded sentences, and their gradient: as the formulas say of real tokens, one by one."""
    objective = Objective(alpha_mse=0.01, alpha_emb=3.0)
    student, teacher, ids, labels, mask, pooling = padded_models(width, mode)
    counted = Denominators(*counts(ids, labels, mask), len(ids))
    assert counted == Denominators(38, int((labels != IGNORE).sum()), 6)
    h_s, h_t = student(ids, mask), teacher(ids, mask)
    loss, parts = distillation_loss(objective, counted, labels, student, h_s, teacher, h_t, mask=mask, pooling=pooling)
    kl = ce = cos = mse = emb = 0.0
    for x, y, real in zip(ids, labels, mask.sum(1).tolist(), strict=True):
        a, b = student(x[None, :real])[0], teacher(x[None, :real])[0]  # without any padding
        s, t = student.logits(a), teacher.logits(b)
        kl = kl + 4 * F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="sum") / 38
        ce = ce + F.cross_entropy(s, y[:real], ignore_index=IGNORE, reduction="sum") / counted.masked
        mse = mse + (s - t).square().sum() / 38
        wide = a if width == 16 else a @ student.projection.weight.T
        cos = cos + (1 - F.cosine_similarity(wide, b)).sum() / 38
        v_s, v_t = (z[0] if mode == "cls" else z.mean(0) for z in (a, b))
        v_t = v_t if width == 16 else v_t @ leading_directions(teacher, width).double()
        emb = emb + (v_s / v_s.norm() - v_t / v_t.norm()).square().sum() / 6
    expected = 5 * kl + 2 * ce + cos + 0.01 * mse + 3 * emb
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0, check_dtype=False)
    terms = torch.stack([kl, ce, cos, mse, emb]).detach()
    torch.testing.assert_close(parts.double(), terms, rtol=1e-5, atol=1e-7)
    parameters = [p for p in student.parameters() if p.requires_grad]
    got, want = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6 * w.abs().max().item() + 1e-9)


def test_a_split_of_sentences_does_not_matter():
    objective = Objective(alpha_emb=3.0)
    student, teacher, ids, labels, mask, pooling = padded_models(8)
    counted = Denominators(*counts(ids, labels, mask), len(ids))

    def loss(part):
        x, y, m = ids[part], labels[part], mask[part]
        models = student, student(x, m), teacher, teacher(x, m)
        return distillation_loss(objective, counted, y, *models, mask=m, pooling=pooling)[0]

    whole, pieces = loss(slice(0, 6)), [loss(slice(i, i + 2)) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(pieces), whole, rtol=1e-6, atol=0)
    parameters = [p for p in student.parameters() if p.requires_grad]
    got, want = (torch.autograd.grad(x, parameters) for x in (sum(pieces), whole))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-7)


def test_vectors_alone_need_no_head():
    objective = Objective(0.0, 0.0, 1.0, alpha_emb=3.0)
    student, teacher, ids, labels, mask, pooling = padded_models()
    student.head = teacher.head = None
    counted = Denominators(*counts(ids, labels, mask), len(ids))
    models = student, student(ids, mask), teacher, teacher(ids, mask)
    loss, parts = distillation_loss(objective, counted, labels, *models, mask=mask, pooling=pooling)
    assert objective.terms == ["cos", "emb"] and parts[[0, 1, 3]].tolist() == [0, 0, 0]
    torch.testing.assert_close(loss.float(), parts[2] + 3 * parts[4])
    loss.backward()

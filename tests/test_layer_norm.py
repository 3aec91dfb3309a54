"""Dropout + residual + LayerNorm: kernels (interpreted without a GPU) and CPU path against PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F

from kernels import layer_norm as module
from kernels.dropout import Key
from kernels.layer_norm import dropout_add_layer_norm, dropout_add_layer_norm_ref
from minidistil.model import Config, LanguageModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
EPS = 1e-12


@pytest.fixture
def kernel(monkeypatch):
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def problem(N, C, dtype=torch.float32, residual=True, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, r, dy = ((torch.randn(N, C, generator=g) * scale).to(DEVICE, dtype) for _ in range(3))
    weight, bias = (torch.randn(C, generator=g).to(DEVICE) for _ in range(2))
    return x, r if residual else None, weight, bias, dy


def run(function, x, residual, weight, bias, dy, **options):
    """[y, dx, dresidual, dweight, dbias] in fp64; without a residual there is no gradient of one."""
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias) if t is not None]
    x, *residual, weight, bias = leaves
    y = function(x, residual[0] if residual else None, weight, bias, EPS, **options)
    gradients = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    assert all(g.dtype == t.dtype for g, t in zip(gradients, leaves, strict=True))
    return [t.detach().double().cpu() for t in (y, *gradients)]


def check_against_fp64(arguments, floor, **options):
    """Every result's error is at most twice that of PyTorch in the same dtype, plus a floor."""
    wide = [None if t is None else t.double() for t in arguments]
    truth = run(dropout_add_layer_norm_ref, *wide)
    ours = run(dropout_add_layer_norm, *arguments, **options)
    low = [t if t is None or i not in (2, 3) else t.to(arguments[0].dtype) for i, t in enumerate(arguments)]
    torchs = run(dropout_add_layer_norm_ref, *low)
    for want, got, other, scale in zip(truth, ours, torchs, scales_of(*wide), strict=True):
        if want.numel():
            assert got.isfinite().all()
            error, allowed = (got - want).norm(), 2 * (other - want).norm()
            assert error <= allowed + floor * max(want.norm(), scale) + 1e-12


def scales_of(x, residual, weight, bias, dy):
    """Norms of the terms that make up each result where they may cancel, as dx of a single column does, which is 0."""
    z = x if residual is None else x + residual
    rstd = ((z - z.mean(-1, True)).square().mean(-1, True) + EPS).rsqrt()
    of_dx = (rstd * weight * dy).norm().item()
    return [0.0, of_dx, *([] if residual is None else [of_dx]), 0.0, 0.0]


# z is stored in the dtype of x, and the interpreter truncates where a GPU rounds
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


# widths that are powers of two, three times one (768), neither, and below a group of eight
@pytest.mark.parametrize("N, C", [(0, 16), (1, 1), (3, 7), (5, 64), (9, 100), (6, 256), (4, 768), (3, 1000), (2, 1024)])
@pytest.mark.parametrize("residual", [True, False])
def test_fp32(N, C, residual, kernel):
    check_against_fp64(problem(N, C, residual=residual), FLOOR[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [True, False])
def test_half_precision(dtype, residual, kernel):
    check_against_fp64(problem(9, 768, dtype, residual), FLOOR[dtype])


def test_a_large_common_offset(kernel):
    """Mean 1,000, deviation 1: mean squares minus the square of the mean would have three digits left."""
    x, r, weight, bias, dy = problem(5, 768)
    check_against_fp64((x + 1000, r, weight, bias, dy), FLOOR[torch.float32])


def key_of(seed, first=0):
    return Key.of(seed, first, torch.device(DEVICE)).data


def kept(x, p, seed):
    """The mask that the kernel draws, read off z = dropout(1) without a residual."""
    one, zero = torch.ones_like(x), torch.zeros(x.shape[1], device=x.device)
    return module._forward(one, None, zero, zero, EPS, p, key_of(seed), 1, 1, torch.float32, True, False)[1]


@pytest.mark.parametrize("C", [768, 100, 8])
def test_dropout_in_the_kernel(C, kernel):
    """Forward and backward use one mask; value and gradients are those of PyTorch with that mask."""
    x, r, weight, bias, dy = problem(7, C)
    p, seed = 0.25, 12345
    mask = kept(x, p, seed)  # 0 or 1 / (1 - p)
    assert set(mask.unique().tolist()) <= {0.0, mask.max().item()} and mask.max().item() == pytest.approx(1 / (1 - p))

    def with_mask(x, residual, weight, bias, eps):
        return F.layer_norm(x * mask.to(x.dtype) + residual, weight.shape, weight, bias, eps)

    def with_seed(x, residual, weight, bias, eps):
        return module._operator(x, residual, weight, bias, eps, p, key_of(seed), 1, 1, torch.float32, True, False)[0]

    truth = run(with_mask, *(t.double() for t in (x, r, weight, bias, dy)))
    for want, got in zip(truth, run(with_seed, x, r, weight, bias, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_masks_are_random(kernel):
    """The right share, no two seeds or rows alike, and no eight of a group alike."""
    x = torch.empty(60, 768, device=DEVICE)
    p = 0.1
    mask = kept(x, p, 1) > 0
    share, error = mask.float().mean().item(), (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(share - (1 - p)) < 4 * error
    assert not torch.equal(mask, kept(x, p, 2) > 0)
    assert len({tuple(row.tolist()) for row in mask}) == 60
    dropped = ~mask.view(-1, 8)
    assert (dropped.float().mean(0) - p).abs().max() < 4 * (p * (1 - p) / len(dropped)) ** 0.5
    both = (dropped[:, :-1] & dropped[:, 1:]).float().mean(0)  # neighbours in a group are independent
    assert (both - p**2).abs().max() < 4 * (p**2 / len(dropped)) ** 0.5


def test_the_last_group_of_a_row_is_not_the_first_of_the_next(kernel):
    """100 columns are twelve groups of eight and a half one."""
    mask = kept(torch.empty(60, 100, device=DEVICE), 0.5, 1) > 0
    assert (mask[:-1, 96:] == mask[1:, :4]).all(1).float().mean() < 0.3  # by chance 1 / 16


def test_public_dropout_follows_the_seed_and_stops_in_evaluation(kernel):
    x, r, weight, bias, _ = problem(4, 64)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(dropout_add_layer_norm(x, r, weight, bias, EPS, p=0.5))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    plain = dropout_add_layer_norm(x, r, weight, bias, EPS)
    assert torch.equal(dropout_add_layer_norm(x, r, weight, bias, EPS, p=0.5, training=False), plain)


def test_same_bits_twice_and_inputs_untouched(kernel):
    arguments = problem(9, 768)
    before = [t.clone() for t in arguments]
    first, second = (run(dropout_add_layer_norm, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, arguments, strict=True))


def test_more_dimensions_strides_and_autocast(kernel):
    x, r, weight, bias, _ = problem(12, 64)
    flat = dropout_add_layer_norm(x, r, weight, bias, EPS)
    assert torch.equal(dropout_add_layer_norm(x.view(3, 4, 64), r.view(3, 4, 64), weight, bias, EPS).view(12, 64), flat)
    apart = x.repeat(1, 2)[:, :64]
    assert not apart.is_contiguous() and torch.equal(dropout_add_layer_norm(apart, r, weight, bias, EPS), flat)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = dropout_add_layer_norm(x.bfloat16(), r, weight, bias, EPS)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), flat, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_z_is_written_only_for_a_backward_pass(p, kernel):
    x, r, weight, bias, _ = problem(5, 100)
    key = key_of(3) if p else None
    y, z, _ = module._forward(x, r, weight, bias, EPS, p, key, 1, 1, torch.bfloat16, True, False)
    without, empty, _ = module._forward(x, r, weight, bias, EPS, p, key, 1, 1, torch.bfloat16, False, False)
    assert z.shape == y.shape and empty.numel() == 0 and torch.equal(y, without)


def test_registered_as_an_operator(kernel):
    x, r, weight, bias, _ = problem(3, 16)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    for residual, p, key in ((r, 0.0, None), (None, 0.0, None), (r, 0.5, key_of(3))):
        for with_sum in (False, True):
            arguments = (x, residual, weight, bias, EPS, p, key, 1, 1, torch.bfloat16, True, with_sum)
            torch.library.opcheck(torch.ops.minidistil.dropout_add_layer_norm.default, arguments)


def test_one_graph_under_compile(kernel):
    x, r, weight, bias, dy = problem(3, 16)
    compiled = torch.compile(dropout_add_layer_norm, backend="aot_eager", fullgraph=True)
    for got, want in zip(run(compiled, x, r, weight, bias, dy), run(dropout_add_layer_norm, x, r, weight, bias, dy),
                         strict=True):  # fmt: skip
        assert torch.equal(got, want)


# ---- with the sum, the residual stream of a pre-norm block


@pytest.fixture(params=["kernel", "cpu"])
def path(request, monkeypatch):
    """Through Triton, and through PyTorch's LayerNorm."""
    if request.param == "kernel":
        pytest.importorskip("triton")
        if DEVICE == "cpu":
            monkeypatch.setenv("TRITON_INTERPRET", "1")
    elif DEVICE == "cuda":
        pytest.skip("the other path is for the CPU")
    return request.param


def both_ref(x, residual, weight, bias, eps, mask=1.0):
    """(y, z) by the definition; `mask` is 0 or 1 / (1 - p) where dropout is."""
    z = x * mask if residual is None else x * mask + residual
    return F.layer_norm(z, weight.shape, weight, bias, eps), z


def with_sum(x, residual, weight, bias, eps, **options):
    return dropout_add_layer_norm(x, residual, weight, bias, eps, with_sum=True, **options)


def run_both(function, x, residual, weight, bias, dy, g, **options):
    """{name: value} of y, z and the gradients, in fp64; dy or g may be None: y or z is not used further."""
    named = dict(x=x, residual=residual, weight=weight, bias=bias)
    leaves = {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}
    y, z = function(leaves["x"], leaves.get("residual"), leaves["weight"], leaves["bias"], EPS, **options)
    used = [(t, upstream.to(t.dtype)) for t, upstream in ((y, dy), (z, g)) if upstream is not None]
    outputs, upstream = zip(*used, strict=True)
    found = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    results = dict(zip((f"d{name}" for name in leaves), found, strict=True), y=y, z=z)
    for name, t in leaves.items():
        assert results[f"d{name}"] is None or results[f"d{name}"].dtype == t.dtype
    return {name: None if t is None else t.detach().double().cpu() for name, t in results.items()}


def check_both(x, residual, weight, bias, dy, g, floor, mask=None, **options):
    """Every result is that of fp64 to `floor` of its norm, and is missing where it is there."""
    wide = [None if t is None else t.double() for t in (x, residual, weight, bias, dy, g)]
    truth = run_both(both_ref, *wide, mask=1.0 if mask is None else mask.double())
    ours = run_both(with_sum, x, residual, weight, bias, dy, g, **options)
    assert truth.keys() == ours.keys()
    for name, want in truth.items():
        assert (ours[name] is None) == (want is None), name
        if want is not None and want.numel():
            assert ours[name].isfinite().all(), name
            error = (ours[name] - want).norm()
            assert error <= floor * want.norm() + 1e-12, f"{name}: {error:.2e} of {want.norm():.2e}"


def pre_norm_problem(N, C, dtype=torch.float32, residual=True, stream=torch.float32):
    x, r, weight, bias, dy = problem(N, C, dtype)
    g = torch.randn(N, C, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return x, r.to(stream) if residual else None, weight, bias, dy, g


USED = {"both": (True, True), "y": (True, False), "z": (False, True)}


@pytest.mark.parametrize("N, C", [(0, 16), (1, 3), (3, 7), (5, 64), (9, 100), (4, 768), (3, 1000), (2, 1024)])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("used", USED)
def test_with_the_sum_in_fp32(N, C, residual, used, path):
    *inputs, dy, g = pre_norm_problem(N, C, residual=residual)
    of_y, of_z = USED[used]
    check_both(*inputs, dy if of_y else None, g if of_z else None, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used", USED)
def test_with_the_sum_in_half_precision(dtype, stream, used, path):
    """The stream has its own dtype, and y that of x."""
    x, r, weight, bias, dy, g = pre_norm_problem(9, 768, dtype, stream=stream)
    y, z = with_sum(x, r, weight, bias, EPS)
    assert y.dtype == dtype and z.dtype == stream
    of_y, of_z = USED[used]
    floor = max(FLOOR[dtype], FLOOR[stream])
    check_both(x, r, weight, bias, dy if of_y else None, g if of_z else None, floor)


def test_the_stream_keeps_its_precision_under_autocast(path):
    """z is the sum in fp32, to the bit, and the gradient that arrives there goes on without rounding to bf16."""
    x, r, weight, bias, dy, g = pre_norm_problem(9, 100, torch.bfloat16)
    r.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y, z = with_sum(x, r, weight, bias, EPS)
        first, same = with_sum(r, None, weight, bias, EPS)
    assert y.dtype == first.dtype == torch.bfloat16 and z.dtype == same.dtype == torch.float32
    assert torch.equal(z, x.float() + r) and torch.equal(same, r)
    (dr,) = torch.autograd.grad([y, z], r, [torch.zeros_like(y), g])
    assert dr.dtype == torch.float32 and torch.equal(dr, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("used", USED)
def test_with_the_sum_and_dropout(dtype, residual, used, path):
    """One key gives one mask, forward and backward, whichever gradient arrives: that of z without a residual."""
    x, r, weight, bias, dy, g = pre_norm_problem(6, 100, dtype, residual)
    x, dy, g = (t.view(3, 2, 100) for t in (x, dy, g))
    r = None if r is None else r.view(3, 2, 100)
    options = dict(p=0.25, key=Key.of(12345, 4, torch.device(DEVICE)), site=7)
    mask = with_sum(torch.ones_like(x).float(), None, weight, bias, EPS, **options)[1]
    assert sorted(mask.unique().tolist()) == [0.0, pytest.approx(1 / 0.75)]
    of_y, of_z = USED[used]
    upstream = dy if of_y else None, g if of_z else None
    check_both(x, r, weight, bias, *upstream, {torch.float32: 3e-6, torch.bfloat16: 2**-6}[dtype], mask, **options)
    plain, (y, _) = (
        dropout_add_layer_norm(x, r, weight, bias, EPS, **options),
        with_sum(x, r, weight, bias, EPS, **options),
    )
    torch.testing.assert_close(y, plain, rtol=3e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-2)


def test_the_sum_without_gradients(path):
    x, r, weight, bias, *_ = pre_norm_problem(6, 100, torch.bfloat16)
    with torch.no_grad():
        y, z = with_sum(x, r, weight, bias, EPS, p=0.5, training=False)
        _, same = with_sum(x, None, weight, bias, EPS)
    assert torch.equal(z, x.float() + r) and same is x
    torch.testing.assert_close(y.float(), both_ref(x.float(), r, weight, bias, EPS)[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("used", USED)
def test_the_sum_is_in_one_graph_under_compile(used, path):
    """A graph has zeros for an output that is not used, and so for the gradients of weight and bias."""
    *inputs, dy, g = pre_norm_problem(3, 16, torch.bfloat16 if used == "both" else torch.float32)
    compiled = torch.compile(with_sum, backend="aot_eager", fullgraph=True)
    of_y, of_z = USED[used]
    upstream = dy if of_y else None, g if of_z else None
    want, got = (run_both(function, *inputs, *upstream) for function in (with_sum, compiled))
    for name in want:
        assert torch.equal(got[name], torch.zeros_like(got[name]) if want[name] is None else want[name]), name


@pytest.mark.parametrize("residual", [True, False])
def test_gradcheck_with_the_sum(residual):
    x, r, weight, bias, *_ = (None if t is None else t.cpu().double() for t in pre_norm_problem(3, 7))
    leaves = [t.requires_grad_() for t in ([x, r] if residual else [x]) + [weight, bias]]

    def function(x, *rest):
        *r, weight, bias = rest
        y, z = with_sum(x, r[0] if r else None, weight, bias, 1e-5)
        return y, z * 1.0  # z may be x itself

    assert torch.autograd.gradcheck(function, leaves)


def test_two_backward_passes_with_the_sum(path):
    x, r, weight, bias, dy, g = pre_norm_problem(5, 64)
    leaves = [t.requires_grad_() for t in (x, r, weight, bias)]
    results = with_sum(*leaves, EPS)
    first = torch.autograd.grad(results, leaves, (dy, g), retain_graph=True)
    second = torch.autograd.grad(results, leaves, (dy, g))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_pre_norm_model_by_kernel_and_by_pytorch(autocast, kernel, monkeypatch):
    """Two blocks of GPT-2: hidden states and all gradients."""
    config = Config(50, 8, 0, 2, 2, 24, 48, dropout=0.0, attention_dropout=0.0, family="gpt2")
    ids = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def results():
        model = LanguageModel(config, seed=0).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            y = model(ids)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, y.dtype))
        return [y.detach().double(), *(p.grad.to_dense().double() for p in model.encoder.parameters())]

    got = results()
    monkeypatch.setattr(module, "on_triton", lambda x: False)
    for a, b in zip(got, results(), strict=True):
        assert (a - b).norm() <= (3e-2 if autocast else 1e-5) * b.norm() + 1e-6


# ---- CPU


def test_gradients_of_the_weights_are_summed_in_fp32(monkeypatch):
    """PyTorch sums them in bf16 where the rows are bf16, which is 6 % off over so many."""
    monkeypatch.setattr(module, "on_triton", lambda x: False)
    x, r, dy = (torch.randn(2560, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        weight, bias = (torch.full((64,), value, requires_grad=True) for value in (1.0, 0.0))
        wide = dtype == torch.float64
        rows = [row.bfloat16().to(dtype) for row in (x, r)]
        weights = [w.double() if wide else w for w in (weight, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=not wide):
            y = dropout_add_layer_norm(*rows, *weights, EPS)
        assert y.dtype == dtype
        y.backward(dy.bfloat16().to(dtype))
        found.append([weight.grad, bias.grad])
    for truth, ours in zip(*found, strict=True):
        assert (truth - ours).norm() < 3e-3 * truth.norm()  # of rows rounded to bf16, which errs by 2e-3 at most


def test_without_a_kernel_it_is_pytorch():
    arguments = [t.cpu() for t in problem(9, 100)]
    for got, want in zip(run(dropout_add_layer_norm, *arguments), run(dropout_add_layer_norm_ref, *arguments),
                         strict=True):  # fmt: skip
        assert torch.equal(got, want)

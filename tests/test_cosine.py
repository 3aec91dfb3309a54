"""The cosine distance of hidden states: kernels (interpreted without a GPU) and CPU path against PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F

from kernels import cosine as module
from kernels.cosine import bytes_moved, cosine_distance, cosine_distance_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []


@pytest.fixture
def kernel(monkeypatch):
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def problem(N, C, dtype=torch.float32, scale=1.0, seed=0):
    """Rows a, and rows b that share half of their variance with them, as a student's and its teacher's do."""
    g = torch.Generator().manual_seed(seed)
    a, noise = (torch.randn(N, C, generator=g) for _ in range(2))
    return [(x * scale).to(DEVICE, dtype) for x in (a, (a + noise) / 2**0.5)]


def run(function, a, b, g=1.0):
    """[loss, da] in fp64, where g is the upstream gradient."""
    a = a.detach().requires_grad_()
    loss = function(a, b)
    (da,) = torch.autograd.grad(loss, a, torch.full_like(loss, g))
    assert loss.shape == () and da.shape == a.shape and da.dtype == a.dtype
    return [x.detach().double().cpu() for x in (loss, da)]


def usual(a, b):
    """The expression that the kernels replace."""
    return (1 - F.cosine_similarity(a.float(), b.float(), dim=-1)).sum()


def check_against_fp64(a, b, g=1.0):
    """Loss and gradient: at most twice the usual expression's error, plus the rounding of N distances and of da."""
    truth, ours = run(cosine_distance_ref, a.double(), b.double(), g), run(cosine_distance, a, b, g)
    torchs = run(usual, a, b, g)
    # da is a difference of two vectors of norm 1 / |a|, which nearly cancel where the rows are nearly parallel
    cancelled = 1e-6 * abs(g) * (1 / a.double().norm(dim=-1)).norm().cpu()
    floors = [5e-7 * len(a), FLOOR[a.dtype] * truth[1].norm() + cancelled]
    for want, got, other, floor in zip(truth, ours, torchs, floors, strict=True):
        assert got.isfinite().all()
        assert (got - want).norm() <= 2 * (other - want).norm() + floor


# da is stored in the dtype of a, and the interpreter truncates where a GPU rounds
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


# widths that are powers of two, three times one (768), neither, and below a group of eight
@pytest.mark.parametrize("N, C", [(0, 16), (1, 1), (3, 7), (5, 64), (9, 100), (6, 256), (4, 768), (3, 1000), (2, 1024)])
def test_fp32(N, C, kernel):
    check_against_fp64(*problem(N, C))


@pytest.mark.parametrize("C", [768, 100, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, C, kernel):
    check_against_fp64(*problem(9, C, dtype))


@pytest.mark.parametrize("a_dtype, b_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_the_dtypes_of_a_and_b_may_differ(a_dtype, b_dtype, kernel):
    a, b = problem(5, 768)
    check_against_fp64(a.to(a_dtype), b.to(b_dtype))


@pytest.mark.parametrize("g", [0.0, -2.5, 65536.0])
def test_upstream_gradient(g, kernel):
    check_against_fp64(*problem(5, 768), g)
    a, b = problem(5, 768)
    a.requires_grad_()
    total = g * cosine_distance(a, b) / 5 + a.sum()  # as a training step has it: scaled, and not the only term
    want = g / 5 * run(cosine_distance, a, b)[1] + 1
    torch.testing.assert_close(torch.autograd.grad(total, a)[0].double().cpu(), want, rtol=1e-5, atol=1e-6)


def test_the_loss_is_fp32_whatever_the_rows_are(kernel):
    """A sum of 300 distances in bf16 would have three digits."""
    a, b = problem(300, 8, torch.bfloat16)
    loss = cosine_distance(a, b)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), cosine_distance_ref(a.double(), b.double()), rtol=3e-6, atol=0)
    assert cosine_distance(a.double(), b).dtype == cosine_distance(a, b.double()).dtype == torch.float64


@pytest.mark.parametrize("zero", ["a", "b", "both"])
def test_zero_rows(zero, kernel):
    """Distance 1; the gradient is finite and PyTorch's. At |a| = 0 it is -b / (|b| eps)."""
    a, b = problem(4, 100)
    if zero in ("a", "both"):
        a[1] = 0
    if zero in ("b", "both"):
        b[1] = 0
    loss, da = run(cosine_distance, a, b)
    others = torch.tensor([0, 2, 3], device=DEVICE)
    assert loss - run(cosine_distance, a[others], b[others])[0] == pytest.approx(1.0, abs=1e-6)
    want = run(usual, a, b)[1]
    for row in range(4):
        torch.testing.assert_close(da[row], want[row], rtol=1e-5, atol=1e-6)
    assert (da[1] == 0).all() if zero != "a" else da[1].norm() == pytest.approx(1e8, rel=1e-5)


@pytest.mark.parametrize("norm_a", [1e-30, 1e-12, 1e-9, 9e-9, 1.1e-8, 1e-4, 1e15])
@pytest.mark.parametrize("norm_b", [1e-9, 1e-4, 1e15])
def test_tiny_and_huge_norms(norm_a, norm_b, kernel):
    """Norms on both sides of eps, and of which neither a product nor a quotient may leave the range of fp32."""
    a, b = (n * x / x.norm(dim=-1, keepdim=True) for n, x in zip((norm_a, norm_b), problem(3, 100), strict=True))
    (want_loss, want), (loss, da) = run(cosine_distance_ref, a.double(), b.double()), run(cosine_distance, a, b)
    torch.testing.assert_close(loss, want_loss, rtol=3e-6, atol=0)
    assert (da - want).norm() <= 3e-6 * want.norm()


def test_norms_at_the_end_of_the_range(kernel):
    """g / (m_a m_b) is 1e-43 and has three bits in fp32; the gradient is near 1e-24 and has all of them."""
    a, b = (1e19 * x / x.norm(dim=-1, keepdim=True) for x in problem(3, 100))
    want_loss, want = run(cosine_distance_ref, a.double(), b.double(), 1e-5)
    loss, da = run(cosine_distance, a, b, 1e-5)
    torch.testing.assert_close(loss, want_loss, rtol=3e-6, atol=0)
    assert (da - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("sign, distance", [(1, 0.0), (-1, 2.0)])
def test_identical_and_opposite_rows(sign, distance, dtype, kernel):
    """Distance 0 and 2; the gradient is zero at both."""
    a, _ = problem(8, 768, dtype)
    loss, da = run(cosine_distance, a, sign * a)
    assert loss.item() == pytest.approx(8 * distance, abs=8 * 1e-6)
    assert (da * a.double().cpu().norm(dim=-1, keepdim=True)).abs().max() < 1e-6


def test_the_distance_does_not_depend_on_norms(kernel):
    """Scaling the rows does not change the loss; scaling a by 4 divides the gradient by 4."""
    a, b = problem(5, 768)
    (loss, da), (scaled_loss, scaled_da) = run(cosine_distance, a, b), run(cosine_distance, 4 * a, 0.5 * b)
    torch.testing.assert_close(scaled_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled_da, da / 4, rtol=1e-5, atol=1e-8)
    assert (da * a.double().cpu()).sum(-1).abs().max() < 1e-6  # so the gradient is orthogonal to a


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where the interpreter multiplies inf by 0
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["a", "b"])
def test_nan_propagates(where, value, kernel):
    """The loss is NaN, and so is the gradient of that row; the gradients of the other rows are as ever."""
    a, b = problem(4, 100)
    want = run(cosine_distance, a, b)[1]
    (a if where == "a" else b)[2, 70] = value
    loss, da = run(cosine_distance, a, b)
    assert loss.isnan()
    assert da[2].isnan().all() if value != value else da[2].isnan().any()
    assert torch.equal(da[[0, 1, 3]], want[[0, 1, 3]])


@pytest.mark.parametrize("layout", ["padded", "every second row", "transposed", "one row for all", "one column"])
def test_strides(layout, kernel):
    """Rows may lie any distance apart; what lies between them is NaN and not read."""
    a, b = problem(6, 100)
    if layout == "one row for all":
        b = b[:1]
        apart = [a, b.expand(6, 100)]
        b = b.repeat(6, 1)
    else:
        apart = []
        for x in (a, b):
            nan = torch.full_like(x, float("nan"))
            if layout == "padded":
                apart.append(torch.cat([x, nan], 1)[:, :100])
            elif layout == "every second row":
                apart.append(torch.stack([x, nan], 1).flatten(0, 1)[::2])
            elif layout == "transposed":
                apart.append(x.t().contiguous().t())
            else:
                apart.append(torch.cat([x, nan], 1)[:, :1])
    if layout == "one column":
        a, b = a[:, :1].contiguous(), b[:, :1].contiguous()
    assert not all(x.is_contiguous() for x in apart)
    for pair in ((apart[0], b), (a, apart[1]), apart):
        for got, want in zip(run(cosine_distance, *pair), run(cosine_distance, a, b), strict=True):
            # wide loads, which a stride may allow or not, leave each thread other columns: sums of another order
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())


def test_a_as_one_row_for_all(kernel):
    """The gradient of an expanded tensor is summed by autograd, not written by the kernel to one row."""
    a, b = problem(6, 100)
    row = a[:1].clone().requires_grad_()
    (got,) = torch.autograd.grad(cosine_distance(row.expand(6, 100), b), row)
    want = run(cosine_distance, a[:1].repeat(6, 1), b)[1].sum(0, keepdim=True)
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-7)


def test_offsets_beyond_32_bits(kernel):
    """The third row begins 2^31 elements after the first; the memory between them is never touched."""
    if DEVICE == "cuda":
        pytest.skip("takes 4 GB of a GPU's memory")
    a, b = problem(3, 16, torch.bfloat16)
    try:
        far = torch.empty(2**31 + 16, dtype=torch.bfloat16).as_strided((3, 16), (2**30, 1)).copy_(a)
    except RuntimeError:
        pytest.skip("this machine refuses memory that is not there")
    for pair in ((far, b), (b, far)):
        near = [a if x is far else x for x in pair]
        for got, want in zip(run(cosine_distance, *pair), run(cosine_distance, *near), strict=True):
            assert torch.equal(got, want)


def test_same_bits_twice_inputs_untouched_nothing_left_unwritten(kernel, monkeypatch):
    arguments = problem(9, 100, torch.bfloat16)
    before = [x.clone() for x in arguments]
    first = run(cosine_distance, *arguments)
    # new memory is filled with NaN, so that an element which a kernel does not write would show
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        second = run(cosine_distance, *arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(before, arguments, strict=True))


def test_second_backward(kernel):
    a, b = problem(5, 100)
    loss = cosine_distance(a.requires_grad_(), b)
    first = torch.autograd.grad(loss, a, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, a)[0])


@pytest.mark.parametrize("path", ["kernel", "without"])
def test_refusals(path, request):
    if path == "kernel":
        request.getfixturevalue("kernel")
    a, b = problem(4, 16)
    for x, y in ((a, b[:3]), (a, b[:, :8]), (a, b[:1]), (a[0], b[0]), (a[None], b[None])):
        with pytest.raises(ValueError, match=r"must both be \(N, C\)"):
            cosine_distance(x, y)
    with pytest.raises(ValueError, match="frozen"):
        cosine_distance(a, b.requires_grad_())


def test_without_a_gradient(kernel):
    a, b = problem(4, 16)
    assert not cosine_distance(a, b).requires_grad
    with torch.no_grad():
        assert not cosine_distance(a.requires_grad_(), b).requires_grad


def test_autocast_changes_nothing(kernel):
    a, b = problem(4, 768, torch.bfloat16)
    plain = run(cosine_distance, a, b)
    with torch.autocast(DEVICE, torch.bfloat16):
        mixed = run(cosine_distance, a, b)
    assert all(torch.equal(x, y) for x, y in zip(plain, mixed, strict=True))


def test_registered_as_an_operator(kernel):
    a, b = problem(3, 16)
    operators = torch.ops.minidistil
    torch.library.opcheck(operators.cosine_distance.default, (a.bfloat16().requires_grad_(), b))
    for upstream in (torch.tensor(2.0, device=DEVICE), torch.ones(1, device=DEVICE).expand(1)[0]):
        arguments = (upstream, a.bfloat16()[:, :8], b[:, :8], torch.ones(3, 3, device=DEVICE))
        torch.library.opcheck(operators.cosine_distance_backward.default, arguments)


def test_one_graph_under_compile(kernel):
    """One node each way, and the same bits as without compilation."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    nodes = []

    def record(graph, inputs):
        nodes.append([str(n.target) for n in graph.graph.nodes if "minidistil" in str(n.target)])
        return make_boxed_func(graph)

    a, b = problem(3, 16)
    compiled = torch.compile(cosine_distance, backend=aot_autograd(fw_compiler=record), fullgraph=True)
    for got, want in zip(run(compiled, a, b, 3.0), run(cosine_distance, a, b, 3.0), strict=True):
        assert torch.equal(got, want)
    assert nodes == [["minidistil.cosine_distance.default"], ["minidistil.cosine_distance_backward.default"]]


def test_one_launch_each_way(kernel, monkeypatch):
    """And no forward launch is repeated by the backward pass."""
    launched = []

    def counted(name):
        launch = getattr(module, name)
        return type("Counted", (), {"__getitem__": lambda self, grid: lambda *arguments, **options: (
            launched.append((name, grid)), launch[grid](*arguments, **options)
        )})()  # fmt: skip

    for name in ("_forward_kernel", "_backward_kernel"):
        monkeypatch.setattr(module, name, counted(name))
    run(cosine_distance, *problem(5, 768))
    assert launched == [("_forward_kernel", (5,)), ("_backward_kernel", (5,))]


def test_bytes():
    assert bytes_moved(32768, 768, 2) == 10 * 32768 * 768


# ---- CPU


@pytest.mark.parametrize("a_dtype", FLOOR)
@pytest.mark.parametrize("b_dtype", FLOOR)
def test_without_a_kernel_it_is_the_usual_expression(a_dtype, b_dtype):
    a, b = (x.cpu() for x in problem(9, 100))
    a[1] = 0
    a, b = a.to(a_dtype), b.to(b_dtype)
    for got, want in zip(run(cosine_distance, a, b, 0.3), run(usual, a, b, 0.3), strict=True):
        assert torch.equal(got, want)


def test_gradcheck_in_fp64(kernel):
    a, b = (x.double() for x in problem(4, 11))
    assert torch.autograd.gradcheck(lambda a: cosine_distance(a, b), (a.requires_grad_(),))

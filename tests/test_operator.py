"""An operator is a plain call in eager mode and one node of the graph under torch.compile, with one gradient."""

import torch

from kernels.operator import differentiable, opaque

CALLS = []


def double(x: torch.Tensor, factor: float) -> torch.Tensor:
    CALLS.append("forward")
    return x * factor


def double_backward(dy: torch.Tensor, factor: float) -> torch.Tensor:
    CALLS.append("backward")
    return dy * factor


def setup_context(ctx, inputs, output):
    ctx.factor = inputs[1]


def backward(ctx, dy):
    return backward_operator(dy, ctx.factor), None


backward_operator = opaque("test_double_backward", double_backward, lambda dy, factor: torch.empty_like(dy))
operator = differentiable("test_double", double, lambda x, factor: torch.empty_like(x), setup_context, backward)


def dispatched(function):
    """Names of the operators of ours that PyTorch's dispatcher saw."""
    with torch.profiler.profile() as profiler:
        function()
    return {event.key for event in profiler.key_averages() if event.key.startswith("minidistil::")}


def value_and_gradient(function):
    x = torch.arange(4.0, requires_grad=True)
    y = function(x, 3.0)
    return y, *torch.autograd.grad(y.sum(), x)


def test_eager_mode_does_without_the_dispatcher():
    CALLS.clear()
    names = dispatched(lambda: value_and_gradient(operator))
    assert CALLS == ["forward", "backward"] and not names


def test_compiled_it_is_one_node_each_way():
    compiled = torch.compile(lambda x, factor: operator(x + 0, factor), backend="aot_eager", fullgraph=True)
    want = value_and_gradient(operator)
    found = value_and_gradient(compiled)
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
    names = dispatched(lambda: value_and_gradient(compiled))
    assert names >= {"minidistil::test_double", "minidistil::test_double_backward"}


def test_no_gradient_where_none_is_wanted():
    assert not operator(torch.ones(2), 2.0).requires_grad
    with torch.no_grad():
        assert not operator(torch.ones(2, requires_grad=True), 2.0).requires_grad

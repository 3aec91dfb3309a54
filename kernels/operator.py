"""Kernels as PyTorch operators: a plain call in eager mode, one node of the graph under torch.compile.

torch.compile cannot trace into the launch of a kernel, so `torch.library` registers each kernel as an opaque operator.
In eager mode the dispatch of such an operator costs the host about 70 us per call, more than the launch itself, so the
function is called directly, with an ordinary `torch.autograd.Function`.
"""

import torch


def traced(tensors):
    """Whether torch.compile is tracing: it says so in Python code; in the backward pass tensors are of other types."""
    return torch.compiler.is_compiling() or any(
        isinstance(x, torch.Tensor) and type(x) not in (torch.Tensor, torch.nn.Parameter) for x in tensors
    )


def _node(name, function, fake):
    node = torch.library.custom_op(f"minidistil::{name}", function, mutates_args=())
    node.register_fake(fake)
    return node


def opaque(name, function, fake):
    """Returns a callable with the arguments of `function`, into which torch.compile does not trace.

    fake(*arguments) returns uninitialised tensors of the shapes, dtypes and strides that `function` returns.
    """
    node = _node(name, function, fake)
    return lambda *inputs: (node if traced(inputs) else function)(*inputs)


def differentiable(name, function, fake, setup_context, backward):
    """Returns `function`, opaque to torch.compile, with a gradient: setup_context and backward are autograd's.

    backward(ctx, *upstream) may itself be traced: kernels that it launches must be `opaque`.
    """
    node = _node(name, function, fake)
    node.register_autograd(backward, setup_context=setup_context)

    def forward(ctx, *inputs):  # a separate setup_context costs 80 us: PyTorch binds its arguments by signature
        output = function(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = dict(forward=staticmethod(forward), backward=staticmethod(backward))
    eager = type(name, (torch.autograd.Function,), methods)

    def call(*inputs):
        if traced(inputs):
            return node(*inputs)
        return eager.apply(*inputs) if torch.is_grad_enabled() else function(*inputs)

    return call

"""A student narrower than its teacher: its start, and how the two are compared.

The teacher's word vectors are U S V^T. The C_s columns of V with the largest singular values keep most of them, and a
hidden state h of the teacher becomes h V. The narrow model computes in these directions what the wide one does:

    matrices that read hidden states     W -> W V       words, q, k, v and the MLP's first
    matrices that write them             W -> V^T W     attention's output and the MLP's second
    heads and units of the MLP           those stay that write most

LayerNorm alone knows no directions. Its weights become the root mean square of what they do along each, times what the
lost directions had of the length.

Hidden states of the student are compared in the teacher's width, h_s W^T, where W starts as V and is learnt beside the
student. Sentence vectors are compared in the student's width, with v_t V: angles between the student's own vectors are
what people use, and a W learnt beside them would take over a part of the distances that they should have.

Legend:  C_t, C_s width of teacher and student   V (C_t, C_s), orthonormal   D head width
"""

import dataclasses
import math

import torch

from minidistil.errors import UserError


def narrower(config, width):
    """Returns this Config `width` wide: its heads keep their width, its MLP its ratio. UserError unless heads fit."""
    D = config.width // config.heads
    if width < D or width % D or width >= config.width:
        raise UserError(f"--student-width {width}: give a multiple of {D}, a head's width, below {config.width}")
    shape = dict(width=width, heads=width // D, mlp_width=max(1, config.mlp_width * width // config.width))
    return dataclasses.replace(config, **shape)


def leading_directions(model, width):
    """Returns V (C_t, width) fp32: the right singular vectors of a model's word vectors, the largest first."""
    words = model.encoder.embeddings.words.weight.detach().double()
    return torch.linalg.eigh(words.T @ words)[1].flip(1)[:, :width].float().contiguous()  # eigh sorts upwards


@torch.no_grad()
def narrowed(model, width):
    """Returns a model of the same class, `width` wide, that computes what `model` does in its leading directions."""
    narrow = type(model)(narrower(model.config, width))
    wide, small, V = model.encoder.embeddings, narrow.encoder.embeddings, leading_directions(model, width)
    kept = (wide.words.weight @ V).norm() / wide.words.weight.norm() * math.sqrt(model.config.width / width)
    for name in ("words", "positions", "types"):
        if getattr(small, name) is not None:
            getattr(small, name).weight.copy_(getattr(wide, name).weight @ V)
    for wide_block, small_block in zip(model.encoder.blocks, narrow.encoder.blocks, strict=True):
        _narrow_attention(wide_block.attention, small_block.attention, V)
        _narrow_mlp(wide_block.mlp, small_block.mlp, V)
    if not (model.head is None or model.config.causal):
        narrow.head.dense.weight.copy_(V.T @ model.head.dense.weight @ V)
        narrow.head.dense.bias.copy_(model.head.dense.bias @ V)
        narrow.head.bias.copy_(model.head.bias)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    for name, norm in norms.items():
        of_narrow = narrow.get_submodule(name)
        of_narrow.weight.copy_(kept * (V.square() * norm.weight.square()[:, None]).sum(0).sqrt())
        of_narrow.bias.copy_(norm.bias @ V)
    return narrow


def _narrow_attention(wide, narrow, V):
    C, H = len(V), wide.heads
    q, k, v = wide.qkv.weight.view(3, H, -1, C)  # each (H, D, C)
    out = wide.out.weight.view(C, H, -1).transpose(0, 1)  # (H, C, D)
    heads = (out @ v).flatten(1).norm(dim=1).topk(narrow.heads).indices.sort().values
    narrow.qkv.weight.copy_(torch.cat([w[heads].flatten(0, 1) @ V for w in (q, k, v)]))
    narrow.qkv.bias.copy_(wide.qkv.bias.view(3, H, -1)[:, heads].flatten())
    narrow.out.weight.copy_(V.T @ out[heads].transpose(0, 1).flatten(1))
    narrow.out.bias.copy_(wide.out.bias @ V)


def _narrow_mlp(wide, narrow, V):
    strength = wide.up.weight.norm(dim=1) * wide.down.weight.norm(dim=0)
    units = strength.topk(narrow.up.out_features).indices.sort().values
    narrow.up.weight.copy_(wide.up.weight[units] @ V)
    narrow.up.bias.copy_(wide.up.bias[units])
    narrow.down.weight.copy_(V.T @ wide.down.weight[:, units])
    narrow.down.bias.copy_(wide.down.bias @ V)


class Projection(torch.nn.Module):
    """Between the widths of teacher and student; both parts are in checkpoints, none is saved with the student.

    weight: W (C_t, C_s) fp32, learnt, or None where no hidden states are compared. directions: V (C_t, C_s) fp32,
    fixed, or None where no vectors are. A student wider than its teacher has columns of zeros in both.
    """

    def __init__(self, teacher, student, of_states, of_vectors):
        super().__init__()
        C_s = student.config.width
        V = leading_directions(teacher, min(C_s, teacher.config.width))
        V = torch.nn.functional.pad(V, (0, C_s - V.shape[1]))
        self.weight = torch.nn.Parameter(V.clone()) if of_states else None
        self.directions = torch.nn.Parameter(V, requires_grad=False) if of_vectors else None


def to_teacher(student, h):
    """Returns h (..., C_s), hidden states of a student, in its teacher's width, (..., C_t)."""
    projection = getattr(student, "projection", None)
    return h if projection is None else torch.nn.functional.linear(h, projection.weight)


def to_student(student, v):
    """Returns v (..., C_t), vectors of a teacher, in its student's width, (..., C_s)."""
    projection = getattr(student, "projection", None)
    with torch.autocast(v.device.type, enabled=False):
        return v if projection is None else v @ projection.directions

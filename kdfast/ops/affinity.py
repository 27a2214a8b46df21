"""Op ``affinity``: y_i = 1/m Σ_j ReLU(a_i + b_j) g_j without the n x m matrix. Formula: :mod:`kdfast.reference.affinity`.

The keys that count for query i are those with b_j > -a_i: a prefix of the keys in descending order. With the queries in
ascending order, sums over that prefix only grow, G_i = Σ g_j and H_i = Σ b_j g_j, and y_i = (a_i G_i + H_i) / m.
Backward: da_i = <dy_i, G_i> / m, and the same sweep with the roles exchanged gives dg and db. Sorting takes
O(n log n + m log m), the sweeps O((n + m) e). Saved for the backward: the two orders.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..reference import affinity as reference
from . import _second
from ._define import define, kernel, new_gradients, reference_gradients


def new_result(a: Tensor, g: Tensor) -> Tensor:
    """[B, n, e], laid out as ``g`` is: neighbours along e, or along positions where those of ``g`` are closer."""
    batch, n, e = g.shape[0], a.shape[1], g.shape[2]
    if g.stride(1) < g.stride(2):
        return g.new_empty((batch, e, n)).mT
    return g.new_empty((batch, n, e))


def _fake(a, b, g):
    orders = (v.new_empty(v.shape, dtype=torch.int32) for v in (a, b))
    return new_result(a, g), *orders


def _fake_backward(grad, a, b, g, order_a, order_b, need_a, need_b, need_g):
    return new_gradients((a, b, g), (need_a, need_b, need_g))


def _reference(a, b, g):
    orders = (v.argsort(1).int() for v in (a, b))
    return new_result(a, g).copy_(reference.affinity(a, b, g)), *orders


def _reference_backward(grad, a, b, g, order_a, order_b, *needed):
    return reference_gradients(reference.affinity, (a, b, g), needed, (grad,))


define(
    "affinity",
    "(Tensor a, Tensor b, Tensor g) -> (Tensor out, Tensor order_a, Tensor order_b)",
    _fake,
    _reference,
    kernel("affinity", "affinity"),
)
define(
    "affinity_backward",
    "(Tensor grad, Tensor a, Tensor b, Tensor g, Tensor order_a, Tensor order_b, bool need_a, bool need_b, bool need_g)"
    " -> (Tensor grad_a, Tensor grad_b, Tensor grad_g)",
    _fake_backward,
    _reference_backward,
    kernel("affinity", "affinity_backward"),
)


class _Affinity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, g: Tensor, triton: bool) -> Tensor:
        op = torch.ops.kdfast.affinity_triton if triton else torch.ops.kdfast.affinity
        out, order_a, order_b = op(a, b, g)
        ctx.save_for_backward(a, b, g, order_a, order_b)
        ctx.triton = triton
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        a, b, g, order_a, order_b = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if _second.wanted():
            return *_second.gradients(reference.affinity, (a, b, g), needed, (grad,)), None
        op = torch.ops.kdfast.affinity_backward_triton if ctx.triton else torch.ops.kdfast.affinity_backward
        found = op(grad, a, b, g, order_a, order_b, *needed)
        return *(v if need else None for v, need in zip(found, needed, strict=True)), None


def affinity(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """[B, n, e] of a [B, n], b [B, m], g [B, m, e], one dtype; see :func:`kdfast.reference.affinity.affinity`."""
    chosen = backend.choose("affinity", g.device.type, ("triton",))
    if chosen == "reference":
        return reference.affinity(a, b, g)
    return _Affinity.apply(a, b, g, chosen == "triton")

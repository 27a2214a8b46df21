"""Op ``criss_cross``: attention over the own row and column. Formulas: :mod:`kdfast.reference.criss_cross`.

Saved for the backward: out, and the log-sum-exp of the scores [B, H, W], from which the weights are computed again.
With delta_p = <out_p, g_p> for the upstream gradient g,

    dL/dscore_pq = weight_pq (<g_p, value_q> - delta_p).

Both directions are a pass over rows and one over columns that adds to the results of the first. For half types, what
the first leaves is rounded to that type: at most one more rounding, of a part of the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..reference import criss_cross as reference
from ..reference._common import accumulator
from . import _second
from ._define import define, kernel, new_gradients, reference_gradients


def _fake(query, key, value):
    b, _, h, w = value.shape
    return torch.empty_like(value), value.new_empty((b, h, w), dtype=accumulator(value))


def _fake_backward(grad_out, query, key, value, out, lse, *needed):
    return new_gradients((query, key, value), needed)


def _reference(query, key, value):
    out, lse = reference.criss_cross(query, key, value)
    return torch.empty_like(value).copy_(out), lse


def _reference_backward(grad_out, query, key, value, out, lse, *needed):
    return reference_gradients(
        lambda *v: reference.criss_cross(*v)[0], (query, key, value), needed, (grad_out,)
    )


define(
    "criss_cross",
    "(Tensor query, Tensor key, Tensor value) -> (Tensor out, Tensor lse)",
    _fake,
    _reference,
    kernel("criss_cross", "criss_cross"),
)
define(
    "criss_cross_backward",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    " bool need_query, bool need_key, bool need_value)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _fake_backward,
    _reference_backward,
    kernel("criss_cross", "criss_cross_backward"),
)


class _CrissCross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, triton: bool) -> Tensor:
        op = torch.ops.kdfast.criss_cross_triton if triton else torch.ops.kdfast.criss_cross
        out, lse = op(query, key, value)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.triton = triton
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor):
        query, key, value, out, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if _second.wanted():
            found = _second.gradients(
                lambda *v: reference.criss_cross(*v)[0], (query, key, value), needed, (grad_out,)
            )
            return *found, None
        ops = torch.ops.kdfast
        op = ops.criss_cross_backward_triton if ctx.triton else ops.criss_cross_backward
        found = op(grad_out, query, key, value, out, lse, *needed)
        return *(g if need else None for g, need in zip(found, needed, strict=True)), None


def criss_cross(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention over the own row and column: [B, e, H, W], see :func:`kdfast.reference.criss_cross.criss_cross`.

    Differentiable in query, key and value, which share one type.
    """
    chosen = backend.choose("criss_cross", value.device.type, ("triton",))
    if chosen == "reference":
        return reference.criss_cross(query, key, value)[0]
    return _CrissCross.apply(query, key, value, chosen == "triton")

"""Op ``softmax_affinity``: y_i = Σ_j softmax_j(scale θ_i·φ_j) g_j. Formula: :mod:`kdfast.reference.affinity`.

In C++ flash attention: weights are made for a block of queries and a block of keys at a time, relative to the maximum so
far, and their results rescaled where it rises. The backward makes them again. With p the weights, dy the upstream
gradient and s the exponents,

    dp_ij = g_j·dy_i,    ds_ij = p_ij (dp_ij - y_i·dy_i),    dθ = scale φ dsᵀ,    dφ = scale θ ds,    dg = dy p.

Saved for the backward: the result and, per query, the maximum of scale log2(e) θ_i·φ_j over the keys and 1 / Σ_j of 2 to
what is left: two numbers, because the sum's logarithm would drown in a large maximum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backend
from ..reference import affinity as reference
from ..reference._common import accumulator, autocast_device
from . import _second
from ._define import define, new_gradients, reference_gradients
from .dot_product import new_result


def _fake(query, key, value, scale):
    saved = query.new_empty((query.shape[0], 2, query.shape[2]), dtype=accumulator(query, key, value))
    return new_result(query, value), saved


def _fake_backward(grad, query, key, value, out, saved, scale, *needed):
    return new_gradients((query, key, value), needed)


def _reference(query, key, value, scale):
    q, k, v = (x.to(accumulator(query, key, value)) for x in (query, key, value))
    exponents = (scale * math.log2(math.e)) * (q.mT @ k)  # [B, n, m]
    maxima = exponents.amax(2)
    inverses = 1 / torch.exp2(exponents - maxima[..., None]).sum(2)
    out = reference.softmax(q, k, v, scale)
    return new_result(query, value).copy_(out), torch.stack([maxima, inverses], 1)


def _reference_backward(grad, query, key, value, out, saved, scale, *needed):
    return reference_gradients(_dense(scale), (query, key, value), needed, (grad,))


def _dense(scale: float):
    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference.softmax(query, key, value, scale)

    return dense


define(
    "softmax_affinity",
    "(Tensor query, Tensor key, Tensor value, float scale) -> (Tensor out, Tensor saved)",
    _fake,
    _reference,
    None,
)
define(
    "softmax_affinity_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor saved, float scale,"
    " bool need_query, bool need_key, bool need_value)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _fake_backward,
    _reference_backward,
    None,
)


class _SoftmaxAffinity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, saved = torch.ops.kdfast.softmax_affinity(query, key, value, scale)
        ctx.save_for_backward(query, key, value, out, saved)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        query, key, value, out, saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if _second.wanted():
            return *_second.gradients(_dense(ctx.scale), (query, key, value), needed, (grad,)), None
        found = torch.ops.kdfast.softmax_affinity_backward(
            grad, query, key, value, out, saved, ctx.scale, *needed
        )
        return *(v if need else None for v, need in zip(found, needed, strict=True)), None


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same by PyTorch's scaled dot-product attention; differentiable once.

    Widths of keys and values are made equal with zeros, which change nothing, so that its backends without a matrix of
    all pairs can be picked.
    """
    width = max(query.shape[1], value.shape[1])
    # [B, 1, positions, width]: the backends read neighbours along the last axis.
    q, k, v = (_padded(x.mT, width).contiguous()[:, None] for x in (query, key, value))
    y = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return y[:, 0, :, : value.shape[1]].mT


def _padded(x: Tensor, width: int) -> Tensor:
    return x if x.shape[2] == width else F.pad(x, (0, width - x.shape[2]))


def softmax_affinity(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[B, e, n] of queries [B, d, n], keys [B, d, m] and values [B, e, m], one dtype."""
    device = query.device.type
    # On a GPU it is PyTorch's, whichever backend is asked for; autocast chooses its type.
    chosen = backend.choose("softmax_affinity", device, ("triton", "cuda"))
    if chosen != "cpu" or torch.is_autocast_enabled(autocast_device(query)):
        return attention(query, key, value, scale)
    return _SoftmaxAffinity.apply(query, key, value, scale)

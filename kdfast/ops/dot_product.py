"""Op ``dot_product``: y_i = 1/m Σ_j (θ_i·φ_j) g_j as linear attention. Formula: :mod:`kdfast.reference.affinity`.

y = w θ with w = g φᵀ / m of [B, e, d]. Backward, with dy for the upstream gradient,

    dw = dy θᵀ / m,    dθ = wᵀ dy,    dφ = dwᵀ g,    dg = dw φ.

In C++ each direction is a sweep over the keys and one over the queries that read every map once; elsewhere the products
are PyTorch's. Saved for the backward: w.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..reference._common import accumulator, autocast_device
from . import _second
from ._define import define, new_gradients, reference_gradients


def new_result(query: Tensor, value: Tensor) -> Tensor:
    """[B, e, n], neighbours along the axis that has them in the queries [B, d, n]."""
    batch, e, n = value.shape[0], value.shape[1], query.shape[2]
    if query.stride(1) < query.stride(2):
        return query.new_empty((batch, n, e)).mT
    return query.new_empty((batch, e, n))


def _scaled(x: Tensor, y: Tensor, factor: float) -> Tensor:
    if x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(autocast_device(x)):
        return (x @ y) * factor  # the backward scales the small matrix, where that of alpha scales both maps
    # alpha scales before the product is rounded to half precision.
    return torch.baddbmm(x.new_empty(1, 1, 1), x, y, beta=0, alpha=factor)


def linear(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, e, n] by PyTorch's products, laid out as the queries are; differentiable, any number of times."""
    if query.stride(1) < query.stride(2):  # channels are neighbours
        return (query.mT @ _scaled(key, value.mT, 1 / key.shape[2])).mT
    return _scaled(value, key.mT, 1 / key.shape[2]) @ query


def _fake(query, key, value):
    weight = query.new_empty(
        (value.shape[0], value.shape[1], query.shape[1]), dtype=accumulator(query, key, value)
    )
    return new_result(query, value), weight


def _fake_backward(grad, query, key, value, weight, *needed):
    return new_gradients((query, key, value), needed)


def _reference(query, key, value):
    dtype = accumulator(query, key, value)
    weight = _scaled(value.to(dtype), key.to(dtype).mT, 1 / key.shape[2])
    return new_result(query, value).copy_(weight @ query.to(dtype)), weight


def _reference_backward(grad, query, key, value, weight, *needed):
    return reference_gradients(linear, (query, key, value), needed, (grad,))


define(
    "dot_product",
    "(Tensor query, Tensor key, Tensor value) -> (Tensor out, Tensor weight)",
    _fake,
    _reference,
    None,
)
define(
    "dot_product_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor weight,"
    " bool need_query, bool need_key, bool need_value)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _fake_backward,
    _reference_backward,
    None,
)


class _DotProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, weight = torch.ops.kdfast.dot_product(query, key, value)
        ctx.save_for_backward(query, key, value, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        query, key, value, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if _second.wanted():
            return tuple(_second.gradients(linear, (query, key, value), needed, (grad,)))
        found = torch.ops.kdfast.dot_product_backward(grad, query, key, value, weight, *needed)
        return tuple(v if need else None for v, need in zip(found, needed, strict=True))


def dot_product(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, e, n] of queries [B, d, n], keys [B, d, m] and values [B, e, m], one dtype, laid out as the queries are."""
    device = query.device.type
    # On a GPU the products are PyTorch's, whichever backend is asked for; autocast chooses their type.
    chosen = backend.choose("dot_product", device, ("triton", "cuda"))
    if chosen != "cpu" or torch.is_autocast_enabled(autocast_device(query)):
        return linear(query, key, value)
    return _DotProduct.apply(query, key, value)

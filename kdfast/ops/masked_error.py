"""Ops ``masked_error``, the mean of mask * (x - y)², and ``area_mask``, its mask from boxes: L_DA.

One pass over both maps gives the value and, where the student alone learns, its gradient. Formulas:
:mod:`kdfast.reference.masked_error`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..reference import masked_error as reference
from ..reference._common import accumulator
from . import _early, _second
from ._define import define, kernel, reference_gradients


def _fake(x, y, mask):
    return x.new_empty((), dtype=accumulator(x, y))


def _fake_with_gradient(x, y, mask):
    return _fake(x, y, mask), torch.empty_like(x)


def _fake_backward(x, y, mask, grad):
    return torch.empty_like(x)


def _reference_backward(x, y, mask, grad):
    def call(x):
        return reference.masked_error(x, y, mask)

    return reference_gradients(call, (x,), (True,), (grad,))[0]


def _reference_with_gradient(x, y, mask):
    value = reference.masked_error(x, y, mask)
    return value, _reference_backward(x, y, mask, torch.ones_like(value))


def _reference_mask(boxes, height, width, multiplicity):
    return reference.area_mask(boxes, height, width, reference.MULTIPLICITIES[multiplicity])


def _fake_mask(boxes, height, width, multiplicity):
    return boxes.new_empty((boxes.shape[0], 1, height, width), dtype=torch.float32)


define(
    "area_mask",
    "(Tensor boxes, int height, int width, int multiplicity) -> Tensor",
    _fake_mask,
    _reference_mask,
    kernel("masked_error", "area_mask"),
)
define(
    "masked_error",
    "(Tensor x, Tensor y, Tensor mask) -> Tensor",
    _fake,
    reference.masked_error,
    kernel("masked_error", "masked_error"),
)
define(
    "masked_error_with_gradient",
    "(Tensor x, Tensor y, Tensor mask) -> (Tensor value, Tensor gradient)",
    _fake_with_gradient,
    _reference_with_gradient,
    kernel("masked_error", "masked_error_with_gradient"),
)
define(
    "masked_error_backward",
    "(Tensor x, Tensor y, Tensor mask, Tensor grad) -> Tensor",
    _fake_backward,
    _reference_backward,
    kernel("masked_error", "masked_error_backward"),
)


_with_gradient = torch.ops.kdfast.masked_error_with_gradient.default
_scale = kernel("masked_error", "scale")


class _MaskedError(torch.autograd.Function):
    """``early``: the forward, by Triton, leaves the gradient of x, which the first backward takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mask: Tensor, triton: bool, early: bool) -> Tensor:
        ctx.save_for_backward(x, y, mask)
        ctx.triton, ctx.gradient = triton, None
        if early:
            value, ctx.gradient = torch.ops.kdfast.masked_error_with_gradient_triton(x, y, mask)
            return value
        op = torch.ops.kdfast.masked_error_triton if triton else torch.ops.kdfast.masked_error
        return op(x, y, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        x, y, mask = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        needed = ctx.needs_input_grad[:2]
        if _second.wanted():

            def call(x, y):
                return reference.masked_error(x, y, mask)

            return *_second.gradients(call, (x, y), needed, (grad,)), None, None, None
        if gradient is not None:
            return _scale(gradient, grad), None, None, None, None
        backward = torch.ops.kdfast.masked_error_backward
        backward = torch.ops.kdfast.masked_error_backward_triton if ctx.triton else backward
        results = [
            backward(a, b, mask, grad) if need else None
            for a, b, need in ((x, y, needed[0]), (y, x, needed[1]))
        ]
        return *results, None, None, None


def masked_error(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Mean of mask * (x - y)² of maps x, y [B, C, H, W] and a mask [B, 1, H, W], which is a constant.

    Differentiable in x and y, any number of times.
    """
    if x.dtype != y.dtype:
        widest = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(widest), y.to(widest)
    mask = mask.detach().to(accumulator(x)).contiguous()
    if _early.wanted(x, y):
        return _early.loss(_with_gradient, reference.masked_error, x, (y, mask))
    chosen = backend.choose("masked_error", x.device.type, ("triton",))
    if chosen == "reference":
        return reference.masked_error(x, y, mask)
    triton = chosen == "triton"
    # Not in float16, where it could underflow before a loss scale multiplies it; not in a traced graph.
    early = triton and x.requires_grad and not y.requires_grad and torch.is_grad_enabled()
    early = early and x.dtype is not torch.float16 and not torch.compiler.is_compiling()
    return _MaskedError.apply(x, y, mask, triton, early)


def area_mask(boxes: Tensor, height: int, width: int, multiplicity: str) -> Tensor:
    """Float32 mask [B, 1, height, width] of boxes [B, K, 4]; see :func:`kdfast.reference.masked_error.area_mask`."""
    chosen = backend.choose("area_mask", boxes.device.type, ("triton",))
    if boxes.is_floating_point() or chosen == "reference":
        return reference.area_mask(boxes, height, width, multiplicity)
    number = reference.MULTIPLICITIES.index(multiplicity)
    op = torch.ops.kdfast.area_mask_triton if chosen == "triton" else torch.ops.kdfast.area_mask
    return op(boxes.long().contiguous(), height, width, number)

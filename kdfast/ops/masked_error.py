"""Ops ``masked_error``, the mean of mask * (x - y)², and ``area_mask``, its mask from boxes: L_DA on the CPU.

One pass over both maps gives the value and, where the student alone learns, its gradient. Formulas:
:mod:`kdfast.reference.masked_error`. On a GPU ``masked_distance`` does the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..reference import masked_error as reference
from ..reference._common import accumulator
from . import _early, _second
from ._define import define, reference_gradients


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
    None,
)
define("masked_error", "(Tensor x, Tensor y, Tensor mask) -> Tensor", _fake, reference.masked_error, None)
define(
    "masked_error_with_gradient",
    "(Tensor x, Tensor y, Tensor mask) -> (Tensor value, Tensor gradient)",
    _fake_with_gradient,
    _reference_with_gradient,
    None,
)
define(
    "masked_error_backward",
    "(Tensor x, Tensor y, Tensor mask, Tensor grad) -> Tensor",
    _fake_backward,
    _reference_backward,
    None,
)


_with_gradient = torch.ops.kdfast.masked_error_with_gradient.default


class _MaskedError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, mask)
        return torch.ops.kdfast.masked_error(x, y, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        x, y, mask = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if _second.wanted():

            def call(x, y):
                return reference.masked_error(x, y, mask)

            return *_second.gradients(call, (x, y), needed, (grad,)), None
        backward = torch.ops.kdfast.masked_error_backward
        results = [
            backward(a, b, mask, grad) if need else None
            for a, b, need in ((x, y, needed[0]), (y, x, needed[1]))
        ]
        return *results, None


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
    if backend.choose("masked_error", x.device.type, ()) == "reference":
        return reference.masked_error(x, y, mask)
    return _MaskedError.apply(x, y, mask)


def area_mask(boxes: Tensor, height: int, width: int, multiplicity: str) -> Tensor:
    """Float32 mask [B, 1, height, width] of boxes [B, K, 4]; see :func:`kdfast.reference.masked_error.area_mask`."""
    if (
        boxes.device.type != "cpu"
        or boxes.is_floating_point()
        or backend.choose("area_mask", "cpu", ()) == "reference"
    ):
        return reference.area_mask(boxes, height, width, multiplicity)
    number = reference.MULTIPLICITIES.index(multiplicity)
    return torch.ops.kdfast.area_mask(boxes.long().contiguous(), height, width, number)

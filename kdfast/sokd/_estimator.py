"""Gradients of a drawn policy: hard values forward, relaxed weights and straight-through magnitudes backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _inner(gradient: Tensor, difference: Tensor) -> Tensor:
    dtype = torch.float64 if difference.dtype == torch.float64 else torch.float32
    return (gradient.to(dtype) * difference.to(dtype)).sum()


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, changed: Tensor, kept: Tensor, weight: Tensor, taken: bool) -> Tensor:
        ctx.save_for_backward(changed, kept)
        ctx.taken, ctx.like = taken, weight
        chosen = changed if taken else kept
        return chosen.view_as(chosen)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):
        changed, kept = ctx.saved_tensors
        weight = None
        if ctx.needs_input_grad[2]:
            weight = _inner(grad, changed - kept).to(ctx.like)
        return grad if ctx.taken else None, None if ctx.taken else grad, weight, None


class _Magnitude(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, changed: Tensor, magnitude: Tensor) -> Tensor:
        ctx.like = magnitude
        return changed.view_as(changed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        return grad, grad.sum(dtype=dtype).to(ctx.like)


class _Valued(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):
        return grad, None


def valued(x: Tensor, value: Tensor) -> Tensor:
    """``value`` with the derivatives of x."""
    return _Valued.apply(x, value)


def choose(changed: Tensor, kept: Tensor, weight: Tensor, taken: bool) -> Tensor:
    """``changed`` if ``taken``, else ``kept``, exactly; d/d weight as of weight * changed + (1 - weight) * kept."""
    return _Choose.apply(changed, kept, weight, taken)


def straight_through(changed: Tensor, magnitude: Tensor) -> Tensor:
    """``changed``, whose derivative by ``magnitude`` counts as 1 in every element (Eq. 10)."""
    return _Magnitude.apply(changed, magnitude)

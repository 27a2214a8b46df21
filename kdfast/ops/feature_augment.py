"""Op ``feature_augment``: a chain of augmentations of a map in one read and one write.

Chains, random parts and formulas: :mod:`kdfast.reference.feature_augment`. The backward needs no input: every operation is
linear in the map but for the noise, which is added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..reference import feature_augment as reference
from ..reference.feature_augment import Plan
from ._define import define, kernel, reference_gradients


def _fake(x, steps, channels):
    return torch.empty_like(x)


def _reference(x, steps, channels):
    return torch.empty_like(x).copy_(reference.feature_augment(x, steps.tolist(), channels))


def _reference_backward(grad, steps, channels):
    def call(x):
        return reference.feature_augment(x, steps.tolist(), channels)

    return reference_gradients(call, (grad,), (True,), (grad,))[0]


define(
    "feature_augment",
    "(Tensor x, Tensor steps, Tensor channels) -> Tensor",
    _fake,
    _reference,
    kernel("feature_augment", "feature_augment"),
)
define(
    "feature_augment_backward",
    "(Tensor grad, Tensor steps, Tensor channels) -> Tensor",
    _fake,
    _reference_backward,
    kernel("feature_augment", "feature_augment_backward"),
)


_to_device = kernel("feature_augment", "channels_on_device")


class _FeatureAugment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: Tensor, channels: Tensor, triton: bool) -> Tensor:
        if triton and not torch.compiler.is_compiling():
            channels = _to_device(channels, x)  # once for both directions
        ctx.save_for_backward(steps, channels)
        ctx.triton = triton
        op = torch.ops.kdfast.feature_augment_triton if triton else torch.ops.kdfast.feature_augment
        return op(x, steps, channels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        steps, channels = ctx.saved_tensors
        if not grad.requires_grad:  # nothing will differentiate this
            return _adjoint(grad, steps, channels, ctx.triton), None, None, None
        return _Adjoint.apply(grad, steps, channels, ctx.triton), None, None, None


def _adjoint(grad: Tensor, steps: Tensor, channels: Tensor, triton: bool) -> Tensor:
    backward = torch.ops.kdfast.feature_augment_backward
    backward = torch.ops.kdfast.feature_augment_backward_triton if triton else backward
    return backward(grad, steps, channels)


class _Adjoint(torch.autograd.Function):
    """The backward is linear too: its own derivative is the chain without its noise."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, steps: Tensor, channels: Tensor, triton: bool) -> Tensor:
        ctx.save_for_backward(steps, channels)
        ctx.triton = triton
        return _adjoint(grad, steps, channels, triton)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        steps, channels = ctx.saved_tensors
        steps = steps[steps[:, 0] != reference.NOISE]
        return _FeatureAugment.apply(grad, steps, channels, ctx.triton), None, None, None


def feature_augment(x: Tensor, plan: Plan) -> Tensor:
    """Maps x [B, C, H, W] changed by a plan made for their size; see :func:`kdfast.reference.feature_augment.plan`.

    Differentiable in x, any number of times. The same plan gives the same result, bit for bit on one backend; backends
    differ by a few roundings.
    """
    if x.dim() != 4 or not x.is_floating_point() or plan.channels.shape[1] != x.shape[1]:
        raise ValueError(
            f"x: need floating point maps [B, {plan.channels.shape[1]}, H, W], got {list(x.shape)} {x.dtype}"
        )
    chosen = backend.choose("feature_augment", x.device.type, ("triton",))
    if chosen == "reference":
        return reference.feature_augment(x, *plan)
    steps = torch.tensor(plan.steps, dtype=torch.float64).view(-1, 7)
    return _FeatureAugment.apply(x, steps, plan.channels, chosen == "triton")

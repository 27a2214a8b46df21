"""Gradients that a forward on the CPU computes while its inputs are in cache: three passes over memory, not five.

``ctx.gradient`` holds the student's gradient of the loss from the forward to the first backward, which takes it; a
second backward (``retain_graph=True``) finds none and computes it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import backend
from . import _second


def wanted(student: Tensor, *others: Tensor | None) -> bool:
    """Whether the forward is to compute the gradient too: on ``cpu``, where the student alone needs one.

    Not in float16, where it could underflow before a loss scale multiplies it; not in a traced graph, which owns what
    it saves. At small sizes a step is as long as its Python: this comes before :func:`kdfast.backend.choose`.
    """
    if not (student.requires_grad and backend.is_cpu(student) and torch.is_grad_enabled()):
        return False
    for x in others:
        if x is not None and x.requires_grad:
            return False
    return student.dtype is not torch.float16 and not is_compiling()


def loss(
    op: Callable,
    reference: Callable,
    student: Tensor,
    tensors: tuple[Tensor | None, ...],
    settings: tuple = (),
    parts: bool = False,
) -> Any:
    """``reference(student, *tensors, *settings)``, differentiable in student, where :func:`wanted`.

    Args:
        op: of the same arguments; returns the loss, perhaps its parts, and its gradient.
        parts: return the parts after the loss; they have no gradient.
    """
    return _Early.apply(student, tensors, (op, reference, settings, parts))


class _Early(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, tensors: tuple[Tensor | None, ...], call: tuple):
        op, _, settings, parts = ctx.call = call
        value, *found, ctx.gradient = op(student, *tensors, *settings)
        ctx.save_for_backward(student, *tensors)
        if not parts:
            return value
        ctx.mark_non_differentiable(*found)
        return value, *found

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor):
        gradient, second = ctx.gradient, _second.wanted()
        if gradient is None or second:
            op, reference, settings, _ = ctx.call
            student, *tensors = ctx.saved_tensors
            if second:
                found = _second.gradients(
                    lambda s: reference(s, *tensors, *settings), (student,), (True,), (grad,)
                )
                return *found, None, None
            *_, gradient = op(student, *tensors, *settings)
        ctx.gradient = None
        # Reading a scalar of the CPU waits for nothing.
        return gradient if grad.item() == 1 else gradient.mul_(grad), None, None

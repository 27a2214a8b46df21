"""Gradients that a forward on the CPU computes while its inputs are in cache: three passes over memory, not five.

``ctx.gradient`` holds the student's gradient of the loss from the forward to the first backward, which takes it; a
second backward (``retain_graph=True``) finds none and computes it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wanted(chosen: str, student: Tensor, *others: Tensor | None) -> bool:
    """Whether the forward is to compute the gradient too: on ``cpu``, where the student alone needs one.

    Not in float16, where it could underflow before a loss scale multiplies it; not in a traced graph, which owns what
    it saves.
    """
    return (
        chosen == "cpu"
        and student.requires_grad
        and student.dtype is not torch.float16
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(x is None or not x.requires_grad for x in others)
    )


def take(ctx: Any, grad: Tensor) -> Tensor | None:
    """The gradient that the forward left, times the incoming one (a CPU scalar: reading it waits for nothing)."""
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None or grad.item() == 1:
        return gradient
    return gradient.mul_(grad)

"""Op ``direction``: agreement of rows with the class mean of their label. Formulas: :mod:`kdfast.reference.direction`.

Saved for the backward: factors [B, 3] and the weights' total, from which every gradient is a sum of two rows,

    dL/ds_i = (f_0 c_i + f_1 s_i) / total,    dL/dt_i = f_2 t_i / total.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..kernels import rows_cuda
from ..reference import direction as reference
from ..reference._common import accumulator
from . import _early, _second
from ._define import define, kernel, new_gradients, reference_gradients


def _fake(student, teacher, centers, labels, ignore_index, balanced):
    dtype = accumulator(student, teacher, centers)
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty((student.shape[0], 3), dtype=dtype),
        student.new_empty((), dtype=dtype),
    )


def _fake_backward(grad, student, teacher, *arguments):
    return new_gradients((student, teacher), arguments[-2:])


def _reference(student, teacher, centers, labels, ignore_index, balanced):
    loss = reference.direction(student, teacher, centers, labels, ignore_index, balanced)
    return loss, loss.new_zeros((student.shape[0], 3)), loss.new_ones(())


def _reference_backward(grad, student, teacher, centers, labels, factors, total, *arguments):
    *settings, need_student, need_teacher = arguments

    def call(student, teacher):
        return reference.direction(student, teacher, centers, labels, *settings)

    return reference_gradients(call, (student, teacher), (need_student, need_teacher), (grad,))


def _fake_with_gradient(student, teacher, centers, labels, ignore_index, balanced, weight):
    loss = student.new_empty((), dtype=accumulator(student, teacher, centers))
    return loss, torch.empty_like(student)


def _weighted(student, teacher, centers, labels, ignore_index, balanced, weight):
    return weight * reference.direction(student, teacher, centers, labels, ignore_index, balanced)


def _reference_with_gradient(student, *arguments):
    loss = _weighted(student, *arguments)
    one = torch.ones_like(loss)
    return loss, *reference_gradients(lambda s: _weighted(s, *arguments), (student,), (True,), (one,))


define(
    "direction",
    "(Tensor student, Tensor? teacher, Tensor centers, Tensor? labels, int ignore_index, bool balanced)"
    " -> (Tensor loss, Tensor factors, Tensor total)",
    _fake,
    _reference,
    kernel("direction", "direction"),
)
define(
    "direction_with_gradient",
    "(Tensor student, Tensor? teacher, Tensor centers, Tensor? labels, int ignore_index, bool balanced, float weight)"
    " -> (Tensor loss, Tensor grad_student)",
    _fake_with_gradient,
    _reference_with_gradient,
    None,
)
define(
    "direction_backward",
    "(Tensor grad, Tensor student, Tensor? teacher, Tensor centers, Tensor? labels, Tensor factors, Tensor total,"
    " int ignore_index, bool balanced, bool need_student, bool need_teacher)"
    " -> (Tensor grad_student, Tensor grad_teacher)",
    _fake_backward,
    _reference_backward,
    kernel("direction", "direction_backward"),
)


class _Direction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        centers: Tensor,
        labels: Tensor | None,
        ignore_index: int,
        balanced: bool,
        triton: bool,
    ) -> Tensor:
        op = torch.ops.kdfast.direction_triton if triton else torch.ops.kdfast.direction
        loss, factors, total = op(student, teacher, centers, labels, ignore_index, balanced)
        ctx.save_for_backward(student, teacher, centers, labels, factors, total)
        ctx.flags, ctx.triton = (ignore_index, balanced), triton
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        student, teacher, centers, labels, factors, total = ctx.saved_tensors
        need_student, need_teacher = ctx.needs_input_grad[:2]
        if _second.wanted():
            found = _second.gradients(
                lambda s, t: reference.direction(s, t, centers, labels, *ctx.flags),
                (student, teacher),
                (need_student, need_teacher),
                (grad,),
            )
            return *found, None, None, None, None, None
        op = torch.ops.kdfast.direction_backward_triton if ctx.triton else torch.ops.kdfast.direction_backward
        grad_student, grad_teacher = op(
            grad, student, teacher, centers, labels, factors, total, *ctx.flags, need_student, need_teacher
        )
        grad_student = grad_student if need_student else None
        return grad_student, grad_teacher if need_teacher else None, None, None, None, None, None


_with_gradient = torch.ops.kdfast.direction_with_gradient.default


def direction(
    student: Tensor,
    teacher: Tensor | None,
    centers: Tensor,
    labels: Tensor | None,
    *,
    ignore_index: int = -100,
    balanced: bool = False,
    weight: float = 1.0,
) -> Tensor:
    """``weight`` times the weighted mean of 1 - <s, e> / max(|s|, |t|), see :func:`kdfast.reference.direction.direction`.

    Differentiable in student, teacher and centers; centres that need a gradient are the reference's job.
    A label outside [0, K) raises on the CPU; in the GPU kernels, which read no memory for it, it makes the loss NaN.
    """
    if _early.wanted(student, teacher, centers):
        settings = (ignore_index, balanced, weight)
        return _early.loss(_with_gradient, _weighted, student, (teacher, centers, labels), settings)
    chosen = backend.choose(
        "direction",
        student.device.type,
        rows_cuda.order(student),
        partial(_unsupported, student, teacher, centers),
    )
    if chosen == "reference":
        loss = reference.direction(student, teacher, centers, labels, ignore_index, balanced)
    else:
        loss = _Direction.apply(student, teacher, centers, labels, ignore_index, balanced, chosen == "triton")
    # At small sizes a product costs more than the op's arithmetic.
    return loss if weight == 1 else weight * loss


def _unsupported(student: Tensor, teacher: Tensor | None, centers: Tensor, name: str) -> str | None:
    if centers.requires_grad and torch.is_grad_enabled():
        return "class means that need a gradient run on 'reference' only"
    return rows_cuda.unsupported(student, teacher, centers) if name == "cuda" else None

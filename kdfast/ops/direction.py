"""Op ``direction``: agreement of rows with the class mean of their label. Formulas: :mod:`kdfast.reference.direction`.

Saved for the backward: factors [B, 3] and the weights' total, from which every gradient is a sum of two rows,

    dL/ds_i = (f_0 c_i + f_1 s_i) / total,    dL/dt_i = f_2 t_i / total.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..reference import direction as reference
from . import _second
from ._define import define


def _fake(student, teacher, centers, labels, ignore_index, balanced):
    dtype = _accumulator(student, teacher, centers)
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty((student.shape[0], 3), dtype=dtype),
        student.new_empty((), dtype=dtype),
    )


def _accumulator(student: Tensor, teacher: Tensor | None, centers: Tensor) -> torch.dtype:
    wide = student.dtype == torch.float64 or centers.dtype == torch.float64
    wide = wide or (teacher is not None and teacher.dtype == torch.float64)
    return torch.float64 if wide else torch.float32


def _fake_backward(
    grad,
    student,
    teacher,
    centers,
    labels,
    factors,
    total,
    ignore_index,
    balanced,
    need_student,
    need_teacher,
):
    return (
        torch.empty_like(student) if need_student else student.new_empty(0),
        torch.empty_like(teacher) if need_teacher else student.new_empty(0),
    )


def _reference(student, teacher, centers, labels, ignore_index, balanced):
    loss = reference.direction(student, teacher, centers, labels, ignore_index, balanced)
    return loss, loss.new_zeros((student.shape[0], 3)), loss.new_ones(())


def _reference_backward(
    grad,
    student,
    teacher,
    centers,
    labels,
    factors,
    total,
    ignore_index,
    balanced,
    need_student,
    need_teacher,
):
    with torch.enable_grad():
        rows = [
            v.detach().requires_grad_() if need else v
            for v, need in ((student, need_student), (teacher, need_teacher))
        ]
        loss = reference.direction(*rows, centers, labels, ignore_index, balanced)
        needed = [v for v, need in zip(rows, (need_student, need_teacher), strict=True) if need]
        found = iter(torch.autograd.grad(loss, needed, grad, materialize_grads=True))
    return tuple(
        torch.empty_like(v).copy_(next(found)) if need else student.new_empty(0)
        for v, need in ((student, need_student), (teacher, need_teacher))
    )


def _triton(*args):
    from ..kernels import direction as kernels

    return kernels.direction(*args)


def _triton_backward(*args):
    from ..kernels import direction as kernels

    return kernels.direction_backward(*args)


define(
    "direction",
    "(Tensor student, Tensor? teacher, Tensor centers, Tensor? labels, int ignore_index, bool balanced)"
    " -> (Tensor loss, Tensor factors, Tensor total)",
    _fake,
    _reference,
    _triton,
)
define(
    "direction_backward",
    "(Tensor grad, Tensor student, Tensor? teacher, Tensor centers, Tensor? labels, Tensor factors, Tensor total,"
    " int ignore_index, bool balanced, bool need_student, bool need_teacher)"
    " -> (Tensor grad_student, Tensor grad_teacher)",
    _fake_backward,
    _reference_backward,
    _triton_backward,
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


def direction(
    student: Tensor,
    teacher: Tensor | None,
    centers: Tensor,
    labels: Tensor | None,
    *,
    ignore_index: int = -100,
    balanced: bool = False,
) -> Tensor:
    """Weighted mean of 1 - <s, e> / max(|s|, |t|): a scalar, see :func:`kdfast.reference.direction.direction`.

    Differentiable in student, teacher and centers; centres that need a gradient are the reference's job.
    A label outside [0, K) raises on the CPU; in the Triton kernels, which read no memory for it, it makes the loss NaN.
    """
    learned = torch.is_grad_enabled() and centers.requires_grad
    chosen = backend.choose("direction", student.device.type, ("triton",), _unsupported if learned else None)
    if chosen == "reference":
        return reference.direction(student, teacher, centers, labels, ignore_index, balanced)
    return _Direction.apply(student, teacher, centers, labels, ignore_index, balanced, chosen == "triton")


def _unsupported(name: str) -> str | None:
    return None if name == "reference" else "class means that need a gradient run on 'reference' only"

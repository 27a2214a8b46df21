"""Op ``logits``: losses on [..., K] logits and labels. Kinds and formulas: :mod:`kdfast.reference.logits`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..reference import logits as reference
from ..reference.logits import KINDS
from . import _second
from ._define import define

DIST = KINDS.index("dist")
# Saved for the backward: per row maxima and log-sums of both sides and the value (kl, dkd), two more (nkd, dist);
# per class five column statistics (dist).
ROW_WIDTH = (5, 5, 7, 7)
COLUMN_WIDTH = 5


def saved_size(student: Tensor, kind: int) -> int:
    classes = student.shape[-1]
    rows = student.numel() // classes if classes else 0
    return rows * ROW_WIDTH[kind] + (COLUMN_WIDTH * classes if kind == DIST else 0)


def _accumulator(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def _fake(student, teacher, labels, kind, alpha, beta, temperature, ignore_index):
    dtype = _accumulator(student, teacher)
    return student.new_empty((), dtype=dtype), student.new_empty((saved_size(student, kind),), dtype=dtype)


def _fake_triton(student, teacher, labels, kind, *settings):
    loss, saved = _fake(student, teacher, labels, kind, *settings)
    return loss, saved.new_empty((saved.shape[0] + 1,))


def _fake_backward(
    grad,
    student,
    teacher,
    labels,
    saved,
    kind,
    alpha,
    beta,
    temperature,
    ignore_index,
    need_student,
    need_teacher,
):
    return (
        torch.empty_like(student) if need_student else student.new_empty(0),
        torch.empty_like(teacher) if need_teacher else teacher.new_empty(0),
    )


def _reference(student, teacher, labels, kind, *settings):
    loss = reference.logits(student, teacher, labels, kind, *settings)
    return loss, loss.new_zeros((saved_size(student, kind),))


def _reference_backward(grad, student, teacher, labels, saved, *arguments):
    *settings, need_student, need_teacher = arguments
    with torch.enable_grad():
        student = student.detach().requires_grad_(need_student)
        teacher = teacher.detach().requires_grad_(need_teacher)
        loss = reference.logits(student, teacher, labels, *settings)
        needed = [v for v, need in ((student, need_student), (teacher, need_teacher)) if need]
        found = iter(torch.autograd.grad(loss, needed, grad, materialize_grads=True))
    results = []
    for v, need in ((student, need_student), (teacher, need_teacher)):
        results.append(torch.empty_like(v).copy_(next(found)) if need else v.new_empty(0))
    return tuple(results)


def _triton(*args):
    from ..kernels import logits as kernels

    return kernels.logits(*args)


def _triton_backward(*args):
    from ..kernels import logits as kernels

    return kernels.logits_backward(*args)


define(
    "logits",
    "(Tensor student, Tensor teacher, Tensor? labels, int kind, float alpha, float beta, float temperature,"
    " int ignore_index) -> (Tensor loss, Tensor saved)",
    _fake,
    _reference,
    _triton,
    _fake_triton,
)
define(
    "logits_backward",
    "(Tensor grad, Tensor student, Tensor teacher, Tensor? labels, Tensor saved, int kind, float alpha, float beta,"
    " float temperature, int ignore_index, bool need_student, bool need_teacher)"
    " -> (Tensor grad_student, Tensor grad_teacher)",
    _fake_backward,
    _reference_backward,
    _triton_backward,
)


def _dist_unsupported(name: str) -> str | None:
    return "kind 'dist' has no Triton kernels" if name == "triton" else None


_UNSUPPORTED = (None, None, None, _dist_unsupported)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor | None, settings: tuple, triton: bool
    ) -> Tensor:
        op = torch.ops.kdfast.logits_triton if triton else torch.ops.kdfast.logits
        loss, saved = op(student, teacher, labels, *settings)
        ctx.save_for_backward(student, teacher, labels, saved)
        ctx.settings, ctx.triton = settings, triton
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        student, teacher, labels, saved = ctx.saved_tensors
        need_student, need_teacher = ctx.needs_input_grad[:2]
        if _second.wanted():
            found = _second.gradients(
                lambda s, t: reference.logits(s, t, labels, *ctx.settings),
                (student, teacher),
                (need_student, need_teacher),
                (grad,),
            )
            return *found, None, None, None
        op = torch.ops.kdfast.logits_backward_triton if ctx.triton else torch.ops.kdfast.logits_backward
        grad_student, grad_teacher = op(
            grad, student, teacher, labels, saved, *ctx.settings, need_student, need_teacher
        )
        return (
            grad_student if need_student else None,
            grad_teacher if need_teacher else None,
            None,
            None,
            None,
        )


def logits(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    kind: str = "kl",
    alpha: float = 0.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Loss of logits [..., K] of any strides, differentiable in both; see :func:`kdfast.reference.logits.logits`."""
    settings = (KINDS.index(kind), float(alpha), float(beta), float(temperature), ignore_index)
    chosen = backend.choose("logits", student.device.type, ("triton",), _UNSUPPORTED[settings[0]])
    if chosen == "reference":
        return reference.logits(student, teacher, labels, *settings)
    return _Logits.apply(student, teacher, labels, settings, chosen == "triton")

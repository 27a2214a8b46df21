"""Op ``logits``: losses on [..., K] logits and labels. Kinds and formulas: :mod:`kdfast.reference.logits`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..kernels import rows_cuda
from ..reference import logits as reference
from ..reference._common import accumulator
from ..reference.logits import KINDS
from . import _early, _second
from ._define import define, kernel, new_gradients, reference_gradients

DIST = KINDS.index("dist")
# Saved for the backward: per row maxima and log-sums of both sides and the value (kl, dkd), two more (nkd, dist);
# per class five column statistics (dist).
ROW_WIDTH = (5, 5, 7, 7)
COLUMN_WIDTH = 5


def saved_size(student: Tensor, kind: int) -> int:
    classes = student.shape[-1]
    rows = student.numel() // classes if classes else 0
    return rows * ROW_WIDTH[kind] + (COLUMN_WIDTH * classes if kind == DIST else 0)


def _fake(student, teacher, labels, kind, *settings, on_gpu=None):
    # On a GPU also 1 over the number of rows that count.
    share = student.device.type == "cuda" if on_gpu is None else on_gpu
    # torch 2.11 fails where a bool is added to a symbolic size.
    dtype, size = accumulator(student, teacher), saved_size(student, kind) + int(share)
    return student.new_empty((), dtype=dtype), student.new_empty((size,), dtype=dtype)


def _fake_triton(*args):
    return _fake(*args, on_gpu=True)


def _fake_backward(grad, student, teacher, *arguments):
    return new_gradients((student, teacher), arguments[-2:])


def _reference(student, teacher, labels, kind, *settings):
    loss = reference.logits(student, teacher, labels, kind, *settings)
    return loss, loss.new_zeros((saved_size(student, kind),))


def _reference_backward(grad, student, teacher, labels, saved, *arguments):
    *settings, need_student, need_teacher = arguments

    def call(student, teacher):
        return reference.logits(student, teacher, labels, *settings)

    return reference_gradients(call, (student, teacher), (need_student, need_teacher), (grad,))


def _fake_with_gradient(student, teacher, *arguments):
    return student.new_empty((), dtype=accumulator(student, teacher)), torch.empty_like(student)


def _reference_with_gradient(student, teacher, *arguments):
    loss = reference.logits(student, teacher, *arguments)
    (gradient, _) = reference_gradients(
        lambda s, t: reference.logits(s, t, *arguments),
        (student, teacher),
        (True, False),
        (torch.ones_like(loss),),
    )
    return loss, gradient


define(
    "logits",
    "(Tensor student, Tensor teacher, Tensor? labels, int kind, float alpha, float beta, float temperature,"
    " int ignore_index) -> (Tensor loss, Tensor saved)",
    _fake,
    _reference,
    kernel("logits", "logits"),
    _fake_triton,
)
define(
    "logits_with_gradient",
    "(Tensor student, Tensor teacher, Tensor? labels, int kind, float alpha, float beta, float temperature,"
    " int ignore_index) -> (Tensor loss, Tensor grad_student)",
    _fake_with_gradient,
    _reference_with_gradient,
    None,
)
define(
    "logits_backward",
    "(Tensor grad, Tensor student, Tensor teacher, Tensor? labels, Tensor saved, int kind, float alpha, float beta,"
    " float temperature, int ignore_index, bool need_student, bool need_teacher)"
    " -> (Tensor grad_student, Tensor grad_teacher)",
    _fake_backward,
    _reference_backward,
    kernel("logits", "logits_backward"),
)


def _unsupported(student: Tensor, teacher: Tensor, name: str) -> str | None:
    return rows_cuda.unsupported(student, teacher) if name == "cuda" else None


_with_gradient = torch.ops.kdfast.logits_with_gradient.default


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        settings: tuple,
        triton: bool,
    ) -> Tensor:
        ctx.settings, ctx.triton = settings, triton
        op = torch.ops.kdfast.logits_triton if triton else torch.ops.kdfast.logits
        loss, saved = op(student, teacher, labels, *settings)
        ctx.save_for_backward(student, teacher, labels, saved)
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
    if _early.wanted(student, teacher):
        return _early.loss(_with_gradient, reference.logits, student, (teacher, labels), settings)
    chosen = backend.choose(
        "logits", student.device.type, rows_cuda.order(student), partial(_unsupported, student, teacher)
    )
    if chosen == "reference":
        return reference.logits(student, teacher, labels, *settings)
    return _Logits.apply(student, teacher, labels, settings, chosen == "triton")

"""Triton backend of the op ``logits``. Formulas: :mod:`kdfast.reference.logits`.

kl, dkd, nkd: the forward reads each logit once (online log-sum-exp per lane, joined at the end); where rows are few,
several programs share a row, and the launch that adds up the loss joins them. The backward has one program per block of
a row: it reads once more and writes the gradient. dist is in :mod:`kdfast.kernels.logits_dist`. Nothing synchronises,
sums have a fixed order. Launches: forward 2, backward 1 for each side.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, joined, next_power_of_2, on_device, options
from .logits_rows import backward_rows, finish, finish_rows, forward_rows

DIST = 3
ROW_WIDTH = (5, 5, 7, 7)  # saved per row
BACKWARD_BLOCK = 1024
# Forward, by bytes of a logit: steps and lanes of a tile, warps. Four loads of 16 bytes and more in flight per thread.
FORWARD_TILE = {2: (2, 2048, 8), 4: (4, 1024, 8), 8: (1, 512, 8)}
# Programs that the forward is split into where there are fewer rows (fixed, so that sums do not depend on the GPU).
PROGRAMS = 1024
JOINED = 1024  # splits that the one program of finish_rows joins at a time


def _rows(v: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Where row r lies: (inner rows, outer stride, inner stride, stride of classes); copies beyond two row axes."""
    if v.dim() == 1:
        v = v[None]
    axes = joined(v.shape[:-1], v.stride()[:-1])
    if len(axes) > 2:
        return _rows(v.contiguous())
    (_, outer), (size, inner) = ((1, 0),) * (2 - len(axes)) + axes
    return v, (size, outer, inner, v.stride(-1))


def _block(classes: int, most: int, wide: bool) -> dict[str, int]:
    most, share = (
        (most // 4, 64) if wide else (most, 256)
    )  # of a warp: float64's exponentials take many registers
    block = min(most, max(16, next_power_of_2(classes)))
    return {"BLOCK": block, **options(max(1, min(8, block // share)))}


def _splits(c: _Call) -> tuple[int, int, dict[str, int]]:
    """Parts of a row in the forward, classes of a part, and the tile of :func:`forward_rows`."""
    size = 8 if c.wide else max(c.student.element_size(), c.teacher.element_size())
    steps, lanes, warps = FORWARD_TILE[size]
    needed = max(16, next_power_of_2(c.classes))
    if needed < lanes:  # 128 logits and more for each warp
        lanes, warps = needed, max(1, min(warps, needed // 128))
    steps = max(1, min(steps, needed // lanes))
    block = steps * lanes
    most = min(PROGRAMS // max(c.rows, 1), c.classes // block)
    splits = 1 if most < 2 else 1 << (most.bit_length() - 1)
    chunk = cdiv(cdiv(c.classes, splits), block) * block
    return splits, chunk, {"STEPS": steps, "LANES": lanes, **options(warps)}


class _Call:
    """Shapes, labels and constants that both directions share."""

    def __init__(self, student, teacher, labels, kind, alpha, beta, temperature, ignore_index) -> None:
        self.kind, self.alpha, self.beta = kind, alpha, beta
        self.inverse_t, self.ignore_index = 1 / temperature, ignore_index
        self.wide = torch.float64 in (student.dtype, teacher.dtype)
        self.dtype = torch.float64 if self.wide else torch.float32
        self.classes = student.shape[-1]
        self.rows = student.numel() // self.classes
        self.student, self.shape_s = _rows(student)
        self.teacher, self.shape_t = _rows(teacher)
        self.labels = student if labels is None else labels.contiguous()
        self.constants = {
            "kind": kind,
            "has_labels": labels is not None,
            "plain": kind == 2 and temperature != 1,
            "width": ROW_WIDTH[kind],
            "acc": tl.float64 if self.wide else tl.float32,
        }


def _dist():
    from . import logits_dist  # which needs this module

    return logits_dist


def logits(student: Tensor, teacher: Tensor, labels: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
    """Implementation of ``kdfast::logits_triton``: the loss, and what the backward needs, last the share.

    ``settings`` are those of :func:`kdfast.reference.logits.logits`.
    """
    c = _Call(student, teacher, labels, *settings)
    columns = 5 * c.classes if c.kind == DIST else 0
    loss = student.new_empty((), dtype=c.dtype)
    saved = student.new_empty((c.rows * c.constants["width"] + columns + 1,), dtype=c.dtype)
    with on_device(student):
        if c.kind == DIST:
            _dist().forward(c, loss, saved)
            return loss, saved
        splits, chunk, tile = _splits(c)
        values = student.new_empty((c.rows * (1 if splits == 1 else 7 * splits),), dtype=c.dtype)
        if c.rows:
            forward_rows[(c.rows, splits)](
                c.student, c.teacher, c.labels, saved, values, c.shape_s, c.shape_t, c.classes, chunk, c.alpha, c.beta,
                c.inverse_t, c.ignore_index, SPLITS=splits, **c.constants, **tile,
            )  # fmt: skip
        if splits > 1:
            finish_rows[(1,)](
                c.student, c.teacher, c.labels, saved, values, loss, saved[-1:], c.shape_s, c.shape_t, c.rows,
                c.classes, c.alpha, c.beta, c.inverse_t, c.ignore_index, SPLITS=splits,
                ROWS=max(1, min(JOINED // splits, next_power_of_2(c.rows))), **c.constants, **options(8),
            )  # fmt: skip
            return loss, saved
        finish[(1,)](
            values, c.labels, loss, saved[-1:], c.rows, c.ignore_index, 0, has_labels=labels is not None,
            acc=c.constants["acc"], BLOCK=1024, **options(4),
        )  # fmt: skip
    return loss, saved


def logits_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, labels: Tensor | None, saved: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Implementation of ``kdfast::logits_backward_triton``; arguments: settings, need_student, need_teacher."""
    *settings, need_student, need_teacher = arguments
    c = _Call(student, teacher, labels, *settings)
    results = []
    for v, need, is_teacher in ((student, need_student, False), (teacher, need_teacher, True)):
        if not need:
            results.append(v.new_empty(0))
            continue
        result = torch.empty_like(v)
        results.append(result)
        if not c.rows:
            continue
        to, shape_to = _rows(result)
        constants = c.constants | {"plain": c.constants["plain"] and not is_teacher}
        block = _block(c.classes, BACKWARD_BLOCK, c.wide)
        with on_device(student):
            if c.kind == DIST:
                _dist().backward(c, grad, saved, to, shape_to, is_teacher)
            else:
                backward_rows[(c.rows, cdiv(c.classes, block["BLOCK"]))](
                    grad, c.student, c.teacher, c.labels, saved, saved[-1:], to, c.shape_s, c.shape_t, shape_to,
                    c.classes, c.alpha, c.beta, c.inverse_t, c.ignore_index, teacher=is_teacher, **constants, **block,
                )  # fmt: skip
        if to.data_ptr() != result.data_ptr():  # more than two row axes
            result.copy_(to.view_as(result))
    return results[0], results[1]

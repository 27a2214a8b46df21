"""Triton backend of the op ``direction``.

Bytes: forward 3 B D elements read once (class means lie in the cache), backward 2 B D read and B D written. Forward:
one launch for the rows, one program that adds up the programs' parts in a fixed order; backward: one launch.
A class-balanced weight is 1 / (rows of the same class), which every program counts over all labels: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.direction import NORM_FLOOR
from ._jit import jit
from ._launch import cdiv, next_power_of_2, on_device, options

# Elements of one input that a program holds, half in float64 (the AOT tests see no register spilled), and its warps.
# One warp needs no barrier to add up a row, and three inputs are enough bytes in flight.
FORWARD_TILE, FORWARD_WARPS = 1024, 1
BACKWARD_TILE, BACKWARD_WARPS = 2048, 4
FINISH_BLOCK, FINISH_WARPS = 1024, 8
SQUARE_FLOOR = tl.constexpr(NORM_FLOOR**2)
LABELS = tl.constexpr(256)  # labels compared at a time, for the weights


@triton.jit
def _length(square):
    zero = square <= SQUARE_FLOOR  # False for NaN, which stays NaN
    return tl.where(zero, 0.0, tl.sqrt(tl.where(zero, 1.0, square)))


@triton.jit
def _centers_of(labels_ptr, label_stride, rows, ok, classes, ignore_index, LABELLED: tl.constexpr):
    """Centre of each row, whether it counts, and whether its label is out of range."""
    if LABELLED:
        label = tl.load(labels_ptr + rows * label_stride, ok, other=0)
        counts = ok & (label != ignore_index)
        wrong = counts & ((label < 0) | (label >= classes))
        return tl.where(counts & (wrong == 0), label, 0), counts, wrong
    return rows, ok, rows < 0


@jit(do_not_specialize=["ignore_index"])
def forward_rows(
    s_ptr, s_row, s_col, t_ptr, t_row, t_col, c_ptr, c_row, c_col, labels_ptr, label_stride,
    factors_ptr, parts_ptr, rows, columns, classes, ignore_index,
    TEACHER: tl.constexpr, LABELLED: tl.constexpr, BALANCED: tl.constexpr, ACC: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Factors [rows, 3] of the gradients, and per program the sums of weights and of weighted distances."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = row < rows
    center, counts, wrong = _centers_of(labels_ptr, label_stride, row, ok, classes, ignore_index, LABELLED)
    dot, ss = tl.zeros([BR, BC], ACC), tl.zeros([BR, BC], ACC)
    tt, cc = tl.zeros([BR, BC], ACC), tl.zeros([BR, BC], ACC)
    for start in range(0, columns, BC):
        col = (start + tl.arange(0, BC)).to(tl.int64)
        # Only the centre waits for the label; rows that do not count are read for nothing.
        mask = ok[:, None] & (col < columns)[None, :]
        s = tl.load(s_ptr + row[:, None] * s_row + col[None, :] * s_col, mask, other=0.0).to(ACC)
        if TEACHER:
            t = tl.load(t_ptr + row[:, None] * t_row + col[None, :] * t_col, mask, other=0.0).to(ACC)
            tt += t * t
        c = tl.load(c_ptr + center[:, None] * c_row + col[None, :] * c_col, mask, other=0.0).to(ACC)
        dot += s * c
        ss += s * s
        cc += c * c
    read = counts & (wrong == 0)
    cosine = tl.where(read, tl.sum(dot, 1), 0.0)
    student, teacher = (
        _length(tl.where(read, tl.sum(ss, 1), 0.0)),
        _length(tl.where(read, tl.sum(tt, 1), 0.0)),
    )
    length = _length(tl.where(read, tl.sum(cc, 1), 0.0))
    counts = counts & ((length != 0) | wrong)
    of_student = student >= teacher
    longest = tl.where(of_student, student, teacher)
    dead = (longest == 0) | (length == 0)
    inverse = tl.where(dead, 0.0, 1 / tl.where(dead, 1.0, longest))
    center_inverse = tl.where(dead, 0.0, 1 / tl.where(dead, 1.0, length))
    cosine = cosine * center_inverse * inverse
    distance = tl.where(wrong, float("nan"), 1 - cosine)
    weight = tl.where(counts, 1.0, 0.0).to(ACC)
    if BALANCED:
        size = tl.zeros([BR], tl.int32)
        for start in range(0, rows, LABELS):
            other = start + tl.arange(0, LABELS)
            label = tl.load(labels_ptr + other.to(tl.int64) * label_stride, other < rows, other=-1)
            same = (label[None, :] == center[:, None]) & (label != ignore_index)[None, :]
            size += tl.sum(same.to(tl.int32), 1)
        weight = weight / tl.maximum(size, 1).to(ACC)
    own = cosine * inverse * inverse * weight
    tl.store(factors_ptr + row * 3, -center_inverse * inverse * weight, ok)
    tl.store(factors_ptr + row * 3 + 1, tl.where(of_student, own, 0.0), ok)
    tl.store(factors_ptr + row * 3 + 2, tl.where(of_student, 0.0, own), ok)
    tl.store(parts_ptr + tl.program_id(0) * 2, tl.sum(weight, 0))
    tl.store(parts_ptr + tl.program_id(0) * 2 + 1, tl.sum(tl.where(counts, weight * distance, 0.0), 0))


@jit
def finish(parts_ptr, loss_ptr, total_ptr, parts, ACC: tl.constexpr, BLOCK: tl.constexpr):
    weight, value = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        weight += tl.load(parts_ptr + part * 2, part < parts, other=0.0)
        value += tl.load(parts_ptr + part * 2 + 1, part < parts, other=0.0)
    total = tl.sum(weight, 0)
    total = tl.where(total == 0, 1.0, total)
    mean = tl.sum(value, 0) / total
    tl.store(loss_ptr, tl.where(mean < 0, 0.0, mean))
    tl.store(total_ptr, total)


@jit(do_not_specialize=["ignore_index"])
def backward_rows(
    grad_ptr, total_ptr, factors_ptr, s_ptr, s_row, s_col, t_ptr, t_row, t_col, c_ptr, c_row, c_col,
    labels_ptr, label_stride, gs_ptr, gs_row, gs_col, gt_ptr, gt_row, gt_col, rows, columns, classes, ignore_index,
    LABELLED: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr, ACC: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = row < rows
    scale = tl.load(grad_ptr).to(ACC) / tl.load(total_ptr)
    center, counts, wrong = _centers_of(labels_ptr, label_stride, row, ok, classes, ignore_index, LABELLED)
    f0 = scale * tl.load(factors_ptr + row * 3, ok, other=0.0)
    f1 = scale * tl.load(factors_ptr + row * 3 + 1, ok, other=0.0)
    f2 = scale * tl.load(factors_ptr + row * 3 + 2, ok, other=0.0)
    for start in range(0, columns, BC):
        col = (start + tl.arange(0, BC)).to(tl.int64)
        mask = ok[:, None] & (col < columns)[None, :]
        # A factor that is 0 leaves its row unread.
        if STUDENT:
            c_mask, s_mask = mask & (f0 != 0)[:, None], mask & (f1 != 0)[:, None]
            c = tl.load(c_ptr + center[:, None] * c_row + col[None, :] * c_col, c_mask, other=0.0).to(ACC)
            s = tl.load(s_ptr + row[:, None] * s_row + col[None, :] * s_col, s_mask, other=0.0).to(ACC)
            gradient = f0[:, None] * c + f1[:, None] * s
            tl.store(gs_ptr + row[:, None] * gs_row + col[None, :] * gs_col, gradient, mask)
        if TEACHER:
            t_mask = mask & (f2 != 0)[:, None]
            t = tl.load(t_ptr + row[:, None] * t_row + col[None, :] * t_col, t_mask, other=0.0).to(ACC)
            tl.store(gt_ptr + row[:, None] * gt_row + col[None, :] * gt_col, f2[:, None] * t, mask)


def _tile(rows: int, columns: int, acc: tl.dtype, tile: int, warps: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, its warps. Few rows per program: there are seldom many."""
    tile //= 2 if acc == tl.float64 else 1
    bc = min(next_power_of_2(max(columns, 16)), 1024, tile)
    br = max(1, min(tile // bc, 4 if rows <= 4096 else 16))
    return br, bc, warps if br * bc >= 1024 else min(warps, 2)


def _labels(labels: Tensor | None, student: Tensor) -> tuple[Tensor, int]:
    return (student, 0) if labels is None else (labels, labels.stride(0))


def direction(
    student: Tensor,
    teacher: Tensor | None,
    centers: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    balanced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implementation of ``kdfast::direction_triton``; the reference says what it computes."""
    acc = _acc(student, teacher, centers)
    dtype = torch.float64 if acc is tl.float64 else torch.float32
    (rows, columns), classes = student.shape, centers.shape[0]
    loss, total = student.new_empty((), dtype=dtype), student.new_empty((), dtype=dtype)
    factors = student.new_empty((rows, 3), dtype=dtype)
    br, bc, warps = _tile(rows, columns, acc, FORWARD_TILE, FORWARD_WARPS)
    programs = cdiv(rows, br)
    parts = student.new_empty((programs, 2), dtype=dtype)
    t = student if teacher is None else teacher
    with on_device(student):
        if programs:
            forward_rows[(programs,)](
                student, *student.stride(), t, *t.stride(), centers, *centers.stride(), *_labels(labels, student),
                factors, parts, rows, columns, classes, ignore_index,
                teacher is not None, labels is not None, balanced, acc, br, bc, **options(warps),
            )  # fmt: skip
        finish[(1,)](parts, loss, total, programs, acc, FINISH_BLOCK, **options(FINISH_WARPS))
    return loss, factors, total


def direction_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    centers: Tensor,
    labels: Tensor | None,
    factors: Tensor,
    total: Tensor,
    ignore_index: int,
    balanced: bool,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """Implementation of ``kdfast::direction_backward_triton``."""
    need_teacher = need_teacher and teacher is not None
    (rows, columns), t = student.shape, student if teacher is None else teacher
    grad_student = torch.empty_like(student) if need_student else student.new_empty(0)
    grad_teacher = torch.empty_like(t) if need_teacher else student.new_empty(0)
    gs, gt = grad_student if need_student else student, grad_teacher if need_teacher else t
    acc = _acc(student, teacher, centers)
    br, bc, warps = _tile(rows, columns, acc, BACKWARD_TILE, BACKWARD_WARPS)
    if rows and (need_student or need_teacher):
        with on_device(student):
            backward_rows[(cdiv(rows, br),)](
                grad, total, factors, student, *student.stride(), t, *t.stride(), centers, *centers.stride(),
                *_labels(labels, student), gs, *gs.stride(), gt, *gt.stride(),
                rows, columns, centers.shape[0], ignore_index,
                labels is not None, need_student, need_teacher, acc, br, bc,
                **options(warps),
            )  # fmt: skip
    return grad_student, grad_teacher


def _acc(student: Tensor, teacher: Tensor | None, centers: Tensor) -> tl.dtype:
    wide = torch.float64 in [v.dtype for v in (student, teacher, centers) if v is not None]
    return tl.float64 if wide else tl.float32

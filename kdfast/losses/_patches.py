"""What the losses on patches share: how two maps are cut alike, and their patch matrices compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..ops.patch_gram import patch_gram, row_inter_distance
from ..reference.patch_gram import AVERAGES, Grid, view
from ._common import check_choice, check_pair, describe, total

Average = Literal["channel", "batch", "spatial"]
Resize = Literal["bilinear", "pad", "crop", "none"]
PatchSize = int | tuple[int, int]

RESIZES = ("bilinear", "pad", "crop", "none")


def check_patches(patch_size: PatchSize, resize: str) -> tuple[int, int]:
    """The patch as (height, width)."""
    check_choice("resize", resize, RESIZES)
    pair = patch_size if isinstance(patch_size, Sequence) else (patch_size, patch_size)
    if len(pair) != 2 or not all(isinstance(p, int) and p > 0 for p in pair):
        raise ValueError(f"patch_size: need a positive int or a pair of them, got {patch_size!r}")
    return tuple(pair)


def check_maps(student: Tensor, teacher: Tensor, same_channels: bool) -> None:
    check_pair(student, teacher)
    both = f"got student {describe(student)}, teacher {describe(teacher)}"
    if student.dim() != 4 or teacher.dim() != 4:
        raise ValueError(f"student and teacher need maps [B, C, H, W], {both}")
    if same_channels and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher need equally many channels, {both}; adapt the student by a 1 x 1 conv"
        )
    if not student.numel() or not teacher.numel():
        raise ValueError(f"student and teacher must not be empty, {both}")


def grid_of(
    student: Tensor, teacher: Tensor, patch: tuple[int, int], resize: str, average: str = "channel"
) -> Grid:
    """The patches of both maps; each is resized to its own multiple of the patch, and these must agree."""
    counts = []
    for v in (student, teacher):
        sizes = list(zip(v.shape[2:], patch, strict=True))
        if resize == "none" and any(size % p for size, p in sizes):
            raise ValueError(
                f"resize='none': H x W must be multiples of the patch {patch[0]} x {patch[1]}, got student "
                f"{describe(student)}, teacher {describe(teacher)}"
            )
        counts.append([size // p if resize == "crop" else -(-size // p) for size, p in sizes])
    if counts[0] != counts[1]:
        raise ValueError(
            f"student and teacher need equally many patches of {patch[0]} x {patch[1]}, got {counts[0]} from student "
            f"{describe(student)} and {counts[1]} from teacher {describe(teacher)}"
        )
    if 0 in counts[0]:
        raise ValueError(
            f"resize='crop': the patch {patch[0]} x {patch[1]} is larger than student {describe(student)} or teacher "
            f"{describe(teacher)}"
        )
    return Grid(*patch, *counts[0], resize == "bilinear", AVERAGES.index(average))


def patch_pair_distance(
    student: Tensor,
    teacher: Tensor,
    grid: Grid,
    intra_weight: float,
    inter_weight: float,
    centered: bool,
    row_norm: str,
) -> Tensor:
    """Weighted intra and inter distances of the patch matrices of two maps, averaged over the groups: a scalar."""
    compare, cosine = "cka_row" if row_norm == "row" else "cka", row_norm == "cosine"
    if inter_weight and row_norm == "none":  # both terms in one call
        _, distance = patch_gram(student, teacher, grid, centered=centered, inter=True)
        intra, inter = distance.float().mean(1)
        return intra_weight * intra + inter_weight * inter
    terms = []
    if intra_weight or not inter_weight:
        _, distance = patch_gram(student, teacher, grid, compare=compare, centered=centered, cosine=cosine)
        terms.append(intra_weight * distance.float().mean())
    if inter_weight:
        _, rows, features = grid.matrices(student)
        if row_norm == "row" and features > rows:
            distance = row_inter_distance(view(student, grid), view(teacher, grid), centered)
        else:
            _, distance = patch_gram(
                student, teacher, grid, compare=compare, centered=centered, cosine=cosine, transposed=True
            )
        terms.append(inter_weight * distance.float().mean())
    return total(terms)


def constant(x: Tensor, value: float) -> Tensor:
    """A float32 scalar that hangs on the graph of ``x``, so that backward through it gives zeros."""
    return x[..., :0].sum(dtype=torch.float32) + value

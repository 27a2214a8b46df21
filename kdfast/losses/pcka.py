"""Losses on feature maps: patch-wise CKA, other distillers on patches, mimic (Zhou et al., IJCAI 2024)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, mse_loss

from ..reference.patch_gram import AVERAGES, Grid, patches, resize
from ._common import Levels, Loss, check_choice, describe, levels, total, wide
from ._patches import (
    Average,
    PatchSize,
    Resize,
    check_maps,
    check_patches,
    constant,
    grid_of,
    patch_pair_distance,
)
from .gram import GramMMDLoss, RowNorm, pair_distance

_warned = False


def _warn_once(rows: str, student: Tensor) -> None:
    global _warned
    if _warned or torch.compiler.is_compiling():
        return
    _warned = True
    warnings.warn(
        f"PCKALoss: a level has {rows} (student {describe(student)}). Centred Grams of one or two rows carry no "
        "information: the intra term is a constant there, without gradient. Leave the level out, use smaller patches "
        "or centered=False. This is said once.",
        stacklevel=4,
    )


class PCKALoss(Loss):
    """Patch-wise CKA of feature maps (Zhou et al., IJCAI 2024, Eq. 8, with the sign that is minimised).

    A map [B, C, H, W] is resized to multiples of the patch and cut into N patches. Each group (a channel, an image or a
    pixel of the patch) then has a matrix of N rows; 1 - CKA of student and teacher is averaged over the groups.

    Args:
        patch_size: int or (height, width). None: no patches; rows are the images, features the pixels of a channel.
        average: what is averaged over (Table 5): ``"channel"`` (features: images x pixels of a patch), ``"batch"``
            (channels x pixels) or ``"spatial"`` (images x channels); or a sequence, one per level ("mix-up").
        intra_weight: factor on the comparison of patches (rows).
        inter_weight: factor on the comparison of features (columns); student and teacher then need equal features.
        centered: subtract each feature's mean over the patches (inter: each patch's mean over the features). False is
            Theorem 1 as printed, and the published code.
        row_norm: see :func:`kdfast.linear_cka`. The inter term with ``"row"`` runs in plain PyTorch where features
            outnumber rows, through N x N products; it keeps a few copies of the maps.
        resize: ``"bilinear"`` up to the next multiple of the patch (published), ``"pad"`` with zeros at the lower and
            right edges, ``"crop"`` there, or ``"none"``: sizes must be multiples.
        weight: γ, factor on the value. Published configurations use 10 or 15.

    Shape: student and teacher [B, C, H, W], or sequences of such levels, whose losses are summed. H x W, the type of
        numbers, and with ``"batch"`` or ``"spatial"`` (intra only) C may differ, but not the number of patches.
        Differentiable in both. A centred level of one patch contributes ``intra_weight``, one of two patches 0, both
        without gradient (its inter term stays); a warning says so once per process.

    Raises:
        ValueError, TypeError: levels, axes, channels or numbers of patches that do not match.
    """

    def __init__(
        self,
        *,
        patch_size: PatchSize | None = 16,
        average: Average | Sequence[Average] = "channel",
        intra_weight: float = 1.0,
        inter_weight: float = 0.0,
        centered: bool = True,
        row_norm: RowNorm = "none",
        resize: Resize = "bilinear",
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        check_choice("row_norm", row_norm, ("none", "row", "cosine"))
        for a in [average] if isinstance(average, str) else average:
            check_choice("average", a, AVERAGES)
            if patch_size is None and a != "channel":
                raise ValueError(f"average: patch_size=None averages over channels only, got {a!r}")
        pair = check_patches(1 if patch_size is None else patch_size, resize)
        self.patch_size = None if patch_size is None else pair
        self.average = average if isinstance(average, str) else tuple(average)
        self.intra_weight, self.inter_weight = intra_weight, inter_weight
        self.centered, self.row_norm, self.resize = centered, row_norm, resize

    def forward(self, student: Levels, teacher: Levels) -> Tensor:
        pairs = levels(student, teacher)
        averages = [self.average] * len(pairs) if isinstance(self.average, str) else self.average
        if len(averages) != len(pairs):
            raise ValueError(f"average: need one per level, got {len(averages)} for {len(pairs)} levels")
        terms = [self._level(s, t, average) for (s, t), average in zip(pairs, averages, strict=True)]
        return self.weight * total(terms)

    def _level(self, student: Tensor, teacher: Tensor, average: str) -> Tensor:
        check_maps(student, teacher, same_channels=average == "channel" or self.inter_weight != 0)
        settings = (self.intra_weight, self.inter_weight, self.centered, self.row_norm)
        if self.patch_size is None:
            rows, unit = student.shape[0], "image"
            if self.inter_weight and student.shape != teacher.shape:
                raise ValueError(
                    f"inter_weight: student and teacher need maps of one size, got student {describe(student)}, "
                    f"teacher {describe(teacher)}"
                )
        else:
            grid = grid_of(student, teacher, self.patch_size, self.resize, average)
            rows, unit = grid.rows * grid.columns, f"patch of {grid.patch_h} x {grid.patch_w}"
        if self.centered and rows <= 2 and (self.intra_weight or not self.inter_weight):
            _warn_once(f"{rows} {unit}", student)
            if not self.inter_weight:
                return self.intra_weight * constant(student, float(rows == 1))
        if self.patch_size is not None:
            return patch_pair_distance(student, teacher, grid, *settings)
        return pair_distance(
            *(v.permute(1, 0, 2, 3)[:, :, None, None] for v in (student, teacher)), *settings
        )


class PatchLoss(Loss):
    """Other distillers on the patches of PCKA (Zhou et al., IJCAI 2024, Table 7, as the published code computes them).

    With X_c the N x (B P) matrix of channel c (patches x pixels of all images), means over the C channels:

    Args:
        base: ``"kd"``: T²/N Σ_rows KL(softmax(Y_c / T) | softmax(X_c / T)). ``"at"``: A = Σ_c X_c (signed) with rows of
            unit length; mean of (A_s - A_t)², divided by C. ``"dist"``: with y = softmax of the rows of X_c / T,
            T² (1 - mean Pearson correlation of rows) + T² (1 - that of columns). ``"mmd"``:
            :class:`kdfast.GramMMDLoss` of kind ``"author"``: the published value plus its constant 1/N.
        patch_size, resize: see :class:`PCKALoss`.
        temperature: T of ``"kd"`` and ``"dist"``; the others have none.
        weight: factor on the value.

    Shape: student and teacher [B, C, H, W], or sequences of such levels, whose losses are summed. Differentiable in
        both.

    Raises:
        ValueError, TypeError: an unknown base; a temperature that is not above 0; levels, channels or numbers of patches
            that do not match.
    """

    def __init__(
        self,
        base: Literal["kd", "at", "dist", "mmd"],
        *,
        patch_size: PatchSize = 16,
        resize: Resize = "bilinear",
        temperature: float = 4.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        check_choice("base", base, ("kd", "at", "dist", "mmd"))
        if not temperature > 0:
            raise ValueError(f"temperature: need a number above 0, got {temperature!r}")
        self.base, self.temperature = base, temperature
        self.patch_size, self.resize = check_patches(patch_size, resize), resize

    def forward(self, student: Levels, teacher: Levels) -> Tensor:
        if self.base == "mmd":
            loss = GramMMDLoss(kind="author", patch_size=self.patch_size, resize=self.resize)
            return self.weight * loss(student, teacher)
        terms = []
        for s, t in levels(student, teacher):
            check_maps(s, t, same_channels=True)
            grid = grid_of(s, t, self.patch_size, self.resize)
            if self.base == "at":
                terms.append(_attention(s, t, grid))
            else:
                s, t = (patches(resize(wide(v), grid), grid) / self.temperature for v in (s, t))
                terms.append(
                    self.temperature**2 * (_divergence(s, t) if self.base == "kd" else _relations(s, t))
                )
        return self.weight * total(terms).float()


# Views of patches are [C, R1, R2, B, P_H, P_W]: rows are axes 1 and 2, features (pixels) axes 3 to 5.
_ROWS, _PIXELS = (1, 2), (3, 4, 5)


def _log_softmax(x: Tensor) -> Tensor:
    return x - torch.logsumexp(x, _PIXELS, keepdim=True)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = _log_softmax(student), _log_softmax(teacher)
    return (teacher.exp() * (teacher - student)).sum(_PIXELS).mean().clamp_min(0)


def _relations(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = _log_softmax(student).exp(), _log_softmax(teacher).exp()
    return (1 - _pearson(student, teacher, _PIXELS).mean()) + (1 - _pearson(student, teacher, _ROWS).mean())


def _pearson(x: Tensor, y: Tensor, axes: tuple[int, ...]) -> Tensor:
    x, y = x - x.mean(axes, keepdim=True), y - y.mean(axes, keepdim=True)
    norms = torch.linalg.vector_norm(x, dim=axes) * torch.linalg.vector_norm(y, dim=axes)
    return (x * y).sum(axes) / (norms + 1e-8)


def _attention(student: Tensor, teacher: Tensor, grid: Grid) -> Tensor:
    # The sum over channels and the resize commute: only one channel is resized.
    channels = student.shape[1]
    student, teacher = (
        patches(resize(wide(v).sum(1, keepdim=True), grid), grid).flatten(3).flatten(0, 2)
        for v in (student, teacher)
    )  # [N, B P]
    unit = torch.nn.functional.normalize
    return (unit(student) - unit(teacher)).square().mean() / channels


class MimicLoss(Loss):
    """Mean squared error between 1 x 1 convolutions (with bias) of the student's maps and the teacher's maps.

    The feature-imitation term of "Ours + mimic" (Zhou et al., IJCAI 2024, Sec. 4.2). The convolutions are parameters of
    the loss: give them to the optimiser.

    Args:
        student_channels, teacher_channels: ints make one convolution for all levels; sequences make one per level.
        weight: factor on the value.

    Shape: student [B, student_channels, H, W], teacher [B, teacher_channels, H, W], or sequences of such levels, whose
    losses are summed. Differentiable in both and in the convolutions.

    Raises:
        ValueError, TypeError: channels for unequal numbers of levels; levels, sizes or channels that do not match.
    """

    def __init__(
        self,
        student_channels: int | Sequence[int],
        teacher_channels: int | Sequence[int],
        *,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if isinstance(student_channels, int) != isinstance(teacher_channels, int):
            raise TypeError(
                "student_channels and teacher_channels must both be ints or both sequences, got "
                f"{student_channels!r} and {teacher_channels!r}"
            )
        shared = isinstance(student_channels, int)
        if not shared and (len(student_channels) != len(teacher_channels) or not len(student_channels)):
            raise ValueError(
                f"student_channels and teacher_channels need equally many levels, at least one: got "
                f"{student_channels!r} and {teacher_channels!r}"
            )
        pairs = (
            [(student_channels, teacher_channels)]
            if shared
            else zip(student_channels, teacher_channels, strict=True)
        )
        self.shared = shared
        self.adapters = nn.ModuleList(nn.Conv2d(s, t, 1) for s, t in pairs)

    def forward(self, student: Levels, teacher: Levels) -> Tensor:
        pairs = levels(student, teacher)
        if not self.shared and len(pairs) != len(self.adapters):
            raise ValueError(f"student: got {len(pairs)} levels, need {len(self.adapters)}, one per adapter")
        terms = []
        for i, (s, t) in enumerate(pairs):
            adapter = self.adapters[0 if self.shared else i]
            check_maps(s, t, same_channels=False)
            if s.shape[2:] != t.shape[2:] or (s.shape[1], t.shape[1]) != (
                adapter.in_channels,
                adapter.out_channels,
            ):
                raise ValueError(
                    f"student and teacher need maps of one size with {adapter.in_channels} and {adapter.out_channels} "
                    f"channels, got student {describe(s)}, teacher {describe(t)}"
                )
            adapted = conv2d(s, adapter.weight.to(s.dtype), adapter.bias.to(s.dtype))
            terms.append(mse_loss(wide(adapted), wide(t)))
        return self.weight * total(terms).float()

"""Losses on feature maps: FitNet, attention transfer, ICKD, FGFI, and ReviewKD's hierarchical context loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.gram import gram
from ._common import Levels, Loss, check_fits, check_float, check_pair, describe, levels, nothing, total, wide


def check_maps(student: Tensor, teacher: Tensor) -> None:
    check_pair(student, teacher)
    if student.dim() != 4 or teacher.dim() != 4:
        raise ValueError(
            f"student and teacher need maps [B, C, H, W], got student {describe(student)}, teacher {describe(teacher)}"
        )


def check_same_shape(student: Tensor, teacher: Tensor, hint: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher need one shape, got {list(student.shape)} and {list(teacher.shape)}: {hint}"
        )


class ConvAdapter(nn.Sequential):
    """Student map [B, C, H, W] to the teacher's shape: a convolution chosen by the ratio of sizes, batch norm, ReLU.

    Half the size takes a 3 x 3 convolution of stride 2, twice the size a transposed 4 x 4 of stride 2, any smaller size
    a convolution without padding whose kernel is the difference plus 1.

    Args:
        student_shape, teacher_shape: (C, H, W).

    Raises:
        ValueError: shapes of other than three numbers, or of which no such convolution makes one the other.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        for name, shape in (("student_shape", student_shape), ("teacher_shape", teacher_shape)):
            if len(shape) != 3:
                raise ValueError(f"{name}: need (C, H, W), got {tuple(shape)}")
        (c, h, w), (out, th, tw) = student_shape, teacher_shape
        if (h, w) == (2 * th, 2 * tw):
            conv: nn.Module = nn.Conv2d(c, out, 3, stride=2, padding=1)
        elif (2 * h, 2 * w) == (th, tw):
            conv = nn.ConvTranspose2d(c, out, 4, stride=2, padding=1)
        elif h >= th and w >= tw:
            conv = nn.Conv2d(c, out, (1 + h - th, 1 + w - tw))
        else:
            raise ValueError(
                f"student_shape: {tuple(student_shape)} cannot become {tuple(teacher_shape)}; the student's map may be "
                f"larger, or half as large"
            )
        super().__init__(conv, nn.BatchNorm2d(out), nn.ReLU())


def _adapters(
    student: Sequence | int | None, teacher: Sequence | int | None, make, what: str
) -> nn.ModuleList:
    """One adapter per level, none where nothing is given; ``what``: ``"shape"`` or ``"channels"``."""
    names = f"student_{what} and teacher_{what}"
    if (student is None) != (teacher is None):
        raise ValueError(f"{names}: need both or neither, got {student!r} and {teacher!r}")
    if student is None:
        return nn.ModuleList()
    one, other = (
        isinstance(v, int) or (what == "shape" and isinstance(v[0], int)) for v in (student, teacher)
    )
    if one != other or (not one and len(student) != len(teacher)):
        raise ValueError(f"{names}: need one each, or equally many levels, got {student!r} and {teacher!r}")
    pairs = [(student, teacher)] if one else zip(student, teacher, strict=True)
    return nn.ModuleList(make(s, t) for s, t in pairs)


def _adapted(adapters: nn.ModuleList, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    if not len(adapters):
        return pairs
    if len(adapters) != len(pairs):
        raise ValueError(f"student: need {len(adapters)} levels, one per adapter, got {len(pairs)}")
    for adapt, (s, t) in zip(adapters, pairs, strict=True):
        check_maps(s, t)
        check_adapter(adapt, s, t)
    return [(adapt(s), t) for adapt, (s, t) in zip(adapters, pairs, strict=True)]


def check_adapter(adapt: nn.Sequential, student: Tensor, teacher: Tensor) -> None:
    """Raise before a batch norm counts a map that does not fit its adapter, or becomes none of the teacher's shape."""
    conv = adapt[0]
    if student.shape[1] != conv.in_channels:
        raise ValueError(f"student: need maps [B, {conv.in_channels}, H, W], got {describe(student)}")
    check_fits("student", student, conv.weight)
    size = tuple(
        (n - 1) * stride - 2 * padding + kernel
        if isinstance(conv, nn.ConvTranspose2d)
        else (n + 2 * padding - kernel) // stride + 1
        for n, kernel, stride, padding in zip(
            student.shape[2:], conv.kernel_size, conv.stride, conv.padding, strict=True
        )
    )
    # ICKD, whose embeddings are plain 1x1 convolutions, compares maps of different sizes.
    sized = isinstance(adapt, ConvAdapter) or conv.kernel_size != (1, 1)
    if teacher.shape[1] != conv.out_channels or (sized and teacher.shape[2:] != size):
        need = ", ".join(map(str, size)) if sized else "H, W"
        raise ValueError(
            f"student and teacher: the adapter makes [B, {conv.out_channels}, {need}] of student {describe(student)}, "
            f"got teacher {describe(teacher)}"
        )


class FitNetLoss(Loss):
    """Hints (Romero et al., ICLR 2015): mean squared difference of the adapted student map and the teacher map.

    Args:
        student_shape, teacher_shape: (C, H, W), or a list of them, one per level; builds a :class:`ConvAdapter` for
            each, trained with the student. None: the maps have one shape already.
        weight: factor on the value; 100 in common practice.

    Shape: maps [B, C, H, W] or sequences of them. Differentiable in both, and in the adapters.

    Raises:
        ValueError, TypeError: shapes that no adapter joins; levels or maps that do not fit together or the adapters.
    """

    def __init__(
        self,
        student_shape: Sequence | None = None,
        teacher_shape: Sequence | None = None,
        *,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        self.adapters = _adapters(student_shape, teacher_shape, ConvAdapter, "shape")

    def forward(self, student: Levels, teacher: Levels) -> Tensor:
        terms = []
        for s, t in _adapted(self.adapters, levels(student, teacher)):
            check_pair(s, t)
            check_same_shape(s, t, "give student_shape and teacher_shape for an adapter")
            terms.append(F.mse_loss(wide(s), wide(t)) if s.numel() else nothing(s, t))
        return self.weight * total(terms).float()


def attention_map(x: Tensor, p: float, *, signed: bool = False) -> Tensor:
    """Channel mean of |x|^p, flattened and of unit length [B, HW]; ``signed``: of x^p."""
    x = wide(x)
    return F.normalize((x if signed else x.abs()).pow(p).mean(1).flatten(1), dim=1)


def attention_transfer(student: Tensor, teacher: Tensor, p: float, *, signed: bool = False) -> Tensor:
    """One level; the larger map is average-pooled to the smaller."""
    check_maps(student, teacher)
    if student.shape[2] > teacher.shape[2]:
        student = F.adaptive_avg_pool2d(student, teacher.shape[2:])
    elif student.shape[2] < teacher.shape[2]:
        teacher = F.adaptive_avg_pool2d(teacher, student.shape[2:])
    check_same_shape(student[:, 0], teacher[:, 0], "heights and widths must have one ratio")
    if student.shape[0] == 0:
        return nothing(student, teacher)
    s, t = (attention_map(v, p, signed=signed) for v in (student, teacher))
    return (s - t).square().mean()


class AttentionTransferLoss(Loss):
    """Attention transfer (Zagoruyko & Komodakis, ICLR 2017): mean squared difference of unit attention maps.

    Args:
        p: exponent of |activation|, averaged over the channels.
        weight: factor on the value; 1000 in common practice.

    Shape: maps [B, C, H, W] or sequences of them; channels and sizes may differ. Differentiable in both.

    Raises:
        ValueError, TypeError: p below 1; levels or maps that do not fit together.
    """

    def __init__(self, *, p: float = 2.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not p >= 1:
            raise ValueError(f"p: need a number of at least 1, got {p!r}")
        self.p = p

    def forward(self, student: Levels, teacher: Levels) -> Tensor:
        return (
            self.weight
            * total([attention_transfer(s, t, self.p) for s, t in levels(student, teacher)]).float()
        )


class ICKDLoss(Loss):
    """Inter-channel correlation (Liu et al., ICCV 2021), per image: |G̃_s - G̃_t|² / C of C x C channel Grams.

    Rows of the Grams have unit length; mean over the batch. The Grams come from the fused op ``gram``.

    Args:
        student_channels, teacher_channels: builds a 1 x 1 convolution with batch norm, trained with the student (a
            list: one per level). None: the channels agree already.
        weight: factor on the value.

    Shape: maps [B, C, H, W] or sequences of them; sizes may differ. Differentiable in both, and in the embedding.

    Raises:
        ValueError, TypeError: levels, maps or channels that do not fit together or the embedding.
    """

    def __init__(
        self,
        student_channels: Sequence[int] | int | None = None,
        teacher_channels: Sequence[int] | int | None = None,
        *,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)

        def embed(c: int, out: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(c, out, 1, bias=False), nn.BatchNorm2d(out))

        self.adapters = _adapters(student_channels, teacher_channels, embed, "channels")

    def forward(self, student: Levels, teacher: Levels) -> Tensor:
        terms = []
        for s, t in _adapted(self.adapters, levels(student, teacher)):
            check_maps(s, t)
            if s.shape[1] != t.shape[1]:
                raise ValueError(
                    f"student_channels: need the teacher's {t.shape[1]} channels, got {s.shape[1]}; "
                    f"give student_channels and teacher_channels for an embedding"
                )
            if s.shape[0] == 0:
                terms.append(nothing(s, t))
                continue
            views = (v[:, :, None, :, :, None] for v in (s, t))  # [B, C, 1, H, W, 1]: rows are channels
            _, distance = gram(*views, compare="row_cosine", centered=False)  # sums of squares / C²
            terms.append(s.shape[1] * distance.float().mean())
        return self.weight * total(terms).float()


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """HCL of one level: mean squared difference of the maps and of their average pools to 4 x 4, 2 x 2 and 1 x 1.

    Pools smaller than the map count, with weights 1, 1/2, 1/4, ... divided by their sum. Embeddings [B, C] count as
    maps of 1 x 1.
    """
    check_pair(student, teacher)
    check_same_shape(student, teacher, "the hierarchical context loss compares maps of one shape")
    if student.shape[0] == 0:
        return nothing(student, teacher)
    difference = wide(student) - wide(teacher)
    loss, weight, weights = difference.square().mean(), 1.0, 1.0
    if difference.dim() == 4:
        for size in (4, 2, 1):
            if size < difference.shape[2]:  # pooling is linear: pool the difference once
                weight /= 2
                weights += weight
                loss = loss + weight * F.adaptive_avg_pool2d(difference, size).square().mean()
    return loss / weights


class FGFILoss(Loss):
    """Fine-grained feature imitation (Wang et al., CVPR 2019): Σ M (f_t - adapt(f_s))² / (2 Σ M).

    Args:
        student_channels, teacher_channels: builds a 3 x 3 convolution with ReLU, trained with the student; None: the
            maps have one shape already.
        weight: factor on the value; 0.01 in the published code, which leaves the term out for the first few hundred steps.

    Shape: student and teacher [B, C, H, W]; mask [B, H, W], from :func:`imitation_mask`. An empty mask gives 0.
    Differentiable in student, teacher and the adapter.

    Raises:
        ValueError, TypeError: maps that do not fit together or the adapter; another mask.
    """

    def __init__(
        self, student_channels: int | None = None, teacher_channels: int | None = None, *, weight: float = 1.0
    ) -> None:
        super().__init__(weight)

        def adapt(c: int, out: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(c, out, 3, padding=1), nn.ReLU())

        self.adapters = _adapters(student_channels, teacher_channels, adapt, "channels")

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        check_maps(student, teacher)
        ((student, teacher),) = _adapted(self.adapters, [(student, teacher)])
        check_same_shape(student, teacher, "give student_channels and teacher_channels for an adapter")
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: need a tensor, got {describe(mask)}")
        if mask.shape != student[:, 0].shape or mask.device != student.device:
            raise ValueError(
                f"mask: need [B, H, W] = {list(student[:, 0].shape)} on {student.device}, got {describe(mask)}"
            )
        mask = mask.to(torch.float32)
        # where, not a product: a masked value that is infinite must not matter
        difference = torch.where(mask[:, None] != 0, wide(teacher) - wide(student), 0)
        square = difference.square().sum(1)  # [B, H, W]
        count = mask.sum()
        return self.weight * ((mask * square).sum() / torch.where(count > 0, 2 * count, 1)).float()


def imitation_mask(anchors: Tensor, boxes: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Cells of one image where some anchor's IoU with a box exceeds ``threshold`` times that box's largest.

    Args:
        anchors: [H, W, A, 4]; boxes: [G, 4], ground truth; both (x1, y1, x2, y2) in pixels.

    Returns:
        bool [H, W]; False everywhere without boxes. Not differentiable.

    Raises:
        ValueError, TypeError: anchors that are not floats; anchors or boxes of other shapes.
    """
    check_float("anchors", anchors)
    if not isinstance(boxes, Tensor):
        raise TypeError(f"boxes: need a tensor, got {describe(boxes)}")
    if anchors.dim() != 4 or anchors.shape[3] != 4 or boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(
            f"anchors need [H, W, A, 4] and boxes [G, 4], got anchors {describe(anchors)}, boxes {describe(boxes)}"
        )
    if boxes.shape[0] == 0:
        return anchors.new_zeros(anchors.shape[:2], dtype=torch.bool)
    a, b = anchors[:, :, :, None], boxes.to(anchors)  # [H, W, A, 1, 4], [G, 4]
    size = (torch.minimum(a[..., 2:], b[:, 2:]) - torch.maximum(a[..., :2], b[:, :2])).clamp_min(0)
    shared = size.prod(-1)  # [H, W, A, G]
    area = lambda v: (v[..., 2:] - v[..., :2]).prod(-1)  # noqa: E731
    union = area(a) + area(b) - shared
    iou = shared / torch.where(union > 0, union, 1)
    return (iou > threshold * iou.amax((0, 1, 2))).any(3).any(2)

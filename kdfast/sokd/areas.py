"""Distinctive areas (Shen et al., Sec. 3.3): small heads find where to distil; the error counts inside these boxes."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..losses._common import Loss, check_choice, check_fits, check_float, check_integers, describe, wide
from ..losses.features import check_maps, check_same_shape
from ..ops.masked_error import area_mask, masked_error
from ..reference.masked_error import MULTIPLICITIES

Multiplicity = Literal["sum", "squared", "union"]


class AreaMaps(NamedTuple):
    """What the heads see in a map [B, C, H, W]: ``heat`` [B, N, H, W] before the sigmoid, ``size`` [B, 2, H, W] (width,
    height) in pixels, above 0, and ``offset`` [B, 2, H, W] (x, y) in pixels."""

    heat: Tensor
    size: Tensor
    offset: Tensor


@torch.no_grad()
def decode_areas(
    heat: Tensor,
    size: Tensor,
    offset: Tensor,
    *,
    areas: int = 8,
    kernel: int = 3,
    max_fraction: float | None = None,
) -> Tensor:
    """Boxes around the highest peaks of ``heat``, as CenterNet decodes them. Not differentiable, no host sync.

    A peak is a value that no other within ``kernel`` x ``kernel`` exceeds. The box of a peak at (column, row) is centred
    at (column, row) + offset and as large as ``size`` says there, both rounded down to whole pixels and cut at the border.

    Args:
        heat: [B, N, H, W]; peaks of all N channels compete. Before or after a sigmoid: only the order counts.
        size, offset: [B, 2, H, W], (width, height) and (x, y), in pixels.
        areas: how many boxes an image has; at most N H W.
        kernel: side of the window of a peak, odd.
        max_fraction: sides are cut to this share of the map's. None: they are not.

    Returns:
        int64 [B, areas, 4], (x1, y1, x2, y2) with both ends inside, highest peak first. An image with fewer peaks ends
        in empty boxes, (0, 0, -1, -1).
    """
    for name, v in (("heat", heat), ("size", size), ("offset", offset)):
        check_float(name, v)
    shape = (heat.shape[0], 2, *heat.shape[2:]) if heat.dim() == 4 else None
    if any(v.shape != shape or v.device != heat.device for v in (size, offset)):
        raise ValueError(
            f"heat [B, N, H, W] and size, offset [B, 2, H, W] on one device: got {describe(heat)}, {describe(size)}, "
            f"{describe(offset)}"
        )
    if areas < 1 or kernel < 1 or kernel % 2 == 0:
        raise ValueError(
            f"areas and kernel: need at least 1, and an odd number, got {areas!r} and {kernel!r}"
        )
    if max_fraction is not None and not 0 < max_fraction <= 1:
        raise ValueError(f"max_fraction: need a number in (0, 1], got {max_fraction!r}")
    b, n, h, w = heat.shape
    heat = wide(heat)
    peak = heat == F.max_pool2d(heat, kernel, stride=1, padding=kernel // 2)
    scores = heat.masked_fill(~peak, -math.inf).flatten(1)  # [B, N H W]
    score, index = scores.topk(min(areas, n * h * w), dim=1)  # [B, K]
    place = index % (h * w)
    size, offset = (
        wide(v).flatten(2).gather(2, place[:, None].expand(-1, 2, -1)) for v in (size, offset)
    )  # [B, 2, K]
    found, ends = score > -math.inf, []
    for i, (position, side) in enumerate(((place % w, w), (place // w, h))):
        half = (size[:, i] if max_fraction is None else size[:, i].clamp_max(max_fraction * side)) / 2
        centre = position + offset[:, i]
        ends.append([(centre + sign * half).clamp(0, side - 1).long() for sign in (-1, 1)])
    (x1, x2), (y1, y2) = ends
    boxes = torch.stack([x1, y1, x2, y2], 2) * found[:, :, None]
    boxes[:, :, 2:] -= (~found[:, :, None]).long()
    return boxes


@torch.no_grad()
def areas_to_mask(
    boxes: Tensor, height: int, width: int, *, multiplicity: Multiplicity = "sum", dtype=torch.float32
) -> Tensor:
    """How much every pixel counts: mask [B, 1, height, width] of boxes [B, K, 4].

    With m boxes over a pixel it is m (``"sum"``: Eq. 13, the sum over areas), m² (``"squared"``, as code with summed and
    squared masks has it) or 1 where m > 0 (``"union"``). No map per box is made.

    Args:
        boxes: (x1, y1, x2, y2), both ends inside; empty where x2 < x1 or y2 < y1.
    """
    check_choice("multiplicity", multiplicity, MULTIPLICITIES)
    if isinstance(boxes, Tensor) and (boxes.dim() != 3 or boxes.shape[2] != 4):
        raise ValueError(f"boxes: need [B, K, 4], got {describe(boxes)}")
    check_integers("boxes", boxes)
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, (int, torch.SymInt)) or side < 0:
            raise ValueError(f"{name}: need an integer of at least 0, got {side!r}")
    return area_mask(boxes, height, width, multiplicity).to(dtype)


def masked_area_error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """L_DA (Eq. 13): mean over all elements of mask * (student - teacher)², in one pass over both maps.

    Args:
        student, teacher: [B, C, H, W] of one shape; mask: [B, 1, H, W], not negative, a constant.

    Returns:
        scalar, float32 (float64 for float64 maps), differentiable in both maps; 0 for an empty mask, with gradient 0.
    """
    check_maps(student, teacher)
    check_same_shape(student, teacher, "adapt the student's map first")
    if not isinstance(mask, Tensor) or mask.is_complex():
        raise TypeError(f"mask: need a real tensor, got {describe(mask)}")
    if mask.device != student.device or mask.shape != (student.shape[0], 1, *student.shape[2:]):
        raise ValueError(
            f"mask: need [B, 1, H, W] = {[student.shape[0], 1, *student.shape[2:]]} on {student.device}, got {describe(mask)}"
        )
    return masked_error(student, teacher, mask)


class DistinctiveAreas(Loss):
    """DAM: shared heads find areas in the student's map; L = detection_weight L_D + area_weight L_DA (Eqs. 11 to 13).

    L_D is the mean squared difference of what the heads see in student and teacher (sigmoid of the heat, sizes and
    offsets), L_DA that of the two maps inside the areas decoded from the student (:func:`decode_areas`,
    :func:`masked_area_error`). The masks are constants.

    Args:
        channels: of both maps (the student's after its adapter).
        areas: boxes per image.
        kernel: window of a peak.
        heat_channels: of the heat head.
        multiplicity: what a pixel inside several areas counts; see :func:`areas_to_mask`.
        max_fraction: largest side of an area, as share of the map's; an area of the whole map distinguishes nothing.
            None: no limit, as published.
        initial_size: sides with which areas start, in pixels, up to the random weights of the head: no ground truth
            teaches the sizes.
        detection_weight, area_weight: α and β of the paper, which gives no values; 1 and 1 in published code, and 1000
            and 1000 in its tuned settings.
        weight: factor on the value.

    Shape: student and teacher [B, C, H, W] of one shape. Differentiable in both and in the heads.

    Nothing in L_D keeps the heads from one constant answer. :attr:`components` shows it: ``"coverage"`` is the share of
    pixels inside an area, 0 when no area is left (L_DA is then 0, with gradient 0).

    Source: Shen et al., Student-Oriented Teacher Knowledge Refinement for Knowledge Distillation, ACM MM 2024, Sec. 3.3.
    The paper leaves widths, number of areas and reductions open: those of published code (mdistiller's DFKD) where it is sound.
    """

    def __init__(
        self,
        channels: int,
        *,
        areas: int = 8,
        kernel: int = 3,
        heat_channels: int = 1,
        multiplicity: Multiplicity = "sum",
        max_fraction: float | None = 0.5,
        initial_size: float = 3.0,
        detection_weight: float = 1.0,
        area_weight: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        check_choice("multiplicity", multiplicity, MULTIPLICITIES)
        if channels < 1 or heat_channels < 1:
            raise ValueError(
                f"channels and heat_channels: need at least 1, got {channels!r} and {heat_channels!r}"
            )
        if not initial_size > 0:
            raise ValueError(f"initial_size: need a number above 0, got {initial_size!r}")
        self.areas, self.kernel, self.multiplicity = areas, kernel, multiplicity
        self.max_fraction = max_fraction
        self.detection_weight, self.area_weight = detection_weight, area_weight

        def head(out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, out, 1)
            )

        self.heat, self.size, self.offset = head(heat_channels), head(2), head(2)
        nn.init.constant_(self.size[2].bias, initial_size + math.log(-math.expm1(-initial_size)))
        self._components: dict[str, Tensor] = {}

    @property
    def components(self) -> dict[str, Tensor]:
        """Of the last call, detached: ``"detection"`` (L_D), ``"area"`` (L_DA), ``"coverage"``."""
        return self._components

    def maps(self, x: Tensor) -> AreaMaps:
        """What the heads see in a map [B, C, H, W]."""
        return AreaMaps(self.heat(x), F.softplus(self.size(x)), self.offset(x))

    def decode(self, maps: AreaMaps) -> Tensor:
        """Boxes [B, areas, 4]; see :func:`decode_areas`."""
        return decode_areas(*maps, areas=self.areas, kernel=self.kernel, max_fraction=self.max_fraction)

    def mask(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """Mask [B, 1, height, width] of boxes; see :func:`areas_to_mask`."""
        return areas_to_mask(boxes, height, width, multiplicity=self.multiplicity)

    def detection_loss(self, student: AreaMaps, teacher: AreaMaps) -> Tensor:
        """L_D (Eq. 12) of what the heads see in both: the mean over all values of the three maps."""
        pairs = [(wide(s), wide(t)) for s, t in zip(student, teacher, strict=True)]
        pairs[0] = tuple(v.sigmoid() for v in pairs[0])
        count = sum(s.numel() for s, _ in pairs)
        return sum((s - t).square().sum() for s, t in pairs) / max(count, 1)

    def area_loss(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """L_DA (Eq. 13); see :func:`masked_area_error`."""
        return masked_area_error(student, teacher, mask)

    def detect(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """L_D and the mask [B, 1, H, W] of the areas that the student's map shows."""
        check_maps(student, teacher)
        check_same_shape(student, teacher, "adapt the student's map first")
        if student.shape[1] != self.heat[0].in_channels:
            raise ValueError(
                f"student and teacher: need maps [B, {self.heat[0].in_channels}, H, W], got {describe(student)}"
            )
        for name, v in (("student", student), ("teacher", teacher)):
            check_fits(name, v, self.heat[0].weight)
        seen = self.maps(student)
        detection = self.detection_loss(seen, self.maps(teacher))
        mask = self.mask(self.decode(seen), *student.shape[2:])
        self._components = {"detection": detection.detach(), "coverage": (mask > 0).float().mean()}
        return detection, mask

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        detection, mask = self.detect(student, teacher)
        area = self.area_loss(student, teacher, mask)
        self._components["area"] = area.detach()
        loss = self.detection_weight * detection + self.area_weight * area
        return self.weight * loss.float()

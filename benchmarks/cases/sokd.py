"""Masked area error of SoKD on CIFAR, ImageNet and FPN maps: boxes of 8 areas per image to the loss.

The baseline is the form of published code: one mask per area, filled box by box, stacked, expanded to all channels and
summed, then both maps masked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.sokd import areas_to_mask, masked_area_error

from ..case import Baseline, Case, pair

AREAS = 8
SOURCES = {
    (64, 64, 32, 32): "CIFAR-100, batch 64: ResNet-32x4, stage 1",
    (64, 128, 16, 16): "CIFAR-100, batch 64: ResNet-32x4, stage 2 (hint layer)",
    (64, 256, 8, 8): "CIFAR-100, batch 64: ResNet-32x4, stage 3",
    (64, 256, 14, 14): "ImageNet, batch 64 per GPU: ResNet-34, stage 3",
    (64, 512, 7, 7): "ImageNet, batch 64 per GPU: ResNet-34, stage 4",
    (2, 256, 100, 168): "FPN stride 8 of 800 x 1344, batch 2",
    (2, 256, 50, 84): "FPN stride 16 of 800 x 1344, batch 2",
    (2, 256, 25, 42): "FPN stride 32 of 800 x 1344, batch 2",
}


def mask_stack(student: Tensor, teacher: Tensor, boxes: Tensor) -> Tensor:
    b, c, h, w = student.shape
    masks = []
    for image in boxes.tolist():
        stack = torch.zeros(len(image), h, w, device=student.device, dtype=student.dtype)
        for mask, (x1, y1, x2, y2) in zip(stack, image, strict=True):
            mask[y1 : y2 + 1, x1 : x2 + 1] = 1
        masks.append(stack)
    # Σ over areas of (M_i (s - t))²: the square root makes a pixel of m areas count m.
    mask = torch.stack(masks).sum(1, keepdim=True).expand(b, c, h, w).sqrt()
    return F.mse_loss(mask * student, mask * teacher)


def _loss(student: Tensor, teacher: Tensor, boxes: Tensor) -> Tensor:
    return masked_area_error(student, teacher, areas_to_mask(boxes, *student.shape[2:]))


def _case(shape: tuple[int, ...], source: str, dtype=torch.float32, channels_last: bool = False) -> Case:
    maps = pair(
        shape,
        shape,
        dtype=dtype,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    b, _, h, w = shape
    elements = math.prod(shape)

    def make(device: torch.device, seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        side = torch.tensor([w, h], device=device)
        # Sides of a tenth to a half of the map, at random places inside it.
        size = 0.1 + 0.4 * torch.rand(b, AREAS, 2, device=device, generator=generator)
        start = (1 - size) * torch.rand(b, AREAS, 2, device=device, generator=generator)
        boxes = torch.cat([start * side, (start + size) * side], 2).long()
        return [*maps(device, seed), torch.minimum(boxes, torch.cat([side, side]) - 1)]

    return Case(
        family="sokd",
        name=f"areas [{', '.join(map(str, shape))}]",
        source=source,
        loss=_loss,
        make=make,
        # Both maps read and the gradient written, in one pass.
        bytes=3 * elements * dtype.itemsize,
        flops=(4 + 3) * elements,
        dtype=dtype,
        layout="channels_last" if channels_last else "contiguous",
        op="masked_error",
        baselines={"naive": Baseline(mask_stack, memory=6 * 4 * elements)},
        memory=6 * 4 * elements,
    )


def cases() -> list[Case]:
    found = [_case(shape, source) for shape, source in SOURCES.items()]
    for shape in ((64, 128, 16, 16), (2, 256, 50, 84)):
        found.append(_case(shape, SOURCES[shape], channels_last=True))
    found.append(_case((2, 256, 100, 168), SOURCES[2, 256, 100, 168], torch.bfloat16))
    return found

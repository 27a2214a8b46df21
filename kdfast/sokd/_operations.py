"""The nine operations on feature maps; what is random in one is drawn once for the whole batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _warp(x: Tensor, matrix: tuple[float, ...]) -> Tensor:
    """Bilinear, zeros outside; ``matrix`` [2, 3] takes pixels of the result, counted from the centre, to those of x."""
    h, w = x.shape[2:]
    a, b, c, d, e, f = matrix
    # affine_grid counts from -1 to 1 along both sides
    theta = torch.tensor([[a, b * h / w, 2 * c / w], [d * w / h, e, 2 * f / h]], dtype=torch.float64)
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    theta = theta.to(dtype).to(x.device, non_blocking=True)
    grid = F.affine_grid(theta[None], [1, 1, h, w], align_corners=False)
    return F.grid_sample(x.to(dtype), grid.expand(len(x), -1, -1, -1), align_corners=False).to(x.dtype)


def apply_operation(x: Tensor, name: str, value: float, seed: int) -> Tensor:
    """Operation ``name`` of size ``value`` on maps [B, C, H, W].

    shear_x, shear_y: ``value`` columns per row (rows per column); translate_x, translate_y: content moves by ``value``
    times the width to the right (height downwards); rotate: counter-clockwise degrees; cutout: a box of ``value`` times
    each side is 0, the same one everywhere; noise: standard deviation; channel_drop: probability of a channel's being
    0, without rescaling; channel_shuffle: no size. The seed decides what is random.
    """
    h, w = x.shape[2:]
    if name == "shear_x":
        return _warp(x, (1, -value, 0, 0, 1, 0))
    if name == "shear_y":
        return _warp(x, (1, 0, 0, -value, 1, 0))
    if name == "translate_x":
        return _warp(x, (1, 0, -value * w, 0, 1, 0))
    if name == "translate_y":
        return _warp(x, (1, 0, 0, 0, 1, -value * h))
    if name == "rotate":
        c, s = math.cos(math.radians(value)), math.sin(math.radians(value))
        return _warp(x, (c, -s, 0, s, c, 0))
    if name == "noise":
        generator = torch.Generator(x.device).manual_seed(seed)
        return x + value * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    if name == "cutout":
        centre = torch.rand(2, generator=generator).tolist()
        keep = torch.ones(h, w)
        (top, left), (bottom, right) = (
            [round(n * min(max(u + sign * value / 2, 0), 1)) for u, n in zip(centre, (h, w), strict=True)]
            for sign in (-1, 1)
        )
        keep[top:bottom, left:right] = 0
    elif name == "channel_shuffle":
        order = torch.randperm(x.shape[1], generator=generator)
        return x[:, order.to(x.device, non_blocking=True)]
    elif name == "channel_drop":
        keep = (torch.rand(x.shape[1], 1, 1, generator=generator) >= value).float()
    else:
        raise ValueError(f"name: got {name!r}")
    return x * keep.to(x.dtype).to(x.device, non_blocking=True)


def apply_chain(x: Tensor, chain: list[tuple[str, float, int]]) -> Tensor:
    """Operations ``(name, value, seed)`` in turn."""
    for name, value, seed in chain:
        x = apply_operation(x, name, value, seed)
    return x

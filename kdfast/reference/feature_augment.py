"""Augmentation of feature maps in plain PyTorch: the truth, the fallback and the benchmarks' baseline.

Student-oriented refinement (Shen et al., ACM MM 2024, Sec. 3.2) changes a teacher's map [B, C, H, W] by a chain of
operations. A :class:`Plan` holds the chain for maps of one size with everything drawn that is random in it, except noise,
which a counter makes wherever it is needed. Neighbouring geometric operations are one affine map, interpolated once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import accumulator

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
NAMES = (*GEOMETRIC, "cutout", "noise", "channel_shuffle", "channel_drop")
WARP, CUTOUT, NOISE, CHANNELS = range(4)
Matrix = tuple[float, float, float, float, float, float]


class Plan(NamedTuple):
    """A chain for maps of one [C, H, W], on the host.

    steps: S times seven numbers, a kind and what it takes: WARP and a matrix [2, 3], which takes pixels (x, y) of the result,
    counted from the centre, to those of the input; CUTOUT and a box (top, left, bottom, right), the last two exclusive;
    NOISE, its standard deviation and the two halves of its seed; CHANNELS and a row of ``channels``.
    channels: int32 [K, C], for every channel of the result the channel that it shows, or -1 for none (it is 0). A row
    is a permutation, or drops channels where they are.
    """

    steps: tuple[tuple[float, ...], ...]
    channels: Tensor


def plan(shape: Sequence[int], chain: Iterable[tuple[str, float, int]]) -> Plan:
    """The chain ``(name, value, seed), ...`` for maps of ``shape`` [B, C, H, W]; every draw follows from its seed.

    shear_x, shear_y: ``value`` columns per row (rows per column); translate_x, translate_y: the content moves by ``value``
    times the width to the right (times the height downwards); rotate: counter-clockwise degrees; cutout: a box of
    ``value`` times each side is 0; noise: standard deviation; channel_drop: probability that a channel is 0, without
    rescaling; channel_shuffle: a permutation, ``value`` is ignored. What is random is the same for the whole batch, but
    for noise, which is another in every element.
    """
    _, channels, height, width = shape
    steps: list[list[float]] = []
    rows: list[Tensor] = []
    for name, value, seed in chain:
        generator = torch.Generator().manual_seed(seed)
        if name in GEOMETRIC:
            matrix = _matrix(name, value, height, width)
            if steps and steps[-1][0] == WARP:
                matrix = _compose(tuple(steps.pop()[1:]), matrix)
            steps.append([WARP, *matrix])
        elif name == "cutout":
            steps.append([CUTOUT, *_box(value, height, width, generator), 0, 0])
        elif name == "noise":
            steps.append([NOISE, value, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, 0, 0, 0])
        elif name in ("channel_shuffle", "channel_drop"):
            if name == "channel_shuffle":
                row = torch.randperm(channels, generator=generator)
            else:
                dropped = torch.rand(channels, generator=generator) < value
                row = torch.arange(channels).masked_fill(dropped, -1)
            steps.append([CHANNELS, len(rows), 0, 0, 0, 0, 0])
            rows.append(row.int())
        else:
            raise ValueError(f"chain: got operation {name!r}, need one of {NAMES}")
    return Plan(
        tuple(tuple(map(float, step)) for step in steps),
        torch.stack(rows) if rows else torch.empty(0, channels, dtype=torch.int32),
    )


def _matrix(name: str, value: float, height: int, width: int) -> Matrix:
    if name == "shear_x":
        return (1, -value, 0, 0, 1, 0)
    if name == "shear_y":
        return (1, 0, 0, -value, 1, 0)
    if name == "translate_x":
        return (1, 0, -value * width, 0, 1, 0)
    if name == "translate_y":
        return (1, 0, 0, 0, 1, -value * height)
    c, s = math.cos(math.radians(value)), math.sin(math.radians(value))
    return (c, -s, 0, s, c, 0)


def _compose(first: Matrix, second: Matrix) -> Matrix:
    """The map of two operations in a row: pixels of the result go through ``second``, then through ``first``."""
    a, b, c, d, e, f = first
    p, q, r, s, t, u = second
    return (a * p + b * s, a * q + b * t, a * r + b * u + c, d * p + e * s, d * q + e * t, d * r + e * u + f)


def _box(value: float, height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """A box of ``value`` times each side around a random centre, cut off at the map's edge."""
    centre = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    (top, bottom), (left, right) = (
        [round(n * min(max(u + sign * value / 2, 0), 1)) for sign in (-1, 1)]
        for u, n in zip(centre, (height, width), strict=True)
    )
    return top, left, bottom, right


def warp(x: Tensor, matrix: Sequence[float]) -> Tensor:
    """Bilinear, zeros outside."""
    h, w = x.shape[2:]
    a, b, c, d, e, f = matrix
    # affine_grid counts from -1 to 1 along both sides.
    theta = x.new_tensor([[a, b * h / w, 2 * c / w], [d * w / h, e, 2 * f / h]])
    grid = F.affine_grid(theta[None], [1, 1, h, w], align_corners=False)
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=False)


def feature_augment(x: Tensor, steps: Sequence[Sequence[float]], channels: Tensor) -> Tensor:
    """Maps [B, C, H, W] changed by a :class:`Plan`; the result has their dtype. Differentiable in x."""
    y = x.to(accumulator(x))
    for kind, *numbers in steps:
        if kind == WARP:
            y = warp(y, numbers)
        elif kind == CUTOUT:
            top, left, bottom, right = map(int, numbers[:4])
            keep = torch.ones(y.shape[2:], dtype=y.dtype, device=y.device)
            keep[top:bottom, left:right] = 0
            y = y * keep
        elif kind == NOISE:
            y = y + numbers[0] * normal(y.shape, int(numbers[1]), int(numbers[2]), y.device).to(y.dtype)
        else:
            source = channels[int(numbers[0])].to(y.device).long()
            y = y[:, source.clamp_min(0)] * (source >= 0).to(y.dtype)[:, None, None]
    return y.to(x.dtype)


def normal(shape: torch.Size, seed_low: int, seed_high: int, device: torch.device) -> Tensor:
    """Standard normal numbers, float64, each a function of the seed and of its place in the contiguous tensor.

    Philox 4x32-10 (Salmon et al., SC 2011) with counter place // 4 and the seed as key gives four words for four places;
    the upper 24 bits of a word make a uniform number u in (0, 1), and Box-Muller turns (u_0, u_1) and (u_2, u_3) into
    pairs sqrt(-2 ln u) (cos, sin)(2π u').
    """
    count = math.prod(shape)
    place = torch.arange(-(-count // 4), device=device)
    words = philox([place & 0xFFFFFFFF, place >> 32, place * 0, place * 0], (seed_low, seed_high))
    u = [((v >> 8).double() + 0.5) * 2.0**-24 for v in words]
    pairs = []
    for first, second in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2 * torch.log(first))
        pairs += [radius * torch.cos(2 * math.pi * second), radius * torch.sin(2 * math.pi * second)]
    return torch.stack(pairs, 1).flatten()[:count].view(shape)


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Ten rounds of Philox 4x32 on int64 tensors that hold unsigned words."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(0xD2511F53, c[0]), _multiply(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower word of a product of two words; halves keep it inside int64."""
    low, high = word & 0xFFFF, word >> 16
    partial = factor * low  # < 2^48
    upper = factor * high + (partial >> 16)  # < 2^49
    return upper >> 16, (upper << 16 & 0xFFFFFFFF) | (partial & 0xFFFF)

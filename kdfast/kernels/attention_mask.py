"""Triton backend of the op ``attention_mask``.

Launches: forward 5 (pool, a sum over blocks, masks, errors, finish), backward 1. Each reads and writes what the
formula needs once: pool both maps, errors both maps, backward both maps and one gradient; maps of one channel
come beside. A program holds a block of pixels of one image and walks over the channels, so that sums over
channels are final and sums over pixels leave C numbers per block, added in a fixed order. Maps are read in place
whatever their strides.
"""

from __future__ import annotations

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference._common import accumulator
from ..reference.attention_mask import Settings
from ._launch import on_device
from .attention_mask_passes import Config, Map, errors, finish, gradient, masks, pool

ELEMENTS, WARPS = (
    2048,
    4,
)  # of a tile: 16 values in every thread, of two maps at once; half as many in float64
PIXELS, PIXELS_CHANNELS_LAST = (
    256,
    128,
)  # of a block at most; the sums left per block take 1/256 or 1/128 of a map
MASK_BLOCK, MASK_WARPS = 4096, 16  # one program makes a whole mask


def _split(value: float) -> tuple[float, float]:
    """A number in two parts, since kernels take float32: enough for float64."""
    high = ctypes.c_float(value).value
    return high, value - high


def _map(x: Tensor) -> Map:
    b, c, h, w = x.stride()
    return Map(x, b, c, h, h if x.shape[3] == 1 else w, x.shape[3])


def _is_flat(x: Tensor) -> bool:
    return 1 in x.shape[2:] or x.stride(2) == x.shape[3] * x.stride(3)


def _config(*maps: Tensor) -> Config:
    c, pixels = maps[0].shape[1], maps[0].shape[2] * maps[0].shape[3]
    channels_last = maps[0].stride(1) == 1 and pixels > 1
    most = PIXELS_CHANNELS_LAST if channels_last else PIXELS
    block = min(most, triton.next_power_of_2(pixels))
    wide = accumulator(*maps) == torch.float64
    channels = min(ELEMENTS // (1 + wide) // block, triton.next_power_of_2(c))
    acc = tl.float64 if wide else tl.float32
    return Config(channels, block, all(map(_is_flat, maps)), acc)


class _Call:
    """Sizes of one call."""

    def __init__(self, *maps: Tensor) -> None:
        self.x, self.dtype = maps[0], accumulator(*maps)
        self.batch, self.channels, h, w = maps[0].shape
        self.size, self.count = (h, w), h * w
        self.config = _config(*maps)
        self.blocks = triton.cdiv(self.count, self.config.pixels)

    def new(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=self.dtype)

    def pool(self, maps: list[Tensor], signed: bool) -> tuple[Tensor, Tensor]:
        """spatial [kinds, maps, B, 1, H, W], channel [kinds, maps, B, C]"""
        kinds, count = 1 + signed, len(maps)
        spatial = self.new(kinds, count, self.batch, 1, *self.size)
        parts = self.new(kinds, count, self.batch, self.blocks, self.channels)
        if self.batch > 0:
            pool[(self.batch * self.blocks, count)](
                _map(maps[0]), _map(maps[-1]), spatial, parts, self.batch, self.channels, self.count,
                self.blocks, count, self.config, signed, num_warps=WARPS,
            )  # fmt: skip
        return spatial, parts.sum(3)

    def errors(
        self, x: Tensor, y: Tensor, spatial_mask: Tensor, channel_mask: Tensor, through: bool
    ) -> Tensor:
        """Sums per program; the masks' second rows where there are any."""
        sums = self.new(self.batch * self.blocks)
        parts = self.new(self.batch, self.blocks, self.channels) if through else sums
        if self.batch > 0:
            errors[(self.batch * self.blocks,)](
                _map(x), _map(y), spatial_mask, channel_mask, sums, spatial_mask[-1], parts, self.channels,
                self.count, self.blocks, self.config, through, num_warps=WARPS,
            )  # fmt: skip
        if through:
            torch.sum(parts, 1, out=channel_mask[1])
        return sums

    def finish(self, squares: Tensor, sums: Tensor, transfer_weight: float, masked_weight: float):
        loss, terms = self.new(), self.new(2, 3)
        finish[(1,)](
            squares, sums, loss, terms, self.batch, sums.shape[0], _split(transfer_weight),
            _split(masked_weight), self.config.acc, transfer_weight != 0, 1024, num_warps=WARPS,
        )  # fmt: skip
        return loss, terms


def attention_pool(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Implementation of ``kdfast::attention_pool_triton``; see :mod:`kdfast.reference.attention_mask`."""
    with on_device(x):
        spatial, channel = _Call(x).pool([x], signed)
    return spatial[:, 0], channel[:, 0]


def attention_mask(
    student: Tensor, teacher: Tensor, adapted: Tensor | None, *settings: float | bool
) -> tuple[Tensor, ...]:
    """Implementation of ``kdfast::attention_mask_triton``."""
    s = Settings(*settings)
    x = student if adapted is None else adapted
    call = _Call(student, teacher, x)
    with on_device(student):
        spatial, channel = call.pool([student, teacher], s.signed)
        spatial_mask = call.new(1 + s.through, call.batch, 1, *call.size)
        channel_mask = call.new(1 + s.through, call.batch, call.channels)
        squares = call.new(2, call.batch)
        single = 0 if s.pairs else 1
        differences = call.new(1, single, *spatial.shape[2:]), call.new(1, single, *channel.shape[2:])
        if call.batch > 0:
            masks[(call.batch, 2)](
                spatial, channel, spatial_mask, channel_mask, differences, squares, call.batch, call.count,
                call.channels, _split(s.temperature), call.config.acc, s.signed, s.softmax_of_sum, s.channel_mask,
                not s.pairs, MASK_BLOCK, num_warps=MASK_WARPS,
            )  # fmt: skip
        sums = call.errors(x, teacher, spatial_mask, channel_mask, s.through)
        loss, terms = call.finish(squares, sums, s.transfer_weight, s.masked_weight)
    if not s.pairs:
        spatial, channel = differences
    elif s.signed and not s.through:  # means of |A| made the masks and are not kept
        spatial, channel = spatial[1:].clone(), channel[1:].clone()
    return loss, terms, spatial, channel, spatial_mask, channel_mask


def masked_distance(x: Tensor, y: Tensor, spatial_mask: Tensor, channel_mask: Tensor) -> Tensor:
    """Implementation of ``kdfast::masked_distance_triton``."""
    call = _Call(x, y)
    masks = spatial_mask.contiguous()[None], channel_mask.contiguous()[None]
    with on_device(x):
        sums = call.errors(x, y, *masks, False)
        return call.finish(sums, sums, 0.0, 1.0)[1]


def attention_mask_backward(
    x: Tensor,
    other: Tensor | None,
    grad_loss: Tensor | None,
    terms: Tensor | None,
    spatial: Tensor | None,
    channel: Tensor | None,
    spatial_mask: Tensor | None,
    channel_mask: Tensor | None,
    grad_spatial: Tensor | None,
    grad_channel: Tensor | None,
    side: int,
    signed: bool,
) -> Tensor:
    """Implementation of ``kdfast::attention_mask_backward_triton``."""
    out = torch.empty_like(x)
    call = _Call(x, out) if other is None else _Call(x, other, out)
    if call.batch == 0:
        return out
    maps = 0 if spatial is None else spatial.shape[1]
    if maps:
        spatial, channel = spatial[-1], channel[-1]
    given = 0 if grad_spatial is None else grad_spatial.shape[0]
    small = [
        x.new_empty(0, dtype=call.dtype) if v is None else v.contiguous()
        for v in (grad_loss, terms, spatial, channel, spatial_mask, channel_mask, grad_spatial, grad_channel)
    ]
    grid = (call.batch * call.blocks, triton.cdiv(call.channels, call.config.channels))
    with on_device(x):
        gradient[grid](
            _map(x), _map(x if other is None else other), _map(out), *small, call.batch, call.channels,
            call.count, call.blocks, side, call.config, other is not None, maps, given, signed,
            num_warps=WARPS,
        )  # fmt: skip
    return out

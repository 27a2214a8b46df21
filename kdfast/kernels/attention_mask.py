"""Triton backend of the op ``attention_mask``.

Launches: forward 2 (a pass over both maps, masks and loss), backward 1. Bytes for n elements of e bytes: forward 2 n e,
backward 3 n e; maps of one channel come beside, and sums over the pixels of a block, :data:`STEPS` tiles. Where a
student is adapted, or gradients go through the masks, the forward reads the maps again and has three launches more.
Maps are read in place whatever their strides.
"""

from __future__ import annotations

import ctypes
import math

import torch
import triton.language as tl
from torch import Tensor

from ..reference._common import accumulator
from ..reference.attention_mask import Settings
from ._launch import cdiv, next_power_of_2, on_device
from .attention_mask_forward import RESULTS, STATS, Options, pool_pair
from .attention_mask_masks import masks
from .attention_mask_passes import Config, Map, errors, finish, gradient, pool

# Forward tiles, all channels of some pixels of both maps in registers: elements, and values per thread of each map.
ELEMENTS, PER_THREAD = 8192, 32
MOST_CHANNELS = 1024  # of a tile; more are read twice, the second time from the cache
LEAST_PIXELS, MOST_PIXELS = 8, 256
PROGRAMS = 264  # with fewer, tiles have fewer pixels: two for each multiprocessor of an H200
REGISTERS: int | None = None  # of a thread of a forward pass at most
STEPS = 1  # tiles of a program at most, where there are many: sums over pixels are left once for all of them
# Backward tiles.
GRADIENT_ELEMENTS, GRADIENT_WARPS = 2048, 4
GRADIENT_PIXELS, GRADIENT_PIXELS_CHANNELS_LAST = 256, 8
# Of the masks: pixels of a program; channels of a program, and rows that it adds at once; block statistics.
CHUNK, STRIP, ROWS, BLOCK, MASK_WARPS = 1024, 32, 128, 1024, 8


def _split(value: float) -> tuple[float, float]:
    """A number in two parts, since kernels take float32: enough for float64."""
    high = ctypes.c_float(value).value
    return high, value - high


def _registers() -> dict[str, int]:
    return {} if REGISTERS is None or torch.version.hip is not None else {"maxnreg": REGISTERS}


def _is_flat(x: Tensor) -> bool:
    return 1 in x.shape[2:] or x.stride(2) == x.shape[3] * x.stride(3)


def _pixel(x: Tensor) -> int:
    """Stride of a flat map's pixels."""
    return x.stride(2) if x.shape[3] == 1 else x.stride(3)


class _Call:
    """Sizes of one call, and how its maps are read."""

    def __init__(self, *maps: Tensor) -> None:
        x = maps[0]
        self.x, self.dtype = x, accumulator(*maps)
        self.batch, self.channels, h, w = x.shape
        self.size, self.count = (h, w), h * w
        self.channels_last = x.stride(1) == 1 and self.count > 1
        self.flat = all(map(_is_flat, maps))
        self.planar = self.flat and not self.channels_last
        self.unit = 16
        if self.flat:
            outer = [m.stride(1) if self.planar else _pixel(m) for m in maps]
            outer += [m.stride(0) for m in maps if self.batch > 1]
            self.unit = math.gcd(16, *outer, self.count if self.planar else 0)
        else:
            self.unit = 1
        self.units = self.count // self.unit if self.planar else self.count
        # What is beyond a map's last row or column is not read, but its address is computed.
        room = [(n + 1024) * abs(v) for m in maps for n, v in zip(m.shape[1:], m.stride()[1:], strict=True)]
        self.far = sum(room) >= 2**31
        self.wide = self.dtype == torch.float64
        self.acc = tl.float64 if self.wide else tl.float32

    def map(self, x: Tensor) -> Map:
        b, c, h, _ = x.stride()
        unit, pixel = self.unit, _pixel(x)
        if self.planar:
            c //= unit
        elif self.flat:
            pixel //= unit
        return Map(x, b // unit, c, h, pixel, x.shape[3])

    def config(self, channels: int, pixels: int) -> Config:
        whole = self.channels % channels == 0
        return Config(channels, pixels, self.flat, self.planar, self.unit, whole, self.far, self.acc)

    def new(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=self.dtype)

    def tiles(self) -> tuple[Config, int, int, int]:
        """Of forward passes: tile, warps, steps, and programs per image."""
        elements, channels = ELEMENTS // (1 + self.wide), next_power_of_2(self.channels)
        channels = min(channels, MOST_CHANNELS)
        pixels = min(max(elements // channels, LEAST_PIXELS), MOST_PIXELS, next_power_of_2(self.count))
        while pixels > LEAST_PIXELS and self.batch * cdiv(self.count, pixels) < PROGRAMS:
            pixels //= 2
        warps = min(max(channels * pixels * (1 + self.wide) // (32 * PER_THREAD), 1), 16)
        tiles = cdiv(self.count, pixels)
        steps = min(max(self.batch * tiles // (4 * PROGRAMS), 1), STEPS)
        return self.config(channels, pixels), warps, steps, cdiv(tiles, steps)

    def errors(
        self, x: Tensor, y: Tensor, spatial_mask: Tensor, channel_mask: Tensor, through: bool
    ) -> Tensor:
        """Sums per program; the masks' second rows where there are any."""
        config, warps, _, _ = self.tiles()
        blocks = cdiv(self.count, config.pixels)
        sums = self.new(self.batch * blocks)
        parts = self.new(self.batch, blocks, self.channels) if through else sums
        if self.batch > 0:
            errors[(self.batch * blocks,)](
                self.map(x), self.map(y), spatial_mask, channel_mask, sums, spatial_mask[-1], parts, self.channels,
                self.units, blocks, config, through, num_warps=warps,
            )  # fmt: skip
        if through:
            torch.sum(parts, 1, out=channel_mask[1])
        return sums

    def finish(self, squares: Tensor, sums: Tensor, transfer_weight: float, masked_weight: float):
        loss, terms = self.new(), self.new(2, 3)
        finish[(1,)](
            squares, sums, loss, terms, self.batch, sums.shape[0], _split(transfer_weight),
            _split(masked_weight), self.acc, transfer_weight != 0, 1024, num_warps=4,
        )  # fmt: skip
        return loss, terms


def attention_pool(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Implementation of ``kdfast::attention_pool_triton``; see :mod:`kdfast.reference.attention_mask`."""
    call = _Call(x)
    config, warps, _, _ = call.tiles()
    blocks, kinds = cdiv(call.count, config.pixels), 1 + signed
    spatial = call.new(kinds, call.batch, 1, *call.size)
    parts = call.new(kinds, call.batch, blocks, call.channels)
    with on_device(x):
        if call.batch > 0:
            pool[(call.batch * blocks,)](
                call.map(x), spatial, parts, call.batch, call.channels, call.units, blocks, config, signed,
                num_warps=warps,
            )  # fmt: skip
        return spatial, parts.sum(2)


def _options(s: Settings, errors: bool, once: bool) -> Options:
    absolute = 2 * (s.channel_mask or s.through or not s.signed)
    plain = (1 + s.pairs) * s.signed
    weighted = (2 - s.softmax_of_sum) * (s.channel_mask and errors)
    kinds = absolute + plain + weighted
    return Options(
        s.signed, s.pairs, s.through, s.softmax_of_sum, s.channel_mask, errors, s.transfer_weight != 0, once,
        absolute, plain, weighted, kinds,
    )  # fmt: skip


def attention_mask(
    student: Tensor, teacher: Tensor, adapted: Tensor | None, *settings: float | bool
) -> tuple[Tensor, ...]:
    """Implementation of ``kdfast::attention_mask_triton``."""
    s = Settings(*settings)
    call, at_once = _Call(student, teacher), adapted is None and not s.through
    batch, channels = call.batch, call.channels
    spatial, channel = call.new(*s.kept, batch, 1, *call.size), call.new(*s.kept, batch, channels)
    spatial_mask = call.new(1 + s.through, batch, 1, *call.size)
    channel_mask = call.new(1 + s.through, batch, channels)
    loss, terms = call.new(), call.new(2, 3)
    absolute = spatial[0] if s.pairs and (s.through or not s.signed) else call.new(2, batch, *call.size)
    config, warps, steps, blocks = call.tiles()
    o = _options(s, at_once, config.channels >= channels)
    numbers = RESULTS.value * batch + batch * blocks * STATS.value + o.kinds * batch * (blocks + 1) * channels
    workspace = call.new(numbers + batch + 1)
    temperature = _split(s.temperature)
    with on_device(student):
        if batch > 0:
            pool_pair[(batch * blocks,)](
                call.map(student), call.map(teacher), absolute, spatial[-1], workspace, batch, channels, call.units,
                blocks, steps, temperature, config, o, num_warps=warps, **_registers(),
            )  # fmt: skip
            strips, chunks = cdiv(channels, STRIP), cdiv(call.count, CHUNK)
            masks[(batch * (1 + o.kinds * strips + chunks),)](
                absolute, spatial_mask, channel[0], channel[-1], channel_mask, workspace, loss, terms, batch, channels,
                call.units, blocks, strips, chunks, temperature, _split(s.transfer_weight), _split(s.masked_weight),
                config, o, CHUNK, STRIP, ROWS, BLOCK, num_warps=MASK_WARPS,
            )  # fmt: skip
        if not at_once or batch == 0:
            x = student if adapted is None else adapted
            own = _Call(x, teacher)
            sums = own.errors(x, teacher, spatial_mask, channel_mask, s.through)
            loss, terms = own.finish(
                workspace[batch * blocks * STATS.value + batch :], sums, s.transfer_weight, s.masked_weight
            )
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
    channels = call.channels
    if call.channels_last:
        pixels = GRADIENT_PIXELS_CHANNELS_LAST
    else:
        pixels = min(GRADIENT_PIXELS, next_power_of_2(call.count))
    elements = GRADIENT_ELEMENTS // (1 + call.wide)
    config = call.config(min(elements // pixels, next_power_of_2(channels)), pixels)
    blocks = cdiv(call.count, pixels)
    maps = 0 if spatial is None else spatial.shape[1]
    if maps:
        spatial, channel = spatial[-1], channel[-1]
    given = 0 if grad_spatial is None else grad_spatial.shape[0]
    small = [
        x.new_empty(0, dtype=call.dtype) if v is None else v.contiguous()
        for v in (grad_loss, terms, spatial, channel, spatial_mask, channel_mask, grad_spatial, grad_channel)
    ]
    grid = (call.batch * blocks, cdiv(channels, config.channels))
    with on_device(x):
        gradient[grid](
            call.map(x), call.map(x if other is None else other), call.map(out), *small, call.batch, channels,
            call.units, blocks, side, config, other is not None, maps, given, signed, num_warps=GRADIENT_WARPS,
        )  # fmt: skip
    return out

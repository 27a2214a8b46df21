"""The forward kernel of the op ``attention_mask`` in Triton that reads both maps; what is small: attention_mask_masks.

The masked error waits for the masks. Its sums over the pixels of a block need only exp(G / T) of these very pixels,
relative to the largest there: the divisor of the softmax and the weights of channels are factors that follow.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ._jit import jit
from ._zeros import vector
from .attention_mask_passes import inside_tile, load_tile, number, pixel_count


class Options(NamedTuple):
    """Compile-time side of a call."""

    signed: bool  # L_AT compares means of A, not of |A|
    pairs: bool  # both maps' pooled attention is returned, else its difference
    through: bool  # and so are means of |A|, whatever L_AT compares
    softmax_of_sum: bool
    channel_mask: bool
    errors: bool  # the masked error is summed here
    transfer: bool
    once: bool  # a tile has all channels
    # What is summed over pixels, in this order: |x| and |y|; x and y or x - y; errors under each softmax.
    absolute: int
    plain: int
    weighted: int
    kinds: int  # the sum of these


# Of a block: largest, sum and error of the student's softmax (or the sum's), of the teacher's; squares for L_AT.
STATS = tl.constexpr(7)
# Of an image: masked error, squares of spatial and of channel attention; sum and error of each softmax.
RESULTS = tl.constexpr(7)


@triton.jit
def workspace_of(data, batch, blocks, channels, KINDS: tl.constexpr):
    """stats [B, STATS, blocks], results [RESULTS, B], sums [KINDS, B, C], parts [KINDS, B, blocks, C], counters [B + 1]."""
    batch = batch.to(tl.int64)
    results = data + batch * blocks * STATS
    sums = results + RESULTS * batch
    parts = sums + KINDS * batch * channels
    counters = parts + KINDS * batch * blocks * channels
    return data, results, sums, parts, counters.to(tl.pointer_type(tl.int32))


@triton.jit
def _put(to, value, ok, share, step):
    """Adds to what the last step left times ``share``."""
    tl.store(to, tl.load(to, ok & (step > 0), other=0.0) * share + value, ok)


@triton.jit
def _by_channel(a, b, to, size, ok, step, o: tl.constexpr):
    """Sums over pixels, to kinds that are ``size`` apart."""
    if o.absolute > 0:
        _put(to, tl.sum(tl.abs(a), 1), ok, 1.0, step)
        _put(to + size, tl.sum(tl.abs(b), 1), ok, 1.0, step)
    if o.signed:
        to += o.absolute * size
        _put(to, tl.sum(a if o.pairs else a - b, 1), ok, 1.0, step)
        if o.pairs:
            _put(to + size, tl.sum(b, 1), ok, 1.0, step)


@triton.jit
def _by_pixel(a, b, o: tl.constexpr):
    """Sums over channels of |x|, |y|, of x or x - y, of y, and of (x - y)²."""
    d = a - b
    plain = tl.sum(a if o.pairs else d, 0)
    return tl.sum(tl.abs(a), 0), tl.sum(tl.abs(b), 0), plain, tl.sum(b, 0), tl.sum(d * d, 0)


@triton.jit
def _exponentials(v, inside, inverse):
    """exp((v - most) * inverse) inside, 0 elsewhere, and most."""
    most = tl.max(tl.where(inside, v, float("-inf")), 0)
    return tl.where(inside, tl.exp((v - most) * inverse), 0.0), most


@triton.jit
def _joined(most, new, inverse):
    """The larger of two, and what sums relative to each are multiplied by."""
    both = tl.maximum(most, new)
    return both, tl.exp((most - both) * inverse), tl.exp((new - both) * inverse)


@jit(do_not_specialize=["batch", "blocks"])
def pool_pair(
    x, y, absolute, compared, workspace, batch, channels, units, blocks, steps, temperature,
    c: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """absolute [2, B, P]; compared [1 or 2, B, P], unless they are the same; of every block stats and parts.

    A program has ``steps`` tiles of pixels of one image. Grid: (B * blocks,).
    """
    program = tl.program_id(0)
    image, block = (program // blocks).to(tl.int64), program % blocks
    count, inverse = pixel_count(units, c), 1 / number(temperature, c.acc)
    stats, _, _, parts, counters = workspace_of(workspace, batch, blocks, channels, o.kinds)
    if block == 0:
        tl.store(counters + image, 0)
        if image == 0:
            tl.store(counters + batch, 0)
    parts += (image * blocks + block) * channels
    parts_size, size = batch.to(tl.int64) * blocks * channels, batch.to(tl.int64) * count
    most, most_t = tl.full([], float("-inf"), c.acc), tl.full([], float("-inf"), c.acc)
    zero = tl.full([], 0, c.acc)
    total, total_t, error, error_t, square = zero, zero, zero, zero, zero
    first = block * steps * c.pixels
    for step in range(0, tl.minimum(steps, tl.cdiv(count - first, c.pixels))):
        pixels = (block * steps + step) * c.pixels + tl.arange(0, c.pixels)
        inside = pixels < count
        if o.once:
            index = tl.arange(0, c.channels)
            ok = inside_tile(index, channels, inside, c)
            a, b = load_tile(x, image, index, pixels, ok, c), load_tile(y, image, index, pixels, ok, c)
            _by_channel(a, b, parts + index, parts_size, index < channels, step, o)
            s, t, plain, plain_t, errors = _by_pixel(a, b, o)
        else:
            s, t, plain = vector(c.pixels, c.acc), vector(c.pixels, c.acc), vector(c.pixels, c.acc)
            plain_t, errors = vector(c.pixels, c.acc), vector(c.pixels, c.acc)
            for start in range(0, channels, c.channels):
                index = start + tl.arange(0, c.channels)
                ok = inside_tile(index, channels, inside, c)
                a, b = load_tile(x, image, index, pixels, ok, c), load_tile(y, image, index, pixels, ok, c)
                _by_channel(a, b, parts + index, parts_size, index < channels, step, o)
                more, more_t, more_plain, more_plain_t, more_errors = _by_pixel(a, b, o)
                s, t, plain, plain_t = s + more, t + more_t, plain + more_plain, plain_t + more_plain_t
                errors += more_errors
        s, t, plain, plain_t = s / channels, t / channels, plain / channels, plain_t / channels
        at = image * count + pixels
        tl.store(absolute + at, s, inside)
        tl.store(absolute + size + at, t, inside)
        if o.signed:
            d = plain - plain_t if o.pairs else plain
            tl.store(compared + at, plain, inside)
            if o.pairs:
                tl.store(compared + size + at, plain_t, inside)
        else:
            d = s - t
            if not o.pairs:
                tl.store(compared + at, d, inside)
        square += tl.sum(tl.where(inside, d * d, 0.0), 0)

        # Under the softmax of the student's attention, or of the sum; then under that of the teacher's.
        weight, new = _exponentials(s + t if o.softmax_of_sum else s, inside, inverse)
        most, share, share_new = _joined(most, new, inverse)
        weight *= share_new
        total = total * share + tl.sum(weight, 0)
        error = error * share + tl.sum(weight * errors, 0)
        weight_t, share_t = weight, share
        if not o.softmax_of_sum:
            weight_t, new_t = _exponentials(t, inside, inverse)
            most_t, share_t, share_new_t = _joined(most_t, new_t, inverse)
            weight_t *= share_new_t
            total_t = total_t * share_t + tl.sum(weight_t, 0)
            error_t = error_t * share_t + tl.sum(weight_t * errors, 0)
        if o.weighted > 0:
            to = parts + (o.absolute + o.plain) * parts_size
            if o.once:
                _weighted(a - b, weight, weight_t, to, parts_size, index, channels, share, share_t, step, o)
            else:
                for start in range(0, channels, c.channels):
                    row = start + tl.arange(0, c.channels)
                    there = inside_tile(row, channels, inside, c)
                    e = load_tile(x, image, row, pixels, there, c) - load_tile(
                        y, image, row, pixels, there, c
                    )
                    _weighted(e, weight, weight_t, to, parts_size, row, channels, share, share_t, step, o)
        tl.debug_barrier()  # the next step may read parts in other threads
    stats += image * STATS * blocks + block
    tl.store(stats, most)
    tl.store(stats + blocks, total)
    tl.store(stats + 2 * blocks, error)
    tl.store(stats + 3 * blocks, most_t)
    tl.store(stats + 4 * blocks, total_t)
    tl.store(stats + 5 * blocks, error_t)
    tl.store(stats + 6 * blocks, square)


@triton.jit
def _weighted(d, weight, weight_t, to, size, index, channels, share, share_t, step, o: tl.constexpr):
    """Errors by channel under the weights of each softmax."""
    ok = index < channels
    _put(to + index, tl.sum(d * d * weight[None, :], 1), ok, share, step)
    if o.weighted == 2:
        _put(to + size + index, tl.sum(d * d * weight_t[None, :], 1), ok, share_t, step)

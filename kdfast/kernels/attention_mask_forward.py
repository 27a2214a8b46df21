"""Forward kernels of the op ``attention_mask`` in Triton: one read of both maps, then what is small.

The masked error waits for the masks. Its sums over the pixels of a block need only exp(G / T) of these very pixels,
relative to the largest there: the divisor of the softmax and the weights of channels are factors that follow.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ._jit import jit
from ._zeros import tile, vector
from .attention_mask_passes import inside_tile, load_past, load_tile, number, pixel_count, store_terms, sum_of


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
def _workspace(data, batch, blocks, channels, KINDS: tl.constexpr):
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
    stats, _, _, parts, counters = _workspace(workspace, batch, blocks, channels, o.kinds)
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


@triton.jit
def _softmax_terms(stats, blocks, inverse, acc: tl.constexpr, BLOCK: tl.constexpr):
    """Of an image's softmax: the largest, the sum of exp((v - most) * inverse), and of this times the errors."""
    most, total, error = tl.full([BLOCK], float("-inf"), acc), vector(BLOCK, acc), vector(BLOCK, acc)
    for start in range(0, blocks, BLOCK):
        index = start + tl.arange(0, BLOCK)
        own = tl.load(stats + index, index < blocks, other=float("-inf"))
        both = tl.maximum(most, own)
        shift = tl.where(both == float("-inf"), 0.0, both)
        share, share_own = tl.exp((most - shift) * inverse), tl.exp((own - shift) * inverse)
        total = total * share + tl.load(stats + blocks + index, index < blocks, other=0.0) * share_own
        error = error * share + tl.load(stats + 2 * blocks + index, index < blocks, other=0.0) * share_own
        most = both
    highest = tl.max(most, 0)
    share = tl.exp((most - highest) * inverse)
    return highest, tl.sum(total * share, 0), tl.sum(error * share, 0)


@jit(do_not_specialize=["batch", "blocks", "strips", "chunks"])
def masks(
    absolute, spatial_mask, kept, channel, channel_mask, workspace, loss, terms, batch, channels, units, blocks, strips,
    chunks, temperature, transfer_weight, masked_weight,
    c: tl.constexpr, o: tl.constexpr, CHUNK: tl.constexpr, STRIP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """spatial_mask [B, P]; channel attention and channel_mask [B, C]; loss and terms, of no use without ``o.errors``.

    channel [1 or 2, B, C]: what L_AT compares; kept [2, B, C]: means of |A|, with ``o.through``.

    Per image one program adds up stats and ``strips`` programs of every kind parts; the last of them makes the channel
    mask, in the last image the loss too. ``chunks`` programs make the spatial mask. What the last one adds up does not
    depend on which it is. Grid: (B * (1 + kinds * strips + chunks),).
    """
    adding = o.kinds * strips + 1
    image, task = (tl.program_id(0) // (adding + chunks)).to(tl.int64), tl.program_id(0) % (adding + chunks)
    count, inverse = pixel_count(units, c), 1 / number(temperature, c.acc)
    stats, results, sums, parts, counters = _workspace(workspace, batch, blocks, channels, o.kinds)
    stats += image * STATS * blocks
    if task < adding:
        if task == 0:
            _add_stats(stats, results + image, batch, blocks, inverse, c, o, BLOCK)
        else:
            kind, strip = (task - 1) // strips, (task - 1) % strips
            _add_parts(
                stats, parts, sums, image, kind, strip, batch, channels, blocks, inverse, c, o, STRIP, ROWS, BLOCK
            )  # fmt: skip
        tl.debug_barrier()  # what all threads wrote comes before the count
        if tl.atomic_add(counters + image, 1) == adding - 1:
            _channel_mask(
                sums, results + image, kept, channel, channel_mask, image, batch, channels, count, inverse,
                c, o, BLOCK,
            )  # fmt: skip
            tl.debug_barrier()
            if tl.atomic_add(counters + batch, 1) == batch - 1:
                error = sum_of(results, batch, c.acc, BLOCK)
                store_terms(
                    results + batch, error, loss, terms, batch, transfer_weight, masked_weight,
                    c.acc, o.transfer, BLOCK,
                )  # fmt: skip
    else:
        chunk = task - adding
        _spatial_mask(
            stats, absolute, spatial_mask, image, chunk, batch, count, blocks, inverse, c, o, CHUNK, BLOCK
        )


@triton.jit
def _spatial_mask(
    stats, absolute, out, image, chunk, batch, count, blocks, inverse,
    c: tl.constexpr, o: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pixels = chunk * CHUNK + tl.arange(0, CHUNK)
    inside, at = pixels < count, image * count + pixels
    s = tl.load(absolute + at, inside, other=0.0)
    t = tl.load(absolute + batch.to(tl.int64) * count + at, inside, other=0.0)
    most, total, _ = _softmax_terms(stats, blocks, inverse, c.acc, BLOCK)
    if o.softmax_of_sum:
        weight = tl.exp((s + t - most) * inverse) * (count / total)
    else:
        most_t, total_t, _ = _softmax_terms(stats + 3 * blocks, blocks, inverse, c.acc, BLOCK)
        weight = tl.exp((s - most) * inverse) * (count / total)
        weight = (weight + tl.exp((t - most_t) * inverse) * (count / total_t)) / 2
    tl.store(out + at, weight, inside)


@triton.jit
def _add_stats(stats, results, batch, blocks, inverse, c: tl.constexpr, o: tl.constexpr, BLOCK: tl.constexpr):
    _, total, error = _softmax_terms(stats, blocks, inverse, c.acc, BLOCK)
    tl.store(results + 3 * batch, total)
    tl.store(results + 4 * batch, error)
    if not o.softmax_of_sum:
        _, total, error = _softmax_terms(stats + 3 * blocks, blocks, inverse, c.acc, BLOCK)
        tl.store(results + 5 * batch, total)
        tl.store(results + 6 * batch, error)
    tl.store(results + batch, sum_of(stats + 6 * blocks, blocks, c.acc, BLOCK))


@triton.jit
def _add_parts(
    stats, parts, sums, image, kind, strip, batch, channels, blocks, inverse,
    c: tl.constexpr, o: tl.constexpr, STRIP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums of one kind, of STRIP channels; errors relative to the image's largest attention, not the block's."""
    index = strip * STRIP + tl.arange(0, STRIP)
    known = index < channels
    slot = kind * batch.to(tl.int64) + image
    weighted = kind - (o.absolute + o.plain)
    most = tl.full([], 0, c.acc)
    if weighted >= 0:
        stats += 3 * weighted * blocks
        most, _, _ = _softmax_terms(stats, blocks, inverse, c.acc, BLOCK)
    total = tile(ROWS, STRIP, c.acc)
    for start in range(0, blocks, ROWS):
        row = start + tl.arange(0, ROWS)
        ok = row < blocks
        part = tl.load(
            parts + (slot * blocks + row)[:, None] * channels + index[None, :],
            ok[:, None] & known[None, :],
            other=0.0,
        )
        if weighted >= 0:
            share = tl.exp((tl.load(stats + row, ok, other=float("-inf")) - most) * inverse)
            part *= share[:, None]
        total += part
    tl.store(sums + slot * channels + index, tl.sum(total, 0), known)


@triton.jit
def _highest(most, total, inverse):
    """Of sums relative to their own largest: the largest of all, and the sum relative to it."""
    highest = tl.max(most, 0)
    return highest, tl.sum(total * tl.exp((most - highest) * inverse), 0)


@triton.jit
def _added(most, total, v, ok, inverse):
    v = tl.where(ok, v, float("-inf"))
    both = tl.maximum(most, v)
    shift = tl.where(both == float("-inf"), 0.0, both)
    return both, total * tl.exp((most - shift) * inverse) + tl.exp((v - shift) * inverse)


@triton.jit
def _channel_softmaxes(
    sums, size, n, count, inverse, acc: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr
):
    """Of student's and teacher's means (SUM: of their sum, twice): the largest, and the sum of exponentials."""
    most, total = tl.full([BLOCK], float("-inf"), acc), vector(BLOCK, acc)
    most_t, total_t = most, total
    for start in range(0, n, BLOCK):
        index = start + tl.arange(0, BLOCK)
        ok = index < n
        s, t = load_past(sums + index, ok) / count, load_past(sums + size + index, ok) / count
        most, total = _added(most, total, s + t if SUM else s, ok, inverse)
        if not SUM:
            most_t, total_t = _added(most_t, total_t, t, ok, inverse)
    highest, divisor = _highest(most, total, inverse)
    highest_t, divisor_t = highest, divisor
    if not SUM:
        highest_t, divisor_t = _highest(most_t, total_t, inverse)
    return highest, divisor, highest_t, divisor_t


@triton.jit
def _channel_mask(
    sums, results, kept, channel, channel_mask, image, batch, channels, count, inverse,
    c: tl.constexpr, o: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one image: channel attention and mask, its masked error and its squares of channel attention."""
    sums += image * channels
    size = batch.to(tl.int64) * channels
    square, errors, errors_t = vector(BLOCK, c.acc), vector(BLOCK, c.acc), vector(BLOCK, c.acc)
    total, error = load_past(results + 3 * batch, True), load_past(results + 4 * batch, True)
    if not o.softmax_of_sum:
        total_t, error_t = load_past(results + 5 * batch, True), load_past(results + 6 * batch, True)
    if o.channel_mask:
        highest, divisor, highest_t, divisor_t = _channel_softmaxes(
            sums, size, channels, count, inverse, c.acc, o.softmax_of_sum, BLOCK
        )
    for start in range(0, channels, BLOCK):
        index = start + tl.arange(0, BLOCK)
        ok, at = index < channels, image * channels + index
        weight = vector(BLOCK, c.acc) + 1
        if o.absolute > 0:
            s, t = load_past(sums + index, ok) / count, load_past(sums + size + index, ok) / count
            if o.through:
                tl.store(kept + at, s, ok)
                tl.store(kept + size + at, t, ok)
        if o.channel_mask:
            if o.softmax_of_sum:
                weight = tl.exp((s + t - highest) * inverse) * (channels / divisor)
            else:
                weight = tl.exp((s - highest) * inverse) * (channels / divisor)
                weight = (weight + tl.exp((t - highest_t) * inverse) * (channels / divisor_t)) / 2
        if o.weighted > 0:
            own = sums + (o.absolute + o.plain) * size + index
            errors += weight * load_past(own, ok)
            if o.weighted == 2:
                errors_t += weight * load_past(own + size, ok)
        if o.signed:
            own = sums + o.absolute * size + index
            s = load_past(own, ok) / count
            if o.pairs:
                t = load_past(own + size, ok) / count
        d = s if o.signed and not o.pairs else s - t
        square += tl.where(ok, d * d, 0.0)
        tl.store(channel_mask + at, weight, ok)
        tl.store(channel + at, s if o.pairs else d, ok)
        if o.pairs:
            tl.store(channel + size + at, t, ok)
    if o.errors:
        if o.weighted > 0:
            error = tl.sum(errors, 0)
        if o.softmax_of_sum:
            error = error / total * count
        else:
            if o.weighted > 0:
                error_t = tl.sum(errors_t, 0)
            error = (error / total + error_t / total_t) * count / 2
        tl.store(results, error)
    tl.store(results + 2 * batch, tl.sum(square, 0))

"""The forward kernel of the op ``attention_mask`` in Triton that makes masks and the loss of what ``pool_pair`` left."""

from __future__ import annotations

import triton
import triton.language as tl

from ._jit import jit
from ._zeros import tile, vector
from .attention_mask_forward import STATS, workspace_of
from .attention_mask_passes import load_past, number, pixel_count, store_terms, sum_of


@triton.jit
def _shares(most, own, inverse):
    """The larger of each two, and what sums relative to either are multiplied by; there may be nothing in both yet."""
    both = tl.maximum(most, own)
    shift = tl.where(both == float("-inf"), 0.0, both)
    return both, tl.exp((most - shift) * inverse), tl.exp((own - shift) * inverse)


@triton.jit
def _softmax_terms(stats, blocks, inverse, acc: tl.constexpr, BLOCK: tl.constexpr):
    """Of an image's softmax: the largest, the sum of exp((v - most) * inverse), and of this times the errors."""
    most, total, error = tl.full([BLOCK], float("-inf"), acc), vector(BLOCK, acc), vector(BLOCK, acc)
    for start in range(0, blocks, BLOCK):
        index = start + tl.arange(0, BLOCK)
        own = tl.load(stats + index, index < blocks, other=float("-inf"))
        most, share, share_own = _shares(most, own, inverse)
        total = total * share + tl.load(stats + blocks + index, index < blocks, other=0.0) * share_own
        error = error * share + tl.load(stats + 2 * blocks + index, index < blocks, other=0.0) * share_own
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
    stats, results, sums, parts, counters = workspace_of(workspace, batch, blocks, channels, o.kinds)
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
    most, share, share_own = _shares(most, tl.where(ok, v, float("-inf")), inverse)
    return most, total * share + share_own


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

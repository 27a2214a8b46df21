"""Standard normal numbers of a counter inside Triton kernels: those of :func:`kdfast.reference.feature_augment.normal`.

The bits of Philox are the reference's; logarithm and sine are polynomials in float32, where an angle is an exact count of
2^-24 turns, and the library's in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _multiply(factor: tl.constexpr, word):
    product = word.to(tl.uint64) * factor
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox(counter, low, high):
    """Four words for an int64 counter: Philox 4x32-10."""
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = c0 * 0, c0 * 0
    k0, k1 = low.to(tl.uint32), high.to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _radius(word, ACC: tl.constexpr):
    """sqrt(-2 ln u) with u = (k + 1/2) 2^-24 for the upper 24 bits k of a word."""
    k = (word >> 8).to(tl.int32)
    if ACC == tl.float64:  # noqa: SIM300
        return tl.sqrt(-2.0 * tl.log((k.to(tl.float64) + 0.5) * 5.9604644775390625e-8))
    else:
        # u below 1/2, else 1 - u: neither is rounded.
        rest = (tl.where(k < 8388608, k, 16777215 - k).to(tl.float32) + 0.5) * 5.9604644775390625e-8
        bits = tl.where(k < 8388608, rest, 1 - rest).to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) >> 23  # u = (1 + t) 2^exponent with 1 + t in [sqrt(1/2), sqrt(2))
        t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1
        t = tl.where(exponent == 0, -rest, t)
        e, z = exponent.to(tl.float32), t * t
        # log(1 + t) as in the Cephes library.
        p = 7.0376836292e-2 * t - 1.1514610310e-1
        p = p * t + 1.1676998740e-1
        p = p * t - 1.2420140846e-1
        p = p * t + 1.4249322787e-1
        p = p * t - 1.6668057665e-1
        p = p * t + 2.0000714765e-1
        p = p * t - 2.4999993993e-1
        p = p * t + 3.3333331174e-1
        logarithm = t + (p * t * z - 2.12194440e-4 * e - 0.5 * z) + 0.693359375 * e
        return tl.sqrt(-2.0 * logarithm)


@triton.jit
def _wave(word, ACC: tl.constexpr):
    """Cosine and sine of 2π (k + 1/2) 2^-24 for the upper 24 bits k of a word."""
    k = (word >> 8).to(tl.int32)
    quarter = (k + 2097152) >> 22  # the nearest
    angle = ((k - (quarter << 22)).to(ACC) + 0.5) * 3.7450702829238413e-07
    if ACC == tl.float64:  # noqa: SIM300
        c, s = tl.cos(angle), tl.sin(angle)
    else:
        z = angle * angle
        s = (-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1
        s = s * z * angle + angle
        c = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
        c = c * z * z - 0.5 * z + 1
    odd = quarter % 2 == 1
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    return (
        tl.where(((quarter + 1) & 2) != 0, -cosine, cosine),
        tl.where((quarter & 2) != 0, -sine, sine),
    )


@triton.jit
def normal(place, low, high, ACC: tl.constexpr):
    """The numbers of places (int64)."""
    c0, c1, c2, c3 = _philox(place // 4, low, high)
    lane = place % 4
    cosine, sine = _wave(tl.where(lane < 2, c1, c3), ACC)
    return _radius(tl.where(lane < 2, c0, c2), ACC) * tl.where(lane % 2 == 0, cosine, sine)


@triton.jit
def normal_of_fours(counter, low, high, ROWS: tl.constexpr, FOURS: tl.constexpr, ACC: tl.constexpr):
    """The numbers of places 4 counter to 4 counter + 3, [ROWS, 4 FOURS] of counters [ROWS, FOURS]."""
    c0, c1, c2, c3 = _philox(counter, low, high)
    first, second = _radius(c0, ACC), _radius(c2, ACC)
    cos0, sin0 = _wave(c1, ACC)
    cos1, sin1 = _wave(c3, ACC)
    even, odd = tl.join(first * cos0, second * cos1), tl.join(first * sin0, second * sin1)
    return tl.reshape(tl.join(even, odd), [ROWS, 4 * FOURS])

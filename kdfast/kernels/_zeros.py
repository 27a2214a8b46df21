"""Accumulators of Triton kernels. Sizes are arguments because Triton 3.6 takes no field of a Config in a list."""

import triton
import triton.language as tl


@triton.jit
def vector(size: tl.constexpr, acc: tl.constexpr):
    return tl.zeros([size], acc)


@triton.jit
def tile(rows: tl.constexpr, columns: tl.constexpr, acc: tl.constexpr):
    return tl.zeros([rows, columns], acc)

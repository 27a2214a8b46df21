"""What this machine can do at best, measured in the same run: copy bandwidth and matrix rate."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

LARGEST_COPY = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes per buffer
SMALLEST_COPY = {
    "cpu": 1 << 18,
    "cuda": 1 << 30,
}  # on a GPU the inputs rotate, so that memory is always the limit
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}


class Ceilings:
    """Bytes per second of a copy, and floating point operations per second of a square matrix product.

    The copy is measured with two buffers that make up the working set (inputs and gradients; at most an eighth
    more), so that a case that fits a cache is held against that cache, and one that does not is not. Each
    figure is the best of several tries.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: dict[int, float] = {}
        self._products: dict[torch.dtype, float] = {}

    def bandwidth(self, working_set: int | None = None) -> float:
        """Bytes read plus bytes written per second; without a working set, that of the memory."""
        kind = self.device.type
        half = LARGEST_COPY[kind] if working_set is None else _rounded_up(working_set // 2)
        half = min(max(half, SMALLEST_COPY[kind]), LARGEST_COPY[kind])
        if half not in self._copies:
            source = torch.ones(half // 4, device=self.device)
            target = torch.empty_like(source)
            self._copies[half] = 2 * half / self._best(lambda: target.copy_(source))
        return self._copies[half]

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """On the CPU that of float32 for all: kdfast and the reference multiply in float32 there."""
        dtype = torch.float32 if self.device.type == "cpu" else dtype
        if dtype not in self._products:
            n = MATRIX_SIZE[self.device.type]
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            self._products[dtype] = 2 * n**3 / self._best(lambda: torch.mm(a, b, out=out))
        return self._products[dtype]

    def floor(self, nbytes: int, flops: int, working_set: int, dtype: torch.dtype) -> float:
        """Seconds below which no implementation can come."""
        return max(nbytes / self.bandwidth(working_set), flops / self.matrix_rate(dtype))

    def _best(self, fn: Callable[[], object], tries: int = 7, seconds: float = 0.05) -> float:
        fn()
        start = time.perf_counter()
        self._repeat(fn, 1)
        calls = max(1, int(seconds / max(time.perf_counter() - start, 1e-7)))
        return min(self._repeat(fn, calls) for _ in range(tries)) / calls

    def _repeat(self, fn: Callable[[], object], calls: int) -> float:
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        synchronize()
        return time.perf_counter() - start


def _rounded_up(nbytes: int) -> int:
    """To at most an eighth more, so that similar sizes share a measurement."""
    step = max(1 << max(nbytes.bit_length() - 4, 0), 4)
    return -(-nbytes // step) * step

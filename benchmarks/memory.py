"""Peak memory of a call beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kdfast import _extension

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which the memory grew at most during ``call``; None where it cannot be measured.

    On a GPU: the allocator's own peak, exact. On Linux: the process's peak resident memory, which the kernel is
    told to forget just before, after freed memory was handed back to it. This sees every allocation, by Python,
    torch or C++, to about 0.3 MB: the kernel counts the pages of each thread in batches, so this is the middle of
    five calls, if they are short. What kdfast keeps between calls is given back before each, and counted; what
    other libraries keep (thread pools, packing buffers) is not, because ``call`` runs once before.
    """
    start = time.perf_counter()
    call()
    calls = 5 if time.perf_counter() - start < 1 else 1
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
    found = [_resident_peak(call, trim) for _ in range(calls)]
    return None if None in found else sorted(found)[calls // 2]


def _resident_peak(call: Callable[[], object], trim: Callable[[int], int]) -> int | None:
    if _extension.module is not None:
        _extension.module.release_memory()
    trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+) kB", _STATUS.read_text())[1]) * 1024


def available(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the machine does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    except OSError:
        return None

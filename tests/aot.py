"""Ahead-of-time compilation of Triton launches as an op makes them, without a GPU.

``launches(call)`` runs host code on meta tensors and records what it would launch; ``resources`` compiles one
launch for an architecture, with the very types, constants and alignments that Triton would find at run time.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction, create_function_from_signature

from kdfast.kernels._jit import Kernel

SHARED_LIMIT = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # bytes that one block can have, by compute capability
GRID_LIMIT = (2**31 - 1, 65535, 65535)  # programs along each axis
LOG = "ptxas.log"


class Launch(NamedTuple):
    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]

    def __str__(self) -> str:
        constants = [a for a, p in zip(self.args, self.kernel.params, strict=False) if p.is_constexpr]
        return f"{self.kernel.__name__}({', '.join(map(str, constants))}, {self.options})"


class Resources(NamedTuple):
    shared: int  # bytes
    registers: int
    spilled: int  # bytes that each thread stores for want of registers


def launches(call: Callable[[], object]) -> list[Launch]:
    """What ``call`` launches, in order; nothing runs."""
    found: list[Launch] = []

    def launch_of(kernel, grid):
        return lambda *args, **options: found.append(Launch(kernel.triton, grid, args, options))

    with mock.patch.object(Kernel, "__getitem__", launch_of):
        call()
    return found


def source(launch: Launch, capability: int) -> tuple[ASTSource, GPUTarget, dict[str, Any]]:
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, rest = bind(*launch.args, **launch.options)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, launch.options, bound, specialization, rest
    )
    return ASTSource(launch.kernel, signature, constants, attributes), target, options.__dict__


def resources(launch: Launch, capability: int) -> Resources:
    """What ptxas said when Triton compiled the launch: its words are kept beside the kernel, in Triton's cache."""
    src, target, options = source(launch, capability)
    with mock.patch.object(knobs.nvidia, "dump_ptxas_log", True), redirect_stdout(io.StringIO()) as printed:
        compiled = triton.compile(src, target=target, options=options)
        cache = get_cache_manager(compiled.hash)
        kept = cache.get_file(LOG)
        if not kept and not printed.getvalue():  # compiled by something else than this function
            compiler = make_backend(target)
            compiler.make_cubin(compiled.asm["ptx"], {}, compiler.parse_options(options), capability)
    log = printed.getvalue() or Path(kept).read_text()
    if not kept:
        cache.put(log, LOG, binary=False)
    # The stack alone would not do: the rarely taken branch of libdevice's sine has an array there.
    registers = re.search(r"Used (\d+) registers", log)[1]
    spilled = re.search(r"(\d+) bytes spill stores", log)[1]
    return Resources(compiled.metadata.shared, int(registers), int(spilled))

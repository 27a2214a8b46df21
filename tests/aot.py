"""Ahead-of-time compilation of Triton launches as an op makes them, without a GPU.

``launches(call)`` runs host code on meta tensors and records what it would launch; ``resources`` compiles one
launch for an architecture, with the very types, constants and alignments that Triton would find at run time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kdfast.kernels._jit import Kernel

SHARED_LIMIT = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # bytes that one block can have, by compute capability
GRID_LIMIT = (2**31 - 1, 65535, 65535)  # programs along each axis


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
    src, target, options = source(launch, capability)
    compiled = triton.compile(src, target=target, options=options)
    ptx = compiled.asm["ptx"]
    # The stack alone would not do: the rarely taken branch of libdevice's sine has an array there.
    gpu = re.search(r"[.]target (sm_[0-9a-z]+)", ptx)[1]
    command = [get_ptxas(capability).path, "-v", f"--gpu-name={gpu}"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command += [str(file), "-o", str(file.with_suffix(".cubin"))]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    return Resources(compiled.metadata.shared, registers, int(re.search(r"(\d+) bytes spill stores", log)[1]))

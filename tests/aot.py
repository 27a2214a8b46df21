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
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

SHARED_LIMIT = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # bytes that one block can have, by compute capability


class Launch(NamedTuple):
    kernel: JITFunction
    args: tuple
    options: dict[str, Any]

    def __str__(self) -> str:
        constants = [a for a, p in zip(self.args, self.kernel.params, strict=False) if p.is_constexpr]
        return f"{self.kernel.__name__}({', '.join(map(str, constants))}, {self.options})"


class Resources(NamedTuple):
    shared: int  # bytes
    registers: int
    local: int  # bytes of stack and local memory for each thread: not 0 when registers spill


def launches(call: Callable[[], object]) -> list[Launch]:
    """What ``call`` launches, in order; nothing runs."""
    found: list[Launch] = []

    def run(kernel, *args, grid, warmup, **options):
        found.append(Launch(kernel, args, options))

    with mock.patch.object(JITFunction, "run", run):
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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    stack, registers, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("STACK", "REG", "LOCAL")
    )
    return Resources(compiled.metadata.shared, registers, stack + local)

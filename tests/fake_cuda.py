"""A CUDA driver that launches nothing, under Triton's own launchers: what they hand to the driver, without a GPU.

Tensors stay on the CPU. Kernels are not compiled: what would be is told apart as Triton tells it apart, and has a number.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime import driver

COMPILER = shutil.which("gcc") or shutil.which("cc")
SIZES = {
    "i1": 1,
    "i8": 1,
    "u1": 1,
    "u8": 1,
    "i16": 2,
    "u16": 2,
    "fp16": 2,
    "bf16": 2,
    "i32": 4,
    "u32": 4,
    "fp32": 4,
}


class Launch(NamedTuple):
    """One launch: ``kernel`` is what Triton compiled, by number."""

    kernel: int
    grid: tuple[int, ...]
    threads: int
    stream: int
    arguments: bytes


class _Last(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_uint64), ("stream", ctypes.c_uint64), ("launches", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3), ("threads", ctypes.c_uint32), ("shared", ctypes.c_uint32),
        ("size", ctypes.c_uint32), ("bytes", ctypes.c_uint8 * 2048),
    ]  # fmt: skip


_numbers: dict[
    tuple[str, bytes], int
] = {}  # of kernels, whichever driver has them: Triton keeps what it compiled


@cache
def library() -> ctypes.CDLL:
    """The driver; once it is loaded, whatever asks for libcuda.so.1 gets it."""
    source = Path(__file__).with_suffix(".c")
    # A folder that stays: Triton keeps the launchers that it links with what lies there.
    folder = source.parents[1] / "build" / f"fake-cuda-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    to, made = folder / "libcuda.so.1", folder / str(os.getpid())
    if not to.exists():
        options = ["-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([COMPILER, *options, source, "-o", made], check=True)
        made.replace(to)
    return ctypes.CDLL(str(to), mode=ctypes.RTLD_GLOBAL)


def _sizes(signature: Any) -> Iterator[int]:
    """Bytes of the parameters that a kernel of this signature has."""
    for of in signature:
        if isinstance(of, tuple):
            yield from _sizes(of)
        elif of != "constexpr":
            yield SIZES.get(of, 8)


class Driver:
    """In the place of ``triton.runtime.driver.active``. ``stream`` and ``device`` are what is current."""

    def __init__(self) -> None:
        self.stream, self.device = 0, 0
        folders = [nvidia.libdevice_dir, str(Path(library()._name).parent)]
        self._folders = mock.patch.object(nvidia, "library_dirs", return_value=folders)
        with self._folders:
            self._utils = nvidia.CudaUtils()

    @property
    def utils(self) -> Driver:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._utils, name)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + (device << 16)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def launcher_cls(self, src: Any, metadata: Any) -> nvidia.CudaLauncher:
        self._parameters = bytes([*_sizes(src.signature.values()), 8, 8])  # global and profile scratch
        with self._folders:
            return nvidia.CudaLauncher(src, metadata)

    def load_binary(self, name: str, code: bytes = b"", *_: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, bytes spilled, most threads."""
        number = _numbers.setdefault((name, code), len(_numbers) + 1)
        if library().fake_sizes(ctypes.c_uint64(number), self._parameters, len(self._parameters)):
            raise RuntimeError("the fake driver holds no more kernels")
        return number, number, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def compile(self, src: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> Compiled:
        what = (
            src.fn.__module__,
            src.fn.__name__,
            self.device,
            src.signature,
            src.constants,
            src.attrs,
            options,
        )
        return Compiled(self, repr(what), src, options)

    def last(self) -> Launch:
        found = _Last.in_dll(library(), "fake_last")
        arguments = bytes(found.bytes[: found.size])
        return Launch(found.function, tuple(found.grid), found.threads, found.stream, arguments)

    @property
    def launches(self) -> int:
        return _Last.in_dll(library(), "fake_last").launches


class Compiled(CompiledKernel):
    """A kernel without code."""

    module = run = None

    def __init__(self, driver: Driver, name: str, src: Any, options: dict[str, Any]) -> None:
        self.name, self.src = name, src
        _ = src.fn.cache_key  # which finds the globals that the kernel reads
        self.packed_metadata = (options["num_warps"], options["num_ctas"], 0)
        self.metadata = SimpleNamespace(
            num_ctas=1, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
            launch_cooperative_grid=False, launch_pdl=False, instrumentation_mode="",
        )  # fmt: skip
        self.run = driver.launcher_cls(src, self.metadata)
        _, self.function, *_ = driver.load_binary(name)

    def _init_handles(self) -> None:
        pass


@contextmanager
def active(compiling: bool = False) -> Iterator[Driver]:
    """Triton launches on the fake driver; without ``compiling`` it makes no code."""
    with ExitStack() as stack:
        fake = Driver()
        stack.enter_context(mock.patch.object(driver, "_active", fake))
        if not compiling:
            stack.enter_context(mock.patch.object(triton.compiler, "compile", fake.compile))
        yield fake

"""A CUDA driver that launches nothing, under Triton's own launchers: what they hand to the driver, without a GPU.

Tensors stay on the CPU. Kernels are not compiled: what would be is told apart as Triton tells it apart, and has a number.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton.compiler
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime import driver

COMPILER = shutil.which("gcc") or shutil.which("cc")
SIZES = {"i1": 1, "i8": 1, "u1": 1, "u8": 1, "i16": 2, "u16": 2, "fp16": 2, "bf16": 2, "i32": 4, "u32": 4, "fp32": 4}


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


@cache
def library() -> ctypes.CDLL:
    """The driver; once it is loaded, whatever asks for libcuda.so.1 gets it."""
    folder = Path(tempfile.mkdtemp(prefix="fake-cuda-"))
    to = folder / "libcuda.so.1"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", source, "-o", to], check=True)
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
        self.library = library()
        folder = Path(self.library._name).parent
        with mock.patch.object(nvidia, "libcuda_dirs", return_value=[str(folder)]):
            self._real_libraries = [nvidia.libdevice_dir, str(folder)]
        self.stream, self.device = 0, 0
        self.compiled: dict[str, Compiled] = {}
        with self.libraries():
            self.utils = nvidia.CudaUtils()

    @contextmanager
    def libraries(self) -> Iterator[None]:
        with mock.patch.object(nvidia, "library_dirs", return_value=self._real_libraries):
            yield

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + (device << 16)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def compile(self, src: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> Compiled:
        name = f"{src.fn.__module__}.{src.fn.__name__} {self.device} {src.signature} {src.constants} {src.attrs} {options}"
        if name not in self.compiled:
            with self.libraries():
                self.compiled[name] = Compiled(self, len(self.compiled) + 1, name, src, options)
        return self.compiled[name]

    def last(self) -> Launch:
        found = _Last.in_dll(self.library, "fake_last")
        arguments = bytes(found.bytes[: found.size])
        return Launch(found.function, tuple(found.grid), found.threads, found.stream, arguments)

    @property
    def launches(self) -> int:
        return _Last.in_dll(self.library, "fake_last").launches


class Compiled(CompiledKernel):
    """A kernel without code."""

    module = run = None

    def __init__(self, driver: Driver, number: int, name: str, src: Any, options: dict[str, Any]) -> None:
        self.function, self.name, self.src = number, name, src
        self.packed_metadata = (options["num_warps"], options["num_ctas"], 0)
        self.metadata = SimpleNamespace(
            num_ctas=1, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
            launch_cooperative_grid=False, launch_pdl=False, instrumentation_mode="", **self.packed(),
        )  # fmt: skip
        sizes = bytes([*_sizes(src.signature.values()), 8, 8])  # global and profile scratch
        if driver.library.fake_sizes(ctypes.c_uint64(number), sizes, len(sizes)):
            raise RuntimeError("the fake driver holds no more kernels")
        self.run = nvidia.CudaLauncher(src, self.metadata)

    def packed(self) -> dict[str, int]:
        return {"num_warps": self.packed_metadata[0], "shared": 0}

    def launch_metadata(self, grid: tuple[int, ...], stream: int, *args: Any) -> None:
        if knobs.runtime.launch_enter_hook is None:
            return None
        return SimpleNamespace(get=lambda: {"name": self.name, "stream": stream})


@contextmanager
def active() -> Iterator[Driver]:
    """Triton launches on the fake driver."""
    with ExitStack() as stack:
        fake = Driver()
        stack.enter_context(mock.patch.object(driver, "_active", fake))
        stack.enter_context(mock.patch.object(triton.compiler, "compile", fake.compile))
        yield fake

"""CUDA sources compiled for the CPU, with the execution model of tests/cuda_emulator."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
from conftest import made_once

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "-std=c++20 -O2 -fno-strict-aliasing -Wno-unknown-pragmas -pthread -shared -fPIC"


def compile_emulated(op: str, factory: pytest.TempPathFactory, flags: str = FLAGS) -> ctypes.CDLL:
    """The launchers of csrc/cuda/<op>.cu; what they launch runs block after block, a thread of the CPU for each of CUDA's."""
    emulator = ROOT / "tests" / "cuda_emulator" / "cuda_emulator.h"
    files = ["-include", str(emulator), "-x", "c++", str(ROOT / "csrc" / "cuda" / f"{op}.cu")]
    with made_once(factory, f"{op}.so") as library:
        if not library.exists():
            command = ["g++", *flags.split(), f"-I{ROOT / 'csrc'}", *files, "-o", str(library)]
            subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))

"""Which implementations this machine can run, which one is chosen, and how to override the choice."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import ContextDecorator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import _extension

BACKENDS = ("reference", "cpu", "triton", "cuda")


@cache
def why_not(name: str) -> str | None:
    """The reason why backend ``name`` cannot run here, or None when it can."""
    if name == "reference":
        return None
    if name in ("cpu", "cuda") and _extension.load_error is not None:
        return f"the compiled extension is not available: {_extension.load_error}"
    if name == "cpu":
        return None
    if name == "cuda" and not _extension.build.get("cuda"):
        return "the extension was built without CUDA (nvcc is needed at build time)"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if interpreting():
            return None
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _validate(name: str, source: str) -> str:
    if name == "auto":
        return name
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}; choose from {('auto', *BACKENDS)}")
    reason = why_not(name)
    if reason is not None:
        raise RuntimeError(f"{source}: backend {name!r} cannot run here: {reason}")
    return name


_requested = _validate(os.environ.get("KDFAST_BACKEND", "auto"), "KDFAST_BACKEND")


class use_backend(ContextDecorator):
    """Run every kdfast op of a block, or of a decorated function, on one backend.

    Args:
        name: ``"auto"`` (per call, by device and size), ``"reference"`` (plain PyTorch), ``"cpu"`` (C++),
            ``"triton"`` or ``"cuda"`` (C++/CUDA). The choice holds for the process, as ``KDFAST_BACKEND`` does.

    Raises:
        ValueError: ``name`` is none of these.
        RuntimeError: this machine or installation cannot run the backend; the message says why.
    """

    def __init__(self, name: str) -> None:
        self.name = _validate(name, "use_backend(name)")
        self._previous: list[str] = []

    def __enter__(self) -> use_backend:
        global _requested
        self._previous.append(_requested)
        _requested = self.name
        return self

    def __exit__(self, *exc: object) -> None:
        global _requested
        _requested = self._previous.pop()


def is_cpu(x: Tensor) -> bool:
    """Whether a call that ``cpu`` supports, on tensors that are where ``x`` is, runs there: :func:`choose` in short."""
    return x.is_cpu and _requested in ("auto", "cpu") and why_not("cpu") is None


def choose(
    op: str, device: str, order: tuple[str, ...], unsupported: Callable[[str], str | None] | None = None
) -> str:
    """The backend that runs this call.

    Args:
        op: name of the op, for messages.
        device: ``tensor.device.type``.
        order: the backends that implement the op for this call on a GPU, best first; on the CPU there is one.
        unsupported: says why a backend cannot do this very call, or None; omit where every backend can.

    A backend asked for by name runs or raises; ``auto`` takes the first that can.
    """
    name = _requested
    if name == "auto":
        candidates = ("cpu",) if device == "cpu" else order if device == "cuda" else ()
        for candidate in candidates:
            if why_not(candidate) is None and (unsupported is None or unsupported(candidate) is None):
                return candidate
        return "reference"
    if name == "reference":
        return name
    runs_on = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cpu",) if interpreting() else ("cuda",)}[name]
    if device not in runs_on:
        raise ValueError(f"{op}: backend {name!r} takes tensors on {runs_on[0]}, got tensors on {device}")
    if name in ("triton", "cuda") and name not in order:
        reason: str | None = f"{op} has no {name} kernel"
    else:
        reason = unsupported(name) if unsupported is not None else None
    if reason is not None:
        raise NotImplementedError(f"{op}: backend {name!r} cannot do this call: {reason}")
    return name


def info() -> dict[str, Any]:
    """Versions, what was built, and which backends this machine can run (with the reason where it cannot)."""
    from . import __version__

    triton_version = None
    if importlib.util.find_spec("triton") is not None:
        from importlib.metadata import version

        triton_version = version("triton")
    return {
        "kdfast": __version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "requested": _requested,
        "backends": {name: why_not(name) or "available" for name in BACKENDS},
        "build": dict(_extension.build),
    }

"""What is measured: a case (a loss on inputs of one paper's setting) and the providers that compute it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdfast import backend

KDFAST = (
    "cpu",
    "triton",
    "cuda",
)  # providers that are kdfast's kernels; all others are what they are compared with
BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


@dataclass(frozen=True)
class Baseline:
    """An implementation to compare with, beside eager and compile: the formula as published code computes it.

    Args:
        fn: inputs -> scalar loss, of the same value as the case's.
        tolerance: relative error of value and gradients against float64 with which it is still timed, even where eager
            is more exact.
        memory: bytes of temporaries; where the device has less, the case is reported as not run.
    """

    fn: Callable[..., Tensor]
    tolerance: float = 1e-2
    memory: int = 0


@dataclass(frozen=True)
class Case:
    """One loss at one size.

    Args:
        family: which table and file of results it belongs to, the name of its module in benchmarks/cases.
        name: unique in the family.
        source: where the size comes from.
        loss: inputs -> scalar loss, from kdfast's public names; the reference and every backend run it. Of an op that
            changes maps: inputs -> map, the last input is the gradient that comes back to it, so that no provider's
            time depends on what a made-up loss after it costs.
        make: (device, seed) -> inputs, without gradients.
        bytes, flops: what the formula needs for forward + backward on an ideal machine: each tensor read or
            written once per pass that cannot be merged, a symmetric product counted by half.
        needs_grad: which inputs get a gradient; by default the first.
        op: the op of kdfast that computes it, where it is not named as the family.
        baselines: further providers by name.
        memory: bytes of temporaries of the reference in float32.
        truth: the loss written another way, where the reference needs more memory than there is: it is run in float64
            for the truth, and in the inputs' type for the error that is allowed.
        conditioning: how much a rounding error of intermediate sums grows on its way to the gradients; a softmax of
            G / T multiplies it by G / T.
    """

    family: str
    name: str
    source: str
    loss: Callable[..., Tensor]
    make: Callable[[torch.device, int], Sequence[Tensor]]
    bytes: int
    flops: int
    needs_grad: Sequence[bool] = (True,)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    op: str = ""
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    memory: int = 0
    truth: Callable[..., Tensor] | None = None
    conditioning: float = 1.0

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.family, self.name, self.dtype_name, self.layout

    def inputs(self, device: torch.device, seed: int = 0) -> list[Tensor]:
        made = list(self.make(device, seed))
        for x, need in zip(made, self.needs_grad, strict=False):
            x.requires_grad_(need)
        return made


@dataclass(frozen=True)
class Provider:
    """One way to compute a case. ``tolerance``: an error with which it is timed, whatever eager's is (measure.py)."""

    name: str
    fn: Callable[..., Tensor]
    backend: str | None = None
    tolerance: float | None = None
    memory: int = 0
    unavailable: str | None = None

    def context(self) -> AbstractContextManager:
        return backend.use_backend(self.backend) if self.backend else nullcontext()


def providers(case: Case, device: torch.device, only: Sequence[str] = ()) -> list[Provider]:
    """All providers of a case on this device, or those named; the ones that cannot run say why."""
    found = [Provider(name, b.fn, None, b.tolerance, b.memory) for name, b in case.baselines.items()]
    found.append(Provider("eager", case.loss, "reference", memory=case.memory))
    # A graph break or a fallback to eager would be timed as compiled code: fullgraph turns it into an error.
    compiled = torch.compile(case.loss, fullgraph=True, dynamic=False)
    found.append(Provider("compile", compiled, "reference", memory=case.memory))
    for name in BACKENDS[device.type]:
        reason = _why_not(name, case.op or case.family)
        found.append(Provider(name, case.loss, None if reason else name, unavailable=reason))
    return [p for p in found if not only or p.name in only]


def _why_not(name: str, op: str) -> str | None:
    reason = backend.why_not(name)
    if reason is None and name in (
        "cpu",
        "cuda",
    ):  # where no kernel is registered, the op would run the reference
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"kdfast::{op}", name.upper()):
            return f"the extension has no {name} kernel for {op}"
    return reason


def pair(
    student: Sequence[int],
    teacher: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    relu: bool = True,
) -> Callable[[torch.device, int], list[Tensor]]:
    """Maker of random student and teacher tensors of the same N samples that share part of their structure.

    Both are mixtures of the same 32 hidden values per sample, plus noise, the teacher with less of it: the
    comparison is far from both 0 and 1, and after the ReLU the features have a mean as large as their
    spread, as real ones have.
    """

    def make(device: torch.device, seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        hidden = torch.randn(student[0], 32, device=device, generator=generator)
        made = []
        for shape, alpha in ((student, 0.2), (teacher, 0.4)):
            features = math.prod(shape[1:])
            mixing = torch.randn(32, features, device=device, generator=generator)
            x = torch.randn(shape[0], features, device=device, generator=generator).addmm_(
                hidden, mixing, alpha=alpha
            )
            x = x.relu_() if relu else x
            made.append(x.view(*shape).to(dtype).contiguous(memory_format=memory_format))
        return made

    return make

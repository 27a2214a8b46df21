"""Inputs and checks for the backends of the op ``affinity``, on any device."""

from __future__ import annotations

import torch
from conftest import assert_as_accurate
from torch import Tensor

from kdfast import use_backend
from kdfast.losses.affinity import concatenation_affinity
from kdfast.reference.affinity import affinity as reference


def inputs(
    batch: int,
    n: int,
    m: int,
    e: int,
    dtype: torch.dtype = torch.float32,
    transposed: bool = True,
    device="cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + m + e)
    a, b = torch.randn(batch, n, generator=generator), torch.randn(batch, m, generator=generator)
    g = torch.randn(batch, e, m, generator=generator).mT
    g = g if transposed else g.contiguous()
    return tuple(v.to(device, dtype) for v in (a, b, g))


def run(call, *values: Tensor) -> list[Tensor]:
    """Value and the gradients of all inputs, for an upstream gradient that is itself transposed."""
    values = [v.detach().requires_grad_() for v in values]
    y = call(*values)
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(y.mT.shape, generator=generator).to(y.device, y.dtype).mT
    return [y.detach(), *torch.autograd.grad(y, values, up)]


def check(backend: str, a: Tensor, b: Tensor, g: Tensor, floor: float = 2e-6) -> None:
    """A backend against the dense form in float64; memory that it does not write is NaN."""
    truth = run(reference, *(v.double() for v in (a, b, g)))
    same = run(reference, a, b, g)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    try:
        with use_backend(backend):
            found = run(concatenation_affinity, a, b, g)
    finally:
        torch.use_deterministic_algorithms(before)
    for name, f, s, t in zip(("y", "grad_a", "grad_b", "grad_g"), found, same, truth, strict=True):
        assert f.dtype == s.dtype
        if not t.numel():
            assert f.shape == t.shape
            continue
        size = float(t.abs().max())
        assert_as_accurate(f, t, s, floor * max(size, 1e-3), name)

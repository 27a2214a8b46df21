"""Inputs and checks for the backends of the op ``criss_cross``, on any device."""

from __future__ import annotations

import torch
from conftest import assert_as_accurate
from torch import Tensor

from kdfast import use_backend
from kdfast.ops.criss_cross import criss_cross
from kdfast.reference import criss_cross as reference

NAMES = ("out", "grad_query", "grad_key", "grad_value")


def inputs(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 1.0,
    channels_last: bool = False,
    device: str = "cpu",
) -> list[Tensor]:
    """query and key [B, d, H, W], value [B, e, H, W] for ``shape`` (B, d, e, H, W); ``scale`` makes scores large."""
    b, d, e, h, w = shape
    generator = torch.Generator().manual_seed(sum(shape))
    made = []
    for channels, by in ((d, scale), (d, scale), (e, 1.0)):
        x = by * torch.randn(b, channels, h, w, generator=generator)
        x = x.to(device, dtype)
        made.append(x.contiguous(memory_format=torch.channels_last) if channels_last else x)
    return made


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Brute force: all H W x H W scores, masked to the own row and column."""
    h, w = query.shape[2:]
    q, k, v = (x.flatten(2) for x in (query, key, value))
    rows = torch.arange(h * w, device=q.device) // w
    columns = torch.arange(h * w, device=q.device) % w
    seen = (rows[:, None] == rows) | (columns[:, None] == columns)
    scores = torch.where(seen, q.transpose(1, 2) @ k, float("-inf"))
    return (scores.softmax(2) @ v.transpose(1, 2)).transpose(1, 2).unflatten(2, (h, w))


def run(call, tensors, grad: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """out and the three gradients for the upstream gradient ``grad``."""
    tensors = [v.detach().to(dtype or v.dtype).requires_grad_() for v in tensors]
    out = call(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))]


def check(backend: str, tensors, floor: float = 2e-6, grad: Tensor | None = None) -> None:
    """A backend against brute force in float64; memory that it does not write is NaN."""
    grad = torch.randn_like(tensors[2]) if grad is None else grad
    truth = run(dense, tensors, grad, torch.float64)
    same = run(lambda *v: reference.criss_cross(*v)[0], tensors, grad)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    try:
        with use_backend(backend):
            found = run(criss_cross, tensors, grad)
    finally:
        torch.use_deterministic_algorithms(before)
    for name, f, s, t in zip(NAMES, found, same, truth, strict=True):
        assert f.dtype == s.dtype, name
        assert_as_accurate(f, t, s, floor * max(1.0, float(t.abs().max())), name)

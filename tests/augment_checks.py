"""Chains and checks for the backends of the op ``feature_augment``, on any device."""

from __future__ import annotations

import torch
from conftest import assert_as_accurate

from kdfast import use_backend
from kdfast.ops.feature_augment import feature_augment
from kdfast.reference import feature_augment as reference
from kdfast.reference.feature_augment import plan

CHAINS = (
    [],
    [("rotate", 20.0, 1)],
    [("shear_x", 0.2, 1), ("translate_y", 0.3, 2)],
    [("noise", 0.1, 5)],
    [("noise", 0.1, (5 << 33) + 7), ("rotate", -25.0, 3)],
    [("channel_shuffle", 0.0, 7), ("noise", 0.5, 2)],
    [("noise", 0.5, 2), ("channel_shuffle", 0.0, 7)],
    [("channel_drop", 0.4, 7), ("noise", 0.5, 2), ("channel_shuffle", 0.0, 3)],
    [("cutout", 0.5, 3), ("shear_y", 0.3, 2), ("cutout", 0.4, 9)],
    [("cutout", 0.5, 3), ("noise", 0.3, 4)],
    [("noise", 0.3, 4), ("cutout", 0.5, 3), ("shear_x", 0.3, 2)],
    [("rotate", 10.0, 0), ("noise", 1.0, 3), ("rotate", 10.0, 0), ("channel_drop", 0.3, 2)],
    [("translate_x", 2.0, 0)],
)


def run(call, x, up):
    x = x.detach().requires_grad_()
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y, x, up)]


def check(
    backend: str,
    shape: tuple[int, ...],
    chain: list,
    dtype: torch.dtype = torch.float32,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    sliced: bool = False,
    device: str = "cpu",
    floor: float = 2e-6,
) -> None:
    """A backend against the reference in float64; memory that it does not write is NaN."""
    generator = torch.Generator().manual_seed(0)
    x, up = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    x = x.contiguous(memory_format=memory_format)
    if sliced:
        x = torch.stack([x, x], -1)[..., 0]
        up = up.flip(3).flip(3).expand(shape)
    steps = plan(shape, chain)
    truth = run(lambda v: reference.feature_augment(v, *steps), x.double(), up.double())
    same = run(lambda v: reference.feature_augment(v, *steps), x, up)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    try:
        with use_backend(backend):
            found = run(lambda v: feature_augment(v, steps), x, up)
    finally:
        torch.use_deterministic_algorithms(before)
    for name, f, s, t in zip(("value", "gradient"), found, same, truth, strict=True):
        assert f.dtype == dtype and f.shape == t.shape
        if not t.numel():
            continue
        assert_as_accurate(f, t, s, floor, name)

"""Inputs and checks for the backends of the op ``gram``, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast import use_backend
from kdfast.ops.gram import gram
from kdfast.reference import gram as reference


def view(v: Tensor) -> Tensor:
    """[G, N, D] as a view of the op."""
    return v[:, :, None, :, None, None]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def patches(v: Tensor, height: int, width: int) -> Tensor:
    """[B, C, H, W] as [C, H/height, W/width, B, height, width], no copy."""
    return v.unflatten(2, (-1, height)).unflatten(-1, (-1, width)).permute(1, 2, 4, 0, 3, 5)


def _run(call, x: Tensor, y: Tensor, product_weights: Tensor, distance_weights: Tensor) -> list[Tensor]:
    """Products, distances and both gradients of a weighted sum."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    products, distance = call(x, y)
    value = (products * product_weights.to(products)).sum() + (distance * distance_weights.to(distance)).sum()
    gradients = torch.autograd.grad(value, (x, y), materialize_grads=True)
    return [products.detach(), distance.detach(), *gradients]


def check(backend: str, x: Tensor, y: Tensor, *, floor: float = 3e-6, **flags) -> None:
    """Products, distances and both gradients of a backend against the reference in float64.

    A maximal error may be twice that of the reference in the inputs' own type, plus ``floor`` times the
    largest value (distances: at least 1). Memory that the backend does not write is NaN.
    """
    compare = reference.COMPARISONS.index(flags.get("compare", "cka"))
    centered, cosine, inter = (
        flags.get("centered", True),
        flags.get("cosine", False),
        flags.get("inter", False),
    )

    def plain(a: Tensor, b: Tensor):
        return reference.gram(a, b, compare, centered, cosine, inter)

    def fast(a: Tensor, b: Tensor):
        return gram(a, b, **flags)

    xd, yd = x.double(), y.double()
    products, distance = plain(xd, yd)
    largest = products.abs().amax(2, keepdim=True)
    weights = normal(*products.shape, seed=5, dtype=torch.float64, device=x.device) / torch.where(
        largest > 0, largest, 1
    )
    weights = (weights, normal(*distance.shape, seed=6, dtype=torch.float64, device=x.device) + 2)
    truth = _run(plain, xd, yd, *weights)
    expected = _run(plain, x, y, *weights)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    try:
        with use_backend(backend):
            found = _run(fast, x, y, *weights)
    finally:
        torch.use_deterministic_algorithms(before)
    for name, f, e, t in zip(
        ("products", "distance", "grad_x", "grad_y"), found, expected, truth, strict=True
    ):
        assert f.dtype == e.dtype, name
        assert f.shape == e.shape, name
        assert torch.isfinite(f).all(), name
        size = t.abs().max().item()
        error, allowed = (f.double() - t).abs().max().item(), 2 * (e.double() - t).abs().max().item()
        allowed += floor * (max(size, 1) if name == "distance" else size)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, largest value {size:.3g}"

"""What the tests of patches share: maps, the published computation as a loop, and a comparison with it in float64."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import needs_extension
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

import kdfast

BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]


def maps(*shapes: tuple[int, ...], mean: float = 0.5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Student and teacher that share part of their structure."""
    shared = torch.randn(shapes[0][0], 1, 1, max(s[3] for s in shapes))
    made = [torch.randn(s) + shared[..., : s[3]] + mean for s in shapes]
    return [v.to(dtype).requires_grad_() for v in made]


# --- the published computation: one group after the other -------------------------------------------------------------


def naive_patches(x: Tensor, patch: tuple[int, int], average: str, resize: str = "bilinear") -> list[Tensor]:
    """The patch matrices [N, D] of every group, cut out one patch at a time."""
    ph, pw = patch
    height, width = math.ceil(x.shape[2] / ph) * ph, math.ceil(x.shape[3] / pw) * pw
    if resize == "bilinear":
        x = interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
    elif resize == "pad":
        x = pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
    rows, columns = x.shape[2] // ph, x.shape[3] // pw
    cut = [x[:, :, i * ph : (i + 1) * ph, j * pw : (j + 1) * pw] for i in range(rows) for j in range(columns)]
    if average == "channel":
        return [torch.stack([p[:, c].flatten() for p in cut]) for c in range(x.shape[1])]
    if average == "batch":
        return [torch.stack([p[b].flatten() for p in cut]) for b in range(x.shape[0])]
    return [torch.stack([p[:, :, u, v].flatten() for p in cut]) for u in range(ph) for v in range(pw)]


def naive_cka(x: Tensor, y: Tensor, centered: bool, row_norm: str) -> Tensor:
    if row_norm == "cosine":
        x, y = normalize(x, dim=1), normalize(y, dim=1)
    if centered:
        x, y = x - x.mean(0), y - y.mean(0)
    k, m = x @ x.T, y @ y.T
    if row_norm == "row":
        k, m = (g / g.diagonal().sqrt()[:, None] for g in (k, m))
    return (k * m).sum() / torch.sqrt((k * k).sum() * (m * m).sum())  # traces of K Lᵀ, K Kᵀ, L Lᵀ


def naive_pcka(
    student: Tensor,
    teacher: Tensor,
    *,
    patch: tuple[int, int] = (16, 16),
    average: str = "channel",
    intra: float = 1.0,
    inter: float = 0.0,
    centered: bool = True,
    row_norm: str = "none",
    resize: str = "bilinear",
) -> Tensor:
    groups = zip(
        naive_patches(student, patch, average, resize),
        naive_patches(teacher, patch, average, resize),
        strict=True,
    )
    losses = []
    for x, y in groups:
        loss = intra * (1 - naive_cka(x, y, centered, row_norm)) if intra else 0
        if inter:
            loss = loss + inter * (1 - naive_cka(x.T, y.T, centered, row_norm))
        losses.append(loss)
    return torch.stack(losses).mean()


def check(loss, naive, inputs: list[Tensor], backend: str, tolerance: float = 1e-5) -> None:
    """Value and gradients of ``loss`` against float64 autograd through ``naive``."""
    exact = [v.detach().double().requires_grad_() for v in inputs]
    truth = naive(*exact)
    with kdfast.use_backend(backend):
        value = loss(*inputs)
        gradients = torch.autograd.grad(value, inputs)
    assert value.dtype == torch.float32 and value.dim() == 0
    assert abs(float(value) - float(truth)) <= tolerance * max(abs(float(truth)), 1e-3), (value, truth)
    for got, want in zip(gradients, torch.autograd.grad(truth, exact), strict=True):
        half = torch.finfo(got.dtype).eps if got.dtype.itemsize == 2 else 0
        assert got.shape == want.shape
        assert (got.double() - want).abs().max() <= (2 * tolerance + half) * want.abs().max()

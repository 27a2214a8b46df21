"""The Triton kernels of ``affinity`` in Triton's interpreter: the logic, at small sizes."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from affinity_checks import check, inputs

from kdfast.kernels import affinity as kernels

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize(
    ("batch", "n", "m", "e"),
    [(2, 70, 45, 17), (1, 3, 100, 5), (1, 130, 1, 20), (1, 1, 1, 1), (2, 65, 66, 70)],
)
def test_sizes(batch, n, m, e):
    check("triton", *inputs(batch, n, m, e))


@pytest.mark.parametrize("transposed", [False, True])
def test_layouts_and_ties(transposed):
    a, b, g = inputs(2, 40, 50, 18, transposed=transposed)
    check("triton", a.round(), b.round(), g)
    check("triton", a, torch.full_like(b, 0.25), g)
    check("triton", a.T.contiguous().T, b.expand(2, 50), g[:, :, 3:])


def test_large_offset():
    a, b, g = inputs(1, 40, 90, 8)
    check("triton", a + 1e4, b - 1e4, g)


def test_nothing_and_everything_counts():
    a, b, g = inputs(1, 70, 40, 8)
    for shift in (-100, 100):
        check("triton", a + shift, b, g)


def test_many_chunks_per_tile(monkeypatch):
    """All ranks in one tile of queries: it walks through every chunk."""
    monkeypatch.setattr(kernels, "KEYS", 16)
    a, b, g = inputs(1, 20, 200, 6)
    check("triton", 3 * a, b, g)


def test_float64():
    check("triton", *(v.double() for v in inputs(1, 30, 40, 5)), floor=1e-12)

"""The Triton kernels of ``feature_augment`` in Triton's interpreter: the logic, at small sizes."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from augment_checks import CHAINS, check

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (1, 4, 7, 11)])
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "+".join(name for name, *_ in chain) or "nothing")
def test_chains(chain, shape):
    check("triton", shape, chain)


def test_layouts():
    chain = [("noise", 0.3, 2), ("rotate", 20.0, 1)]
    check("triton", (2, 4, 6, 5), chain, memory_format=torch.channels_last)
    check("triton", (2, 4, 6, 5), chain, sliced=True)


def test_more_pixels_than_a_block():
    check("triton", (1, 2, 30, 23), [("shear_y", 0.3, 0), ("translate_x", -0.45, 0)])


def test_float64():
    for chain in ([("rotate", 20.0, 1), ("cutout", 0.4, 2)], [("noise", 0.3, 4), ("shear_x", 0.3, 2)]):
        check("triton", (1, 3, 6, 7), chain, torch.float64, floor=1e-12)
        check("triton", (2, 3, 8, 8), chain[::-1], torch.float64, floor=1e-12)

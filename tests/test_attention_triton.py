"""The Triton kernels of ``attention_mask`` in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret."""

from __future__ import annotations

import pytest
import torch
from attention_checks import SETTINGS, check, check_pool, layouts, maps

from kdfast import backend

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not backend.interpreting(), reason="needs TRITON_INTERPRET=1"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings(settings):
    check("triton", *maps(2, 5, 3, 7), **settings)


# One pixel; one channel; several blocks of pixels, the last with few; several tiles of channels.
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 1, 3, 5), (1, 5, 17, 19), (1, 70, 9, 8), (3, 4, 1, 2)])
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[-1]], ids=str)
def test_shapes(shape, settings):
    check("triton", *maps(*shape), **settings)


@pytest.mark.parametrize("layout", layouts)
def test_layouts(layout):
    check("triton", *(layouts[layout](v) for v in maps(2, 6, 4, 6)), **SETTINGS[-1])


def test_float64_and_float16():
    check("triton", *maps(2, 5, 3, 7, dtype=torch.float64), floor=1e-13, **SETTINGS[-1])
    check("triton", *maps(2, 5, 3, 7, dtype=torch.float16), floor=1e-3, **SETTINGS[-1])


@pytest.mark.parametrize("signed", [False, True])
def test_pool(signed):
    check_pool("triton", maps(2, 5, 17, 19)[0], signed)

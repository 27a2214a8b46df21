"""The Triton kernels of ``attention_mask`` in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret."""

from __future__ import annotations

import pytest
import torch
from attention_checks import SETTINGS, check, check_pool, layouts, maps

from kdfast import backend
from kdfast.ops.attention_mask import attention_mask

kernels = pytest.importorskip("kdfast.kernels.attention_mask")

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


@pytest.mark.parametrize("settings", [SETTINGS[6], SETTINGS[3]], ids=str)
@pytest.mark.parametrize("channels", [8, 64])
def test_tiles(settings, channels, monkeypatch):
    """Several tiles of pixels for a program, the last with fewer; maps that are read again, by tiles of channels."""
    for name, value in {
        "PROGRAMS": 1,
        "STEPS": 3,
        "MOST_CHANNELS": channels,
        "STRIP": 4,
        "ROWS": 2,
        "BLOCK": 4,
    }.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "ELEMENTS", 8 * channels)
    monkeypatch.setattr(kernels, "CHUNK", 16)
    check("triton", *maps(1, 20, 13, 7), **settings)


def test_equal_maps_and_nan():
    x = maps(2, 5, 3, 7)[0]
    with backend.use_backend("triton"):
        for chosen in (SETTINGS[6], SETTINGS[-3]):
            s = x.clone().requires_grad_()
            loss, distances = attention_mask(s, x, **chosen, pooled=False)[:2]
            assert loss == 0 and not distances.any()
            assert not torch.autograd.grad(loss, s)[0].any()
        x[0, 1, 2, 3] = float("nan")
        assert attention_mask(x, maps(2, 5, 3, 7)[1], **SETTINGS[6])[0].isnan()

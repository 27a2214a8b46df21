"""The Triton kernels of ``masked_error`` and ``area_mask`` in Triton's interpreter: the logic, at small sizes."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from attention_checks import layouts
from conftest import assert_as_accurate
from early_checks import called
from torch import Tensor

from kdfast import use_backend
from kdfast.kernels import masked_error as kernels
from kdfast.ops.masked_error import area_mask, masked_error
from kdfast.reference import masked_error as reference
from kdfast.sokd import masked_area_error

pytestmark = pytest.mark.interpret

# One pixel; fewer than a tile on both sides; several pixel blocks and, with small tiles, several channel tiles and groups.
SHAPES = [(2, 3, 1, 1), (3, 5, 2, 3), (1, 9, 25, 42), (2, 37, 7, 7)]


def maps(shape, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return [x, y, torch.randint(0, 4, (shape[0], 1, *shape[2:]), generator=generator).float()]


def run(call, x, y, mask, needs, factor: float = 1.0) -> list[Tensor]:
    x, y = (v.detach().requires_grad_(need) for v, need in zip((x, y), needs, strict=True))
    value = call(x, y, mask)
    return [value.detach(), *torch.autograd.grad(factor * value, [v for v in (x, y) if v.requires_grad])]


def check(x, y, mask, needs=(True, False), factor: float = 1.0) -> None:
    """Against float64; memory that is not written is NaN."""
    truth = run(reference.masked_error, x.double(), y.double(), mask.double(), needs, factor)
    same = run(reference.masked_error, x, y, mask, needs, factor)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with use_backend("triton"):
            found = run(masked_error, x, y, mask, needs, factor)
    finally:
        torch.use_deterministic_algorithms(before)
    learning = [v for v, need in zip((x, y), needs, strict=True) if need]
    for f, v in zip(found[1:], learning, strict=True):
        assert f.stride() == torch.empty_like(v).stride()
    for f, s, t in zip(found, same, truth, strict=True):
        assert f.dtype == s.dtype
        eps = torch.finfo(f.dtype).eps
        assert_as_accurate(f, t, s, 8 * eps * float(t.abs().max()))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_value_and_gradients(shape, dtype, needs):
    check(*maps(shape, dtype), needs)


@pytest.mark.parametrize("factor", [1.0, -7.5])
@pytest.mark.parametrize("sizes", [(16, 1), (64, 4), (64, 4096)])
def test_tiles(monkeypatch, sizes, factor):
    monkeypatch.setattr(kernels, "ELEMENTS", sizes[0])
    monkeypatch.setattr(kernels, "PARTS", sizes[1])
    monkeypatch.setattr(kernels, "PIXELS", 8)
    monkeypatch.setattr(kernels, "FINISH_BLOCK", 2)
    monkeypatch.setattr(kernels, "SCALE_BLOCK", 64)
    x, y, mask = maps((2, 37, 3, 7))
    check(x, y, mask, factor=factor)
    check(*(v.contiguous(memory_format=torch.channels_last) for v in (x, y)), mask, factor=factor)


@pytest.mark.parametrize("layout", layouts)
def test_layouts(layout):
    x, y, mask = maps((2, 6, 5, 4))
    check(layouts[layout](x), y, mask, (True, True))
    check(x, layouts[layout](y), mask.transpose(2, 3).contiguous().transpose(2, 3))
    check(layouts[layout](x), layouts[layout](y), mask)


def test_nothing():
    with use_backend("triton"):
        for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
            x, y, mask = maps(shape)
            value, gradient = run(masked_error, x, y, mask, (True, False))
            assert value == 0 and gradient.shape == shape
        x, y, mask = maps((2, 3, 4, 4))
        value, gradient = run(masked_error, x, y, 0 * mask, (True, False))
        assert value == 0 and not gradient.any()


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("student", ["masked_error_with_gradient_triton"]),
        ("no_grad", ["masked_error_triton"]),
        ("teacher", ["masked_error_triton", "masked_error_backward_triton"]),
        ("both", ["masked_error_triton", *["masked_error_backward_triton"] * 2]),
        ("float16", ["masked_error_triton", "masked_error_backward_triton"]),
    ],
)
def test_what_runs(case, expected):
    x, y, mask = maps((2, 8, 6, 7), torch.float16 if case == "float16" else torch.float32)
    x.requires_grad_(case != "teacher"), y.requires_grad_(case in ("teacher", "both"))

    def step():
        with torch.set_grad_enabled(case != "no_grad"), use_backend("triton"):
            value = masked_area_error(x, y, mask)
        if value.requires_grad:
            value.backward()

    assert called(step) == expected


def test_every_backward_is_its_own():
    x, y, mask = maps((2, 8, 6, 7))
    expected = run(reference.masked_error, x, y, mask, (True, False))[1]
    x.requires_grad_()
    with use_backend("triton"):
        value = masked_error(x, y, mask)
        for factor in (1.0, -2.5, 1.0):
            (found,) = torch.autograd.grad(value, x, torch.tensor(factor), retain_graph=True)
            torch.testing.assert_close(found, factor * expected)
            found.fill_(torch.nan)
        (twice,) = torch.autograd.grad(masked_error(x, y, mask) + 3 * masked_error(x, y, mask), x)
        torch.testing.assert_close(twice, 4 * expected)
        assert torch.autograd.gradgradcheck(
            lambda v: masked_error(v, y[:1, :2, :2].double(), mask[:1, :, :2]),
            x.detach()[:1, :2, :2].double().requires_grad_(),
        )


def test_op_contract():
    x, y, mask = maps((2, 3, 4, 5))
    ops, tests = torch.ops.kdfast, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.masked_error_triton.default, (x, y, mask), test_utils=tests)
    torch.library.opcheck(ops.masked_error_with_gradient_triton.default, (x, y, mask), test_utils=tests)
    grad = torch.tensor(2.0)
    torch.library.opcheck(ops.masked_error_backward_triton.default, (x, y, mask, grad), test_utils=tests)
    boxes = torch.tensor([[[0, 1, 2, 3]]])
    torch.library.opcheck(ops.area_mask_triton.default, (boxes, 4, 5, 0), test_utils=tests)


@pytest.mark.parametrize("multiplicity", reference.MULTIPLICITIES)
@pytest.mark.parametrize("number", [0, 1, 8, 19])
def test_area_mask(multiplicity, number):
    generator = torch.Generator().manual_seed(1)
    low = torch.randint(-3, 9, (4, number, 2), generator=generator)
    # Some empty, some across the border or outside.
    boxes = torch.cat([low, low + torch.randint(-2, 6, (4, number, 2), generator=generator)], 2)
    for height, width in ((7, 9), (1, 1), (3, 200)):
        with use_backend("triton"):
            found = area_mask(boxes, height, width, multiplicity)
            assert torch.equal(found, area_mask(boxes.int(), height, width, multiplicity))
        assert found.dtype == torch.float32
        assert torch.equal(found, reference.area_mask(boxes, height, width, multiplicity))
    with use_backend("triton"):
        assert area_mask(boxes[:0], 7, 9, multiplicity).shape == (0, 1, 7, 9)

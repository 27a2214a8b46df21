"""The ops ``masked_error`` and ``area_mask``: values and gradients against the formula, the gradient that a forward leaves."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_as_accurate, needs_extension, same_for_any_threads
from early_checks import called, check_early
from torch import Tensor

from kdfast import use_backend
from kdfast.ops.masked_error import area_mask, masked_error
from kdfast.reference import masked_error as reference

pytestmark = needs_extension

# Planes of one pixel; less than a vector; taken several at a time with a rest; larger than what is summed at once.
SHAPES = [
    (2, 3, 1, 1),
    (3, 5, 2, 3),
    (2, 70, 7, 7),
    (1, 9, 25, 42),
    (2, 130, 16, 16),
    (1, 2, 70, 66),
    (1, 300, 3, 5),
]


def maps(shape, dtype=torch.float32, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    x, y = ((torch.randn(shape) + mean).to(dtype) for _ in range(2))
    mask = torch.randint(0, 4, (shape[0], 1, *shape[2:])).float()
    return x, y, mask


def run(fn, x, y, mask, needs=(True, False)) -> list[Tensor]:
    x, y = (v.detach().requires_grad_(need) for v, need in zip((x, y), needs, strict=True))
    value = fn(x, y, mask)
    return [value.detach(), *torch.autograd.grad(value, [v for v in (x, y) if v.requires_grad])]


def compare(x, y, mask, needs=(True, False), floor: float | None = None) -> None:
    found = run(masked_error, x, y, mask, needs)
    same = run(reference.masked_error, x, y, mask, needs)
    truth = run(reference.masked_error, x.double(), y.double(), mask.double(), needs)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert found[0].dtype == wide
    for gradient, v in zip(
        found[1:], [v for v, need in zip((x, y), needs, strict=True) if need], strict=True
    ):
        assert gradient.dtype == v.dtype and gradient.stride() == torch.empty_like(v).stride()
    for i, (f, s, t) in enumerate(zip(found, same, truth, strict=True)):
        if not t.numel():
            continue
        scale = float(t.abs().max())
        # Without wide vectors a sum runs over more terms of a lane.
        eps = 8 * torch.finfo(wide).eps if i == 0 else 4 * torch.finfo(x.dtype).eps
        assert_as_accurate(f, t, s, (eps if floor is None else floor) * scale)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_value_and_gradients(shape, dtype, needs):
    compare(*maps(shape, dtype), needs)


@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (2, 70, 7, 7), (1, 40, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(shape, dtype):
    x, y, mask = maps(shape, dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    compare(last, y.contiguous(memory_format=torch.channels_last), mask)
    compare(last, y, mask)
    compare(x, y.contiguous(memory_format=torch.channels_last), mask)
    b, c, h, w = shape
    wide = torch.randn(b, c + 3, h, w + 2).to(dtype)
    compare(wide[:, 1 : c + 1, :, :w], y, mask)
    compare(x, wide[:, :c, :, 2:], mask)
    compare(torch.randn(b, c + 3, h, w).to(dtype)[:, 1 : c + 1], y, mask)  # planes follow one another
    compare(x, y[:1].expand_as(y), mask.expand(b, 1, h, w))
    compare(x.transpose(2, 3), y.transpose(2, 3), mask.transpose(2, 3))


def test_large_mean():
    x, y, mask = maps((2, 70, 14, 14), mean=1000.0)
    compare(x, y, mask)


def test_small_maps_and_nothing():
    compare(*maps((0, 3, 4, 4)), floor=0)
    x, y, mask = maps((2, 3, 4, 4))
    value, gradient = run(masked_error, x, y, 0 * mask)
    assert value == 0 and not gradient.any()
    value, gradient = run(masked_error, x, x.clone(), mask)
    assert value == 0 and not gradient.any()


def test_dtypes_are_promoted():
    x, y, mask = maps((2, 3, 4, 5))
    value, gradient = run(masked_error, x.half(), y, mask)
    torch.testing.assert_close(value, reference.masked_error(x.half(), y, mask))
    assert gradient.dtype == torch.float16


def test_the_forward_leaves_the_gradient(monkeypatch):
    for shape, dtype in (
        ((2, 8, 6, 7), torch.float32),
        ((2, 8, 6, 7), torch.bfloat16),
        ((2, 2, 3, 3), torch.float64),
    ):
        x, y, mask = maps(shape, dtype)
        check_early(monkeypatch, "masked_error", lambda s, y=y, m=mask: masked_error(s, y.to(s.dtype), m), x)


def test_scaled_loss():
    x, y, mask = maps((2, 8, 6, 7))
    (_, expected), (_, found) = (
        run(lambda *v, fn=fn: -7.5 * fn(*v), x, y, mask) for fn in (reference.masked_error, masked_error)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("no_grad", ["masked_error"]),
        ("no gradient needed", ["masked_error"]),
        ("teacher only", ["masked_error", "masked_error_backward"]),
        ("both", ["masked_error", "masked_error_backward", "masked_error_backward"]),
        ("float16", ["masked_error", "masked_error_backward"]),
    ],
)
def test_no_gradient_is_computed_for_nothing(case, expected):
    x, y, mask = maps((2, 8, 6, 7), torch.float16 if case == "float16" else torch.float32)
    x.requires_grad_(case in ("no_grad", "both", "float16"))
    y.requires_grad_(case in ("teacher only", "both"))

    def step():
        with torch.set_grad_enabled(case != "no_grad"):
            value = masked_error(x, y, mask)
        if value.requires_grad:
            value.backward()

    assert called(step) == expected


def test_float16_gradient_does_not_underflow():
    """A loss scale multiplies before the gradient becomes a half."""
    x, y, mask = maps((1, 64, 64, 64), torch.float16)
    (_, expected) = run(lambda *v: 2.0**16 * reference.masked_error(*v), x.float(), y.float(), mask)
    (_, found) = run(lambda *v: 2.0**16 * masked_error(*v), x, y, mask)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-6)


def test_gradcheck():
    x, y, mask = maps((2, 2, 3, 3), torch.float64)
    x.requires_grad_(), y.requires_grad_()
    for inputs in ((x, y), (x, y.detach()), (x.detach(), y)):
        assert torch.autograd.gradcheck(lambda a, b: masked_error(a, b, mask), inputs)
        assert torch.autograd.gradgradcheck(lambda a, b: masked_error(a, b, mask), inputs)


def test_any_number_of_threads():
    x, y, mask = maps((3, 70, 30, 30))
    same_for_any_threads(lambda: run(masked_error, x, y, mask))


def test_outputs_are_written_whole():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    try:
        for shape in SHAPES:
            compare(*maps(shape))
    finally:
        torch.use_deterministic_algorithms(False)


def test_op_contract():
    x, y, mask = maps((2, 3, 4, 5))
    ops, tests = torch.ops.kdfast, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.masked_error.default, (x, y, mask), test_utils=tests)
    torch.library.opcheck(ops.masked_error_with_gradient.default, (x, y, mask), test_utils=tests)
    torch.library.opcheck(
        ops.masked_error_backward.default, (x, y, mask, torch.tensor(2.0)), test_utils=tests
    )
    torch.library.opcheck(ops.area_mask.default, (torch.tensor([[[0, 1, 2, 3]]]), 4, 5, 0), test_utils=tests)


def test_reference_ops_agree():
    """The implementations that run where the extension is missing."""
    from kdfast.ops import masked_error as module

    x, y, mask = maps((2, 3, 4, 5))
    for found, expected in zip(
        module._reference_with_gradient(x, y, mask),
        torch.ops.kdfast.masked_error_with_gradient(x, y, mask),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_compiles():
    x, y, mask = maps((2, 8, 6, 7))
    x.requires_grad_()
    value = torch.compile(masked_error, fullgraph=True)(x, y, mask)
    torch.testing.assert_close(value, reference.masked_error(x, y, mask))
    (found,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(found, torch.autograd.grad(reference.masked_error(x, y, mask), x)[0])


def test_wrong_input_is_named():
    x, y, mask = maps((2, 3, 4, 5))
    op = torch.ops.kdfast.masked_error
    for arguments, named in (
        ((x, y[:, :2], mask), "one shape"),
        ((x, y.double(), mask), "one dtype"),
        ((x, y, mask.double()), "mask must be float32"),
        ((x, y, mask[:1]), "mask must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=named):
            op(*arguments)


@pytest.mark.parametrize("multiplicity", reference.MULTIPLICITIES)
def test_area_mask(multiplicity):
    low, span = torch.randint(-3, 9, (4, 8, 2)), torch.randint(-2, 6, (4, 8, 2))
    boxes = torch.cat([low, low + span], 2)  # some empty, some across the border or outside
    for height, width in ((7, 9), (1, 1), (3, 20)):
        found = area_mask(boxes, height, width, multiplicity)
        with use_backend("reference"):
            expected = area_mask(boxes, height, width, multiplicity)
        assert torch.equal(found, expected) and found.dtype == torch.float32
    assert torch.equal(area_mask(boxes.int(), 7, 9, "sum"), area_mask(boxes, 7, 9, "sum"))
    halves = boxes + 0.5
    expected = reference.area_mask(halves, 7, 9, multiplicity)
    assert torch.equal(area_mask(halves, 7, 9, multiplicity), expected)
    assert area_mask(boxes[:0], 7, 9, multiplicity).shape == (0, 1, 7, 9)

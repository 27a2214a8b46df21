"""Op attention_mask where the forward of the C++ backend computes the student's gradient, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from attention_checks import SETTINGS, SHAPES, compare, layouts, maps
from conftest import needs_extension, same_for_any_threads
from early_checks import called, check_early

import kdfast
from kdfast.ops.attention_mask import attention_mask
from kdfast.reference import attention_mask as reference

pytestmark = needs_extension

PLAIN = {"temperature": 0.5}
DETACHED = [chosen for chosen in SETTINGS if chosen["detach_mask"]]


def check_student_alone(x, y, *, floor=3e-6, **chosen):
    """Loss, distances and gradient where the forward computes them all, against the float64 reference."""

    def run(call, dtype):
        s, t = x.detach().to(dtype).requires_grad_(), y.detach().to(dtype)
        loss, distances, *_ = call(s, t)
        (gradient,) = torch.autograd.grad(loss, s)
        return {"loss": loss.detach(), "distances": distances, "gradient": gradient}

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    try:
        found = run(lambda s, t: attention_mask(s, t, **chosen, pooled=False), x.dtype)
    finally:
        torch.use_deterministic_algorithms(before)

    def plain(s, t):
        return reference.attention_mask(s, t, None, **chosen)

    compare(found, run(plain, x.dtype), run(plain, torch.float64), floor)


@pytest.mark.parametrize("chosen", DETACHED, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_student_alone(chosen, channels_last):
    # Also: one vector and one pixel more; several blocks of pixels in a chunk, the last with few.
    for shape in (*SHAPES, (2, 17, 13, 21), (1, 5, 150, 161)):
        x, y, _ = (layouts["channels_last"](v) if channels_last else v for v in maps(*shape))
        check_student_alone(x, y, **chosen)


@pytest.mark.parametrize("layout", layouts)
def test_layouts_of_a_student_alone(layout):
    plain, laid = maps(2, 6, 4, 6), [layouts[layout](v) for v in maps(2, 6, 4, 6)]
    for x, y in (laid[:2], (laid[0], plain[1]), (plain[0], laid[1])):
        for chosen in (DETACHED[1], DETACHED[-1]):
            check_student_alone(x, y, **chosen)


@pytest.mark.parametrize(
    ("dtype", "floor"), [(torch.float64, 1e-14), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes_of_a_student_alone(dtype, floor, channels_last):
    made = maps(2, 37, 5, 11, dtype=dtype)
    x, y, _ = (layouts["channels_last"](v) if channels_last else v for v in made)
    for chosen in DETACHED:
        check_student_alone(x, y, floor=floor, **chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channel_mask", [False, True])
@pytest.mark.parametrize("distances", [False, True])
def test_gradient_of_the_forward(monkeypatch, dtype, channel_mask, distances):
    x, y, _ = maps(2, 3, 2, 5, dtype=dtype)
    asked = {"channel_mask": channel_mask, "distances": distances, "pooled": False}
    check_early(
        monkeypatch, "attention_mask", lambda v: attention_mask(v, y.to(v.dtype), **PLAIN, **asked)[0], x
    )


@pytest.mark.parametrize("chosen", DETACHED, ids=str)
def test_second_gradient_of_a_student_alone(chosen):
    """That of the reference: the masks are constants there, too, which a numerical one would not see."""
    x, y, _ = maps(2, 3, 2, 5, dtype=torch.float64)
    found = []
    for backend in ("cpu", "reference"):
        s = x.clone().requires_grad_()
        with kdfast.use_backend(backend):
            (first,) = torch.autograd.grad(
                attention_mask(s, y, **chosen, pooled=False)[0], s, create_graph=True
            )
        found.append((first.detach(), *torch.autograd.grad(first.sin().sum(), s)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_what_keeps_the_gradient_for_the_backward():
    x, y, z = maps(2, 5, 3, 7)
    two = ["attention_mask", "attention_mask_backward"]

    def step(*inputs, **asked):
        inputs[0].requires_grad_()
        torch.autograd.grad(attention_mask(*inputs, **PLAIN, **asked)[0], inputs[0])

    assert called(lambda: step(x, y)) == two  # pooled attention, which has a gradient too
    assert called(lambda: step(x, y, pooled=False, detach_mask=False)) == two
    assert called(lambda: step(x, y, z, pooled=False)) == two
    assert called(lambda: step(x, y.requires_grad_(), pooled=False)) == [*two, two[1]]  # a gradient for each


def test_threads_equal_maps_and_no_images_of_a_student_alone():
    asked = {"pooled": False, "channel_mask": True}
    x, y, _ = maps(2, 24, 70, 40)
    x.requires_grad_()

    def compute():
        loss, distances = attention_mask(x, y, **PLAIN, **asked)
        return loss, distances, *torch.autograd.grad(loss, x)

    same_for_any_threads(compute)
    for s in (x, torch.randn(0, 4, 3, 5, requires_grad=True)):
        for chosen in DETACHED:
            loss, distances = attention_mask(s, s.detach().clone(), **chosen, pooled=False)
            (gradient,) = torch.autograd.grad(loss, s)
            assert loss == 0 and not distances.any() and not gradient.any() and gradient.shape == s.shape


@pytest.mark.parametrize("channels_last", [False, True])
def test_extreme_maps_of_a_student_alone(channels_last):
    """Attention whose softmax leaves a few pixels, falling from block to block and rising; values up to 6e4."""
    shape = (1, 5, 150, 161)
    slope = torch.linspace(0, 300, 150 * 161).view(1, 1, 150, 161)
    x, y, _ = maps(*shape)
    for first, second in ((slope, slope.flip(2, 3)), (slope.flip(2, 3), slope)):
        made = [v + s for v, s in ((x, first), (y, second))]
        made = [layouts["channels_last"](v) if channels_last else v for v in made]
        for chosen in DETACHED:
            check_student_alone(*made, floor=1e-3, **chosen)  # exp(G / T) has the rounding of G / T = 1000
    made = [(6e4 * (2 * torch.rand(2, 16, 9, 9) - 1)).bfloat16() for _ in range(2)]
    made[0].requires_grad_()
    for chosen in DETACHED:
        loss, _ = attention_mask(*made, **chosen, pooled=False)
        assert loss.isfinite() and torch.autograd.grad(loss, made[0])[0].isfinite().all()

"""Op criss_cross: the C++ backend against brute force in float64; the public function."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_extension, same_for_any_threads
from criss_cross_checks import check, dense, inputs, run
from hypothesis import given, settings
from hypothesis import strategies as st

import kdfast
from kdfast import backend, criss_cross_attention
from kdfast.ops.criss_cross import criss_cross

pytestmark = needs_extension
BACKENDS = [name for name in ("reference", "cpu") if backend.why_not(name) is None]
EPS = {torch.float64: 1e-14, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(params=BACKENDS)
def on_backend(request):
    with kdfast.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1),
        (2, 3, 5, 1, 7),  # one row: no column cells
        (2, 3, 5, 7, 1),
        (1, 4, 3, 2, 2),
        (2, 8, 64, 9, 13),
        (1, 19, 50, 6, 21),  # more channels than a block
        (3, 5, 7, 40, 6),
        (1, 2, 3, 5, 130),  # rows of a padded length
        (1, 9, 23, 16, 16),  # whole vectors
        (2, 7, 13, 45, 35),  # columns side by side in vectors, in several blocks, and some that fill none
        (1, 13, 6, 83, 16),
    ],
)
def test_matches_brute_force(shape, channels_last):
    check("cpu", inputs(shape, channels_last=channels_last))


def test_reference_is_brute_force():
    tensors = inputs((2, 3, 5, 6, 9), torch.float64)
    grad = torch.randn_like(tensors[2])
    with kdfast.use_backend("reference"):
        for found, truth in zip(run(criss_cross, tensors, grad), run(dense, tensors, grad), strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 4, 6), (1, 20, 21, 13, 11), (1, 17, 22, 18, 19), (1, 5, 8, 49, 18)]
)
def test_dtypes(shape, dtype, channels_last):
    check("cpu", inputs(shape, dtype, channels_last=channels_last), floor=EPS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_scores(dtype):
    """Scores of about 1e4, which e^x does not survive and float16 products do not either.

    The gradients of query and key are differences of terms of the size of a key, 40 times the rounding of ``out``.
    """
    tensors = inputs((2, 8, 6, 12, 10), dtype, scale=40)
    check("cpu", tensors, floor=40 * EPS.get(dtype, 2e-5))
    with kdfast.use_backend("cpu"):
        for v in run(criss_cross, tensors, torch.ones_like(tensors[2])):
            assert v.isfinite().all()


def test_equal_scores_average(on_backend):
    """Without a query, out is the mean of the H + W - 1 cells: the own one counts once."""
    query, key, value = inputs((2, 3, 4, 5, 7), torch.float64)
    out = criss_cross(torch.zeros_like(query), key, value)
    total = value.sum(2, keepdim=True) + value.sum(3, keepdim=True) - value
    torch.testing.assert_close(out, total / (5 + 7 - 1))


@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (2, 5, 6, 9, 9))),
    step=st.integers(1, 2),
    order=st.permutations(range(4)),
)
@settings(max_examples=15, deadline=None)
def test_strides(sizes, step, order):
    def strided(v):
        for axis in range(4):
            v = v.repeat_interleave(step, axis)
        v = v.permute(order).contiguous().permute([order.index(i) for i in range(4)])
        return v[::step, ::step, ::step, ::step]

    tensors = inputs(sizes)
    check("cpu", [strided(v) for v in tensors])
    check("cpu", [tensors[0], strided(tensors[1]), tensors[2]])  # mixed layouts


def test_mixed_layouts_of_wide_maps():
    query, key, value = inputs((2, 6, 9, 41, 34))
    last = [v.contiguous(memory_format=torch.channels_last) for v in (query, key, value)]
    check("cpu", [query, last[1], value])
    check("cpu", [query, key, last[2]])
    check("cpu", [query, key, value], grad=torch.randn_like(last[2]))
    check("cpu", [query[..., 1:], key[..., 1:], value[..., 1:]])  # rows that start anywhere


def test_expanded():
    query, key, value = inputs((3, 4, 5, 6, 7))
    check("cpu", [query[:1].expand(3, -1, -1, -1), key[:, :, :1].expand(-1, -1, 6, -1), value])
    check("cpu", [query, key, value[..., :1].expand(-1, -1, -1, 7)])
    check("cpu", [query, key, value], grad=torch.ones(()).expand_as(value))


def test_empty(on_backend):
    for shape in ((0, 2, 3, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)):
        tensors = inputs(shape)
        assert all(v.numel() == 0 for v in run(criss_cross, tensors, torch.ones_like(tensors[2])))


def test_nan_stays_in_its_row_and_column():
    query, key, value = inputs((1, 2, 3, 5, 6))
    value[0, 0, 2, 3] = float("nan")
    out = criss_cross(query, key, value)[0, 0].isnan()
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[2], expected[:, 3] = True, True
    assert torch.equal(out, expected)
    key[0, 0, 1, 1] = float("nan")
    assert criss_cross(query, key, value)[0, :, 1].isnan().all()


def test_gradcheck_and_second_backward(on_backend):
    tensors = [v.requires_grad_() for v in inputs((1, 2, 2, 3, 4), torch.float64)]
    assert torch.autograd.gradcheck(criss_cross, tensors)
    assert torch.autograd.gradgradcheck(criss_cross, tensors)


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_only_needed_gradients(needed):
    tensors = inputs((2, 3, 20, 10, 17))
    grad = torch.randn_like(tensors[2])
    expected = run(criss_cross, tensors, grad)[1:]
    tensors = [v.requires_grad_(bool(need)) for v, need in zip(tensors, needed, strict=True)]
    out = criss_cross(*tensors)
    out.backward(grad, retain_graph=True)
    out.backward(grad)
    for v, need, gradient in zip(tensors, needed, expected, strict=True):
        assert (v.grad is not None) == bool(need)
        if need:
            assert torch.equal(v.grad, 2 * gradient)
    with torch.no_grad():
        assert not criss_cross(*tensors).requires_grad


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    tensors = inputs((2, 3, 4, 5, 6), channels_last=channels_last)
    torch.library.opcheck(torch.ops.kdfast.criss_cross.default, tensors)
    out, lse = torch.ops.kdfast.criss_cross(*tensors)
    for needs in ((True, True, True), (True, False, False), (False, False, True)):
        args = (torch.randn_like(out), *tensors, out, lse, *needs)
        torch.library.opcheck(torch.ops.kdfast.criss_cross_backward.default, args)


def test_saves_no_scores():
    """Kept for the backward: the inputs, out, and one number per position."""
    tensors = [v.requires_grad_() for v in inputs((1, 4, 6, 16, 20))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()) or v, lambda v: v):
        criss_cross_attention(*tensors)
    assert sum(kept) == (4 + 4 + 6 + 6 + 1) * 16 * 20


def test_compiles_without_a_break(on_backend):
    tensors = inputs((2, 3, 4, 5, 6))
    compiled = torch.compile(criss_cross_attention, fullgraph=True, backend="aot_eager")
    grad = torch.randn_like(tensors[2])
    for a, b in zip(run(criss_cross_attention, tensors, grad), run(compiled, tensors, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_result_does_not_depend_on_threads():
    tensors = inputs((2, 16, 40, 30, 42))
    grad = torch.randn_like(tensors[2])
    same_for_any_threads(lambda: run(criss_cross, tensors, grad))


def test_groups_of_images():
    """Maps of 2 MB an image, whose passes alternate between groups of images: every image gets its own result."""
    tensors = inputs((5, 8, 128, 64, 64))
    grad = torch.randn_like(tensors[2])
    together = same_for_any_threads(lambda: run(criss_cross, tensors, grad))
    alone = [run(criss_cross, [v[i : i + 1] for v in tensors], grad[i : i + 1]) for i in range(5)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-5, atol=2e-5)


def test_bad_input():
    query, key, value = inputs((2, 3, 4, 5, 6))
    with pytest.raises(TypeError, match="query: need a tensor"):
        criss_cross_attention(None, key, value)
    with pytest.raises(TypeError, match="key: need a floating point"):
        criss_cross_attention(query, key.long(), value)
    with pytest.raises(ValueError, match=r"value: need \[B, channels, H, W\]"):
        criss_cross_attention(query, key, value[0])
    with pytest.raises(ValueError, match="at least one channel"):
        criss_cross_attention(query[:, :0], key[:, :0], value)
    with pytest.raises(ValueError, match="query and key need one shape"):
        criss_cross_attention(query, key[:, :2], value)
    with pytest.raises(ValueError, match="B, H and W of query"):
        criss_cross_attention(query, key, value[..., :5])
    with pytest.raises(ValueError, match="one type and one device"):
        criss_cross_attention(query, key, value.double())
    with pytest.raises(ValueError, match="one type and one device"):
        criss_cross_attention(query, key, value.to("meta"))

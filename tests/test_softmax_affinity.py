"""The op ``softmax_affinity``, against the matrix of all pairs."""

from __future__ import annotations

import math
from functools import partial

import pytest
import relation_checks as checks
import torch
from conftest import needs_extension, same_for_any_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from relation_checks import DTYPES, FORMATS, NEEDED, inputs, run
from torch import Tensor

from kdfast import softmax_affinity as affinity_of_maps
from kdfast.ops.softmax_affinity import attention, softmax_affinity
from kdfast.reference import affinity as reference

pytestmark = needs_extension
INF, NAN = math.inf, math.nan


def scaled(call, scale):
    return lambda *values: call(*values, scale)


def check(values: list[Tensor], last: bool = False, scale: float = 0.4, room: float = 0) -> list[Tensor]:
    return checks.check(scaled(softmax_affinity, scale), scaled(reference.softmax, scale), values, last, room)


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 7, 5, 203, 199),  # nothing is a whole vector
        (1, 32, 48, 768, 1056),  # several parts of the queries take turns at two ranges of the keys
        (1, 6, 3, 801, 2113),  # the same with a rest of each, and more ranges
        (5, 9, 4, 97, 96),
        (1, 16, 16, 500, 1),
        (3, 1, 1, 1, 1),
        (2, 130, 3, 40, 17),
        (1, 5, 130, 100, 150),
        (1, 300, 290, 70, 100),
        (2, 4, 3, 0, 6),
        (0, 4, 3, 5, 6),
    ],
)
def test_sizes(sizes, dtype, last):
    values = inputs(*sizes, dtype, last)
    found = check(values, last)
    for f, v in zip(found[1:], values, strict=True):
        assert f.stride() == torch.empty_like(v).stride()
    if min(sizes) > 1:  # laid out as the queries are
        assert (found[0].stride(1) == 1) == last and min(found[0].stride()[1:]) == 1


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, top) for top in (3, 40, 40, 500, 500))),
    lasts=st.tuples(*(st.booleans() for _ in range(4))),
)
def test_any_sizes(sizes, lasts):
    check(checks.mixed_formats(inputs(*sizes), lasts[:3]), lasts[3])


def test_strides():
    sizes = (2, 12, 10, 220, 230)
    for values in checks.strided(sizes):
        check(values)
    checks.check_expanded_upstream(scaled(softmax_affinity, 1.0), reference.softmax, inputs(*sizes))


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-30])
def test_scale(scale):
    check(inputs(2, 8, 6, 120, 210), scale=scale)


@pytest.mark.parametrize("order", [1, -1])
def test_maximum_of_later_keys(order):
    """Exponents that rise from block to block of the keys by far more than float32 can hold, or fall."""
    query, key, value = inputs(1, 4, 3, 90, 700)
    steps = torch.linspace(0, 400, 700) if order > 0 else torch.linspace(400, 0, 700)
    query[:, 0], key[:, 0] = 1, steps
    check([query, key, value], scale=1.0, room=2)
    key[:, 0] = steps - 3000  # all far below zero
    check([query, key, value], scale=1.0, room=6)


def test_large_exponents():
    """Weights sum to 1, forward and backward, beside exponents of 1e5 (whose logarithm of a sum would drown) and more."""
    query, key, value = (v + 100 for v in inputs(1, 8, 6, 90, 300))
    check([query, key, value], scale=1.0, room=6)
    for factor in (1, 1e3, 1e10):
        values = [query * factor, key * factor, torch.ones_like(value).requires_grad_()]
        y = softmax_affinity(*values, 1.0)
        torch.testing.assert_close(y, torch.ones_like(y), rtol=1e-5, atol=0)
        (grad,) = torch.autograd.grad(y.sum(), values[2:])
        torch.testing.assert_close(grad.sum(2), torch.full((1, 6), 90.0), rtol=1e-5, atol=0)


def test_infinite_and_undefined_exponents():
    """As softmax has them: no weight for -inf, NaN for a query with +inf, NaN or nothing but -inf, and for it alone."""
    query, key, value = (v.abs() for v in inputs(1, 2, 3, 40, 230))
    query[:, 0] = 1
    cases = {
        "some": (slice(0, 130), -INF, None),  # the whole first block of keys
        "last": (slice(150, 230), -INF, None),
        "all": (slice(0, 230), -INF, slice(0, 40)),
        "plus": (slice(7, 8), INF, slice(0, 40)),
        "nan": (slice(200, 201), NAN, slice(0, 40)),
    }
    for keys, number, undefined in cases.values():
        changed = key.clone()
        changed[:, 0, keys] = number
        y = softmax_affinity(query, changed, value, 1.0)
        torch.testing.assert_close(y, reference.softmax(query, changed, value), equal_nan=True)
        assert bool(y.isnan().all()) == (undefined is not None)
    one = query.clone()
    one[:, 0, 33] = NAN
    y = softmax_affinity(one, key, value, 1.0)
    assert y[..., 33].isnan().all() and int(y.isnan().sum()) == 3


def test_same_bits_for_any_number_of_threads():
    values = inputs(1, 30, 50, 1300, 2100)
    same_for_any_threads(lambda: checks.run(scaled(softmax_affinity, 0.3), values))


@FORMATS
def test_gradients(last):
    checks.check_gradients(scaled(softmax_affinity, 0.8), last)


@NEEDED
def test_only_what_is_needed(needed):
    checks.check_needed(scaled(softmax_affinity, 1.0), inputs(1, 9, 6, 900, 1100), needed)


def test_goes_back_again():
    checks.check_backward_again(scaled(softmax_affinity, 0.5), inputs(1, 8, 8, 600, 400))


@pytest.mark.parametrize("last", [False, True])
def test_op_contract(last):
    values = [v.requires_grad_() for v in inputs(2, 4, 3, 30, 20, last=last)]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.kdfast.softmax_affinity.default, (*values, 0.5), test_utils=tests)
    values = [v.detach() for v in values]
    out, saved = torch.ops.kdfast.softmax_affinity(*values, 0.5)
    arguments = (torch.ones_like(out), *values, out, saved, 0.5, True, False, True)
    torch.library.opcheck(torch.ops.kdfast.softmax_affinity_backward.default, arguments, test_utils=tests)


def test_reference_returns_the_same():
    """What the op is without the extension: result, what it saves, gradients."""
    from kdfast.ops.softmax_affinity import _reference, _reference_backward

    values = inputs(2, 4, 3, 30, 20)
    found = torch.ops.kdfast.softmax_affinity(*values, -0.5)
    for f, r in zip(found, _reference(*values, -0.5), strict=True):
        torch.testing.assert_close(f, r)
    arguments = (torch.ones_like(found[0]), *values, *found, -0.5, True, True, False)
    backward = torch.ops.kdfast.softmax_affinity_backward(*arguments)
    for f, r in zip(backward, _reference_backward(*arguments), strict=True):
        torch.testing.assert_close(f, r)


def maps(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    query, key, value = inputs(2, 7, 5, 21 * 13, 9 * 11, dtype)
    return [query.unflatten(2, (21, 13)), key.unflatten(2, (9, 11)), value.unflatten(2, (9, 11))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_who_computes(dtype):
    checks.check_who_computes(affinity_of_maps, maps(dtype), "_SoftmaxAffinity")


def test_attention_of_pytorch():
    """What runs on a GPU and as the benchmark's `eager`."""
    for values in (inputs(2, 7, 5, 103, 89), inputs(2, 5, 7, 103, 89, last=True)):
        truth = run(scaled(reference.softmax, 0.3), [v.double() for v in values])
        for f, t in zip(run(scaled(attention, 0.3), values), truth, strict=True):
            torch.testing.assert_close(f.double(), t, rtol=1e-4, atol=1e-5)


def test_compiles_without_graph_breaks():
    checks.check_compiles(partial(affinity_of_maps, scale=0.3), maps())


def test_wrong_input_is_named():
    query, key, value = inputs(2, 4, 3, 30, 20)
    for wrong in (
        (query[:1], key, value),
        (query[:, 1:], key, value),
        (query, key[..., 1:], value),
        (query.double(), key, value),
    ):
        with pytest.raises(RuntimeError, match="softmax_affinity: need"):
            torch.ops.kdfast.softmax_affinity(*wrong, 1.0)
    out, saved = torch.ops.kdfast.softmax_affinity(query, key, value, 1.0)
    for grad, kept in ((out[:, 1:], saved), (out, saved[:, :1]), (out.double(), saved)):
        with pytest.raises(RuntimeError, match="softmax_affinity: (result and gradient|what the forward)"):
            torch.ops.kdfast.softmax_affinity_backward(
                grad, query, key, value, out, kept, 1.0, True, True, True
            )

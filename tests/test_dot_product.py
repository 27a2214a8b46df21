"""The op ``dot_product`` behind ``dot_product_affinity``, against the matrix of all pairs."""

from __future__ import annotations

import pytest
import relation_checks as checks
import torch
from conftest import needs_extension, same_for_any_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from relation_checks import DTYPES, FORMATS, NEEDED, inputs
from torch import Tensor

from kdfast.losses.affinity import dot_product_affinity
from kdfast.ops.dot_product import dot_product, linear
from kdfast.reference import affinity as reference

pytestmark = needs_extension


def check(values: list[Tensor], last: bool = False) -> list[Tensor]:
    return checks.check(dot_product, reference.dot_product, values, last)


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 7, 5, 1023, 899),  # nothing is a whole vector
        (1, 32, 48, 2048, 1056),  # everything is, and parts hold several blocks
        (1, 16, 16, 3500, 1),
        (3, 1, 1, 1, 1),
        (2, 130, 3, 40, 17),
        (1, 5, 130, 300, 500),
        (2, 4, 3, 0, 6),
        (0, 4, 3, 5, 6),
    ],
)
def test_sizes(sizes, dtype, last):
    values = inputs(*sizes, dtype, last)
    found = check(values, last)
    assert found[0].stride() == linear(*values).stride()
    for f, v in zip(found[1:], values, strict=True):
        assert f.stride() == torch.empty_like(v).stride()


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, top) for top in (3, 40, 40, 700, 700))),
    lasts=st.tuples(*(st.booleans() for _ in range(4))),
)
def test_any_sizes(sizes, lasts):
    check(checks.mixed_formats(inputs(*sizes), lasts[:3]), lasts[3])


def test_strides():
    sizes = (2, 12, 10, 420, 330)
    for values in checks.strided(sizes):
        check(values)
    checks.check_expanded_upstream(dot_product, linear, inputs(*sizes))


def test_large_mean():
    query, key, value = inputs(1, 20, 20, 2000, 3000)
    check([query + 100, key + 100, value + 100])


def test_large_half_precision_sums():
    """w holds sums over keys, which pass 65,504 before they are divided by their number."""
    query, key, value = inputs(1, 4, 4, 900, 4096)
    check([v.half() for v in (query / 8, key.abs() * 8, value.abs() * 8)])


def test_same_bits_for_any_number_of_threads():
    values = inputs(2, 70, 50, 3000, 2100)
    same_for_any_threads(lambda: checks.run(dot_product, values))


@FORMATS
def test_gradients(last):
    checks.check_gradients(dot_product, last)


@NEEDED
def test_only_what_is_needed(needed):
    checks.check_needed(dot_product, inputs(2, 9, 6, 700, 500), needed)


def test_goes_back_again():
    checks.check_backward_again(dot_product, inputs(1, 8, 8, 600, 400))


def test_op_contract():
    values = [v.requires_grad_() for v in inputs(2, 4, 3, 30, 20, last=True)]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.kdfast.dot_product.default, values, test_utils=tests)
    values = [v.detach() for v in values]
    out, weight = torch.ops.kdfast.dot_product(*values)
    arguments = (torch.ones_like(out), *values, weight, True, False, True)
    torch.library.opcheck(torch.ops.kdfast.dot_product_backward.default, arguments, test_utils=tests)


def maps(dtype=torch.float32) -> list[Tensor]:
    """So many positions that the relation goes through e x d."""
    query, key, value = inputs(2, 7, 5, 31 * 33, 29 * 31, dtype)
    return [query.unflatten(2, (31, 33)), key.unflatten(2, (29, 31)), value.unflatten(2, (29, 31))]


def test_who_computes():
    checks.check_who_computes(dot_product_affinity, maps(), "_DotProduct")


def test_compiles_without_graph_breaks():
    checks.check_compiles(dot_product_affinity, maps())


def test_wrong_input_is_named():
    query, key, value = inputs(2, 4, 3, 30, 20)
    for wrong in (
        (query[:1], key, value),
        (query[:, 1:], key, value),
        (query, key[..., 1:], value),
        (query.double(), key, value),
    ):
        with pytest.raises(RuntimeError, match="dot_product: need"):
            torch.ops.kdfast.dot_product(*wrong)

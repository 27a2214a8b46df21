"""The op ``dot_product`` behind ``dot_product_affinity``, against the matrix of all pairs."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_as_accurate, needs_extension
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdfast import use_backend
from kdfast.losses.affinity import dot_product_affinity
from kdfast.ops.dot_product import dot_product, linear
from kdfast.reference import affinity as reference

pytestmark = needs_extension
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FORMATS = pytest.mark.parametrize("last", [False, True])


def inputs(batch, d, e, n, m, dtype=torch.float32, last=False) -> list[Tensor]:
    """Queries [B, d, n], keys [B, d, m], values [B, e, m]; with ``last``, channels are neighbours."""
    generator = torch.Generator().manual_seed(d + e + n + m)
    made = []
    for shape in ((batch, d, n), (batch, d, m), (batch, e, m)):
        x = torch.randn(shape, generator=generator).to(dtype)
        made.append(x.mT.contiguous().mT if last else x)
    return made


def run(call, values, last=False):
    values = [v.detach().requires_grad_() for v in values]
    y = call(*values)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    up = up.mT.contiguous().mT if last else up
    return [y.detach(), *torch.autograd.grad(y, values, up)]


def check(values, last=False):
    """Against the matrix of all pairs in float64, as accurate as it is; memory that is not written is NaN."""
    truth = run(reference.dot_product, [v.double() for v in values], last)
    same = run(reference.dot_product, values, last)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = run(dot_product, values, last)
    finally:
        torch.use_deterministic_algorithms(before)
    for f, s, t in zip(found, same, truth, strict=True):
        assert f.shape == t.shape and f.dtype == s.dtype
        if not t.numel():
            continue
        eps = {torch.float32: 2e-6, torch.float64: 1e-13}.get(f.dtype, torch.finfo(f.dtype).eps)
        assert_as_accurate(f, t, s, eps * max(float(t.abs().max()), 1), "dot product")
    return found


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
    values = [v.mT.contiguous().mT if last else v for v, last in zip(inputs(*sizes), lasts[:3], strict=True)]
    check(values, lasts[3])


def test_strides():
    query, key, value = inputs(2, 12, 10, 420, 330)
    check([query[:, ::2], key[:, 1::2], value.flip(2)])
    check([query[..., 7:], key[:1].expand_as(key), value[:, :1].expand_as(value)])
    check([query[..., ::3], key[..., ::2], value[..., ::2]])
    # One number, expanded, comes back as the gradient.
    values = [v.requires_grad_() for v in (query, key, value)]
    found = torch.autograd.grad(dot_product(*values).sum(), values)
    for f, t in zip(found, torch.autograd.grad(linear(*values).sum(), values), strict=True):
        torch.testing.assert_close(f, t, rtol=1e-4, atol=1e-3)


def test_large_mean():
    query, key, value = inputs(1, 20, 20, 2000, 3000)
    check([query + 100, key + 100, value + 100])


def test_large_half_precision_sums():
    """w holds sums over keys, which pass 65,504 before they are divided by their number."""
    query, key, value = inputs(1, 4, 4, 900, 4096)
    check([v.half() for v in (query / 8, key.abs() * 8, value.abs() * 8)])


def test_same_bits_for_any_number_of_threads():
    values, threads = inputs(2, 70, 50, 3000, 2100), torch.get_num_threads()
    expected = run(dot_product, values)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for found, other in zip(run(dot_product, values), expected, strict=True):
                assert torch.equal(found, other)
    finally:
        torch.set_num_threads(threads)


@FORMATS
def test_gradients(last):
    values = [v.requires_grad_() for v in inputs(2, 3, 2, 7, 5, torch.float64, last)]
    assert torch.autograd.gradcheck(dot_product, values)
    assert torch.autograd.gradgradcheck(dot_product, values)
    x = values[1]
    assert torch.autograd.gradgradcheck(lambda x: dot_product(x, x, x), [x])  # one map thrice


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_only_what_is_needed(needed):
    values = inputs(2, 9, 6, 700, 500)
    whole = run(dot_product, values)[1:]
    values = [v.requires_grad_(need) for v, need in zip(values, needed, strict=True)]
    y = dot_product(*values)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float())
    for v, w, need in zip(values, whole, needed, strict=True):
        assert torch.equal(v.grad, w) if need else v.grad is None


def test_goes_back_again():
    """A second backward, a scaled one, and one whose results were overwritten before."""
    values = [v.requires_grad_() for v in inputs(1, 8, 8, 600, 400)]
    y = dot_product(*values)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    first = torch.autograd.grad(y, values, up, retain_graph=True)
    kept = [v.clone() for v in first]
    for v in first:
        v.fill_(torch.nan)
    for factor in (1, -2):
        for f, k in zip(torch.autograd.grad(y, values, factor * up, retain_graph=True), kept, strict=True):
            torch.testing.assert_close(f, factor * k)


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


def own(y: Tensor) -> bool:
    """Whether the op made this relation, not PyTorch's products."""
    return "_DotProduct" in type(y.grad_fn.next_functions[0][0]).__name__


def test_who_computes():
    values = [v.requires_grad_() for v in maps()]
    assert own(dot_product_affinity(*values))
    with use_backend("reference"):
        assert not own(dot_product_affinity(*values))
    with torch.autocast("cpu", torch.bfloat16):
        assert dot_product_affinity(*values).dtype == torch.bfloat16
    with torch.no_grad():
        assert not dot_product_affinity(*values).requires_grad


def test_compiles_without_graph_breaks():
    values = [v.requires_grad_() for v in maps()]
    expected = torch.autograd.grad(dot_product_affinity(*values).square().sum(), values)
    total = torch.compile(lambda *v: dot_product_affinity(*v).square().sum(), fullgraph=True)
    for f, e in zip(torch.autograd.grad(total(*values), values), expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5 * float(e.abs().max()))


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

"""Relations of positions against matrices of all pairs: the op ``affinity`` and the public functions on it."""

from __future__ import annotations

import pytest
import torch
from affinity_checks import check, inputs, run
from conftest import assert_as_accurate, needs_extension, same_for_any_threads
from hypothesis import given, settings
from hypothesis import strategies as st

import kdfast
from kdfast import use_backend
from kdfast.losses.affinity import concatenation_affinity, dot_product_affinity, softmax_affinity
from kdfast.ops.affinity import affinity
from kdfast.reference import affinity as reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def pairs(a, b, g):
    """ReLU(a_i + b_j) g_j, one pair after the other."""
    y = torch.zeros(a.shape[0], a.shape[1], g.shape[2], dtype=torch.float64)
    for image in range(a.shape[0]):
        for i in range(a.shape[1]):
            for j in range(b.shape[1]):
                y[image, i] += max(float(a[image, i] + b[image, j]), 0) * g[image, j].double() / b.shape[1]
    return y


def test_formula():
    a, b, g = inputs(2, 5, 7, 3, torch.float64)
    torch.testing.assert_close(concatenation_affinity(a, b, g), pairs(a, b, g))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "n", "m", "e"),
    [(2, 70, 45, 17), (1, 1, 1, 1), (3, 5, 700, 16), (1, 1100, 600, 33), (2, 0, 4, 5)],
)
def test_sizes(batch, n, m, e, dtype):
    for transposed in (False, True):
        check("cpu", *inputs(batch, n, m, e, dtype, transposed))


@needs_extension
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "m"), [(65600, 3), (3, 65600), (65601, 2)])
def test_results_that_go_past_the_caches(n, m, transposed):
    check("cpu", *inputs(1, n, m, 67, transposed=transposed))
    check("cpu", *inputs(1, n, m, 80, transposed=transposed))


@needs_extension
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "m"), [(65601, 2), (2, 65601)])
def test_results_that_begin_on_a_huge_page(n, m, transposed):
    a, b, g = inputs(1, n, m, 131, transposed=transposed)
    check("cpu", a, b, g)
    y, _, _, grad_g = run(concatenation_affinity, a, b, g)
    assert (y if n > m else grad_g).data_ptr() % (2 << 20) == 0
    assert grad_g.stride() == g.stride()
    wide = torch.cat([g, g[:, :, :2]], 2)[:, :, 1:-1]  # no layout that a gradient could share
    check("cpu", a, b, wide)


@needs_extension
@pytest.mark.parametrize("shift", [-100.0, -3.0, -1.0, 0.0, 1.0, 3.0, 100.0])
@pytest.mark.parametrize(("n", "m"), [(300, 70), (70, 300), (300, 300)])
def test_results_in_place_of_values(n, m, shift):
    """How far queries are ahead of the keys they count decides which rows are free."""
    a, b, g = inputs(2, n, m, 35)
    a = torch.stack([a[0] + shift, a[1]])
    check("cpu", a, b, g)
    check("cpu", a, torch.where(b > 0, b + 50, b - 50), g)


@needs_extension
@pytest.mark.parametrize("count", [1, 2, 3, 5, 511, 512, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_orders(count, dtype):
    """Ascending with -0 below 0, equal values in the order of their places, NaN last."""
    a, b, g = inputs(1, count, count, 1, dtype)
    a = (a * 4).round()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")], dtype=dtype)[:count]
    b[0, : len(special)] = special
    _, *orders = torch.ops.kdfast.affinity(a, b, g)
    for values, order in zip((a[0], b[0]), orders, strict=True):
        keys = [(x != x, x, not str(x).startswith("-"), place) for place, x in enumerate(values.tolist())]
        assert order[0].tolist() == [key[-1] for key in sorted(keys)]


@needs_extension
@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, top) for top in (3, 90, 90, 40))),
    spread=st.sampled_from([0.0, 0.3, 1.0, 50.0]),
    ties=st.booleans(),
)
def test_any_sizes(sizes, spread, ties):
    a, b, g = inputs(*sizes)
    a, b = (spread * a, b) if not ties else ((spread * a).round(), b.round())
    check("cpu", a, b, g)


@needs_extension
def test_layouts():
    a, b, g = inputs(2, 40, 50, 18)
    check("cpu", a.T.contiguous().T, b[:1].expand(2, 50), g[:, :, 3:])
    check("cpu", torch.stack([a, a], 2)[..., 0], b.flip(1), g[:, ::2].repeat_interleave(2, 1))
    check("cpu", a, b, g[:, :, :1].expand(2, 50, 18))


@needs_extension
def test_large_offset_is_no_worse_than_all_pairs():
    a, b, g = inputs(1, 600, 800, 8)
    check("cpu", a + 1e4, b - 1e4, g)
    a, b, g = inputs(1, 600, 800, 8, torch.float64)
    check("cpu", a + 1e6, b - 1e6, g, floor=1e-12)


@needs_extension
def test_nothing_and_everything_counts():
    a, b, g = inputs(1, 70, 40, 8)
    assert not any(v.any() for v in run(concatenation_affinity, a - 100, b, g))
    check("cpu", a + 100, b, g)


@needs_extension
def test_gradient_of_relu_at_zero_is_zero():
    ones = torch.ones(1, 4)
    y, grad_a, grad_b, grad_g = run(concatenation_affinity, ones, -ones, torch.randn(1, 4, 3))
    assert not any(v.any() for v in (y, grad_a, grad_b, grad_g))


@needs_extension
def test_not_finite_input_stays_inside_its_image():
    a, b, g = inputs(2, 20, 30, 4)
    a[0, 3], b[0, 5], g[0, 2, 1] = float("nan"), float("inf"), float("-inf")
    clean = concatenation_affinity(*inputs(2, 20, 30, 4))
    assert torch.equal(concatenation_affinity(a, b, g)[1], clean[1])


@needs_extension
def test_same_bits_for_any_number_of_threads():
    values = inputs(2, 900, 700, 70)
    same_for_any_threads(lambda: run(concatenation_affinity, *values))


@needs_extension
def test_gradients():
    values = [v.requires_grad_() for v in inputs(2, 6, 5, 3, torch.float64)]
    assert torch.autograd.gradcheck(affinity, values)
    assert torch.autograd.gradgradcheck(affinity, values)


@needs_extension
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_needed(needed):
    values = inputs(2, 60, 50, 20)
    whole = run(concatenation_affinity, *values)[1:]
    values = [v.requires_grad_(need) for v, need in zip(values, needed, strict=True)]
    y = concatenation_affinity(*values)
    up = torch.randn(y.mT.shape, generator=torch.Generator().manual_seed(1)).mT
    y.backward(up)
    for v, w, need in zip(values, whole, needed, strict=True):
        assert torch.equal(v.grad, w) if need else v.grad is None


@needs_extension
def test_nan_is_not_hidden():
    for place in (0, 1):
        values = list(inputs(2, 20, 30, 4))
        values[place][0, 3] = float("nan")
        found, truth = (run(f, *values) for f in (concatenation_affinity, reference.affinity))
        assert torch.equal(found[0].isnan(), truth[0].isnan())
        assert torch.equal(found[3].isnan(), truth[3].isnan())


@needs_extension
def test_op_contract():
    values = [v.requires_grad_() for v in inputs(2, 6, 5, 3)]
    torch.library.opcheck(
        torch.ops.kdfast.affinity.default, values, test_utils=("test_schema", "test_faketensor")
    )
    out, *orders = torch.ops.kdfast.affinity(*(v.detach() for v in values))
    arguments = (out, *(v.detach() for v in values), *orders, True, False, True)
    torch.library.opcheck(
        torch.ops.kdfast.affinity_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def relations(values, call, **settings):
    values = [v.detach().requires_grad_() for v in values]
    y = call(*values, **settings)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, values, up)]


def maps(d, e, size, keys, dtype=torch.float32, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(d + e)
    shapes = ((2, d, *size), (2, d, *keys), (2, e, *keys))
    return [
        torch.randn(s, generator=generator).to(dtype).contiguous(memory_format=memory_format) for s in shapes
    ]


def dense(kind, theta, phi, g, scale=1.0):
    q, k, v = (x.flatten(2) for x in (theta, phi, g))
    y = reference.dot_product(q, k, v) if kind == "dot_product" else reference.softmax(q, k, v, scale)
    return y.unflatten(2, theta.shape[2:])


CALLS = {"dot_product": dot_product_affinity, "softmax": softmax_affinity}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("d", "e", "size", "keys"), [(8, 8, (6, 7), (3, 3)), (8, 5, (2, 2), (1, 1)), (3, 9, (5, 1), (5, 1))]
)
@pytest.mark.parametrize("kind", CALLS)
def test_maps(kind, d, e, size, keys, dtype, memory_format):
    values = maps(d, e, size, keys, dtype, memory_format)
    truth = relations([v.double() for v in values], lambda *v: dense(kind, *v))
    same = relations(values, lambda *v: dense(kind, *v))
    for f, s, t in zip(relations(values, CALLS[kind]), same, truth, strict=True):
        assert f.dtype == dtype
        # Roundings of a half format in another order of products.
        floor = {torch.float32: 2e-6, torch.float64: 1e-13}.get(dtype, 2 * torch.finfo(dtype).eps)
        assert_as_accurate(f, t, s, floor * max(float(t.abs().max()), 1), kind)


def test_softmax_scale():
    values = maps(6, 6, (5, 4), (2, 2), torch.float64)
    torch.testing.assert_close(
        softmax_affinity(*values, scale=6**-0.5), dense("softmax", *values, scale=6**-0.5)
    )


def test_both_orders_of_the_dot_product():
    """Few positions: through pairs; many: through e x d. Neither holds what the other would."""
    for size, keys in (((2, 2), (2, 1)), ((20, 20), (20, 20))):
        values = maps(64, 64, size, keys, torch.float64)
        torch.testing.assert_close(dot_product_affinity(*values), dense("dot_product", *values))


def test_large_half_precision_sums():
    """A sum over 4,096 keys passes 65,504 before it is divided by their number."""
    theta, phi, g = maps(4, 4, (3, 3), (64, 64))
    theta, phi, g = theta.half() / 8, (phi.abs() * 8).half(), (g.abs() * 8).half()
    found = dot_product_affinity(theta, phi, g)
    truth = dense("dot_product", theta.double(), phi.double(), g.double())
    torch.testing.assert_close(found.double(), truth, rtol=1e-2, atol=1e-2)
    assert softmax_affinity(theta * 100, phi, g).isfinite().all()


@pytest.mark.usefixtures("freed_memory_is_given_back")
def test_no_matrix_of_all_pairs():
    """At 16,384 positions every n x m matrix is 1 GB."""
    from benchmarks import memory

    values = [v.requires_grad_() for v in maps(8, 8, (128, 128), (128, 128))]
    flat = [values[0][:1, 0].flatten(1), values[1][:1, 0].flatten(1), values[2][:1].flatten(2).mT]
    for call in (
        lambda: relations(values, dot_product_affinity),
        lambda: relations(values, softmax_affinity),
        lambda: run(concatenation_affinity, *flat),
    ):
        call()
        peak = memory.peak(call, torch.device("cpu"))
        if peak is None:
            pytest.skip("this system does not report peak memory")
        assert peak < 20 * sum(v.numel() * 4 for v in values)


def test_compiles_without_graph_breaks():
    def total(a, b, g, theta, phi, v):
        relations = (dot_product_affinity(theta, phi, v), softmax_affinity(theta, phi, v))
        return concatenation_affinity(a, b, g).sum() + sum(r.square().sum() for r in relations)

    values = [*inputs(2, 30, 20, 6), *maps(4, 4, (6, 5), (3, 2))]
    values = [v.requires_grad_() for v in values]
    expected = torch.autograd.grad(total(*values), values)
    found = torch.autograd.grad(torch.compile(total, fullgraph=True)(*values), values)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_wrong_input_is_named():
    a, b, g = inputs(2, 6, 5, 3)
    for wrong in ((a, b[:, 1:], g), (a[:1], b, g), (a, b, g.double()), (a, b[:, :0], g[:, :0])):
        with pytest.raises(ValueError, match=r"a, b, g: need \[B, n\].*got \["):
            kdfast.concatenation_affinity(*wrong)
    with pytest.raises(TypeError, match="b: need a floating point"):
        kdfast.concatenation_affinity(a, b.int(), g)
    theta, phi, v = maps(4, 3, (6, 5), (3, 2))
    for wrong in (
        (theta, phi[:, 1:], v),
        (theta, phi, v[:, :, 1:]),
        (theta[0], phi, v),
        (theta.half(), phi, v),
    ):
        for call in CALLS.values():
            with pytest.raises(ValueError, match=r"theta, phi, g: need \[B, d, H, W\].*got \["):
                call(*wrong)


def test_backend_that_has_no_kernel():
    with use_backend("reference"):
        check("reference", *inputs(1, 4, 5, 2))

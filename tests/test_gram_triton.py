"""The Triton kernels of ``gram`` in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret."""

from __future__ import annotations

import pytest
import torch
from gram_checks import check, normal, patches, view

from kdfast import backend, use_backend
from kdfast.ops.gram import gram
from kdfast.reference.gram import COMPARISONS

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not backend.interpreting(), reason="needs TRITON_INTERPRET=1"),
]


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("compare", COMPARISONS)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 17])
def test_comparisons(n, compare, centered):
    check(
        "triton",
        view(normal(2, n, 37)),
        view(normal(2, n, 41, seed=1) + 1),
        compare=compare,
        centered=centered,
    )


# 16, 48 and 77 rows: one tile, two, two with odd rows; three groups.
@pytest.mark.parametrize(("n", "compare"), [(16, "cka"), (48, "unbiased"), (77, "cka"), (77, "cka_row")])
def test_row_tiles(n, compare):
    check("triton", view(normal(3, n, 91)), view(normal(3, n, 85, seed=1)), compare=compare)


@pytest.mark.parametrize("compare", COMPARISONS)
def test_float64(compare):
    x, y = view(normal(2, 9, 23, dtype=torch.float64)), view(normal(2, 9, 21, seed=1, dtype=torch.float64))
    check("triton", x, y, compare=compare, floor=1e-14)


def test_columns_split_over_programs():
    check("triton", view(normal(1, 6, 1025)), view(normal(1, 6, 700, seed=1)))


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 4), (2, 3, 7), (3, 5, 1), (2, 5, 2), (2, 18, 33)])
def test_inter(shape, centered):
    check("triton", view(normal(*shape) + 1), view(normal(*shape, seed=1)), inter=True, centered=centered)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("compare", ["cka", "cka_row", "difference"])
def test_feature_side(compare, centered):
    check(
        "triton",
        view(normal(2, 75, 7)),
        view(normal(2, 75, 9, seed=1) + 1),
        compare=compare,
        centered=centered,
    )


@pytest.mark.parametrize(
    ("n", "compare", "inter"),
    [(5, "cka", False), (5, "cka_row", False), (30, "cka", False), (5, "cka", True)],
)
def test_cosine(n, compare, inter):
    x, y = normal(2, n, 9), normal(2, n, 9, seed=1)
    x[0, 1] = 0
    check("triton", view(x), view(y), compare=compare, cosine=True, inter=inter)


@pytest.mark.parametrize("inter", [False, True])
def test_patches_of_a_map(inter):
    x, y = normal(2, 3, 8, 12), normal(2, 3, 8, 12, seed=1)
    check("triton", patches(x, 4, 4), patches(y, 4, 4), inter=inter)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    check("triton", patches(channels_last, 4, 4), patches(y, 4, 4), inter=inter)


@pytest.mark.parametrize("inter", [False, True])
def test_patches_as_groups(inter):
    """Groups of positions: rows lie in two axes, features in images and channels."""
    x, y = normal(2, 3, 8, 12), normal(2, 3, 8, 12, seed=1)
    by_position = [patches(v, 4, 4).permute(4, 1, 2, 3, 0, 5) for v in (x, y)]
    check("triton", *by_position, inter=inter)


def test_feature_side_of_patches():
    x, y = normal(2, 3, 16, 24), normal(2, 3, 16, 24, seed=1)
    check("triton", *(patches(v, 2, 2).permute(0, 1, 2, 4, 5, 3)[..., :1] for v in (x, y)))


def test_strides():
    x = normal(4, 11, 40)
    check("triton", view(x[::2, 1::2, 3::3]), view(normal(13, 5, 2, seed=1).permute(2, 1, 0)))
    check("triton", view(normal(1, 5, 13).expand(3, 5, 13)), view(normal(3, 5, 1, seed=1).expand(3, 5, 13)))
    check("triton", view(normal(3, 1, 13).expand(3, 5, 13)), view(normal(3, 5, 13, seed=1)))


@pytest.mark.parametrize("compare", COMPARISONS)
def test_large_mean(compare):
    """A Gram of raw float32 features would lose what is compared."""
    check("triton", view(normal(2, 7, 45) + 100), view(normal(2, 7, 45, seed=1) + 100), compare=compare)


@pytest.mark.parametrize("flags", [{}, {"inter": True}])
def test_large_mean_in_tiles(flags, monkeypatch):
    monkeypatch.setattr("kdfast.kernels.gram.WHOLE_ROWS", 0)
    check("triton", view(normal(2, 7, 45) + 100), view(normal(2, 7, 45, seed=1) + 100), **flags)


@pytest.mark.parametrize("compare", ["cka", "cka_row", "unbiased", "difference", "mean"])
def test_degenerate_rows_and_groups(compare):
    x, y = normal(5, 6, 11), normal(5, 6, 11, seed=1)
    x[0] = 0
    x[1] = normal(1, 11)  # every feature constant
    x[2, 3] = 0
    y[3] = 7.5
    x[4, :4] = x[4, :1]
    for centered in (True, False):
        check("triton", view(x), view(y), compare=compare, centered=centered)


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_scale_of_the_features(scale):
    """Squares of Grams leave float32; distances do not change."""
    x, y = view(normal(2, 9, 33)), view(normal(2, 9, 33, seed=1))
    with use_backend("triton"):
        _, expected = gram(x, y)
        _, found = gram(x * scale, y)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("compare", COMPARISONS)
def test_identical_inputs(compare):
    x = view(normal(2, 8, 19)).requires_grad_()
    with use_backend("triton"):
        _, distance = gram(x, x.detach().clone(), compare=compare)
    (gradient,) = torch.autograd.grad(distance.sum(), x)
    assert (distance == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("compare", COMPARISONS)
def test_almost_identical_inputs(compare):
    x = normal(2, 8, 19)
    check("triton", view(x), view(x + 1e-4 * normal(2, 8, 19, seed=1)), compare=compare)


@pytest.mark.parametrize("n", [20, 70])
@pytest.mark.parametrize("compare", ["cka", "cka_row"])
def test_rows_in_tiles(n, compare, monkeypatch):
    monkeypatch.setattr("kdfast.kernels.gram.WHOLE_ROWS", 0)
    check("triton", view(normal(2, n, 91)), view(normal(2, n, 87, seed=1)), compare=compare)


@pytest.mark.parametrize("compare", COMPARISONS)
def test_grams_too_large_for_one_program(compare, monkeypatch):
    monkeypatch.setattr("kdfast.kernels.gram.COMPARED_ROWS", 0)
    check("triton", view(normal(2, 7, 31)), view(normal(2, 7, 35, seed=1)), compare=compare)


@pytest.mark.parametrize(
    "flags", [{}, {"inter": True}, {"inter": True, "centered": False}, {"compare": "unbiased"}]
)
def test_saved_matrices_change_nothing(flags):
    x, y = view(normal(2, 5, 31)), view(normal(2, 5, 31, seed=1))
    code = (
        COMPARISONS.index(flags.get("compare", "cka")),
        flags.get("centered", True),
        False,
        flags.get("inter", False),
    )
    results = []
    for save in (True, False):
        products, distance, saved = torch.ops.kdfast.gram_triton(x, y, *code, False, save)
        assert bool(saved.numel()) == save
        gradients = torch.ops.kdfast.gram_backward_triton(
            torch.ones_like(products), torch.ones_like(distance), x, y, saved, *code, False, True, True
        )
        results.append((products, distance, *gradients))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(2, 5, 31), (2, 40, 6)])
def test_one_side_needs_a_gradient(shape):
    x, y = view(normal(*shape)).requires_grad_(), view(normal(*shape, seed=1)).requires_grad_()
    with use_backend("triton"):
        both = torch.autograd.grad(gram(x, y)[1].sum(), (x, y))
        (only_x,) = torch.autograd.grad(gram(x, y.detach())[1].sum(), x)
        (only_y,) = torch.autograd.grad(gram(x.detach(), y)[1].sum(), y)
    assert torch.equal(only_x, both[0])
    assert torch.equal(only_y, both[1])


def test_strides_of_the_gradient():
    x = patches(normal(2, 3, 8, 12).contiguous(memory_format=torch.channels_last), 4, 4).requires_grad_()
    y = patches(normal(2, 3, 8, 12, seed=1), 4, 4)
    flags = (0, True, False, False, False)
    products, distance, saved = torch.ops.kdfast.gram_triton(x, y, *flags, True)
    gradient, _ = torch.ops.kdfast.gram_backward_triton(products, distance, x, y, saved, *flags, True, False)
    assert gradient.stride() == torch.empty_like(x).stride()


def test_float16_inputs():
    x, y = (
        view(normal(2, 9, 37, dtype=torch.float16) * 30),
        view(normal(2, 9, 37, seed=1, dtype=torch.float16)),
    )
    check("triton", x, y, floor=1e-3)
    check("triton", x, y.float(), centered=False, floor=1e-3)


def test_unavailable_combination_is_named():
    x = view(normal(2, 5, 7))
    with use_backend("triton"), pytest.raises(NotImplementedError, match=r"inter.*cka.*'mean'"):
        gram(x, x, compare="mean", inter=True)

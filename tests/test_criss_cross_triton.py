"""The Triton kernels of ``criss_cross`` in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret."""

from __future__ import annotations

import pytest
import torch
from criss_cross_checks import check, inputs, run

from kdfast import backend, use_backend
from kdfast.ops.criss_cross import criss_cross

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not backend.interpreting(), reason="needs TRITON_INTERPRET=1"),
]


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1),
        (2, 3, 5, 1, 7),
        (1, 3, 5, 7, 1),
        (2, 3, 5, 4, 6),
        (1, 33, 35, 3, 34),
        (1, 2, 3, 33, 2),
    ],
)
def test_matches_brute_force(shape):
    check("triton", inputs(shape), floor=5e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes(dtype):
    check("triton", inputs((1, 3, 5, 4, 6), dtype), floor=1e-14 if dtype == torch.float64 else 2e-3)


def test_strides():
    query, key, value = inputs((2, 3, 4, 5, 6), channels_last=True)
    check("triton", [query, key.contiguous(), value], floor=5e-6)
    check(
        "triton",
        [query[:1].expand(2, -1, -1, -1), key, value.transpose(2, 3).contiguous().transpose(2, 3)],
        floor=5e-6,
    )


def test_large_scores():
    check("triton", inputs((1, 8, 6, 5, 7), scale=40), floor=40 * 2e-5)


def test_only_needed_gradients():
    tensors = inputs((1, 3, 5, 4, 6))
    grad = torch.randn_like(tensors[2])
    with use_backend("triton"):
        expected = run(criss_cross, tensors, grad)[1:]
        for i, gradient in enumerate(expected):
            given = [v.requires_grad_(j == i) if j == i else v.detach() for j, v in enumerate(tensors)]
            assert torch.equal(torch.autograd.grad(criss_cross(*given), given[i], grad)[0], gradient)

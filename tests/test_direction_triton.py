"""The Triton kernels of ``direction`` in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret."""

from __future__ import annotations

import pytest
import torch
from direction_checks import check, inputs

from kdfast import backend, use_backend
from kdfast.ops.direction import direction

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not backend.interpreting(), reason="needs TRITON_INTERPRET=1"),
]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (9, 67, 4), (300, 17, 6), (5, 2500, 3)])
def test_matches_reference(shape, balanced):
    student, teacher, centers, labels = inputs(*shape, mean=1)
    check("triton", student, teacher, centers, labels, balanced=balanced)
    check("triton", student, None, centers, labels, balanced=balanced, floor=3e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes(dtype):
    student, teacher, centers, labels = inputs(7, 35, 4, dtype)
    floor = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps
    check("triton", student, teacher, centers, labels, floor=floor)
    check("triton", student, teacher.float(), centers.float(), labels, floor=floor)


def test_centres_per_sample_and_strides():
    student, teacher, centers, labels = inputs(7, 35, 4, labelled=False)
    check("triton", student, teacher, centers, labels)
    student, teacher, centers, labels = inputs(14, 70, 4)
    check("triton", student[::2, ::2], teacher.T.contiguous().T[::2, 1::2], centers[:, ::2], labels[::2])
    check("triton", student[:1].expand(14, 70), teacher, centers, labels, balanced=True)


def test_degenerate_rows():
    student, teacher, centers, labels = inputs(9, 6, 4)
    labels[:4] = torch.tensor([0, 1, 2, 3])
    student[0], student[1], teacher[1], centers[2] = 0, 0, 0, 0
    for balanced in (False, True):
        check("triton", student, teacher, centers, labels, balanced=balanced)
    with use_backend("triton"):
        nothing = torch.full_like(labels, -100)
        student.requires_grad_()
        loss = direction(student, teacher, centers, nothing)
        assert loss.item() == 0 and not torch.autograd.grad(loss, student)[0].any()
        assert direction(student[:0], teacher[:0], centers, labels[:0]).item() == 0


@pytest.mark.parametrize("label", [-1, 4, 2**40])
def test_a_label_out_of_range_is_not_hidden(label):
    student, teacher, centers, labels = inputs(9, 6, 4)
    labels[3] = label
    with use_backend("triton"):
        assert direction(student, teacher, centers, labels).isnan()
        assert direction(student, teacher, centers, labels, balanced=True).isnan()

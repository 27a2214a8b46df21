"""Drop-ins of kdfast.compat.mmrazor: values and gradients of the published computation, written out in pcka_checks."""

from __future__ import annotations

import pytest
import torch
from pcka_checks import maps, naive_cka, naive_patches
from torch import Tensor, nn
from torch.nn.functional import kl_div

from benchmarks.memory import peak
from kdfast.compat import mmrazor

CLASSES = {
    "channel": mmrazor.CenterKernelAlignmentRKD,
    "batch": mmrazor.CenterKernelAlignmentRKD_batch,
    "spatial": mmrazor.CenterKernelAlignmentRKD_hw,
}


def published(
    student: Tensor, teacher: Tensor, average: str, weight: float, inter: bool, row_norm: str
) -> Tensor:
    groups = list(zip(*(naive_patches(v, (16, 16), average) for v in (student, teacher)), strict=True))
    total = sum(-weight * naive_cka(x, y, False, row_norm) for x, y in groups)
    if inter:
        total = total + sum(-weight * naive_cka(x.T, y.T, False, row_norm) for x, y in groups)
    return total / len(groups)


def agree(
    got: Tensor, want: Tensor, inputs: list[Tensor], exact: list[Tensor], tolerance: float = 1e-5
) -> None:
    assert float(got) == pytest.approx(float(want), rel=tolerance)
    found, truth = torch.autograd.grad(got, inputs), torch.autograd.grad(want, exact)
    for g, w in zip(found, truth, strict=True):
        assert (g.double() - w).abs().max() <= 3 * tolerance * w.abs().max()


@pytest.mark.parametrize("average", CLASSES)
@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("inter", [None, 3.0])
def test_patch_classes(average: str, l2_norm: bool, inter: float | None) -> None:
    for shape in ((2, 3, 40, 52), (1, 5, 32, 48)):
        inputs = maps(shape, shape)
        exact = [v.detach().double().requires_grad_() for v in inputs]
        loss = CLASSES[average](intra_weight=10, inter_weight=inter, with_l2_norm=l2_norm)
        got = loss(student_logits=inputs[0], teacher_logits=inputs[1])
        row_norm = "row" if l2_norm else "none"
        agree(got, published(*exact, average, 10, bool(inter), row_norm), inputs, exact)


@pytest.mark.parametrize("average", CLASSES)
def test_combined_kd(average: str) -> None:
    student, teacher = maps((2, 3, 40, 52), (2, 3, 40, 52))
    plain, combined = CLASSES[average](), CLASSES[average](combined_KD=True, temperature=2.0)
    x, y = (torch.stack(naive_patches(v, (16, 16), average)) for v in (student, teacher))  # [G, N, D]
    kl = kl_div((x / 2).log_softmax(1), (y / 2).softmax(1), reduction="batchmean") * 4
    torch.testing.assert_close(combined(student, teacher) - plain(student, teacher), kl, rtol=1e-4, atol=1e-4)


def test_one_patch_does_not_crash() -> None:
    student, teacher = maps((2, 3, 7, 11), (2, 3, 7, 11))
    value = mmrazor.CenterKernelAlignmentRKD(inter_weight=1)(student, teacher)
    value.backward()
    assert -30 <= float(value) <= -15 and student.grad.isfinite().all()


@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("inter", [None, 1.0])
@pytest.mark.parametrize("soften", [False, True])
def test_segmentation(l2_norm: bool, inter: float | None, soften: bool) -> None:
    inputs = maps((2, 5, 6, 7), (2, 5, 6, 7))
    exact = [v.detach().double().requires_grad_() for v in inputs]
    loss = mmrazor.CenterKernelAlignmentSeg(
        intra_weight=10, inter_weight=inter, with_l2_norm=l2_norm, soften=soften, temperature=4.0
    )
    x, y = (v.flatten(1) for v in exact)
    row_norm = "row" if l2_norm else "none"
    softened = [(v / 4.0).softmax(1) for v in (x, y)] if soften else [x, y]
    want = -10 * naive_cka(*softened, False, row_norm)
    if inter:
        want = want - 10 * naive_cka(x.T, y.T, False, row_norm)
    agree(loss(student_logits=inputs[0], teacher_logits=inputs[1]), want, inputs, exact)


def by_columns(x: Tensor, y: Tensor) -> Tensor:
    """CKA of the columns of x and y [N, D] with rows of the D x D Grams divided, from products of N x N entries."""

    def norms_sq(v: Tensor) -> Tensor:
        return (v * v).sum(0)

    def product(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return ((a * weight @ b.T) * (a @ b.T)).sum()  # sum over d, e of w_d <a_d, a_e> <b_d, b_e>

    across = product(x, y, (norms_sq(x) * norms_sq(y)).rsqrt())
    return across / torch.sqrt(product(x, x, 1 / norms_sq(x)) * product(y, y, 1 / norms_sq(y)))


@pytest.mark.usefixtures("freed_memory_is_given_back")
def test_cityscapes_setting() -> None:
    """The committed configuration: a Gram of all 155,648 columns would take 97 GB."""
    small = [v.detach().double().flatten(1) for v in maps((2, 3, 8, 9), (2, 3, 8, 9))]
    torch.testing.assert_close(
        by_columns(*small), naive_cka(*(v.T for v in small), centered=False, row_norm="row")
    )
    inputs = maps((2, 19, 64, 128), (2, 19, 64, 128))
    exact = [v.detach().double().requires_grad_() for v in inputs]
    loss = mmrazor.CenterKernelAlignmentSeg(intra_weight=10, inter_weight=10)  # with_l2_norm by default
    x, y = (v.flatten(1) for v in exact)
    want = -10 * naive_cka(x, y, False, "row") - 10 * by_columns(x, y)
    agree(loss(student_logits=inputs[0], teacher_logits=inputs[1]), want, inputs, exact)
    student, teacher = inputs[0], inputs[1].detach()
    used = peak(lambda: torch.autograd.grad(loss(student, teacher), student), student.device)
    assert used is None or used < 32 * student.numel() * 4  # plain PyTorch keeps about 15 copies


@pytest.mark.parametrize("shape", [(2, 70, 18, 40), (2, 12, 40, 44)], ids=["small", "downsampled"])
def test_yolo(shape: tuple[int, ...]) -> None:
    student, teacher = maps(shape, shape)
    torch.manual_seed(3)
    got = mmrazor.CKA_Yolo(inter_weight=1)(student, teacher)
    torch.manual_seed(3)
    pair = [student, teacher]
    if shape[2] > 20:
        nn.Conv2d(shape[1], 64, 4, stride=2, bias=False)
        kernel = (torch.randn(shape[1], 64, 4, 4) / 4).view(64, shape[1], 4, 4)
        pair = [torch.nn.functional.conv2d(v, kernel, stride=2) for v in pair]
    size = [-(-n // 16) * 16 for n in pair[0].shape[2:]]
    squeeze = nn.Conv2d(2, 1, 1)
    matrices = []
    for v in pair:
        v = squeeze(torch.nn.functional.interpolate(v.transpose(0, 1), size=size, mode="bilinear"))
        matrices.append(naive_patches(v.transpose(0, 1), (16, 16), "channel")[:64])
    want = sum(
        -15 * (naive_cka(x, y, False, "none") + naive_cka(x.T, y.T, False, "none"))
        for x, y in zip(*matrices, strict=True)
    )
    assert float(got) == pytest.approx(float(want) / shape[1], rel=1e-4)

"""``patch_gram`` by Triton, in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret."""

from __future__ import annotations

import pytest
import torch
from pcka_checks import check, maps, naive_pcka

import kdfast
from kdfast import backend
from kdfast.ops import patch_gram as op
from kdfast.reference import patch_gram as reference
from kdfast.reference.patch_gram import AVERAGES, Grid

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not backend.interpreting(), reason="needs TRITON_INTERPRET=1"),
]


@pytest.mark.parametrize("inter", [0.0, 0.7])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize(
    ("resize", "size"), [("bilinear", (5, 7)), ("pad", (5, 7)), ("crop", (6, 7)), ("none", (6, 6))]
)
def test_equals_the_loop(resize: str, size: tuple[int, int], average: str, inter: float) -> None:
    shape = (2, 3, *size)
    options = {"average": average, "resize": resize, "centered": resize != "pad"}
    loss = kdfast.PCKALoss(patch_size=(2, 3), inter_weight=inter, **options)
    check(
        loss,
        lambda s, t: naive_pcka(s, t, patch=(2, 3), inter=inter, **options),
        maps(shape, shape),
        "triton",
    )


@pytest.mark.parametrize("row_norm", ["row", "cosine"])
def test_row_norms(row_norm: str) -> None:
    loss = kdfast.PCKALoss(patch_size=4, inter_weight=0.5, row_norm=row_norm)
    check(
        loss,
        lambda s, t: naive_pcka(s, t, patch=(4, 4), inter=0.5, row_norm=row_norm),
        maps((2, 2, 11, 9), (2, 2, 11, 9)),
        "triton",
        3e-5,
    )


@pytest.mark.parametrize("average", AVERAGES)
def test_maps_of_different_size_and_layout(average: str) -> None:
    student, teacher = maps((2, 3, 10, 13), (2, 3 if average == "channel" else 5, 12, 15))
    inputs = [v.detach().to(memory_format=torch.channels_last).requires_grad_() for v in (student, teacher)]
    loss = kdfast.PCKALoss(patch_size=4, average=average)
    check(loss, lambda s, t: naive_pcka(s, t, patch=(4, 4), average=average), inputs, "triton")


@pytest.mark.parametrize("average", [0, 1])
def test_blocks_of_groups(average: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that go through one, and two, at a time, with a last block that is not full."""
    x, y = maps((5, 5, 5, 7), (5, 5, 5, 7))
    grid, found = Grid(3, 4, 2, 2, True, average), []
    resized = 4 * 25 * grid.size[0] * grid.size[1]  # bytes of all five groups
    for share, blocks in ((5, 5), (2, 3)):
        monkeypatch.setattr(op, "GPU_BLOCK_BYTES", resized // share)
        assert len(list(op._blocks(x, y, grid))) == blocks
        with kdfast.use_backend("triton"):
            distance = op.patch_gram(x, y, grid)[1]
        found.append((distance, *torch.autograd.grad(distance.sum(), (x, y))))
    with kdfast.use_backend("reference"):
        distance = op.patch_gram(x, y, grid)[1]
    found.append((distance, *torch.autograd.grad(distance.sum(), (x, y))))
    for other in found[:2]:
        for got, want in zip(other, found[2], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# Scaled up and down, up to where one pixel is read by hundreds; odd sizes and ones; no resize; maps larger than the grid.
@pytest.mark.parametrize("average", range(3))
@pytest.mark.parametrize("grid", [(2, 3, 3, 3), (1, 1, 2, 3), (3, 4, 2, 2), (5, 6, 1, 2)], ids=str)
def test_resize_and_its_adjoint(grid: tuple[int, ...], average: int) -> None:
    from kdfast.kernels.resize import map_gradients, patch_matrices

    for shape in ((2, 3, 5, 7), (1, 1, 1, 1), (2, 5, 10, 13), (1, 17, 6, 9)):
        for layout in (torch.contiguous_format, torch.channels_last):
            for dtype, bilinear in ((torch.float32, True), (torch.float64, True), (torch.float32, False)):
                cut = Grid(*grid, bilinear, average)
                x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
                exact = x.double().requires_grad_()
                truth = reference.view(exact, cut).flatten(3).flatten(1, 2)
                found = patch_matrices([x, x], cut)
                z, gradients = torch.randn_like(found[0]), [torch.full_like(x, torch.nan) for _ in range(2)]
                map_gradients([z, -z], gradients, cut)
                (adjoint,) = torch.autograd.grad(truth, exact, z.double())
                assert torch.equal(found[0], found[1]) and torch.equal(gradients[0], -gradients[1])
                tolerance = 1e-6 if dtype == torch.float32 else 1e-14
                assert (found[0] - truth).abs().max() <= tolerance * exact.abs().max()
                assert (gradients[0] - adjoint).abs().max() <= 4 * tolerance * max(adjoint.abs().max(), 1)
                dot, transposed = (z.double() * found[0]).sum(), (gradients[0].double() * x).sum()
                assert abs(dot - transposed) <= 50 * tolerance * max(abs(dot), z.norm() * found[0].norm())


def test_a_constant_map_stays_constant() -> None:
    from kdfast.kernels.resize import patch_matrices

    (found,) = patch_matrices([torch.full((1, 2, 7, 9), 1234.567)], Grid(4, 4, 2, 3, True, 0))
    assert (found == found[0, 0, 0]).all()

"""``patch_gram`` by Triton, in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret."""

from __future__ import annotations

import pytest
import torch
from pcka_checks import check, maps, naive_pcka

import kdfast
from kdfast import backend
from kdfast.ops import patch_gram as op
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
    resized = 4 * 25 * grid.size[0] * grid.size[1]
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

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


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("inter", [0.0, 0.7])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize(
    ("resize", "size"), [("bilinear", (13, 10)), ("pad", (13, 10)), ("crop", (13, 10)), ("none", (12, 8))]
)
def test_equals_the_loop(
    resize: str, size: tuple[int, int], average: str, inter: float, centered: bool
) -> None:
    shape = (2, 3, *size)
    loss = kdfast.PCKALoss(
        patch_size=(3, 4), average=average, inter_weight=inter, centered=centered, resize=resize
    )
    options = {"patch": (3, 4), "average": average, "inter": inter, "centered": centered, "resize": resize}
    check(loss, lambda s, t: naive_pcka(s, t, **options), maps(shape, shape), "triton")


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
    x, y = maps((5, 5, 10, 13), (5, 5, 10, 13))
    grid, found = Grid(4, 4, 3, 4, True, average), []
    for blocks in (5, 3, 2):
        size = 4 * 5 * 5 * 12 * 16 if blocks > 2 else 1 << 40
        monkeypatch.setattr(op, "GPU_BLOCK_BYTES", size // 5 if blocks == 5 else size * 2 // 5)
        assert len(list(op._blocks(x, y, grid))) == (blocks if blocks > 2 else 3)
        with kdfast.use_backend("triton"):
            distance = op.patch_gram(x, y, grid)[1]
            found.append((distance, *torch.autograd.grad(distance.sum(), (x, y))))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)

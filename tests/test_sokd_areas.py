"""Distinctive areas: decode and masks against brute force, the masked error against its formula, guards."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_as_accurate
from torch import Tensor

import kdfast
from kdfast.sokd import DistinctiveAreas, areas_to_mask, decode_areas, masked_area_error

EMPTY = [0, 0, -1, -1]


def brute_decode(heat: Tensor, size: Tensor, offset: Tensor, k: int, kernel: int, fraction: float) -> list:
    """Peaks one by one; heat [N, H, W], the other two [2, H, W]."""
    n, h, w = heat.shape
    found, reach = [], kernel // 2
    for c in range(n):
        for y in range(h):
            for x in range(w):
                near = heat[c, max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
                if heat[c, y, x] >= near.max():
                    found.append((float(heat[c, y, x]), c, y, x))
    boxes = []
    for _, _, y, x in sorted(found, key=lambda v: -v[0])[:k]:
        half = [min(float(size[i, y, x]), fraction * side) / 2 for i, side in enumerate((w, h))]
        centre = [v + float(offset[i, y, x]) for i, v in enumerate((x, y))]
        box = [
            int(min(max(centre[i] + sign * half[i], 0), side - 1))
            for sign in (-1, 1)
            for i, side in enumerate((w, h))
        ]
        boxes.append(box)
    return boxes + [EMPTY] * (min(k, n * h * w) - len(boxes))


@pytest.mark.parametrize(
    ("n", "h", "w", "k", "kernel", "fraction"),
    [(1, 7, 9, 8, 3, None), (3, 6, 5, 8, 3, 0.5), (1, 2, 2, 8, 3, None), (1, 9, 9, 60, 5, 0.3), (2, 1, 4, 3, 1, 1.0)],
)  # fmt: skip
def test_decode_against_brute_force(n, h, w, k, kernel, fraction):
    heat, size = torch.randn(3, n, h, w), 4 * torch.rand(3, 2, h, w)
    offset = torch.randn(3, 2, h, w)
    got = decode_areas(heat, size, offset, areas=k, kernel=kernel, max_fraction=fraction)
    want = [brute_decode(*v, k, kernel, fraction or math.inf) for v in zip(heat, size, offset, strict=True)]
    assert got.tolist() == want
    # The order of values is all that counts.
    assert torch.equal(
        got, decode_areas(heat.sigmoid(), size, offset, areas=k, kernel=kernel, max_fraction=fraction)
    )


@pytest.mark.parametrize("multiplicity", ["sum", "squared", "union"])
def test_masks_against_brute_force(multiplicity):
    low, span = torch.randint(0, 6, (3, 8, 2)), torch.randint(-1, 5, (3, 8, 2))
    boxes = torch.cat([low, low + span], 2)
    boxes[0, 3] = torch.tensor(EMPTY)
    got = areas_to_mask(boxes, 7, 9, multiplicity=multiplicity)
    want = torch.zeros(3, 1, 7, 9)
    for b in range(3):
        for y in range(7):
            for x in range(9):
                m = sum(x1 <= x <= x2 and y1 <= y <= y2 for x1, y1, x2, y2 in boxes[b].tolist())
                want[b, 0, y, x] = {"sum": m, "squared": m**2, "union": m > 0}[multiplicity]
    assert torch.equal(got, want) and want.max() >= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_masked_error_is_the_sum_over_areas(dtype, channels_last):
    s, t = (torch.randn(2, 5, 7, 6, dtype=dtype) for _ in range(2))
    if channels_last:
        s, t = (v.contiguous(memory_format=torch.channels_last) for v in (s, t))
    boxes = torch.tensor([[[0, 0, 3, 3], [2, 1, 5, 6], EMPTY], [[1, 1, 1, 1], [0, 0, 5, 6], [4, 4, 5, 5]]])

    def naive(s: Tensor, t: Tensor) -> Tensor:
        loss = 0.0
        for i in range(3):
            mask = areas_to_mask(boxes[:, i : i + 1], 7, 6).to(s)
            loss = loss + (mask * (s - t)).square().sum()
        return loss / s.numel()

    def run(fn, dtype):
        x, y = (v.to(dtype, copy=True).requires_grad_() for v in (s, t))
        value = fn(x, y)
        return [value.detach(), *torch.autograd.grad(value, (x, y))]

    got = run(lambda x, y: masked_area_error(x, y, areas_to_mask(boxes, 7, 6)), dtype)
    same, truth = run(naive, dtype), run(naive, torch.float64)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for g, w, r in zip(got, truth, same, strict=True):
        assert_as_accurate(g, w, r, 1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1.0, 1e6])
def test_gradient_of_the_squared_root_is_exact(scale):
    """d² through the guarded root: no loss of accuracy whatever the size of the error, and 0 at 0."""
    s, t = scale * torch.randn(2, 3, 5, 4), torch.zeros(2, 3, 5, 4)
    mask = torch.randint(0, 4, (2, 1, 5, 4)).float()
    x = s.clone().requires_grad_()
    (got,) = torch.autograd.grad(masked_area_error(x, t, mask), x)
    torch.testing.assert_close(got, (2 / s.numel()) * mask * s, rtol=1e-6, atol=0)
    x = t.clone().requires_grad_()
    value = masked_area_error(x, t, mask)
    assert value.item() == 0 and not torch.autograd.grad(value, x)[0].any()


def test_gradcheck():
    s, t = (torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.randint(0, 3, (2, 1, 3, 3)).float()
    torch.autograd.gradcheck(lambda a, b: masked_area_error(a, b, mask), (s, t))
    torch.autograd.gradgradcheck(lambda a, b: masked_area_error(a, b, mask), (s, t))


def test_loss_is_its_parts():
    loss = DistinctiveAreas(4, detection_weight=0.3, area_weight=2.0, weight=5.0, multiplicity="squared")
    s, t = torch.randn(2, 4, 8, 9, requires_grad=True), torch.randn(2, 4, 8, 9)
    value = loss(s, t)
    seen = [[torch.sigmoid(loss.heat(v)), torch.log1p(loss.size(v).exp()), loss.offset(v)] for v in (s, t)]
    detection = (torch.cat(seen[0], 1) - torch.cat(seen[1], 1)).square().mean()
    boxes = decode_areas(*seen[0], areas=8, max_fraction=0.5)
    mask = areas_to_mask(boxes, 8, 9)
    area = (mask * (s - t)).square().mean()
    want = 5 * (0.3 * detection + 2 * area)
    torch.testing.assert_close(value, want)
    wanted = [s, *loss.parameters()]
    for g, w in zip(torch.autograd.grad(value, wanted), torch.autograd.grad(want, wanted), strict=True):
        torch.testing.assert_close(g, w)
    coverage = (mask > 0).float().mean()
    torch.testing.assert_close(loss.components["coverage"], coverage)
    torch.testing.assert_close(loss.components["detection"], detection.detach())
    torch.testing.assert_close(loss.components["area"], area.detach())
    assert not any(v.requires_grad for v in loss.components.values())


def test_areas_start_at_the_given_size_and_never_cover_the_map():
    loss = DistinctiveAreas(4, initial_size=3.0)
    torch.nn.init.zeros_(loss.size[2].weight)
    torch.testing.assert_close(loss.maps(torch.randn(1, 4, 5, 5)).size, torch.full((1, 2, 5, 5), 3.0))
    torch.nn.init.constant_(loss.size[2].bias, 1e4)
    x = torch.randn(2, 4, 8, 8)
    boxes = loss.decode(loss.maps(x))
    sides = boxes[..., 2:] - boxes[..., :2] + 1
    assert 4 <= sides.max() <= 5  # half the map, and one for a centre between pixels
    loss.max_fraction = None
    assert loss.decode(loss.maps(x)).tolist() == [[[0, 0, 7, 7]] * 8] * 2


def test_nothing_found_and_collapsed_heads_are_finite():
    size, offset = torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    heat = torch.arange(16.0).view(1, 1, 4, 4)  # one peak
    boxes = decode_areas(heat, size, offset)
    assert boxes[0, 1:].tolist() == [EMPTY] * 7 and boxes[0, 0].tolist() == [2, 2, 3, 3]
    s = torch.randn(1, 3, 4, 4, requires_grad=True)
    value = masked_area_error(s, torch.randn(1, 3, 4, 4), areas_to_mask(boxes[:, 1:], 4, 4))
    assert value.item() == 0 and not torch.autograd.grad(value, s)[0].any()
    loss = DistinctiveAreas(3)
    for parameter in loss.parameters():
        torch.nn.init.zeros_(parameter)
    for x in (s, 1e30 * s.detach().requires_grad_(), torch.zeros(1, 3, 4, 4, requires_grad=True)):
        value = loss(x, x.detach() if x.abs().max() > 1e20 else torch.zeros_like(x))
        assert value.isfinite() and torch.autograd.grad(value, x)[0].isfinite().all()


def test_compiles():
    loss = DistinctiveAreas(4)
    s, t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8)
    compiled = torch.compile(loss, fullgraph=True)(s, t)
    torch.testing.assert_close(compiled, loss(s, t))
    (g,) = torch.autograd.grad(compiled, s)
    torch.testing.assert_close(g, torch.autograd.grad(loss(s, t), s)[0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backends_agree(backend):
    if kdfast.info()["backends"][backend] != "available":
        pytest.skip(f"no {backend}")
    s, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    mask = torch.randint(0, 3, (2, 1, 8, 8)).float()
    with kdfast.use_backend(backend):
        torch.testing.assert_close(masked_area_error(s, t, mask), (mask * (s - t) ** 2).mean())


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: decode_areas(torch.rand(1, 1, 4, 4), torch.rand(1, 2, 4, 3), torch.rand(1, 2, 4, 4)), "size"),
        (lambda: decode_areas(*(torch.rand(1, 2, 4, 4),) * 3, kernel=2), "kernel"),
        (lambda: decode_areas(*(torch.rand(1, 2, 4, 4),) * 3, max_fraction=2.0), "max_fraction"),
        (lambda: areas_to_mask(torch.zeros(2, 4), 3, 3), "boxes"),
        (lambda: areas_to_mask(torch.zeros(1, 2, 4), 3, 3, multiplicity="max"), "multiplicity"),
        (lambda: masked_area_error(*(torch.rand(1, 2, 4, 4),) * 3), "mask"),
        (lambda: DistinctiveAreas(3)(torch.rand(1, 3, 4, 4), torch.rand(1, 4, 4, 4)), "shape"),
        (lambda: DistinctiveAreas(0), "channels"),
        (lambda: DistinctiveAreas(3, initial_size=0), "initial_size"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()

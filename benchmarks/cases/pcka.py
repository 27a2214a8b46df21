"""PCKA on the pyramids of the paper's detectors, 800 x 1344 images; the published loop over the groups as baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

import kdfast

from ..case import Baseline, Case, pair

PATCH = 16
SOURCE = "800 x 1344 images (Zhou et al. 2024, Sec. 4.3)"
RETINANET = {"P3": (100, 168), "P4": (50, 84), "P5": (25, 42), "P6": (13, 21), "P7": (7, 11)}
FASTER_RCNN = {"P2": (200, 336), "P3": (100, 168), "P4": (50, 84), "P5": (25, 42), "P6": (13, 21)}


def grid(height: int, width: int) -> tuple[int, int]:
    return -(-height // PATCH), -(-width // PATCH)


def trace_cka(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(0), y - y.mean(0)
    k, m = x @ x.T, y @ y.T
    return torch.trace(k @ m.T) / torch.sqrt(torch.trace(k @ k.T) * torch.trace(m @ m.T))


def loop(average: str, inter: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """1 - CKA of one group after the other, as published: three N³ products for each CKA."""
    order = {"channel": (1, 2, 4, 0, 3, 5), "batch": (0, 2, 4, 1, 3, 5), "spatial": (3, 5, 2, 4, 0, 1)}[
        average
    ]

    def matrices(x: Tensor) -> Tensor:
        rows, columns = grid(*x.shape[2:])
        x = interpolate(x, size=(rows * PATCH, columns * PATCH), mode="bilinear")
        x = x.unflatten(2, (rows, PATCH)).unflatten(4, (columns, PATCH)).permute(order).contiguous()
        x = x.flatten(0, 1).flatten(1, 2).flatten(2) if average == "spatial" else x.flatten(3).flatten(1, 2)
        return x  # [G, N, D]

    def one(student: Tensor, teacher: Tensor) -> Tensor:
        total, (xs, ys) = 0, (matrices(v) for v in (student, teacher))
        for i in range(len(xs)):
            x, y = xs[i], ys[i]  # as published: the backward of each index fills a gradient of the whole map
            total = total + 1 - trace_cka(x, y)
            if inter:
                total = total + 1 - trace_cka(x.T, y.T)
        return total / _groups(student, average)

    return one


def _groups(x: Tensor, average: str) -> int:
    return {"channel": x.shape[1], "batch": x.shape[0], "spatial": PATCH * PATCH}[average]


def cost(shape: Sequence[int], average: str, inter: bool, itemsize: int) -> tuple[int, int]:
    """Bytes and operations, forward and backward.

    Bytes: both maps once forward; the student once backward, and its gradient written. Operations: two symmetric
    Grams and one product of an N x N matrix with the patches; inter adds a full product and another one backward.
    The resize costs 2 + 2 multiply-adds per pixel each way.
    """
    batch, channels, height, width = shape
    rows, columns = grid(height, width)
    pixels = batch * channels * rows * columns * PATCH * PATCH
    n = rows * columns
    groups = {"channel": channels, "batch": batch, "spatial": PATCH * PATCH}[average]
    n = min(n, pixels // groups // n)  # the smaller side
    nbytes = itemsize * 4 * math.prod(shape)
    return nbytes, pixels * (4 * n + (4 * n if inter else 0) + 3 * 8)


def case(
    name: str,
    shapes: Sequence[Sequence[int]],
    *,
    average: str = "channel",
    inter: bool = False,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    source: str = SOURCE,
    naive: bool = False,
    chunks: int = 0,
) -> Case:
    """chunks: groups of channels of which the truth is computed one at a time, where it needs too much memory at once."""
    loss = kdfast.PCKALoss(average=average, inter_weight=float(inter))
    one = loop(average, inter)
    # Levels of one or two patches are a constant: they are left out, as the published configurations do.
    costs = [cost(shape, average, inter, dtype.itemsize) for shape in shapes]
    count = len(shapes)

    def make(device: torch.device, seed: int) -> list[Tensor]:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        made = [
            pair(shape, shape, dtype=dtype, memory_format=layout)(device, seed + i)
            for i, shape in enumerate(shapes)
        ]
        student, teacher = zip(*made, strict=True)
        return [*student, *teacher]

    def naive_loss(*maps: Tensor) -> Tensor:
        return torch.stack([one(s, t) for s, t in zip(maps[:count], maps[count:], strict=True)]).sum()

    def by_chunks(*maps: Tensor) -> Tensor:
        total = maps[0].new_zeros((), dtype=torch.float32)
        for level in zip(maps[:count], maps[count:], strict=True):
            parts = zip(*(v.tensor_split(chunks, 1) for v in level), strict=True)
            for student, teacher in parts:  # kept: the maps alone, all else is computed again
                share = student.shape[1] / level[0].shape[1]
                total = total + share * checkpoint(loss, student, teacher, use_reentrant=False)
        return total

    padded = sum(s[0] * s[1] * math.prod(grid(*s[2:])) * PATCH**2 for s in shapes)
    return Case(
        family="pcka",
        name=name,
        source=source,
        loss=lambda *maps: loss(maps[:count], maps[count:]),
        make=make,
        bytes=sum(c[0] for c in costs),
        flops=sum(c[1] for c in costs),
        needs_grad=(True,) * count,
        dtype=dtype,
        layout="channels_last" if channels_last else "contiguous",
        op="patch_gram",
        baselines={"naive": Baseline(naive_loss, 0.1 if dtype.itemsize == 2 else 1e-2)} if naive else {},
        memory=4 * 12 * padded,
        truth=by_chunks if chunks else None,
    )


def cases() -> list[Case]:
    found = []
    p3 = (2, 256, *RETINANET["P3"])
    for average in ("channel", "batch", "spatial"):
        found.append(case(f"P3 {average}", [p3], average=average, naive=True))
    found += [
        case("P3 channel, intra + inter", [p3], inter=True),
        case("P3 channel", [p3], channels_last=True),
        case("P3 channel", [p3], dtype=torch.bfloat16),
        case("P3 channel, no resize", [(2, 256, 96, 160)], source="a map of whole patches"),
        *(
            case(f"P5 {average}, batch {batch}", [(batch, 256, *RETINANET["P5"])], average=average)
            for average in ("channel", "batch", "spatial")
            for batch in (2, 8)
        ),
    ]
    for batch in (2, 8, 12):
        for detector, pyramid, levels, inter in (
            ("RetinaNet P3..P6", RETINANET, ("P3", "P4", "P5"), False),
            ("Faster R-CNN P2..P6", FASTER_RCNN, ("P2", "P3", "P4", "P5"), True),
        ):
            shapes = [(batch, 256, *pyramid[level]) for level in levels]
            label = f"{detector.split(' P')[0]} {levels[0]}..{levels[-1]}, batch {batch}" + (
                ", intra + inter" if inter else ""
            )
            naive, chunks = batch == 2 and not inter, 32 if batch > 2 and inter else 0
            found.append(case(label, shapes, inter=inter, naive=naive, chunks=chunks))
    return found

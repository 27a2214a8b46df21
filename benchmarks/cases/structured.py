"""Structured distillation of a whole feature pyramid, and its non-local part by kind of block, on one level.

Maps are FPN levels of 800 x 1344 images with 256 channels. The baseline computes what published code does: every
affinity as a matrix of pixels times pooled pixels, every distance by way of temporaries.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kdfast import NonLocalBlock, NonLocalLoss, StructuredKDLoss
from kdfast.losses.non_local import CRISS_CROSS

from ..case import Baseline, Case, pair
from .attention import SIZES
from .attention import published as published_attention

LEVELS = [SIZES[8], SIZES[16], SIZES[32], SIZES[64], (7, 11)]
CHANNELS, BATCH = 256, 2
SOURCE = "FPN {} of 800 x 1344, 256 channels, batch 2 (Zhang & Ma 2023, Sec. IV-A)"


class Kept(nn.Module):
    """A loss with layers, after some training, in the type and on the device of its maps; students come first."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, p in loss.named_parameters():
            if name.endswith(("W.1.weight", "gamma")):  # where a block starts as the identity
                with torch.no_grad():
                    p.copy_(0.5 + 0.1 * torch.randn(p.shape, generator=generator))
        self.single, self.exact = loss, copy.deepcopy(loss).double()

    def fitting(self, x: Tensor) -> nn.Module:
        if next(self.parameters()).device != x.device:
            self.to(x.device)
        return self.exact if x.dtype == torch.float64 else self.single

    def forward(self, *maps: Tensor) -> Tensor:
        half = len(maps) // 2
        return self.fitting(maps[0])(maps[:half], maps[half:])


def _block(block: NonLocalBlock, x: Tensor) -> Tensor:
    """Published block that looks everywhere, with its [n, m] matrix; two for the concatenation kind."""
    batch, _, h, w = x.shape
    raw = block.kind == "gaussian"
    query = (x if raw else block.theta(x)).flatten(2)
    key = (nn.functional.max_pool2d(x, block.key_stride) if raw else block.phi(x)).flatten(2)
    value = block.g(x).flatten(2)
    if block.kind == "concatenation":
        first, second = block.concat_project[0].weight[0, :, 0, 0].chunk(2)
        # Published code forms [B, 2 d, n, m] here, 17 GB at this size; the sum before the ReLU is the same.
        f = torch.relu((first @ query)[:, :, None] + (second @ key)[:, None]) / key.shape[2]
    else:
        f = query.transpose(1, 2) @ key
        f = f / key.shape[2] if block.kind == "dot_product" else f.softmax(2)
    y = (f @ value.transpose(1, 2)).transpose(1, 2).reshape(batch, -1, h, w)
    return block.W(y) + x


def _criss_cross(block: NonLocalBlock, x: Tensor) -> Tensor:
    """Published criss-cross attention in plain PyTorch: rows and columns as batches of small products."""
    h = x.shape[2]
    for _ in range(2 if block.kind == "rcca" else 1):
        q, k, v = block.query_conv(x), block.key_conv(x), block.value_conv(x)
        column = torch.einsum("bdhw,bdiw->bhwi", q, k)
        itself = torch.eye(h, dtype=torch.bool, device=x.device)[None, :, None]
        column = column.masked_fill(itself, float("-inf"))
        weights = torch.cat([column, torch.einsum("bdhw,bdhj->bhwj", q, k)], 3).softmax(3)
        y = torch.einsum("bhwi,bdiw->bdhw", weights[..., :h], v)
        x = block.gamma * (y + torch.einsum("bhwj,bdhj->bdhw", weights[..., h:], v)) + x
    return x


def _relations(loss: NonLocalLoss, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    call = _criss_cross if loss.kind in CRISS_CROSS else _block
    terms = [
        torch.dist(loss.adaptation[i](call(loss.student[i], s)), call(loss.teacher[i], t))
        for i, (s, t) in enumerate(zip(student, teacher, strict=True))
    ]
    return loss.weight * sum(terms)


def _structured(loss: StructuredKDLoss, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    layers = loss.attention.adaptation
    attention = sum(
        published_attention(s, t, "two_stage", layer)
        for s, t, layer in zip(student, teacher, layers, strict=True)
    )
    return attention + _relations(loss.non_local, student, teacher)


def _maps(sizes: list[tuple[int, int]]) -> Callable[[torch.device, int], list[Tensor]]:
    """Levels of the student, then those of the teacher."""

    def make(device: torch.device, seed: int) -> list[Tensor]:
        shapes = [(BATCH, CHANNELS, *size) for size in sizes]
        pairs = [pair(s, s, relu=False)(device, seed + i) for i, s in enumerate(shapes)]
        return [s for s, _ in pairs] + [t for _, t in pairs]

    return make


def _flops(loss: NonLocalLoss, sizes: list[tuple[int, int]]) -> int:
    """Forward and twice as much backward: 1x1 convolutions of both networks and the products between them."""
    total = 0
    for block, (h, w) in zip(loss.student, sizes, strict=True):
        n, c, d = BATCH * h * w, CHANNELS, block.inter_channels
        m = (h // block.key_stride) * (w // block.key_stride)
        if loss.kind in CRISS_CROSS:
            part = (2 if loss.kind == "rcca" else 1) * n * (c * (c + 2 * d) + (h + w) * (c + d))
        else:
            raw = loss.kind == "gaussian"
            softmax = m * (d + (c if raw else d))
            between = {"dot_product": d * d, "concatenation": 2 * d}.get(loss.kind, softmax)
            part = n * (c * d * (2 if raw else 4) + between)
        total += 3 * 2 * (2 * part + n * c * c)
    return total


def _case(
    name: str, loss: nn.Module, naive: Callable, sizes: list[tuple[int, int]], op: str, passes: int
) -> Case:
    elements = BATCH * CHANNELS * sum(math.prod(size) for size in sizes)
    kept, part = Kept(loss), getattr(loss, "non_local", loss)
    matrix = BATCH * math.prod(sizes[0]) * (math.prod(sizes[0]) // part.student[0].key_stride ** 2)
    levels = "P3 to P7" if len(sizes) > 1 else "stride 16"
    return Case(
        family="structured",
        name=name,
        source=SOURCE.format(levels),
        loss=kept,
        make=_maps(sizes),
        needs_grad=(True,) * len(sizes),
        bytes=passes * elements * 4,
        flops=_flops(part, sizes),
        op=op,
        baselines={
            "naive": Baseline(
                lambda *maps: naive(kept.fitting(maps[0]), maps[: len(sizes)], maps[len(sizes) :]),
                memory=30 * 4 * elements + 3 * 4 * matrix,
            )
        },
        memory=30 * 4 * elements,
    )


def cases() -> list[Case]:
    loss = StructuredKDLoss([CHANNELS] * 5, preset="two_stage")
    # Both maps for pooled attention and key-value products, both for masked error and relations; both again and one
    # gradient backward.
    found = [_case("two_stage P3-P7 dot_product [2, 256]", loss, _structured, LEVELS, "attention_mask", 7)]
    for kind in ("dot_product", "embedded_gaussian", "gaussian", "concatenation", "criss_cross", "rcca"):
        stride = None if kind in CRISS_CROSS else 4
        loss = NonLocalLoss(CHANNELS, kind=kind, key_stride=stride)
        found.append(_case(f"{kind} [2, 256, 50, 84]", loss, _relations, [SIZES[16]], "masked_distance", 7))
    return found

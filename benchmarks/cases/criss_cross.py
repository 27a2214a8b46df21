"""Criss-cross attention: CCNet's module, and non-local distillation on FPN levels. Naive: the published form."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.losses.criss_cross import criss_cross_attention

from ..case import Baseline, Case


def published(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """CCNet's form: every row and every column a batch of small products, -inf on the column's diagonal."""
    b, _, h, w = value.shape

    def lines(x: Tensor, column: bool) -> Tensor:  # [B * lines, channels, cells]
        return x.permute(0, 3, 1, 2).flatten(0, 1) if column else x.permute(0, 2, 1, 3).flatten(0, 1)

    own = torch.diag(torch.full((h,), float("inf"), device=value.device, dtype=value.dtype))
    column = torch.bmm(lines(query, True).transpose(1, 2), lines(key, True)) - own
    row = torch.bmm(lines(query, False).transpose(1, 2), lines(key, False))
    column = column.view(b, w, h, h).permute(0, 2, 1, 3)  # [B, H, W, H]
    weights = torch.cat([column, row.view(b, h, w, w)], 3).softmax(3)
    column = weights[..., :h].permute(0, 2, 3, 1).reshape(b * w, h, h)
    row = weights[..., h:].transpose(2, 3).reshape(b * h, w, w)
    from_column = torch.bmm(lines(value, True), column).view(b, w, -1, h).permute(0, 2, 3, 1)
    return from_column + torch.bmm(lines(value, False), row).view(b, h, -1, w).transpose(1, 2)


def _case(
    shape: tuple[int, int, int, int], d: int, source: str, *, channels_last: bool = False, dtype=torch.float32
) -> Case:
    b, e, h, w = shape
    positions = b * h * w

    def make(device: torch.device, seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        made = []
        for channels, scale in ((d, d**-0.25), (d, d**-0.25), (e, 1.0), (e, 1.0)):  # scores of size 1
            x = scale * torch.randn(b, channels, h, w, device=device, generator=generator)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            made.append(x.to(dtype).contiguous(memory_format=layout))
        return made

    def relation(attention):
        return lambda query, key, value, _: attention(query, key, value)

    return Case(
        family="criss_cross",
        name=f"[{', '.join(map(str, shape))}], query {d}",
        source=source,
        loss=relation(criss_cross_attention),
        make=make,
        # Forward: query, key, value read, out written; backward: those and out's gradient read, three gradients
        # written; each once.
        bytes=dtype.itemsize * positions * (2 * (2 * d + e) + 2 * d + e + 3 * e),
        # 2 (d + e) forward and 2 (3 d + 2 e) backward for each of H + W - 1 cells
        flops=positions * (h + w - 1) * 2 * (4 * d + 3 * e),
        needs_grad=(True, True, True),
        dtype=dtype,
        layout="channels_last" if channels_last else "contiguous",
        baselines={
            "naive": Baseline(
                relation(published), 0.1 if dtype.itemsize == 2 else 1e-2, 4 * 4 * positions * (h + w)
            )
        },
        memory=4 * positions * (4 * (h + w) + 4 * e),
    )


def cases() -> list[Case]:
    rcca = "Cityscapes 769 x 769, output stride 8: RCCA with 512 channels (CCNet)"
    fpn = "FPN {} at 800 x 1344, 2 images, 256 channels, query and key an eighth"
    return [
        _case((2, 64, 32, 32), 8, "a small map"),
        _case((2, 256, 64, 64), 32, "512 x 512 crop, output stride 8, 256 channels"),
        _case((2, 256, 64, 64), 32, "512 x 512 crop, output stride 8, 256 channels", channels_last=True),
        _case((2, 256, 64, 64), 32, "512 x 512 crop, output stride 8, 256 channels", dtype=torch.bfloat16),
        _case((2, 512, 97, 97), 64, rcca),
        _case((2, 256, 50, 84), 32, fpn.format("P4")),
        _case((2, 256, 25, 42), 32, fpn.format("P5")),
        _case((2, 256, 13, 21), 32, fpn.format("P6")),
    ]

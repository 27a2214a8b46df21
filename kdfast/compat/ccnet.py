"""Drop-ins for CCNet's criss-cross attention (speedinghzl/CCNet): same arguments, state keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from ..losses.non_local import NonLocalBlock

__all__ = ["CrissCrossAttention", "RCCAModule"]


class CrissCrossAttention(NonLocalBlock):
    """gamma * attention over each pixel's row and column + x; gamma starts at 0.

    Args:
        in_dim: channels C of the maps; queries and keys have C // 8.

    Shape: [B, C, H, W] to the same. State keys: query_conv, key_conv, value_conv, gamma.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__(in_dim, kind="criss_cross")


class _ActivatedBatchNorm(nn.BatchNorm2d):
    """Batch norm and leaky ReLU of slope 0.01, the default of the InPlaceABNSync that CCNet uses; statistics are local."""

    def forward(self, x: Tensor) -> Tensor:
        return leaky_relu(super().forward(x), 0.01)


def _block(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        _ActivatedBatchNorm(out_channels),
    ]


class RCCAModule(nn.Module):
    """CCNet's head: criss-cross attention applied ``recurrence`` times between two convolutions, and a bottleneck.

    Args:
        in_channels: C of the maps; the attention has C // 4.
        out_channels: inside the bottleneck. (Published code fits its last convolution to 512 only.)
        num_classes: of the output.

    Shape: [B, C, H, W] to [B, num_classes, H, W]. State keys: conva, cca, convb, bottleneck. In training the
    bottleneck drops channels (Dropout2d, 0.1).
    """

    def __init__(self, in_channels: int, out_channels: int, num_classes: int) -> None:
        super().__init__()
        inter = in_channels // 4
        self.conva = nn.Sequential(*_block(in_channels, inter))
        self.cca = CrissCrossAttention(inter)
        self.convb = nn.Sequential(*_block(inter, inter))
        self.bottleneck = nn.Sequential(
            *_block(in_channels + inter, out_channels),
            nn.Dropout2d(0.1),
            nn.Conv2d(out_channels, num_classes, 1),
        )

    def forward(self, x: Tensor, recurrence: int = 1) -> Tensor:
        y = self.conva(x)
        for _ in range(recurrence):
            y = self.cca(y)
        return self.bottleneck(torch.cat([x, self.convb(y)], 1))

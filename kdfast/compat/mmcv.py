"""Drop-in for mmcv's ``NonLocal2d``: same arguments, state keys, initial values and results, without the n x n matrix."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..losses._common import check_choice
from ..losses.non_local import non_local_response

__all__ = ["NonLocal2d"]

MODES = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


class ConvModule(nn.Module):
    """A 1x1 convolution and its batch norm, under the names of mmcv's ConvModule; a norm replaces the bias."""

    def __init__(
        self, in_channels: int, out_channels: int, norm_cfg: dict | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias and norm_cfg is None)
        if norm_cfg is not None:
            self.bn = _norm(out_channels, **norm_cfg)

    @property
    def norm(self) -> nn.Module | None:
        return getattr(self, "bn", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


def _norm(channels: int, type: str, requires_grad: bool = True, **settings: Any) -> nn.Module:
    check_choice("norm_cfg['type']", type, ("BN", "BN2d", "SyncBN"))
    made = (nn.SyncBatchNorm if type == "SyncBN" else nn.BatchNorm2d)(channels, **settings)
    return made.requires_grad_(requires_grad)


class NonLocal2d(nn.Module):
    """z = x + conv_out(y), as mmcv computes it.

    Args:
        in_channels: C of the maps.
        sub_sample: max-pool keys and values by 2.
        conv_cfg: None or ``{"type": "Conv2d"}``.
        reduction: C // reduction channels inside.
        use_scale: divide the exponent of the embedded Gaussian by the root of these channels (not in the other modes).
        norm_cfg: of conv_out: None, or ``{"type": "BN" | "SyncBN", ...}``.
        mode: "gaussian" | "embedded_gaussian" | "dot_product" | "concatenation".
        std, zeros_init: initial spread of the weights; start as the identity (default).

    Shape: [B, C, H, W] to the same. Differentiable in x and all parameters.

    Raises:
        ValueError: a mode, norm or convolution other than these; a map smaller than the pooling.
    """

    def __init__(
        self,
        in_channels: int,
        sub_sample: bool = False,
        conv_cfg: dict | None = {"type": "Conv2d"},  # noqa: B006 (the published default; never changed)
        reduction: int = 2,
        use_scale: bool = True,
        norm_cfg: dict | None = None,
        mode: str = "embedded_gaussian",
        std: float = 0.01,
        zeros_init: bool = True,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, MODES)
        if conv_cfg not in (None, {"type": "Conv2d"}):
            raise ValueError(f"conv_cfg: need None or {{'type': 'Conv2d'}}, got {conv_cfg!r}")
        inter = in_channels // reduction
        self.in_channels, self.inter_channels, self.reduction = in_channels, inter, reduction
        self.use_scale, self.mode, self.sub_sample = use_scale, mode, sub_sample
        self.key_stride = 1
        self.g = ConvModule(in_channels, inter)
        self.conv_out = ConvModule(inter, in_channels, norm_cfg)
        if mode != "gaussian":
            self.theta, self.phi = ConvModule(in_channels, inter), ConvModule(in_channels, inter)
        if mode == "concatenation":
            self.concat_project = ConvModule(2 * inter, 1, bias=False)
            nn.init.kaiming_normal_(self.concat_project.conv.weight, mode="fan_out", nonlinearity="relu")
        self._initialise(std, zeros_init)
        if sub_sample:
            self._pool(2)

    def _initialise(self, std: float, zeros_init: bool) -> None:
        for conv in (m.conv for m in (self.g, *((self.theta, self.phi) if self.mode != "gaussian" else ()))):
            nn.init.normal_(conv.weight, std=std)
            nn.init.zeros_(conv.bias)
        last = self.conv_out.conv if self.conv_out.norm is None else self.conv_out.norm
        if zeros_init:
            nn.init.zeros_(last.weight)
        else:
            nn.init.normal_(last.weight, std=std)
        nn.init.zeros_(last.bias)

    def _pool(self, stride: int) -> None:
        """Max-pool keys and values, after any pooling before: one of the product of both strides is the same."""
        self.key_stride *= stride
        pool = nn.MaxPool2d(stride)
        self.g = nn.Sequential(self.g, pool)  # these nestings give the published state keys
        self.phi = pool if self.mode == "gaussian" else nn.Sequential(self.phi, pool)

    def forward(self, x: Tensor) -> Tensor:
        project = self.concat_project.conv.weight if self.mode == "concatenation" else None
        theta, phi = (None, None) if self.mode == "gaussian" else (_conv(self.theta), _conv(self.phi))
        scale = self.inter_channels**-0.5 if self.use_scale else None
        y = non_local_response(
            x, self.mode, theta, phi, _conv(self.g), project, key_stride=self.key_stride, scale=scale
        )
        return x + self.conv_out(y)


def _conv(module: nn.Module) -> nn.Conv2d:
    while isinstance(module, nn.Sequential):
        module = module[0]
    return module.conv

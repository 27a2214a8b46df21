"""Non-local blocks and non-local distillation (Wang et al., CVPR 2018; Huang et al., ICCV 2019; Zhang & Ma, TPAMI 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d

from ._common import Levels, Loss, check_choice, check_fits, check_float, describe, levels, total
from ._pointwise import pointwise, pointwise_layer
from .affinity import concatenation_affinity, dot_product_affinity, softmax_affinity
from .attention import Channels, channel_pairs, check_map_pair, masked_feature_distance
from .criss_cross import criss_cross_attention

Kind = Literal["gaussian", "embedded_gaussian", "dot_product", "concatenation", "criss_cross", "rcca"]
KINDS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation", "criss_cross", "rcca")
CRISS_CROSS = ("criss_cross", "rcca")


def non_local_response(
    x: Tensor,
    kind: str,
    theta: nn.Conv2d | None,
    phi: nn.Conv2d | None,
    g: nn.Conv2d,
    project: Tensor | None,
    *,
    key_stride: int,
    scale: float | None = None,
) -> Tensor:
    """y_i = sum of f(x_i, x_j) g(x_j) over the keys j, normalised: what a non-local block adds before W_z.

    Args:
        x: [B, C, H, W].
        kind: one of the four kinds that look at every key.
        theta, phi, g: 1x1 convolutions to d, d and e channels; the Gaussian kind has no theta and phi.
        project: w of the concatenation, [1, 2 d, 1, 1]; its first half belongs to theta.
        key_stride: phi and g are max-pooled with this kernel and stride.
        scale: of the embedded Gaussian's exponent; None: 1.

    Returns: [B, e, H, W].
    """
    _check_map("x", x, key_stride)
    if kind == "gaussian":
        value = max_pool2d(pointwise_layer(g, x), key_stride).to(
            x.dtype
        )  # autocast makes g(x) narrower than x
        return softmax_affinity(x, max_pool2d(x, key_stride), value)
    # One convolution for keys and values: x is read once, and its gradient summed once.
    weight, bias = torch.cat([phi.weight, g.weight]), torch.cat([phi.bias, g.bias])
    sizes = (phi.out_channels, g.out_channels)
    key, value = max_pool2d(pointwise(x, weight, bias), key_stride).split(sizes, 1)
    if kind == "dot_product":
        return dot_product_affinity(pointwise_layer(theta, x), key, value)
    if kind == "embedded_gaussian":
        return softmax_affinity(pointwise_layer(theta, x), key, value, scale=scale)
    for_query, for_key = project.split(phi.out_channels, 1)  # [1, d, 1, 1]
    # w_1 . theta(x) is one 1x1 convolution to one channel: theta(x) is never formed.
    row = for_query.flatten(1)
    a = pointwise(x, (row @ theta.weight.flatten(1))[..., None, None], row @ theta.bias)
    b = conv2d(key, for_key)
    y = concatenation_affinity(a.flatten(1), b.flatten(1), value.flatten(2).transpose(1, 2))  # [B, n, e]
    return y.transpose(1, 2).unflatten(2, x.shape[2:])


class NonLocalBlock(nn.Module):
    """z = x + W_z(y), y_i a mean of g(x_j) over pixels j, weighted by how they relate to pixel i.

    ========================  ===============================================================  ==================
    kind                      f(x_i, x_j)                                                      normalised by
    ========================  ===============================================================  ==================
    ``"gaussian"``            exp(x_i . x_j)                                                   sum over j
    ``"embedded_gaussian"``   exp(theta(x_i) . phi(x_j))                                       sum over j
    ``"dot_product"``         theta(x_i) . phi(x_j)                                            number of keys
    ``"concatenation"``       relu(w . [theta(x_i), phi(x_j)])                                 number of keys
    ``"criss_cross"``         exp(q(x_i) . k(x_j)), j in row and column of i; z = x + gamma y  sum over j
    ``"rcca"``                the criss-cross block twice, with the same weights               sum over j
    ========================  ===============================================================  ==================

    No matrix of queries times keys is formed. theta, phi, g and W_z are 1x1 convolutions with a bias, W_z is followed
    by a batch norm.

    Args:
        in_channels: C of the maps.
        inter_channels: of theta, phi and g, C // 2 by default; of q and k in the criss-cross kinds, C // 8 by default.
        kind: see above; exponents are not scaled.
        key_stride: max-pool keys and values with this kernel and stride (after phi and g, as published code; the
            Gaussian kind pools x). Pixels beyond the last whole window are no keys. 1 for the criss-cross kinds.
        residual: add x.
        zero_init: batch norm (criss-cross: gamma) starts at 0, so that z = x at first; else at its usual 1.

    Shape: [B, C, H, W] to [B, C, H, W], H and W at least ``key_stride``. Differentiable in x and all parameters.
    State keys are those of published code (AlexHex7/Non-local_pytorch, 2D with batch norm; CCNet's
    CrissCrossAttention), whose weights load.

    Raises:
        ValueError, TypeError: unknown kind; channels or ``key_stride`` that are not integers above 0; a map smaller than
            ``key_stride`` or of other than C channels.

    Source: Wang et al., Non-local Neural Networks, CVPR 2018; Huang et al., CCNet, ICCV 2019.
    """

    def __init__(
        self,
        in_channels: int,
        inter_channels: int | None = None,
        *,
        kind: Kind = "dot_product",
        key_stride: int = 1,
        residual: bool = True,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        crossing = kind in CRISS_CROSS
        if not isinstance(key_stride, int) or key_stride < 1 or (crossing and key_stride > 1):
            need = "1, the keys are the pixel's row and column" if crossing else "an integer above 0"
            raise ValueError(f"key_stride: kind {kind!r} needs {need}; got {key_stride!r}")
        for name, count in (("in_channels", in_channels), ("inter_channels", inter_channels)):
            if not (isinstance(count, int) and count > 0) and (name, count) != ("inter_channels", None):
                raise ValueError(f"{name}: need an integer above 0, got {count!r}")
        inter = inter_channels or max(1, in_channels // (8 if crossing else 2))
        self.in_channels, self.inter_channels = in_channels, inter
        self.kind, self.key_stride, self.residual = kind, key_stride, residual
        if crossing:
            self.query_conv, self.key_conv = (nn.Conv2d(in_channels, inter, 1) for _ in range(2))
            self.value_conv = nn.Conv2d(in_channels, in_channels, 1)
            self.gamma = nn.Parameter(torch.zeros(1) if zero_init else torch.ones(1))
            return
        pool = [nn.MaxPool2d(key_stride)] if key_stride > 1 else []

        def keyed() -> nn.Module:
            conv = nn.Conv2d(in_channels, inter, 1)
            return nn.Sequential(conv, *pool) if pool else conv

        self.g = keyed()
        self.W = nn.Sequential(nn.Conv2d(inter, in_channels, 1), nn.BatchNorm2d(in_channels))
        if zero_init:
            nn.init.zeros_(self.W[1].weight)
        if kind != "gaussian":
            self.theta, self.phi = nn.Conv2d(in_channels, inter, 1), keyed()
        if kind == "concatenation":
            self.concat_project = nn.Sequential(nn.Conv2d(2 * inter, 1, 1, bias=False), nn.ReLU())

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, inter_channels={self.inter_channels}, kind={self.kind!r}, "
            f"key_stride={self.key_stride}, residual={self.residual}"
        )

    def check(self, name: str, x: Tensor) -> None:
        """Raise where x is no map that the block takes."""
        _check_map(name, x, self.key_stride, self.in_channels)
        check_fits(name, x, (self.value_conv if self.kind in CRISS_CROSS else _conv(self.g)).weight)

    def forward(self, x: Tensor) -> Tensor:
        self.check("x", x)
        if self.kind in CRISS_CROSS:
            rounds = 2 if self.kind == "rcca" else 1
            for i in range(rounds):
                convs = (self.query_conv, self.key_conv, self.value_conv)
                y = criss_cross_attention(*(pointwise_layer(conv, x) for conv in convs))
                x = torch.addcmul(x, self.gamma, y) if self.residual or i + 1 < rounds else self.gamma * y
            return x
        gaussian = self.kind == "gaussian"
        y = non_local_response(
            x,
            self.kind,
            None if gaussian else self.theta,
            None if gaussian else _conv(self.phi),
            _conv(self.g),
            self.concat_project[0].weight if self.kind == "concatenation" else None,
            key_stride=self.key_stride,
        )
        z = self.W[1](pointwise_layer(self.W[0], y))
        if not self.residual:
            return z
        # In place, for the norm's backward does not need its result; autocast makes z narrower.
        return z.add_(x) if z.dtype == x.dtype else z + x


class NonLocalLoss(Loss):
    """L_NLD = |adapt(r_S) - r_T|: distance of what a non-local block makes of student and teacher (Eq. 5).

    Every level has a block of its own for either network. Both are trained, the teacher's too: r_T is not detached,
    though the teacher's map gets a gradient only if it requires one (published code). The norm runs over the whole
    batch and is not squared; where it is 0 its gradient is 0. Blocks start as identities, L_NLD as the distance of the
    maps (of the adapted one). Levels are summed. Blocks have batch norms: mind ``train()`` and ``eval()``.

    Args:
        channels: of the maps: an int, or (student, teacher), for one level; a list of such, one per level, for
            several. Two ints in a tuple are (student, teacher).
        kind: of the blocks; see :class:`NonLocalBlock`.
        key_stride: of the blocks, an int or one per level. None: 8 for the first level, 4 for the second, 2 for all
            others, as published for FPN levels from stride 4 on; 1 for the criss-cross kinds. (mmrazor's connectors
            pool by 2 first: 16, 8, 4, 4.)
        inter_channels: of the blocks, an int or one per level. None: C // 4 for the first two levels (published: 64 of
            256) and C // 2 for all others; C // 8 for the criss-cross kinds.
        adapt: pass the student's relations through a 1x1 convolution, trained with the student; needed where widths
            differ.
        weight: factor on the value; 7e-5 (two-stage) and 4.2e-4 (one-stage) in published code.

    Shape: student [B, C, H, W], teacher [B, C', H, W], or sequences of such levels. Differentiable in both, and in
    blocks and adaptation layers; give ``parameters()`` of this module to the optimiser.

    Raises:
        ValueError, TypeError: maps of different sizes, or smaller than ``key_stride``; levels or widths that are not
            those of ``channels``; different widths without ``adapt``.

    Source: Zhang & Ma, Structured Knowledge Distillation for Accurate and Efficient Object Detection, TPAMI 2023.
    """

    def __init__(
        self,
        channels: Channels | Sequence[Channels],
        *,
        kind: Kind = "dot_product",
        key_stride: int | Sequence[int] | None = None,
        inter_channels: int | Sequence[int] | None = None,
        adapt: bool = True,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        check_choice("kind", kind, KINDS)
        widths = channel_pairs(channels)
        if not adapt and any(s != t for s, t in widths):
            raise ValueError(
                f"adapt: student and teacher of different widths need it; got channels {channels!r}"
            )
        crossing = kind in CRISS_CROSS
        self.kind = kind
        if key_stride is None:
            key_stride = [1] * len(widths) if crossing else [(8, 4, 2)[min(i, 2)] for i in range(len(widths))]
        strides = _per_level("key_stride", key_stride, len(widths))
        if inter_channels is not None:
            inter = [(c, c) for c in _per_level("inter_channels", inter_channels, len(widths))]
        else:
            shares = [8 if crossing else 4 if i < 2 else 2 for i in range(len(widths))]
            inter = [tuple(max(1, c // share) for c in w) for w, share in zip(widths, shares, strict=True)]

        def blocks(side: int) -> nn.ModuleList:
            return nn.ModuleList(
                NonLocalBlock(w[side], d[side], kind=kind, key_stride=stride)
                for w, d, stride in zip(widths, inter, strides, strict=True)
            )

        self.student, self.teacher = blocks(0), blocks(1)
        self.adaptation = nn.ModuleList(nn.Conv2d(s, t, 1) if adapt else nn.Identity() for s, t in widths)

    def forward(self, student: Levels, teacher: Levels) -> Tensor:
        pairs = levels(student, teacher)
        if len(pairs) != len(self.adaptation):
            raise ValueError(
                f"channels: non-local blocks were made for {len(self.adaptation)} levels, got {len(pairs)}; give "
                f"channels as a list with one entry per level"
            )
        # All levels before the first block, whose batch norm counts what it sees.
        for (s, t), of_student, of_teacher in zip(pairs, self.student, self.teacher, strict=True):
            of_student.check("student", s)
            of_teacher.check("teacher", t)
            check_map_pair(s, t, one_width=False)
        modules = zip(self.student, self.teacher, self.adaptation, strict=True)
        terms = [
            relation_distance(pointwise_layer(adapt, of_student(s)), of_teacher(t))
            for (s, t), (of_student, of_teacher, adapt) in zip(pairs, modules, strict=True)
        ]
        return self.weight * total(terms).float()


def relation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """|r_S - r_T| of relations [B, C, H, W], over the whole batch, in one pass; its gradient where it is 0 is 0."""
    b, _, *size = student.shape
    return masked_feature_distance(student, teacher, student.new_ones((b, 1, *size), dtype=torch.float32))


def _conv(module: nn.Module) -> nn.Conv2d:
    return module[0] if isinstance(module, nn.Sequential) else module


def _per_level(name: str, value: int | Sequence[int], count: int) -> list[int]:
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise ValueError(f"{name}: need an int or one per level ({count} levels in channels), got {value!r}")
    return values


def _check_map(name: str, x: Tensor, key_stride: int, channels: int | None = None) -> None:
    check_float(name, x)
    if x.dim() != 4 or channels not in (None, x.shape[1]):
        raise ValueError(f"{name}: need a map [B, {channels or 'C'}, H, W], got {describe(x)}")
    if min(x.shape[2:]) < key_stride:
        raise ValueError(
            f"key_stride: {key_stride} needs maps of at least {key_stride} x {key_stride} pixels, got {name} {describe(x)}"
        )

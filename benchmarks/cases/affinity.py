"""Non-local relations at FPN sizes of 800 x 1344 images, P2 to P5, keys pooled or not; all pairs as published beside.

For softmax `eager` and `compile` are PyTorch's scaled dot-product attention, for the dot product its products in the same
order as kdfast's. `naive` is what published code does, the matrix of all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import kdfast
from kdfast.reference import affinity as reference

from ..case import Baseline, Case

SOURCE = "non-local modules on FPN levels, 800 x 1344 images (Zhang & Ma 2023, Table IX)"
LARGEST_MATRIX = 4 << 30  # bytes in float32 that the reference may take; above, the truth comes from sorting
SIZES = {67200: (200, 336), 16800: (100, 168), 4200: (50, 84), 1050: (25, 42)}


def _maps(n: int, m: int, d: int) -> Callable[[torch.device, int], list[Tensor]]:
    def make(device: torch.device, seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = ((1, d, *SIZES[n]), (1, d, *SIZES[m]), (1, d, *SIZES[m]))
        theta, phi, g = (torch.randn(s, device=device, generator=generator) for s in shapes)
        return [theta / math.sqrt(d), phi, g, torch.randn(shapes[0], device=device, generator=generator)]

    return make


def _pairs(n: int, m: int, e: int) -> Callable[[torch.device, int], list[Tensor]]:
    def make(device: torch.device, seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = ((1, n), (1, m), (1, e, m), (1, n, e))
        a, b, g, upstream = (torch.randn(s, device=device, generator=generator) for s in shapes)
        return [a, b, g.mT, upstream]

    return make


def _relation(relation: Callable) -> Callable[..., Tensor]:
    return lambda *inputs: relation(*inputs[:-1])


def _flat(dense: Callable) -> Callable[..., Tensor]:
    def relation(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        return dense(*(v.flatten(2) for v in (theta, phi, g))).view(theta.shape)

    return relation


def _by_sorting(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """1/m Σ_j relu(a_i + b_j) g_j by sums over the keys in descending order, of which those above -a_i come first."""
    b, order = b.sort(1, descending=True)
    g = g.gather(1, order[..., None].expand_as(g))
    first = torch.zeros_like(g[:, :1])
    sums, products = (torch.cat([first, x.cumsum(1)], 1) for x in (g, b[..., None] * g))
    counted = torch.searchsorted(-b.detach(), a.detach())[..., None].expand(
        *a.shape, g.shape[2]
    )  # keys with -b_j < a_i
    return (a[..., None] * sums.gather(1, counted) + products.gather(1, counted)) / b.shape[1]


def _case(kind: str, n: int, m: int, d: int) -> Case:
    matrix = 4 * n * m
    common = {
        "family": "affinity",
        "name": f"{kind}, {n:,} queries, {m:,} keys, {d} wide",
        "source": SOURCE,
        "op": {"dot product": "dot_product", "softmax": "softmax_affinity"}.get(kind, "affinity"),
        "needs_grad": (True, True, True),
    }
    # Queries, keys and values read once forward and once backward, results and gradients written once.
    moved = 4 * d * (5 * n + 6 * m)
    if kind == "concatenation":
        return Case(
            loss=_relation(kdfast.concatenation_affinity),
            make=_pairs(n, m, d),
            bytes=4 * (2 * d * n + 3 * d * m + 4 * (n + m)),
            flops=6 * (n + m) * d,
            memory=4 * matrix,
            truth=_relation(_by_sorting) if 4 * matrix > LARGEST_MATRIX else None,
            **common,
        )
    dense = reference.dot_product if kind == "dot product" else reference.softmax
    call = kdfast.dot_product_affinity if kind == "dot product" else kdfast.softmax_affinity
    cheaper = min((n + m) * d * d, 2 * n * m * d) if kind == "dot product" else 2 * n * m * d
    return Case(
        loss=_relation(call),
        make=_maps(n, m, d),
        bytes=moved,
        flops=6 * cheaper,
        baselines={"naive": Baseline(_relation(_flat(dense)), tolerance=1e-4, memory=5 * matrix)},
        memory=0 if kind == "dot product" else 16 * d * (n + m),
        **common,
    )


def cases() -> list[Case]:
    concatenation = [(1050, 1050, 128), (4200, 4200, 128), (16800, 16800, 128), (67200, 67200, 128)]
    concatenation += [(4200, 1050, 128), (67200, 1050, 64), (4200, 4200, 256)]
    softmax = [(1050, 1050, 64), (4200, 1050, 128), (4200, 1050, 256), (4200, 4200, 128), (16800, 1050, 128)]
    return [
        *(_case("concatenation", *size) for size in concatenation),
        *(_case("dot product", *size) for size in (*concatenation, (1050, 1050, 64))),
        *(_case("softmax", *size) for size in softmax),
    ]

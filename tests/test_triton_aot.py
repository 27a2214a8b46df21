"""Every Triton kernel, as its op launches it, compiled for the shipped architectures: pytest -m aot; needs no
GPU.

An op adds its launches to CASES: a name, the float32 matmul precision, and a call on meta tensors.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import aot

from kdfast import backend
from kdfast.reference.gram import COMPARISONS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(backend.interpreting(), reason="the interpreter replaces the compiler"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]


def _gram(
    rows, features, dtype, compare="cka", centered=True, inter=False, feature_side=False, patches=False
):
    def call():
        from kdfast.kernels.gram import gram, gram_backward

        x = torch.empty(64, rows, 1, features, 1, 1, dtype=dtype, device="meta")
        if patches:  # [B, C, H, W] in patches of 16 x 16, channels are groups
            x = torch.empty(2, 64, 16 * rows, 16, dtype=dtype, device="meta")
            x = x.unflatten(2, (rows, 16)).unflatten(-1, (1, 16)).permute(1, 2, 4, 0, 3, 5)
        flags = (COMPARISONS.index(compare), centered, False, inter, feature_side)
        products, distance, saved = gram(x, x, *flags, True)
        gram_backward(products, distance, x, x, saved, *flags, True, True)

    return call


def _logits(kind, classes, dtype, temperature=4.0):
    def call():
        from kdfast.kernels.logits import logits, logits_backward

        x = torch.empty(64, classes, dtype=dtype, device="meta")
        y = torch.empty(64, dtype=torch.int64, device="meta")
        settings = (kind, 1.0, 8.0, temperature, -100)
        loss, saved = logits(x, x, y, *settings)
        logits_backward(loss, x, x, y, saved, *settings, True, True)

    return call


def _attention(shape, dtype, channels_last=False, signed=False, through=False, flat=True):
    def call():
        from kdfast.kernels.attention_mask import attention_mask, attention_mask_backward, attention_pool

        x = torch.empty(shape, dtype=dtype, device="meta")
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        x = x if flat else x[:, :, :, 1:]
        settings = (0.5, 1.0, 1.0, through, True, signed, through, through)
        loss, terms, *small = attention_mask(x, x, None, *settings)
        given = [v[:, 0] for v in small[:2]] if through else [None, None]
        attention_mask_backward(x, x, loss, terms, *small, *given, 0, signed)
        nothing = (None,) * 7
        attention_mask_backward(x, *nothing, *attention_pool(x, signed), 0, signed)

    return call


def _affinity(e, dtype, transposed=True):
    def call():
        from kdfast.kernels.affinity import affinity, affinity_backward

        a = torch.empty(2, 4200, dtype=dtype, device="meta")
        g = torch.empty(2, e, 4200, dtype=dtype, device="meta").mT
        g = g if transposed else g.contiguous()
        out, *orders = affinity(a, a, g)
        affinity_backward(out, a, a, g, *orders, True, True, True)

    return call


def _criss_cross(shape, d, dtype, channels_last=False):
    def call():
        from kdfast.kernels.criss_cross import criss_cross, criss_cross_backward

        value = torch.empty(shape, dtype=dtype, device="meta")
        value = value.contiguous(memory_format=torch.channels_last) if channels_last else value
        query = value[:, :d].clone(memory_format=torch.preserve_format)
        out, lse = criss_cross(query, query, value)
        criss_cross_backward(out, query, query, value, out, lse, True, True, True)

    return call


def _augment(shape, dtype, chain):
    def call():
        from kdfast.kernels.feature_augment import feature_augment, feature_augment_backward
        from kdfast.reference.feature_augment import plan

        x = torch.empty(shape, dtype=dtype, device="meta")
        steps, channels = plan(shape, [(name, value, 3 << 33) for name, value in chain])
        steps = torch.tensor(steps, dtype=torch.float64)
        feature_augment_backward(feature_augment(x, steps, channels), steps, channels)

    return call


def _areas(shape, dtype, channels_last=False, flat=True):
    def call():
        from kdfast.kernels import masked_error as m

        boxes = torch.empty(shape[0], 8, 4, dtype=torch.int64, device="meta")
        mask = m.area_mask(boxes, *shape[2:], 0)
        x = torch.empty(shape, dtype=dtype, device="meta")
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        x, mask = (x, mask) if flat else (x[:, :, :, 1:], mask[:, :, :, 1:])
        value, gradient = m.masked_error_with_gradient(x, x, mask)
        m.scale(gradient, value)
        m.masked_error(x, x, mask)
        m.masked_error_backward(x, x, mask, value)

    return call


def _direction(rows, columns, dtype, balanced=False, labelled=True, teacher=True):
    def call():
        from kdfast.kernels.direction import direction, direction_backward

        x = torch.empty(rows, columns, dtype=dtype, device="meta")
        t = x if teacher else None
        labels = torch.empty(rows, dtype=torch.int64, device="meta") if labelled else None
        loss, factors, total = direction(x, t, x, labels, -100, balanced)
        direction_backward(loss, x, t, x, labels, factors, total, -100, balanced, True, teacher)

    return call


def _resize(shape, dtype, average=0, channels_last=False, bilinear=True, patch=16):
    def call():
        from kdfast.kernels.resize import map_gradients, patch_matrices
        from kdfast.reference.patch_gram import Grid

        x = torch.empty(shape, dtype=dtype, device="meta")
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        grid = Grid(patch, patch, -(-shape[2] // patch), -(-shape[3] // patch), bilinear, average)
        map_gradients(patch_matrices([x, x], grid), [x, x], grid)

    return call


f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CASES = {
    # Row tiles of 16, 64 and 64 + 16 rows; the widest; several tiles.
    **{f"gram-{n}-ieee": ("highest", _gram(n, 1024, f32, patches=True)) for n in (16, 64, 77, 128, 273)},
    **{f"gram-{n}-tf32": ("high", _gram(n, 1024, f32, patches=True)) for n in (77, 128, 273)},
    **{f"gram-{n}-bf16": ("highest", _gram(n, 1024, bf16, patches=True)) for n in (24, 77, 128, 273)},
    "gram-128-wide": ("highest", _gram(128, 16384, f32)),
    "gram-256-map": ("highest", _gram(256, 2048 * 49, f32)),
    "gram-flat-ieee": ("highest", _gram(77, 1000, f32)),
    "gram-flat-f16": ("highest", _gram(128, 1000, f16)),
    "gram-uncentred-f16": ("highest", _gram(77, 1024, f16, centered=False)),
    "gram-float64": ("highest", _gram(17, 100, f64)),
    **{f"gram-{name}": ("highest", _gram(77, 1024, f32, name, patches=True)) for name in COMPARISONS[1:]},
    "gram-wide-rows": ("highest", _gram(512, 1024, bf16, "row_cosine")),
    "gram-inter-ieee": ("highest", _gram(77, 1024, f32, inter=True)),
    "gram-inter-bf16": ("highest", _gram(128, 1000, bf16, inter=True, centered=False)),
    "gram-features-ieee": ("highest", _gram(5000, 64, f32, feature_side=True)),
    "gram-features-f16": ("highest", _gram(5000, 100, f16, feature_side=True)),
    "affinity-f32": ("highest", _affinity(128, f32)),
    "affinity-bf16": ("highest", _affinity(256, bf16, transposed=False)),
    "affinity-f16-narrow": ("highest", _affinity(20, f16)),
    "affinity-f64": ("highest", _affinity(128, f64)),
    "attention-f32": ("highest", _attention((2, 256, 100, 168), f32)),
    "attention-bf16-signed": ("highest", _attention((2, 256, 50, 84), bf16, signed=True)),
    "attention-f16-channels-last": ("highest", _attention((2, 256, 50, 84), f16, True, signed=True)),
    "attention-f32-channels-last-through": ("highest", _attention((2, 256, 50, 84), f32, True, through=True)),
    "attention-f32-strided": ("highest", _attention((2, 256, 13, 22), f32, flat=False)),
    "attention-f32-small": ("highest", _attention((2, 5, 3, 7), f32, signed=True, through=True)),
    # More channels than a tile has, for one image; one image alone makes sizes of 1, which Triton takes for constants.
    "attention-f32-wide": ("highest", _attention((1, 2048, 25, 42), f32)),
    "attention-bf16-wide-through": ("highest", _attention((1, 2048, 13, 21), bf16, True, through=True)),
    "attention-f32-one": ("highest", _attention((1, 1, 1, 1), f32, signed=True)),
    "attention-f64": ("highest", _attention((2, 256, 25, 42), f64, through=True)),
    "criss-cross-ieee": ("highest", _criss_cross((2, 256, 64, 64), 32, f32)),
    "criss-cross-tf32": ("high", _criss_cross((2, 512, 97, 97), 64, f32)),
    "criss-cross-bf16": ("highest", _criss_cross((2, 256, 50, 84), 32, bf16, channels_last=True)),
    "criss-cross-f16": ("highest", _criss_cross((2, 64, 25, 42), 8, f16)),
    "criss-cross-f64": ("highest", _criss_cross((2, 64, 32, 32), 8, f64)),
    "augment-rotate-noise": ("highest", _augment((16, 256, 56, 56), f32, [("rotate", 20.0), ("noise", 0.1)])),
    "augment-noise-shear": ("highest", _augment((64, 256, 8, 8), bf16, [("noise", 0.1), ("shear_x", 0.3)])),
    "augment-cutout-drop": (
        "highest",
        _augment((2, 64, 50, 84), f16, [("cutout", 0.2), ("channel_drop", 0.3)]),
    ),
    "augment-many-planes": ("highest", _augment((1024, 256, 4, 4), f16, [("shear_y", 0.2)])),
    "augment-f64": (
        "highest",
        _augment((2, 64, 13, 21), f64, [("cutout", 0.2), ("rotate", 20.0), ("noise", 0.1)]),
    ),
    "areas-f32": ("highest", _areas((2, 256, 100, 168), f32)),
    "areas-f32-channels-last": ("highest", _areas((64, 128, 16, 16), f32, True)),
    "areas-bf16": ("highest", _areas((64, 512, 7, 7), bf16)),
    "areas-f16-strided": ("highest", _areas((2, 256, 50, 85), f16, flat=False)),
    "areas-f64": ("highest", _areas((2, 256, 25, 42), f64)),
    "direction-f32": ("highest", _direction(128, 64, f32)),
    "direction-bf16": ("highest", _direction(1024, 1000, bf16, balanced=True)),
    "direction-f16": ("highest", _direction(8192, 2048, f16, labelled=False)),
    "direction-f64": ("highest", _direction(512, 1024, f64, teacher=False)),
    "resize-f32": ("highest", _resize((2, 256, 100, 168), f32)),
    "resize-bf16-channels-last": ("highest", _resize((2, 256, 50, 84), bf16, channels_last=True)),
    "resize-f32-spatial": ("highest", _resize((2, 256, 25, 42), f32, 2)),
    "resize-f16-spatial-channels-last": ("highest", _resize((2, 256, 25, 42), f16, 2, channels_last=True)),
    "resize-f64-batch": ("highest", _resize((2, 3, 7, 11), f64, 1, patch=5)),
    "resize-f32-many-readers": ("highest", _resize((2, 64, 3, 5), f32)),
    "resize-bf16-pad": ("highest", _resize((2, 256, 25, 42), bf16, bilinear=False)),
    "resize-f32-int64": ("highest", _resize((12, 1024, 304, 608), f32)),
    "gram-features-difference": ("high", _gram(5000, 10, f32, "difference", feature_side=True)),
    "logits-dist-bf16": ("highest", _logits(3, 1000, bf16)),
    "logits-dist-float64": ("highest", _logits(3, 5000, f64)),
    "logits-kl-f32": ("highest", _logits(0, 32000, f32)),
    "logits-kl-bf16": ("highest", _logits(0, 128000, bf16)),
    "logits-dkd-small": ("highest", _logits(1, 100, f32)),
    "logits-nkd-f16": ("highest", _logits(2, 1000, f16)),
    "logits-nkd-float64": ("highest", _logits(2, 5000, f64)),
}


@pytest.mark.parametrize("capability", aot.SHARED_LIMIT)
@pytest.mark.parametrize("case", CASES)
def test_compiles_within_the_machine(case, capability, monkeypatch):
    for family in ("criss_cross", "gram"):
        monkeypatch.setattr(f"kdfast.kernels.{family}.capability", lambda _: capability // 10)
    precision, call = CASES[case]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        launches = aot.launches(call)
    finally:
        torch.set_float32_matmul_precision(before)
    assert launches
    for launch in launches:
        assert all(n <= limit for n, limit in zip(launch.grid, aot.GRID_LIMIT, strict=False)), launch.grid
        found = aot.resources(launch, capability)
        assert found.shared <= aot.SHARED_LIMIT[capability], f"{launch}: {found}"
        assert found.spilled == 0, f"{launch}: registers spill: {found}"

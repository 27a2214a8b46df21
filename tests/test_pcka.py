"""PCKALoss against the published formula as a loop: averages, norms, resizes, layouts, levels, constants, errors."""

from __future__ import annotations

import warnings

import pytest
import torch
from pcka_checks import BACKENDS, check, maps, naive_cka, naive_pcka

import kdfast
from kdfast.losses import pcka
from kdfast.reference.patch_gram import AVERAGES

# Multiples of 16 and not, one image and two, channels that are no power of two, wide and high, a patch row only.
SHAPES = [(2, 3, 48, 32), (1, 5, 37, 50), (2, 2, 70, 16)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pcka_equals_the_loop(shape: tuple[int, ...], average: str, backend: str) -> None:
    for centered in (True, False):
        for inter in (0.0, 0.7):
            loss = kdfast.PCKALoss(average=average, inter_weight=inter, centered=centered)
            check(
                loss,
                lambda s, t, i=inter, c=centered: naive_pcka(s, t, average=average, inter=i, centered=c),
                maps(shape, shape),
                backend,
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("row_norm", ["row", "cosine"])
def test_row_norms(row_norm: str, average: str, backend: str) -> None:
    inputs = maps((2, 3, 14, 19), (2, 3, 14, 19))
    for centered in (True, False):
        for patch in (
            ((4, 4),) if average == "spatial" else ((4, 4), (7, 2))
        ):  # 'spatial': fewer features than patches
            options = {"average": average, "centered": centered, "row_norm": row_norm}
            loss = kdfast.PCKALoss(patch_size=patch, inter_weight=0.5, **options)
            check(
                loss,
                lambda s, t, p=patch, o=options: naive_pcka(s, t, patch=p, inter=0.5, **o),
                inputs,
                backend,
                3e-5,
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("average", AVERAGES)
def test_resizes(average: str, backend: str) -> None:
    inputs = maps((2, 3, 21, 30), (2, 3, 21, 30))
    for resize in ("pad", "crop"):
        loss = kdfast.PCKALoss(patch_size=(5, 8), average=average, resize=resize)
        check(
            loss,
            lambda s, t, r=resize: naive_pcka(s, t, patch=(5, 8), average=average, resize=r),
            inputs,
            backend,
        )
    exact = maps((2, 3, 20, 24), (2, 3, 20, 24))
    loss = kdfast.PCKALoss(patch_size=(5, 8), average=average, resize="none")
    check(loss, lambda s, t: naive_pcka(s, t, patch=(5, 8), average=average), exact, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_of_different_size_type_and_layout(backend: str) -> None:
    for average, teacher in (
        ("channel", (2, 5, 45, 33)),
        ("batch", (2, 7, 45, 33)),
        ("spatial", (2, 7, 45, 33)),
    ):
        loss = kdfast.PCKALoss(average=average)

        def naive(s, t, average=average):
            return naive_pcka(s, t, average=average)

        student, teacher = maps((2, 5, 40, 48), teacher)
        check(loss, naive, [student, teacher], backend)
        last = [v.detach().to(memory_format=torch.channels_last).requires_grad_() for v in (student, teacher)]
        check(loss, naive, last, backend)
        sliced = [v.detach().repeat(1, 1, 1, 2)[..., ::2].requires_grad_() for v in (student, teacher)]
        check(loss, naive, sliced, backend)
        check(loss, naive, [student, teacher.detach().double().requires_grad_()], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("average", AVERAGES)
def test_half_precision(dtype: torch.dtype, average: str, backend: str) -> None:
    student, teacher = (
        300 * v for v in maps((2, 3, 40, 52), (2, 3, 40, 52), dtype=dtype)
    )  # Grams pass 65504
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = [v.detach().contiguous(memory_format=layout).requires_grad_() for v in (student, teacher)]
        loss = kdfast.PCKALoss(average=average, weight=1e3)
        check(loss, lambda s, t: 1e3 * naive_pcka(s, t, average=average), inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_mean(backend: str) -> None:
    inputs = maps((2, 3, 40, 52), (2, 3, 40, 52), mean=300.0)
    with kdfast.use_backend(backend):
        value = float(kdfast.PCKALoss()(*inputs))
    assert value == pytest.approx(float(naive_pcka(*(v.detach().double() for v in inputs))), rel=1e-4)


# --- levels, constants, errors ----------------------------------------------------------------------------------------


def test_levels_are_summed_and_may_mix_averages() -> None:
    levels = [maps((2, 3, 50, 60), (2, 3, 50, 60)), maps((2, 3, 25, 60), (2, 3, 25, 60))]
    student, teacher = zip(*levels, strict=True)
    mixed = kdfast.PCKALoss(average=("batch", "spatial"), weight=10.0)(student, teacher)
    single = [
        kdfast.PCKALoss(average=a)(*level) for a, level in zip(("batch", "spatial"), levels, strict=True)
    ]
    torch.testing.assert_close(mixed, 10 * (single[0] + single[1]))
    with pytest.raises(ValueError, match="average: need one per level, got 2 for 1"):
        kdfast.PCKALoss(average=("batch", "spatial"))(student[:1], teacher[:1])


def test_without_patches_rows_are_images() -> None:
    student, teacher = maps((5, 3, 7, 6), (5, 3, 7, 6))

    def naive(s, t):
        distances = [
            1 - naive_cka(x, y, True, "none") + 0.5 * (1 - naive_cka(x.T, y.T, True, "none"))
            for x, y in zip(*(v.transpose(0, 1).flatten(2) for v in (s, t)), strict=True)
        ]
        return torch.stack(distances).mean()

    check(kdfast.PCKALoss(patch_size=None, inter_weight=0.5), naive, [student, teacher], "auto")


@pytest.mark.parametrize(
    ("shape", "value"), [((2, 3, 7, 11), 1.5), ((2, 3, 13, 21), 0.0)], ids=["one", "two"]
)
def test_one_and_two_patches_are_a_constant(shape: tuple[int, ...], value: float, monkeypatch) -> None:
    monkeypatch.setattr(pcka, "_warned", False)
    student, teacher = maps(shape, shape)
    loss = kdfast.PCKALoss(intra_weight=1.5)
    with pytest.warns(UserWarning, match="constant there, without gradient"):
        result = loss(student, teacher)
    assert float(result) == value
    result.backward()
    assert not student.grad.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        loss(student, teacher)
        kdfast.PCKALoss(centered=False)(student, teacher)
    kdfast.PCKALoss(centered=False, inter_weight=1.0)(student, teacher).backward()
    assert student.grad.isfinite().all() and student.grad.any()
    inter = kdfast.PCKALoss(intra_weight=0.0, inter_weight=1.0)
    check(inter, lambda s, t: naive_pcka(s, t, intra=0.0, inter=1.0), maps(shape, shape), "auto")


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_maps_are_finite(backend: str) -> None:
    teacher = maps((2, 3, 40, 40), (2, 3, 40, 40))[1]
    with kdfast.use_backend(backend):
        for student in (torch.zeros_like(teacher), torch.full_like(teacher, 3.3), teacher.detach().clone()):
            for average in AVERAGES:
                student = student.detach().requires_grad_()
                value = kdfast.PCKALoss(average=average, inter_weight=1.0)(student, teacher)
                value.backward()
                assert value >= 0 and value.isfinite() and student.grad.isfinite().all()
        assert float(kdfast.PCKALoss()(teacher, teacher)) < 1e-6


def test_errors_name_what_came() -> None:
    x = torch.randn(2, 3, 40, 40)
    with pytest.raises(
        ValueError, match=r"\[3, 3\] from student \[2, 3, 40, 40\].*\[4, 3\] from teacher \[2, 3, 50, 40\]"
    ):
        kdfast.PCKALoss()(x, torch.randn(2, 3, 50, 40))
    with pytest.raises(ValueError, match="equally many channels"):
        kdfast.PCKALoss()(x, torch.randn(2, 4, 40, 40))
    with pytest.raises(ValueError, match="equally many channels"):
        kdfast.PCKALoss(average="batch", inter_weight=1.0)(x, torch.randn(2, 4, 40, 40))
    with pytest.raises(ValueError, match="maps"):
        kdfast.PCKALoss()(x[0], x[0])
    with pytest.raises(ValueError, match="multiples of the patch 16 x 16"):
        kdfast.PCKALoss(resize="none")(x, x)
    with pytest.raises(ValueError, match="larger than student"):
        kdfast.PCKALoss(patch_size=64, resize="crop")(x, x)
    for options, match in (
        ({"average": "row"}, "average"),
        ({"resize": "nearest"}, "resize"),
        ({"patch_size": 0}, "patch_size"),
        ({"row_norm": "l2"}, "row_norm"),
        ({"patch_size": None, "average": "batch"}, "channels only"),
    ):
        with pytest.raises(ValueError, match=match):
            kdfast.PCKALoss(**options)

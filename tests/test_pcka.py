"""PCKA and the losses on patches: op patch_gram against float64, losses against the published formulas as a loop."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from conftest import assert_as_accurate, needs_extension
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import interpolate, kl_div, log_softmax, normalize, pad

import kdfast
from kdfast.losses import pcka
from kdfast.ops.patch_gram import patch_gram
from kdfast.reference import patch_gram as reference
from kdfast.reference.patch_gram import AVERAGES, Grid

BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]


def maps(*shapes: tuple[int, ...], mean: float = 0.5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Student and teacher that share part of their structure."""
    shared = torch.randn(shapes[0][0], 1, 1, max(s[3] for s in shapes))
    made = [torch.randn(s) + shared[..., : s[3]] + mean for s in shapes]
    return [v.to(dtype).requires_grad_() for v in made]


# --- the published computation: one group after the other -------------------------------------------------------------


def naive_patches(x: Tensor, patch: tuple[int, int], average: str, resize: str = "bilinear") -> list[Tensor]:
    """The patch matrices [N, D] of every group, cut out one patch at a time."""
    ph, pw = patch
    height, width = math.ceil(x.shape[2] / ph) * ph, math.ceil(x.shape[3] / pw) * pw
    if resize == "bilinear":
        x = interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
    elif resize == "pad":
        x = pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
    rows, columns = x.shape[2] // ph, x.shape[3] // pw
    cut = [x[:, :, i * ph : (i + 1) * ph, j * pw : (j + 1) * pw] for i in range(rows) for j in range(columns)]
    if average == "channel":
        return [torch.stack([p[:, c].flatten() for p in cut]) for c in range(x.shape[1])]
    if average == "batch":
        return [torch.stack([p[b].flatten() for p in cut]) for b in range(x.shape[0])]
    return [torch.stack([p[:, :, u, v].flatten() for p in cut]) for u in range(ph) for v in range(pw)]


def naive_cka(x: Tensor, y: Tensor, centered: bool, row_norm: str) -> Tensor:
    if row_norm == "cosine":
        x, y = normalize(x, dim=1), normalize(y, dim=1)
    if centered:
        x, y = x - x.mean(0), y - y.mean(0)
    k, m = x @ x.T, y @ y.T
    if row_norm == "row":
        k, m = (g / g.diagonal().sqrt()[:, None] for g in (k, m))
    return (k * m).sum() / torch.sqrt((k * k).sum() * (m * m).sum())  # traces of K Lᵀ, K Kᵀ, L Lᵀ


def naive_pcka(
    student: Tensor,
    teacher: Tensor,
    *,
    patch: tuple[int, int] = (16, 16),
    average: str = "channel",
    intra: float = 1.0,
    inter: float = 0.0,
    centered: bool = True,
    row_norm: str = "none",
    resize: str = "bilinear",
) -> Tensor:
    groups = zip(
        naive_patches(student, patch, average, resize),
        naive_patches(teacher, patch, average, resize),
        strict=True,
    )
    losses = []
    for x, y in groups:
        loss = intra * (1 - naive_cka(x, y, centered, row_norm)) if intra else 0
        if inter:
            loss = loss + inter * (1 - naive_cka(x.T, y.T, centered, row_norm))
        losses.append(loss)
    return torch.stack(losses).mean()


def check(loss, naive, inputs: list[Tensor], backend: str, tolerance: float = 1e-5) -> None:
    """Value and gradients of ``loss`` against float64 autograd through ``naive``."""
    exact = [v.detach().double().requires_grad_() for v in inputs]
    truth = naive(*exact)
    with kdfast.use_backend(backend):
        value = loss(*inputs)
        gradients = torch.autograd.grad(value, inputs)
    assert value.dtype == torch.float32 and value.dim() == 0
    assert abs(float(value) - float(truth)) <= tolerance * max(abs(float(truth)), 1e-3), (value, truth)
    for got, want in zip(gradients, torch.autograd.grad(truth, exact), strict=True):
        half = torch.finfo(got.dtype).eps if got.dtype.itemsize == 2 else 0
        assert got.shape == want.shape
        assert (got.double() - want).abs().max() <= (2 * tolerance + half) * want.abs().max()


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


# --- the op -----------------------------------------------------------------------------------------------------------


@needs_extension
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 18),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    patch=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    average=st.integers(0, 2),
    bilinear=st.booleans(),
    order=st.permutations(range(4)),
    inter=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_op_on_random_maps(batch, channels, size, patch, average, bilinear, order, inter) -> None:
    shape = (batch, channels, *size)
    x, y = (
        torch.randn([shape[a] for a in order]).permute([order.index(a) for a in range(4)]).requires_grad_()
        for _ in range(2)
    )
    grid = Grid(*patch, *(-(-n // p) for n, p in zip(size, patch, strict=True)), bilinear, average)
    results = []
    for backend, dtype in (
        ("cpu", torch.float32),
        ("reference", torch.float64),
        ("reference", torch.float32),
    ):
        with kdfast.use_backend(backend):
            inputs = [v.detach().to(dtype).requires_grad_() for v in (x, y)]
            products, distance = patch_gram(*inputs, grid, inter=inter)
            gradients = torch.autograd.grad(distance.sum(), inputs)
        results.append([products, distance, *gradients])
    for name, got, truth, same in zip(("products", "distance", "grad_x", "grad_y"), *results, strict=True):
        floor = 3e-6 * max(float(truth.abs().max()), 0.3)
        assert_as_accurate(got.detach(), truth.detach(), same.detach(), floor, name)


@needs_extension
@pytest.mark.parametrize("average", [0, 1, 2])
def test_gradcheck_and_second_order(average: int) -> None:
    x, y = maps((2, 2, 5, 7), (2, 2, 6, 8), dtype=torch.float64)
    grid = Grid(3, 4, 2, 2, True, average)
    assert torch.autograd.gradcheck(lambda x, y: patch_gram(x, y, grid, inter=True)[1], (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: patch_gram(x, y, grid)[1], (x, y))


@needs_extension
@pytest.mark.parametrize(
    "flags", [(0, True, False, False, False, False), (0, False, False, True, False, True)]
)
def test_opcheck(flags: tuple) -> None:
    x, y = maps((2, 3, 13, 9), (2, 3, 13, 9))
    for save in (True, False):
        arguments = (x, y, 4, 4, 4, 3, True, 0, *flags, save)
        torch.library.opcheck(
            torch.ops.kdfast.patch_gram, arguments, test_utils=("test_schema", "test_faketensor")
        )
        products, distance, saved = torch.ops.kdfast.patch_gram(*(v.detach() for v in (x, y)), *arguments[2:])
        backward = (torch.zeros_like(products), torch.ones_like(distance), x.detach(), y.detach(), saved)
        torch.library.opcheck(
            torch.ops.kdfast.patch_gram_backward,
            (*backward, *arguments[2:-1], True, True),
            test_utils=("test_schema", "test_faketensor"),
        )


@needs_extension
def test_many_groups_go_through_in_blocks() -> None:
    """More groups than a block of the C++ loop holds, with a last block that is not full."""
    shape = (2, 83, 64, 80)
    check(kdfast.PCKALoss(), naive_pcka, maps(shape, shape), "cpu")


@needs_extension
def test_gradients_where_only_one_side_needs_one() -> None:
    student, teacher = maps((2, 3, 30, 40), (2, 3, 30, 40))
    for average in AVERAGES:
        loss = kdfast.PCKALoss(average=average)
        both = torch.autograd.grad(loss(student, teacher), (student, teacher))
        assert torch.equal(torch.autograd.grad(loss(student, teacher.detach()), student)[0], both[0])
        assert torch.equal(torch.autograd.grad(loss(student.detach(), teacher), teacher)[0], both[1])


@needs_extension
def test_compiles_without_graph_breaks() -> None:
    loss = kdfast.PCKALoss(inter_weight=1.0)
    inputs = maps((2, 3, 30, 40), (2, 3, 30, 40))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    for g, want in zip(got, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(g, want)


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


# --- other losses -----------------------------------------------------------------------------------------------------


def naive_patch_loss(base: str, student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    xs, ys = (naive_patches(v, (16, 16), "channel") for v in (student, teacher))
    if base == "at":
        a, b = (normalize(torch.stack(v).sum(0), dim=1) for v in (xs, ys))
        return (a - b).pow(2).mean() / len(xs)

    def one(x: Tensor, y: Tensor) -> Tensor:
        if base == "kd":
            p, q = log_softmax(x / tau, 1), log_softmax(y / tau, 1)
            return kl_div(p, q, reduction="batchmean", log_target=True) * tau**2
        if base == "mmd":
            k, m = (normalize(v @ v.T, dim=1) for v in (x, y))
            return ((k - m) ** 2).mean() - 0.5 * (k**2 + m**2).mean() + 1 / x.shape[0]
        p, q = (x / tau).softmax(1), (y / tau).softmax(1)

        def pearson(a: Tensor, b: Tensor) -> Tensor:
            a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
            return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

        return tau**2 * (1 - pearson(p, q)) + tau**2 * (1 - pearson(p.T, q.T))

    return torch.stack([one(x, y) for x, y in zip(xs, ys, strict=True)]).mean()


@pytest.mark.parametrize("base", ["kd", "at", "dist", "mmd"])
def test_patch_losses_equal_the_loop(base: str) -> None:
    tau = 1.0 if base == "dist" else 4.0
    inputs = maps((2, 3, 40, 52), (2, 3, 40, 52))
    check(
        kdfast.PatchLoss(base, temperature=tau),
        lambda s, t: naive_patch_loss(base, s, t, tau),
        inputs,
        "auto",
        1e-4,
    )
    same = kdfast.PatchLoss(base)(inputs[0], inputs[0])
    # The published Pearson correlation has 1e-8 in its denominator, against probabilities near 1 / D.
    assert 0 <= float(same) < (0.2 if base == "dist" else 1e-5)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", ["gram", "upper", "author"])
def test_gram_mmd_on_patches(kind: str, average: str) -> None:
    def naive(s: Tensor, t: Tensor) -> Tensor:
        terms = []
        for x, y in zip(*(naive_patches(v, (8, 8), average) for v in (s, t)), strict=True):
            k, m, n = x @ x.T, y @ y.T, x.shape[0]
            if kind == "author":
                terms.append((normalize(k, dim=1) - normalize(m, dim=1)).square().mean())
            else:
                d = k / k.norm() - m / m.norm()
                terms.append(n**2 / 2 * d.mean() ** 2 if kind == "gram" else d.square().sum() / 2)
        return torch.stack(terms).mean()

    loss = kdfast.GramMMDLoss(kind=kind, patch_size=8, average=average)
    check(loss, naive, maps((2, 3, 21, 30), (2, 3, 21, 30)), "auto", 1e-4)


def test_mimic() -> None:
    student = [torch.randn(2, 4, 8, 9), torch.randn(2, 6, 4, 5)]
    teacher = [torch.randn(2, 7, 8, 9), torch.randn(2, 7, 4, 5)]
    loss = kdfast.MimicLoss([4, 6], [7, 7], weight=2.0)
    want = sum(((a(s) - t) ** 2).mean() for a, s, t in zip(loss.adapters, student, teacher, strict=True))
    torch.testing.assert_close(loss(student, teacher), 2 * want)
    shared = kdfast.MimicLoss(4, 7)
    assert len(list(shared.parameters())) == 2
    shared(student[0], teacher[0]).backward()
    assert shared.adapters[0].weight.grad.any()
    with pytest.raises(ValueError, match="one per adapter"):
        loss(student[:1], teacher[:1])
    with pytest.raises(ValueError, match="4 and 7 channels"):
        shared(student[1], teacher[1])


def test_reference_views_share_memory() -> None:
    x = torch.randn(2, 3, 8, 12)
    for average in (0, 1):
        view = reference.patches(x, Grid(4, 4, 2, 3, True, average))
        assert view.data_ptr() == x.data_ptr() and view._is_view()

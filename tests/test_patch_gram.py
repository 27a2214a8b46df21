"""Op patch_gram: the C++ kernels against float64, blocks, threads, memory, gradients of any order, compile."""

from __future__ import annotations

import json
import subprocess
import sys

import patch_memory
import pytest
import torch
from conftest import assert_as_accurate, made_once, needs_extension, same_for_any_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from pcka_checks import check, maps, naive_pcka

import kdfast
from benchmarks.memory import peak
from kdfast.ops.patch_gram import patch_gram
from kdfast.reference import patch_gram as reference
from kdfast.reference.patch_gram import AVERAGES, Grid


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
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_op_on_random_maps(batch, channels, size, patch, average, bilinear, order, inter, seed) -> None:
    torch.manual_seed(seed)
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
    x, y = maps((2, 9, 13, 9), (2, 9, 13, 9))
    for saved_groups in (9, 0) if flags[-1] else (9, 4, 0):
        arguments = (x, y, 4, 4, 4, 3, True, 0, *flags, saved_groups)
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


# One-pixel patches of one image: channels are neighbours in the matrices of every average.
@needs_extension
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("shape", [(1, 21, 4, 5), (2, 21, 2, 2), (1, 5, 2, 3)], ids=str)
def test_patches_of_one_pixel(shape: tuple[int, ...], average: str) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = [v.detach().contiguous(memory_format=layout).requires_grad_() for v in maps(shape, shape)]
        loss = kdfast.PCKALoss(patch_size=1, average=average, centered=False, inter_weight=0.5)
        check(
            loss,
            lambda s, t: naive_pcka(s, t, patch=(1, 1), average=average, centered=False, inter=0.5),
            inputs,
            "cpu",
            3e-5,
        )


def test_reference_views_share_memory() -> None:
    x = torch.randn(2, 3, 8, 12)
    for average in (0, 1):
        view = reference.patches(x, Grid(4, 4, 2, 3, True, average))
        assert view.data_ptr() == x.data_ptr() and view._is_view()


# Few images of many channels: blocks of features. [patches, features] beyond the least block, one side of another width.
@needs_extension
@pytest.mark.parametrize(
    "options", [{}, {"inter": True}, {"inter": True, "centered": False}, {"cosine": True}], ids=str
)
@pytest.mark.parametrize("average", [0, 1, 2])
def test_blocks_of_features(average: int, options: dict) -> None:
    other = 36 if average and not options.get("inter") else 48
    x, y = maps((3, 48, 37, 30), (3, other, 37, 30), mean=5.0)
    grid = Grid(8, 8, 5, 4, True, average)
    results = []
    for backend, dtype in (
        ("cpu", torch.float32),
        ("reference", torch.float64),
        ("reference", torch.float32),
    ):
        inputs = [v.detach().to(dtype).requires_grad_() for v in (x, y)]
        with kdfast.use_backend(backend):
            products, distance = patch_gram(*inputs, grid, **options)
            weights = torch.linspace(0.5, 1.5, distance.numel(), dtype=dtype).view_as(distance)
            results.append([products, distance, *torch.autograd.grad((distance * weights).sum(), inputs)])
    for name, got, truth, same in zip(("products", "distance", "grad_x", "grad_y"), *results, strict=True):
        floor = 3e-6 * max(float(truth.abs().max()), 0.3)
        assert_as_accurate(got.detach(), truth.detach(), same.detach(), floor, name)


# Many groups of several tiles: row means come with the Grams, beyond those of the first tile. Each image has a brightness
# of its own, and patches of the last ones another still, so that the first tile tells little of the rest.
@needs_extension
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("groups", [9, 4, 0], ids=["saved", "some saved", "none saved"])
@pytest.mark.parametrize("spread", [0.0, 30.0])
def test_row_means_of_many_tiles(spread: float, groups: int, resized: bool) -> None:
    height, width = (45, 30) if resized else (48, 32)
    x, y = (v.detach() for v in maps((6, 9, height, width), (6, 9, height, width), mean=spread))
    brightness = torch.linspace(0, spread, 6)[:, None, None, None]
    tilt = torch.linspace(0, 1, height)[:, None] * brightness
    x, y = x - 2 * brightness + tilt, y + brightness - tilt
    arguments = (16, 16, 3, 2, True, 0, 0, True, False, True, False, False)
    results = []
    for backend, dtype in (
        ("cpu", torch.float32),
        ("reference", torch.float64),
        ("reference", torch.float32),
    ):
        inputs = [v.to(dtype).requires_grad_() for v in (x, y)]
        if backend == "cpu":
            products, distance, saved = torch.ops.kdfast.patch_gram(x, y, *arguments, groups)
            assert saved.shape[0] == groups
        else:
            with kdfast.use_backend("reference"):
                products, distance = patch_gram(*inputs, Grid(*arguments[:6]), inter=True)
        weights = torch.linspace(0.5, 1.5, distance.numel(), dtype=dtype).view_as(distance)
        if backend == "cpu":
            zeros = torch.zeros_like(products)
            gradients = torch.ops.kdfast.patch_gram_backward(
                zeros, weights, x, y, saved, *arguments, True, True
            )
        else:
            gradients = torch.autograd.grad((distance * weights).sum(), inputs)
        results.append([products, distance, *gradients])
    for name, got, truth, same in zip(("products", "distance", "grad_x", "grad_y"), *results, strict=True):
        floor = 3e-6 * max(float(truth.abs().max()), 0.3 if name == "distance" else 0.0)
        assert_as_accurate(got.detach(), truth.detach(), same.detach(), floor, name)


@needs_extension
@pytest.mark.parametrize("inter", [False, True])
@pytest.mark.parametrize(("average", "groups"), [(0, 48), (0, 17), (0, 0), (1, 2), (1, 0), (2, 64), (2, 0)])
def test_saved_and_recomputed_grams_give_the_same_gradient(average: int, groups: int, inter: bool) -> None:
    """Of all groups, of some (between those that are computed again) or of none."""
    x, y = (v.detach() for v in maps((2, 48, 37, 30), (2, 48, 37, 30)))
    arguments = (8, 8, 5, 4, True, average, 0, True, False, inter, False, False)
    products, distance, saved = torch.ops.kdfast.patch_gram(x, y, *arguments, groups)
    assert saved.shape[0] == groups
    weights = torch.linspace(0.5, 1.5, distance.numel()).view_as(distance)
    got, _ = torch.ops.kdfast.patch_gram_backward(
        torch.zeros_like(products), weights, x, y, saved, *arguments, True, False
    )
    x.requires_grad_()
    with kdfast.use_backend("reference"):
        distance = patch_gram(x, y, Grid(*arguments[:6]), inter=inter)[1]
        want = torch.autograd.grad((distance * weights).sum(), x)[0]
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@needs_extension
def test_of_few_groups_all_or_none_are_saved() -> None:
    x, y = (v.detach() for v in maps((2, 3, 16, 16), (2, 3, 16, 16)))
    with pytest.raises(RuntimeError, match="all are saved or none"):
        torch.ops.kdfast.patch_gram(x, y, 4, 4, 4, 4, True, 0, 0, True, False, False, False, False, 2)


@needs_extension
@pytest.mark.parametrize("average", [0, 1, 2])
def test_same_bits_with_any_number_of_threads(average: int) -> None:
    x, y = maps((2, 48, 37, 30), (2, 48, 37, 30))

    def compute() -> tuple[torch.Tensor, ...]:
        distance = patch_gram(x, y, Grid(8, 8, 5, 4, True, average), inter=True)[1]
        return distance, *torch.autograd.grad(distance.sum(), (x, y))

    same_for_any_threads(compute)


# 256 channels at stride 16 of an 800 x 1344 image, resized; and whole patches. Extra memory beyond the gradient.
@needs_extension
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize(
    ("batch", "size", "share"),
    [(4, (50, 84), 1.0), (4, (96, 160), 0.2), (2, (96, 160), 0.2)],
    ids=["resized", "whole", "two images"],
)
@pytest.mark.usefixtures("freed_memory_is_given_back")
def test_memory(batch: int, size: tuple[int, int], share: float, average: str) -> None:
    """Below one resized copy; without a resize below 10 % of both maps (one copy is half of them)."""
    student, teacher = maps((batch, 256, *size), (batch, 256, *size))
    loss = kdfast.PCKALoss(average=average)
    teacher = teacher.detach()
    found = peak(lambda: torch.autograd.grad(loss(student, teacher), student), student.device)
    if found is None:
        pytest.skip("the machine does not say how much memory a process takes")
    copy = batch * 256 * 4 * (-(-size[0] // 16) * 16) * (-(-size[1] // 16) * 16)
    assert found - student.numel() * 4 <= share * copy


@pytest.fixture(scope="session")
def shares_of_one_image(tmp_path_factory) -> dict[str, float | None]:
    with made_once(tmp_path_factory, "patch_memory.json") as file:
        if not file.exists():
            command = [sys.executable, patch_memory.__file__]
            file.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return json.loads(file.read_text())


# Whole patches of one image: the least input of which threads' workspaces may take a tenth.
@needs_extension
@pytest.mark.parametrize("case", patch_memory.CASES)
def test_memory_of_one_image(case: str, shares_of_one_image: dict[str, float | None]) -> None:
    """Below 10 % of both maps beyond the gradient, what the kernels keep between calls included."""
    found = shares_of_one_image[case]
    if found is None:
        pytest.skip("the machine does not say how much memory a process takes")
    assert found < 0.1

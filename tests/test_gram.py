"""Op gram: the C++ backend against the float64 reference: comparisons, shapes, strides, dtypes, degenerate inputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import assert_as_accurate, needs_extension, same_for_any_threads
from early_checks import called, check_early
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast.ops import gram as module
from kdfast.ops.gram import gram, gram_distance
from kdfast.reference import gram as reference
from kdfast.reference.gram import COMPARISONS

pytestmark = needs_extension

# (compare, centered, cosine, inter, feature_side): every combination that the op implements.
FLAGS = [
    (COMPARISONS.index(compare), centered, cosine, inter, feature_side)
    for compare in COMPARISONS
    for centered in (True, False)
    for cosine in (False, True)
    for inter, feature_side in ((False, False), (True, False), (False, True))
    if not (inter and (compare != "cka" or cosine))
    and not (feature_side and (compare not in ("cka", "difference") or (cosine and centered)))
    and not (compare == "mean" and centered)
]
# One row; two; fewer rows than any register block; odd sizes; several groups below and above the one-task-per-group
# threshold (8); more rows than a feature tile; more features than one tile.
SHAPES = [(1, 1, 1, 1, 1, 5), (1, 2, 1, 1, 1, 5), (2, 5, 1, 1, 1, 7), (3, 4, 3, 2, 3, 4), (10, 3, 3, 2, 2, 5)]
LARGE_SHAPES = [(1, 130, 1, 1, 1, 90), (1, 33, 1, 1, 1, 2100), (9, 35, 1, 1, 1, 33)]


def inputs(shape: tuple[int, ...], kind: str, same_features: bool) -> tuple[Tensor, Tensor]:
    other = shape if same_features else (*shape[:5], shape[5] + 3)
    x, y = torch.randn(shape), torch.randn(other)
    if kind == "mean":
        x, y = x + 100, y - 50
    elif kind == "converged":
        y = (x if same_features else torch.randn(shape)).clone()
        x = y + 1e-3 * torch.randn(shape)
    elif kind == "constant":
        x[:] = 3.3
    elif kind == "zero row":
        x[:, 0], y[:, -1] = 0, 0
    elif kind == "strided":  # [F1, G, R1, F2, R2, F3] in memory, every other element
        memory = [shape[i] for i in (3, 0, 1, 4, 2)]
        x = torch.randn(*memory, 2 * shape[5])[..., ::2].permute(1, 2, 4, 0, 3, 5)
    elif kind == "expanded":
        x = torch.randn(*shape[:4], 1, shape[5]).expand(shape)
    return x, y


def run_reference(x: Tensor, y: Tensor, flags: tuple, gradients: tuple[Tensor, Tensor], dtype: torch.dtype):
    x, y = (v.detach().to(dtype).requires_grad_() for v in (x, y))
    outputs = reference.gram(x, y, *flags)
    upstream = [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, (x, y), upstream)


def check(x: Tensor, y: Tensor, flags: tuple, save: bool) -> None:
    terms = 1 + flags[3]
    smooth = flags[0] < COMPARISONS.index("row_cosine")  # the others define no gradient of the products
    scale = 1e-4 / max(
        1.0, float(x.float().abs().max()) ** 4
    )  # products are fourth powers; keep both gradients in sight
    gradients = (torch.randn(terms, 3, x.shape[0]) * scale * smooth, torch.randn(terms, x.shape[0]))
    products, distance, saved = torch.ops.kdfast.gram(x, y, *flags, save)
    upstream = [g.to(products.dtype) for g in gradients]
    grads = torch.ops.kdfast.gram_backward(*upstream, x, y, saved, *flags, True, True)
    truth = run_reference(x, y, flags, gradients, torch.float64)
    same = run_reference(x, y, flags, gradients, x.dtype)
    names = ("products", "distance", "grad_x", "grad_y")
    half_step = torch.finfo(x.dtype).eps if x.dtype in (torch.float16, torch.bfloat16) else 0
    for name, got, want, plain in zip(names, (products, distance, *grads), truth, same, strict=True):
        size = float(want.abs().max())
        floor = {"products": 1e-6 * size, "distance": 1e-6 * max(1.0, size)}.get(
            name, 2e-6 * size + half_step * size
        )
        if name == "distance" and flags[4]:  # a difference of norms
            floor += 1e-6 * float(truth[0].abs().max()) / (x.shape[1] * x.shape[2]) ** 2
        if name.startswith("grad"):
            v = (x if name == "grad_x" else y).double()
            # Where the gradient vanishes by cancellation its terms are of size |g| / |x|, of a unit row |g| over its norm.
            norm = v.square().sum((3, 4, 5)).sqrt() if flags[2] else v.flatten(1).square().mean(1).sqrt()
            norm = norm[norm > 0].min() if norm.any() else norm.new_ones(())
            summands = gradients[1].abs().max() + gradients[0].abs().max() * truth[0].abs().max()
            floor += 3e-7 * float(summands / norm.clamp_min(1e-3))
            if flags[2]:  # unit rows of a large mean are nearly equal: centring loses digits
                floor += 3e-5 * size
        assert_as_accurate(got, want, plain, floor, f"{name} {flags}")


@pytest.mark.parametrize(
    "flags", FLAGS, ids=lambda f: f"{COMPARISONS[f[0]]}-{'-'.join(map(str, map(int, f[1:])))}"
)
@pytest.mark.parametrize("kind", ["plain", "mean", "converged", "zero row", "strided", "expanded"])
def test_matches_reference(flags: tuple, kind: str) -> None:
    for shape in SHAPES:
        if kind == "zero row" and shape[1] * shape[2] < 3:
            continue
        x, y = inputs(shape, kind, same_features=flags[3] or kind == "converged")
        for save in (True, False) if not flags[2] else (False,):
            check(x, y, flags, save)


@pytest.mark.parametrize("shape", LARGE_SHAPES)
@pytest.mark.parametrize("flags", [f for f in FLAGS if f[0] in (0, 5)], ids=str)
def test_large_shapes(shape: tuple[int, ...], flags: tuple) -> None:
    x, y = inputs(shape, "mean" if flags[1] else "plain", same_features=flags[3])
    check(x, y, flags, save=not flags[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flags", [f for f in FLAGS if f[0] == 0], ids=str)
def test_dtypes(dtype: torch.dtype, flags: tuple) -> None:
    x, y = inputs((2, 9, 2, 2, 1, 37), "plain", same_features=flags[3])
    check(x.to(dtype), y.to(dtype), flags, save=not flags[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_large_values(dtype: torch.dtype) -> None:
    x, y = (1000 * (2 * torch.rand(1, 32, 1, 1, 1, 4096) - 1) for _ in range(2))
    check(x.to(dtype), y.to(dtype), FLAGS[0], save=True)


@given(
    groups=st.integers(1, 10),
    rows=st.tuples(st.integers(1, 9), st.integers(1, 4)),
    features=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)),
    order=st.permutations(range(6)),
    step=st.integers(1, 2),
    flags=st.sampled_from([f for f in FLAGS if f[0] == 0]),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_random_views(groups, rows, features, order, step, flags, seed) -> None:
    torch.manual_seed(seed)
    shape = (groups, *rows, *features)

    def view() -> Tensor:
        memory = torch.randn([shape[a] * step for a in order])[(slice(None, None, step),) * 6]
        return memory.permute([order.index(a) for a in range(6)])

    check(view(), view(), flags, save=not flags[2])


@pytest.mark.parametrize("flags", [f for f in FLAGS if f[2] and not f[3] and f[0] < 3], ids=str)
def test_unit_rows_of_one_feature(flags: tuple) -> None:
    """They are exactly 1 or -1: where all agree, centring leaves exactly 0, and no gradient of rounding errors."""
    for seed in range(40):
        torch.manual_seed(seed)
        check(torch.randn(1, 1, 3, 1, 1, 1), torch.randn(1, 1, 3, 1, 1, 1), flags, save=False)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("kind", ["constant", "zero", "same"])
def test_degenerate_inputs_are_finite(rows: int, kind: str) -> None:
    y = torch.randn(1, rows, 1, 1, 1, 6)
    x = {"constant": torch.full_like(y, 0.1), "zero": torch.zeros_like(y), "same": y.clone()}[kind]
    for flags in FLAGS:
        products, distance, saved = torch.ops.kdfast.gram(x, y, *flags, False)
        grads = torch.ops.kdfast.gram_backward(
            torch.zeros_like(products), torch.ones_like(distance), x, y, saved, *flags, True, True
        )
        for v in (products, distance, *grads):
            assert v.isfinite().all(), flags
        assert (distance >= 0).all()
        if flags[1] and rows <= 2 and not flags[3]:
            assert not grads[0].any() and not grads[1].any(), "two centred rows determine nothing"
        if kind == "constant" and flags == FLAGS[0]:
            assert distance.item() == 1 and not grads[0].any(), "a constant has CKA 0 and no gradient"


def test_result_does_not_depend_on_threads() -> None:
    x, y = torch.randn(1, 40, 1, 1, 1, 9000), torch.randn(1, 40, 1, 1, 1, 9000)
    same_for_any_threads(lambda: torch.ops.kdfast.gram(x, y, *FLAGS[0], True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("settings", [{}, {"inter": True}, {"cosine": True}, {"compare": "cka_row"}], ids=str)
def test_gradcheck_and_second_backward(backend: str, settings: dict) -> None:
    x, y = (torch.randn(2, 5, 1, 1, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with kdfast.use_backend(backend):
        assert torch.autograd.gradcheck(lambda *v: gram(*v, **settings), (x, y))
        assert torch.autograd.gradgradcheck(lambda *v: gram(*v, **settings)[1], (x, y))


@pytest.mark.parametrize("teacher", ["computed", "same"])
def test_second_backward_where_one_side_depends_on_the_other(teacher: str) -> None:
    x = torch.randn(2, 5, 1, 1, 1, 4, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return gram(x, x.exp() if teacher == "computed" else x)[0].sum() * 1e-2

    assert torch.autograd.gradgradcheck(loss, x)
    plain = torch.autograd.grad(loss(x), x)[0]
    with_graph = torch.autograd.grad(loss(x), x, create_graph=True)[0]
    assert torch.allclose(with_graph, plain)


def test_only_needed_gradients() -> None:
    x, y = torch.randn(1, 6, 1, 1, 1, 5, requires_grad=True), torch.randn(1, 6, 1, 1, 1, 5)
    distance = gram(x, y)[1].sum()
    distance.backward(retain_graph=True)
    first = x.grad.clone()
    distance.backward()
    assert torch.equal(x.grad, 2 * first) and y.grad is None
    with torch.no_grad():
        assert not gram(x, y)[1].requires_grad


@pytest.mark.parametrize(
    "flags", [FLAGS[0], next(f for f in FLAGS if f[3]), next(f for f in FLAGS if f[4])], ids=str
)
def test_opcheck(flags: tuple) -> None:
    x, y = inputs((2, 5, 1, 2, 1, 3), "plain", same_features=True)
    torch.library.opcheck(torch.ops.kdfast.gram.default, (x, y, *flags, True))
    products, distance, saved = torch.ops.kdfast.gram(x, y, *flags, True)
    arguments = (products, distance, x, y, saved, *flags, True, False)
    torch.library.opcheck(torch.ops.kdfast.gram_backward.default, arguments)


EARLY_FLAGS = [f for f in FLAGS if not (f[4] and f[2])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((6, 9), {"inter_weight": 0.5}),
        ((9, 6), {"inter_weight": 0.5}),  # more rows than features: transposed, weights exchanged
        ((9, 6), {"layout": "columns", "compare": "cka_row", "centered": False}),
        ((7, 3, 2, 5), {}),
        ((7, 3, 5), {"compare": "unbiased"}),
        ((8, 3), {}),  # feature side
        ((7, 3, 2, 2), {"cosine": True}),
        ((7, 5), {"compare": "row_cosine", "centered": False}),
        ((7, 5), {"compare": "mean", "centered": False}),
        ((2, 5, 3, 2), {"layout": "pixels", "compare": "difference", "centered": False, "cosine": True}),
        ((9, 3, 3, 2), {"layout": "pixels", "compare": "difference", "centered": False, "cosine": True}),
    ],
    ids=str,
)
def test_early_gradient(monkeypatch, shape, arguments, dtype) -> None:
    student, teacher = torch.randn(shape).to(dtype) + 0.5, torch.randn(shape).to(dtype)

    def call(s: Tensor) -> Tensor:
        return gram_distance(s, teacher.to(s.dtype), weight=-1.5, **arguments)

    check_early(monkeypatch, "gram", call, student)
    if dtype == torch.float32:
        if len(shape) == 4:
            check_early(monkeypatch, "gram", call, student.to(memory_format=torch.channels_last))
        check_early(monkeypatch, "gram", call, student.transpose(0, 1).contiguous().transpose(0, 1))


def check_early_op(student: Tensor, teacher: Tensor, layout: int, flags: tuple, weights: tuple) -> None:
    """Loss and gradient of the op against the reference in float64, by the rule of check()."""
    arguments = (layout, *flags, *weights)
    loss, gradient = torch.ops.kdfast.gram_with_gradient(student, teacher, *arguments)
    exact = module._reference_with_gradient(student.double(), teacher.double(), *arguments)
    plain = module._reference_with_gradient(student, teacher, *arguments)
    size = float(exact[1].abs().max())
    floor = 2e-6 * size + 3e-7 * max(map(abs, weights)) / float(student.square().mean().sqrt())
    floor += 3e-5 * size * flags[2]
    assert_as_accurate(loss, exact[0], plain[0], 2e-6 * max(1.0, abs(float(exact[0]))), f"loss {flags}")
    assert_as_accurate(gradient, exact[1], plain[1], floor, f"gradient {flags}")


@pytest.mark.parametrize("kind", ["plain", "mean", "converged"])
@pytest.mark.parametrize("flags", EARLY_FLAGS, ids=str)
def test_early_gradient_matches_reference(flags: tuple, kind: str) -> None:
    for shape in ((5, 7), (33, 17), (130, 90), (12, 3, 5, 7), (33, 2100)):
        if flags[3] and len(shape) > 2:
            continue
        student, teacher = torch.randn(shape), torch.randn(shape)
        # U-centring a Gram of large means loses digits in float32, in the op's two calls as well.
        loses_digits = COMPARISONS[flags[0]] == "unbiased" and not flags[1]
        if kind == "mean" and not loses_digits:
            student, teacher = student + 30, teacher - 20
        elif kind == "converged":
            student = teacher + 1e-3 * torch.randn(shape)
        check_early_op(student, teacher, 0, flags, (1.0, -2.0))
        if len(shape) == 2:
            check_early_op(student, teacher, 1, flags, (1.0, -2.0))
        elif not flags[3]:
            check_early_op(student, teacher, 2, flags, (1.0, 0.0))


# Rows from which triangles are compared, an odd number of them, and one where no partial sums fit.
@pytest.mark.parametrize("rows", [96, 131, 301])
@pytest.mark.parametrize("kind", ["plain", "mean", "converged"])
@pytest.mark.parametrize("centered", [True, False])
def test_large_grams_of_sides_of_different_widths(rows: int, kind: str, centered: bool) -> None:
    flags = (0, centered, False, False, False)
    for widths in ((40, 700), (700, 40), (90, 90)):
        student, teacher = torch.randn(rows, widths[0]), torch.randn(rows, widths[1])
        if kind == "mean":
            student, teacher = student + 30, teacher - 20
        elif kind == "converged":
            student = teacher + 1e-3 * torch.randn_like(teacher)
        check_early_op(student, teacher, 0, flags, (1.5, 0.0))
        check_early_op(student.T.contiguous(), teacher.T.contiguous(), 1, flags, (1.5, 0.0))
        views = module.view(student, "samples"), module.view(teacher, "samples")
        check(*views, flags, save=rows != 131)  # both gradients


@pytest.mark.parametrize("flags", EARLY_FLAGS, ids=str)
def test_early_gradient_is_that_of_two_calls(flags: tuple) -> None:
    student, teacher = torch.randn(33, 17) + 30, torch.randn(33, 17) - 20
    _, gradient = torch.ops.kdfast.gram_with_gradient(student, teacher, 0, *flags, 1.0, 1.0)
    views = module.view(student, "samples"), module.view(teacher, "samples")
    products, distance, saved = torch.ops.kdfast.gram(*views, *flags, False)
    upstream = torch.zeros_like(products), torch.ones_like(distance)
    wanted, _ = torch.ops.kdfast.gram_backward(*upstream, *views, saved, *flags, True, False)
    torch.testing.assert_close(
        gradient, wanted.view(student.shape), rtol=1e-5, atol=1e-6 * float(wanted.abs().max())
    )


# Draws: where nearly equal sides leave little of their products, a few would pass by luck.
@pytest.mark.parametrize("flags", [f for f in EARLY_FLAGS if COMPARISONS[f[0]] == "difference"], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (33, 17)])
def test_difference_of_nearly_equal_sides(shape: tuple[int, int], flags: tuple) -> None:
    for seed in range(40):
        torch.manual_seed(seed)
        teacher = torch.randn(shape)
        student = teacher + 1e-3 * torch.randn(shape)
        for layout in (0, 1):
            check_early_op(student, teacher, layout, flags, (1.0, 0.0))
        views = module.view(student, "samples"), module.view(teacher, "samples")
        check(*views, flags, save=not flags[2])  # both gradients
        if not flags[2]:  # not a rounding of the sides, as that of unit rows is
            found, exact = (
                torch.ops.kdfast.gram(*v, *flags, False)[1] for v in (views, [v.double() for v in views])
            )
            torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


# One side small beside the other, whose rounding is then as large; a copy; features in another order in memory.
@pytest.mark.parametrize(
    "flags", [f for f in FLAGS if COMPARISONS[f[0]] == "difference" and not f[2]], ids=str
)
def test_difference_of_unlike_sides(flags: tuple) -> None:
    other = torch.randn(2, 6, 1, 2, 3, 4)
    for factor in (1e-3, 1.0, 10.0):
        check(factor * torch.randn_like(other), other, flags, save=True)
    check(other.clone(), other, flags, save=True)
    turned = (other + 1e-3 * torch.randn_like(other)).transpose(3, 5).contiguous().transpose(3, 5)
    check(turned, other, flags, save=True)
    _, distance, _ = torch.ops.kdfast.gram(turned, other, *flags, False)
    _, exact, _ = torch.ops.kdfast.gram(turned.double(), other.double(), *flags, False)
    torch.testing.assert_close(distance.double(), exact, rtol=1e-3, atol=0)
    # Equally many features that do not pair up.
    check(other, other.reshape(2, 6, 1, 4, 3, 2), flags, save=True)


def test_early_distance_of_nearly_equal_inputs() -> None:
    """1e-8 of the norms, which a difference of products in float32 does not see."""
    teacher = torch.randn(64, 40) + 3
    student = (teacher + 1e-4 * torch.randn(64, 40)).requires_grad_()
    found = gram_distance(student, teacher)
    exact = gram_distance(student.detach().double(), teacher.double())
    assert 0 < exact < 1e-7
    torch.testing.assert_close(found.double().detach(), exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("kind", ["constant", "zero", "same"])
def test_early_gradient_of_degenerate_inputs(rows: int, kind: str) -> None:
    y = torch.randn(rows, 6)
    x = {"constant": torch.full_like(y, 0.1), "zero": torch.zeros_like(y), "same": y.clone()}[kind]
    for flags in EARLY_FLAGS:
        loss, gradient = torch.ops.kdfast.gram_with_gradient(x, y, 0, *flags, 1.0, 0.0)
        view = module.view(x, "samples"), module.view(y, "samples")
        _, distance, saved = torch.ops.kdfast.gram(*view, *flags, False)
        torch.testing.assert_close(loss, distance[0, 0])
        upstream = torch.zeros(1 + flags[3], 3, 1), torch.ones(1 + flags[3], 1)
        upstream[1][1:] = 0
        wanted, _ = torch.ops.kdfast.gram_backward(*upstream, *view, saved, *flags, True, False)
        torch.testing.assert_close(gradient, wanted.view(x.shape))


def test_early_gradient_does_not_depend_on_threads() -> None:
    for shape, width, flags in (
        ((128, 100), 100, FLAGS[0]),
        ((301, 40), 700, FLAGS[0]),
        ((100, 128), 128, (0, True, False, True, False)),
    ):
        given = torch.randn(shape), torch.randn(shape[0], width)
        same_for_any_threads(partial(torch.ops.kdfast.gram_with_gradient, *given, 0, *flags, 1.0, 2.0))


def test_workspaces_stay_mapped_between_calls() -> None:
    """Mapping those of Grams of 512 rows anew, some thousand pages a call, had taken longer than the products."""
    resource = pytest.importorskip("resource")
    levels = [(torch.randn(512, d, requires_grad=True), torch.randn(512, 4 * d)) for d in (128, 64, 10)]

    def step() -> None:
        for student, teacher in levels:
            torch.autograd.grad(gram_distance(student, teacher), student)

    def faults(steps: int) -> float:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(steps):
            step()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps

    faults(40)  # until their sizes are known
    assert faults(20) < 400


def test_teacher_gradient_takes_two_calls() -> None:
    x, y = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    assert called(lambda: gram_distance(x, y).backward()) == ["gram", "gram_backward"]


@pytest.mark.parametrize("flags", [FLAGS[0], next(f for f in FLAGS if f[3])], ids=str)
def test_early_opcheck(flags: tuple) -> None:
    x, y = torch.randn(6, 5), torch.randn(6, 5)
    for student in (x, x.T.contiguous().T):
        arguments = (student, y, 0, *flags, 1.0, 0.5)
        torch.library.opcheck(torch.ops.kdfast.gram_with_gradient.default, arguments)


def test_wrong_layouts_are_refused() -> None:
    x, op = torch.randn(6, 5), torch.ops.kdfast.gram_with_gradient
    with pytest.raises(RuntimeError, match="pixels need 4 axes"):
        op(x, x, 2, *FLAGS[0], 1.0, 0.0)
    with pytest.raises(RuntimeError, match="share groups and rows"):
        op(x, x[1:], 0, *FLAGS[0], 1.0, 0.0)
    with pytest.raises(RuntimeError, match="unknown layout"):
        op(x, x, 3, *FLAGS[0], 1.0, 0.0)


def test_wrong_views_are_refused() -> None:
    x, y = torch.randn(1, 4, 1, 1, 1, 3), torch.randn(1, 5, 1, 1, 1, 3)
    with pytest.raises(RuntimeError, match="share groups and rows"):
        torch.ops.kdfast.gram(x, y, *FLAGS[0], True)
    with pytest.raises(RuntimeError, match="x and y must be float32"):
        torch.ops.kdfast.gram(x.int(), x.int(), *FLAGS[0], True)

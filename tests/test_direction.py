"""Op direction: the C++ backend against the float64 reference; zero centres, zero rows, ties."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_extension, same_for_any_threads
from direction_checks import check, inputs
from early_checks import called, check_early
from hypothesis import given, settings
from hypothesis import strategies as st

import kdfast
from kdfast import backend
from kdfast.ops.direction import direction
from kdfast.reference import direction as reference

pytestmark = needs_extension
BACKENDS = [name for name in ("reference", "cpu") if backend.why_not(name) is None]


@pytest.fixture(params=BACKENDS)
def on_backend(request):
    with kdfast.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 1), (9, 5, 4), (33, 67, 7), (70, 1100, 5), (300, 129, 81)]
)
def test_matches_reference(shape, mean, balanced):
    student, teacher, centers, labels = inputs(*shape, mean=mean)
    check("cpu", student, teacher, centers, labels, balanced=balanced)
    check("cpu", student, None, centers, labels, balanced=balanced, floor=3e-6 if mean == 0 else 1e-4)


def test_centres_per_sample():
    check("cpu", *inputs(17, 65, 0, labelled=False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [5, 600])
def test_dtypes(dtype, columns):
    student, teacher, centers, labels = inputs(13, columns, 6, dtype)
    floor = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps
    check("cpu", student, teacher, centers, labels, floor=floor)
    check("cpu", student, teacher.float(), centers.float(), labels, floor=floor)  # class means stay float32


def test_half_precision_does_not_overflow(on_backend):
    """Squares of 2048 values around 100 leave float16, the loss does not notice."""
    student, teacher, centers, labels = inputs(8, 2048, 3, torch.float16, mean=100)
    expected = direction(student.double(), teacher.double(), centers.double(), labels)
    assert abs(float(direction(student, teacher, centers, labels) - expected)) < 1e-4


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 40),
    step=st.integers(1, 3),
    transposed=st.booleans(),
    balanced=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_strides(rows, columns, step, transposed, balanced):
    student, teacher, centers, labels = inputs(rows, columns, 5)

    def strided(v):
        v = v.repeat_interleave(step, 0).repeat_interleave(step, 1)
        return (v.T.contiguous().T if transposed else v)[::step, ::step]

    check("cpu", strided(student), strided(teacher), strided(centers), labels, balanced=balanced)
    check(
        "cpu", student[:1].expand(rows, columns), teacher, centers, labels.repeat(2)[::2], balanced=balanced
    )


def test_ties_take_the_students_branch(on_backend):
    student = torch.randn(4, 9, requires_grad=True)
    centers, labels = torch.randn(3, 9), torch.tensor([0, 1, 2, 1])
    loss = direction(student, student.detach().clone(), centers, labels)
    (gradient,) = torch.autograd.grad(loss, student)
    # 1 - cos does not change with the length of the student.
    assert float((gradient * student.detach()).sum(1).abs().max()) < 1e-6
    assert float(gradient.abs().max()) > 1e-2


@pytest.mark.parametrize("balanced", [False, True])
def test_zero_rows_and_centres(on_backend, balanced):
    student, teacher, centers, labels = inputs(9, 6, 4)
    labels[:4] = torch.tensor([0, 1, 2, 3])
    student[0] = 0
    student[1] = teacher[1] = 0
    centers[2] = 0
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    loss = direction(student, teacher, centers, labels, balanced=balanced)
    grad_student, grad_teacher = torch.autograd.grad(loss, (student, teacher))
    for v in (loss, grad_student, grad_teacher):
        assert v.isfinite().all()
    assert grad_student[0].any(), "a student of length 0 is still pulled towards its class"
    assert not grad_student[1].any(), "student and teacher of length 0: no direction, no length to reach"
    left_out = (labels == 2) | (labels == -100)
    assert not grad_student[left_out].any() and not grad_teacher[left_out].any()
    kept = ~left_out
    same = direction(student[kept], teacher[kept], centers, labels[kept], balanced=balanced)
    torch.testing.assert_close(loss, same)


def test_nothing_counts(on_backend):
    student, teacher, centers, labels = inputs(5, 7, 3)
    student.requires_grad_()
    for c, l in ((centers, torch.full_like(labels, -100)), (torch.zeros_like(centers), labels.clamp_min(0))):
        loss = direction(student, teacher, c, l)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, student)[0].any()
    empty = direction(student[:0], teacher[:0], centers, labels[:0], balanced=True)
    assert empty.item() == 0


def test_nan_is_not_hidden(on_backend):
    student, teacher, centers, labels = inputs(5, 7, 3)
    labels[:] = 1
    for v in (student, teacher, centers):
        broken = [x.clone() for x in (student, teacher, centers)]
        broken[[id(x) for x in (student, teacher, centers)].index(id(v))][1, 2] = float("nan")
        assert direction(*broken, labels).isnan()


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_labels_out_of_range(on_backend, label):
    student, teacher, centers, labels = inputs(5, 7, 3)
    labels[3] = label
    with pytest.raises(
        (RuntimeError, IndexError), match="labels: need values in.*ignore_index|index out of range"
    ):
        direction(student, teacher, centers, labels)


def test_own_ignore_index(on_backend):
    student, teacher, centers, labels = inputs(6, 7, 3)
    labels = torch.tensor([0, 255, 1, 2, 255, 0])
    kept = labels != 255
    found = direction(student, teacher, centers, labels, ignore_index=255)
    torch.testing.assert_close(found, direction(student[kept], teacher[kept], centers, labels[kept]))


@pytest.mark.parametrize("balanced", [False, True])
def test_gradcheck_and_second_backward(on_backend, balanced):
    student, teacher, centers, labels = inputs(6, 4, 3, torch.float64)
    student, teacher = student.requires_grad_(), teacher.requires_grad_()

    def call(s, t):
        return direction(s, t, centers, labels, balanced=balanced)

    assert torch.autograd.gradcheck(call, (student, teacher))
    assert torch.autograd.gradgradcheck(call, (student, teacher))
    assert torch.autograd.gradcheck(lambda s: direction(s, None, centers, labels), (student,))


def test_gradient_of_the_centres():
    student, teacher, centers, labels = inputs(6, 4, 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda c: direction(student, teacher, c, labels), (centers.requires_grad_(),)
    )
    with kdfast.use_backend("cpu"), pytest.raises(NotImplementedError, match="reference"):
        direction(student, teacher, centers, labels)


def test_only_needed_gradients():
    student, teacher, centers, labels = inputs(6, 4, 3)
    student.requires_grad_()
    loss = direction(student, teacher, centers, labels)
    loss.backward(retain_graph=True)
    first = student.grad.clone()
    loss.backward()
    assert torch.equal(student.grad, 2 * first) and teacher.grad is None
    both = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(direction(student.detach(), both, centers, labels), both)
    assert gradient.any()
    with torch.no_grad():
        assert not direction(student, teacher, centers, labels).requires_grad


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_early_gradient(monkeypatch, balanced, with_teacher):
    for shape, dtype in (
        ((6, 5, 4), torch.float64),
        ((9, 16, 4), torch.float32),
        ((33, 67, 7), torch.float32),
        ((70, 1100, 5), torch.bfloat16),
    ):
        student, teacher, centers, labels = inputs(*shape, dtype)
        centers[1] = 0  # its rows do not count

        def call(s, t=teacher, c=centers, y=labels):
            t = t.to(s.dtype) if with_teacher else None
            return direction(s, t, c.to(s.dtype), y, balanced=balanced, weight=1.5)

        check_early(monkeypatch, "direction", call, student)
        if dtype == torch.float32:
            check_early(monkeypatch, "direction", call, student.T.contiguous().T)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 5, 4), (70, 1100, 5), (300, 129, 81), (260, 17, 4000)])
def test_early_gradient_matches_reference(shape, mean, balanced):
    student, teacher, centers, labels = inputs(*shape, mean=mean)
    centers[0] = 0
    centers[-1, : min(16, shape[1] - 1)] = 0  # what is looked at first is 0, the centre is not
    student[0] = 0
    if shape[0] > 4:
        student[3] = teacher[3] = 0
    for side in (teacher, None):
        loss, gradient = torch.ops.kdfast.direction_with_gradient(
            student, side, centers, labels, -100, balanced, -2.0
        )
        exact = student.double().requires_grad_()
        side = None if side is None else side.double()
        want = -2 * reference.direction(exact, side, centers.double(), labels, balanced=balanced)
        (want_gradient,) = torch.autograd.grad(want, exact)
        torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-5, atol=3e-6)
        norms = student.double().norm(dim=1)
        size = 1 / float(norms[norms > 0].min()) if norms.any() else 1.0
        assert float((gradient.double() - want_gradient).abs().max()) <= 1e-5 * max(size, 1e-3)


def test_gradient_larger_than_the_caches():
    for columns in (1024, 1031):  # rows that start where vectors do, and not
        student, teacher, centers, labels = inputs(4100, columns, 11)
        if columns == 1031:
            centers[3] = 0  # found when the gradient is written already: its rows are taken out again
        loss, gradient = torch.ops.kdfast.direction_with_gradient(
            student, teacher, centers, labels, -100, False, 1.0
        )
        check("cpu", student, teacher, centers, labels)
        student.requires_grad_()
        with kdfast.use_backend("reference"):
            want = direction(student, teacher, centers, labels)
            (want_gradient,) = torch.autograd.grad(want, student)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(
            gradient, want_gradient, rtol=1e-4, atol=1e-5 * float(want_gradient.abs().max())
        )


def test_early_gradient_does_not_depend_on_threads():
    student, teacher, centers, labels = inputs(700, 300, 9)
    call = torch.ops.kdfast.direction_with_gradient
    same_for_any_threads(lambda: call(student, teacher, centers, labels, -100, True, 1.0))


def test_teacher_gradient_takes_two_calls():
    student, teacher, centers, labels = inputs(6, 5, 4)
    teacher.requires_grad_()
    names = called(lambda: direction(student.requires_grad_(), teacher, centers, labels).backward())
    assert names == ["direction", "direction_backward"]


@pytest.mark.parametrize("labelled", [True, False])
def test_opcheck(labelled):
    student, teacher, centers, labels = inputs(6, 5, 4, labelled=labelled)
    forward = (student, teacher, centers, labels, -100, labelled)
    torch.library.opcheck(torch.ops.kdfast.direction.default, forward)
    for student_ in (student, student.T.contiguous().T):
        torch.library.opcheck(torch.ops.kdfast.direction_with_gradient.default, (student_, *forward[1:], 0.5))
    loss, factors, total = torch.ops.kdfast.direction(*forward)
    for needs in ((True, True), (True, False), (False, True)):
        args = (loss, *forward[:4], factors, total, -100, labelled, *needs)
        torch.library.opcheck(torch.ops.kdfast.direction_backward.default, args)
    transposed = (loss, student.T.contiguous().T, *args[2:])
    torch.library.opcheck(torch.ops.kdfast.direction_backward.default, transposed)


def test_result_does_not_depend_on_threads():
    student, teacher, centers, labels = inputs(700, 300, 9)
    same_for_any_threads(lambda: [direction(student, teacher, centers, labels, balanced=True)])

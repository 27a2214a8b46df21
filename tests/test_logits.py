"""Op logits: the C++ backend against the float64 reference: kinds, shapes, strides, dtypes, hard inputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import needs_extension, same_for_any_threads
from early_checks import called, check_early
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from logit_checks import IGNORED, SETTINGS, check, make, run

import kdfast
from kdfast.ops.logits import logits
from kdfast.reference import logits as reference
from kdfast.reference.logits import KINDS

pytestmark = needs_extension
# One row; two classes; less than a vector; several vectors and a rest; several blocks of 1024; more than one part of
# 32 rows, with threads.
SHAPES = [(1, 2), (1, 7), (5, 2), (3, 5), (7, 100), (3, 16), (2, 2060), (70, 40)]


def labels_of(setting: tuple, y: torch.Tensor, kind: str) -> torch.Tensor | None:
    return y if setting[0] in ("dkd", "nkd") or kind == "ignored" else None


@pytest.mark.parametrize("kind", ["plain", "mean", "saturated", "converged", "rising", "ignored"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_matches_reference(setting, kind) -> None:
    for shape in SHAPES if kind == "plain" else SHAPES[2:7]:
        s, t, y = make(shape, kind)
        check("cpu", s, t, labels_of(setting, y, kind), setting)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_dtypes(dtype, setting) -> None:
    s, t, y = make((9, 133))
    check("cpu", s.to(dtype), t.to(dtype), y, setting)
    check("cpu", s, t.to(dtype), y, setting)
    check("cpu", s.to(dtype), t, y, setting)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_strides(setting) -> None:
    s, t, y = make((2, 6, 4, 21))
    for change in (
        lambda v: v[:, 1:-1, ::2],  # rows that no single stride reaches
        lambda v: v.movedim(-1, 1).contiguous().movedim(1, -1),  # classes of a map [B, K, H, W]
        lambda v: v.transpose(0, 2),
        lambda v: v[:1, :, :1].expand(2, 6, 4, 21),
        lambda v: v[0, 0, 0],  # one row without a row axis
    ):
        changed = change(s)
        labels = y.reshape(-1)[: changed.numel() // 21].reshape(changed.shape[:-1])
        check("cpu", changed, change(t), labels, setting)
    check("cpu", s, t[..., :1, :].expand_as(t), y, setting)
    check("cpu", s[..., ::2], t[..., 3:14], (y % 11), setting)


@given(
    rows=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    classes=st.integers(2, 70),
    order=st.permutations(range(3)),
    step=st.integers(1, 2),
    setting=st.sampled_from(SETTINGS),
    seed=st.integers(0, 999),
)
@settings(max_examples=25, deadline=None)
def test_random_views(rows, classes, order, step, setting, seed) -> None:
    torch.manual_seed(seed)
    # Two rows correlate every column by 1 or -1: DIST's gradient there is the rounding of a difference.
    assume(setting[0] != "dist" or rows[0] * rows[1] != 2)
    shape = (*rows, classes)

    def view() -> torch.Tensor:
        memory = torch.randn([shape[a] * step for a in order])[(slice(None, None, step),) * 3]
        return memory.permute([order.index(a) for a in range(3)])

    check("cpu", view(), view(), torch.randint(0, classes, rows), setting)


def test_vocabulary_of_256k() -> None:
    s, t, y = make((2, 1 << 18))
    for setting in SETTINGS[1::2]:
        check("cpu", s, t, y, setting)


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_counts(kind) -> None:
    s, t, _ = make((3, 5))
    for labels, student, teacher in (
        (torch.full((3,), IGNORED), s, t),
        (torch.zeros(0, dtype=torch.long), s[:0], t[:0]),
    ):
        for backend in ("cpu", "reference"):
            with kdfast.use_backend(backend):
                found = run(lambda a, b, y=labels: logits(a, b, y, kind=kind, alpha=1.0), student, teacher)
            for v in found:
                assert not v.any() and v.isfinite().all()


@pytest.mark.parametrize("kind", ["kl", "dkd"])
def test_equal_logits_are_exactly_zero(kind) -> None:
    s, _, y = make((5, 1500), "mean")
    loss, grad_student, grad_teacher = run(lambda a, b: logits(a, b, y, kind=kind, alpha=1.0), s, s)
    assert loss == 0 and not grad_student.any() and not grad_teacher.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(kind, value) -> None:
    for at in ((0, 0), (1, 1030)):
        s, t, y = make((3, 1040))
        s[at] = value
        assert logits(s, t, y, kind=kind, alpha=1.0).isnan()


def test_ignored_rows_are_not_read() -> None:
    s, t, y = make((6, 40), "ignored")
    s[y == IGNORED] = torch.nan
    for kind in KINDS:
        for v in run(lambda a, b, k=kind: logits(a, b, y, kind=k, alpha=1.0), s, t):
            assert v.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_result_does_not_depend_on_threads(kind) -> None:
    s, t, y = make((100, 700))
    same_for_any_threads(lambda: run(lambda a, b: logits(a, b, y, kind=kind, alpha=1.0), s, t))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_gradcheck_and_second_backward(backend, setting) -> None:
    kind, alpha, beta, temperature = setting
    s, t, y = make((4, 5))
    y[0] = IGNORED
    s, t = s.double().requires_grad_(), t.double().requires_grad_()

    def call(a, b):
        return logits(a, b, y, kind=kind, alpha=alpha, beta=beta, temperature=temperature)

    with kdfast.use_backend(backend):
        # NKD takes the weight of its first term, the teacher's, as a constant: finite differences do not.
        inputs = (s, t) if kind != "nkd" else (s,)
        function = call if kind != "nkd" else lambda a: call(a, t.detach())
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
        if kind == "nkd":
            others = lambda b: logits(s.detach(), b, y, kind="nkd", beta=beta, temperature=temperature)  # noqa: E731
            assert torch.autograd.gradcheck(others, (t,))


def early_call(t: torch.Tensor, y: torch.Tensor, setting: tuple):
    kind, alpha, beta, temperature = setting
    return lambda s: logits(s, t.to(s.dtype), y, kind=kind, alpha=alpha, beta=beta, temperature=temperature)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_early_gradient(monkeypatch, setting) -> None:
    s, t, y = make((4, 5), "ignored")
    check_early(monkeypatch, "logits", early_call(t.double(), y, setting), s.double())
    for shape in ((7, 133), (3, 2060)):
        s, t, y = make(shape, "ignored")
        check_early(monkeypatch, "logits", early_call(t, y, setting), s)
        check_early(monkeypatch, "logits", early_call(t, y, setting), s.bfloat16())
    s, t, y = make((2, 21, 6), "rising")
    s, y = s.movedim(1, 2), y[:, :6]  # classes apart, as of a map [B, K, W]
    check_early(monkeypatch, "logits", early_call(t.movedim(1, 2), y, setting), s)


@pytest.mark.parametrize("kind", ["plain", "mean", "saturated", "converged", "rising", "ignored"])
@pytest.mark.parametrize("setting", [s for s in SETTINGS if s[0] != "dist"], ids=str)
def test_early_gradient_matches_reference(setting, kind) -> None:
    kind_, alpha, beta, temperature = setting
    for shape in (*SHAPES[2:], (3, 1024), (3, 1025), (300, 10)):
        s, t, y = make(shape, kind)
        labels = labels_of(setting, y, kind)
        flags = (KINDS.index(kind_), alpha, beta, temperature, IGNORED)
        loss, gradient = torch.ops.kdfast.logits_with_gradient(s, t, labels, *flags)
        exact = s.double().requires_grad_()
        want = reference.logits(exact, t.double(), labels, *flags)
        (want_gradient,) = torch.autograd.grad(want, exact)
        torch.testing.assert_close(loss.double(), want.detach(), rtol=4e-6, atol=2e-6)
        size = float(want_gradient.abs().max()) + (alpha + beta) / (s.numel() // s.shape[-1])
        torch.testing.assert_close(gradient.double(), want_gradient, rtol=1e-5, atol=4e-6 * size)


@pytest.mark.parametrize("kind", ["plain", "saturated", "rising", "ignored"])
def test_early_gradient_of_dist_is_that_of_two_calls(kind) -> None:
    """They share their arithmetic; :func:`test_matches_reference` holds the two calls to float64."""
    for shape in SHAPES:
        s, t, y = make(shape, kind)
        flags = (KINDS.index("dist"), 1.3, 0.7, 4.0, IGNORED)
        early = torch.ops.kdfast.logits_with_gradient(s, t, y, *flags)
        two, saved = torch.ops.kdfast.logits(s, t, y, *flags)
        one = torch.ones_like(two)
        backward = torch.ops.kdfast.logits_backward(one, s, t, y, saved, *flags, True, False)
        assert torch.equal(early[0], two) and torch.equal(early[1], backward[0])


@pytest.mark.parametrize("classes", [50_000, 50_257, 49_999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_larger_than_the_caches(classes, dtype) -> None:
    """It is streamed: every address is written, at rows that start where no vector does."""
    s, t, _ = make((90 if dtype == torch.float32 else 170, classes))
    s, t = s.to(dtype), t.to(dtype)
    assert s.numel() * s.element_size() >= 1 << 24
    labels = torch.zeros(len(s), dtype=torch.long)
    labels[::17] = IGNORED
    flags = (KINDS.index("kl"), 0.0, 1.0, 2.0, IGNORED)
    for _ in range(2):  # the second call gets memory that the first has written
        loss, gradient = torch.ops.kdfast.logits_with_gradient(s, t, labels, *flags)
        p, q = ((v.double() / 2).softmax(1) for v in (s, t))
        counts = (labels != IGNORED)[:, None]
        want = torch.where(counts, (p - q) / (2 * counts.sum()), 0)
        size = float(want.abs().max())
        allowed = 1e-5 * size if dtype == torch.float32 else 1e-2 * size
        assert float((gradient.double() - want).abs().max()) <= allowed
        gradient.fill_(torch.nan)
        del gradient
    two, saved = torch.ops.kdfast.logits(s, t, labels, *flags)
    torch.testing.assert_close(loss, two)
    backward = torch.ops.kdfast.logits_backward(two.new_tensor(1.0), s, t, labels, saved, *flags, True, True)
    for gradient, sign in zip(backward, (1, -1), strict=True):
        assert gradient.isfinite().all() and not gradient[::17].any()
        if sign == 1:
            assert float((gradient.double() - want).abs().max()) <= allowed


def test_early_gradient_does_not_depend_on_threads() -> None:
    for shape in ((100, 700), (700, 10)):
        given = make(shape)
        same_for_any_threads(
            partial(torch.ops.kdfast.logits_with_gradient, *given, 1, 1.0, 2.0, 3.0, IGNORED)
        )


def test_early_gradient_is_exactly_zero_for_equal_logits() -> None:
    for classes in (10, 1500):
        s, _, y = make((5, classes), "mean")
        for kind in (0, 1):
            loss, gradient = torch.ops.kdfast.logits_with_gradient(s, s, y, kind, 1.0, 1.0, 4.0, IGNORED)
            assert loss == 0 and not gradient.any()


def test_teacher_gradient_takes_two_calls() -> None:
    s, t, _ = make((4, 6))
    t.requires_grad_()
    for student in (s, s.clone().requires_grad_()):
        names = called(lambda s=student: logits(s, t).backward())
        assert names == ["logits", "logits_backward"]


def test_only_needed_gradients() -> None:
    s, t, _ = make((4, 6))
    s.requires_grad_()
    loss = logits(s, t)
    loss.backward(retain_graph=True)
    first = s.grad.clone()
    loss.backward()
    assert torch.equal(s.grad, 2 * first) and t.grad is None
    with torch.no_grad():
        assert not logits(s, t).requires_grad


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("with_labels", [False, True])
def test_opcheck(kind, with_labels) -> None:
    if not with_labels and KINDS[kind] in ("dkd", "nkd"):
        return
    s, t, y = make((2, 3, 7), "ignored")
    labels, flags = y if with_labels else None, (kind, 1.0, 2.0, 3.0, IGNORED)
    torch.library.opcheck(torch.ops.kdfast.logits.default, (s, t, labels, *flags))
    torch.library.opcheck(
        torch.ops.kdfast.logits_with_gradient.default, (s.transpose(0, 1), t.transpose(0, 1), labels, *flags)
    )
    loss, saved = torch.ops.kdfast.logits(s, t, labels, *flags)
    arguments = (
        torch.ones_like(loss),
        s.transpose(0, 1).contiguous().transpose(0, 1),
        t,
        labels,
        saved,
        *flags,
    )
    torch.library.opcheck(torch.ops.kdfast.logits_backward.default, (*arguments, True, False))


def test_wrong_calls_are_refused() -> None:
    s, t, y = make((3, 5))
    with pytest.raises(RuntimeError, match="axis 1 of student has 5, of teacher 4"):
        logits(s, t[:, :4])
    with pytest.raises(RuntimeError, match="need labels|needs labels"):
        logits(s, t, kind="dkd")
    with pytest.raises(RuntimeError, match="label 5 of row 1 is neither a class, 0 to 4"):
        logits(s, t, torch.tensor([0, 5, 1]), kind="dkd")
    with pytest.raises(RuntimeError, match="must be float32"):
        logits(s.int(), t)

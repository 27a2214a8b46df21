"""The CUDA C++ kernels of ``logits`` and ``direction`` on the CPU, by tests/cuda_emulator."""

from __future__ import annotations

import ctypes
import shutil

import direction_checks
import logit_checks
import pytest
import torch
from emulated import compile_emulated
from logit_checks import IGNORED, SETTINGS, make
from torch import Tensor

from kdfast.reference.logits import KINDS

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def structure(name: str, **fields) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


I64, I32, POINTER = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
Rows = structure("Rows", data=POINTER, inner=I64, outer_stride=I64, inner_stride=I64, stride=I64)
Logits = structure(
    "Logits", student=Rows, teacher=Rows, labels=POINTER, rows=I64, classes=I64, ignore_index=I64,
    alpha=ctypes.c_double, beta=ctypes.c_double, temperature=ctypes.c_double, kind=I32, dtype=I32,
)  # fmt: skip
Direction = structure(
    "Direction", student=Rows, teacher=Rows, centers=Rows, labels=POINTER, label_stride=I64, rows=I64, columns=I64,
    classes=I64, ignore_index=I64, dtype=I32, center_dtype=I32, balanced=I32,
)  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    logits, direction = (compile_emulated(op, tmp_path_factory) for op in ("logits", "direction"))
    logits.kd_logits_saved.restype = logits.kd_logits_values.restype = I64
    return {"logits": logits, "direction": direction}


def rows_of(v: Tensor | None) -> Rows:
    """[..., K] with at most two leading axes."""
    if v is None:
        return Rows()
    v = v.reshape(1, -1) if v.dim() == 1 else v
    outer = v.stride(0) if v.dim() == 3 else 0
    return Rows(
        v.data_ptr(), v.shape[-2] if v.dim() == 3 else max(v.shape[0], 1), outer, v.stride(-2), v.stride(-1)
    )


def poison(like: Tensor, *shape: int) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full(shape, float("nan"), dtype=dtype)


def pointer(v: Tensor | None):
    return None if v is None else POINTER(v.data_ptr())


class EmulatedLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, t, labels, setting, library):
        kind, *factors = setting
        problem = Logits(
            rows_of(s), rows_of(t), pointer(labels), s.numel() // s.shape[-1], s.shape[-1], IGNORED, *factors,
            KINDS.index(kind), DTYPES[s.dtype],
        )  # fmt: skip
        loss, saved = poison(s), poison(s, library.kd_logits_saved(ctypes.byref(problem)))
        values = poison(s, library.kd_logits_values(ctypes.byref(problem)))
        arguments = (pointer(loss), pointer(saved), pointer(values))
        assert library.kd_logits_forward(ctypes.byref(problem), *arguments, None) == 0
        ctx.problem, ctx.library, ctx.kept = problem, library, (s, t, labels, saved)
        return loss

    @staticmethod
    def backward(ctx, grad):
        s, t, _, saved = ctx.kept
        need = ctx.needs_input_grad[:2]
        grads = [torch.full_like(v, float("nan")) if n else None for v, n in zip((s, t), need, strict=True)]
        to = [ctypes.byref(rows_of(g)) for g in grads]
        assert (
            ctx.library.kd_logits_backward(
                ctypes.byref(ctx.problem), pointer(grad), pointer(saved), *to, None
            )
            == 0
        )
        return *grads, None, None, None


class EmulatedDirection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, t, c, labels, balanced, library):
        problem = Direction(
            rows_of(s), rows_of(t), rows_of(c), pointer(labels), 0 if labels is None else labels.stride(0),
            *s.shape, c.shape[0], -100, DTYPES[s.dtype], DTYPES[c.dtype], balanced,
        )  # fmt: skip
        loss, total, factors = poison(s), poison(s), poison(s, s.shape[0], 3)
        parts = poison(s, s.shape[0], 2)
        arguments = [pointer(v) for v in (loss, factors, total, parts)]
        assert library.kd_direction_forward(ctypes.byref(problem), *arguments, None) == 0
        ctx.problem, ctx.library, ctx.kept = problem, library, (s, t, c, labels, factors, total)
        return loss

    @staticmethod
    def backward(ctx, grad):
        s, t, _, _, factors, total = ctx.kept
        need = ctx.needs_input_grad[:2]
        grads = [torch.full_like(v, float("nan")) if n else None for v, n in zip((s, t), need, strict=True)]
        to = [ctypes.byref(rows_of(g)) for g in grads]
        arguments = [pointer(v) for v in (grad, factors, total)]
        assert ctx.library.kd_direction_backward(ctypes.byref(ctx.problem), *arguments, *to, None) == 0
        return *grads, None, None, None, None


def check_logits(library, s, t, labels, setting, **more) -> None:
    def call(a, b):
        return EmulatedLogits.apply(a, b, labels, setting, library["logits"])

    logit_checks.check(call, s, t, labels, setting, **more)


def check_direction(library, s, t, c, labels, balanced=False, **more) -> None:
    def call(a, b, centers):
        return EmulatedDirection.apply(a, b, centers, labels, balanced, library["direction"])

    direction_checks.check(call, s, t, c, labels, balanced=balanced, **more)


@pytest.mark.parametrize("kind", ["plain", "mean", "saturated", "converged", "rising", "ignored"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_logits(library, setting, kind):
    # Blocks of 256 threads loop once: 4 elements each.
    for shape in ((1, 2), (3, 5), (4, 16), *([(2, 1100)] if kind in ("plain", "rising") else [])):
        s, t, y = make(shape, kind)
        with_labels = kind == "ignored" or setting[0] in ("dkd", "nkd")
        check_logits(library, s, t, y if with_labels else None, setting)


@pytest.mark.parametrize("setting", SETTINGS[::2], ids=str)
def test_logits_types_and_strides(library, setting):
    s, t, y = make((2, 5, 66))
    check_logits(library, s.double(), t.double(), y, setting, floor=1e-12)
    for dtype in (torch.float16, torch.bfloat16):
        check_logits(library, s.to(dtype), t.to(dtype), y, setting)
    for change in (
        lambda v: v[:, ::2],
        lambda v: v[..., 1:-1],  # rows not at 16 bytes
        lambda v: v[..., ::3],
        lambda v: v.mT.contiguous().mT,
        lambda v: v[:1].expand(2, 5, 66),
    ):
        a, b = change(s), change(t)
        labels = (y % a.shape[-1])[:, :: 2 if a.shape[1] == 3 else 1].contiguous()
        check_logits(library, a, b, labels, setting)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_logits_of_several_blocks(library, setting):
    """Small problems: blocks of 32 rows; dist: more columns than a tile, more rows than the threads of a tile hold."""
    for shape in ((70, 40), (300, 9)):
        s, t, labels = make(shape, "ignored")
        check_logits(library, s, t, labels, setting)
    s, t, labels = make((40, 300))  # dist: not small, its tiles are one launch
    check_logits(library, s, t, labels, setting)


@pytest.mark.parametrize("setting", SETTINGS[1::2], ids=str)
def test_no_row_counts(library, setting):
    s, t, _ = make((3, 5))
    for n in (3, 0):
        a = s[:n].clone().requires_grad_()
        loss = EmulatedLogits.apply(a, t[:n], torch.full((n,), IGNORED), setting, library["logits"])
        assert loss == 0 and not torch.autograd.grad(loss, a)[0].any()


@pytest.mark.parametrize("label", [-1, 5, 2**40])
@pytest.mark.parametrize("kind", ["dkd", "nkd"])
def test_a_wrong_label_of_logits_shows(library, kind, label):
    s, t, _ = make((2, 5))
    s.requires_grad_()
    loss = EmulatedLogits.apply(s, t, torch.tensor([1, label]), (kind, 1.0, 1.0, 2.0), library["logits"])
    assert loss.isnan()
    assert torch.autograd.grad(loss, s)[0][1].isnan().any()


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (9, 67, 4), (70, 16, 6), (5, 2500, 3)])
def test_direction(library, shape, balanced):
    s, t, c, y = direction_checks.inputs(*shape, mean=1)
    check_direction(library, s, t, c, y, balanced)
    check_direction(library, s, None, c, y, balanced, floor=3e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_direction_types(library, dtype):
    s, t, c, y = direction_checks.inputs(7, 40, 4, dtype)
    floor = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps
    check_direction(library, s, t, c, y, floor=floor)
    if dtype != torch.float64:
        check_direction(library, s, t, c.float(), y, floor=floor)


def test_direction_centres_per_sample_and_strides(library):
    s, t, c, y = direction_checks.inputs(7, 35, 4, labelled=False)
    check_direction(library, s, t, c, y)
    s, t, c, y = direction_checks.inputs(14, 70, 4)
    check_direction(library, s[::2, ::2], t.T.contiguous().T[::2, 1::2], c[:, ::2], y[::2])
    check_direction(library, s[:1].expand(14, 70), t, c, y, balanced=True)


def test_direction_degenerate(library):
    s, t, c, y = direction_checks.inputs(9, 6, 4)
    y[:4] = torch.arange(4)
    s[0], s[1], t[1], c[2] = 0, 0, 0, 0
    for balanced in (False, True):
        check_direction(library, s, t, c, y, balanced)
    a = s.clone().requires_grad_()
    for n, labels in ((9, torch.full_like(y, -100)), (0, y[:0])):
        loss = EmulatedDirection.apply(a[:n], t[:n], c, labels, False, library["direction"])
        assert loss == 0 and not torch.autograd.grad(loss, a)[0].any()
    for label in (-1, 4, 2**40):
        for balanced in (False, True):
            wrong = y.clone()
            wrong[3] = label
            assert EmulatedDirection.apply(s, t, c, wrong, balanced, library["direction"]).isnan()

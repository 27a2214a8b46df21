"""The Triton kernels of ``logits`` in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret."""

from __future__ import annotations

import pytest
import torch
from logit_checks import IGNORED, SETTINGS, check, make

from kdfast import backend, use_backend
from kdfast.ops.logits import logits

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not backend.interpreting(), reason="needs TRITON_INTERPRET=1"),
]


@pytest.mark.parametrize("kind", ["plain", "mean", "saturated", "converged", "rising", "ignored"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_matches_reference(setting, kind) -> None:
    for shape in ((1, 2), (3, 5), (4, 16), (2, 2100)):
        s, t, y = make(shape, kind)
        check("triton", s, t, y if kind == "ignored" or setting[0] != "kl" else None, setting)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_float64_and_float16(setting) -> None:
    s, t, y = make((3, 33))
    check("triton", s.double(), t.double(), y, (*setting[:3], 3.0), floor=1e-13)
    check("triton", s.half(), t, y, setting)


def test_strides() -> None:
    s, t, y = make((2, 6, 4, 21))
    for change in (
        lambda v: v[:, 1:-1, ::2],
        lambda v: v.movedim(-1, 1).contiguous().movedim(1, -1),
        lambda v: v.transpose(0, 2),
        lambda v: v[:1, :, :1].expand(2, 6, 4, 21),
        lambda v: v[0, 0, 0],
    ):
        changed = change(s)
        labels = y.reshape(-1)[: changed.numel() // 21].reshape(changed.shape[:-1])
        check("triton", changed, change(t), labels, SETTINGS[2])


def test_no_row_counts() -> None:
    s, t, _ = make((3, 5))
    s.requires_grad_()
    with use_backend("triton"):
        for n in (3, 0):
            for kind in ("dkd", "dist"):
                loss = logits(s[:n], t[:n], torch.full((n,), IGNORED), kind=kind, alpha=1.0)
                (gradient,) = torch.autograd.grad(loss, s)
                assert loss == 0 and not gradient.any()


def test_a_label_out_of_range_shows() -> None:
    s, t, _ = make((2, 5))
    with use_backend("triton"):
        for kind in ("dkd", "nkd"):
            assert logits(s, t, torch.tensor([1, 5]), kind=kind, alpha=1.0).isnan()


@pytest.mark.parametrize("labelled", [False, True])
def test_dist_joins_parts_of_columns(labelled) -> None:
    s, t, y = make((70, 20), "ignored")
    check("triton", s, t, y if labelled else None, ("dist", 1.3, 0.7, 2.0))
    check("triton", *(v[:1].expand(70, 20) for v in (s, t)), None, ("dist", 1.3, 0.7, 1.0))


@pytest.mark.parametrize("kind", ["plain", "saturated", "rising", "ignored"])
@pytest.mark.parametrize("setting", SETTINGS[:6], ids=str)
def test_programs_that_share_a_row(monkeypatch, setting, kind) -> None:
    """4 splits of 3 or 4 tiles each, the last shorter; 7 rows, which finish_rows joins 2 at a time."""
    from kdfast.kernels import logits as kernels

    for size in (2, 4, 8):
        monkeypatch.setitem(kernels.FORWARD_TILE, size, (2, 16, 1))
    monkeypatch.setattr(kernels, "PROGRAMS", 28)
    monkeypatch.setattr(kernels, "JOINED", 8)
    s, t, y = make((7, 440), kind)
    labels = y if kind == "ignored" or setting[0] != "kl" else None
    check("triton", s, t, labels, setting)
    if kind == "plain":
        check("triton", s.double(), t.double(), y, setting, floor=1e-13)
        check("triton", s[:, ::2].bfloat16(), t[:, ::2].bfloat16(), y // 2, setting)

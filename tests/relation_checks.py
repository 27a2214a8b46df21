"""What holds for every relation of queries [B, d, n], keys [B, d, m] and values [B, e, m], whichever op makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from conftest import assert_as_accurate
from torch import Tensor

from kdfast import use_backend

Relation = Callable[[Tensor, Tensor, Tensor], Tensor]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FORMATS = pytest.mark.parametrize("last", [False, True])
NEEDED = pytest.mark.parametrize(
    "needed",
    [
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (False, True, True),
        (True, False, True),
    ],
)


def inputs(batch, d, e, n, m, dtype=torch.float32, last=False) -> list[Tensor]:
    """Queries [B, d, n], keys [B, d, m], values [B, e, m]; with ``last``, channels are neighbours."""
    generator = torch.Generator().manual_seed(d + e + n + m)
    made = []
    for shape in ((batch, d, n), (batch, d, m), (batch, e, m)):
        x = torch.randn(shape, generator=generator).to(dtype)
        made.append(x.mT.contiguous().mT if last else x)
    return made


def run(call: Relation, values: Sequence[Tensor], last: bool = False) -> list[Tensor]:
    """The relation and the gradients of all three."""
    values = [v.detach().requires_grad_() for v in values]
    y = call(*values)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    up = up.mT.contiguous().mT if last else up
    return [y.detach(), *torch.autograd.grad(y, values, up)]


def check(
    call: Relation, dense: Relation, values: Sequence[Tensor], last: bool = False, room: float = 0
) -> list[Tensor]:
    """Against the matrix of all pairs in float64, as accurate as it is; memory that is not written is NaN.

    ``room``: how many times the matrix form's error more, where one rounding of large exponents makes all of it.
    """
    truth, same = run(dense, [v.double() for v in values], last), run(dense, values, last)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = run(call, values, last)
    finally:
        torch.use_deterministic_algorithms(before)
    for f, s, t in zip(found, same, truth, strict=True):
        assert f.shape == t.shape and f.dtype == s.dtype
        if not t.numel():
            continue
        eps = {torch.float32: 2e-6, torch.float64: 1e-13}.get(f.dtype, torch.finfo(f.dtype).eps)
        floor = eps * max(float(t.abs().max()), 1) + room * float((s.double() - t).abs().max())
        assert_as_accurate(f, t, s, floor, "relation")
    return found


def mixed_formats(values: Sequence[Tensor], lasts: Sequence[bool]) -> list[Tensor]:
    return [v.mT.contiguous().mT if last else v for v, last in zip(values, lasts, strict=True)]


def strided(sizes: Sequence[int]) -> list[list[Tensor]]:
    """Inputs that are no dense maps."""
    query, key, value = inputs(*sizes)
    return [
        [query[:, ::2], key[:, 1::2], value.flip(2)],
        [query[..., 7:], key[:1].expand_as(key), value[:, :1].expand_as(value)],
        [query[..., ::3], key[..., ::2], value[..., ::2]],
    ]


def check_expanded_upstream(call: Relation, dense: Relation, values: Sequence[Tensor]) -> None:
    """One number, expanded, comes back as the gradient."""
    values = [v.requires_grad_() for v in values]
    found = torch.autograd.grad(call(*values).sum(), values)
    wide = [v.detach().double().requires_grad_() for v in values]
    for f, t in zip(found, torch.autograd.grad(dense(*wide).sum(), wide), strict=True):
        torch.testing.assert_close(f.double(), t, rtol=1e-4, atol=1e-5 * max(1.0, float(t.abs().max())))


def check_gradients(call: Relation, last: bool) -> None:
    values = [v.requires_grad_() for v in inputs(2, 3, 2, 7, 5, torch.float64, last)]
    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)
    assert torch.autograd.gradgradcheck(lambda x: call(x, x, x), [values[1]])  # one map thrice


def check_needed(call: Relation, values: Sequence[Tensor], needed: Sequence[bool]) -> None:
    """Alone, gradients are what they are together."""
    whole = run(call, values)[1:]
    values = [v.requires_grad_(need) for v, need in zip(values, needed, strict=True)]
    y = call(*values)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float())
    for v, w, need in zip(values, whole, needed, strict=True):
        assert torch.equal(v.grad, w) if need else v.grad is None


def check_backward_again(call: Relation, values: Sequence[Tensor]) -> None:
    """A second backward, a scaled one, and one whose results were overwritten before."""
    values = [v.requires_grad_() for v in values]
    y = call(*values)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    first = torch.autograd.grad(y, values, up, retain_graph=True)
    kept = [v.clone() for v in first]
    for v in first:
        v.fill_(torch.nan)
    for factor in (1, -2):
        for f, k in zip(torch.autograd.grad(y, values, factor * up, retain_graph=True), kept, strict=True):
            torch.testing.assert_close(f, factor * k)


def check_compiles(relation: Relation, values: Sequence[Tensor]) -> None:
    values = [v.requires_grad_() for v in values]
    expected = torch.autograd.grad(relation(*values).square().sum(), values)
    total = torch.compile(lambda *v: relation(*v).square().sum(), fullgraph=True)
    for f, e in zip(torch.autograd.grad(total(*values), values), expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5 * float(e.abs().max()))


def check_who_computes(relation: Relation, values: Sequence[Tensor], node: str) -> None:
    """The op, whose autograd node is named ``node``, but PyTorch on the reference backend and under autocast."""

    def own() -> bool:
        return node in type(relation(*values).grad_fn.next_functions[0][0]).__name__

    values = [v.requires_grad_() for v in values]
    assert own()
    with use_backend("reference"):
        assert not own()
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 as it is
        wide = values[0].dtype == torch.float64
        assert relation(*values).dtype == (torch.float64 if wide else torch.bfloat16)
    with torch.no_grad():
        assert not relation(*values).requires_grad

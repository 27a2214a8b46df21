"""Losses on Grams against their formulas, written out naively here; torch.compile; bad input."""

from __future__ import annotations

import pytest
import torch
from early_checks import called
from torch import Tensor

import kdfast
from kdfast import backend

BACKENDS = [name for name in ("reference", "cpu") if backend.why_not(name) is None]


@pytest.fixture(params=BACKENDS)
def on_backend(request):
    with kdfast.use_backend(request.param):
        yield request.param


def centred_grams(x: Tensor, y: Tensor, centered: bool = True) -> tuple[Tensor, Tensor]:
    x, y = x.flatten(1).double(), y.flatten(1).double()
    h = torch.eye(len(x), dtype=torch.float64) - centered / len(x)
    return h @ x @ x.T @ h, h @ y @ y.T @ h


def cka(k: Tensor, l: Tensor) -> Tensor:
    return torch.trace(k @ l.T) / (torch.trace(k @ k.T) * torch.trace(l @ l.T)).sqrt()


def close(got: Tensor, want: Tensor, tolerance: float = 2e-6) -> None:
    assert got.dtype == torch.float32 and got.shape == ()
    got, want = got.detach(), want.detach()
    assert abs(float(got) - float(want)) <= tolerance * max(1.0, abs(float(want))), (float(got), float(want))


def gradients_match(loss, formula, *inputs: Tensor, tolerance: float = 1e-5) -> None:
    """Values and all gradients of ``loss`` equal those of ``formula`` in float64."""
    inputs = [v.detach().requires_grad_() for v in inputs]
    exact = [v.detach().double().requires_grad_() for v in inputs]
    got, want = loss(*inputs), formula(*exact)
    close(got, want.detach())
    for g, w in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, exact), strict=True):
        assert float((g - w).abs().max()) <= tolerance * float(w.abs().max()), float(
            (g - w).abs().max() / w.abs().max()
        )


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shapes", [((12, 7), (12, 30)), ((9, 3, 4, 5), (9, 2, 2, 2)), ((40, 6), (40, 5))])
def test_cka(on_backend, centered, shapes) -> None:
    x, y = (torch.randn(s) + 3 for s in shapes)
    formula = lambda x, y: 1 - cka(*centred_grams(x, y, centered))  # noqa: E731
    gradients_match(kdfast.CKALoss(centered=centered), formula, x, y)
    close(kdfast.linear_cka(x, y, centered=centered), 1 - formula(x, y))


def test_cka_invariances(on_backend) -> None:
    x, y = torch.randn(20, 16), torch.randn(20, 9)
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    close(kdfast.linear_cka(x @ rotation * 7 + 5, y), kdfast.linear_cka(x, y), 1e-5)
    close(kdfast.linear_cka(x, -3 * x), torch.tensor(1.0))


@pytest.mark.parametrize("centered", [True, False])
def test_row_norms(on_backend, centered) -> None:
    def row(x, y):
        grams = centred_grams(x, y, centered)
        return 1 - cka(*(k / k.diagonal().sqrt()[:, None] for k in grams))

    def cosine(x, y):
        unit = torch.nn.functional.normalize
        return 1 - cka(*centred_grams(unit(x, dim=1), unit(y, dim=1), centered))

    x, y = torch.randn(11, 8), torch.randn(11, 5)
    gradients_match(kdfast.CKALoss(centered=centered, row_norm="row"), row, x, y, tolerance=3e-5)
    gradients_match(kdfast.CKALoss(centered=centered, row_norm="cosine"), cosine, x, y, tolerance=3e-5)


def test_debiased(on_backend) -> None:
    def hsic(k, l):
        n = len(k)
        k, l = k - k.diagonal().diag(), l - l.diagonal().diag()
        return ((k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ l).sum()) / (
            n * (n - 3)
        )

    def formula(x, y):
        k, l = centred_grams(x, y, centered=False)
        return 1 - hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()

    x, y = torch.randn(10, 8), torch.randn(10, 40)
    for centered in (True, False):  # which changes nothing, large means included
        gradients_match(kdfast.CKALoss(debiased=True, centered=centered), formula, x, y, tolerance=3e-5)
        loss = kdfast.CKALoss(debiased=True, centered=centered)
        gradients_match(loss, formula, x + 30, y - 20, tolerance=1e-4)


def both_terms(x: Tensor, y: Tensor, centered: bool = True) -> Tensor:
    return 2 - cka(*centred_grams(x, y, centered)) - cka(*centred_grams(x.T, y.T, centered))


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", [(6, 11), (16, 5), (7, 7)])
def test_logit_cka(on_backend, centered, shape) -> None:
    x, y = torch.randn(shape) + 2, torch.randn(shape)
    gradients_match(kdfast.LogitCKALoss(centered=centered), lambda x, y: both_terms(x, y, centered), x, y)
    intra_only = kdfast.LogitCKALoss(inter_weight=0, centered=centered)
    gradients_match(intra_only, lambda x, y: 1 - cka(*centred_grams(x, y, centered)), x, y)
    soft = kdfast.LogitCKALoss(temperature=4.0, intra_weight=2.0, inter_weight=0.0)
    close(soft(x, y), 2 * (1 - cka(*centred_grams((x / 4).softmax(1), (y / 4).softmax(1)))), 1e-5)


def test_official_logit_cka(on_backend) -> None:
    """The published code: uncentred, rows of the Gram divided by the root of its diagonal, for both terms."""

    def formula(x, y):
        def score(x, y):
            return cka(*(k / k.diagonal().sqrt()[:, None] for k in centred_grams(x, y, False)))

        return 2 - score(x, y) - score(x.T, y.T)

    loss = kdfast.LogitCKALoss(centered=False, row_norm="row")
    gradients_match(loss, formula, torch.randn(8, 13), torch.randn(8, 13), tolerance=3e-5)


def test_rcka(on_backend) -> None:
    features = [torch.randn(8, 4, 6, 6), torch.randn(8, 10)], [torch.randn(8, 3, 5, 5), torch.randn(8, 12)]
    logits = torch.randn(8, 5), torch.randn(8, 5)
    want = sum(1 - cka(*centred_grams(s, t)) for s, t in zip(*features, strict=True)) + 15 * both_terms(
        *logits
    )
    close(kdfast.RCKALoss()(*features, *logits), want, 1e-5)


def test_gram_mmd(on_backend) -> None:
    x, y = torch.randn(9, 6) + 1, torch.randn(9, 4) + 1

    def unit_grams(x, y):
        return (k / k.norm() for k in centred_grams(x, y, False))

    def bound(x, y):
        k, l = unit_grams(x, y)
        return 81 / 2 * (k.mean() - l.mean()) ** 2

    def author(x, y):
        k, l = (torch.nn.functional.normalize(k, dim=1) for k in centred_grams(x, y, False))
        return 1 / 9 + ((k - l) ** 2).mean() - 0.5 * (k**2 + l**2).mean()

    gradients_match(kdfast.GramMMDLoss(kind="gram"), bound, x, y, tolerance=1e-4)
    gradients_match(kdfast.GramMMDLoss(kind="author"), author, x, y, tolerance=3e-5)
    upper = kdfast.GramMMDLoss(kind="upper")
    gradients_match(upper, lambda x, y: 1 - cka(*centred_grams(x, y, False)), x, y)
    assert upper(x, y) >= kdfast.GramMMDLoss(kind="gram")(x, y)  # Theorem 2 with its constants put right


def test_similarity_preserving(on_backend) -> None:
    def formula(x, y):
        k, l = (torch.nn.functional.normalize(k, dim=1) for k in centred_grams(x, y, False))
        return (k - l).square().sum() / len(x) ** 2

    gradients_match(
        kdfast.SimilarityPreservingLoss(),
        formula,
        torch.randn(7, 2, 3, 3),
        torch.randn(7, 11),
        tolerance=3e-5,
    )


@pytest.mark.parametrize("channels", [(3, 5), (40, 40)])
def test_pairwise_affinity(on_backend, channels) -> None:
    """Few channels: C x C products; many: N x N Grams."""

    def formula(x, y):
        a, b = (torch.nn.functional.normalize(v, dim=1).flatten(2) for v in (x, y))
        return (a.mT @ a - b.mT @ b).square().mean()

    x, y = (torch.randn(2, c, 3, 4) for c in channels)
    gradients_match(kdfast.PairwiseAffinityLoss(), formula, x, y, tolerance=3e-5)


def test_gram_products(on_backend) -> None:
    x, y = torch.randn(3, 6, 5, requires_grad=True), torch.randn(3, 6, 4)
    products = kdfast.gram_products(x, y)
    for g in range(3):
        k, l = centred_grams(x[g].detach(), y[g])
        for got, want in zip(products, ((k * l).sum(), (k * k).sum(), (l * l).sum()), strict=True):
            assert abs(float(got[g] - want)) <= 1e-5 * abs(float(want))
    score = (products.xy / (products.xx * products.yy).sqrt()).sum()
    want = sum(cka(*centred_grams(a, b)) for a, b in zip(x.detach(), y, strict=True))
    close(score.detach(), want)
    score.backward()
    through_products, x.grad = x.grad, None
    sum(kdfast.linear_cka(a, b) for a, b in zip(x, y, strict=True)).backward()
    assert torch.allclose(x.grad, through_products, atol=1e-6)


LOSSES = {
    "cka": lambda x, y: kdfast.CKALoss()(x, y),
    "logit cka": lambda x, y: kdfast.LogitCKALoss()(x, y),
    "rcka": lambda x, y: kdfast.RCKALoss()([x, x], [y, y], x, y),
    "mmd": lambda x, y: kdfast.GramMMDLoss()(x, y),
    "sp": lambda x, y: kdfast.SimilarityPreservingLoss()(x, y),
    "pairwise": lambda x, y: kdfast.PairwiseAffinityLoss()(x.view(2, 3, 2, 3), y.view(2, 3, 2, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_compile_fullgraph(on_backend, name) -> None:
    torch.compiler.reset()
    x, y = torch.randn(6, 6, requires_grad=True), torch.randn(6, 6)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    value, want = compiled(x, y), LOSSES[name](x, y)
    assert torch.allclose(value, want, atol=1e-6)
    (gradient,), (wanted,) = torch.autograd.grad(value, x), torch.autograd.grad(want, x)
    assert torch.allclose(gradient, wanted, atol=1e-6)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_mixed_precision(on_backend, dtypes) -> None:
    x, y = torch.randn(16, 300).to(dtypes[0]).requires_grad_(), torch.randn(16, 300).to(dtypes[1])
    loss = kdfast.CKALoss()(x, y)
    close(loss.detach(), 1 - cka(*centred_grams(x.detach(), y)))
    loss.backward()
    assert x.grad.dtype == dtypes[0] and x.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        close(kdfast.CKALoss()(x.float(), y.float()).detach(), loss.detach())


def test_channels_last_is_read_in_place(on_backend) -> None:
    x, y = torch.randn(5, 4, 3, 6), torch.randn(5, 7, 2, 2)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    loss = kdfast.CKALoss()(last, y)
    close(loss.detach(), kdfast.CKALoss()(x, y))
    loss.backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the extension")
def test_one_op_where_the_student_alone_learns() -> None:
    samples, maps = torch.randn(6, 5), torch.randn(6, 4, 3, 2)
    for loss, x in (
        (kdfast.CKALoss(), maps),
        (kdfast.LogitCKALoss(), samples),
        (kdfast.SimilarityPreservingLoss(), maps),
        (kdfast.GramMMDLoss(), samples),
        (kdfast.PairwiseAffinityLoss(), maps),
    ):
        student = torch.randn_like(x).requires_grad_()
        assert called(lambda loss=loss, s=student, t=x: loss(s, t).backward()) == ["gram_with_gradient"]


def test_bad_input_is_named() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"equally many samples.*\[4, 3\].*\[5, 3\]"):
        kdfast.CKALoss()(x, torch.randn(5, 3))
    with pytest.raises(TypeError, match="teacher: need a floating point tensor, got.*int64"):
        kdfast.CKALoss()(x, x.long())
    with pytest.raises(TypeError, match="student: need a tensor, got list"):
        kdfast.linear_cka([[1.0]], x)
    with pytest.raises(ValueError, match="one device"):
        kdfast.CKALoss()(x, x.to("meta"))
    with pytest.raises(ValueError, match=r"equally many classes.*\[4, 3\].*\[4, 2\]"):
        kdfast.LogitCKALoss()(x, x[:, :2])
    with pytest.raises(ValueError, match="row_norm: got 'rows'"):
        kdfast.CKALoss(row_norm="rows")
    with pytest.raises(ValueError, match="levels"):
        kdfast.CKALoss()([x], [x, x])
    with pytest.raises(ValueError, match=r"x: need \[groups, rows, features\]"):
        kdfast.gram_products(x, x)
    with pytest.raises(ValueError, match="temperature"):
        kdfast.LogitCKALoss(temperature=0)


def test_wrong_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast'"):
        kdfast.use_backend("fast")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="cuda"):
            kdfast.use_backend("cuda")
    assert kdfast.info()["backends"]["reference"] == "available"


def test_compiled_reference_has_the_gradient_of_row_norms() -> None:
    """Inductor gets the backward of a batched diagonal wrong when only the student needs a gradient."""
    torch.compiler.reset()
    loss = kdfast.CKALoss(centered=False, row_norm="row")
    x, y = torch.randn(20, 7, requires_grad=True), torch.randn(20, 7)
    with kdfast.use_backend("reference"):
        (want,) = torch.autograd.grad(loss(x, y), x)
        (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, dynamic=False)(x, y), x)
    assert torch.allclose(got, want, atol=1e-6)

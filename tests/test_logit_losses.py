"""Losses on logits against their formulas, written out naively here; drop-ins; compile; bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kdfast
from kdfast import backend
from kdfast.compat import dist as compat_dist
from kdfast.compat import mdistiller, nd
from kdfast.compat._dist import DISTLoss as MMRazorDIST
from kdfast.losses.logits import DISTLoss, DKDLoss, KDLoss, NKDLoss

BACKENDS = [name for name in ("reference", "cpu") if backend.why_not(name) is None]


@pytest.fixture(params=BACKENDS)
def on_backend(request):
    with kdfast.use_backend(request.param):
        yield request.param


def inputs(*shape: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    return scale * torch.randn(shape), scale * torch.randn(shape), torch.randint(0, shape[-1], shape[:-1])


def gradients_match(
    loss, formula, s: Tensor, t: Tensor, tolerance: float = 1e-5, teacher: bool = True
) -> None:
    """Values and gradients equal those of ``formula`` in float64."""
    needed = 2 if teacher else 1
    leaves = [v.detach().requires_grad_() for v in (s, t)]
    exact = [v.detach().double().requires_grad_() for v in (s, t)]
    got, want = loss(*leaves), formula(*exact)
    assert got.dtype == torch.float32 and got.shape == ()
    assert abs(float(got.detach()) - float(want.detach())) <= 2e-6 * max(1.0, abs(float(want.detach())))
    gradients = torch.autograd.grad(got, leaves[:needed]), torch.autograd.grad(want, exact[:needed])
    for g, w in zip(*gradients, strict=True):
        assert float((g - w).abs().max()) <= tolerance * float(w.abs().max()) + 5e-7


def kd(s, t, T):
    p, q = ((v / T).softmax(-1) for v in (s, t))
    return T**2 * (q * (q.log() - p.log())).sum(-1).mean()


def dkd(s, t, y, alpha, beta, T):
    total = 0
    for b in range(len(s)):
        p, q = (s[b] / T).softmax(0), (t[b] / T).softmax(0)
        py, qy, others = p[y[b]], q[y[b]], torch.arange(s.shape[1]) != y[b]
        tckd = qy * (qy / py).log() + (1 - qy) * ((1 - qy) / (1 - py)).log()
        ph, qh = p[others] / p[others].sum(), q[others] / q[others].sum()
        total = total + alpha * tckd + beta * (qh * (qh / ph).log()).sum()
    return T**2 * total / len(s)


def nkd(s, t, y, gamma, T):
    total = 0
    for b in range(len(s)):
        others = torch.arange(s.shape[1]) != y[b]
        ph, qh = ((v[b] / T)[others].softmax(0) for v in (s, t))
        target = t[b].softmax(0)[y[b]].detach() * s[b].softmax(0)[y[b]].log()
        total = total - target - gamma * T**2 * (qh * ph.log()).sum()
    return total / len(s)


def dist(s, t, beta, gamma, T):
    def rho(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / (a.norm() * b.norm() + 1e-8)

    p, q = (s / T).softmax(1), (t / T).softmax(1)
    inter = 1 - torch.stack([rho(a, b) for a, b in zip(p, q, strict=True)]).mean()
    intra = 1 - torch.stack([rho(a, b) for a, b in zip(p.T, q.T, strict=True)]).mean()
    return T**2 * (beta * inter + gamma * intra)


@pytest.mark.parametrize("shape", [(1, 2), (6, 10), (33, 100)])
@pytest.mark.parametrize("T", [1.0, 4.0])
def test_kd(on_backend, shape, T) -> None:
    s, t, _ = inputs(*shape)
    gradients_match(KDLoss(T), lambda a, b: kd(a, b, T), s, t)
    gradients_match(KDLoss(T, weight=0.3), lambda a, b: 0.3 * kd(a, b, T), s, t)


@pytest.mark.parametrize("shape", [(1, 2), (6, 10), (33, 100)])
@pytest.mark.parametrize(
    ("alpha", "beta", "T"), [(1.0, 8.0, 4.0), (1.0, 0.5, 1.0), (0.0, 1.0, 2.0), (1.0, 0.0, 2.0)]
)
def test_dkd(on_backend, shape, alpha, beta, T) -> None:
    if alpha == 0 and shape[1] == 2:
        return  # one other class: no loss and no gradient
    s, t, y = inputs(*shape)
    gradients_match(
        lambda a, b: DKDLoss(alpha, beta, T)(a, b, y), lambda a, b: dkd(a, b, y, alpha, beta, T), s, t
    )


@pytest.mark.parametrize("shape", [(6, 3), (6, 10), (33, 100)])
@pytest.mark.parametrize(("gamma", "T"), [(1.5, 1.0), (3.5, 3.0)])
def test_nkd(on_backend, shape, gamma, T) -> None:
    s, t, y = inputs(*shape)
    gradients_match(lambda a, b: NKDLoss(gamma, T)(a, b, y), lambda a, b: nkd(a, b, y, gamma, T), s, t)


@pytest.mark.parametrize("shape", [(6, 10), (33, 100)])
@pytest.mark.parametrize(("beta", "gamma", "T"), [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0), (0.0, 1.0, 2.0)])
def test_dist(on_backend, shape, beta, gamma, T) -> None:
    s, t, _ = inputs(*shape)
    gradients_match(DISTLoss(beta, gamma, T), lambda a, b: dist(a, b, beta, gamma, T), s, t, 3e-5)


def test_ignored_rows_do_not_count(on_backend) -> None:
    s, t, y = inputs(8, 5)
    kept = torch.tensor([0, 3, 4, 6])
    masked = torch.full_like(y, 255)
    masked[kept] = y[kept]
    for loss in (
        KDLoss(ignore_index=255),
        DKDLoss(ignore_index=255),
        NKDLoss(ignore_index=255),
        DISTLoss(ignore_index=255),
    ):
        gradients_match(
            lambda a, b, f=loss: f(a, b, masked),
            lambda a, b, f=loss: f(a[kept], b[kept], y[kept]).double(),
            s,
            t,
        )


def test_saturated_logits_stay_exact(on_backend) -> None:
    """Log of the summed probabilities of the other classes is log 0 here; the published code gives inf or nan."""
    s = torch.tensor([[150.0, 0.0, 1.0], [0.0, 90.0, 2.0]])
    t = torch.tensor([[200.0, 1.0, 0.0], [120.0, 0.0, 1.0]])
    y = torch.tensor([0, 1])
    for loss in (DKDLoss(temperature=1.0), NKDLoss()):
        for teacher in (t, t.flip(1)):
            student = s.clone().requires_grad_()
            value = loss(student, teacher, y)
            value.backward()
            assert value.isfinite() and student.grad.isfinite().all()
    # Both saturated at the target: KL(q̂ ‖ p̂) of the two others is what is left.
    want = 8 * F.kl_div(s[:1, 1:].log_softmax(1), t[:1, 1:].log_softmax(1), log_target=True, reduction="sum")
    got = DKDLoss(temperature=1.0)(s[:1], t[:1], y[:1])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_leading_axes_and_slices(on_backend) -> None:
    """A language model's shifted logits; the logits of a segmentation map."""
    s, t, y = inputs(3, 7, 11)
    for loss in (KDLoss(), DKDLoss(), NKDLoss(), DISTLoss()):
        flat = loss(s[:, :-1].reshape(-1, 11), t[:, :-1].reshape(-1, 11), y[:, 1:].reshape(-1))
        torch.testing.assert_close(loss(s[:, :-1], t[:, :-1], y[:, 1:]), flat)
        maps = [v.movedim(-1, 1).contiguous().movedim(1, -1) for v in (s, t)]
        torch.testing.assert_close(loss(*maps, y), loss(s, t, y))


def test_vocabularies_of_different_size(on_backend) -> None:
    s, t = torch.randn(4, 12, requires_grad=True), torch.randn(4, 10)
    with pytest.raises(ValueError, match=r"\[4, 12\].*\[4, 10\]") as raised:
        KDLoss()(s, t)
    assert "vocabulary='truncate'" in str(raised.value)
    value = KDLoss(vocabulary="truncate")(s, t)
    torch.testing.assert_close(value, KDLoss()(s[:, :10], t))
    value.backward()
    assert not s.grad[:, 10:].any() and s.grad[:, :10].any()


def test_published_functions(on_backend) -> None:
    s, t, y = inputs(9, 20)
    torch.testing.assert_close(mdistiller.kd_loss(s, t, 4.0), kd(s, t, 4.0))
    torch.testing.assert_close(mdistiller.dkd_loss(s, t, y, 1.0, 8.0, 4.0), dkd(s, t, y, 1.0, 8.0, 4.0))
    torch.testing.assert_close(nd.KDLoss(2.5, 3.0)(s_out=s, t_out=t), 2.5 * kd(s, t, 3.0))
    torch.testing.assert_close(
        nd.DKDLoss(2.0, 4.0, 3.0)(s_logits=s, t_logits=t, labels=y), dkd(s, t, y, 2.0, 4.0, 3.0)
    )
    torch.testing.assert_close(compat_dist.DIST(2.0, 3.0)(z_s=s, z_t=t), dist(s, t, 2.0, 3.0, 1.0))


def test_mmrazor_dist(on_backend) -> None:
    s, t, _ = inputs(9, 20)
    t.requires_grad_()
    got = MMRazorDIST(2.0, 3.0, tau=4.0, loss_weight=0.5)(logits_S=s.requires_grad_(), logits_T=t)
    torch.testing.assert_close(got, 0.5 * dist(s, t, 2.0, 3.0, 4.0))
    got.backward()
    assert s.grad.any() and t.grad is None
    maps = [v.detach()[:8].view(2, 2, 2, 20).movedim(-1, 1) for v in (s, t)]
    torch.testing.assert_close(MMRazorDIST()(*maps), dist(s[:8], t[:8], 1.0, 1.0, 1.0).detach())


def test_mdistiller_features() -> None:
    s = [torch.randn(3, 4, 8, 8).abs(), torch.randn(3, 6, 4, 4).abs()]
    t = [torch.randn(3, 5, 4, 4).abs(), torch.randn(3, 6, 4, 4).abs()]

    def attention(x, p):
        f = (x**p).mean(1).flatten(1)
        return f / f.norm(dim=1, keepdim=True)

    want = (
        (attention(s[0].unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)), 2) - attention(t[0], 2)).pow(2).mean()
    )
    want = want + (attention(s[1], 2) - attention(t[1], 2)).pow(2).mean()
    torch.testing.assert_close(mdistiller.at_loss(s, t, 2), want)

    def blocks(x, n):
        return x.unflatten(3, (n, -1)).unflatten(2, (n, -1)).mean((3, 5))

    a, b = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    level = sum(
        w * ((blocks(a, n) - blocks(b, n)) ** 2).mean() for n, w in ((8, 1), (4, 0.5), (2, 0.25), (1, 0.125))
    )
    c, d = torch.randn(2, 5, 1, 1), torch.randn(2, 5, 1, 1)
    torch.testing.assert_close(mdistiller.hcl_loss([a, c], [b, d]), level / 1.875 + ((c - d) ** 2).mean())
    grams = [F.normalize(v.flatten(1) @ v.flatten(1).T, dim=1) for v in (s[1], t[1])]
    torch.testing.assert_close(mdistiller.sp_loss(s[1:], t[1:]), (grams[0] - grams[1]).pow(2).sum() / 9)


@pytest.mark.parametrize(
    "loss", [KDLoss(), DKDLoss(), NKDLoss(temperature=2.0), DISTLoss()], ids=lambda f: type(f).__name__
)
def test_compiles_whole(on_backend, loss) -> None:
    s, t, y = inputs(6, 9)
    results = []
    for f in (loss, torch.compile(loss, fullgraph=True)):
        student = s.clone().requires_grad_()
        value = f(student, t, y)
        value.backward()
        results.append((value.detach(), student.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_half_logits_and_autocast(on_backend) -> None:
    s, t, y = inputs(6, 500)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = DKDLoss()(s.to(dtype), t.to(dtype), y)
        torch.testing.assert_close(
            got, DKDLoss()(s.to(dtype).float(), t.to(dtype).float(), y), rtol=1e-5, atol=0
        )


def test_bad_input_is_named() -> None:
    s, t, y = inputs(4, 5)
    with pytest.raises(ValueError, match="temperature: need a number above 0, got 0"):
        KDLoss(0)
    with pytest.raises(ValueError, match="vocabulary: got 'pad'"):
        KDLoss(vocabulary="pad")
    with pytest.raises(
        ValueError, match=r"all axes but the last: got student \[4, 5\] float32 on cpu, teacher \[3, 5\]"
    ):
        KDLoss()(s, t[:3])
    with pytest.raises(TypeError, match="student: need a floating point tensor"):
        KDLoss()(y, t)
    with pytest.raises(TypeError, match="labels: need an integer tensor"):
        DKDLoss()(s, t, y.float())
    with pytest.raises(ValueError, match=r"labels: need \[4\]"):
        DKDLoss()(s, t, y[:3])
    with pytest.raises(ValueError, match="K >= 2"):
        DKDLoss()(s[:, :1], t[:, :1], y)

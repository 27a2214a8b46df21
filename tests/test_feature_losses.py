"""Feature losses against their formulas, written out naively here; compat functions; bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

from kdfast.compat._direct_norm import DirectNormLoss
from kdfast.compat.mdistiller import at_loss, hcl_loss, sp_loss
from kdfast.losses.crd import CRDLoss
from kdfast.losses.features import AttentionTransferLoss, FGFILoss, FitNetLoss, ICKDLoss, imitation_mask
from kdfast.losses.review import ReviewKDLoss


def maps(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, requires_grad=True), torch.randn(shape)


def close(got: Tensor, want: Tensor | float, rtol: float = 2e-6) -> None:
    assert got.shape == () and got.dtype == torch.float32 and got.item() >= 0
    assert math.isclose(float(got.detach()), float(want), rel_tol=rtol, abs_tol=1e-7)


def grads_match(got: Tensor, want: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(
        *(torch.autograd.grad(v, x, retain_graph=True)[0] for v in (got, want)), rtol=1e-4, atol=1e-6
    )


def test_fitnet():
    s, t = maps(2, 3, 4, 5)
    close(FitNetLoss(weight=100)(s, t), 100 * ((s - t) ** 2).sum().detach() / s.numel())
    for shape in ((6, 8, 8), (6, 4, 4), (6, 2, 2), (6, 7, 5)):
        loss = FitNetLoss(shape, (5, 4, 4))
        loss(torch.randn(3, *shape), torch.randn(3, 5, 4, 4)).backward()
        assert all(p.grad is not None for p in loss.parameters())
    both = FitNetLoss([(6, 8, 8), (7, 4, 4)], [(5, 4, 4), (7, 4, 4)])
    both(
        [torch.randn(3, 6, 8, 8), torch.randn(3, 7, 4, 4)], [torch.randn(3, 5, 4, 4), torch.randn(3, 7, 4, 4)]
    )
    with pytest.raises(ValueError, match="adapter"):
        FitNetLoss()(s, t[:, :2])
    with pytest.raises(ValueError, match="student_shape"):
        FitNetLoss((6, 3, 3), (5, 4, 4))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_attention_transfer(p):
    s, t = maps(3, 4, 6, 6)[0], torch.randn(3, 7, 3, 3)

    def unit(x, signed):
        a = (x if signed else x.abs()).pow(p).mean(1).flatten(1)
        return a / a.pow(2).sum(1, keepdim=True).sqrt()

    pooled = F.avg_pool2d(s, 2)
    for got, signed in ((AttentionTransferLoss(p=p)(s, t), False), (at_loss([s], [t], p), True)):
        want = (unit(pooled, signed) - unit(t, signed)).pow(2).mean()
        close(got, want.detach(), 1e-5)
        grads_match(got, want, s)
    close(at_loss([t, t], [pooled.detach()] * 2, p), 2 * at_loss([pooled.detach()], [t], p))


def test_attention_transfer_hazards():
    zero = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = AttentionTransferLoss()(zero, torch.randn(2, 3, 4, 4))
    assert loss.isfinite() and torch.autograd.grad(loss, zero)[0].isfinite().all()
    big = torch.full((2, 3, 4, 4), 300.0, dtype=torch.float16)  # the square leaves float16
    assert AttentionTransferLoss()(big, big * 2).item() < 1e-12


def test_ickd():
    s, t = torch.randn(3, 5, 4, 6, requires_grad=True), torch.randn(3, 5, 2, 7)

    def unit(x):
        rows = [f @ f.T for f in x.flatten(2)]
        return [g / g.norm(dim=1, keepdim=True) for g in rows]

    want = sum(((a - b) ** 2).sum() for a, b in zip(unit(s), unit(t), strict=True)) / (5 * 3)
    got = ICKDLoss()(s, t)
    close(got, want.detach(), 1e-5)
    grads_match(got, want, s)
    loss = ICKDLoss(5, 8)
    loss(s, torch.randn(3, 8, 4, 4)).backward()
    assert all(p.grad is not None for p in loss.parameters())
    with pytest.raises(ValueError, match="student_channels"):
        ICKDLoss()(s, torch.randn(3, 8, 4, 4))


def hcl(s: Tensor, t: Tensor) -> Tensor:
    loss, weight, weights = ((s - t) ** 2).mean(), 1.0, 1.0
    for size in (4, 2, 1):
        if size >= s.shape[2]:
            continue
        weight, weights = weight / 2, weights + weight / 2
        pool = [F.adaptive_avg_pool2d(v, size) for v in (s, t)]
        loss = loss + weight * ((pool[0] - pool[1]) ** 2).mean()
    return loss / weights


@pytest.mark.parametrize("size", [1, 2, 4, 7, 8])
def test_hierarchical_context(size):
    s, t = maps(3, 5, size, size)
    want = hcl(s, t)
    close(hcl_loss([s], [t]), want.detach(), 1e-5)
    grads_match(hcl_loss([s], [t]), want, s)
    close(hcl_loss([s, s], [t, t]), 2 * want.detach(), 1e-5)


def test_review():
    channels, sizes = (4, 8, 16, 16), (8, 4, 2, 1)
    student = [torch.randn(3, c, s, s, requires_grad=True) for c, s in zip(channels, sizes, strict=True)]
    teacher = [torch.randn(3, 2 * c, s, s) for c, s in zip(channels, sizes, strict=True)]
    loss = ReviewKDLoss(channels, [2 * c for c in channels])
    value = loss(student, teacher)
    # The same, step by step from the deepest level.
    expected, above = 0.0, None
    for fusion, s, t in reversed(list(zip(loss.fusions, student, teacher, strict=True))):
        x = fusion.reduce(s)
        if above is not None:
            y = F.interpolate(above, x.shape[2:], mode="nearest")
            share = torch.sigmoid(fusion.attention[0](torch.cat([x, y], 1)))
            x = x * share[:, 0:1] + y * share[:, 1:2]
        above = x
        expected = expected + hcl(fusion.project(x), t)
    close(value, expected.detach(), 1e-5)
    value.backward()
    assert all(v.grad is not None for v in (*student, *loss.parameters()))
    pooled = [*student[:3], student[3].flatten(1)], [*teacher[:3], teacher[3].flatten(1)]
    close(loss(*pooled), value.detach(), 1e-4)
    with pytest.raises(ValueError, match="levels"):
        loss(student[:2], teacher[:2])


def literal_crd(scores: Tensor, n: int, samples: int, z: Tensor, epsilon: float) -> Tensor:
    """As published: ratios of exponentials; scores [B, 1 + n]."""
    x = scores.double().exp() / z
    noise = n / samples
    positive = (x[:, 0] / (x[:, 0] + noise + epsilon)).log().sum()
    negative = (noise / (x[:, 1:] + noise + epsilon)).log().sum()
    return -(positive + negative) / len(scores)


def test_crd_equals_the_published_form():
    loss = CRDLoss(6, 9, num_samples=50, feature_dim=8, num_negatives=7)
    s, t = torch.randn(4, 6, requires_grad=True), torch.randn(4, 9)
    index, negatives = torch.tensor([3, 11, 0, 49]), torch.randint(50, (4, 7))
    memory, z = loss.memory.clone(), None
    for _ in range(2):  # the second call uses the first one's Z and its updated memory
        vs, vt = (F.normalize(e(x), dim=1) for e, x in ((loss.embed_student, s), (loss.embed_teacher, t)))
        rows = torch.cat([index[:, None], negatives], 1)
        scores = [torch.einsum("bd,bnd->bn", v, memory[m][rows]) / 0.07 for v, m in ((vs, 1), (vt, 0))]
        z = [x.double().exp().mean().detach() * 50 for x in scores] if z is None else z
        want = sum(literal_crd(x, 7, 50, k, 1e-7) for x, k in zip(scores, z, strict=True))
        got = loss(s, t, index, negatives)
        close(got, want.detach(), 1e-5)
        grads_match(got, want.float(), s)
        for side, v in enumerate((vs, vt)):
            memory[side][index] = F.normalize(0.5 * memory[side][index] + 0.5 * v.detach(), dim=1)
        torch.testing.assert_close(loss.memory, memory)


def _crd_step(loss: CRDLoss, s: Tensor, t: Tensor, index: Tensor, negatives: Tensor, rows: slice) -> Tensor:
    return torch.stack(
        [loss(v[rows], t[rows], index[rows], negatives[rows]) for v in (s, s.flip(1))]
    ).detach()


def _crd() -> CRDLoss:
    torch.manual_seed(5)
    return CRDLoss(6, 9, num_samples=50, feature_dim=8, num_negatives=7)


def _crd_process(rank: int, folder: str, *batch: Tensor) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    loss = _crd()
    values = _crd_step(loss, *batch, slice(2 * rank, 2 * rank + 2))
    torch.save((values, loss.memory, loss.log_z), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_crd_two_processes(tmp_path):
    """Two halves of a batch on two processes: the mean loss, Z and memories of one process that has all of it."""
    batch = torch.randn(4, 6), torch.randn(4, 9), torch.tensor([3, 11, 0, 49]), torch.randint(50, (4, 7))
    mp.spawn(_crd_process, (str(tmp_path), *batch), nprocs=2)
    loss = _crd()
    values = _crd_step(loss, *batch, slice(None))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.stack([f[0] for f in found]).mean(0), values)
    for _, memory, log_z in found:
        torch.testing.assert_close(memory, loss.memory)
        torch.testing.assert_close(log_z, loss.log_z)


def test_crd_large_scores_and_evaluation():
    loss = CRDLoss(6, 9, num_samples=20, num_negatives=5, temperature=1e-3)  # exp(1000) is out of range
    s = torch.randn(4, 6, requires_grad=True)
    value = loss(s, torch.randn(4, 9), torch.arange(4))
    assert value.isfinite() and torch.autograd.grad(value, s)[0].isfinite().all()
    before = loss.memory.clone()
    loss.eval()(s, torch.randn(4, 9), torch.arange(4))
    assert torch.equal(loss.memory, before)
    with pytest.raises(ValueError, match="index"):
        loss(s, torch.randn(4, 9), torch.arange(3))


def test_fgfi():
    s, t = maps(2, 3, 4, 5)
    mask = torch.rand(2, 4, 5) > 0.5
    want = sum(((t - s)[b, :, i, j] ** 2).sum() for b, i, j in mask.nonzero().tolist()) / (2 * mask.sum())
    close(FGFILoss()(s, t, mask), want.detach(), 1e-5)
    grads_match(FGFILoss()(s, t, mask), want, s)
    nothing = FGFILoss()(s, t, torch.zeros_like(mask))
    assert nothing.item() == 0 and not torch.autograd.grad(nothing, s)[0].any()
    FGFILoss(3, 6)(s, torch.randn(2, 6, 4, 5), mask).backward()


def test_imitation_mask():
    corner = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(5.0), indexing="ij")[::-1], -1) * 4
    anchors = torch.stack([torch.cat([corner, corner + size], -1) for size in (6.0, 12.0)], 2)  # [6, 5, 2, 4]
    boxes = torch.tensor([[3.0, 3.0, 10.0, 11.0], [12.0, 8.0, 20.0, 20.0]])

    def iou(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(w, 0) * max(h, 0)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    want = torch.zeros(6, 5, dtype=torch.bool)
    for b in boxes.tolist():
        values = torch.tensor([[[iou(a, b) for a in cell] for cell in row] for row in anchors.tolist()])
        want |= (values > 0.5 * values.max()).any(2)
    assert torch.equal(imitation_mask(anchors, boxes), want) and want.any() and not want.all()
    assert not imitation_mask(anchors, boxes[:0]).any()


def test_sp():
    s, t = maps(5, 3, 4, 4)
    k, m = (F.normalize(v.flatten(1) @ v.flatten(1).T, dim=1) for v in (s, t))
    close(sp_loss([s, s], [t, t]), 2 * ((k - m) ** 2).sum().detach() / 25, 1e-5)


def test_published_direct_norm_loss():
    s, t, labels = torch.randn(6, 4), torch.randn(6, 4) * 2, torch.tensor([2, 0, 1, 2, 0, 1])
    means = {"2": [1.0, 2.0, 3.0, 4.0], "0": [0.5, -1.0, 0.0, 2.0], "1": [-1.0, 1.0, 1.0, -3.0]}
    value = 0.0
    for i in range(6):
        c = torch.tensor(means[str(labels[i].item())])
        value += 1 - (s[i] @ c / c.norm()) / max(s[i].norm(), t[i].norm())
    loss = DirectNormLoss(num_class=3, nd_loss_factor=2.0)
    table = torch.tensor([means[str(k)] for k in range(3)])
    for given in (means, means, table):
        close(loss(s_emb=s, t_emb=t, T_EMB=given, labels=labels), 2 * value / 6, 1e-5)

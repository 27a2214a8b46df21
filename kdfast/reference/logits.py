"""Losses on logits in plain PyTorch: the truth, the fallback and the benchmarks' baseline.

With p, q the softmaxes of student and teacher at temperature T, p̂, q̂ those over the classes but the label y, and
p¹, q¹ those at T = 1, the loss is the mean over the rows that count of

    kl      beta KL(q ‖ p)
    dkd     alpha [q_y log(q_y / p_y) + (1 - q_y) log((1 - q_y) / (1 - p_y))] + beta KL(q̂ ‖ p̂)
    nkd     -alpha q¹_y log p¹_y - beta Σ q̂ log p̂, where q¹_y has no gradient

and for dist, over rows p_b and columns p_k, with ρ Pearson's correlation (denominator |·| |·| + 1e-8),

    dist    alpha (1 - mean_b ρ(p_b, q_b)) + beta (1 - mean_k ρ(p_k, q_k))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import autocast_device

KINDS = ("kl", "dkd", "nkd", "dist")


def logits(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    kind: int,
    alpha: float,
    beta: float,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    """Loss of student and teacher logits [..., K]: a scalar, float32 (float64 for float64 inputs).

    Args:
        labels: [...] int64, or None where the kind (kl, dist) needs no target. Rows whose label is ``ignore_index``
            do not count; where none counts the loss is 0.
        kind: index into :data:`KINDS`.
        alpha, beta, temperature: see above; factors such as T² are the caller's.

    Differentiable in student and teacher, any number of times.
    """
    with torch.autocast(autocast_device(student), enabled=False):
        return _loss(student, teacher, labels, KINDS[kind], alpha, beta, temperature, ignore_index)


def _loss(student, teacher, labels, kind, alpha, beta, temperature, ignore_index) -> Tensor:
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    s, t = (v.reshape(-1, v.shape[-1]).to(dtype) for v in (student, teacher))  # [rows, K]
    counts = None if labels is None else labels.reshape(-1) != ignore_index
    if kind == "dist":
        return _dist(s, t, counts, alpha, beta, temperature)
    if kind == "kl":
        log_p, log_q = (F.log_softmax(v / temperature, dim=1) for v in (s, t))
        rows = beta * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    else:
        target = labels.reshape(-1).where(counts, 0)[:, None]
        if kind == "dkd":
            rows = _dkd(s / temperature, t / temperature, target, alpha, beta)
        else:
            rows = _nkd(s, t, target, alpha, beta, temperature)
    if counts is None:
        return rows.sum() / max(len(rows), 1)
    return rows.where(counts, 0).sum() / counts.sum().clamp_min(1)


def _without(target: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax over the other classes (0 at the target), the target's log-odds against them, and a mask."""
    mask = torch.zeros_like(z, dtype=torch.bool).scatter_(1, target, True)
    others = z.masked_fill(mask, -torch.inf)
    total = others.logsumexp(1, keepdim=True)
    return (others - total).masked_fill(mask, 0), (z.gather(1, target) - total)[:, 0], mask


def _dkd(s: Tensor, t: Tensor, target: Tensor, alpha: float, beta: float) -> Tensor:
    log_p, odds_p, mask = _without(target, s)
    log_q, odds_q, _ = _without(target, t)
    binary = sum(
        torch.sigmoid(sign * odds_q) * (F.logsigmoid(sign * odds_q) - F.logsigmoid(sign * odds_p))
        for sign in (1, -1)
    )
    others = (log_q.exp().masked_fill(mask, 0) * (log_q - log_p)).sum(1)
    return alpha * binary + beta * others


def _nkd(s: Tensor, t: Tensor, target: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    log_p, odds_p, mask = _without(target, s / temperature)
    log_q, odds_q, _ = _without(target, t / temperature)
    if temperature != 1:
        odds_p, odds_q = _without(target, s)[1], _without(target, t)[1]
    others = -(log_q.exp().masked_fill(mask, 0) * log_p).sum(1)
    return beta * others - alpha * torch.sigmoid(odds_q).detach() * F.logsigmoid(odds_p)


def _dist(
    s: Tensor, t: Tensor, counts: Tensor | None, alpha: float, beta: float, temperature: float
) -> Tensor:
    p, q = (F.softmax(v / temperature, dim=1) for v in (s, t))
    rows, classes = p.shape
    if counts is None:
        if not rows:
            return (p.sum() + q.sum()) * 0
        inter = 1 - _pearson(p - 1 / classes, q - 1 / classes, 1).mean()
        intra = 1 - _pearson(p - p.mean(0), q - q.mean(0), 0).mean()
        return alpha * inter + beta * intra
    weight = counts[:, None].to(p.dtype)
    n = weight.sum()
    inter = 1 - _pearson(p - 1 / classes, q - 1 / classes, 1).where(counts, 0).sum() / n.clamp_min(1)
    p, q = ((v - (v * weight).sum(0) / n.clamp_min(1)) * weight for v in (p, q))
    return (alpha * inter + beta * (1 - _pearson(p, q, 0).mean())) * (n > 0)


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Of centred a and b; 0 where one of them is 0."""
    return (a * b).sum(dim) / (
        torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim) + 1e-8
    )

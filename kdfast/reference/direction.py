"""Direction and norm of embeddings in plain PyTorch (Wang et al., KD++, Eq. 5 to 7): the truth, the fallback and the baseline.

For row i with centre c (the class mean of its label, or its own centre), e = c / |c|:

    L_i = 1 - <s_i, e> / max(|s_i|, |t_i|)          dino-loss, Eq. 5 to 7
    L_i = 1 - <s_i, e> / |s_i|                      without a teacher: cosine to the centre, Eq. 1

and the loss is a weighted mean of L_i over the rows that count.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: A norm at most this long counts as zero: a centre without direction leaves its rows out, a row has L_i = 1.
NORM_FLOOR = 1e-12


def direction(
    student: Tensor,
    teacher: Tensor | None,
    centers: Tensor,
    labels: Tensor | None,
    ignore_index: int = -100,
    balanced: bool = False,
) -> Tensor:
    """The weighted mean of L_i.

    Args:
        student: [B, D]; teacher: [B, D] or None.
        centers: [K, D]; with ``labels`` None [B, D], one per row.
        labels: [B] int64 in [0, K), or ``ignore_index`` for rows that do not count.
        balanced: every class among the rows that count weighs the same (Eq. 7), instead of every row.

    Returns:
        Scalar, float32 (float64 where an input is); 0 where no row counts. Differentiable in the three float inputs,
        any number of times. Where |s_i| = |t_i|, the gradient is that of |s_i| as denominator.
    """
    inputs = [v for v in (student, teacher, centers) if v is not None]
    dtype = torch.float64 if torch.float64 in [v.dtype for v in inputs] else torch.float32
    s, c = student.to(dtype), centers.to(dtype)
    counts = torch.ones(s.shape[:1], dtype=torch.bool, device=s.device)
    if labels is not None:
        counts = labels != ignore_index
        labels = torch.where(counts, labels, 0)
        c = c.index_select(0, labels)
    center_norm = norm(c)
    counts = counts & (center_norm != 0)
    dot = (s * c).sum(1) / torch.where(center_norm == 0, 1, center_norm)
    longest = norm(s)
    if teacher is not None:
        teacher_norm = norm(teacher.to(dtype))
        longest = torch.where(longest >= teacher_norm, longest, teacher_norm)
    distance = 1 - torch.where(longest == 0, 0, dot / torch.where(longest == 0, 1, longest))
    weight = counts.to(dtype)
    if balanced:
        size = torch.zeros(centers.shape[0], dtype=dtype, device=s.device).scatter_add(0, labels, weight)
        weight = weight / size.index_select(0, labels).clamp_min(1)
    total = weight.sum()
    mean = (torch.where(counts, distance, 0) * weight).sum() / torch.where(total > 0, total, 1)
    return mean.clamp_min(0)


def norm(x: Tensor) -> Tensor:
    """Lengths of the rows [B]; 0, with gradient 0, up to :data:`NORM_FLOOR`."""
    square = x.square().sum(1)
    zero = square <= NORM_FLOOR**2
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())

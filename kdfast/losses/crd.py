"""CRD: contrastive representation distillation with a memory bank."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..reference._common import autocast_device
from ._common import Loss, check_integers, check_pair, describe, wide


class CRDLoss(Loss):
    """Contrastive representation distillation (Tian et al., ICLR 2020), in the form that cannot overflow.

    With scores l = v·m/τ - log(Z (n/N + ε)) of one positive and n negative memory rows, the published
    -log x/(x + n/N + ε) - Σ log (n/N)/(x + n/N + ε) is softplus(-l⁺) + Σ softplus(l⁻) + n log(1 + ε N/n).
    Z is N times the mean of exp(v·m/τ) over the first batch, then stays.

    Args:
        student_dim, teacher_dim: widths of the embeddings; both get a linear layer to ``feature_dim``, trained here.
        num_samples: N, size of the training set, rows of the two memory banks.
        num_negatives: n, drawn for every sample unless the call brings them.
        temperature, momentum, epsilon: τ, share of the old memory row in an update, ε.
        weight: factor on the value; 0.8 in the published code.

    Shape: student [B, D_s], teacher [B, D_t] (maps are flattened), index [B] of the samples in the training set,
    negatives [B, n] indices (the published code draws them from other classes). Differentiable in student, teacher and
    the linear layers; the memory gets no gradient. It is updated at every call in training mode, but by no embedding that
    is not finite. With a process group,
    every process applies the updates of all, and Z is that of the joint batch (equal batch sizes on each); the memories
    must start equal, as DistributedDataParallel makes them, or by one seed.

    Raises:
        ValueError, TypeError: settings out of range; embeddings of other widths or devices; index or negatives that are
            not integers of the shapes above. An index outside [0, N) fails in PyTorch's indexing.
    """

    memory: Tensor
    log_z: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int,
        *,
        feature_dim: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        epsilon: float = 1e-7,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if num_samples < 2 or num_negatives < 1:
            raise ValueError(
                f"num_samples and num_negatives: need at least 2 and 1, got {num_samples} and {num_negatives}"
            )
        if not temperature > 0 or not 0 <= momentum <= 1 or not epsilon >= 0:
            raise ValueError(
                f"temperature, momentum, epsilon: need one above 0, one in [0, 1] and one of at least 0, got "
                f"{temperature!r}, {momentum!r} and {epsilon!r}"
            )
        self.num_samples, self.num_negatives = num_samples, num_negatives
        self.temperature, self.momentum, self.epsilon = temperature, momentum, epsilon
        self.embed_student = nn.Linear(student_dim, feature_dim)
        self.embed_teacher = nn.Linear(teacher_dim, feature_dim)
        bound = 1 / math.sqrt(feature_dim / 3)
        self.register_buffer("memory", torch.empty(2, num_samples, feature_dim).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.full((2,), math.nan))  # NaN until the first batch
        self._z_shared = False

    def forward(
        self, student: Tensor, teacher: Tensor, index: Tensor, negatives: Tensor | None = None
    ) -> Tensor:
        check_pair(student, teacher)
        rows = student.shape[0]
        for name, v, layer in (
            ("student", student, self.embed_student),
            ("teacher", teacher, self.embed_teacher),
        ):
            if v.shape[1:].numel() != layer.in_features:
                raise ValueError(
                    f"{name}: need [B, {layer.in_features}], or maps with as many elements, got {describe(v)}"
                )
        check_indices(rows, index, negatives)
        if negatives is None:
            negatives = torch.randint(self.num_samples, (rows, self.num_negatives), device=index.device)
        with torch.autocast(autocast_device(student), enabled=False):
            s = F.normalize(_linear(self.embed_student, student), dim=1)
            t = F.normalize(_linear(self.embed_teacher, teacher), dim=1)
            chosen = torch.cat([index[:, None], negatives], 1)  # [B, 1 + n], the positive first
            # The student is compared with the teacher's memory, and the other way round.
            scores = torch.stack([self._scores(s, 1, chosen), self._scores(t, 0, chosen)])  # [2, B, 1 + n]
            loss = self._contrast(scores)
        if self.training:
            self._update(torch.stack([s, t]).detach(), index)
        return self.weight * loss.float()

    def _scores(self, v: Tensor, side: int, chosen: Tensor) -> Tensor:
        return torch.einsum("bd,bnd->bn", v, self.memory[side][chosen].to(v)) / self.temperature

    def _contrast(self, scores: Tensor) -> Tensor:
        first = scores.detach().flatten(1)
        log_z = first.logsumexp(1) - math.log(max(first.shape[1], 1)) + math.log(self.num_samples)
        if _distributed() and not self._z_shared:
            parts = [torch.empty_like(log_z) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, log_z)
            log_z = torch.stack(parts).logsumexp(0) - math.log(len(parts))
        self._z_shared = True
        log_z = torch.where(self.log_z.isnan(), log_z.to(self.log_z), self.log_z)
        if self.training:
            self.log_z.copy_(log_z)
        rate = (scores.shape[2] - 1) / self.num_samples  # n/N
        l = scores - log_z[:, None, None] - math.log(rate + self.epsilon)
        constant = (scores.shape[2] - 1) * math.log1p(self.epsilon / rate)
        terms = F.softplus(-l[..., 0]).sum() + F.softplus(l[..., 1:]).sum()
        return terms / max(scores.shape[1], 1) + 2 * constant

    @torch.no_grad()
    def _update(self, embeddings: Tensor, index: Tensor) -> None:
        """embeddings: [2, B, feature_dim], of student and teacher."""
        if _distributed():
            gathered = [torch.empty_like(embeddings) for _ in range(torch.distributed.get_world_size())]
            indices = [torch.empty_like(index) for _ in gathered]
            torch.distributed.all_gather(gathered, embeddings.contiguous())
            torch.distributed.all_gather(indices, index.contiguous())
            embeddings, index = torch.cat(gathered, 1), torch.cat(indices)
        old = self.memory[:, index]
        mixed = F.normalize(torch.lerp(embeddings.to(old), old, self.momentum), dim=2)
        # A step that overflowed must not stay: every later batch would draw its rows as negatives.
        self.memory[:, index] = torch.where(embeddings.isfinite().all(2, keepdim=True), mixed, old)


def check_indices(rows: int, index: Tensor, negatives: Tensor | None = None) -> None:
    """index [rows] and negatives [rows, n] are integers on one device."""
    check_integers("index", index)
    if index.shape != (rows,):
        raise ValueError(f"index: need [{rows}], one per sample, got {describe(index)}")
    if negatives is None:
        return
    check_integers("negatives", negatives)
    fits = negatives.dim() == 2 and negatives.shape[0] == rows and negatives.shape[1] > 0
    if not fits or negatives.device != index.device:
        raise ValueError(
            f"negatives: need [{rows}, n] with n >= 1 on the device of index, got {describe(negatives)}, "
            f"index {describe(index)}"
        )


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Of x [B, ...], in float32 at least, whatever the types of x and of the layer."""
    x = wide(x.flatten(1))
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()

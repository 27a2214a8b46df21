"""Losses on logits: KD, decoupled KD, normalised KD, DIST. Each reads the logits once per direction."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..ops.logits import logits
from ._common import Loss, check_choice, check_float, check_integers, describe

Vocabulary = Literal["error", "truncate"]


def _check(
    student: Tensor, teacher: Tensor, labels: Tensor | None, vocabulary: Vocabulary, least: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits [..., K] of one shape and int64 labels [...], or an error that names both shapes."""
    check_float("student", student)
    check_float("teacher", teacher)
    if student.shape != teacher.shape:
        if student.dim() != teacher.dim() or student.shape[:-1] != teacher.shape[:-1]:
            problem = "student and teacher need logits [..., K] that agree in all axes but the last"
        elif vocabulary == "error":
            problem = (
                "student and teacher have vocabularies of different size; vocabulary='truncate' compares the first "
                "min(K) classes"
            )
        else:
            problem, classes = "", min(student.shape[-1], teacher.shape[-1])
            student, teacher = student[..., :classes], teacher[..., :classes]
        if problem:
            raise ValueError(f"{problem}: got student {describe(student)}, teacher {describe(teacher)}")
    if student.dim() == 0 or student.shape[-1] < least:
        raise ValueError(f"student: need logits [..., K] with K >= {least}, got {describe(student)}")
    if student.device != teacher.device:
        raise ValueError(
            f"student and teacher must be on one device, got {describe(student)}, {describe(teacher)}"
        )
    if labels is not None:
        check_integers("labels", labels)
        if labels.shape != student.shape[:-1] or labels.device != student.device:
            raise ValueError(
                f"labels: need {list(student.shape[:-1])} on {student.device} for logits {list(student.shape)}, "
                f"got {describe(labels)}"
            )
        labels = labels.long()
    return student, teacher, labels


class _LogitLoss(Loss):
    """What the losses on logits share: settings, and one call of the op."""

    def __init__(self, temperature: float, ignore_index: int, vocabulary: Vocabulary, weight: float) -> None:
        super().__init__(weight)
        if not temperature > 0:
            raise ValueError(f"temperature: need a number above 0, got {temperature!r}")
        check_choice("vocabulary", vocabulary, ("error", "truncate"))
        self.temperature, self.ignore_index, self.vocabulary = temperature, ignore_index, vocabulary

    def _loss(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None, kind: str, alpha: float, beta: float
    ) -> Tensor:
        least = 2 if kind in ("dkd", "nkd") else 1
        if least == 2:
            check_integers("labels", labels)
        student, teacher, labels = _check(student, teacher, labels, self.vocabulary, least)
        return logits(
            student,
            teacher,
            labels,
            kind=kind,
            alpha=alpha * self.weight,
            beta=beta * self.weight,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
        ).float()


class KDLoss(_LogitLoss):
    """Knowledge distillation (Hinton et al. 2015): T² KL(softmax(teacher / T) ‖ softmax(student / T)), mean over rows.

    Args:
        temperature: T.
        ignore_index: rows with this label do not count, where labels are given.
        vocabulary: what to do where student and teacher have different K: ``"error"``, or ``"truncate"``, which
            compares softmaxes over the first min(K) classes (tokenizers that agree there, padded differently).
        weight: factor on the value.

    Shape: student and teacher [..., K] with any strides; labels [...] (only compared with ``ignore_index``) or None.
    Differentiable in student and teacher. Finite for saturated softmaxes; 0, without a gradient, if every row is
    ignored; exactly 0 for equal logits.

    Raises:
        ValueError, TypeError: shapes that do not fit, tensors on different devices, logits that are not floats, labels
            that are not integers, a temperature that is not above 0.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        *,
        ignore_index: int = -100,
        vocabulary: Vocabulary = "error",
        weight: float = 1.0,
    ) -> None:
        super().__init__(temperature, ignore_index, vocabulary, weight)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._loss(student, teacher, labels, "kl", 0.0, self.temperature**2)


class DKDLoss(_LogitLoss):
    """Decoupled KD (Zhao et al., CVPR 2022): T² (α TCKD + β NCKD), mean over rows.

    TCKD is the KL of (q_y, 1 - q_y) and (p_y, 1 - p_y), NCKD that of the softmaxes over the classes but the target.
    Both are computed from log-odds, so that saturated logits stay exact.

    Args:
        alpha, beta: published: 1 and 8 (2 or 6 for some CIFAR pairs; ImageNet with T = 1: 0.5 or 2).
        temperature: T.
        ignore_index, vocabulary, weight: see :class:`KDLoss`.

    Shape: student and teacher [..., K], K >= 2; labels [...], in [0, K) or ``ignore_index``; other labels raise
    on the CPU and make the value NaN on a GPU, where a check would wait for it. Differentiable in student and teacher.
    The published warm-up multiplies the value by min(1, epoch / 20).

    Raises:
        ValueError, TypeError: see :class:`KDLoss`; no labels.
        RuntimeError, IndexError: on the CPU, a label outside [0, K) that is not ``ignore_index``.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        *,
        ignore_index: int = -100,
        vocabulary: Vocabulary = "error",
        weight: float = 1.0,
    ) -> None:
        super().__init__(temperature, ignore_index, vocabulary, weight)
        self.alpha, self.beta = alpha, beta

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        t2 = self.temperature**2
        return self._loss(student, teacher, labels, "dkd", t2 * self.alpha, t2 * self.beta)


class NKDLoss(_LogitLoss):
    """Normalised KD (Yang et al., ICCV 2023): -q¹_y log p¹_y - γ T² Σ_{j≠y} q̂_j log p̂_j, mean over rows.

    p¹, q¹ are softmaxes at T = 1, p̂, q̂ those at T over the classes but the target; q¹_y has no gradient.

    Args:
        gamma, temperature: γ and T; published: 1.5 and 1 (ImageNet), 3.5 and 3 (CIFAR).
        ignore_index, vocabulary, weight: see :class:`KDLoss`.

    Shape: as :class:`DKDLoss`. Differentiable in student and, through q̂, in teacher.

    Raises: as :class:`DKDLoss`.
    """

    def __init__(
        self,
        gamma: float = 1.5,
        temperature: float = 1.0,
        *,
        ignore_index: int = -100,
        vocabulary: Vocabulary = "error",
        weight: float = 1.0,
    ) -> None:
        super().__init__(temperature, ignore_index, vocabulary, weight)
        self.gamma = gamma

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self._loss(student, teacher, labels, "nkd", 1.0, self.gamma * self.temperature**2)


class DISTLoss(_LogitLoss):
    """DIST (Huang et al., NeurIPS 2022): T² (β (1 - mean ρ of rows) + γ (1 - mean ρ of columns)).

    ρ is Pearson's correlation of softmax(student / T) and softmax(teacher / T), denominator |·| |·| + 1e-8: of each
    sample over the classes ("inter") and of each class over the samples ("intra"). A constant has correlation 0 and
    no gradient.

    Args:
        beta, gamma: factors on the two terms; published: 1 and 1, 2 and 2 on ImageNet.
        temperature: T; published: 1, 4 on CIFAR.
        ignore_index, vocabulary, weight: see :class:`KDLoss`. Ignored rows count in neither term.

    Shape: student and teacher [..., K]; labels [...] (only compared with ``ignore_index``) or None. Differentiable in
    student and teacher.

    Raises: as :class:`KDLoss`.
    """

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        *,
        ignore_index: int = -100,
        vocabulary: Vocabulary = "error",
        weight: float = 1.0,
    ) -> None:
        super().__init__(temperature, ignore_index, vocabulary, weight)
        self.beta, self.gamma = beta, gamma

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        t2 = self.temperature**2
        return self._loss(student, teacher, labels, "dist", t2 * self.beta, t2 * self.gamma)

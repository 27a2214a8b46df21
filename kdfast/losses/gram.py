"""Losses on Grams over samples: CKA and RCKA, similarity preserving, pairwise affinity, the MMD bound."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..ops.gram import gram, gram_distance, transposed, view
from ..ops.patch_gram import patch_gram, row_inter_distance
from ._common import (
    Levels,
    Loss,
    check_choice,
    check_float,
    check_pair,
    describe,
    levels,
    nothing,
    total,
    wide,
)
from ._patches import Average, PatchSize, Resize, check_maps, check_patches, grid_of

RowNorm = Literal["none", "row", "cosine"]


class GramProducts(NamedTuple):
    """Inner products of student and teacher Grams, one per group: <K, L>, <K, K>, <L, L>."""

    xy: Tensor
    xx: Tensor
    yy: Tensor


def gram_products(x: Tensor, y: Tensor, *, centered: bool = True) -> GramProducts:
    """Inner products of the (centred) linear Grams K = X Xᵀ and L = Y Yᵀ of every group.

    Args:
        x: [groups, rows, features]; y: [groups, rows, features'], any float dtype and strides.
        centered: subtract each feature's mean over the rows of its group.

    Returns:
        Three float32 tensors [groups] (float64 for float64 inputs), differentiable in ``x`` and ``y``.

    Raises:
        ValueError, TypeError: inputs that are not float tensors of three axes on one device, or groups or rows differ.
    """
    for name, v in (("x", x), ("y", y)):
        check_float(name, v)
        if v.dim() != 3:
            raise ValueError(f"{name}: need [groups, rows, features], got {describe(v)}")
    if x.shape[:2] != y.shape[:2] or x.device != y.device:
        raise ValueError(f"x and y must share groups, rows and device, got x {describe(x)}, y {describe(y)}")
    products, _ = gram(x[:, :, None, None, None], y[:, :, None, None, None], centered=centered)
    return GramProducts(*products[0])


def linear_cka(
    student: Tensor,
    teacher: Tensor,
    *,
    centered: bool = True,
    row_norm: RowNorm = "none",
    debiased: bool = False,
) -> Tensor:
    """Linear centred kernel alignment of two representations of the same N samples.

    Args:
        student: [N, ...]; teacher: [N, ...]; each flattened to [N, D], where D may differ.
        centered: subtract each feature's mean over the samples (Kornblith et al. 2019). False is Theorem 1 of
            Zhou et al. (IJCAI 2024) as printed, and their published code.
        row_norm: ``"row"`` divides row i of each Gram by sqrt(K_ii) (published code); ``"cosine"`` scales every sample
            to unit length first.
        debiased: unbiased HSIC (Nguyen et al. 2021), for small batches; may be below 0. With N < 4 it is not defined,
            the CKA then is 0, without gradient.

    Returns:
        float32 scalar (float64 for float64 inputs) in [0, 1], differentiable in both inputs. A representation that is
        zero (after centring) has CKA 0; with N = 2 the centred CKA is 1 whatever the features. Neither has a gradient.

    Raises:
        ValueError, TypeError: inputs that are not float tensors with equally many samples on one device; an unknown
            ``row_norm``, or ``"row"`` debiased.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019.
    """
    return 1 - _distance(student, teacher, centered, row_norm, debiased, 1.0)


def _comparison(row_norm: str, debiased: bool) -> tuple[str, bool]:
    """The op's (compare, cosine) for a ``row_norm`` and ``debiased``."""
    check_choice("row_norm", row_norm, ("none", "row", "cosine"))
    if debiased and row_norm == "row":
        raise ValueError(
            "debiased: row_norm must be 'none' or 'cosine', got 'row' (its Grams are not symmetric)"
        )
    return ("unbiased" if debiased else "cka_row" if row_norm == "row" else "cka"), row_norm == "cosine"


def _distance(
    student: Tensor, teacher: Tensor, centered: bool, row_norm: str, debiased: bool, weight: float
) -> Tensor:
    check_pair(student, teacher)
    compare, cosine = _comparison(row_norm, debiased)
    return gram_distance(student, teacher, compare=compare, centered=centered, cosine=cosine, weight=weight)


class CKALoss(Loss):
    """1 - CKA of features: L_FCKA of RCKA (Zhou et al., IJCAI 2024, Eq. 5, with the sign that is minimised).

    Args:
        centered, row_norm, debiased: see :func:`linear_cka`. ``centered=False, row_norm="row"`` is the published code.
        weight: factor on the value.

    Shape: student and teacher [N, ...], or sequences of such levels, whose losses are summed. Differentiable in both.

    Raises:
        ValueError, TypeError: see :func:`linear_cka`; unequal numbers of levels.
    """

    def __init__(
        self,
        *,
        centered: bool = True,
        row_norm: RowNorm = "none",
        debiased: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        _comparison(row_norm, debiased)
        self.centered, self.row_norm, self.debiased = centered, row_norm, debiased

    def forward(self, student: Levels, teacher: Levels) -> Tensor:
        settings = (self.centered, self.row_norm, self.debiased, self.weight)
        return total([_distance(s, t, *settings) for s, t in levels(student, teacher)]).float()


class LogitCKALoss(Loss):
    """Intra- and inter-class CKA of logits: L_LCKA of RCKA (Eqs. 6 and 7).

    Intra compares samples (rows of the logits), inter compares classes (columns); both come from one set of N x N
    Grams.

    Args:
        intra_weight, inter_weight: factors on the two terms.
        centered: subtract the mean over samples (intra) and over classes (inter).
        row_norm: see :func:`linear_cka`.
        temperature: compare softmax(logits / temperature) instead of the logits.
        weight: factor on the value.

    Shape: student and teacher [N, K]; K must agree unless ``inter_weight`` is 0. Differentiable in both.

    Raises:
        ValueError, TypeError: logits that are not float tensors of these shapes on one device; an unknown ``row_norm``; a
            temperature that is not above 0.

    Source: Zhou et al., IJCAI 2024.
    """

    def __init__(
        self,
        *,
        intra_weight: float = 1.0,
        inter_weight: float = 1.0,
        centered: bool = True,
        row_norm: RowNorm = "none",
        temperature: float | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        _comparison(row_norm, False)
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature: need a number above 0 or None, got {temperature!r}")
        self.intra_weight, self.inter_weight = intra_weight, inter_weight
        self.centered, self.row_norm, self.temperature = centered, row_norm, temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_pair(student, teacher)
        for name, logits in (("student", student), ("teacher", teacher)):
            if logits.dim() != 2:
                raise ValueError(f"{name}: need logits [N, K], got {describe(logits)}")
        if self.inter_weight and student.shape != teacher.shape:
            raise ValueError(
                f"inter_weight: student and teacher need equally many classes, got student {describe(student)}, "
                f"teacher {describe(teacher)}; set inter_weight=0 to compare samples only"
            )
        if self.temperature is not None:
            student = torch.softmax(wide(student) / self.temperature, dim=1)
            teacher = torch.softmax(wide(teacher) / self.temperature, dim=1)
        return pair_distance(
            student,
            teacher,
            self.weight * self.intra_weight,
            self.weight * self.inter_weight,
            self.centered,
            self.row_norm,
            "samples",
        )


def pair_distance(
    student: Tensor,
    teacher: Tensor,
    intra_weight: float,
    inter_weight: float,
    centered: bool,
    row_norm: str,
    layout: Literal["views", "samples"] = "views",
) -> Tensor:
    """Weighted intra and inter distances of two views [G, R1, R2, F1, F2, F3], averaged over the groups: a scalar.

    ``layout="samples"``: of logits [N, K].
    """
    compare, cosine = _comparison(row_norm, False)
    settings = {"compare": compare, "centered": centered, "cosine": cosine}
    if inter_weight and row_norm == "none":  # both terms in one call
        weights = {"weight": intra_weight, "inter_weight": inter_weight}
        return gram_distance(student, teacher, layout=layout, **settings, **weights).float()
    terms = []
    if intra_weight or not inter_weight:
        terms.append(gram_distance(student, teacher, layout=layout, **settings, weight=intra_weight).float())
    if inter_weight:
        row_axes = slice(0, 1) if layout == "samples" else slice(1, 3)
        rows, features = student.shape[row_axes].numel(), student.shape[row_axes.stop :].numel()
        if row_norm == "row" and features > rows:
            if layout == "samples":
                student, teacher = view(student, layout), view(teacher, layout)
            distance = inter_weight * row_inter_distance(student, teacher, centered).mean()
        else:
            if layout == "views":
                student, teacher = transposed(student), transposed(teacher)
            turned = "columns" if layout == "samples" else layout
            distance = gram_distance(student, teacher, layout=turned, **settings, weight=inter_weight)
        terms.append(distance.float())
    return total(terms)


class RCKALoss(Loss):
    """RCKA: feature CKA plus intra- and inter-class logit CKA (Zhou et al., IJCAI 2024, Eq. 4, without cross-entropy).

    Args:
        feature_weight: α of Eq. 4, on the features' CKA, summed over levels.
        logit_weight: β of Eq. 4, on intra + inter CKA of the logits. The paper's main text gives neither; 1 and 15 are
            from the authors' code.
        centered, row_norm: see :func:`linear_cka`.
        weight: factor on the value.

    Shape: features [N, ...] or sequences of them; logits [N, K]. Differentiable in all four.

    Raises:
        ValueError, TypeError: see :class:`CKALoss` and :class:`LogitCKALoss`.
    """

    def __init__(
        self,
        *,
        feature_weight: float = 1.0,
        logit_weight: float = 15.0,
        centered: bool = True,
        row_norm: RowNorm = "none",
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        self.features = CKALoss(centered=centered, row_norm=row_norm, weight=feature_weight)
        self.logits = LogitCKALoss(centered=centered, row_norm=row_norm, weight=logit_weight)

    def forward(
        self,
        student_features: Levels,
        teacher_features: Levels,
        student_logits: Tensor,
        teacher_logits: Tensor,
    ) -> Tensor:
        features = self.features(student_features, teacher_features)
        return self.weight * (features + self.logits(student_logits, teacher_logits))


class _GramLoss(Loss):
    """``weight`` times a comparison of the uncentred Grams over samples, summed over levels."""

    def _compare(self, student: Levels, teacher: Levels, compare: str) -> Tensor:
        terms = []
        for s, t in levels(student, teacher):
            check_pair(s, t)
            if s.shape[0] == 0 and compare != "cka":  # 1 - CKA of nothing is 1, as of one sample
                terms.append(nothing(s, t))
                continue
            terms.append(gram_distance(s, t, compare=compare, centered=False, weight=self.weight).float())
        return total(terms)


class GramMMDLoss(_GramLoss):
    """The MMD side of RCKA's Theorem 2, for ablations; uncentred, because centring makes the bound vacuous.

    Args:
        kind: ``"gram"``: N²/2 (mean K/|K| - mean L/|L|)², the lower bound of 1 - CKA. ``"upper"``: half the squared
            distance of the unit Grams, equal to 1 - CKA. ``"author"``: what the published ablation computes,
            mean((ĝ - ĥ)²) - ½ mean(ĝ² + ĥ²) on Grams with rows of unit length, plus its constant so that it is >= 0.
        patch_size: None compares samples; an int or a pair compares the patches of maps (Table 6).
        average, resize: of patches, see :class:`kdfast.PCKALoss`.
        weight: factor on the value.

    Shape: student and teacher [N, ...] (patches: [B, C, H, W]), or sequences of such levels. Differentiable in both.

    Raises:
        ValueError, TypeError: an unknown ``kind``, ``average`` or ``resize``; levels, samples, channels or numbers of
            patches that do not match.

    Source: Zhou et al., IJCAI 2024.
    """

    def __init__(
        self,
        *,
        kind: Literal["gram", "upper", "author"] = "gram",
        weight: float = 1.0,
        patch_size: PatchSize | None = None,
        average: Average = "channel",
        resize: Resize = "bilinear",
    ) -> None:
        super().__init__(weight)
        check_choice("kind", kind, ("gram", "upper", "author"))
        check_choice("average", average, ("channel", "batch", "spatial"))
        self.kind, self.average, self.resize = kind, average, resize
        self.patch_size = None if patch_size is None else check_patches(patch_size, resize)

    def forward(self, student: Levels, teacher: Levels) -> Tensor:
        compare = {"gram": "mean", "upper": "cka", "author": "row_cosine"}[self.kind]
        if self.patch_size is None:
            return self._compare(student, teacher, compare)
        terms = []
        for s, t in levels(student, teacher):
            check_maps(s, t, same_channels=self.average == "channel")
            grid = grid_of(s, t, self.patch_size, self.resize, self.average)
            _, distance = patch_gram(s, t, grid, compare=compare, centered=False)
            terms.append(distance.float().mean())
        return self.weight * total(terms)


class SimilarityPreservingLoss(_GramLoss):
    """Similarity-preserving distillation (Tung & Mori, ICCV 2019): |K̃ - L̃|²_F / N², rows of the Grams of unit length.

    Args:
        weight: factor on the value; 3000 in the published code.

    Shape: student and teacher [N, ...], or sequences of such levels, whose losses are summed. Differentiable in both.

    Raises:
        ValueError, TypeError: inputs that are not float tensors with equally many samples on one device.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__(weight)

    def forward(self, student: Levels, teacher: Levels) -> Tensor:
        return self._compare(student, teacher, "row_cosine")


class PairwiseAffinityLoss(Loss):
    """Pair-wise distillation (Liu et al., CVPR 2019): mean squared difference of all pixels' cosine similarities.

    The N x N affinities of N = H W pixels are not formed when the channels are fewer: |K - L|² comes from C x C
    products.

    Args:
        weight: factor on the value.

    Shape: student [B, C, H, W], teacher [B, C', H, W], or sequences of such levels; mean over images, sum over levels.
    Differentiable in both.

    Raises:
        ValueError, TypeError: maps that are not float tensors of one size on one device.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__(weight)

    def forward(self, student: Levels, teacher: Levels) -> Tensor:
        terms = []
        for s, t in levels(student, teacher):
            check_pair(s, t)
            if s.dim() != 4 or t.dim() != 4 or s.shape[2:] != t.shape[2:]:
                raise ValueError(
                    f"student and teacher need maps [B, C, H, W] of one size H x W, got student {describe(s)}, "
                    f"teacher {describe(t)}"
                )
            if s.numel() == 0 or t.numel() == 0:
                terms.append(nothing(s, t))
                continue
            settings = {"compare": "difference", "centered": False, "cosine": True, "weight": self.weight}
            terms.append(gram_distance(s, t, layout="pixels", **settings).float())
        return total(terms)

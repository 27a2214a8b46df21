"""Feature direction and norm: dino-loss of KD++ (Wang et al.), and the regularisers it is compared with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..class_means import ClassMeans
from ..ops.direction import direction
from ..ops.projector import projector, supports
from ..reference._common import autocast_device
from ..reference.direction import norm
from ._common import Loss, check_choice, check_fits, check_float, check_pair, describe, wide

Reduction = Literal["mean", "class_balanced"]
REDUCTIONS = ("mean", "class_balanced")
IGNORE = -100


def direction_norm_loss(
    student: Tensor,
    teacher: Tensor,
    class_means: Tensor | ClassMeans | None,
    labels: Tensor,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = IGNORE,
    weight: float = 1.0,
) -> Tensor:
    """dino-loss: mean of 1 - <f_s, e_y> / max(|f_s|, |f_t|), e_y the unit class mean (KD++, Eq. 5 to 7).

    It turns the student's embedding towards its class mean and, while it is shorter than the teacher's, lengthens it.

    Args:
        student, teacher: embeddings of the same samples [B, D]; see :class:`EmbeddingProjector` where D differs.
        class_means: [K, D], mean teacher embedding of every class over the training set (:class:`ClassMeans`). Rows of
            the teacher's classifier weight serve too (the paper's Table 5). A zero row is a class without a mean.
        labels: [B] integers in [0, K); or [B, D] floats, every sample's own centre (mixed labels), ``class_means``
            then is None.
        reduction: ``"mean"`` over samples (published code); ``"class_balanced"``: mean over the classes of the batch of
            their means (Eq. 7), for labels only.
        ignore_index: label of samples that do not count.
        weight: factor on the value.

    Returns:
        float32 scalar (float64 where an input is) >= 0, differentiable in every float input. Samples with
        ``ignore_index`` or with a zero centre do not count; 0 where none counts. A student and teacher of length 0 have
        distance 1 and no gradient. Nothing is read back from the device: there a label out of range makes the loss
        NaN (Triton) or fails an assertion (PyTorch).

    Raises:
        ValueError, TypeError: shapes, types or devices that do not fit.
        RuntimeError, IndexError: on the CPU, a label outside [0, K) that is not ``ignore_index``.
    """
    check_float("student", student)
    check_float("teacher", teacher)
    if student.shape != teacher.shape or student.dim() != 2 or student.device != teacher.device:
        raise ValueError(
            f"student and teacher need one shape [B, D] (project the student with EmbeddingProjector) on one device, "
            f"got student {describe(student)}, teacher {describe(teacher)}"
        )
    centers, labels = _centers(student, class_means, labels)
    balanced = _balanced(reduction, labels)
    return direction(
        student, teacher, centers, labels, ignore_index=ignore_index, balanced=balanced, weight=weight
    )


def _balanced(reduction: str, labels: Tensor | None) -> bool:
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "mean":
        return False
    if labels is None:
        raise ValueError("reduction='class_balanced' needs labels [B], got a centre per sample")
    return True


def _centers(
    student: Tensor, class_means: Tensor | ClassMeans | None, labels: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Centres and int64 labels of the op; per-sample centres have no labels."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: need a tensor, got {describe(labels)}")
    if labels.dtype is torch.int64:
        pass
    elif labels.is_floating_point():
        if labels.shape != student.shape or labels.device != student.device:
            raise ValueError(
                f"labels: centres per sample need the student's shape and device, {describe(student)}, "
                f"got {describe(labels)}; class labels are integers"
            )
        return labels, None
    elif labels.dtype == torch.bool or labels.dtype.is_complex:
        raise TypeError(f"labels: need integers [B] or floats [B, D], got {describe(labels)}")
    else:
        labels = labels.long()
    if isinstance(class_means, ClassMeans):
        class_means = class_means.compute().to(student.device)
    check_float("class_means", class_means)
    if class_means.dim() != 2 or class_means.shape[1] != student.shape[1] or class_means.shape[0] == 0:
        raise ValueError(
            f"class_means: need [K, {student.shape[1]}], one row per class, got {describe(class_means)}"
        )
    if labels.shape != student.shape[:1]:
        raise ValueError(f"labels: need [{student.shape[0]}], one per sample, got {describe(labels)}")
    if not (class_means.device == labels.device == student.device):
        raise ValueError(
            f"student, class_means and labels must be on one device, got student {describe(student)}, "
            f"class_means {describe(class_means)}, labels {describe(labels)}"
        )
    return class_means, labels


class _ClassMeansLoss(Loss):
    """A loss that holds class means as a buffer, which moves with the module and is not part of its state_dict."""

    class_means: Tensor | None

    def __init__(self, class_means: Tensor | ClassMeans | None, weight: float) -> None:
        super().__init__(weight)
        if isinstance(class_means, ClassMeans):
            class_means = class_means.compute()
        if class_means is not None:
            check_float("class_means", class_means)
            if class_means.dim() != 2:
                raise ValueError(f"class_means: need [K, D], got {describe(class_means)}")
            class_means = class_means.detach()
        self.register_buffer("class_means", class_means, persistent=False)


class DirectionNormLoss(_ClassMeansLoss):
    """dino-loss of KD++: :func:`direction_norm_loss` with the class means kept in the module.

    Args:
        class_means: :class:`ClassMeans` or [K, D]; None where every call brings per-sample centres as labels.
        reduction, ignore_index: see :func:`direction_norm_loss`.
        weight: factor on the value.

    Shape: student and teacher [B, D], labels [B] (or [B, D], see the function).

    Variants of the paper: *with classifier weights* (Table 5) is ``DirectionNormLoss(teacher.fc.weight)``. *Layer x*
    takes one instance per layer, each with that layer's class means, on pooled maps: ``loss(projector(f.mean((2, 3))),
    t.mean((2, 3)), labels)``; only the last embedding (x = 0) is best in the paper.

    Differentiable and raises as the function.
    """

    def __init__(
        self,
        class_means: Tensor | ClassMeans | None,
        *,
        reduction: Reduction = "mean",
        ignore_index: int = IGNORE,
        weight: float = 1.0,
    ) -> None:
        super().__init__(class_means, weight)
        check_choice("reduction", reduction, REDUCTIONS)
        self.reduction, self.ignore_index = reduction, ignore_index

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return direction_norm_loss(
            student,
            teacher,
            self.class_means,
            labels,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            weight=self.weight,
        ).float()


class DirectionLoss(_ClassMeansLoss):
    """Direction alone (KD++, Eq. 1 and 2).

    Args:
        class_means: :class:`ClassMeans` or [K, D].
        kind: ``"cosine"``: mean of 1 - cos(f_s, c_y). ``"infonce"``: cross-entropy over the cosines to all class means,
            divided by ``temperature``; classes without a mean (zero rows) take no part.
        temperature: of InfoNCE; the paper has none, that is 1.
        reduction, ignore_index: see :func:`direction_norm_loss`; the paper averages class-balanced.
        weight: factor on the value.

    Shape: student [B, D], labels [B]. Called with (student, labels) or, as :class:`DirectionNormLoss` is, with
    (student, teacher, labels), where the teacher is not read. Differentiable in the student.

    Raises:
        ValueError, TypeError: as :func:`direction_norm_loss`; a temperature that is not above 0; centres per sample where
            classes are needed.
    """

    def __init__(
        self,
        class_means: Tensor | ClassMeans,
        *,
        kind: Literal["cosine", "infonce"] = "cosine",
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        ignore_index: int = IGNORE,
        weight: float = 1.0,
    ) -> None:
        super().__init__(class_means, weight)
        check_choice("kind", kind, ("cosine", "infonce"))
        check_choice("reduction", reduction, REDUCTIONS)
        if not temperature > 0:
            raise ValueError(f"temperature: need a number above 0, got {temperature!r}")
        self.kind, self.temperature = kind, temperature
        self.reduction, self.ignore_index = reduction, ignore_index

    def forward(self, student: Tensor, teacher: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            if self.class_means is not None and isinstance(teacher, Tensor) and teacher.is_floating_point():
                raise TypeError(
                    f"labels: need integers [B] for the class means kept here, got {describe(teacher)}"
                )
            labels = teacher
        check_float("student", student)
        if student.dim() != 2:
            raise ValueError(f"student: need [B, D], got {describe(student)}")
        centers, labels = _centers(student, self.class_means, labels)
        balanced = _balanced(self.reduction, labels)
        if self.kind == "cosine":
            return direction(
                student,
                None,
                centers,
                labels,
                ignore_index=self.ignore_index,
                balanced=balanced,
                weight=self.weight,
            ).float()
        if labels is None:
            raise ValueError("labels: kind='infonce' needs labels [B], got a centre per sample")
        return self.weight * self._infonce(student, centers, labels, balanced).float()

    def _infonce(self, student: Tensor, centers: Tensor, labels: Tensor, balanced: bool) -> Tensor:
        dtype = torch.float64 if torch.float64 in (student.dtype, centers.dtype) else torch.float32
        with torch.autocast(autocast_device(student), enabled=False):
            s, c = student.to(dtype), centers.to(dtype)
            known = norm(c) != 0  # [K]
            cosines = nn.functional.normalize(s, dim=1) @ nn.functional.normalize(c, dim=1).T  # [B, K]
            scores = (cosines / self.temperature).masked_fill(~known, float("-inf"))
            present = labels != self.ignore_index
            counts = present & known.index_select(0, torch.where(present, labels, 0))
            # A row that does not count takes no part in the softmax either: its terms could be infinite.
            terms = nn.functional.cross_entropy(
                torch.where(counts[:, None], scores, 0), torch.where(counts, labels, 0), reduction="none"
            )
            weight = counts.to(dtype)
            if balanced:
                safe = torch.where(counts, labels, 0)
                size = weight.new_zeros(c.shape[0]).index_add(0, safe, weight)
                weight = weight / size.index_select(0, safe).clamp_min(1)
            total = weight.sum()
            return (torch.where(counts, terms, 0) * weight).sum() / torch.where(total > 0, total, 1)


class NormLoss(Loss):
    """Norm alone (KD++, Eq. 3 and 4), mean over the batch.

    Args:
        kind: ``"l2"``: |f_s - f_t|², summed over D. ``"sifn"``: (|f_s| - (|f_prev| + step))², the stepwise increase of
            feature norms (SAFN, Xu et al. 2019), where f_prev is the same step's detached student by default.
        step: r of Eq. 4. The paper gives none; 1 is from SAFN's code.
        weight: factor on the value.

    Shape: student [B, D], teacher [B, D] (unused and optional for ``"sifn"``), ``previous_norms`` [B] for ``"sifn"``.
    Differentiable in student and, for ``"l2"``, teacher.

    Raises:
        ValueError, TypeError: an unknown kind; shapes, types or devices that do not fit.
    """

    def __init__(self, kind: Literal["l2", "sifn"] = "l2", step: float = 1.0, *, weight: float = 1.0) -> None:
        super().__init__(weight)
        check_choice("kind", kind, ("l2", "sifn"))
        self.kind, self.step = kind, step

    def forward(
        self, student: Tensor, teacher: Tensor | None = None, *, previous_norms: Tensor | None = None
    ) -> Tensor:
        check_float("student", student)
        if student.dim() != 2:
            raise ValueError(f"student: need [B, D], got {describe(student)}")
        rows = max(student.shape[0], 1)  # an empty batch has loss 0
        if self.kind == "l2":
            if not isinstance(teacher, Tensor) or teacher.shape != student.shape:
                raise ValueError(
                    f"teacher: kind='l2' needs the student's shape {describe(student)}, got {describe(teacher)}"
                )
            check_pair(student, teacher)
            return self.weight * ((wide(student) - wide(teacher)).square().sum() / rows).float()
        norms = norm(wide(student))  # [B]
        if previous_norms is None:
            previous_norms = norms.detach()
        elif not isinstance(previous_norms, Tensor) or previous_norms.shape != norms.shape:
            raise ValueError(
                f"previous_norms: need a tensor {list(norms.shape)}, one per sample, got {describe(previous_norms)}"
            )
        return self.weight * ((norms - (previous_norms + self.step)).square().sum() / rows).float()


class EmbeddingProjector(nn.Sequential):
    """Student embedding to the teacher's width, for the direction branch only: batch norm, dropout, linear layer.

    Args:
        in_dim, out_dim: widths of student and teacher.
        dropout: probability; 0.5 in the published code.
        init: ``"zero_bias"`` (CIFAR: PyTorch's weight, bias 0) or ``"normal"`` (ImageNet: both from N(0, 0.01²)).

    Shape: [B, in_dim] to [B, out_dim]. The classifier keeps reading the embedding before it. Differentiable in its input
    and parameters.

    Raises:
        ValueError, TypeError: an unknown ``init``; an input of another shape, type or device.

    Source: Wang et al., KD++, and its published code.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        dropout: float = 0.5,
        *,
        init: Literal["zero_bias", "normal"] = "zero_bias",
    ) -> None:
        check_choice("init", init, ("zero_bias", "normal"))
        linear = nn.Linear(in_dim, out_dim)
        if init == "normal":
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.normal_(linear.bias, std=0.01)
        else:
            nn.init.zeros_(linear.bias)
        super().__init__(nn.BatchNorm1d(in_dim), nn.Dropout(dropout), linear)
        self.in_dim = in_dim

    def forward(self, input: Tensor) -> Tensor:
        check_float("input", input)
        if input.dim() != 2 or input.shape[1] != self.in_dim:
            raise ValueError(f"input: need [B, {self.in_dim}], got {describe(input)}")
        check_fits("input", input, self[2].weight)
        found = None if torch.compiler.is_compiling() else self._in_one_op(input)
        return super().forward(input) if found is None else found

    def _in_one_op(self, x: Tensor) -> Tensor | None:
        """What the three layers do, where none was changed and they train in float32 on the CPU; else None."""
        layers = [*self._modules.values()]
        if [*map(type, layers)] != _LAYERS or any(map(_hooked, layers)) or _has_any_global_hook():
            return None
        norm, dropout, linear = layers
        tensors = (
            norm._parameters["weight"],
            norm._parameters["bias"],
            linear._parameters["weight"],
            linear._parameters["bias"],
            norm._buffers["running_mean"],
            norm._buffers["running_var"],
        )
        if not norm.training or norm.momentum is None or dropout.p == 1 or not supports(x, *tensors):
            return None
        noise = None
        if dropout.training and dropout.p > 0:  # the mask that nn.Dropout would draw
            noise = torch.empty_like(x).bernoulli_(1 - dropout.p).div_(1 - dropout.p)
        norm._buffers["num_batches_tracked"].add_(1)
        return projector(x, noise, *tensors, norm.momentum, norm.eps)


_LAYERS = [nn.BatchNorm1d, nn.Dropout, nn.Linear]


def _hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward, or its forward is not its class's."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )

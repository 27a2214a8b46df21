"""KD++, DKD++, DIST++ and ReviewKD++ (Wang et al., Eq. 8): cross-entropy + α L_kd + β L_dino, with published weights.

Weights and warm-ups are those of the authors' training scripts, not of the paper's text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .class_means import ClassMeans
from .losses._common import plus
from .losses.direction import DirectionNormLoss, direction_norm_loss

__all__ = ["RECIPES", "PlusPlusLoss", "Recipe", "plus_plus"]


@dataclass(frozen=True)
class Recipe:
    """Weights of one teacher and student on one data set.

    ``kd`` and ``nd`` weigh the base loss and dino-loss; the base loss is multiplied by min(1, epoch / warmup), epochs
    counted from 0, and with ``warm_nd`` dino-loss too. ``kd`` None: ``alpha`` and ``beta`` of DKD carry the weight.
    """

    kd: float | None
    nd: float
    temperature: float
    warmup: int
    alpha: float | None = None
    beta: float | None = None
    warm_nd: bool = False


CIFAR_PAIRS = (
    "resnet56-resnet20",
    "resnet32x4-resnet8x4",
    "wrn_40_2-wrn_40_1",
    "resnet50-mobilenetv2",
    "resnet32x4-shufflenetv1",
    "resnet32x4-shufflenetv2",
)
IMAGENET_PAIRS = (
    "resnet34-resnet18",
    "resnet50-resnet18",
    "resnet101-resnet18",
    "resnet152-resnet18",
    "resnet50-mobilenetv1",
)
VIT_PAIRS = ("vit_small-resnet18", "vit_base-resnet18")
COCO_PAIRS = ("resnet101-resnet18", "resnet101-resnet50", "resnet50-mobilenetv2")  # Faster R-CNN with FPN


@dataclass(frozen=True)
class _Table:
    """Rows of one data set: method -> (kd, or (alpha, beta) for DKD; nd), in the order of the pairs."""

    dataset: str
    pairs: tuple[str, ...]
    temperature: float
    warmup: int
    warm_nd: tuple[str, ...]  # the methods whose scripts warm dino-loss up too
    methods: dict[str, tuple[tuple, tuple]]


_TABLES = (
    _Table(
        "cifar100", CIFAR_PAIRS, 4.0, 20, (),
        {
            "kd++": ((1.0, 3.5, 1.0, 3.0, 2.5, 4.0), (2.0, 2.0, 1.5, 0.5, 1.5, 0.5)),
            "dkd++": (((2.5, 4), (2, 8), (1, 6), (0.5, 8), (0.5, 8), (0.5, 6)), (3.5, 0.5, 1.0, 1.0, 4.0, 0.5)),
            "dist++": ((2.0, 1.5, 2.5, 7.0, 2.5, 3.0), (1.0, 4.0, 3.0, 1.0, 3.0, 4.0)),
            "reviewkd++": ((1.2, 8, 5, 6, 7, 8), (1.0, 1.0, 4.0, 2.0, 1.0, 1.5)),
        },
    ),
    _Table(
        "imagenet", IMAGENET_PAIRS, 1.0, 5, ("kd++", "dkd++", "reviewkd++"),
        {
            "kd++": ((2.5, 4.0, 3.5, 4.0, 4.0), (1, 1, 4, 2, 1)),
            "dkd++": (((0.8, 0.5), (0.6, 0.5), (0.8, 0.5), (1, 1), (0.8, 1)), (1, 2, 1, 1, 1)),
            "reviewkd++": ((1, 3, 3, 3, 8), (3, 2, 1, 1, 4)),
        },
    ),
    _Table(
        "imagenet", VIT_PAIRS, 1.0, 5, ("dkd++",),
        {"kd++": ((1.5, 2.0), (1, 1)), "dkd++": (((1, 1), (1.4, 0.5)), (2, 2))},
    ),
    # On the embeddings and logits of the box head, for the student's proposals; labels include the background.
    _Table(
        "coco", COCO_PAIRS, 1.0, 0, (),
        {"kd++": ((1.0, 1.0, 1.0), (1.5, 1.0, 1.0)), "reviewkd++": ((1.2, 1.4, 2.2), (1.5, 1.0, 1.5))},
    ),
)  # fmt: skip


def _recipes() -> dict[tuple[str, str, str], Recipe]:
    found = {}
    for table in _TABLES:
        for method, (kd, nd) in table.methods.items():
            for pair, k, n in zip(table.pairs, kd, nd, strict=True):
                alpha, beta = k if isinstance(k, tuple) else (None, None)
                weight = None if isinstance(k, tuple) else float(k)
                found[method, table.dataset, pair] = Recipe(
                    weight, float(n), table.temperature, table.warmup, alpha, beta, method in table.warm_nd
                )
    return found


#: (method, data set, "teacher-student") -> published weights
RECIPES = _recipes()


class PlusPlusLoss(nn.Module):
    """cross-entropy + kd · L_kd + nd · L_dino.

    Args:
        base: the distillation loss to be improved; called with what ``forward`` gets as ``base_inputs``.
        class_means: of the teacher's embeddings, :class:`ClassMeans` or [K, D].
        recipe: weights and warm-up; see :data:`RECIPES` and :func:`plus_plus`.
        ce_weight: of the cross-entropy; with 0 it is not computed, for training code that adds its own.

    Forward: ``(student_logits, student_embedding, teacher_embedding, labels, base_inputs, epoch)``; logits [B, K],
    embeddings [B, D] (the student's after its projector where widths differ), labels [B], ``base_inputs`` the tuple
    that the base loss takes, ``epoch`` counted from 0, with fractions if wanted. Returns a float32 scalar.
    """

    def __init__(
        self,
        base: Callable[..., Tensor],
        class_means: Tensor | ClassMeans,
        recipe: Recipe,
        *,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.base, self.recipe, self.ce_weight = base, recipe, ce_weight
        self.direction = DirectionNormLoss(class_means)

    def warm(self, epoch: float) -> float:
        """Factor of the base loss at ``epoch``."""
        return min(1.0, epoch / self.recipe.warmup) if self.recipe.warmup else 1.0

    def forward(
        self,
        student_logits: Tensor,
        student_embedding: Tensor,
        teacher_embedding: Tensor,
        labels: Tensor,
        base_inputs: tuple[Any, ...],
        epoch: float,
    ) -> Tensor:
        warm = self.warm(epoch)
        nd = self.recipe.nd * (warm if self.recipe.warm_nd else 1.0)
        dino = direction_norm_loss(
            student_embedding, teacher_embedding, self.direction.class_means, labels, weight=nd
        ).float()
        kd = (1.0 if self.recipe.kd is None else self.recipe.kd) * warm
        found = plus(dino, kd, self.base(*base_inputs))
        if self.ce_weight == 0:
            return found
        return plus(found, self.ce_weight, F.cross_entropy(student_logits.float(), labels))


def plus_plus(
    method: str,
    class_means: Tensor | ClassMeans,
    *,
    dataset: str = "cifar100",
    pair: str = "resnet56-resnet20",
    base: Callable[..., Tensor] | None = None,
) -> PlusPlusLoss:
    """A ++ composition with published weights.

    Args:
        method: ``"kd++"``, ``"dkd++"``, ``"dist++"`` or ``"reviewkd++"``.
        class_means: of the teacher's embeddings over the training set.
        dataset, pair: a row of :data:`RECIPES`.
        base: the base loss; by default KD, DKD or DIST with the recipe's settings. ReviewKD has modules that depend on
            the networks: pass a :class:`kdfast.losses.review.ReviewKDLoss`.

    Raises:
        ValueError: no such row, or ``"reviewkd++"`` without ``base``.
    """
    recipe = RECIPES.get((method, dataset, pair))
    if recipe is None:
        rows = [k for k in RECIPES if k[0] == method] or sorted({k[0] for k in RECIPES})
        raise ValueError(
            f"method, dataset, pair: no published weights for {(method, dataset, pair)}; there are {rows}"
        )
    if base is None:
        if method == "reviewkd++":
            raise ValueError("base: 'reviewkd++' needs a ReviewKDLoss made for the two networks")
        from .losses import logits

        if method == "kd++":
            base = logits.KDLoss(temperature=recipe.temperature)
        elif method == "dkd++":
            base = logits.DKDLoss(alpha=recipe.alpha, beta=recipe.beta, temperature=recipe.temperature)
        else:
            base = logits.DISTLoss(temperature=recipe.temperature)
    return PlusPlusLoss(base, class_means, recipe)

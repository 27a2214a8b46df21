"""One small call of every loss that has kernels, forward and backward, on any device, backend, dtype and layout.

The GPU tests run them all; ``python tests/scenarios.py --device cuda`` runs each once, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import kdfast
from kdfast.ops.feature_augment import feature_augment
from kdfast.reference.feature_augment import plan

LAYOUTS = ("contiguous", "channels_last", "sliced")


class Scenario(NamedTuple):
    """``loss`` of float tensors of these shapes; further ``labels`` in [0, classes). ``grads``: how many need gradients."""

    loss: Callable[..., Tensor]
    shapes: Sequence[tuple[int, ...]]
    grads: int = 1
    labels: tuple[int, int] | None = None  # count, classes
    op: str = "gram"

    def inputs(
        self, device: str, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = []
        for i, shape in enumerate(self.shapes):
            x = torch.randn(shape, generator=generator).to(device, dtype)
            made.append(_laid_out(x, layout).requires_grad_(i < self.grads))
        if self.labels is not None:
            count, classes = self.labels
            labels = torch.randint(classes, (count,), generator=generator)
            labels[count // 2] = -100
            made.append(labels.to(device))
        return made

    def layouts(self) -> tuple[str, ...]:
        return LAYOUTS if any(len(shape) == 4 for shape in self.shapes) else ("contiguous", "sliced")


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # rows apart, and no row starts where 16 bytes do
        wide = x.new_zeros((*x.shape[:-1], x.shape[-1] + 3))
        wide[..., 1:-2] = x
        return wide[..., 1:-2].detach()
    return x


def _means(student: Tensor, teacher: Tensor, means: Tensor, labels: Tensor) -> Tensor:
    return kdfast.direction_norm_loss(student, teacher, means, labels)


def _balanced(student: Tensor, teacher: Tensor, means: Tensor, labels: Tensor) -> Tensor:
    return kdfast.direction_norm_loss(student, teacher, means, labels, reduction="class_balanced")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _squared(relation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: _wide(relation(*inputs)).square().mean()


def _augmented(*chain: tuple[str, float, int]) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(x: Tensor, teacher: Tensor) -> Tensor:
        return (_wide(feature_augment(x, plan(x.shape, chain))) - _wide(teacher)).square().mean()

    return loss


_MAP, _ODD_MAP = (2, 24, 32, 48), (2, 24, 13, 21)
_PAIR = [(37, 129)] * 2
SCENARIOS: dict[str, Scenario] = {
    "cka": Scenario(kdfast.CKALoss(), [(24, 700), (24, 333)], 2),
    "cka-many-rows": Scenario(kdfast.CKALoss(), [(300, 520), (300, 520)], 2),
    "cka-features": Scenario(kdfast.CKALoss(), [(900, 40), (900, 24)], 2),
    "cka-row-norm": Scenario(kdfast.CKALoss(row_norm="row"), [(77, 500)] * 2),
    "logit-cka": Scenario(kdfast.LogitCKALoss(), [(64, 100)] * 2),
    "similarity-preserving": Scenario(kdfast.SimilarityPreservingLoss(), [(65, 500)] * 2),
    "pcka": Scenario(kdfast.PCKALoss(patch_size=8), [_ODD_MAP] * 2, 2, op="patch_gram"),
    "pcka-inter": Scenario(kdfast.PCKALoss(patch_size=8, inter_weight=1.0), [_ODD_MAP] * 2, op="patch_gram"),
    "pcka-batch": Scenario(kdfast.PCKALoss(patch_size=8, average="batch"), [_ODD_MAP] * 2, op="patch_gram"),
    "pcka-spatial": Scenario(
        kdfast.PCKALoss(patch_size=8, average="spatial"), [_ODD_MAP] * 2, op="patch_gram"
    ),
    "pcka-whole-patches": Scenario(kdfast.PCKALoss(patch_size=8), [_MAP] * 2, op="patch_gram"),
    "attention": Scenario(kdfast.AttentionGuidedLoss(), [_MAP] * 2, 2, op="attention_mask"),
    "attention-odd": Scenario(kdfast.AttentionGuidedLoss(), [_ODD_MAP] * 2, op="attention_mask"),
    "attention-signed": Scenario(
        kdfast.AttentionGuidedLoss.preset("two_stage"), [_MAP] * 2, op="attention_mask"
    ),
    "attention-through-masks": Scenario(
        kdfast.AttentionGuidedLoss(detach_mask=False), [_MAP] * 2, 2, op="attention_mask"
    ),
    "direction": Scenario(_means, [(64, 96), (64, 96), (10, 96)], 1, (64, 10), "direction"),
    "direction-balanced": Scenario(_balanced, [(51, 77), (51, 77), (10, 77)], 2, (51, 10), "direction"),
    "kd": Scenario(kdfast.KDLoss(), _PAIR, 2, op="logits"),
    "kd-vocabulary": Scenario(kdfast.KDLoss(), [(16, 9001)] * 2, op="logits"),
    "dkd": Scenario(kdfast.DKDLoss(), _PAIR, 2, (37, 129), "logits"),
    "nkd": Scenario(kdfast.NKDLoss(), _PAIR, 2, (37, 129), "logits"),
    "dist": Scenario(kdfast.DISTLoss(), _PAIR, 2, op="logits"),
    "concatenation": Scenario(
        _squared(kdfast.concatenation_affinity), [(2, 150), (2, 90), (2, 90, 40)], 3, op="affinity"
    ),
    "criss-cross": Scenario(
        _squared(kdfast.criss_cross_attention),
        [(2, 8, 13, 21), (2, 8, 13, 21), (2, 24, 13, 21)],
        3,
        op="criss_cross",
    ),
    "augment": Scenario(
        _augmented(("noise", 0.1, 1), ("rotate", 20.0, 2), ("cutout", 0.3, 3)),
        [_ODD_MAP] * 2,
        op="feature_augment",
    ),
    "augment-channels": Scenario(
        _augmented(("channel_shuffle", 0.0, 2), ("channel_drop", 0.3, 4)),
        [_ODD_MAP] * 2,
        op="feature_augment",
    ),
}


def step(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The value and the gradients, on copies that keep the inputs' strides."""
    inputs = [v.detach().requires_grad_(v.requires_grad) for v in inputs]
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, [v for v in inputs if v.requires_grad])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", nargs="+", help="default: those of the device")
    options = parser.parse_args()
    for backend in options.backend or (["triton", "cuda"] if options.device == "cuda" else ["cpu"]):
        for name, scenario in SCENARIOS.items():
            for layout in scenario.layouts():
                with kdfast.use_backend(backend):
                    try:
                        found = step(scenario.loss, scenario.inputs(options.device, layout=layout))
                    except NotImplementedError as error:
                        print(f"{backend} {name}, {layout}: left out: {error}")
                        continue
                if not all(bool(v.isfinite().all()) for v in found):
                    raise SystemExit(f"{backend} {name}, {layout}: not finite")
                print(f"{backend} {name}, {layout}: {float(found[0]):.6g}", flush=True)


if __name__ == "__main__":
    main()

"""Differentiable automatic feature augmentation (Shen et al., Sec. 3.2): a learned policy of operations on teacher maps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..losses._common import Levels, check_choice, check_float, check_pair, describe, levels, total, wide
from ..losses.features import check_same_shape
from ..ops.feature_augment import feature_augment
from ..reference.feature_augment import plan
from ._estimator import choose, straight_through, valued


@dataclass(frozen=True)
class Range:
    """What magnitudes 0 and 1 of an operation mean, and in which unit."""

    low: float
    high: float
    unit: str

    def value(self, magnitude: float) -> float:
        return self.low + (self.high - self.low) * magnitude


#: The operations and their ranges. Those from -x to x are the identity at magnitude 0.5, with which they start.
OPERATIONS: dict[str, Range] = {
    "shear_x": Range(-0.3, 0.3, "columns per row"),
    "shear_y": Range(-0.3, 0.3, "rows per column"),
    "translate_x": Range(-0.45, 0.45, "of the width"),
    "translate_y": Range(-0.45, 0.45, "of the height"),
    "rotate": Range(-30.0, 30.0, "degrees"),
    "cutout": Range(0.0, 0.2, "of each side"),
    "noise": Range(0.0, 0.1, "standard deviation"),
    "channel_shuffle": Range(0.0, 1.0, "(no magnitude)"),
    "channel_drop": Range(0.0, 0.5, "of the channels"),
}
Estimator = Literal["straight_through", "mixture"]


class Draw(NamedTuple):
    """One draw from a policy: sub-policy, for each of its operations whether it is applied, and what seeds the rest."""

    policy: int
    applied: tuple[bool, ...]
    seeds: tuple[int, ...]
    gumbel: Tensor  # [P]
    logistic: Tensor  # [k], of the drawn sub-policy, or [P, k] for the mixture


class FeatureAugmentation(nn.Module):
    """DAFA: sub-policies of ``length`` operations with learned weights, probabilities and magnitudes (Eqs. 3 to 10).

    A call draws one sub-policy by its logits, and applies each of its operations with its probability and magnitude to
    the whole batch and to every level. The draw is exact (hard); gradients follow a relaxation of it:

    - policy logits: as if the result were F + w (F̂ - F), w the drawn entry of softmax((logits + Gumbel) / temperature);
      the sub-policies that were not drawn count as the identity;
    - probabilities: as if an operation gave b O(x) + (1 - b) x, b a relaxed Bernoulli variable (Eqs. 6 and 9);
    - magnitudes: straight through, dF̂/dm = 1 in every element where the operation was applied (Eq. 10).

    With ``estimator="mixture"`` the value is the relaxation itself, Σ w_s s(F) over all sub-policies (Eq. 8), which
    costs every operation of every sub-policy.

    Args:
        operations: names from :data:`OPERATIONS`; all nine by default.
        length: k, operations of a sub-policy. All combinations without repetition are sub-policies.
        policies: keep this many of them, drawn by ``seed``; None keeps all (36 for two of nine operations).
        estimator: how gradients reach the policy.
        temperature: τ of the Gumbel softmax; relaxation: λ of the relaxed Bernoulli variables.
        seed: of all draws, which come from a generator of the module's own, so the same seed gives the same draws on
            every process.

    Parameters: ``logits`` [P]; ``probability_logits`` [P, k], their sigmoid is the probability; ``magnitudes`` [P, k],
    0 to 1 within the range of the operation (beyond, they count as the end of the range).

    ``state_dict()`` holds the generator and whether the policy is frozen: a restored module continues with the same
    draws. On a GPU every draw reads the policy's few numbers back to the host, until :meth:`freeze`, from when on it
    reads nothing.

    Source: Shen et al., Student-Oriented Teacher Knowledge Refinement for Knowledge Distillation, ACM MM 2024, Sec. 3.2.
    The paper names neither operations nor ranges: those of published code (mdistiller's DFKD). Translations are true
    fractions of the map.
    """

    def __init__(
        self,
        *,
        operations: Sequence[str] = tuple(OPERATIONS),
        length: int = 2,
        policies: int | None = None,
        estimator: Estimator = "straight_through",
        temperature: float = 0.5,
        relaxation: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name in operations:
            check_choice("operations", name, tuple(OPERATIONS))
        check_choice("estimator", estimator, ("straight_through", "mixture"))
        if not 1 <= length <= len(operations):
            raise ValueError(f"length: need 1 to {len(operations)}, the number of operations, got {length!r}")
        if not temperature > 0 or not relaxation > 0:
            raise ValueError(
                f"temperature and relaxation: need numbers above 0, got {temperature!r} and {relaxation!r}"
            )
        chains = list(itertools.combinations(operations, length))
        self.generator = torch.Generator().manual_seed(seed)
        if policies is not None:
            if not 1 <= policies <= len(chains):
                raise ValueError(f"policies: need 1 to {len(chains)}, got {policies!r}")
            kept = torch.randperm(len(chains), generator=self.generator)[:policies].sort().values
            chains = [chains[i] for i in kept.tolist()]
        self.policies: tuple[tuple[str, ...], ...] = tuple(chains)
        self.estimator, self.temperature, self.relaxation = estimator, temperature, relaxation
        self.logits = nn.Parameter(torch.full((len(chains),), 1e-3))
        self.probability_logits = nn.Parameter(torch.zeros(len(chains), length))
        self.magnitudes = nn.Parameter(torch.full((len(chains), length), 0.5))
        self.frozen: int | None = None
        self._policy: tuple[Tensor, Tensor, Tensor] | None = None  # a frozen policy, on the host

    # ------------------------------------------------------------------ drawing

    def _host(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, probability logits and magnitudes in 0 to 1, on the host."""
        if self._policy is not None:
            return self._policy
        found = (self.logits, self.probability_logits, self.magnitudes)
        a, b, m = (v.detach().float().cpu() for v in found)
        return a, b, m.clamp(0, 1)

    def draw(self) -> Draw:
        """Draw from the policy; advances the generator."""
        logits, probabilities, _ = self._host()
        rows = probabilities.shape[0] if self.estimator == "mixture" and self.frozen is None else 1
        length = probabilities.shape[1]
        tiny = torch.finfo(torch.float32).tiny
        gumbel = -torch.empty(len(logits)).exponential_(generator=self.generator).clamp_min(tiny).log()
        uniform = torch.rand(rows, length, generator=self.generator).clamp(1e-6, 1 - 1e-6)
        logistic = uniform.log() - (-uniform).log1p()  # logit of a uniform variable
        policy = int((logits + gumbel).argmax()) if self.frozen is None else self.frozen
        row = policy if rows > 1 else 0
        applied = (probabilities[policy] + logistic[row] > 0).tolist()
        seeds = torch.randint(2**62, (rows * length,), generator=self.generator).tolist()
        return Draw(policy, tuple(applied), tuple(seeds), gumbel, logistic if rows > 1 else logistic[0])

    def get_generator_state(self) -> Tensor:
        """What decides the next draws; :meth:`set_generator_state` repeats them."""
        return self.generator.get_state()

    def set_generator_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())

    # ------------------------------------------------------------------ augmenting

    def augment(self, teacher: Levels, draw: Draw | None = None) -> Levels:
        """s(F_t): teacher maps [B, C, H, W], one or a sequence of levels, under one draw from the policy.

        Differentiable in the maps and, until :meth:`freeze`, in the policy's parameters; without gradients (or frozen)
        only the operations that were drawn are computed. Maps of one pixel and embeddings [B, C] stay as they are.

        Args:
            draw: by default a new one.
        """
        if not isinstance(teacher, (Tensor, Collection)):
            raise TypeError(f"teacher: need a tensor or a sequence of tensors, got {describe(teacher)}")
        maps = [teacher] if isinstance(teacher, Tensor) else list(teacher)
        for x in maps:  # before the draw, which moves the generator
            check_float("teacher", x)
            if x.dim() not in (2, 4):
                raise ValueError(f"teacher: need maps [B, C, H, W] or embeddings [B, C], got {describe(x)}")
        draw = self.draw() if draw is None else draw
        refined = [self._level(x, draw, i) for i, x in enumerate(maps)]
        return refined[0] if isinstance(teacher, Tensor) else refined

    forward = augment

    def _level(self, x: Tensor, draw: Draw, level: int) -> Tensor:
        if x.dim() == 2 or x.shape[2:].numel() == 1:
            return x
        learns = self.frozen is None and torch.is_grad_enabled()
        if self.frozen is None and self.estimator == "mixture":
            return self._mixture(x, draw, level)
        return self._straight_through(x, draw, level) if learns else self._chain(x, draw, level)

    def _operation(self, policy: int, place: int, seed: int) -> tuple[str, float, int]:
        """Name, value and seed of one operation."""
        name = self.policies[policy][place]
        return name, OPERATIONS[name].value(float(self._host()[2][policy, place])), seed

    def _operate(self, x: Tensor, policy: int, place: int, seed: int) -> Tensor:
        return _apply(x, [self._operation(policy, place, seed)])

    def _chain(self, x: Tensor, draw: Draw, level: int) -> Tensor:
        drawn = zip(range(len(draw.applied)), draw.applied, draw.seeds, strict=True)
        chain = [
            self._operation(draw.policy, place, seed + level) for place, applied, seed in drawn if applied
        ]
        return _apply(x, chain) if chain else x

    def _straight_through(self, x: Tensor, draw: Draw, level: int) -> Tensor:
        s, source = draw.policy, x
        weight = self._weights(draw)[s]
        taken = self._taken(self.probability_logits[s], draw.logistic)
        for place, applied in enumerate(draw.applied):
            changed = self._operate(x, s, place, draw.seeds[place] + level)
            changed = straight_through(changed, self.magnitudes[s, place])
            x = choose(changed, x, taken[place], applied)
        # One chain interpolates once where operations in turn do it twice: the value is the chain's, as without gradients.
        with torch.no_grad():
            value = self._chain(source, draw, level) if sum(draw.applied) > 1 else x
        return choose(valued(x, value), source, weight, True)

    def _mixture(self, x: Tensor, draw: Draw, level: int) -> Tensor:
        weights, taken = self._weights(draw), self._taken(self.probability_logits, draw.logistic)
        seeds, mixed = iter(draw.seeds), 0.0
        for s, chain in enumerate(self.policies):
            changed = wide(x)
            for place in range(len(chain)):
                operated = straight_through(
                    self._operate(changed, s, place, next(seeds) + level), self.magnitudes[s, place]
                )
                changed = torch.lerp(changed, operated, taken[s, place].to(changed.dtype))
            mixed = mixed + weights[s] * changed
        return mixed.to(x.dtype)

    def _weights(self, draw: Draw) -> Tensor:
        """Relaxed weights of the sub-policies [P]."""
        return torch.softmax((self.logits + draw.gumbel.to(self.logits)) / self.temperature, 0)

    def _taken(self, probability_logits: Tensor, logistic: Tensor) -> Tensor:
        """Relaxed Bernoulli variables (Eqs. 6 and 9)."""
        return torch.sigmoid((probability_logits + logistic.to(probability_logits)) / self.relaxation)

    def search_loss(self, student: Levels, teacher: Levels, *, detach_student: bool = True) -> Tensor:
        """L_aug (Eq. 14): ½ mean (s(F_t) - F_s)², summed over levels; what the policy minimises.

        Args:
            student: maps of the teacher's shapes (after their adapters); a constant, unless ``detach_student=False``.
            teacher: a constant.
        """
        pairs = levels(student, teacher)
        for s, t in pairs:
            check_pair(s, t)
            check_same_shape(s, t, "adapt the student's map first")
        terms = []
        refined = self.augment([t.detach() for _, t in pairs])
        for (s, _), t in zip(pairs, refined, strict=True):
            s = s.detach() if detach_student else s
            terms.append(0.5 * F.mse_loss(wide(t), wide(s)))
        return total(terms).float()

    # ------------------------------------------------------------------ the learned policy

    def freeze(self) -> FeatureAugmentation:
        """End of the search: from now on only the sub-policy of the largest logit is drawn, and nothing learns.

        Its operations keep their probabilities, magnitudes and random parts.
        """
        return self._set_frozen(int(self.logits.detach().argmax()))

    def unfreeze(self) -> FeatureAugmentation:
        """Search on."""
        return self._set_frozen(None)

    def _set_frozen(self, policy: int | None) -> FeatureAugmentation:
        self._policy, self.frozen = None, policy
        if policy is not None:
            self._policy = self._host()
        for parameter in self.parameters():
            parameter.requires_grad_(policy is None)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        return {"frozen": -1 if self.frozen is None else self.frozen, "generator": self.generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
        self._set_frozen(None if state["frozen"] < 0 else state["frozen"])

    def describe(self, top: int = 5) -> str:
        """The likeliest sub-policies, one line each: weight, operations, their probabilities and magnitudes."""
        logits, probabilities, magnitudes = self._host()
        weights = torch.softmax(logits, 0)
        order = weights.argsort(descending=True, stable=True)[:top].tolist()
        lines = [] if self.frozen is None else ["frozen; only the first is drawn:"]
        if self.frozen is not None:
            order = [self.frozen, *(s for s in order if s != self.frozen)][:top]
        for s in order:
            parts = []
            for place, name in enumerate(self.policies[s]):
                span = OPERATIONS[name]
                probability = 1 / (1 + math.exp(-float(probabilities[s, place])))
                value = span.value(float(magnitudes[s, place]))
                amount = (
                    ""
                    if name == "channel_shuffle"
                    else f" {value:{'.3f' if span.low == 0 else '+.3f'}} {span.unit}"
                )
                parts.append(f"{name}{amount} (p {probability:.2f})")
            lines.append(f"{100 * float(weights[s]):5.1f} %  {', then '.join(parts)}")
        return "\n".join(lines)

    def extra_repr(self) -> str:
        state = "searching" if self.frozen is None else f"frozen to {' + '.join(self.policies[self.frozen])}"
        return f"{len(self.policies)} sub-policies of {len(self.policies[0])}, {self.estimator}, {state}"


def _apply(x: Tensor, chain: list[tuple[str, float, int]]) -> Tensor:
    return feature_augment(x, plan(x.shape, chain))

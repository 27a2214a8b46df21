"""The search (Shen et al., Eqs. 7 and 15) as a helper for a plain training loop, and published settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .augmentation import FeatureAugmentation


@dataclass(frozen=True)
class SearchSettings:
    """How the policy is searched.

    ``epochs`` of search, then the policy is frozen. Adam with ``lr``, ``betas`` and ``weight_decay`` moves it. Second
    order looks through a step of the student: ``inner_lr``, ``inner_momentum`` and ``inner_weight_decay`` are those of
    that step, ``difference`` over the length of the gradient is the half width of the finite difference.
    """

    epochs: int = 20
    lr: float = 3e-4
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 1e-3
    second_order: bool = False
    inner_lr: float = 0.01
    inner_momentum: float = 0.9
    inner_weight_decay: float = 1e-4
    difference: float = 0.01


@dataclass(frozen=True)
class TrainingSettings:
    """How the student is trained, with the factors on L_base and L_D."""

    epochs: int
    batch_size: int
    lr: float
    search: SearchSettings
    base_weight: float = 1.0
    detection_weight: float = 1.0


#: Published settings: "cifar100" and "imagenet" of the paper's text (Table 6: the best of 10, 20, 25 and 30 epochs of
#: search is 20), with weights of the published code's defaults; "_tuned" is that code's configuration of
#: ResNet-32x4 and 8x4, with hints at layer 2. The paper gives no weights.
SETTINGS: dict[str, TrainingSettings] = {
    "cifar100": TrainingSettings(240, 64, 0.05, SearchSettings(epochs=20)),
    "cifar100_tuned": TrainingSettings(240, 64, 0.05, SearchSettings(epochs=50), 1000.0, 1000.0),
    "imagenet": TrainingSettings(100, 512, 0.1, SearchSettings(epochs=5)),
}


class PolicySearch:
    """Moves the policy while the search lasts, and freezes it when it ends.

        search = PolicySearch(loss.augmentation)
        for epoch in range(epochs):
            search.start_epoch(epoch)
            for images, labels in loader:
                ...                                                      # features of student and teacher
                search.step(lambda: loss.search_loss(student_maps, teacher_maps))
                value = criterion(logits, labels) + loss(student_maps, teacher_maps)
                ...                                                      # the step of the student, as ever

    First order: the gradient of L_aug by the policy, the student as it is. Second order (``settings.second_order``):
    L_aug of a student that has taken one more step under the policy, whose mixed second derivative is a central finite
    difference. It calls both losses with changed weights, so they have to run the student's forward themselves; batch
    norm statistics of the student then see these passes too.

    The student's optimizer trains :meth:`SoKDLoss.student_parameters`, not the policy.

    Args:
        augmentation: whose parameters are moved.
        settings: see :class:`SearchSettings`.
        parameters: for second order, what the student's step trains.
        optimizer: for second order, the student's; where it keeps momentum buffers (SGD), the inner step uses them.
    """

    def __init__(
        self,
        augmentation: FeatureAugmentation,
        settings: SearchSettings | None = None,
        *,
        parameters: Iterable[nn.Parameter] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.settings = SearchSettings() if settings is None else settings
        self.augmentation, self.weights_optimizer = augmentation, optimizer
        self.parameters = list(parameters or ())
        if self.settings.second_order and not self.parameters:
            raise ValueError("parameters: second order needs what the student's step trains")
        self._policy = list(augmentation.parameters())
        known = {id(v) for v in self._policy}
        self.parameters = [v for v in self.parameters if id(v) not in known and v.requires_grad]
        s = self.settings
        self.optimizer = torch.optim.Adam(self._policy, lr=s.lr, betas=s.betas, weight_decay=s.weight_decay)

    @property
    def searching(self) -> bool:
        return self.augmentation.frozen is None

    def start_epoch(self, epoch: int) -> bool:
        """Freeze the policy once ``epoch``, counted from 0, is past the search; returns whether the search goes on."""
        if epoch >= self.settings.epochs and self.searching:
            self.augmentation.freeze()
        return self.searching

    def step(
        self, search_loss: Callable[[], Tensor], train_loss: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        """One step of the policy; nothing once it is frozen.

        Args:
            search_loss: L_aug. For second order it runs the student, with ``detach_student=False``.
            train_loss: for second order, what trains the student, with ``through_policy=True``.

        Returns:
            the search loss, detached, or None when frozen.
        """
        if not self.searching:
            return None
        with torch.enable_grad():
            if self.settings.second_order:
                if train_loss is None:
                    raise ValueError("train_loss: second order needs the loss that trains the student")
                value, gradients = self._second_order(search_loss, train_loss)
            else:
                value = search_loss()
                gradients = _gradients(value, self._policy)
        for parameter, gradient in zip(self._policy, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.augmentation.magnitudes.clamp_(0, 1)
        return value.detach()

    def _second_order(
        self, search_loss: Callable[[], Tensor], train_loss: Callable[[], Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        s, weights = self.settings, self.parameters
        saved = [w.detach().clone() for w in weights]
        state = self.augmentation.get_generator_state()
        step = self._inner_step(_gradients(train_loss(), weights))
        try:
            _move(weights, saved, step, -s.inner_lr)
            value = search_loss()
            found = _gradients(value, [*self._policy, *weights])
            direct, v = found[: len(self._policy)], found[len(self._policy) :]
            after = self.augmentation.get_generator_state()
            length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in v]))
            radius = torch.where(length > 0, s.difference / length, 0)
            sides = []
            for sign in (1, -1):
                self.augmentation.set_generator_state(state)  # both sides see the draw of the inner step
                _move(weights, saved, v, sign * radius)
                sides.append(_gradients(train_loss(), self._policy))
        finally:
            with torch.no_grad():
                for weight, origin in zip(weights, saved, strict=True):
                    weight.copy_(origin)
        self.augmentation.set_generator_state(after)
        scale = torch.where(radius > 0, s.inner_lr / (2 * radius), 0)
        return value, [g - scale.to(g) * (p - m) for g, p, m in zip(direct, *sides, strict=True)]

    def _inner_step(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        s = self.settings
        state = self.weights_optimizer.state if self.weights_optimizer is not None else {}
        steps = []
        for weight, gradient in zip(self.parameters, gradients, strict=True):
            step = gradient + s.inner_weight_decay * weight.detach()
            buffer = state.get(weight, {}).get("momentum_buffer")
            steps.append(step if buffer is None else step + s.inner_momentum * buffer)
        return steps


def _gradients(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs, materialize_grads=True, allow_unused=True))


@torch.no_grad()
def _move(weights: Sequence[Tensor], origin: Sequence[Tensor], step: Sequence[Tensor], length) -> None:
    for weight, start, direction in zip(weights, origin, step, strict=True):
        weight.copy_(start + length * direction)

"""Mean teacher embedding of every class over a training set, gathered batch by batch, on any number of processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class ClassMeans:
    """Running sums in float64, so that any batches in any order give the same means.

    Sums of float32 embeddings are exact to float64 rounding, about 1e-16 of their size; the float32 means that
    :meth:`compute` returns do not show it.

    Args:
        num_classes: K, with the background class of a detector where it has one.
        dim: D, width of the embedding.
        ignore_index: label of rows that :meth:`update` leaves out.
    """

    def __init__(self, num_classes: int, dim: int, *, ignore_index: int = -100) -> None:
        for name, value in (("num_classes", num_classes), ("dim", dim)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: need an integer above 0, got {value!r}")
        self.num_classes, self.dim, self.ignore_index = num_classes, dim, ignore_index
        # Sums with the count as last column: one addition is one step, which an interruption cannot halve.
        self._local = torch.zeros(
            num_classes, dim + 1, dtype=torch.float64
        )  # of this process, since all_reduce
        self._total: Tensor | None = None  # of all processes, up to the last all_reduce, and from files
        self._without_counts = False

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch: features [B, D], labels [B] in [0, K) or ``ignore_index``.

        A batch with any problem raises and changes nothing. Reads the labels back from the device.

        Raises:
            ValueError, TypeError: shapes or types that do not fit, a label out of range, features that are not finite.
            RuntimeError: means from a JSON file, which carries no counts, cannot go on.
        """
        if self._without_counts:
            raise RuntimeError(
                "update: these means come from a JSON file without counts; start from ClassMeans(K, D)"
            )
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise TypeError(f"features: need a float tensor [B, {self.dim}], got {_describe(features)}")
        if features.dim() != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features: need [B, {self.dim}], got {_describe(features)}")
        if (
            not isinstance(labels, Tensor)
            or labels.is_floating_point()
            or labels.dtype.is_complex
            or labels.dtype == torch.bool
        ):
            raise TypeError(f"labels: need an integer tensor [B], got {_describe(labels)}")
        if labels.shape != features.shape[:1]:
            raise ValueError(f"labels: need [{features.shape[0]}], one per row, got {_describe(labels)}")
        features, labels = features.detach(), labels.detach().to(features.device, torch.int64)
        kept = labels != self.ignore_index
        features, labels = features[kept], labels[kept]
        if labels.numel() == 0:
            return
        low, high = (int(v) for v in torch.aminmax(labels))
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"labels: need values in [0, {self.num_classes}) or ignore_index {self.ignore_index}, "
                f"got {low} to {high}"
            )
        if not bool(features.isfinite().all()):
            raise ValueError("features: not all values are finite")
        rows = torch.cat([features.double(), features.new_ones(len(features), 1, dtype=torch.float64)], 1)
        if self._local.device != rows.device:
            self._local = self._local.to(rows.device)
        self._local.index_add_(0, labels, rows)

    def all_reduce(self, group: Any = None) -> None:
        """Add up what the processes of ``group`` gathered; every process then has the same means.

        May be called again after more updates: nothing counts twice. Without a process group it changes nothing.
        """
        reduced = self._local.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_backend(group) == "nccl" and not reduced.is_cuda:
                reduced = reduced.cuda()
            torch.distributed.all_reduce(reduced, group=group)
        total = reduced if self._total is None else self._total.to(reduced.device) + reduced
        self._total, self._local = total, torch.zeros_like(self._local)

    def _state(self) -> Tensor:
        return self._local if self._total is None else self._total.to(self._local.device) + self._local

    def compute(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Means [K, D]; zero rows for classes never seen, which the direction losses leave out."""
        state = self._state()
        return (state[:, :-1] / state[:, -1:].clamp_min(1)).to(dtype)

    @property
    def counts(self) -> Tensor:
        """Samples per class, int64 [K]; 1 for every class that a JSON file holds."""
        return self._state()[:, -1].long()

    def save(self, path: str | os.PathLike[str], *, decimals: int | None = None) -> None:
        """Write the means: ``.json`` as the published code reads them, else sums and counts, from which updates go on.

        Args:
            decimals: of JSON values; the published code rounds to 4. By default every float32 digit is kept.

        The file is replaced in one step: an interruption leaves the old one. Classes never seen are left out of JSON.
        """
        path = Path(path)
        with _replacing(path) as fresh:
            if path.suffix == ".json":
                fresh.write_text(json.dumps(self._published(decimals)))
            else:
                torch.save({"state": self._state().cpu(), "ignore_index": self.ignore_index}, fresh)

    def _published(self, decimals: int | None) -> dict[str, list[float]]:
        means, counts = self.compute(), self.counts.tolist()
        # The shortest text of a float32 value is that of its 9 digits.
        digits = (lambda v: float(f"{v:.9g}")) if decimals is None else (lambda v: round(v, decimals))
        return {str(k): [digits(v) for v in means[k].tolist()] for k in range(self.num_classes) if counts[k]}

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, num_classes: int | None = None) -> ClassMeans:
        """Read a file of :meth:`save`, or a published JSON ``{"class": [D floats]}`` with keys in any order.

        Args:
            num_classes: K, where the last classes are missing from a JSON file.

        Raises:
            ValueError: the file holds something else.
        """
        path = Path(path)
        if path.suffix == ".json":
            return cls.from_published(json.loads(path.read_text()), num_classes=num_classes)
        stored = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(stored, dict) or set(stored) != {"state", "ignore_index"}:
            raise ValueError(f"path: {path} was not written by ClassMeans.save")
        state = stored["state"]
        means = cls(state.shape[0], state.shape[1] - 1, ignore_index=stored["ignore_index"])
        means._total = state
        return means

    @classmethod
    def from_published(
        cls, means: Mapping[str, Iterable[float]], *, num_classes: int | None = None
    ) -> ClassMeans:
        """Means from the parsed JSON of the published code."""
        try:
            rows = {int(k): [float(x) for x in v] for k, v in means.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f'means: need {{"class": [D floats]}}: {error}') from error
        widths = {len(v) for v in rows.values()}
        if len(widths) != 1 or min(rows) < 0:
            raise ValueError(f"means: need classes from 0 with one width, got widths {sorted(widths)}")
        found = cls(num_classes or max(rows) + 1, widths.pop())
        if max(rows) >= found.num_classes:
            raise ValueError(f"num_classes: {found.num_classes}, but the means hold class {max(rows)}")
        state = torch.zeros_like(found._local)
        for k, v in rows.items():
            state[k] = torch.tensor([*v, 1.0], dtype=torch.float64)
        found._total, found._without_counts = state, True
        return found

    def __repr__(self) -> str:
        seen = int((self.counts > 0).sum())
        return f"ClassMeans(num_classes={self.num_classes}, dim={self.dim}, seen={seen})"


def compute_class_means(
    model: nn.Module,
    loader: Iterable,
    num_classes: int,
    *,
    embed: Callable[[nn.Module, Any], Tensor] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> ClassMeans:
    """Class means of a model's embeddings over a loader, in evaluation mode, added up over the processes that run it.

    Args:
        model: the teacher. Its training mode is restored afterwards.
        loader: batches ``(inputs, labels, ...)`` of the *training* set, with the transform that training uses.
        embed: (model, inputs) -> embeddings [B, D]; by default ``model(inputs)``.
        device: where the inputs go; by default the device of the model's first parameter.
        progress: show a bar where standard error is a terminal (needs the package tqdm).
    """
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batches: Iterable = loader
    if progress:
        try:
            from tqdm import tqdm
        except ImportError:
            raise ImportError(
                "progress=True needs the package tqdm; install it or pass progress=False"
            ) from None
        batches = tqdm(loader, desc="class means", unit="batch", disable=None)
    means, modes = None, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for inputs, labels, *_ in batches:
                inputs = inputs.to(device)
                features = model(inputs) if embed is None else embed(model, inputs)
                if means is None:
                    means = ClassMeans(num_classes, features.shape[-1])
                means.update(features, labels)
    finally:
        for module, mode in modes:
            module.training = mode
    if means is None:
        raise ValueError("loader: it has no batch")
    means.all_reduce()
    return means


@contextmanager
def _replacing(path: Path):
    """A file beside ``path`` that takes its name once it is complete."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _describe(x: object) -> str:
    return f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__

"""Detection with structured distillation: a small detector learns to find digits from a larger teacher.

Scenes of 96 x 96 pixels hold handwritten digits of three sizes on noise. A detector without anchors names, at every
fourth pixel near a digit's centre, its class and the distances to its box. A teacher is trained once; students learn
alone and with attention-guided and non-local distillation of their two-level pyramid (Zhang & Ma 2023). Then the share
of a training step that this loss takes is measured for plain PyTorch and kdfast's kernels.

    python examples/distill_detector.py [--steps 250] [--seeds 2] [--out distill_detector.png]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from distill_pyramid import CHANNELS, SIZE, STRIDE, Scenes, Segmenter, draw, milliseconds
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, max_pool2d, relu
from tqdm import tqdm

import kdfast

CLASSES, CELL, SIZES = 10, 24, (12, 16, 20)
KDWEIGHT = 10.0


class Boxes(Scenes):
    """Scenes with one digit in three of four cells of 24 x 24 pixels, and their boxes."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__(first, last)
        self.scaled = [interpolate(self.images[:, None], (s, s), mode="bilinear")[:, 0] for s in SIZES]

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Scenes [B, 1, 96, 96], boxes [B, 12, 4] (left, top, right, bottom) and classes [B, 12]."""

        def draw_integer(high: int) -> int:
            return int(torch.randint(high, (), generator=generator))

        scenes = 0.3 * torch.rand(count, 1, SIZE, SIZE, generator=generator)
        boxes, classes = [], []
        per_row = SIZE // CELL
        for scene in scenes:
            for cell in torch.randperm(per_row**2, generator=generator)[:12].tolist():
                index, kind = draw_integer(len(self.labels)), draw_integer(len(SIZES))
                size = SIZES[kind]
                y, x = (CELL * n + draw_integer(CELL - size + 1) for n in divmod(cell, per_row))
                scene[0, y : y + size, x : x + size] += self.scaled[kind][index]
                boxes.append([x, y, x + size, y + size])
                classes.append(self.labels[index])
        return scenes, torch.tensor(boxes).view(count, 12, 4).float(), torch.stack(classes).view(count, 12)


class Detector(Segmenter):
    """The pyramid of distill_pyramid.py with a head for class scores [10] and distances to the box's sides [4]."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(CHANNELS, CLASSES + 4, 3, padding=1))
        nn.init.constant_(self.head[1].bias[:CLASSES], -4.0)  # few places hold a digit


def centres() -> Tensor:
    """Where the head looks: x, y of every place, [H, W, 2]."""
    at = torch.arange(SIZE // STRIDE) * STRIDE + STRIDE / 2
    return torch.stack(torch.meshgrid(at, at, indexing="xy"), 2)


def detection_loss(output: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
    """Focal loss of the classes and distance of the boxes, at the places within 4 pixels of a digit's centre."""
    place = centres()[None, :, :, None]  # [1, H, W, 1, 2]
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    inside = (place - middle[:, None, None]).abs().amax(4) < 4  # [B, H, W, 12]
    positive, which = inside.any(3), inside.byte().argmax(3)
    target = torch.zeros_like(output[:, :CLASSES])
    chosen = classes.gather(1, which.flatten(1)).view_as(which)
    target.scatter_(1, chosen[:, None], positive[:, None].float())
    logits = output[:, :CLASSES]
    wrong = (torch.sigmoid(logits).detach() - target).abs()
    count = positive.sum().clamp_min(1)
    focal = (wrong**2 * binary_cross_entropy_with_logits(logits, target, reduction="none")).sum() / count
    box = boxes.gather(1, which.flatten(1)[..., None].expand(-1, -1, 4)).view(*which.shape, 4)
    sides = torch.cat([place[:, :, :, 0] - box[..., :2], box[..., 2:] - place[:, :, :, 0]], 3) / CELL
    found = output[:, CLASSES:].permute(0, 2, 3, 1)
    return focal + ((found - sides).abs().sum(3) * positive).sum() / count


def overlap(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of one box [4] and others [n, 4]."""
    shared = relu(torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).prod(1)
    area = lambda v: (v[..., 2:] - v[..., :2]).prod(-1)  # noqa: E731
    return shared / (area(box) + area(others) - shared)


@torch.no_grad()
def average_precision(model: Detector, scenes: Tensor, boxes: Tensor, classes: Tensor) -> float:
    """Area under precision over recall: a digit is found by a box of its class that overlaps it by half."""
    model.eval()
    output = model(scenes)[0]
    model.train()
    scores, named = torch.sigmoid(output[:, :CLASSES]).max(1)  # [B, H, W]
    scores = scores * (max_pool2d(scores, 5, 1, 2) == scores)  # the best of 5 x 5 places
    place, sides = centres(), output[:, CLASSES:].permute(0, 2, 3, 1) * CELL
    found = torch.cat([place - sides[..., :2], place + sides[..., 2:]], 3)
    best, order = scores.flatten().topk(min(4 * classes.numel(), scores.numel()))
    per_scene, taken, hits = scores[0].numel(), torch.zeros_like(classes, dtype=torch.bool), []
    for score, at in zip(best.tolist(), order.tolist(), strict=True):
        if score == 0:
            break
        scene, label = at // per_scene, named.flatten()[at]
        common = overlap(found.view(-1, 4)[at], boxes[scene]) * (classes[scene] == label) * ~taken[scene]
        match = int(common.argmax())
        hits.append(bool(common[match] >= 0.5))
        taken[scene, match] |= hits[-1]
    hit = torch.tensor(hits, dtype=torch.float64)
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float((envelope * hit).sum() / classes.numel())


def train(
    width: int,
    steps: int,
    seed: int,
    teacher: Detector | None,
    loss: nn.Module | None,
    test: tuple,
    what: str,
) -> tuple[Detector, list[float]]:
    """Trains one detector, with ``loss`` between its pyramid and the teacher's; returns average precisions."""
    torch.manual_seed(seed)
    model, scenes, generator = Detector(width), Boxes(0, 900), torch.Generator().manual_seed(seed)
    # The loss trains too: adaptation layers, and the non-local blocks of both networks.
    parameters = [*model.parameters(), *(loss.parameters() if loss is not None else ())]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    curve, progress = [], tqdm(range(steps), desc=what, leave=False, disable=None)
    for step in progress:
        x, boxes, classes = scenes.batch(8, generator)
        output, pyramid = model(x)
        value = detection_loss(output, boxes, classes)
        if loss is not None:
            with torch.no_grad():
                target = teacher(x)[1]
            value = value + loss(pyramid, target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(steps // 5, 1) == 0:
            curve.append(average_precision(model, *test))
    return model, curve


def distillation() -> kdfast.StructuredKDLoss:
    # Published weights are for maps of 256 channels and hundreds of pixels a side; small maps have small norms.
    return kdfast.StructuredKDLoss([CHANNELS] * 2, preset="one_stage", key_stride=[4, 2], weight=KDWEIGHT)


def measure(teacher: Detector, student: Detector, repeats: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of the loss (forward + backward) and its share of a student's training step, by provider."""
    x, boxes, classes = Boxes(0, 900).batch(8, torch.Generator().manual_seed(0))

    def task() -> None:
        detection_loss(student(x)[0], boxes, classes).backward()
        with torch.no_grad():
            teacher(x)

    with torch.no_grad():
        target, pyramid = teacher(x)[1], student(x)[1]
    pyramid = [p.requires_grad_() for p in pyramid]
    base, loss, found = milliseconds(task, repeats), distillation(), {}
    for name, backend in (("plain PyTorch", "reference"), ("kdfast", "auto")):
        with kdfast.use_backend(backend):
            found[name] = milliseconds(lambda: loss(pyramid, target).backward(), repeats)
    return {name: (ms, ms / (ms + base)) for name, ms in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=250, help="of every training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="students of every kind (%(default)s)")
    parser.add_argument(
        "--test-scenes", type=int, default=64, help="unseen scenes to report on (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=15, help="of every timing (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("distill_detector.png"), help="figure (%(default)s)")
    options = parser.parse_args()
    test = Boxes(1200, 1797).batch(options.test_scenes, torch.Generator().manual_seed(12345))
    teacher, curve = train(16, options.steps, 0, None, None, test, "teacher")
    teacher.eval()
    kinds: dict[str, Callable[[], nn.Module | None]] = {
        "student alone": lambda: None,
        "student + structured KD": distillation,
    }
    curves, rows, terms = {"teacher": curve}, [("teacher", [curve[-1]])], []
    for name, make in kinds.items():
        runs = []
        for seed in range(1, options.seeds + 1):
            torch.manual_seed(seed)
            loss = make()
            student, curve = train(4, options.steps, seed, teacher, loss, test, f"{name}, seed {seed}")
            runs.append(curve)
            if loss is not None:
                terms.append({term: float(value) for term, value in loss.components.items()})
        curves[name] = [statistics.mean(v) for v in zip(*runs, strict=True)]
        rows.append((name, [run[-1] for run in runs]))
    shares = measure(teacher, student, options.repeats)
    print(f"\n{'network':<28}{'average precision':>20}")
    for name, found in rows:
        spread = f" ± {100 * statistics.stdev(found):.1f}" if len(found) > 1 else ""
        print(f"{name:<28}{100 * statistics.mean(found):>18.1f} %{spread}")
    last = {term: statistics.mean(v[term] for v in terms) for term in terms[0]}
    print("\nlast terms of the loss: " + ", ".join(f"{k} {v:.3f}" for k, v in last.items()))
    print(f"\n{'structured KD by':<28}{'ms per step':>12}{'share of the step':>20}")
    for name, (ms, share) in shares.items():
        print(f"{name:<28}{ms:>12.2f}{100 * share:>18.0f} %")
    draw(curves, shares, options.steps, options.out, "average precision, %", "structured KD")
    print(f"\nfigure: {options.out}")


if __name__ == "__main__":
    main()

"""Dense prediction with PCKA: a small student learns to segment scenes of digits from a larger teacher.

Scenes of 96 x 96 pixels hold handwritten digits on noise; two-level pyramids (strides 4 and 8) feed a head that names
the digit at every fourth pixel. A teacher is trained once; students learn alone, with PCKA, and with PCKA + mimic. Then
the share of a training step that PCKA takes is measured for the published loop, plain PyTorch and kdfast's kernels.

    python examples/distill_pyramid.py [--steps 200] [--seeds 2] [--out distill_pyramid.png]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from tqdm import tqdm

import kdfast

SIZE, STRIDE, DIGITS, BACKGROUND = 96, 4, 12, 10
PATCH = 4
CHANNELS = 32


class Scenes:
    """Random scenes: 12 digits of 16 x 16 pixels per scene, and the class of every fourth pixel (10: none)."""

    def __init__(self, first: int, last: int) -> None:
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels[first:last] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        self.images = interpolate(images, scale_factor=2, mode="bilinear")[:, 0]
        self.labels = torch.tensor(labels[first:last])

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        scenes = 0.3 * torch.rand(count, 1, SIZE, SIZE, generator=generator)
        classes = torch.full((count, SIZE, SIZE), BACKGROUND)
        cells = SIZE // 16
        for scene, mask in zip(scenes, classes, strict=True):
            chosen = torch.randint(len(self.labels), (DIGITS,), generator=generator)
            for index, cell in zip(
                chosen, torch.randperm(cells**2, generator=generator)[:DIGITS], strict=True
            ):
                y, x = 16 * (cell // cells), 16 * (cell % cells)
                scene[0, y : y + 16, x : x + 16] += self.images[index]
                mask[y : y + 16, x : x + 16] = self.labels[index]
        return scenes, classes[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]


def block(channels: int, out: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


class Segmenter(nn.Module):
    """Backbone, two-level feature pyramid of 32 channels, head. Returns class scores and the pyramid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(1, width, 2), block(width, 2 * width, 2))
        self.deep = nn.Sequential(block(2 * width, 4 * width, 2), block(4 * width, 4 * width, 1))
        self.lateral = nn.ModuleList([nn.Conv2d(2 * width, CHANNELS, 1), nn.Conv2d(4 * width, CHANNELS, 1)])
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(CHANNELS, BACKGROUND + 1, 3, padding=1))

    def forward(self, scenes: Tensor) -> tuple[Tensor, list[Tensor]]:
        c2 = self.stem(scenes)
        p3 = self.lateral[1](self.deep(c2))
        p2 = self.lateral[0](c2) + interpolate(p3, scale_factor=2)
        return self.head(p2), [p2, p3]


@torch.no_grad()
def digit_accuracy(model: Segmenter, scenes: Tensor, classes: Tensor) -> float:
    """Share of the digits' pixels that get the right class."""
    model.eval()
    found = model(scenes)[0].argmax(1)
    model.train()
    inside = classes != BACKGROUND
    return float((found == classes)[inside].float().mean())


def train(
    width: int, steps: int, seed: int, teacher: Segmenter | None, methods: list[kdfast.PCKALoss], what: str
) -> tuple[Segmenter, list[float]]:
    """Trains one network; the distillation losses compare its pyramid with the teacher's. Returns test accuracies."""
    torch.manual_seed(seed)
    model, scenes, generator = Segmenter(width), Scenes(0, 900), torch.Generator().manual_seed(seed)
    test = Scenes(1200, 1797).batch(64, torch.Generator().manual_seed(12345))
    parameters = [*model.parameters(), *(p for method in methods for p in method.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    curve = []
    for step in tqdm(range(steps), desc=what, leave=False, disable=None):
        x, classes = scenes.batch(8, generator)
        logits, pyramid = model(x)
        loss = cross_entropy(logits, classes)
        if teacher is not None:
            with torch.no_grad():
                target = teacher(x)[1]
            loss = loss + sum(method(pyramid, target) for method in methods)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(steps // 10, 1) == 0:
            curve.append(digit_accuracy(model, *test))
    return model, curve


def published_loop(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """PCKA as the published code runs it: one channel after the other, three N³ products for each."""
    total = 0
    for s, t in zip(student, teacher, strict=True):
        rows, columns = s.shape[2] // PATCH, s.shape[3] // PATCH
        cut = [
            v.unflatten(2, (rows, PATCH))
            .unflatten(4, (columns, PATCH))
            .permute(1, 2, 4, 0, 3, 5)
            .flatten(3)
            .flatten(1, 2)
            for v in (s, t)
        ]
        for i in range(len(cut[0])):
            x, y = cut[0][i], cut[1][i]
            x, y = x - x.mean(0), y - y.mean(0)
            k, m = x @ x.T, y @ y.T
            cka = torch.trace(k @ m.T) / torch.sqrt(torch.trace(k @ k.T) * torch.trace(m @ m.T))
            total = total + (1 - cka) / len(cut[0])
    return total


def milliseconds(call: Callable[[], object], repeats: int = 15) -> float:
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def measure(teacher: Segmenter, student: Segmenter) -> dict[str, tuple[float, float]]:
    """Milliseconds of the loss (forward + backward) and its share of a student's training step, by provider."""
    scenes, classes = Scenes(0, 900).batch(8, torch.Generator().manual_seed(0))

    def task() -> None:
        cross_entropy(student(scenes)[0], classes).backward()
        with torch.no_grad():
            teacher(scenes)

    with torch.no_grad():
        target = teacher(scenes)[1]
        pyramid = student(scenes)[1]
    pyramid = [p.requires_grad_() for p in pyramid]
    base, pcka = milliseconds(task), kdfast.PCKALoss(patch_size=PATCH)
    found = {"published loop": milliseconds(lambda: published_loop(pyramid, target).backward(), 5)}
    for name, backend in (("plain PyTorch", "reference"), ("kdfast", "auto")):
        with kdfast.use_backend(backend):
            found[name] = milliseconds(lambda: pcka(pyramid, target).backward())
    return {name: (ms, ms / (ms + base)) for name, ms in found.items()}


def draw(
    curves: dict[str, list[float]],
    shares: dict[str, tuple[float, float]],
    steps: int,
    path: Path,
    metric: str = "digit pixels named right, %",
    loss: str = "PCKA",
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, curve in curves.items():
        ticks = [steps * (i + 1) / len(curve) for i in range(len(curve))]
        left.plot(ticks, [100 * v for v in curve], label=name, marker="o", markersize=3)
    left.set(xlabel="step", ylabel=metric, title="scenes of unseen digits")
    left.legend(frameon=False, fontsize=8)
    right.barh(list(shares), [100 * share for _, share in shares.values()], color="tab:gray")
    for i, (ms, share) in enumerate(shares.values()):
        right.text(100 * share, i, f" {ms:.1f} ms", va="center", fontsize=8)
    right.set(xlabel="share of a training step, %", xlim=(0, 115), title=f"{loss}, forward + backward")
    right.invert_yaxis()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="of every training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="students of every kind (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("distill_pyramid.png"), help="figure (%(default)s)")
    options = parser.parse_args()
    teacher, teacher_curve = train(16, options.steps, 0, None, [], "teacher")
    teacher.eval()
    kinds: dict[str, Callable[[], list]] = {
        "student alone": list,
        "student + PCKA": lambda: [kdfast.PCKALoss(patch_size=PATCH)],
        "student + PCKA + mimic": lambda: [
            kdfast.PCKALoss(patch_size=PATCH),
            kdfast.MimicLoss([CHANNELS] * 2, [CHANNELS] * 2, weight=0.1),
        ],
    }
    curves, rows = {"teacher": teacher_curve}, [("teacher", [teacher_curve[-1]])]
    for name, methods in kinds.items():
        runs = []
        for seed in range(1, options.seeds + 1):
            student, curve = train(4, options.steps, seed, teacher, methods(), f"{name}, seed {seed}")
            runs.append(curve)
        curves[name] = [statistics.mean(v) for v in zip(*runs, strict=True)]
        rows.append((name, [run[-1] for run in runs]))
    shares = measure(teacher, student)
    print(f"\n{'network':<24}{'digit pixels named right':>26}")
    for name, accuracies in rows:
        spread = f" ± {100 * statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
        print(f"{name:<24}{100 * statistics.mean(accuracies):>18.1f} %{spread}")
    print(f"\n{'PCKA by':<24}{'ms per step':>12}{'share of the step':>20}")
    for name, (ms, share) in shares.items():
        print(f"{name:<24}{ms:>12.2f}{100 * share:>18.0f} %")
    draw(curves, shares, options.steps, options.out)
    print(f"\nfigure: {options.out}")


if __name__ == "__main__":
    main()

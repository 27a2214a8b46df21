"""Refine a teacher for its student on handwritten digits: SoKD (search, then frozen policy) beside FitNet alone.

    python examples/distill_sokd.py --out report

The student learns by cross-entropy, plus the distance of its maps from the teacher's: of whole maps (FitNet), or of
distinctive areas of teacher maps refined by a policy that is learned on the way (SoKD). Writes the accuracies, the
learned policy, and a figure of the areas over the feature maps. Needs scikit-learn, matplotlib and tqdm.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _digits import ConvNet, Digits, Split, student_net, teacher_net
from _methods import LEVELS, POLICY_RATE, fitnet_loss, sokd_loss
from _report import COLOURS, _markdown, _write_csv, accuracy_rows, plt
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from kdfast.sokd import PolicySearch, SearchSettings, SoKDLoss

LEARNING_RATE, WEIGHT_DECAY = 0.1, 5e-4  # of the student's step, as in distill_digits.py


@dataclass
class Run:
    """What is kept of one training; ``test`` is measured once, after the last epoch."""

    test: float
    step_ms: float
    validation: list[float]


def maps(net: ConvNet, images: Tensor) -> list[Tensor]:
    return net(images).stages[:LEVELS]


@torch.no_grad()
def accuracy(net: ConvNet, split: Split) -> float:
    net.eval()
    return 100 * (net(split.images).logits.argmax(1) == split.labels).float().mean().item()


def train(
    net: ConvNet,
    split: Split,
    digits: Digits,
    *,
    epochs: int,
    seed: int,
    bar: tqdm,
    teacher: ConvNet | None = None,
    distill: nn.Module | None = None,
    search: PolicySearch | None = None,
) -> Run:
    """Cross-entropy, plus ``distill`` where given; ``search`` moves the policy before each step while it lasts."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(64, len(split.labels))
    steps = len(split.labels) // batch
    trained = list(net.parameters())
    if distill is not None:
        trained += distill.student_parameters() if search is not None else distill.parameters()
    optimizer = torch.optim.SGD(
        trained, LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    seconds, validation = 0.0, []
    for epoch in range(epochs):
        start = time.perf_counter()
        net.train()
        if search is not None:
            search.start_epoch(epoch)  # freezes the policy once the search is over
        for chosen in torch.randperm(len(split.labels), generator=generator).split(batch)[:steps]:
            images, labels = split.images[chosen], split.labels[chosen]
            output = net(images)
            loss = F.cross_entropy(output.logits, labels)
            if distill is not None:
                student = output.stages[:LEVELS]
                with torch.no_grad():
                    targets = maps(teacher, images)
                if search is not None:
                    search.step(lambda s=student, t=targets: distill.search_loss(s, t))
                loss = loss + distill(student, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds += time.perf_counter() - start
        validation.append(accuracy(net, digits.validation))
        bar.update()
    return Run(accuracy(net, digits.test), 1000 * seconds / (epochs * steps), validation)


def build(
    name: str, student: ConvNet, teacher: ConvNet, args, seed: int
) -> tuple[nn.Module | None, PolicySearch | None]:
    if name == "plain student":
        return None, None
    if name == "FitNet":
        return fitnet_loss(student, teacher), None
    loss = sokd_loss(student, teacher, areas=args.areas, seed=seed)
    settings = SearchSettings(epochs=args.search_epochs, lr=POLICY_RATE)
    return loss, PolicySearch(loss.augmentation, settings)


@torch.no_grad()
def draw(path: Path, loss: SoKDLoss, student: ConvNet, teacher: ConvNet, images: Tensor) -> None:
    """A row per digit: the image, the teacher's map as it is and refined, and the areas over the student's map.

    Maps are means over channels. The refined one has had both operations of the frozen policy, though each is drawn with
    its probability only; it shares its colours with the teacher's.
    """
    student.eval(), loss.eval()
    level = 0
    seen = loss.adapters[level](maps(student, images)[level])
    area = loss.areas[level]
    boxes = area.decode(area.maps(seen))
    mask = area.mask(boxes, *seen.shape[2:])
    target = maps(teacher, images)[level]
    drawn = loss.augmentation.draw()
    refined = loss.augmentation.augment(target, drawn._replace(applied=(True,) * len(drawn.applied)))
    panels = {
        "image": images[:, 0],
        "teacher's map": target.mean(1),
        "refined by the policy": refined.mean(1),
        "adapted student's map,\nits areas": seen.mean(1),
        "areas over each pixel\n(its weight in the loss)": mask[:, 0],
    }
    figure, axes = plt.subplots(
        len(images), len(panels), figsize=(10, 1.9 * len(images) + 0.6), layout="constrained"
    )
    for row, line in enumerate(axes):
        shared = torch.stack([target.mean(1)[row], refined.mean(1)[row]])
        for column, (axis, (title, values)) in enumerate(zip(line, panels.items(), strict=True)):
            settings = {"cmap": "gray" if column == 0 else "viridis"}
            if column in (1, 2):
                settings |= {"vmin": float(shared.min()), "vmax": float(shared.max())}
            if column == 4:
                settings = {"cmap": "Blues", "vmin": 0, "vmax": len(boxes[row])}
            axis.imshow(values[row], **settings)
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(title, fontsize=10)
            if column == 3:
                _outline(axis, boxes[row].tolist())
            if column == 4:
                for y, counts in enumerate(values[row].int().tolist()):
                    for x, count in enumerate(counts):
                        axis.text(x, y, count or "", ha="center", va="center", fontsize=7)
    weight, chain = loss.augmentation.describe(1).splitlines()[-1].strip().split("  ", 1)
    title = f"policy kept of {len(loss.augmentation.policies)} (weight {weight}): {chain}"
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _outline(axis, boxes: list[list[int]]) -> None:
    """Boxes (x1, y1, x2, y2), each a little smaller than the one before, so that no side hides another."""
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        if x2 < x1 or y2 < y1:
            continue
        inset = 0.44 - 0.1 * (i % 4)
        corner, size = (x1 - inset, y1 - inset), (x2 - x1 + 2 * inset, y2 - y1 + 2 * inset)
        for colour, width in (("white", 3), (COLOURS[1:][i % 5], 1.5)):
            axis.add_patch(plt.Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=width))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of table, policy and figure")
    parser.add_argument("--seeds", type=int, default=3, help="how often everything is repeated")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=100, help="epochs of every student")
    parser.add_argument(
        "--search-epochs", type=int, default=20, help="of these, with a policy that still learns"
    )
    parser.add_argument("--teacher-epochs", type=int, default=15)
    parser.add_argument(
        "--train-fraction", type=float, default=0.2, help="share of the images the students see"
    )
    parser.add_argument("--areas", type=int, default=4, help="areas per map")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)  # networks this small gain nothing from more
    digits = Digits.load(torch.device("cpu"))
    names = ("plain student", "FitNet", "SoKD")
    runs: dict[str, list[Run]] = {name: [] for name in ("teacher", *names)}
    total = args.seeds * (args.teacher_epochs + len(names) * args.epochs)
    with tqdm(total=total, unit="epoch", mininterval=1, disable=args.quiet) as bar:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            bar.set_description(f"seed {seed}: teacher")
            torch.manual_seed(seed)
            teacher = teacher_net()
            runs["teacher"].append(
                train(teacher, digits.train, digits, epochs=args.teacher_epochs, seed=seed, bar=bar)
            )
            teacher.requires_grad_(False).eval()
            split = digits.train.part(args.train_fraction, seed)
            for name in names:
                bar.set_description(f"seed {seed}: {name}")
                torch.manual_seed(seed)  # every method starts from the same student
                student = student_net()
                distill, search = build(name, student, teacher, args, seed)
                settings = {"teacher": teacher, "distill": distill, "search": search}
                runs[name].append(
                    train(student, split, digits, epochs=args.epochs, seed=seed, bar=bar, **settings)
                )
    args.out.mkdir(parents=True, exist_ok=True)
    header, rows = accuracy_rows(runs)
    (args.out / "sokd_policy.txt").write_text(distill.augmentation.describe() + "\n")
    _write_csv(args.out / "sokd_accuracy.csv", header, rows)
    print(_markdown(header, rows))
    print(f"\nlearned policy of the last seed:\n{distill.augmentation.describe(3)}")
    draw(args.out / "sokd_areas.png", distill, student, teacher, digits.test.images[:4])
    print(f"\nwritten: {args.out}/sokd_accuracy.csv, sokd_policy.txt, sokd_areas.png")


if __name__ == "__main__":
    main()

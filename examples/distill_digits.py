"""Distil a convolutional teacher into a tiny student on handwritten digits; report what it brought and cost.

    python examples/distill_digits.py --out report
    python examples/distill_digits.py --loss plain kd kd++ dkd dkd++ --seeds 3

The teacher learns from 1,000 labelled images. Every student learns from the same fraction of them, once with
cross-entropy alone and once with each distillation loss added (_methods.py). Needs scikit-learn, matplotlib and tqdm.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from _digits import ConvNet, Digits, Split, student_net, teacher_net
from _methods import METHODS
from _report import write_report
from _timing import time_losses
from torch import Tensor, nn
from tqdm import tqdm

import kdfast

# Chosen by validation accuracy of the plain student, never by the test, on seeds 100 to 104; so are the epochs.
LEARNING_RATE, WEIGHT_DECAY = 0.1, 5e-4
CKA_IMAGES = 256
DEFAULT = ("plain", "kd", "rcka", "kd++")


@dataclass
class Run:
    """What is kept of one training."""

    seed: int
    cross_entropy: list[float] = field(default_factory=list)  # per epoch, on the training images
    validation: list[float] = field(default_factory=list)  # accuracy per epoch, %
    test: float = float("nan")  # accuracy, %, measured once, after the last epoch
    step_ms: float = float("nan")
    cka: Tensor | None = None  # [teacher layers, student layers]
    cka_before: Tensor | None = None


@torch.no_grad()
def accuracy(model: ConvNet, split: Split) -> float:
    model.eval()
    return 100 * (model(split.images).logits.argmax(1) == split.labels).float().mean().item()


@torch.no_grad()
def cka_matrix(student: ConvNet, teacher: ConvNet, images: Tensor) -> Tensor:
    """CKA of every layer of the teacher (rows) with every layer of the student; the logits come last."""
    student.eval()
    s, t = student(images), teacher(images)
    return torch.stack(
        [torch.stack([kdfast.linear_cka(a, b) for a in (*s.layers, s.logits)]) for b in (*t.layers, t.logits)]
    ).cpu()


def train(
    model: ConvNet,
    split: Split,
    validation: Split,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    bar: tqdm,
    teacher: ConvNet | None = None,
    distill: nn.Module | None = None,
) -> Run:
    """Train ``model`` by cross-entropy, plus ``distill`` where given. The same seed gives the same result."""
    run, count = Run(seed), len(split.labels)
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, count)
    steps = count // batch_size  # whole batches only
    parameters = [*model.parameters(), *(distill.parameters() if distill else ())]
    optimizer = torch.optim.SGD(
        parameters, LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    seconds = 0.0
    for epoch in range(epochs):
        start = time.perf_counter()
        model.train()
        sum_of_losses = torch.zeros((), device=split.images.device)
        order = torch.randperm(count, generator=generator).to(split.images.device)
        for batch in order.split(batch_size)[:steps]:
            images, labels = split.images[batch], split.labels[batch]
            student_output = model(images)
            loss = F.cross_entropy(student_output.logits, labels)
            sum_of_losses += loss.detach()
            if distill is not None:
                with torch.no_grad():
                    teacher_output = teacher(images)
                loss = loss + distill(student_output, teacher_output, labels, epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        run.cross_entropy.append(sum_of_losses.item() / steps)
        seconds += time.perf_counter() - start
        run.validation.append(accuracy(model, validation))
        bar.update()
    run.step_ms = 1000 * seconds / (epochs * steps)
    return run


def experiment(args: argparse.Namespace, digits: Digits) -> tuple[dict[str, list[Run]], ConvNet]:
    """Train a teacher and every student for every seed; also returns the last teacher, for timing."""
    runs: dict[str, list[Run]] = {name: [] for name in ("teacher", *args.loss)}
    total = args.seeds * (args.teacher_epochs + len(args.loss) * args.epochs)
    with tqdm(total=total, unit="epoch", mininterval=1, disable=args.quiet) as bar:
        for seed in range(args.seeds):
            bar.set_description(f"seed {seed}: teacher")
            torch.manual_seed(seed)
            teacher = teacher_net().to(args.device)
            settings = {"seed": seed, "batch_size": args.batch_size, "bar": bar}
            run = train(teacher, digits.train, digits.validation, epochs=args.teacher_epochs, **settings)
            run.test = accuracy(teacher, digits.test)  # leaves it in evaluation mode
            teacher.requires_grad_(False)
            runs["teacher"].append(run)
            split = digits.train.part(args.train_fraction, seed)
            for name in args.loss:
                bar.set_description(f"seed {seed}: {METHODS[name].title}")
                torch.manual_seed(seed)  # every method starts from the same student
                student = student_net().to(args.device)
                build = METHODS[name].build
                distill = None if build is None else build(student, teacher, split).to(args.device)
                before = cka_matrix(student, teacher, digits.test.images[:CKA_IMAGES])
                run = train(
                    student,
                    split,
                    digits.validation,
                    epochs=args.epochs,
                    teacher=teacher,
                    distill=distill,
                    **settings,
                )
                run.test, run.cka_before = accuracy(student, digits.test), before
                run.cka = cka_matrix(student, teacher, digits.test.images[:CKA_IMAGES])
                runs[name].append(run)
    return runs, teacher


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"need at least 1, got {value}")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0.02 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"need a number from 0.02 (two images of each digit) to 1, got {value}"
        )
    return value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for tables and figures")
    parser.add_argument(
        "--loss", nargs="+", choices=METHODS, default=list(DEFAULT), help="methods to compare"
    )
    parser.add_argument("--seeds", type=positive, default=5, help="how often everything is repeated")
    parser.add_argument("--epochs", type=positive, default=100, help="epochs of every student")
    parser.add_argument("--teacher-epochs", type=positive, default=15, help="epochs of every teacher")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument(
        "--train-fraction", type=fraction, default=0.2, help="share of the training images the students see"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--large-batch", type=positive, default=512, help="second batch size at which losses are timed"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="do not time torch.compile, which takes longest"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    args.loss, args.device = list(dict.fromkeys(args.loss)), torch.device(args.device)
    return args


def main() -> None:
    args = arguments()
    torch.backends.cudnn.deterministic = True
    digits = Digits.load(args.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small gain nothing from more, and lose on a busy machine
    runs, teacher = experiment(args, digits)
    torch.set_num_threads(threads)
    student = student_net().to(args.device)
    methods = [METHODS[name] for name in args.loss if METHODS[name].build is not None and METHODS[name].timed]
    timings = time_losses(
        {m.title: m.build(student, teacher, digits.train).to(args.device) for m in methods},
        student,
        teacher,
        digits.train,
        sizes=(args.batch_size, args.large_batch),
        compiled=not args.no_compile,
    )
    titles = {"teacher": "teacher", **{name: METHODS[name].title for name in args.loss}}
    print(write_report(args, {titles[name]: found for name, found in runs.items()}, timings))


if __name__ == "__main__":
    main()

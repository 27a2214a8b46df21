"""Handwritten digits of 8 x 8 pixels, split once, and the convolutional networks that learn them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


class Split(NamedTuple):
    """Images [N, 1, 8, 8], scaled to mean 0 and spread 1, and their labels [N]."""

    images: Tensor
    labels: Tensor

    def part(self, fraction: float, seed: int) -> Split:
        """A random ``fraction`` of the images, equally many of each digit as far as that goes."""
        if fraction == 1:
            return self
        labels = self.labels.cpu().numpy()
        chosen, _ = train_test_split(
            range(len(labels)), train_size=fraction, stratify=labels, random_state=seed
        )
        return Split(self.images[chosen], self.labels[chosen])


class Digits(NamedTuple):
    """1,000 images to train on, 257 to watch and to choose settings by, 540 to report."""

    train: Split
    validation: Split
    test: Split

    @classmethod
    def load(cls, device: torch.device) -> Digits:
        pixels, labels = load_digits(return_X_y=True)
        rest, test, rest_labels, test_labels = train_test_split(
            pixels, labels, test_size=540, stratify=labels, random_state=0
        )
        train, validation, train_labels, validation_labels = train_test_split(
            rest, rest_labels, train_size=1000, stratify=rest_labels, random_state=0
        )
        mean, spread = train.mean(), train.std()

        def split(x, y) -> Split:
            images = torch.tensor((x - mean) / spread, dtype=torch.float32, device=device).view(-1, 1, 8, 8)
            return Split(images, torch.tensor(y, device=device))

        return cls(split(train, train_labels), split(validation, validation_labels), split(test, test_labels))


class Output(NamedTuple):
    """What a network shows of itself; every method picks from it what it compares."""

    layers: list[Tensor]  # of every convolution, [N, C, H, W] each
    stages: list[Tensor]  # the last layer of every stage: one per resolution
    embedding: Tensor  # [N, D], what the classifier sees
    logits: Tensor  # [N, 10]


class ConvNet(nn.Module):
    """Three stages of ``depth`` convolutions, at 8 x 8, 4 x 4 and 2 x 2 pixels; w, 2w and 4w channels."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.blocks = nn.ModuleList()
        channels = 1
        for stage in range(3):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                self.blocks.append(
                    nn.Sequential(
                        nn.Conv2d(channels, width << stage, 3, stride, padding=1, bias=False),
                        nn.BatchNorm2d(width << stage),
                        nn.ReLU(),
                    )
                )
                channels = width << stage
        self.classifier = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Output:
        layers, x = [], images
        for block in self.blocks:
            x = block(x)
            layers.append(x)
        embedding = x.mean((2, 3))
        return Output(layers, layers[self.depth - 1 :: self.depth], embedding, self.classifier(embedding))


def teacher_net() -> ConvNet:
    return ConvNet(width=32, depth=2)


def student_net() -> ConvNet:
    return ConvNet(width=4, depth=1)

"""Draw where teacher and student attend in a photograph: spatial masks at three temperatures.

    python examples/attention_masks.py --out report

Two networks, a wide teacher and a narrow student, first learn to remove noise from the detail of scikit-learn's two
photographs (half a minute); the masks are those of their feature maps at stride 8. Needs scikit-learn, matplotlib
and tqdm.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from tqdm import trange

from kdfast import attention_masks

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm

TEMPERATURES = (0.1, 0.5, 1.0)
MODES = {
    "mean_of_softmax": "mean of two softmaxes\n(published code)",
    "softmax_of_sum": "softmax of the sum\n(Eq. 2)",
}
CHANNELS, STRIDE, CROP = 64, 8, 96


class Denoiser(nn.Module):
    """Three strided stages of ``width`` to a feature map of 64 channels, and back to the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (3, width, 2 * width, CHANNELS)
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in pairwise(widths)
            )
        )
        self.decoder = nn.Sequential(nn.Conv2d(CHANNELS, 3 * STRIDE**2, 1), nn.PixelShuffle(STRIDE))

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))


def photographs() -> Tensor:
    """[2, 3, H, W] in [0, 1], cut to a multiple of the stride."""
    images = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    images = images.permute(0, 3, 1, 2).float() / 255
    return images[..., : images.shape[2] // STRIDE * STRIDE, : images.shape[3] // STRIDE * STRIDE]


def detail(images: Tensor) -> Tensor:
    """What distinguishes a pixel from its surroundings of 31 x 31."""
    return 2 * (images - nn.functional.avg_pool2d(images, 31, 1, 15, count_include_pad=False))


def train(width: int, images: Tensor, steps: int, name: str) -> Denoiser:
    torch.manual_seed(0)
    net = Denoiser(width)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in trange(steps, desc=name, disable=None):
        tops = [int(torch.randint(size - CROP, ())) for size in images.shape[2:] for _ in range(8)]
        corners = enumerate(zip(tops[:8], tops[8:], strict=True))
        clean = torch.stack([images[i % 2, :, y : y + CROP, x : x + CROP] for i, (y, x) in corners])
        loss = nn.functional.mse_loss(net(clean + 0.2 * torch.randn_like(clean)), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def draw(image: Tensor, student: Tensor, teacher: Tensor, path: Path) -> None:
    """One row per way of joining the masks, one column per temperature; on the left what they are made of."""
    panels = [[f"{mode} {t}" for t in TEMPERATURES] for mode in MODES]
    left = ["photograph", "photograph", "student", "student", "teacher", "teacher"]
    mosaic = [[side, *panels[row // 3]] for row, side in enumerate(left)]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(14, 5.6), layout="constrained")
    axes["photograph"].imshow(image.permute(1, 2, 0))
    axes["photograph"].set_title("photograph")
    for name, features in (("student", student), ("teacher", teacher)):
        axes[name].imshow(features[0].abs().mean(0), cmap="magma")
        axes[name].set_title(f"{name}'s attention")
    for (mode, label), row in zip(MODES.items(), panels, strict=True):
        for name, temperature in zip(row, TEMPERATURES, strict=True):
            mask, _ = attention_masks(student, teacher, temperature=temperature, mode=mode)
            # White is weight 1, that of every pixel without a mask.
            shown = axes[name].imshow(mask[0, 0], cmap="RdBu_r", norm=LogNorm(0.1, 10))
            title = f"T = {temperature}: weights {mask.min():.2g} to {mask.max():.4g}"
            axes[name].set_title(title)
            if mode == "mean_of_softmax":
                print(title)
        axes[row[0]].set_ylabel(label)
    for axis in axes.values():
        axis.set(xticks=[], yticks=[])
    masks = [axes[name] for row in panels for name in row]
    figure.colorbar(shown, ax=masks, label="weight of a pixel in L_AM (mean 1)", extend="both")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the figure (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each network (%(default)s)")
    options = parser.parse_args()
    images = photographs()
    teacher, student = (
        train(width, detail(images), options.steps, name) for width, name in ((32, "teacher"), (8, "student"))
    )
    with torch.no_grad():
        maps = [net.encoder(detail(images[:1])) for net in (student, teacher)]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "attention_masks.png"
    draw(images[0], *maps, path)
    print(f"written: {path}")


if __name__ == "__main__":
    main()

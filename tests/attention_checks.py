"""Inputs and checks for the backends of the op ``attention_mask``, on any device."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kdfast import use_backend
from kdfast.ops.attention_mask import attention_mask, attention_pool
from kdfast.reference import attention_mask as reference

FLAGS = ("softmax_of_sum", "channel_mask", "signed", "detach_mask")
SETTINGS = [
    {"temperature": 0.3, "transfer_weight": 0.7, "masked_weight": 1.3} | dict(zip(FLAGS, flags, strict=True))
    for flags in itertools.product((False, True), repeat=4)
]
# One pixel; one channel; fewer pixels than a vector; several chunks of pixels, the last with few; more channels than
# rows in a block.
SHAPES = [(1, 3, 1, 1), (2, 1, 3, 5), (2, 9, 1, 2), (1, 3, 41, 53), (1, 70, 9, 8), (5, 33, 2, 3)]
layouts = {
    "channels_last": lambda v: v.contiguous(memory_format=torch.channels_last),
    "transposed": lambda v: v.transpose(2, 3).contiguous().transpose(2, 3),
    "channel slice": lambda v: torch.cat([v, v + 1], 1)[:, : v.shape[1]],
    "channels_last slice": lambda v: torch.cat([v, v + 1], 1).contiguous(memory_format=torch.channels_last)[
        :, : v.shape[1]
    ],
    "pixel slice": lambda v: torch.nn.functional.pad(v, (1, 2, 1, 1), value=9.0)[:, :, 1:-1, 1:-2],
    "step": lambda v: v.repeat_interleave(2, 3)[..., ::2],
    "expanded images": lambda v: v[:1].expand_as(v),
    "expanded channels": lambda v: v[:, :1].expand_as(v),
}


def maps(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Student, teacher and adapted student, with some elements exactly 0."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator) + 0.3 * i for i in range(3)]
    made[0].view(-1)[::7] = 0
    return [v.to(device, dtype) for v in made]


def run(call, inputs: list[Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of a function of all of them."""
    inputs = [None if v is None else v.detach().to(dtype or v.dtype) for v in inputs]
    # Like empty_like of a map that does not fill its memory, a copy by `to` may be laid out anew: keep what came.
    needed = [v.requires_grad_() for v in inputs if v is not None]
    value, distances, *pooled = call(*inputs)
    outputs = {"loss": value, "distances": distances} | dict(
        zip(("spatial", "channel"), pooled, strict=False)
    )
    if pooled:
        value = value + 0.3 * pooled[0].sin().sum() + 0.2 * pooled[1].cos().sum()
    names = ("student", "teacher", "adapted")
    gradients = dict(zip(names, torch.autograd.grad(value, needed), strict=False))
    return {k: v.detach() for k, v in (outputs | gradients).items()}


def compare(found: dict, expected: dict, truth: dict, floor: float) -> None:
    """A maximal error may be twice that of the reference in the same type, plus ``floor`` times the largest value."""
    for name, t in truth.items():
        f, e = found[name], expected[name]
        assert f.dtype == e.dtype and f.shape == e.shape, name
        size = max(t.abs().max().item(), 1e-3)
        error, allowed = (f.double() - t).abs().max().item(), 2 * (e.double() - t).abs().max().item()
        assert error <= allowed + floor * size, (
            f"{name}: error {error:.3g}, allowed {allowed:.3g}, of {size:.3g}"
        )


def check(
    backend: str, student: Tensor, teacher: Tensor, adapted: Tensor, *, floor: float = 3e-6, **settings
) -> None:
    """With and without an adapted map and pooled attention: all outputs and gradients against the float64 reference.

    What a backend does not write is NaN.
    """
    for third, pooled in itertools.product((None, adapted), (True, False)):

        def call(*inputs, pooled=pooled):
            return attention_mask(*inputs, **settings, pooled=pooled)[: 4 if pooled else 2]

        def plain(*inputs, pooled=pooled):
            return reference.attention_mask(*inputs, **settings)[: 4 if pooled else 2]

        inputs = [student, teacher, third]
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
        try:
            with use_backend(backend):
                found = run(call, inputs)
        finally:
            torch.use_deterministic_algorithms(before)
        compare(found, run(plain, inputs), run(plain, inputs, torch.float64), floor)


def check_pool(backend: str, x: Tensor, signed: bool, floor: float = 3e-6) -> None:
    def run_pool(call, x):
        x = x.detach().requires_grad_()
        spatial, channel = call(x)
        (gradient,) = torch.autograd.grad(spatial.sin().sum() + channel.cos().sum(), x)
        return {"spatial": spatial.detach(), "channel": channel.detach(), "gradient": gradient}

    with use_backend(backend):
        found = run_pool(lambda v: attention_pool(v, signed=signed), x)
    expected, truth = (run_pool(lambda v: reference.attention_pool(v, signed), v) for v in (x, x.double()))
    compare(found, expected, truth, floor)

"""What every op must do whose forward on the CPU computes the student's gradient too (kdfast/ops/_early.py)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast.ops import _early


class _Called(TorchDispatchMode):
    """Names of the ops of kdfast that run."""

    def __enter__(self) -> list[str]:
        self.names: list[str] = []
        super().__enter__()
        return self.names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kdfast":
            self.names.append(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def called(call: Callable[[], object]) -> list[str]:
    with _Called() as names:
        call()
    return names


def check_what_is_kept(
    call: Callable[[Tensor], Tensor], student: Tensor, wanted: Tensor, close: dict
) -> None:
    """A graph keeps its inputs as PyTorch's own do: seen by hooks, guarded against changes, freed with it."""
    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = call(student)
    assert any(x is student or x.data_ptr() == student.data_ptr() for x in packed)
    for _ in range(2):  # the second computes from what the hooks give back
        found = torch.autograd.grad(loss, student, retain_graph=True)[0]
        torch.testing.assert_close(found, wanted, **close)

    own = student.detach().clone().requires_grad_()
    loss = call(own)
    first = torch.autograd.grad(loss, own, retain_graph=True)[0]
    torch.testing.assert_close(first, wanted, **close)
    with torch.no_grad():
        own.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, own)

    enabled = gc.isenabled()
    gc.disable()
    try:
        own = student.detach().clone().requires_grad_()
        loss = call(own)
        left = [weakref.ref(x) for x in (own, loss, loss.grad_fn)]
        loss.backward()
        del own, loss
        assert not any(ref() is not None for ref in left), "kept alive by a cycle"
    finally:
        if enabled:
            gc.enable()


def check_early(monkeypatch, op: str, call: Callable[[Tensor], Tensor], student: Tensor) -> None:
    """``call(student)``, the loss where only the student needs a gradient, against the op's two-call path."""
    early, two = f"{op}_with_gradient", [op, f"{op}_backward"]
    student = student.detach().requires_grad_()

    def gradient(loss: Tensor, grad: float, **kwargs) -> Tensor:
        return torch.autograd.grad(loss, student, torch.full_like(loss, grad), **kwargs)[0]

    with kdfast.use_backend("cpu"):
        assert called(lambda: gradient(call(student), 1)) == [early]
        with monkeypatch.context() as patch:
            patch.setattr(_early, "wanted", lambda *args: False)
            loss_two, wanted = call(student), {}
            for grad in (1.0, -2.5):
                wanted[grad] = gradient(loss_two, grad, retain_graph=True)
            assert called(lambda: gradient(call(student), 1)) == two
        close = {"rtol": 1e-5, "atol": 1e-6 * float(wanted[1.0].abs().max())}
        if student.dtype == torch.bfloat16:
            close = {"rtol": 1e-2, "atol": 1e-2 * float(wanted[1.0].float().abs().max())}
        loss = call(student)
        torch.testing.assert_close(loss, loss_two, rtol=1e-6, atol=1e-9)
        for grad in (1.0, -2.5, 1.0):  # in one graph; what was returned before is changed in between
            found = gradient(loss, grad, retain_graph=True)
            torch.testing.assert_close(found, wanted[grad], **close)
            assert found.stride() == torch.empty_like(student).stride()
            found.fill_(torch.nan)
        torch.testing.assert_close(gradient(call(student), -2.5), wanted[-2.5], **close)
        # Two uses of one student accumulate, and the first gradient is not the second one's memory.
        torch.testing.assert_close(gradient(call(student) + 3 * call(student), 1), 4 * wanted[1.0], **close)
        assert called(lambda: call(student.detach())) == [op]
        with torch.no_grad():
            assert called(lambda: call(student)) == [op]
        half = student.detach().half().requires_grad_()
        assert called(lambda: torch.autograd.grad(call(half), half)) == two
        check_what_is_kept(call, student, wanted[1.0], close)
        # Gradients of the gradient go through the reference, whatever the forward has left.
        if student.dtype == torch.float64:
            assert torch.autograd.gradgradcheck(call, student)

"""Choice of backend: by name, by environment, automatic; and what ``info`` says."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

import kdfast
from kdfast import backend


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_info_is_a_function_and_a_command() -> None:
    report = kdfast.info()
    assert report["torch"] == torch.__version__
    assert set(report["backends"]) == set(backend.BACKENDS)
    importlib.import_module("kdfast.info")  # rebinds kdfast.info to the module
    assert kdfast.info() == report
    printed = subprocess.run(
        [sys.executable, "-m", "kdfast.info"], capture_output=True, text=True, check=True, cwd=os.getcwd()
    )
    assert "reference: available" in printed.stdout
    assert not printed.stderr


def test_use_backend_nests_and_restores() -> None:
    before = backend._requested
    with kdfast.use_backend("reference"):
        assert backend._requested == "reference"
        with kdfast.use_backend("auto"):
            assert backend._requested == "auto"
        assert backend._requested == "reference"
    assert backend._requested == before

    @kdfast.use_backend("reference")
    def decorated() -> str:
        return backend._requested

    assert decorated() == decorated() == "reference"
    with pytest.raises(KeyError), kdfast.use_backend("reference"):
        raise KeyError
    assert backend._requested == before


def test_environment_sets_the_default() -> None:
    done = run_python("import kdfast; print(kdfast.info()['requested'])", KDFAST_BACKEND="reference")
    assert done.stdout.strip() == "reference"
    done = run_python("import kdfast", KDFAST_BACKEND="quick")
    assert "KDFAST_BACKEND: got 'quick'" in done.stderr


def test_a_backend_that_cannot_run_raises_with_the_reason() -> None:
    for name in backend.BACKENDS:
        reason = backend.why_not(name)
        if reason is not None:
            with pytest.raises(RuntimeError, match=name):
                kdfast.use_backend(name)
    with pytest.raises(ValueError, match="'reference', 'cpu', 'triton', 'cuda'"):
        kdfast.use_backend("gpu")


def test_a_backend_refuses_tensors_of_another_device() -> None:
    if backend.why_not("cpu") is not None:
        pytest.skip(backend.why_not("cpu"))
    with (
        kdfast.use_backend("cpu"),
        pytest.raises(ValueError, match="takes tensors on cpu, got tensors on cuda"),
    ):
        backend.choose("gram", "cuda", ("triton",))


def test_importing_kdfast_imports_neither_triton_nor_matplotlib() -> None:
    code = "import sys, kdfast; print([m for m in ('triton', 'matplotlib', 'sklearn') if m in sys.modules])"
    with_torch = (
        "import sys, torch; print([m for m in ('triton', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    assert run_python(code).stdout == run_python(with_torch).stdout


def test_without_the_extension_the_reference_runs_and_says_so() -> None:
    code = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "kdfast._C":
            raise ImportError("blocked for this test")
sys.meta_path.insert(0, Block())
import torch, kdfast
x = torch.randn(5, 4, requires_grad=True)
loss = kdfast.CKALoss()(x, torch.randn(5, 3))
loss.backward()
print(kdfast.info()["backends"]["cpu"], x.grad.isfinite().all().item())
torch.ops.kdfast.gram(*(torch.randn(1, 4, 1, 1, 1, 3) for _ in range(2)), 0, True, False, False, False, True)
"""
    done = run_python(code)
    assert "blocked for this test" in done.stdout, done.stderr
    assert done.stdout.rstrip().endswith("True")
    assert done.stderr.count("without its C++ kernels") == 1


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_without_a_kernel_for_the_op_is_refused(monkeypatch, name):
    monkeypatch.setattr(backend, "_requested", name)
    with pytest.raises(NotImplementedError, match=f"fold has no {name} kernel"):
        backend.choose("fold", "cuda", ())

"""The build itself: what was built, from what, and whether the CUDA compiler had to spill."""

import json
import re
from pathlib import Path

import pytest

from kdfast import _extension

ROOT = Path(__file__).resolve().parent.parent
CSRC = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh"})
REPORT = ROOT / "kdfast" / "_build.json"


@pytest.fixture(scope="module")
def report():
    if not REPORT.exists():
        pytest.skip("kdfast/_build.json is missing: kdfast is not built in this tree")
    return json.loads(REPORT.read_text())


def test_report_names_every_part(report):
    assert set(report["parts"]) == {"extension", "cpu", "cuda"}
    for name, part in report["parts"].items():
        assert part["state"] in {"built", "not built", "failed"}, name
        assert part["detail"].strip(), f"{name} gives no reason"


def test_no_part_failed(report):
    failed = {name: part["detail"] for name, part in report["parts"].items() if part["state"] == "failed"}
    assert not failed


def test_module_agrees_with_report(report):
    if report["parts"]["extension"]["state"] != "built":
        assert _extension.module is None
        assert report["parts"]["extension"]["detail"] in _extension.load_error
        return
    assert _extension.load_error is None
    assert _extension.build["cuda"] == (report["parts"]["cuda"]["state"] == "built")
    assert ", ".join(_extension.build["isas"]) == report["parts"]["cpu"]["detail"]


def test_cuda_kernels_do_not_spill(report):
    cuda = report["parts"]["cuda"]
    if cuda["state"] != "built":
        pytest.skip(f"CUDA was not built: {cuda['detail']}")
    logs = {
        p.name: ROOT / report["build_dir"] / "cuda" / f"{p.name}.o.log" for p in CSRC if p.suffix == ".cu"
    }
    for name, log in logs.items():
        stores_loads = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.read_text())
        assert stores_loads, f"{log} holds no report of ptxas"
        assert all(pair == ("0", "0") for pair in stores_loads), f"{name} spills: {log}"


@pytest.mark.parametrize("path", CSRC, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_stable_abi_headers(path):
    text = path.read_text()
    included = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', text)
    allowed = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    for header in included:
        assert not header.startswith(("ATen/", "c10/", "caffe2/")), header
        assert not header.startswith("torch/") or header.startswith(allowed), header
    if path.suffix in {".cu", ".cuh"}:
        assert not any(h.startswith("torch/") for h in included), (
            "nvcc compiles plain CUDA, without torch headers"
        )

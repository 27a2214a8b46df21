"""Loads the compiled module ``kdfast._C``, which registers the C++ and CUDA ops, or says why it cannot."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  (brings the libraries that the module is linked to)


def _read_report() -> dict[str, Any]:
    """What setup.py built and left out; empty when it never ran."""
    report = Path(__file__).with_name("_build.json")
    return json.loads(report.read_text()) if report.exists() else {}


def _load(report: dict[str, Any]) -> tuple[ModuleType | None, str | None]:
    try:
        return import_module("kdfast._C"), None
    except ModuleNotFoundError as error:
        if error.name != "kdfast._C":
            raise
        if not report:
            return None, "kdfast._C was never built (pip install --no-build-isolation -e .)"
        part = report["parts"]["extension"]
        if part["state"] == "built":
            return None, f"kdfast._C was built for {report['python']}, not for this Python"
        return None, f"kdfast._C was not built: {part['detail']}"
    except ImportError as error:
        return None, f"kdfast._C does not load: {error}"


#: setup.py's report (``parts``: state and detail of each), and what the loaded module says of itself.
build: dict[str, Any] = _read_report()
#: The compiled module, or None; ``load_error`` then says why.
module: ModuleType | None
load_error: str | None
module, load_error = _load(build)
if module is not None:
    build |= module.build_info()

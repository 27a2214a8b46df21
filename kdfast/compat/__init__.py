"""Drop-ins with the names, arguments and values of published code, one module per library."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import ccnet, dist, mdistiller, mmcv, mmrazor, nd

__all__ = ["ccnet", "dist", "mdistiller", "mmcv", "mmrazor", "nd"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

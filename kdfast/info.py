"""``python -m kdfast.info``: what was built and what can run here."""

import sys
from types import ModuleType

from .backend import info


class _CallableModule(ModuleType):
    """Importing ``kdfast.info`` rebinds that name to this module, which therefore stays callable."""

    def __call__(self) -> dict:
        return info()


sys.modules[__name__].__class__ = _CallableModule


def _lines(value: object, name: str, depth: int = 0) -> list[str]:
    if not isinstance(value, dict):
        return [f"{'  ' * depth}{name}: {value}"]
    return [f"{'  ' * depth}{name}:"] + [
        line for k, v in value.items() for line in _lines(v, str(k), depth + 1)
    ]


if __name__ == "__main__":
    for key, entry in info().items():
        print("\n".join(_lines(entry, key)))

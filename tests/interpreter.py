"""Triton's interpreter without its greatest cost.

It puts its own functions in the place of the language's when a kernel is launched, and looks for any that it has not
replaced yet in every call of a device function: half of the time of kernels that are made of such functions.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def _replaced(lang: ModuleType) -> bool:
    return not tl.core.is_builtin(lang.load)


def search_once() -> None:
    """A device function that is called while a kernel runs finds what the kernel's launch has replaced."""
    search = interpreter._patch_lang

    def search_unless_done(fn: Callable) -> Any:
        langs = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if langs and all(map(_replaced, langs)):
            return interpreter._LangPatchScope()
        return search(fn)

    interpreter._patch_lang = search_unless_done

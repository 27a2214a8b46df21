"""Triton's interpreter without two of its greatest costs, which were half of the time of its tests.

- In every call of a device function it looks for functions of the language that it has not replaced yet, by its own, as
  the launch of the kernel has done.
- For every value it makes a table of types anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def make_fast() -> None:
    search, type_of = interpreter._patch_lang, interpreter._get_np_dtype
    types: dict[str, Any] = {}

    def search_unless_done(fn: Callable) -> Any:
        langs = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if langs and not any(tl.core.is_builtin(lang.load) for lang in langs):
            return interpreter._LangPatchScope()
        return search(fn)

    def known_type(of: tl.dtype) -> Any:
        name = of.scalar.name
        if name not in types:
            types[name] = type_of(of)
        return types[name]

    interpreter._patch_lang, interpreter._get_np_dtype = search_unless_done, known_type

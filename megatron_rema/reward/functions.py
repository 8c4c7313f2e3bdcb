"""Functions that a user names in the configuration: code of the user's own, found by "module:name"."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def named_function(key: str, name: str) -> Callable[..., Any]:
    """The function behind "module:name", the value of setting ``key``. Raises ValueError naming what cannot be found."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{key} is {name!r}; it must be module:name of a function that can be imported ({error}): correct it, or put the module's "
            "folder on PYTHONPATH."
        ) from error
    if not callable(found):
        raise ValueError(f"{key} is {name!r}, which is a {type(found).__name__}; it must be a function of an Episode.")
    return found

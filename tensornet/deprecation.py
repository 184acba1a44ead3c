"""Deprecated names: they work for one release, with a warning that gives the new name."""

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def moved(module: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Build a module `__getattr__` that finds names which have moved to another module.

    Args:
        module: that held the names.
        places: module that holds each name now.

    Returns:
        Function for the module's `__getattr__`: it warns at the caller's line, and raises AttributeError for
        names that were never there.

    Example:
        >>> find = moved("old", {"sqrt": "math"})
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     find("sqrt")(4.0)
        2.0
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is now {places[name]}.{name}; the old name goes with the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(places[name]), name)

    return find

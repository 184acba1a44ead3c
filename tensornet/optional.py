"""Optional dependencies: the error that names the pip command for a missing package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from tensornet.errors import MissingDependencyError

DISTRIBUTION = "tensornet-torch"


def missing_hint(modules: Sequence[str], *, extra: str, user: str) -> str | None:
    """Compose a line with the pip command for missing modules; None if every module is installed.

    Looks the modules up without importing them, so that a failure *inside* an installed package
    is never mistaken for an absent one.

    Args:
        modules: top-level module names, as imported.
        extra: the extra of this distribution that brings them.
        user: the part of the library that needs them, as the reader knows it ("the command line").
    """
    missing = [name for name in modules if find_spec(name) is None]
    if not missing:
        return None
    return (
        f"{user} needs {', '.join(missing)}, not installed here: run  pip install '{DISTRIBUTION}[{extra}]'"
    )


def require(modules: Sequence[str], *, extra: str, user: str) -> None:
    """Raise an error with the pip command when one of ``modules`` is not installed.

    Args:
        modules: top-level module names, as imported.
        extra: the extra of this distribution that brings them.
        user: the part of the library that needs them, as the reader knows it.

    Raises:
        MissingDependencyError: names the missing modules and the extra that brings them.
    """
    hint = missing_hint(modules, extra=extra, user=user)
    if hint is not None:
        raise MissingDependencyError(hint)


def import_optional(module: str, *, extra: str, user: str) -> ModuleType:
    """Import and return a dotted module of an optional package.

    Args:
        module: dotted name of the module.
        extra: the extra of this distribution that brings it.
        user: the part of the library that needs it, as the reader knows it.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    require((module.partition(".")[0],), extra=extra, user=user)
    return import_module(module)

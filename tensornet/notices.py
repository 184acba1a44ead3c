"""Warnings that point at the caller's line, from any depth inside the library."""

import sys
import warnings
from types import FrameType

#: The library and its plugins.
PACKAGES = "tensornet"
#: A program inside them, which calls the library as anybody does.
PROGRAM = ".cli."
#: Modules that wrap functions of the library, such as `torch.no_grad` as a decorator.
WRAPPERS = ("torch.utils._contextlib", "contextlib")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the first line of the call stack outside the library.

    Args:
        message: says what happens and what to do about it.
        category: of the warning.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as seen:
        ...     warnings.simplefilter("always")
        ...     warn("Left dense.")
        >>> str(seen[0].message)
        'Left dense.'
    """
    level, frame = 2, sys._getframe(1)
    while (outer := frame.f_back) is not None and _is_own(frame):
        level, frame = level + 1, outer
    warnings.warn(message, category, stacklevel=level)


def _is_own(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name in WRAPPERS or (name.startswith(PACKAGES) and PROGRAM not in f"{name}.")

"""A registry: the objects of one kind that this library, its plugins and users provide, by name."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

from typing_extensions import Self

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name, in the order in which they were registered.

    Args:
        kind: what is registered, for messages, such as `"topology"`.
        error: class of the exception for a name that is unknown or taken.
        hint: last sentence of the message for an unknown name.
    """

    def __init__(self, kind: str, *, error: type[Exception] = ValueError, hint: str = "") -> None:
        self.kind, self.error, self.hint = kind, error, hint
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T, *, advice: str = "choose another name") -> None:
        """Register an object; registering the same object again changes nothing.

        Args:
            name: the name of the object.
            item: the object.
            advice: what to do if the name is taken, for the message.

        Raises:
            Exception: `error`, if another object has this name.
        """
        known = self._items.setdefault(name, item)
        if known is not item:
            raise self.error(f"A {self.kind} named {name!r} is already registered ({known!r}); {advice}.")

    def remove(self, name: str) -> None:
        """Remove the object of this name, if there is one."""
        self._items.pop(name, None)

    def get(self, name: Any) -> T | None:
        """Return the object of this name; None if there is none."""
        return self._items.get(name) if isinstance(name, str) else None

    def __getitem__(self, name: Any) -> T:
        """Return the object of this name.

        Raises:
            Exception: `error`, if the name is unknown; the message lists all names and those similar to it.
        """
        if isinstance(name, str) and name in self._items:
            return self._items[name]
        close = get_close_matches(str(name), self._items)
        similar = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        hint = f" {self.hint}" if self.hint else ""
        known = ", ".join(sorted(self)) or "none"
        raise self.error(f"Unknown {self.kind} {name!r}; registered are {known}.{similar}{hint}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def values(self) -> tuple[T, ...]:
        """Return the registered objects, in the order of their registration."""
        return tuple(self._items.values())

    def copy(self) -> Self:
        """Return a registry of the same objects, to which a test can add its own."""
        made = type(self)(self.kind, error=self.error, hint=self.hint)
        made._items = dict(self._items)
        return made

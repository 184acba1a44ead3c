"""The class `Registry`, which finds objects of one kind by name: built-in ones and those added by users."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

from typing_extensions import Self

T = TypeVar("T")


class Registry(Generic[T]):
    """Registry that maps names to objects of one kind, in the order in which they were registered.

    Args:
        kind: what the objects are, for error messages, such as `"topology"`.
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
        """Remove the object with this name, if there is one."""
        self._items.pop(name, None)

    def get(self, name: Any) -> T | None:
        """Return the object with this name, or None if the name is unknown."""
        return self._items.get(name) if isinstance(name, str) else None

    def __getitem__(self, name: Any) -> T:
        """Return the object with this name.

        Raises:
            Exception: `error`, if the name is unknown; the message lists all names, and then similar names.
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
        """Return a copy of the registry, so that a test can add objects without changing the original."""
        made = type(self)(self.kind, error=self.error, hint=self.hint)
        made._items = dict(self._items)
        return made

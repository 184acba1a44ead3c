"""Registry of topology families, filled by calls and by entry points of installed packages."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points

from tensornet._util import warn
from tensornet.errors import TopologyError
from tensornet.topologies.base import TopologyFamily

#: Group of entry points by which an installed package offers families: each names an instance.
ENTRY_POINTS = "tensornet.topologies"

_FAMILIES: dict[str, TopologyFamily] = {}
#: Errors of the entry points that could not be loaded, by name.
_BROKEN: dict[str, str] = {}


def register_topology(family: TopologyFamily, *, replace: bool = False) -> TopologyFamily:
    """Register a topology family, so that configurations can use its name.

    Args:
        family: an instance of a `TopologyFamily` subclass.
        replace: allow a name that is already taken.

    Raises:
        TopologyError: not such an instance, it has no name, or the name is taken and `replace` is false.

    Example:
        >>> class MyFamily(tn.topologies.MPOFamily):
        ...     name = "mine"
        >>> family = tn.register_topology(MyFamily())
        >>> tn.topologies.topology_family("mine") is family
        True
    """
    if not isinstance(family, TopologyFamily):
        raise TopologyError(
            f"register_topology takes an instance of a subclass of TopologyFamily, got {family!r}"
            f"{'; write ' + family.__name__ + '()' if isinstance(family, type) else ''}."
        )
    if not isinstance(getattr(family, "name", None), str):
        raise TopologyError(f"{type(family).__name__} needs a class attribute `name`, a string.")
    if family.name in _FAMILIES and not replace:
        raise TopologyError(
            f"A topology named {family.name!r} is already registered; pass replace=True to replace it, "
            "or choose another name."
        )
    _FAMILIES[family.name] = family
    return family


def topology_family(name: "str | TopologyFamily") -> TopologyFamily:
    """Look up a family by name; entry points of installed packages are searched last.

    Args:
        name: of a registered family; a registered family itself is returned.

    Raises:
        TopologyError: no such name, listing those that exist; or a family that is not registered, whose
            layers could not be saved.

    Example:
        >>> tn.topologies.topology_family("mpo").name
        'mpo'
    """
    if isinstance(name, TopologyFamily):
        if _FAMILIES.get(name.name) is not name:
            raise TopologyError(
                f"The family {name.name!r} is not registered, so its layers could not be loaded again; call "
                "tensornet.register_topology(family) first, here and where they are loaded."
            )
        return name
    known = isinstance(name, str)
    if known and name not in _FAMILIES:
        _load_entry_points()
    if not known or name not in _FAMILIES:
        exist = f"registered are {', '.join(sorted(_FAMILIES))}"
        raise TopologyError(
            f"{_BROKEN[name]}; {exist}."
            if known and name in _BROKEN
            else f"Unknown topology {name!r}; {exist}."
        )
    return _FAMILIES[name]


def topology_names() -> tuple[str, ...]:
    """List the names of all families in order, including those of installed packages.

    Example:
        >>> "mpo" in tn.topologies.topology_names()
        True
    """
    _load_entry_points()
    return tuple(sorted(_FAMILIES))


@contextmanager
def registered(family: TopologyFamily) -> Iterator[TopologyFamily]:
    """Register a family for the duration of a `with` block, replacing one of the same name.

    Example:
        >>> class Plain(tn.topologies.LowRankFamily):
        ...     name = "plain"
        >>> with tn.topologies.registered(Plain()):
        ...     tn.CompressionConfig(topology="plain", max_bond=4).topology
        'plain'
    """
    before = _FAMILIES.get(family.name)
    register_topology(family, replace=True)
    try:
        yield family
    finally:
        del _FAMILIES[family.name]
        if before is not None:
            _FAMILIES[family.name] = before


@cache
def _load_entry_points() -> None:
    """Register the families of installed packages, once; warn about those that fail to load."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            family = entry.load()
            if family not in _FAMILIES.values():  # its module may have registered it already
                register_topology(family)
        except (Exception, SystemExit) as error:  # whatever a foreign package does must not break this one
            package = entry.dist.name if entry.dist is not None else "an unknown package"
            _BROKEN[entry.name] = (
                f"The topology {entry.name!r} of {package} could not be loaded from {entry.value!r}: "
                f"{type(error).__name__}: {error}"
            )
    for trouble in _BROKEN.values():  # after the last one: a warning may be an error here
        warn(trouble, RuntimeWarning)

"""Registry of topology families, filled by calls and by entry points of installed packages.

A configuration has the name of a family, or one topology for every shape of matrix.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from tensornet.errors import TopologyError
from tensornet.topologies.base import TopologyFamily
from tensornet.topology import Topology

#: Group of the entry points with which packages provide families; each points to an instance.
ENTRY_POINTS = "tensornet.topologies"

_FAMILIES: dict[str, TopologyFamily] = {}


def register_topology(family: TopologyFamily, *, replace: bool = False) -> TopologyFamily:
    """Register a topology family, so that configurations can use its name.

    Args:
        family: an instance of a `TopologyFamily` subclass.
        replace: allow a name that is already taken.

    Raises:
        TopologyError: not an instance of a family, it has no name, or the name is taken and `replace` is
            False.

    Example:
        >>> from tensornet.topologies.mpo import MPOFamily
        >>> class MyFamily(MPOFamily):
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
        name: name of a registered family; or a registered family, which is returned.

    Raises:
        TopologyError: an unknown name (the message lists the known ones), or a family that is not registered,
            whose layers could not be saved.

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
        raise TopologyError(f"Unknown topology {name!r}; {exist}.")
    return _FAMILIES[name]


def topology_names() -> tuple[str, ...]:
    """List the names of all families, sorted, including those of installed packages.

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
        >>> from tensornet.topologies.low_rank import LowRankFamily
        >>> class Plain(LowRankFamily):
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
            if family not in _FAMILIES.values():  # importing its module may have registered it
                register_topology(family)
        except (Exception, SystemExit) as error:  # errors of another package must not break this one
            trouble = f"could not be loaded from {entry.value!r}: {type(error).__name__}: {error}"
            warnings.warn(f"The topology {entry.name!r} {trouble}", RuntimeWarning, stacklevel=2)


def fixed_topologies(value: Any) -> tuple[Topology, ...]:
    """Read the topologies of a configuration; return an empty result for other values, such as a name.

    Args:
        value: a topology or its `to_dict`, or a sequence of these.

    Raises:
        TopologyError: a family is not registered, or there are two topologies for one shape.
    """
    values = [value] if isinstance(value, Topology | Mapping) else value
    if isinstance(values, str) or not isinstance(values, Sequence):
        return ()
    if not all(isinstance(each, Topology | Mapping) for each in values):
        return ()
    found = tuple(each if isinstance(each, Topology) else Topology.from_dict(each) for each in values)
    for topology in found:
        topology_family(topology.family)  # raises for unregistered families, whose layers could not be loaded
    shapes = [topology.shape for topology in found]
    if twice := next((shape for shape in shapes if shapes.count(shape) > 1), None):
        raise TopologyError(f"Two topologies are for matrices of shape {twice}; give one for each shape.")
    return found


def topology_of_shape(topologies: Sequence[Topology], shape: tuple[int, int], what: str) -> Topology:
    """Select the topology for the matrix `what` of shape `(out, in)`.

    Raises:
        TopologyError: there is no topology for this shape.
    """
    for topology in topologies:
        if topology.shape == shape:
            return topology
    raise TopologyError(
        f"{what} is a matrix of shape {shape}, and the topologies given are for "
        f"{', '.join(str(topology.shape) for topology in topologies)}. Give one for this shape as well "
        "(topology=[...]), choose other layers (target_modules=...), or give the name of a family."
    )

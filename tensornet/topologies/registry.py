"""Registry of topology families: add families, look them up by name, and read topologies in configurations.

Families are registered by calling `register_topology` or through entry points of installed packages.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from tensornet.errors import TopologyError
from tensornet.registry import Registry
from tensornet.topologies.base import TopologyFamily
from tensornet.topology import Topology

#: Entry-point group through which other packages provide families; each entry point names a family instance.
ENTRY_POINTS = "tensornet.topologies"

_FAMILIES: Registry[TopologyFamily] = Registry(
    "topology", error=TopologyError, hint="register_topology adds a family of your own."
)


def register_topology(family: TopologyFamily, *, replace: bool = False) -> TopologyFamily:
    """Register a topology family, so that configurations can use its name.

    Args:
        family: an instance of a subclass of `TopologyFamily`.
        replace: whether to replace a registered family of the same name.

    Raises:
        TopologyError: `family` is not an instance of a family or has no name, or another family has its name
            and `replace` is False.

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
    if replace:
        _FAMILIES.remove(family.name)
    advice = "pass replace=True to replace it, or choose another name"
    _FAMILIES.add(family.name, family, advice=advice)
    return family


def topology_family(name: "str | TopologyFamily") -> TopologyFamily:
    """Look up a topology family by name, first in the registry, then in entry points of installed packages.

    Args:
        name: name of a family, or a registered family, which is returned unchanged.

    Raises:
        TopologyError: the name is unknown (the message lists the known names), or the family is not
            registered, so that its layers could not be loaded again.

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
    if isinstance(name, str) and _FAMILIES.get(name) is None:
        _load_entry_points()
    return _FAMILIES[name]


def topology_names() -> tuple[str, ...]:
    """Return the sorted names of all topology families, including those of installed packages.

    Example:
        >>> "mpo" in tn.topologies.topology_names()
        True
    """
    _load_entry_points()
    return tuple(sorted(_FAMILIES))


@contextmanager
def registered(family: TopologyFamily) -> Iterator[TopologyFamily]:
    """Register a topology family inside a `with` block, in place of any family of the same name.

    Example:
        >>> from tensornet.topologies.low_rank import LowRankFamily
        >>> class Plain(LowRankFamily):
        ...     name = "plain"
        >>> with tn.topologies.registered(Plain()):
        ...     tn.CompressionConfig(topology="plain", param_ratio=0.5).topology
        'plain'
    """
    before = _FAMILIES.get(family.name)
    register_topology(family, replace=True)
    try:
        yield family
    finally:
        _FAMILIES.remove(family.name)
        if before is not None:
            _FAMILIES.add(family.name, before)


@cache
def _load_entry_points() -> None:
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            register_topology(entry.load())
        except (Exception, SystemExit) as error:  # errors of another package must not break this one
            trouble = f"could not be loaded from {entry.value!r}: {type(error).__name__}: {error}"
            warnings.warn(f"The topology {entry.name!r} {trouble}", RuntimeWarning, stacklevel=2)


def fixed_topologies(value: Any) -> tuple[Topology, ...]:
    """Read the topologies in a configuration value.

    Args:
        value: a topology, its dictionary from `to_dict`, or a sequence of either. Any other value, such as
            the name of a family, gives an empty result.

    Raises:
        TopologyError: a family is not registered, or two topologies are for the same shape.
    """
    values = [value] if isinstance(value, Topology | Mapping) else value
    if isinstance(values, str) or not isinstance(values, Sequence):
        return ()
    if not all(isinstance(each, Topology | Mapping) for each in values):
        return ()
    found = tuple(each if isinstance(each, Topology) else Topology.from_dict(each) for each in values)
    for topology in found:
        topology_family(topology.family)  # raises an error if the family is not registered
    shapes = [topology.shape for topology in found]
    if twice := next((shape for shape in shapes if shapes.count(shape) > 1), None):
        raise TopologyError(f"Two topologies are for matrices of shape {twice}; give one for each shape.")
    return found


def topology_of_shape(topologies: Sequence[Topology], shape: tuple[int, int], what: str) -> Topology:
    """Select the topology for a matrix of shape `(out, in)`; `what` names the matrix in the error message.

    Raises:
        TopologyError: no topology has this shape.
    """
    for topology in topologies:
        if topology.shape == shape:
            return topology
    raise TopologyError(
        f"{what} is a matrix of shape {shape}, but the given topologies are for "
        f"{', '.join(str(topology.shape) for topology in topologies)}. Add a topology for this shape "
        "(topology=[...]), choose other layers (target_modules=...), or give the name of a family."
    )

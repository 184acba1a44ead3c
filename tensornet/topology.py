"""The class `Topology`: the cores of a tensor network, their connections, and the size of every index."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from tensornet._util import check_size
from tensornet.errors import TopologyError


@dataclass(frozen=True)
class CoreSpec:
    """Description of one core: its name and the labels of its dimensions, in order.

    Args:
        name: a Python identifier or number, unique in its topology.
        labels: one label for each dimension of the core's tensor.

    Example:
        >>> tn.topologies.low_rank(out_features=8, in_features=6, rank=2).cores[0]
        CoreSpec(name='0', labels=('b0', 'o0', 'i0', 'b1'))
        >>> tn.topologies.CoreSpec("left", ("o", "rank"))
        CoreSpec(name='left', labels=('o', 'rank'))
    """

    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Topology:
    """Description of a linear operator `(out_features, in_features)` as named cores with labelled indices.

    The labels in `out_labels` are the out-legs (row-major, most significant first), and those in `in_labels`
    the in-legs. Every other label is a bond, which is summed over. As in einsum, any number of cores may
    have the same label; block tensor trains need this.

    The product of the out-leg sizes may exceed `out_features`. The operator is then the leading block of a
    padded matrix, and padding counts as parameters. In-legs follow the same rule.

    An operator may also be a sum of networks, such as a dense matrix plus a low-rank matrix. `terms` then
    divides the cores into groups, one for each network. Each term has all legs, and has its own bonds.

    Args:
        family: name of the family that built the topology, for example `"mpo"`.
        cores: the cores, in the order in which they are drawn.
        sizes: a pair `(label, size)` for each label.
        out_labels: labels of the out-legs.
        in_labels: labels of the in-legs.
        out_features: number of rows, at most the product of the out-leg sizes.
        in_features: number of columns, at most the product of the in-leg sizes.
        terms: for a sum, the family and the core names of each term, in the order of `cores`; empty for a
            single network.

    Raises:
        TopologyError: a label has no size, a leg is in no core, names repeat, there are more features than
            the product of the leg sizes, or a term of a sum lacks a leg or shares a bond.

    Example:
        >>> from tensornet.topologies import CoreSpec
        >>> topology = tn.Topology(
        ...     family="mine",
        ...     cores=(CoreSpec("left", ("o", "rank")), CoreSpec("right", ("rank", "i"))),
        ...     sizes=(("o", 8), ("rank", 2), ("i", 6)),
        ...     out_labels=("o",),
        ...     in_labels=("i",),
        ...     out_features=8,
        ...     in_features=6,
        ... )
        >>> topology.shape, topology.bond_dims, topology.num_params
        ((8, 6), {'rank': 2}, 28)
    """

    family: str
    cores: tuple[CoreSpec, ...]
    sizes: tuple[tuple[str, int], ...]
    out_labels: tuple[str, ...]
    in_labels: tuple[str, ...]
    out_features: int
    in_features: int
    terms: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        # NumPy integers are converted to Python integers, which JSON can store.
        sizes = tuple((label, check_size(f"The size of label {label!r}", size)) for label, size in self.sizes)
        object.__setattr__(self, "sizes", sizes)
        for name in ("out_features", "in_features"):
            object.__setattr__(self, name, check_size(name, getattr(self, name)))
        _validate(self)

    @property
    def size_of(self) -> dict[str, int]:
        """Size of every label."""
        return dict(self.sizes)

    @property
    def core_names(self) -> tuple[str, ...]:
        """Names of the cores, in order."""
        return tuple(core.name for core in self.cores)

    @property
    def core_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every core, by name."""
        size_of = self.size_of
        return {core.name: tuple(size_of[label] for label in core.labels) for core in self.cores}

    @property
    def out_dims(self) -> tuple[int, ...]:
        """Sizes of the out-legs; their product is the padded number of rows."""
        return tuple(self.size_of[label] for label in self.out_labels)

    @property
    def in_dims(self) -> tuple[int, ...]:
        """Sizes of the in-legs; their product is the padded number of columns."""
        return tuple(self.size_of[label] for label in self.in_labels)

    @property
    def bond_dims(self) -> dict[str, int]:
        """Size of every bond, by label."""
        legs = {*self.out_labels, *self.in_labels}
        return {label: size for label, size in self.sizes if label not in legs}

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(out_features, in_features)` of the operator."""
        return self.out_features, self.in_features

    @property
    def parts(self) -> "tuple[tuple[tuple[int, ...], Topology], ...]":
        """Core positions and topology of each term; a single network is one term.

        Example:
            >>> topology = tn.topologies.residual(out_features=6, in_features=4, rank=2)
            >>> [(positions, part.core_names) for positions, part in topology.parts]
            [((0,), ('base',)), ((1, 2), ('0', '1'))]
        """
        return _parts(self)

    @property
    def padded_shape(self) -> tuple[int, int]:
        """Shape `(rows, columns)` including padding."""
        return math.prod(self.out_dims), math.prod(self.in_dims)

    @property
    def num_params(self) -> int:
        """Number of stored elements, including padding."""
        return sum(math.prod(shape) for shape in self.core_shapes.values())

    @property
    def central_core(self) -> str:
        """Name of the core with the most parameters (the first if equal); the experts of MPOE share it."""
        shapes = self.core_shapes
        return max(self.core_names, key=lambda name: math.prod(shapes[name]))

    def to_dict(self) -> dict[str, Any]:
        """Convert the topology to a dictionary that JSON can store; `from_dict` restores the topology.

        The order of cores and bonds is stored explicitly if sorting the keys would change it, since
        transformers sorts the keys of config.json.
        """
        labels = [label for label, _ in self.sizes]
        order = {"order": {"cores": list(self.core_names), "sizes": labels}}
        kept = all(list(x) == sorted(x) for x in (self.core_names, self.bond_dims))
        return {
            **({} if kept else order),
            "family": self.family,
            "cores": {core.name: list(core.labels) for core in self.cores},
            "sizes": self.size_of,
            "out": list(self.out_labels),
            "in": list(self.in_labels),
            "shape": [self.out_features, self.in_features],
            **({"terms": [[family, list(names)] for family, names in self.terms]} if self.terms else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Topology":
        """Rebuild a topology from the dictionary of `to_dict`, and validate it.

        Raises:
            TopologyError: the description is incomplete or inconsistent.
        """
        try:
            order = data.get("order", data)
            cores, sizes = (
                [(_typed(key, str), data[part][key]) for key in order[part]] for part in ("cores", "sizes")
            )
            if (len(cores), len(sizes)) != (len(data["cores"]), len(data["sizes"])):
                raise TypeError(f"order {order} does not name every core and label")
            return cls(
                family=_typed(data["family"], str),
                cores=tuple(
                    CoreSpec(name, tuple(_typed(label, str) for label in labels)) for name, labels in cores
                ),
                sizes=tuple((label, _typed(size, int)) for label, size in sizes),
                out_labels=tuple(_typed(label, str) for label in data["out"]),
                in_labels=tuple(_typed(label, str) for label in data["in"]),
                out_features=_typed(data["shape"][0], int),
                in_features=_typed(data["shape"][1], int),
                terms=tuple(
                    (_typed(term[0], str), tuple(_typed(name, str) for name in term[1]))
                    for term in data.get("terms", ())
                ),
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise TopologyError(f"Not a topology description: {type(error).__name__}: {error}.") from error


@lru_cache(maxsize=4096)
def _parts(topology: Topology) -> tuple[tuple[tuple[int, ...], Topology], ...]:
    if not topology.terms:
        return ((tuple(range(len(topology.cores))), topology),)
    found = []
    for family, names in topology.terms:
        positions = tuple(topology.core_names.index(name) for name in names)
        cores = tuple(topology.cores[k] for k in positions)
        used = {label for core in cores for label in core.labels}
        sizes = tuple((label, size) for label, size in topology.sizes if label in used)
        found.append((positions, replace(topology, family=family, cores=cores, sizes=sizes, terms=())))
    return tuple(found)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value


def _validate(topology: Topology) -> None:
    size_of = topology.size_of
    if len(size_of) != len(topology.sizes):
        raise TopologyError(f"A label has two sizes: {topology.sizes}.")
    names = topology.core_names
    if not names or len(set(names)) != len(names):
        raise TopologyError(f"Core names must be unique and at least one is needed, got {names}.")
    used = {label for core in topology.cores for label in core.labels}
    for core in topology.cores:
        if not core.name.isidentifier() and not core.name.isdigit():
            raise TopologyError(f"Core name {core.name!r} must be an identifier or a number.")
        if len(set(core.labels)) != len(core.labels):
            raise TopologyError(f"Core {core.name!r} repeats a label: {core.labels}.")
    legs = (*topology.out_labels, *topology.in_labels)
    if len(set(legs)) != len(legs):
        raise TopologyError(f"A leg is listed twice: out {topology.out_labels}, in {topology.in_labels}.")
    if unsized := used - size_of.keys():
        raise TopologyError(f"Labels without a size: {sorted(unsized)}.")
    if unused := (size_of.keys() | set(legs)) - used:
        raise TopologyError(f"Labels that no core carries: {sorted(unused)}.")
    for label, size in topology.bond_dims.items():
        if size > 1 and sum(label in core.labels for core in topology.cores) < 2:
            raise TopologyError(f"Bond {label!r} of size {size} is open: it belongs to only one core.")
    for what, features, dims in (
        ("out_features", topology.out_features, topology.out_dims),
        ("in_features", topology.in_features, topology.in_dims),
    ):
        if not 1 <= features <= math.prod(dims):
            raise TopologyError(
                f"{what}={features} does not fit legs {dims} with product {math.prod(dims)}: "
                "the product must be at least the number of features."
            )
    _validate_terms(topology)


def _validate_terms(topology: Topology) -> None:
    if not topology.terms:
        return
    groups = [names for _, names in topology.terms]
    if len(groups) < 2 or sum(groups, ()) != topology.core_names or not all(groups):
        raise TopologyError(
            f"The terms of a sum are at least two groups of the cores {topology.core_names} in this order, "
            f"got {groups}."
        )
    labels_of = {core.name: set(core.labels) for core in topology.cores}
    used = [set().union(*(labels_of[name] for name in names)) for names in groups]
    legs = {*topology.out_labels, *topology.in_labels}
    for names, labels in zip(groups, used, strict=True):
        if missing := sorted(legs - labels):
            raise TopologyError(f"Every term of a sum carries every leg; cores {names} miss {missing}.")
    for label in topology.bond_dims:
        if sum(label in labels for labels in used) > 1:
            raise TopologyError(f"Bond {label!r} joins two terms of a sum; terms cannot share bonds.")

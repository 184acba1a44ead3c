"""What a topology family must offer, and the registry of families."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor

from tensornet.budget import Budget
from tensornet.checks import check_dense
from tensornet.context import outside_autocast
from tensornet.errors import TopologyError
from tensornet.network import TensorNetwork
from tensornet.notices import warn
from tensornet.topology import Topology


@dataclass(frozen=True)
class Decomposition:
    """A matrix written as a network, with the price of doing so.

    Args:
        network: the cores.
        error: guaranteed upper bound of `|W - W'|_F / |W|_F`.
        bound_by: the cap that decided the bonds: `"max_bond"`, `"rel_error"`, `"param_ratio"`, or
            `"exact"` if nothing was cut.
        iterations: sweeps of alternating least squares, 0 where the decomposition has a closed form.
        converged: whether alternating least squares settled before its sweep limit.
    """

    network: TensorNetwork
    error: float
    bound_by: str
    iterations: int = 0
    converged: bool = True


class TopologyFamily(ABC):
    """A way to write matrices as networks. Subclass it and pass an instance to `register_topology`.

    Laws an implementation must keep (`tensornet.testing.laws` checks them):
    `build` accepts every shape of at least `(1, 1)`, padding where it must; `decompose(w, Budget())` is
    exact to rounding where the family can be exact; `error` bounds the true error; no cap of the budget is
    exceeded; a larger budget never gives a larger error; the input is not changed.

    Both decompositions of a subclass run outside the caller's autocast, whose products in 16 bits would
    break the bound; a subclass has nothing to do for that.
    """

    #: Name used in configurations and files.
    name: str

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("decompose", "decompose_to"):
            if name in vars(cls):
                setattr(cls, name, outside_autocast(vars(cls)[name]))

    @abstractmethod
    def build(
        self,
        out_features: int,
        in_features: int,
        *,
        max_bond: int | Sequence[int] | None = None,
        **options: Any,
    ) -> Topology:
        """Topology for a matrix `(out_features, in_features)` with bonds at most `max_bond`.

        `max_bond` is one cap for all bonds, or a sequence with one for each.

        Raises:
            TopologyError: the options do not fit the shape.
        """

    @abstractmethod
    def decompose(self, matrix: Tensor, budget: Budget, **options: Any) -> Decomposition:
        """Write `matrix: (out_features, in_features)` as a network within the budget.

        Cores come back in `result_dtype(matrix.dtype)` on the matrix's device.

        Raises:
            BudgetError: not even the smallest network of this family fits the budget.
            NonFiniteError: the matrix holds NaN or infinity.
            TopologyError: the options do not fit the shape.
        """

    @abstractmethod
    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """Write `matrix` as a network of exactly this topology, dims and bonds included.

        A plan fixes topologies first and decomposes later; bonds the matrix does not need are filled
        with zeros, so that shapes are those of the plan.

        Raises:
            NonFiniteError: the matrix holds NaN or infinity.
            TopologyError: the topology is of another family or for another shape.
        """


def check_topology(family: str, topology: Topology, matrix: Tensor) -> None:
    """Refuse a topology of another family or for another shape, and what is no matrix.

    Raises:
        ShapeError: no dense floating matrix.
        TopologyError: saying what was got and what was expected.
    """
    if not isinstance(topology, Topology):
        raise TopologyError(f"Expected a Topology, got {topology!r}; a family's `build` makes one.")
    check_dense(matrix, f"Topology {family!r}", "a matrix of shape (out, in)", 2)
    if topology.family != family or topology.shape != tuple(matrix.shape):
        raise TopologyError(
            f"Expected a topology of the family {family!r} for a matrix of shape {tuple(matrix.shape)}, "
            f"got one of {topology.family!r} for {topology.shape}."
        )


#: Group of entry points by which an installed package offers families: each names an instance.
ENTRY_POINTS = "tensornet.topologies"

_FAMILIES: dict[str, TopologyFamily] = {}
#: What was said of the entry points that could not be loaded, by name.
_BROKEN: dict[str, str] = {}


def register_topology(family: TopologyFamily, *, replace: bool = False) -> TopologyFamily:
    """Make a family available by its name in every configuration.

    Args:
        family: an instance of a `TopologyFamily` subclass.
        replace: allow a name that is already taken.

    Raises:
        TopologyError: not such an instance, it has no name, or the name is taken and `replace` is false.
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
    """Look a family up by name; the entry points of installed packages are searched last.

    Args:
        name: of a registered family; a registered family itself is returned.

    Raises:
        TopologyError: no such name, listing those that exist; or a family that is not registered, whose
            layers could not be saved.
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
    """Names of all families, those of installed packages included, sorted."""
    _load_entry_points()
    return tuple(sorted(_FAMILIES))


@cache
def _load_entry_points() -> None:
    """Register what installed packages offer, once; what cannot be loaded is named in a warning."""
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

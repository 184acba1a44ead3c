"""What a topology family must offer, and the registry of families."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tensornet.budget import Budget
from tensornet.errors import TopologyError
from tensornet.network import TensorNetwork
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
    """

    #: Name used in configurations and files.
    name: str

    @abstractmethod
    def build(
        self, out_features: int, in_features: int, *, max_bond: int | None = None, **options: Any
    ) -> Topology:
        """Topology for a matrix `(out_features, in_features)` with bonds at most `max_bond`.

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
    """Refuse a topology of another family or for another shape.

    Raises:
        TopologyError: saying what was got and what was expected.
    """
    if topology.family != family or topology.shape != tuple(matrix.shape):
        raise TopologyError(
            f"Expected a {family!r} topology for a matrix of shape {tuple(matrix.shape)}, got a "
            f"{topology.family!r} topology for {topology.shape}."
        )


_FAMILIES: dict[str, TopologyFamily] = {}


def register_topology(family: TopologyFamily, *, replace: bool = False) -> TopologyFamily:
    """Make a family available by its name in every configuration.

    Args:
        family: an instance of a `TopologyFamily` subclass.
        replace: allow a name that is already taken.

    Raises:
        TopologyError: the name is taken and `replace` is false.
    """
    if family.name in _FAMILIES and not replace:
        raise TopologyError(
            f"A topology named {family.name!r} is already registered; pass replace=True to replace it, "
            "or choose another name."
        )
    _FAMILIES[family.name] = family
    return family


def topology_family(name: str) -> TopologyFamily:
    """Look a family up by name.

    Raises:
        TopologyError: listing the names that exist.
    """
    if name not in _FAMILIES:
        raise TopologyError(f"Unknown topology {name!r}; registered are {', '.join(topology_names())}.")
    return _FAMILIES[name]


def topology_names() -> tuple[str, ...]:
    """Names of all registered families, sorted."""
    return tuple(sorted(_FAMILIES))

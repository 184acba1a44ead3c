"""What families return: decompositions, candidates and proposals."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tensornet.network import TensorNetwork
from tensornet.quantization import NumberFormat
from tensornet.topology import Topology


@dataclass(frozen=True)
class Decomposition:
    """Network that approximates a matrix, with certified error.

    Args:
        network: the cores.
        error: guaranteed upper bound of `|W - W'|_F / |W|_F`.
        bound_by: the cap that decided the bonds: `"max_bond"`, `"rel_error"`, `"param_ratio"`, or
            `"exact"` if no bond was truncated.
        iterations: sweeps of alternating least squares, 0 where the decomposition has a closed form.
        converged: whether alternating least squares settled before its sweep limit.

    Example:
        >>> found = tn.decompose(torch.randn(12, 8), "low_rank", max_bond=3)
        >>> found.network.num_params, found.bound_by, 0 < found.error < 1
        (60, 'max_bond', True)
    """

    network: TensorNetwork
    error: float
    bound_by: str
    iterations: int = 0
    converged: bool = True


@dataclass(frozen=True)
class RoundTrip:
    """Encode and decode the cores of a network, as they will be kept.

    Args:
        run: encodes and decodes.
        number_format: integer format of all cores, from which a family may predict losses without rounding;
            None for other encodings.
    """

    run: Callable[[TensorNetwork], TensorNetwork]
    number_format: NumberFormat | None = None

    def __call__(self, network: TensorNetwork) -> TensorNetwork:
        """Return the decoded network."""
        return self.run(network)


@dataclass(frozen=True)
class Ladder:
    """Candidates of one family for one matrix, by increasing bond.

    Args:
        topologies: of the candidates, by rising bond.
        losses: `1/2 tr(R E C E^T)` of each under each weighting that was asked for, shape
            `(weightings, candidates)`.
        errors: relative Frobenius error of each, shape `(candidates,)`.
        complete: whether the last candidate has the bonds of an exact network.

    Example:
        >>> from tensornet.linalg.weighted_svd import Weighting
        >>> family = tn.topologies.topology_family("low_rank")
        >>> ladder = family.ladder(torch.randn(12, 8), [Weighting()])
        >>> len(ladder.topologies), ladder.losses.shape
        (8, torch.Size([1, 8]))
    """

    topologies: tuple[Topology, ...]
    losses: Tensor
    errors: Tensor
    complete: bool


@dataclass(frozen=True)
class Proposal:
    """Proposed topology with bounds of its error before decomposition.

    Args:
        topology: bonds included.
        lower: no network of this topology has a smaller relative error on the matrix.
        upper: its decomposition has at most this error.
        worst: no matrix of this shape has a larger one; None where no such bound is known.
        baseline: whether it stays in the result even if another one beats it, because people compare.

    Example:
        >>> family = tn.topologies.topology_family("low_rank")
        >>> topology = tn.topologies.low_rank(out_features=12, in_features=8, rank=3)
        >>> tn.topologies.results.Proposal(topology, lower=0.2, upper=0.2, worst=None).topology.num_params
        60
    """

    topology: Topology
    lower: float
    upper: float
    worst: float | None
    baseline: bool = False

    @classmethod
    def known(
        cls, topology: Topology, exact: float | None, worst: float, *, baseline: bool = False
    ) -> "Proposal":
        """Propose a topology with its exact error or, without a matrix, its worst-case error."""
        error = worst if exact is None else exact
        return cls(topology, error, error, worst, baseline)

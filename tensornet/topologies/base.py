"""Base class of topology families, with default methods that work for any network; and result types."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tensornet._util import check_dense, outside_autocast
from tensornet.als import fit_weighted, leading, legs_of
from tensornet.budget import Budget, uniform_caps
from tensornet.errors import BudgetError, TopologyError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.quantization import NumberFormat, RoundedWeight
from tensornet.topologies.rounded_cores import StoredCores, round_in_turn
from tensornet.topology import Topology

#: Sweeps of alternating least squares in `fit`.
_SWEEPS = 3
#: Numbers of bits of integer cores in candidates.
_CORE_BITS = (8, 4)
#: Fractions of the largest bond at which candidates are decomposed; losses in between are interpolated.
_TRIED = (0.02, 0.08, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96, 1.0)
#: Number of candidates between bond 1 and the largest.
_RUNGS = 400
#: Keywords that are not options of a family.
_NO_OPTIONS = ("max_bond", "out_features", "in_features", "family")
#: Largest number of legs: partial traces of a moment need two letters for each leg.
_MAX_LEGS = 25


@dataclass(frozen=True)
class Decomposition:
    """Network that approximates a matrix, with certified error.

    Args:
        network: the cores.
        error: guaranteed upper bound of `|W - W'|_F / |W|_F`.
        bound_by: the cap that decided the bonds: `"max_bond"`, `"rel_error"`, `"param_ratio"`, or
            `"exact"` if no bond was truncated.
        iterations: sweeps of alternating least squares, 0 if the decomposition has a closed form.
        converged: whether alternating least squares converged within the largest number of sweeps.

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
    """Encode and decode the cores of a network, to get the cores that will be stored.

    Args:
        run: function that encodes and decodes.
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
        topologies: topologies of the candidates, by increasing bond.
        losses: `1/2 tr(R E C E^T)` of each candidate under each of the weightings, shape `(weightings,
            candidates)`.
        errors: relative Frobenius error of each candidate, shape `(candidates,)`.
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


class TopologyFamily(ABC):
    """Topology family: subclass it and pass an instance to `register_topology`.

    A family must implement `build` and `decompose_to`. The defaults of all other methods work for any
    network; override those for which the family has a better method (docs/guides/topologies.md).

    An implementation must satisfy these laws (`tensornet.testing.laws` checks them): `build` accepts every
    shape of at least `(1, 1)`, with padding if necessary; `decompose(w, Budget())` is exact up to rounding if
    the family can be exact; `error` bounds the true error; no cap of the budget is exceeded; a larger budget
    never gives a larger error; the input is not changed; a subclass under another name behaves like its
    parent.

    Decompositions of a subclass automatically run without gradients and outside of autocast, whose 16-bit
    products would violate the error bound.

    Example:
        >>> family = tn.topologies.topology_family("low_rank")
        >>> topology = family.build(12, 8, max_bond=3)
        >>> topology.num_params, family.with_rank(topology, 2).num_params
        (60, 100)
    """

    #: Name used in configurations and files.
    name: str
    #: Options of `build` that mixtures of experts use by default.
    mixture_options: ClassVar[Mapping[str, Any]] = {}
    #: Whether `gauge_bonds` pivots even if the row order takes more numbers than pivoting saves.
    always_pivots: ClassVar[bool] = False
    #: Whether slicing the cores of an exact decomposition to smaller bonds gives good decompositions.
    nested: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("decompose", "decompose_to", "fit", "ladder", "round_cores"):
            if name in vars(cls):
                setattr(cls, name, torch.no_grad()(outside_autocast(vars(cls)[name])))

    # --- what a family must write ----------------------------------------------------------------

    @abstractmethod
    def build(
        self,
        out_features: int,
        in_features: int,
        *,
        max_bond: int | Sequence[int] | None = None,
        **options: Any,
    ) -> Topology:
        """Build the topology of a matrix `(out_features, in_features)` with bonds at most `max_bond`.

        The family of the topology must be `self.name`. `max_bond` is one cap for all bonds, or a sequence
        with one for each; by default bonds are as large as an exact network needs.

        Raises:
            TopologyError: the options do not fit the shape.
        """

    @abstractmethod
    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """Decompose `matrix` into a network of exactly this topology, including dims and bonds.

        Plans choose topologies before matrices are decomposed. If the matrix needs smaller bonds, cores are
        zero-padded to the shapes of the topology. The cores have the dtype `result_dtype(matrix.dtype)` and
        the matrix's device. Implementations should first call `check_topology(self.name, topology, matrix)`.

        Raises:
            NonFiniteError: the matrix contains NaN or infinity.
            TopologyError: the topology is of another family or for another shape.
        """

    # --- options ---------------------------------------------------------------------------------

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options of `build` and `decompose`, by default those in their signatures."""
        return tuple(sorted({*keywords(self.build), *keywords(self.decompose)}))

    def options_of(self, topology: Topology) -> dict[str, Any]:
        """Return the options with which `build` and `decompose` reproduce the legs of a topology.

        The default is no options. Override it if the family has options for the legs.
        """
        return {}

    def encodings(
        self, formats: Sequence[NumberFormat]
    ) -> list[tuple[NumberFormat, dict[str, NumberFormat]]]:
        """Choose the number formats of the cores of candidates among the allowed formats.

        By default there is one format for all cores, floating-point or with 8 or 4 bits. Other numbers of
        bits would differ little from these, and with fewer bits the dense matrix is better. Only dense
        matrices have tables of levels or integer scales.

        Returns:
            For each encoding, the format of all cores, and exceptions by the name of the core.
        """
        return [(x, {}) for x in formats if x.bits is None or (x.bits in _CORE_BITS and x.for_networks)]

    def search_legs(
        self,
        matrix: Tensor,
        weighting: Weighting,
        num_params: Callable[[Topology], int],
        **options: Any,
    ) -> dict[str, Any]:
        """Choose options of `build` with good legs for a matrix; by default the given options.

        Override it if the sizes of the legs are free and a fast bound can compare them.

        Args:
            matrix: shape `(out, in)`.
            weighting: sensitivity of the loss to errors.
            num_params: function that counts the numbers that a network will store.
            options: options of `build` that the caller gave.
        """
        return options

    # --- decompositions --------------------------------------------------------------------------

    @outside_autocast
    def decompose(self, matrix: Tensor, budget: Budget, **options: Any) -> Decomposition:
        """Decompose `matrix: (out_features, in_features)` into a network within the budget.

        By default all bonds have the largest common cap within `max_bond` and `param_ratio`. With `rel_error`
        it is the smallest sufficient one, found by bisection with `decompose_to`.

        Raises:
            BudgetError: even the smallest network of this family exceeds the budget.
            NonFiniteError: the matrix contains NaN or infinity.
            TopologyError: the options do not fit the shape.
        """
        shape = check_request(self.name, matrix, budget)
        full = self.build(*shape, **options)

        exact = list(full.bond_dims.values()) or [*full.out_dims, *full.in_dims]

        def at(bonds: Sequence[int]) -> Topology:
            if isinstance(budget.max_bond, Sequence):
                return self.build(*shape, max_bond=list(bonds), **options)
            return self.build(*shape, max_bond=max(bonds), **options)

        what = f"a network of the family {self.name!r}"
        caps, bound_by = uniform_caps(budget, shape, exact, lambda bonds: at(bonds).num_params, what)
        made = self.decompose_to(matrix, full if caps == exact else at(caps))
        low, high = 0, max(caps)  # invariant: `made` has bonds of at most `high`
        while budget.rel_error is not None and made.error <= budget.rel_error and high - low > 1:
            middle = (low + high) // 2
            smaller = self.decompose_to(matrix, at([min(middle, cap) for cap in caps]))
            if smaller.error <= budget.rel_error:
                made, high, bound_by = smaller, middle, "rel_error"
            else:
                low = middle
        return Decomposition(made.network, made.error, bound_by, made.iterations, made.converged)

    @outside_autocast
    def fit(self, matrix: Tensor, topology: Topology, weighting: Weighting) -> Decomposition:
        """Fit a network of this topology to `matrix` with small weighted error.

        The default is alternating least squares from a structured start (`tensornet.als`), which uses only
        `decompose_to`. Override it if the weighted problem has a closed form.

        Args:
            matrix: shape `(out, in)`.
            topology: topology of this family.
            weighting: sensitivity of the loss to errors; `Weighting()` gives the result of `decompose_to`.

        Returns:
            The decomposition; its `error` is the relative Frobenius error, as always.
        """
        if weighting == Weighting():
            return self.decompose_to(matrix, topology)
        made = fit_weighted(self._network_of, matrix, topology, weighting, sweeps=_SWEEPS)
        gap = torch.linalg.vector_norm(matrix.double() - made.to_matrix().double())
        error = float(gap / torch.linalg.vector_norm(matrix.double()).clamp_min(1e-300))
        return Decomposition(made, error, "curvature", iterations=_SWEEPS)

    @outside_autocast
    def ladder(
        self,
        matrix: Tensor,
        weightings: Sequence[Weighting],
        *,
        max_bond: int | None = None,
        round_trip: RoundTrip | None = None,
        **options: Any,
    ) -> Ladder:
        """List candidates for one matrix with the predicted loss increase of each.

        By default there are up to 400 bond sizes, of which ten are decomposed and the others interpolated.
        The effect of fitting is estimated from one fit at a middle bond. Override it if there is a closed
        form.

        Args:
            matrix: shape `(out, in)`.
            weightings: sensitivities under which losses are predicted; candidates are fitted to the first.
            max_bond: largest bond.
            round_trip: function that encodes and decodes the cores; None if the encoding is exact.
            options: options of `build`.

        Raises:
            TopologyError: the options do not fit the shape, or the topology has more legs than a moment can
                be split into.
        """
        rows, columns = matrix.shape
        full = self.build(rows, columns, **options)
        if max(len(full.out_dims), len(full.in_dims)) > _MAX_LEGS:
            raise TopologyError(
                f"With calibration data a network has at most {_MAX_LEGS} out-legs and as many in-legs, got "
                f"{len(full.out_dims)} and {len(full.in_dims)}; take fewer sites, or objective='weight'."
            )
        legs = (*full.out_dims, *full.in_dims)  # largest bonds of a Tucker network, which then is one core
        largest = max(full.bond_dims.values() or legs)
        top = min(largest, max_bond or largest)
        tried = sorted({max(1, round(fraction * top)) for fraction in _TRIED})
        caps = sorted({max(1, round(k * top / _RUNGS)) for k in range(1, _RUNGS + 1)} | set(tried))
        topologies = [self.build(rows, columns, max_bond=cap, **options) for cap in caps]

        def gap(network: TensorNetwork) -> Tensor:
            return matrix - (network if round_trip is None else round_trip(network)).to_matrix()

        # 1. Decompose at a few bonds.
        chosen = [topologies[caps.index(cap)] for cap in tried]
        if self.nested:
            exact = legs_of(full, weightings[0]).decompose(self._network_of, matrix, full)
            starts = [leading(exact, topology) for topology in chosen]
        else:
            starts = [fit_weighted(self._network_of, matrix, x, weightings[0], sweeps=0) for x in chosen]
        gaps = [gap(start) for start in starts]
        losses = [[weighting.cost(x) for x in gaps] for weighting in weightings]
        # 2. Lower their losses by the factor that fitting gains at a middle bond.
        if weightings[0] != Weighting():
            middle = len(tried) // 2
            fitted = gap(self.fit(matrix, topologies[caps.index(tried[middle])], weightings[0]).network)
            losses = [
                _scaled(tried, values, middle, weighting.cost(fitted))
                for values, weighting in zip(losses, weightings, strict=True)
            ]
        # 3. Interpolate to all other bonds.
        norm = max(float(matrix.norm()), 1e-300)
        errors = _interpolated(caps, tried, [float(x.norm()) / norm for x in gaps])
        return Ladder(
            tuple(topologies),
            torch.tensor([_interpolated(caps, tried, values) for values in losses], dtype=torch.float64),
            torch.tensor(errors, dtype=torch.float64),
            complete=top == largest,
        )

    @outside_autocast
    def round_cores(self, stored: StoredCores, weighting: Weighting) -> dict[str, Tensor | RoundedWeight]:
        """Round cores to integers with small weighted error of the matrix.

        By default one core after the other is rounded with estimated moments, and the others are refitted.
        Override it if the moments for each core have a closed form.

        Args:
            stored: the cores, and number formats of those that will be integers.
            weighting: sensitivity of the loss to errors of the matrix.

        Returns:
            The rounded cores, and other cores that were refitted, by name.
        """
        return round_in_turn(stored, weighting)

    def _network_of(self, matrix: Tensor, topology: Topology) -> TensorNetwork:
        return self.decompose_to(matrix, topology).network

    # --- structure -------------------------------------------------------------------------------

    def gauge_bonds(self, topology: Topology) -> dict[str, str]:
        """Map each core that gets an identity block in the pivoted encoding to the bond of this block.

        An invertible matrix and its inverse can be inserted at any bond between exactly two cores, without
        changing the operator. By default each core except the last pivots its largest bond to a later core,
        if its other indices have at least as many values as the bond, and if this saves more numbers than the
        row order takes. Never change the result for a family with saved models, since it determines the
        shapes in their files.
        """
        legs, sizes = {*topology.out_labels, *topology.in_labels}, topology.size_of
        found = {}
        for index, core in enumerate(topology.cores[:-1]):
            numel = math.prod(sizes[x] for x in core.labels)
            fitting = []
            for label in core.labels:
                carriers = [k for k, other in enumerate(topology.cores) if label in other.labels]
                if label in legs or len(carriers) != 2 or max(carriers) <= index:
                    continue
                size, rows = sizes[label], numel // sizes[label]
                if rows >= size and (self.always_pivots or size**2 > rows):
                    fitting.append(label)
            if fitting:
                found[core.name] = max(reversed(fitting), key=sizes.__getitem__)
        return found

    def with_rank(self, topology: Topology, rank: int) -> Topology | None:
        """Build a topology for the sum of this operator and a matrix of a given rank, such as a LoRA adapter.

        The default is None: a layer becomes dense when an adapter is merged.
        """
        return None


def check_request(family: str, matrix: Tensor, budget: Budget) -> tuple[int, int]:
    """Check the arguments of `decompose`, and return the shape of the matrix."""
    if not isinstance(budget, Budget):
        raise BudgetError(
            f"Expected a Budget, got {budget!r}; write Budget(max_bond=8), or Budget() for no cap."
        )
    check_dense(matrix, f"Topology {family!r}", "a matrix of shape (out, in)", 2)
    return matrix.shape[0], matrix.shape[1]


def check_topology(family: str, topology: Topology, matrix: Tensor) -> None:
    """Raise an error unless the topology has this family and the shape of a dense matrix.

    Raises:
        ShapeError: not a dense floating matrix.
        TopologyError: another family or shape; the message shows both.

    Example:
        >>> topology = tn.topologies.low_rank(out_features=12, in_features=8, rank=3)
        >>> tn.topologies.check_topology("low_rank", topology, torch.zeros(12, 8))
    """
    if not isinstance(topology, Topology):
        raise TopologyError(f"Expected a Topology, got {topology!r}; a family's `build` makes one.")
    check_dense(matrix, f"Topology {family!r}", "a matrix of shape (out, in)", 2)
    if topology.family != family or topology.shape != tuple(matrix.shape):
        raise TopologyError(
            f"Expected a topology of the family {family!r} for a matrix of shape {tuple(matrix.shape)}, "
            f"got one of {topology.family!r} for {topology.shape}."
        )


def keywords(function: Callable[..., Any]) -> list[str]:
    """List the options in the signature of a builder or a decomposition."""
    parameters = inspect.signature(function).parameters.values()
    return [x.name for x in parameters if x.kind is x.KEYWORD_ONLY and x.name not in _NO_OPTIONS]


def check_options(name: str, options: Mapping[str, Any], known: Collection[str] = ()) -> None:
    """Raise TopologyError unless the family has all these options; the message lists the known ones."""
    if unknown := sorted(str(key) for key in options if key not in known):
        exist = f"it knows {', '.join(sorted(known))}" if known else "it takes none"
        raise TopologyError(f"Topology {name!r} does not know the options {', '.join(unknown)}; {exist}.")


def _scaled(caps: Sequence[int], values: Sequence[float], index: int, known: float) -> list[float]:
    """Rescale a curve to pass through one exact point; the smallest cap is not rescaled."""
    factor = min(known / values[index], 1.0) if values[index] > 0 else 1.0
    if factor == 0 or index == 0:
        return list(values)
    parts = np.interp(np.log(caps), [math.log(caps[0]), math.log(caps[index])], [0.0, 1.0])
    return [float(value * factor**part) for value, part in zip(values, parts, strict=True)]


def _interpolated(caps: Sequence[int], tried: Sequence[int], values: Sequence[float]) -> list[float]:
    """Interpolate values log-linearly, but linearly next to an exact candidate."""
    logs = np.log(np.maximum(values, 1e-300))
    plain, geometric = np.interp(caps, tried, values), np.exp(np.interp(caps, tried, logs))
    exact = np.array(values) <= 1e-12 * max(*values, 1e-300)
    near_exact = np.interp(caps, tried, exact.astype(float)) > 0
    return np.where(near_exact, plain, geometric).tolist()

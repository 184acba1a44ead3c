"""Base class of topology families, with defaults for any network, and the types that its methods return."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tensornet._util import check_dense, outside_autocast
from tensornet.als import fit_weighted, leading, legs_of
from tensornet.budget import Budget, uniform_caps
from tensornet.errors import BudgetError, TopologyError
from tensornet.linalg.svd import check_rel_error
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.quantization import NumberFormat, RoundedWeight
from tensornet.topologies.rounded_cores import StoredCores, round_in_turn
from tensornet.topology import Topology

#: Number of sweeps of alternating least squares in `fit`.
_SWEEPS = 3
#: Numbers of bits that candidates use for integer cores.
_CORE_BITS = (8, 4)
#: Bonds at which a matrix is decomposed, as fractions of the largest bond; losses at others are interpolated.
_TRIED = (0.02, 0.08, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96, 1.0)
#: Largest number of candidates in a `Ladder`.
_RUNGS = 400
#: Keywords of builders that are not options of the family.
_NO_OPTIONS = ("max_bond", "out_features", "in_features", "family")
#: Largest number of out-legs or of in-legs: a partial trace needs two of einsum's letters for each leg.
_MAX_LEGS = 25


@dataclass(frozen=True)
class Decomposition:
    """Result of a decomposition: a network that approximates a matrix, and its certified error.

    Args:
        network: the network.
        error: guaranteed upper bound of `|W - W'|_F / |W|_F`.
        bound_by: the limit that determined the bonds: `"max_bond"`, `"rel_error"` or `"param_ratio"`. It is
            `"exact"` if no bond was truncated, and `"curvature"` for a weighted fit.
        iterations: number of sweeps of alternating least squares; 0 if the network has a closed form.
        converged: whether alternating least squares converged within the allowed number of sweeps.

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
    """Function that converts the cores of a network to their storage format, and back.

    Args:
        run: the function; it maps a network to the network with the converted cores.
        number_format: integer format of all cores; None for other formats. With an integer format, a family
            may predict the loss increase without rounding.
    """

    run: Callable[[TensorNetwork], TensorNetwork]
    number_format: NumberFormat | None = None

    def __call__(self, network: TensorNetwork) -> TensorNetwork:
        """Return the network with the cores that a loaded layer would have."""
        return self.run(network)


@dataclass(frozen=True)
class Ladder:
    """Compression candidates of one family for one matrix, in the order of increasing bonds.

    Args:
        topologies: topology of each candidate.
        losses: predicted loss increase `1/2 tr(R E C E^T)` of each candidate under each weighting, shape
            `(weightings, candidates)`.
        errors: relative Frobenius error of each candidate, shape `(candidates,)`.
        complete: whether the last candidate has the bonds of an exact network.
    """

    topologies: tuple[Topology, ...]
    losses: Tensor
    errors: Tensor
    complete: bool


def _keeping_rel_error(decompose: Callable[..., Decomposition]) -> Callable[..., Decomposition]:
    """Wrap a `decompose` method so that it raises BudgetError if its result exceeds `rel_error`."""

    @wraps(decompose)
    def checked(self: "TopologyFamily", matrix: Tensor, budget: Budget, **options: Any) -> Decomposition:
        made = decompose(self, matrix, budget, **options)
        limits = {"max_bond": budget.max_bond, "param_ratio": budget.param_ratio}
        check_rel_error(made.error, budget.rel_error, limits, matrix.dtype)
        return made

    return checked


class TopologyFamily(ABC):
    """Base class of a family of tensor networks. Subclass it and pass an instance to `register_topology`.

    A family must implement `build` and `decompose_to`. All other methods have defaults that work for any
    network; override those for which the family has a better algorithm (docs/guides/extend.md).

    An implementation must satisfy these laws, which `tensornet.testing.laws` checks:

    - `build` accepts every shape of at least `(1, 1)`, with padding if necessary.
    - `decompose(w, Budget())` is exact up to rounding if the family can be exact.
    - `error` is an upper bound of the true error.
    - No limit of the budget is exceeded, and a larger budget never gives a larger error.
    - The input is not changed.
    - A subclass with another name behaves like its parent.

    The decomposition methods of a subclass automatically run under `torch.no_grad()` and without autocast,
    whose 16-bit products would violate the error bound. Its `decompose` automatically raises `BudgetError` if
    the error exceeds `rel_error` because other limits do not allow a smaller error.

    Example:
        >>> family = tn.topologies.topology_family("low_rank")
        >>> topology = family.build(12, 8, max_bond=3)
        >>> topology.num_params, family.with_rank(topology, 2).num_params
        (60, 100)
    """

    #: Name used in configurations and files.
    name: str
    #: Whether `gauge_bonds` may choose a bond although the stored order of rows takes more elements than the
    #: omitted identity block saves.
    always_pivots: ClassVar[bool] = False
    #: Whether slicing the cores of an exact decomposition to smaller bonds gives a good approximation.
    nested: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "decompose" in vars(cls):
            cls.decompose = _keeping_rel_error(cls.decompose)  # type: ignore[method-assign]
        for name in ("decompose", "decompose_to", "fit", "ladder", "round_cores"):
            if name in vars(cls):
                setattr(cls, name, torch.no_grad()(outside_autocast(vars(cls)[name])))

    # --- required methods ------------------------------------------------------------------------

    @abstractmethod
    def build(
        self,
        out_features: int,
        in_features: int,
        *,
        max_bond: int | Sequence[int] | None = None,
        **options: Any,
    ) -> Topology:
        """Build the topology for a matrix `(out_features, in_features)` with bonds of at most `max_bond`.

        `max_bond` is one limit for all bonds, or a sequence with a limit for each bond. Without it, bonds are
        as large as an exact network needs. The family of the topology must be `self.name`.

        Raises:
            TopologyError: the options do not fit the shape.
        """

    @abstractmethod
    def decompose_to(self, matrix: Tensor, topology: Topology) -> Decomposition:
        """Decompose a matrix into a network of exactly this topology, including its dims and bonds.

        If smaller bonds are sufficient, implementations must pad the cores with zeros, because a compression
        plan has already fixed the shapes. The cores have the dtype `result_dtype(matrix.dtype)`, and the
        device of the matrix. Implementations should first call `check_topology(self.name, topology, matrix)`.

        Raises:
            NonFiniteError: the matrix contains NaN or infinity.
            TopologyError: the topology belongs to another family or has another shape.
        """

    # --- options ---------------------------------------------------------------------------------

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options of `build` and `decompose`, by default read from their signatures."""
        return tuple(sorted({*keywords(self.build), *keywords(self.decompose)}))

    def options_of(self, topology: Topology) -> dict[str, Any]:
        """Return options that make `build` and `decompose` use the legs of the given topology.

        By default there are none. Override the method if the family has options for the legs.
        """
        return {}

    def encodings(
        self, formats: Sequence[NumberFormat]
    ) -> list[tuple[NumberFormat, dict[str, NumberFormat]]]:
        """Choose, from the allowed number formats, those to try for the cores.

        By default all cores have the same format, floating-point or integers of 8 or 4 bits. Other numbers of
        bits would differ little from these, and with fewer bits a dense matrix is better. Formats with a
        table of levels or with integer scales are used for dense matrices only.

        Returns:
            A list of pairs: a format for all cores, and a dictionary with the formats of cores that are
            exceptions, by name of the core.
        """
        return [(x, {}) for x in formats if x.bits is None or (x.bits in _CORE_BITS and x.for_networks)]

    def search_legs(
        self,
        matrix: Tensor,
        weighting: Weighting,
        num_params: Callable[[Topology], int],
        **options: Any,
    ) -> dict[str, Any]:
        """Choose options of `build` that give good leg sizes for a matrix.

        By default these are the given options. Override the method if the leg sizes can be chosen and can be
        compared without decomposing the matrix.

        Args:
            matrix: the matrix, shape `(out, in)`.
            weighting: sensitivity of the loss to errors.
            num_params: function that returns the number of stored values of a network of a given topology.
            options: the caller's options of `build`.
        """
        return options

    # --- decompositions --------------------------------------------------------------------------

    @_keeping_rel_error
    @outside_autocast
    def decompose(self, matrix: Tensor, budget: Budget, **options: Any) -> Decomposition:
        """Decompose `matrix: (out_features, in_features)` into a network within the budget.

        By default all bonds have a common limit, the largest that `max_bond` and `param_ratio` allow. With
        `rel_error` it is the smallest sufficient limit, found by bisection with `decompose_to`.

        Raises:
            BudgetError: the smallest network of this family exceeds the budget, or no network within the
                other limits has an error of at most `rel_error`.
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
        """Decompose a matrix into a network of this topology with small weighted error.

        The default is alternating least squares (see `tensornet.als.fit_weighted`). Override the method if
        the weighted problem has a closed form.

        Args:
            matrix: the matrix, shape `(out, in)`.
            topology: topology of this family.
            weighting: sensitivity of the loss to errors; `Weighting()` gives the result of `decompose_to`.

        Returns:
            The decomposition. Its `error` is the relative Frobenius error, without weighting.
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
        """List the compression candidates for one matrix with their predicted loss increases.

        By default there are up to 400 candidates. The matrix is decomposed at ten bond sizes, and losses at
        other bonds are interpolated. The effect of fitting is estimated from one fit at a middle bond.
        Override the method if the losses have a closed form.

        Args:
            matrix: the matrix, shape `(out, in)`.
            weightings: weightings under which losses are predicted; candidates are fitted to the first one.
            max_bond: largest bond.
            round_trip: conversion of the cores to their storage format and back; None if the cores are stored
                exactly.
            options: options of `build`.

        Raises:
            TopologyError: the options do not fit the shape, or there are more than 25 out-legs or in-legs.
        """
        rows, columns = matrix.shape
        full = self.build(rows, columns, **options)
        if max(len(full.out_dims), len(full.in_dims)) > _MAX_LEGS:
            raise TopologyError(
                f"With calibration data a network has at most {_MAX_LEGS} legs on each side, got "
                f"{len(full.out_dims)} and {len(full.in_dims)}; use fewer sites, or method='svd'."
            )
        legs = (*full.out_dims, *full.in_dims)  # used for Tucker: an exact network is one core without bonds
        largest = max(full.bond_dims.values() or legs)
        top = min(largest, max_bond or largest)
        tried = sorted({max(1, round(fraction * top)) for fraction in _TRIED})
        caps = sorted({max(1, round(k * top / _RUNGS)) for k in range(1, _RUNGS + 1)} | set(tried))
        topologies = [self.build(rows, columns, max_bond=cap, **options) for cap in caps]

        def gap(network: TensorNetwork) -> Tensor:
            return matrix - (network if round_trip is None else round_trip(network)).to_matrix()

        # 1. Decompose the matrix at a few bonds.
        chosen = [topologies[caps.index(cap)] for cap in tried]
        if self.nested:
            exact = legs_of(full, weightings[0]).decompose(self._network_of, matrix, full)
            starts = [leading(exact, topology) for topology in chosen]
        else:
            starts = [fit_weighted(self._network_of, matrix, x, weightings[0], sweeps=0) for x in chosen]
        gaps = [gap(start) for start in starts]
        losses = [[weighting.cost(x) for x in gaps] for weighting in weightings]
        # 2. Lower all losses by about the factor by which fitting lowers the loss at a middle bond.
        if weightings[0] != Weighting():
            middle = len(tried) // 2
            fitted = gap(self.fit(matrix, topologies[caps.index(tried[middle])], weightings[0]).network)
            losses = [
                _scaled(tried, values, middle, weighting.cost(fitted))
                for values, weighting in zip(losses, weightings, strict=True)
            ]
        # 3. Interpolate the losses at all other bonds.
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
        """Round cores to integers so that the weighted error of the matrix is small.

        By default the cores are rounded one after another, using estimated moments, and the remaining cores
        are refitted. Override the method if the moments of each core have a closed form.

        Args:
            stored: the cores, and the number formats of those that are rounded to integers.
            weighting: sensitivity of the loss to errors of the matrix.

        Returns:
            The rounded cores and the refitted floating-point cores, by name.
        """
        return round_in_turn(stored, weighting)

    def _network_of(self, matrix: Tensor, topology: Topology) -> TensorNetwork:
        return self.decompose_to(matrix, topology).network

    # --- structure -------------------------------------------------------------------------------

    def gauge_bonds(self, topology: Topology) -> dict[str, str]:
        """Choose, for each core, the bond at which a block of the core can be made an identity and left out.

        An invertible matrix and its inverse can be inserted at a bond between two cores without changing the
        operator. View the core as a matrix with one column for each value of the bond. The inserted matrix
        can turn a square block of this matrix into the identity, which is not stored. Instead, an order of
        the rows is stored, which tells which rows form the block.

        By default each core except the last uses its largest bond to a later core, if the identity has more
        elements than the order of the rows. Never change the result for a family with saved models: it
        determines the shapes in their files.

        Returns:
            The label of the bond, by the name of the core.
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
        """Build a topology for the sum of an operator and a matrix of a given rank, such as a LoRA adapter.

        By default the result is None, and a layer becomes dense when an adapter is merged into it.
        """
        return None


def check_request(family: str, matrix: Tensor, budget: Budget) -> tuple[int, int]:
    """Check the matrix and the budget passed to `decompose`, and return the shape of the matrix."""
    if not isinstance(budget, Budget):
        raise BudgetError(
            f"Expected a Budget, got {budget!r}; write Budget(max_bond=8), or Budget() for no limit."
        )
    check_dense(matrix, f"Topology {family!r}", "a matrix of shape (out, in)", 2)
    return matrix.shape[0], matrix.shape[1]


def check_topology(family: str, topology: Topology, matrix: Tensor) -> None:
    """Raise an error unless a topology belongs to the family and fits the matrix.

    Raises:
        ShapeError: the matrix is not a dense matrix of floating-point or complex numbers.
        TopologyError: the topology belongs to another family, or is for matrices of another shape.

    Example:
        >>> topology = tn.topologies.low_rank(out_features=12, in_features=8, rank=3)
        >>> tn.topologies.check_topology("low_rank", topology, torch.zeros(12, 8))
    """
    if not isinstance(topology, Topology):
        raise TopologyError(f"Expected a Topology, got {topology!r}; use the `build` method of a family.")
    check_dense(matrix, f"Topology {family!r}", "a matrix of shape (out, in)", 2)
    if topology.family != family or topology.shape != tuple(matrix.shape):
        raise TopologyError(
            f"Expected a topology of the family {family!r} for a matrix of shape {tuple(matrix.shape)}, "
            f"got the family {topology.family!r} and the shape {topology.shape}."
        )


def keywords(function: Callable[..., Any]) -> list[str]:
    """List the names of the family's options in the signature of a builder or decomposition method."""
    parameters = inspect.signature(function).parameters.values()
    return [x.name for x in parameters if x.kind is x.KEYWORD_ONLY and x.name not in _NO_OPTIONS]


def check_options(name: str, options: Mapping[str, Any], known: Collection[str] = ()) -> None:
    """Raise TopologyError if an option is not among the options `known` of the family `name`."""
    if unknown := sorted(str(key) for key in options if key not in known):
        exist = f"it knows {', '.join(sorted(known))}" if known else "it takes none"
        raise TopologyError(f"Topology {name!r} does not know the options {', '.join(unknown)}; {exist}.")


def _scaled(caps: Sequence[int], values: Sequence[float], index: int, known: float) -> list[float]:
    """Lower a curve so that its value at `index` is at most `known`; its first value does not change."""
    factor = min(known / values[index], 1.0) if values[index] > 0 else 1.0
    if factor == 0 or index == 0:
        return list(values)
    parts = np.interp(np.log(caps), [math.log(caps[0]), math.log(caps[index])], [0.0, 1.0])
    return [float(value * factor**part) for value, part in zip(values, parts, strict=True)]


def _interpolated(caps: Sequence[int], tried: Sequence[int], values: Sequence[float]) -> list[float]:
    """Interpolate values geometrically (by their logarithms), but linearly next to a value of zero."""
    logs = np.log(np.maximum(values, 1e-300))
    plain, geometric = np.interp(caps, tried, values), np.exp(np.interp(caps, tried, logs))
    exact = np.array(values) <= 1e-12 * max(*values, 1e-300)
    near_exact = np.interp(caps, tried, exact.astype(float)) > 0
    return np.where(near_exact, plain, geometric).tolist()

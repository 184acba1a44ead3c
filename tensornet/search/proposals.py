"""Topologies worth a look for a shape and a number of parameters, with bounds of their errors."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tensornet.budget import Budget
from tensornet.errors import BudgetError, TopologyError
from tensornet.linalg.tt_svd import cap_bonds, max_bonds, mpo_params
from tensornet.search.spectra import CutSpectra, rank_for
from tensornet.topologies import low_rank, mpo, topology_family
from tensornet.topologies.block_tt import block_tt
from tensornet.topologies.factored import choose_dims
from tensornet.topologies.leg_dims import divisors
from tensornet.topology import Topology

#: Matrix products are fastest where sizes are multiples of this, see `Machine.step_columns`.
_STEP = 16

#: Cuts are tried at the divisors nearest to these powers of a size.
_CUT_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Candidate:
    """A topology and what is known of its error before it is decomposed.

    Args:
        topology: bonds included.
        lower: no network of this topology has a smaller relative error on the matrix.
        upper: its decomposition has at most this error.
        worst: no matrix of this shape has a larger one; None where no such bound is known.
    """

    topology: Topology
    lower: float
    upper: float
    worst: float | None


Dims = tuple[tuple[int, ...], tuple[int, ...]]


def low_rank_candidate(
    shape: tuple[int, int], params: int, spectra: CutSpectra | None
) -> Iterator[Candidate]:
    """The truncated SVD of the largest rank that fits, and of one that kernels like better."""
    largest = min(params // (shape[0] + shape[1]), *shape)
    for rank in dict.fromkeys((largest, largest - largest % _STEP)):
        if rank < 1:
            continue
        topology = low_rank(out_features=shape[0], in_features=shape[1], rank=rank)
        worst = math.sqrt(1 - rank / min(shape))
        exact = None
        if spectra is not None:
            exact = math.sqrt(float(spectra.tails((shape[0], 1), (1, shape[1]), 1)[rank]))
        yield _known(topology, exact, worst)


def mpo_candidates(
    shape: tuple[int, int], params: int, spectra: CutSpectra | None, max_sites: int
) -> Iterator[Candidate]:
    """Chains of 2 to `max_sites` cores; bonds share the error evenly, or are uniform without a matrix."""
    for out_dims, in_dims in _mpo_dims(shape, max_sites):
        found = _mpo_bonds(shape, out_dims, in_dims, params, spectra)
        if found is None:
            continue
        topology = mpo(
            out_dims=out_dims,
            in_dims=in_dims,
            bond_dims=found,
            out_features=shape[0],
            in_features=shape[1],
        )
        full = max_bonds(out_dims, in_dims)
        lost = sum(1 - bond / most for bond, most in zip(found, full, strict=True))
        worst = math.sqrt(min(1.0, lost))
        if spectra is None:
            yield _known(topology, None, worst)
        else:
            tails = [float(spectra.tails(out_dims, in_dims, k + 1)[bond]) for k, bond in enumerate(found)]
            yield Candidate(topology, math.sqrt(max(tails)), math.sqrt(min(1.0, sum(tails))), worst)


def block_tt_candidates(
    shape: tuple[int, int], params: int, spectra: CutSpectra | None
) -> Iterator[Candidate]:
    """Block tensor trains of two cores."""
    for out_dims, in_dims in _block_dims(shape):
        full = min(out_dims[0], in_dims[1])
        each = block_tt(out_dims=out_dims, in_dims=in_dims, max_bond=1).num_params
        rank = min(params // each, full)
        if rank < 1:
            continue
        topology = block_tt(
            out_dims=out_dims,
            in_dims=in_dims,
            max_bond=rank,
            out_features=shape[0],
            in_features=shape[1],
        )
        exact = None
        if spectra is not None:
            exact = math.sqrt(float(spectra.block_tails(out_dims, in_dims)[rank]))
        yield _known(topology, exact, math.sqrt(1 - rank / full))


def built_candidate(family: str, shape: tuple[int, int], params: int) -> Iterator[Candidate]:
    """The largest uniform bond of any family that fits; its error is found by decomposing."""

    def fits(bond: int) -> bool:
        return topology_family(family).build(*shape, max_bond=bond).num_params <= params

    if fits(1):
        bond = _largest(fits, max(shape))
        yield Candidate(topology_family(family).build(*shape, max_bond=bond), 0.0, 1.0, None)


def _known(topology: Topology, exact: float | None, worst: float) -> Candidate:
    error = worst if exact is None else exact
    return Candidate(topology, error, error, worst)


def _mpo_bonds(
    shape: tuple[int, int],
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    params: int,
    spectra: CutSpectra | None,
) -> tuple[int, ...] | None:
    """Bonds that fit, None if not even bonds of 1 do."""
    full = max_bonds(out_dims, in_dims)
    if mpo_params(out_dims, in_dims, [1] * len(full)) > params:
        return None
    if spectra is None:
        try:
            return cap_bonds(shape, out_dims, in_dims, Budget(param_ratio=params / math.prod(shape)))[0]
        except BudgetError:  # the share rounds down to fewer parameters than bonds of 1 need
            return None
    tails = [spectra.tails(out_dims, in_dims, k + 1) for k in range(len(full))]

    def bonds(allowed: float) -> tuple[int, ...]:
        return tuple(min(rank_for(tail, allowed), most) for tail, most in zip(tails, full, strict=True))

    low, high = 0.0, 1.0  # invariant: high fits
    if mpo_params(out_dims, in_dims, bonds(low)) <= params:
        return bonds(low)
    for _ in range(40):
        middle = (low + high) / 2
        fits = mpo_params(out_dims, in_dims, bonds(middle)) <= params
        low, high = (low, middle) if fits else (middle, high)
    return bonds(high)


def _mpo_dims(shape: tuple[int, int], max_sites: int) -> Iterator[Dims]:
    seen: set[Dims] = set()
    for dims in (*_cut_dims(shape), *_balanced_dims(shape, max_sites)):
        trivial = any(out * inside == 1 for out, inside in zip(*dims, strict=True))
        # Plain low rank, and its mirror, are a family of their own.
        plain = dims[0] in ((shape[0], 1), (1, shape[0])) and dims[1] in ((shape[1], 1), (1, shape[1]))
        if not trivial and not plain and dims not in seen and max_sites >= len(dims[0]):
            seen.add(dims)
            yield dims


def _cut_dims(shape: tuple[int, int]) -> Iterator[Dims]:
    for a in _cuts(shape[0]):
        for c in _cuts(shape[1]):
            yield (a, shape[0] // a), (c, shape[1] // c)


def _balanced_dims(shape: tuple[int, int], max_sites: int) -> Iterator[Dims]:
    for sites in range(2, max_sites + 1):
        try:
            rows, columns = choose_dims(shape, None, None, sites)
        except TopologyError:  # more sites than the shape can be split into
            return
        yield rows, columns
        yield rows[::-1], columns[::-1]
        yield rows, columns[::-1]


def _block_dims(shape: tuple[int, int]) -> Iterator[Dims]:
    pairs = [*_cut_dims(shape), choose_dims(shape, None, None, 2)]
    yield from dict.fromkeys(dims for dims in pairs if min(*dims[0], *dims[1]) > 1)


def _cuts(size: int) -> list[int]:
    choices = divisors(size)
    nearest = {min(choices, key=lambda d: abs(math.log(d) - power * math.log(size))) for power in _CUT_POWERS}
    return sorted(nearest)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """Largest number in `1 .. limit` that fits; 1 does."""
    low, high = 1, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

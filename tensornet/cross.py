"""Cross approximation: a chain of cores from values of a function at chosen indices.

No tensor is built: the function is called for a few rows and columns of each unfolding. `MPO.from_function`
is the public entry.

Reference: Oseledets and Tyrtyshnikov 2010, "TT-cross approximation for multidimensional arrays"; Dolgov and
Savostyanov 2020, "Parallel cross interpolation for high-precision calculation of high-dimensional integrals";
Nunez Fernandez et al. 2024, "Learning tensor networks with tensor cross interpolation", section 4.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet._util import FLOATING, check_memory, outside_autocast
from tensornet.errors import NonFiniteError, ShapeError
from tensornet.linalg.svd import default_tolerance, result_dtype, working_dtype

#: Largest number of indices in one call of the function.
_BATCH = 2**16
#: Number of random indices at which the error is estimated after each sweep.
_FRESH = 1000
#: Number of indices with the largest errors that become pivots after each sweep.
_WORST = 4
#: Rows and columns of an unfolding are searched in turn, at most this many times.
_TURNS = 4


@dataclass(frozen=True)
class CrossReport:
    """Number of values that a cross approximation computed, and an estimate of its error.

    Args:
        evaluations: number of values of the function that were computed, repeated indices included.
        estimated_error: root mean square error at `points` random indices, relative to the root mean square
            of the function there. This is an estimate, not a bound: a narrow peak between the indices is
            missed.
        points: number of these indices; they were drawn after the pivots had been chosen.
        sweeps: number of sweeps; the first is backward, the second forward, and so on.

    Example:
        >>> _, report = tn.MPO.from_function(lambda i, j: 1 / (i + j + 1).double(), (64, 64), sites=3)
        >>> report.estimated_error < 1e-10 and report.evaluations < 20_000
        True
    """

    evaluations: int
    estimated_error: float
    points: int
    sweeps: int


class Values:
    """A function of indices `(points, sites)` whose values are checked and counted.

    Args:
        function: returns one floating-point or complex number for each index, shape `(points,)`.
        describe: names an index, a tensor of shape `(sites,)`, in error messages.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], describe: Callable[[Tensor], str]) -> None:
        self.function, self.describe = function, describe
        self.count, self.largest = 0, 0.0

    def __call__(self, indices: Tensor) -> Tensor:
        """Compute the values at some indices, `(points, sites)`; there is at least one."""
        parts = [self._part(part) for part in indices.split(_BATCH)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, indices: Tensor) -> Tensor:
        values = self.function(indices)
        fits = isinstance(values, Tensor) and values.shape == indices.shape[:1] and values.dtype in FLOATING
        if not fits:
            got = f"{values.dtype} of {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)
            raise ShapeError(
                "The function must return one floating-point or complex number for each index, a tensor of "
                f"shape ({len(indices)},), got {got}."
            )
        sizes = values.detach().abs()
        bad = ~torch.isfinite(sizes)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise NonFiniteError(
                f"The function is {complex(values[first]) if values.is_complex() else float(values[first])} "
                f"at {self.describe(indices[first])}; it must be finite at all indices."
            )
        self.count += len(indices)
        self.largest = max(self.largest, float(sizes.max()))
        return values.to(result_dtype(values.dtype))

    def block(self, left: Tensor, right: Tensor) -> Tensor:
        """Compute the matrix of values for all pairs of a first part and a last part of an index.

        Args:
            left: first parts, shape `(rows, k)`.
            right: last parts, shape `(columns, sites - k)`.
        """
        shape = (len(left), len(right))
        _check_memory(2 * math.prod(shape), left.device)
        rows = max(1, _BATCH // shape[1])
        parts = [
            self(torch.cat([part.repeat_interleave(shape[1], 0), right.repeat(len(part), 1)], dim=1))
            for part in left.split(rows)
        ]
        return torch.cat(parts).reshape(shape)


def matrix_elements(
    function: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, int],
    out_dims: Sequence[int],
    in_dims: Sequence[int],
) -> Callable[[Tensor], Tensor]:
    """Make a function of rows and columns a function of the indices of the legs; it is zero in the padding.

    Raises:
        ShapeError: the indices of rows or columns exceed int64.
    """
    if max(math.prod(out_dims), math.prod(in_dims)) >= 2**63:
        raise ShapeError(
            f"Indices of a matrix of shape {shape} exceed int64. Leave out shape=, and make a state whose "
            "indices are those of the legs."
        )

    def elements(indices: Tensor) -> Tensor:
        rows, columns = matrix_indices(indices, out_dims, in_dims)
        inside = (rows < shape[0]) & (columns < shape[1])
        found = function(rows.clamp(max=shape[0] - 1), columns.clamp(max=shape[1] - 1))
        return found if bool(inside.all()) else torch.where(inside, found, 0)

    return elements


def matrix_indices(indices: Tensor, out_dims: Sequence[int], in_dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Compute rows and columns, shape `(points,)`, from indices of legs `out * in`, `(points, sites)`."""
    rows = columns = torch.zeros_like(indices[:, 0])
    for index, out, in_ in zip(indices.T, out_dims, in_dims, strict=True):
        rows, columns = rows * out + index // in_, columns * in_ + index % in_
    return rows, columns


def leg_indices(pairs: Tensor, out_dims: Sequence[int], in_dims: Sequence[int]) -> Tensor:
    """Invert `matrix_indices` for pairs of a row and a column, shape `(points, 2)`."""
    rows, columns = pairs.T
    found = []
    for out, in_ in zip(reversed(out_dims), reversed(in_dims), strict=True):
        found.append(rows % out * in_ + columns % in_)
        rows, columns = rows // out, columns // in_
    return torch.stack(found[::-1], dim=1)


@outside_autocast
def cross(
    values: Values,
    dims: Sequence[int],
    *,
    draw: Callable[[int], Tensor],
    start: Tensor,
    generator: torch.Generator,
    caps: Sequence[int | None],
    rel_error: float | None,
    sweeps: int,
) -> tuple[list[Tensor], CrossReport]:
    """Approximate a function of indices by a chain of cores `(left, dim, right)`.

    Sweeps visit all bonds, in turn backward and forward. At a bond, pivots are chosen by Gaussian elimination
    with rook pivoting in the matrix of values whose rows extend the pivots of the bond before it by one site,
    and whose columns extend those of the bond after it. The cores interpolate the function at the pivots:
    core `k` is `T_k P_k^-1` with values `T_k` of one free site between the pivots of its two bonds and values
    `P_k` at the pivots of its right bond, or `P_{k-1}^-1 T_k` after a backward sweep. They are differentiable
    functions of these values.

    Args:
        values: the function.
        dims: number of values of each site.
        draw: returns random indices, shape `(count, sites)`.
        start: indices that become pivots first, shape `(points, sites)`.
        generator: draws columns that are searched in addition to the pivots.
        caps: limit of each bond, or None.
        rel_error: error at random indices at which the sweeps end; None for the default tolerance.
        sweeps: largest number of sweeps.

    Returns:
        The cores, and the report.
    """
    sites = len(dims)
    with torch.no_grad():
        first = torch.cat([start, draw(_FRESH)])
        sampled = values(first).detach()
    tolerance = default_tolerance(sampled.dtype) if rel_error is None else rel_error
    smallest = 4 * torch.finfo(sampled.dtype).eps  # smaller pivots are rounding errors
    if values.largest == 0:
        zeros = [sampled.new_zeros(1, dim, 1) for dim in dims]
        return zeros, CrossReport(values.count, 0.0, _FRESH, 0)

    # lefts[k] are the first k sites of the pivots at the bond before site k, and rights[k] the other sites.
    best = first[int(sampled.abs().argmax())][None]
    lefts = [best[:, :k] for k in range(sites)]
    rights = [best[:, k:] for k in range(sites + 1)]
    _add_pivots(lefts, rights, start)
    level, total, within = tolerance, 0, False
    done = 0
    while done < sweeps:
        done += 1
        backward = done % 2 == 1
        with torch.no_grad():
            for k in range(sites - 1, 0, -1) if backward else range(1, sites):
                lefts[k], rights[k] = _choose(
                    values,
                    _extend_left(lefts[k - 1], dims[k - 1]),
                    _extend_right(dims[k], rights[k + 1]),
                    # The sweep before this one nested the pivots of its side in the extended ones.
                    (lefts[k], None) if backward else (None, rights[k]),
                    level=max(level, smallest),
                    cap=caps[k - 1],
                    generator=generator,
                )
        cores = _cores(values, dims, lefts, rights, backward)
        with torch.no_grad():
            fresh = draw(_FRESH)
            true = values(fresh).detach()
            wrong = (_entries([core.detach() for core in cores], fresh) - true).abs()
        size = float(torch.linalg.vector_norm(true))
        distance = float(torch.linalg.vector_norm(wrong))
        error = distance / size if size > 0 else (0.0 if distance == 0 else math.inf)
        bonds = [len(left) for left in lefts[1:]]
        total, grown = sum(bonds), sum(bonds) > 1.05 * total
        within, before = error <= tolerance, within
        if within and (before or not grown):
            break
        if not within and not grown:
            if level <= smallest or _all_full(bonds, dims, caps):
                break
            level *= max(min(0.1, tolerance / error), 1e-4)
        if not within:
            _add_pivots(lefts, rights, fresh[wrong.topk(_WORST).indices])
    return cores, CrossReport(values.count, error, _FRESH, done)


def _check_memory(elements: int, device: torch.device) -> None:
    advice = "lower max_bond, or use more sites with smaller legs"
    like = torch.empty(0, dtype=torch.float64, device=device)
    check_memory(elements, like, "One bond of this cross approximation", advice)


def _all_full(bonds: Sequence[int], dims: Sequence[int], caps: Sequence[int | None]) -> bool:
    """Return True if no bond can grow: each has the size of its limit or of an exact chain."""
    full = (min(math.prod(dims[:k]), math.prod(dims[k:])) for k in range(1, len(dims)))
    return all(bond >= min(most, cap or most) for bond, most, cap in zip(bonds, full, caps, strict=True))


def _extend_left(left: Tensor, dim: int) -> Tensor:
    """Append each value of the next site to each first part: `(r, k)` becomes `(r * dim, k + 1)`."""
    _check_memory(2 * len(left) * dim * (left.shape[1] + 1), left.device)
    site = torch.arange(dim, device=left.device).repeat(len(left))
    return torch.cat([left.repeat_interleave(dim, 0), site[:, None]], dim=1)


def _extend_right(dim: int, right: Tensor) -> Tensor:
    """Put each value of the site before it in front of each last part; the site is the slow index."""
    _check_memory(2 * len(right) * dim * (right.shape[1] + 1), right.device)
    site = torch.arange(dim, device=right.device).repeat_interleave(len(right))
    return torch.cat([site[:, None], right.repeat(dim, 1)], dim=1)


def _add_pivots(lefts: list[Tensor], rights: list[Tensor], indices: Tensor) -> None:
    """Add whole indices to the pivots of all bonds, which keeps them nested; the next sweep selects again."""
    for k in range(1, len(lefts)):
        lefts[k] = torch.cat([lefts[k], indices[:, :k]]).unique(dim=0)
        rights[k] = torch.cat([rights[k], indices[:, k:]]).unique(dim=0)


def _places(parts: Tensor, among: Tensor) -> Tensor:
    """Find the positions of parts of indices in a list that contains them."""
    known = {tuple(part): place for place, part in enumerate(among.tolist())}
    return torch.tensor([known[tuple(part)] for part in parts.tolist()], dtype=torch.int64)


def _choose(
    values: Values,
    rows: Tensor,
    columns: Tensor,
    known: tuple[Tensor | None, Tensor | None],
    *,
    level: float,
    cap: int | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Choose the pivots of one bond in the matrix of values `(rows, columns)`, by block rook search.

    Gaussian elimination with complete pivoting is applied to some columns and all rows, then to the rows
    found and all columns, and so on, until the columns do not change. The first columns are the known pivots
    and random ones. If these are half of all columns, the search is complete instead, which costs as much.

    Args:
        values: the function.
        rows, columns: first and last parts of the indices of the matrix.
        known: pivots of the last pass among the rows, or among the columns. The search begins with these.
        level: relative size of the smallest pivot.
        cap: largest number of pivots.
        generator: draws the random columns.
    """
    if known[0] is not None:  # search the transpose

        def block(of: Tensor, to: Tensor) -> Tensor:
            return values.block(to, of).detach().T

        fixed, free, seeds = columns, rows, _places(known[0], rows)
    else:
        assert known[1] is not None

        def block(of: Tensor, to: Tensor) -> Tensor:
            return values.block(of, to).detach()

        fixed, free, seeds = rows, columns, _places(known[1], columns)
    more = len(seeds) + 4
    if 2 * (len(seeds) + more) < len(free):
        at = torch.cat([seeds, torch.randint(len(free), (more,), generator=generator)]).unique()
    else:
        at = torch.arange(len(free))
    for _ in range(_TURNS):
        here, there = _eliminate(block(fixed, free[at]), level, values, cap)
        tried, at = at, at[there]
        if len(tried) == len(free):
            break
        places, at = _eliminate(block(fixed[here], free), level, values, cap)
        here = here[places]
        if bool(torch.isin(at, tried).all()):
            break
    pair = fixed[here], free[at]
    return pair if known[0] is None else pair[::-1]


def _eliminate(matrix: Tensor, level: float, values: Values, cap: int | None) -> tuple[Tensor, Tensor]:
    """Choose rows and columns of a matrix by Gaussian elimination with complete pivoting, largest first."""
    rest = matrix.to("cpu", working_dtype(matrix.dtype), copy=True)
    rows: list[int] = []
    columns: list[int] = []
    for _ in range(min(*rest.shape, cap or rest.shape[0])):
        row, column = divmod(int(rest.abs().argmax()), rest.shape[1])
        pivot = rest[row, column].clone()
        if rows and float(pivot.abs()) <= level * values.largest:
            break
        rows.append(row)
        columns.append(column)
        rest -= torch.outer(rest[:, column] / pivot, rest[row])
        rest[row] = 0  # exactly, so that no row is chosen twice
        rest[:, column] = 0
    return torch.tensor(rows), torch.tensor(columns)


def _cores(
    values: Values, dims: Sequence[int], lefts: Sequence[Tensor], rights: Sequence[Tensor], backward: bool
) -> list[Tensor]:
    """Compute the cores that interpolate the function at its pivots (see `cross`).

    Args:
        values, dims: see `cross`.
        lefts, rights: first and last parts of the pivots at each bond.
        backward: direction of the last sweep.
    """
    cores = []
    for k, dim in enumerate(dims):
        rows, columns = lefts[k], rights[k + 1]
        if backward:
            columns = _extend_right(dim, columns)
        else:
            rows = _extend_left(rows, dim)
        block = values.block(rows, columns)
        core = block.to(working_dtype(block.dtype))
        if backward and k > 0:
            at = _places(rights[k], columns).to(core.device)
            core = torch.linalg.solve(core[:, at], core)
        elif not backward and k + 1 < len(dims):
            at = _places(lefts[k + 1], rows).to(core.device)
            core = torch.linalg.solve(core[at], core, left=False)
        cores.append(core.reshape(len(lefts[k]), dim, -1).to(block.dtype))
    return cores


def _entries(cores: Sequence[Tensor], indices: Tensor) -> Tensor:
    """Compute the elements of a chain `(left, dim, right)` at indices `(points, sites)`."""
    passed = cores[0].new_ones(len(indices), 1, 1)
    for core, site in zip(cores, indices.T, strict=True):
        passed = passed @ core.transpose(0, 1)[site]
    return passed[:, 0, 0]

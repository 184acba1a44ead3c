"""Networks of several matrices that share one core, with cores in number formats.

The shared core is rounded once, under pooled moments of all matrices: an error `E` of the shared `B` in
`W_e = A_e B` costs `1/2 sum_e tr(A_e^T R_e A_e E C_e E^T)`, which one pair of moments stands for. Private
factors are then fitted again to what rounding left of their matrices, and rounded under moments of their own.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tensornet._util import outside_autocast
from tensornet.compression.shared_forms import (
    SHARED_FORMS,
    Cores,
    fit_form,
    full_moment,
    mean_matrix,
    trace,
    working,
)
from tensornet.linalg.weighted_svd import Weighting, times, weighted_svd
from tensornet.nn.encoding import stored_core
from tensornet.nn.storage import Storage
from tensornet.quantization import NumberFormat, RoundedWeight
from tensornet.quantization.factors import round_beside, round_product
from tensornet.topologies.dense import round_dense

#: Core of a stack: codes, or values in floating point.
Core = RoundedWeight | Tensor


@torch.no_grad()
@outside_autocast
def fit_stored(
    name: str, matrices: Sequence[Tensor], weightings: Sequence[Weighting], rank: int, storage: Storage
) -> list[dict[str, Tensor]]:
    """Fit networks with one shared core and encode them, in the dtype of the matrices.

    Args:
        name: a key of `SHARED_FORMS`.
        matrices: each `(out, in)`.
        weightings: sensitivity of the loss to errors in each.
        rank: of the factors.
        storage: number formats of the cores.

    Returns:
        Stored tensors of each network, by the names of `tensornet.nn.encoding`. Those of the shared core are
        the same for all: a parameter where it has the dtype of the matrices.

    Example:
        >>> import torch
        >>> from tensornet.linalg.weighted_svd import Weighting
        >>> matrices = [torch.randn(6, 2) @ torch.randn(2, 64) for _ in range(3)]
        >>> storage = Storage(number_format="int8")
        >>> first, *others = fit_stored("inputs", matrices, [Weighting()] * 3, 2, storage)
        >>> sorted(first), others[0]["core_1"] is first["core_1"]
        (['core_0', 'core_1', 'scale_0', 'scale_1'], True)
    """
    form, dtype = SHARED_FORMS[name], matrices[0].dtype
    topology = form.build(matrices[0].shape[0], matrices[0].shape[1], rank)
    if storage.own_dtypes:
        made = round_form(name, matrices, weightings, rank, storage)
    else:
        networks = fit_form(name, matrices, weightings, rank)
        made = [dict(zip(topology.core_names, network.cores, strict=True)) for network in networks]
    shared = stored_core(topology, storage, form.core, made[0][form.core], dtype)
    if storage.format_of(form.core) == NumberFormat():
        shared = {part: nn.Parameter(tensor) for part, tensor in shared.items()}
    found = []
    for cores in made:
        stored: dict[str, Tensor] = {}
        for core in topology.core_names:
            own = shared if core == form.core else stored_core(topology, storage, core, cores[core], dtype)
            stored |= own
        found.append(stored)
    return found


def round_form(
    name: str, matrices: Sequence[Tensor], weightings: Sequence[Weighting], rank: int, storage: Storage
) -> list[dict[str, Core]]:
    """Fit and round the cores of each matrix by name; arguments as for `fit_stored`.

    Returns:
        Codes of integer cores, values of the others; the shared core is the same object for all.
    """
    form, work = SHARED_FORMS[name], working(matrices)
    topology = form.build(work[0].shape[0], work[0].shape[1], rank)
    formats = {core: _integers(storage.format_of(core)) for core in topology.core_names}
    cores = next(form.fits(work, weightings, [rank]))
    rounds = {"inputs": _round_inputs, "outputs": _round_outputs, "base": _round_base}
    return rounds[name](work, weightings, cores, formats)


def pooled(weightings: Sequence[Weighting], shape: tuple[int, int]) -> Weighting:
    """Stand in for the sum of several weightings by one, which has the same trace.

    Each moment is the sum of those of its side, weighed by the traces of the other side.
    """
    rows, columns = shape
    sizes = [(trace(x.rows, rows), trace(x.columns, columns)) for x in weightings]
    total = sum(a * b for a, b in sizes)
    left = _weighed_sum([x.rows for x in weightings], [b for _, b in sizes])
    right = _weighed_sum([x.columns for x in weightings], [a for a, _ in sizes])
    if left is None or right is None:  # an identity in their place has a trace of its own
        left, right = (None if x is None else x / n for x, n in ((left, columns), (right, rows)))
    else:
        left = left / max(total, 1e-300)
    return Weighting(left, right)


def _weighed_sum(moments: Sequence[Tensor | None], factors: Sequence[float]) -> Tensor | None:
    """Sum the moments of one side, each times a factor; None if all are identities."""
    like = next((x.double() for x in moments if x is not None), None)
    if like is None:
        return None
    found = like.new_zeros(len(like), len(like))
    for moment, factor in zip(moments, factors, strict=True):
        found += factor * full_moment(moment, len(like), like)
    return found


def even_columns(cores: Cores) -> tuple[list[Tensor], Tensor]:
    """Move the sizes of the columns of private left factors into the rows of the shared right one.

    Groups of integers lie along the columns of a left factor, where small ones would be lost beside large
    ones; each row of the right one has scales of its own.
    """
    lefts = [left for left, _ in cores]
    size = torch.stack([left.square().sum(0) for left in lefts]).mean(0).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return [left / size for left in lefts], size[:, None] * cores[0][1]


def seen_by_right(left: Tensor, weighting: Weighting) -> Weighting:
    """Return the moments that errors of the right factor of a product see."""
    return Weighting(left.mT @ times(weighting.rows, left), weighting.columns)


def seen_by_left(right: Tensor, weighting: Weighting) -> Weighting:
    """Return the moments that errors of the left factor of a product see."""
    return Weighting(weighting.rows, right @ times(weighting.columns, right.mT))


def round_shared(matrix: Tensor, number_format: NumberFormat | None, weighting: Weighting) -> Core:
    """Round a shared core under pooled moments; it stays as it is where it has no integer format."""
    return matrix if number_format is None else round_dense(matrix, number_format, weighting)


def value(core: Core) -> Tensor:
    """Return the values of a core, in double precision."""
    return core.dequantize(torch.float64) if isinstance(core, RoundedWeight) else core


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the columns of the left factor and the rows of the right one to equal norms."""
    size = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-300)).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return left * size, right / size[:, None]


def _integers(number_format: NumberFormat) -> NumberFormat | None:
    return number_format if number_format.is_integer else None


_Formats = Mapping[str, NumberFormat | None]


def _round_inputs(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting], cores: Cores, formats: _Formats
) -> list[dict[str, Core]]:
    lefts, right = even_columns(cores)
    seen = [seen_by_right(left, x) for left, x in zip(lefts, weightings, strict=True)]
    shared = round_shared(right, formats["1"], pooled(seen, (right.shape[0], right.shape[1])))
    kept = value(shared)
    return [
        {"0": round_beside(w, left, kept, "left", formats["0"], x), "1": shared}
        for w, left, x in zip(matrices, lefts, weightings, strict=True)
    ]


def _round_outputs(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting], cores: Cores, formats: _Formats
) -> list[dict[str, Core]]:
    left, rights = cores[0][0], [right for _, right in cores]
    seen = [seen_by_left(right, x) for right, x in zip(rights, weightings, strict=True)]
    shared = round_shared(left, formats["0"], pooled(seen, (left.shape[0], left.shape[1])))
    kept = value(shared)
    return [
        {"0": shared, "1": round_beside(w, kept, right, "right", formats["1"], x)}
        for w, right, x in zip(matrices, rights, weightings, strict=True)
    ]


def _round_base(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting], cores: Cores, formats: _Formats
) -> list[dict[str, Core]]:
    base, rank = cores[0][0], cores[0][1].shape[1]
    shared = round_shared(base, formats["base"], pooled(weightings, (base.shape[0], base.shape[1])))
    pairs: list[tuple[Core, Core]] = []
    for w, x in zip(matrices, weightings, strict=True):
        rest = w - value(shared)
        left, right = balanced(*weighted_svd(rest, x).factors(rank))
        if formats["0"] is None:
            pairs.append((left, right))
        else:
            made = round_product(left, right, formats["0"], formats["1"], x, target=rest)
            pairs.append((made.left, made.right))
    if formats["base"] is None:  # it takes what rounding left of the others
        rests = [w - value(a) @ value(b) for w, (a, b) in zip(matrices, pairs, strict=True)]
        shared = mean_matrix(rests, weightings)
    return [{"base": shared, "0": a, "1": b} for a, b in pairs]

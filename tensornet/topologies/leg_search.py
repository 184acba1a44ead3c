"""Choice of the leg sizes of a chain by predicted loss increase.

Balanced legs store a chain compactly, but what a trained weight holds is spread over them; legs of which one
is large keep more of it together. The splits tried here have no leg of size 1, so none of them is low rank.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tensornet.linalg.tt_svd import max_bonds
from tensornet.linalg.weighted_svd import Weighting
from tensornet.topologies.proposals import Dims
from tensornet.topologies.weighted_fit import legs_of
from tensornet.topology import Topology

#: Sizes of the small legs.
_SMALL = (2, 3)
#: Fractions of the parameters at which splits are compared.
_FRACTIONS = (0.8, 0.5)


def best_dims(
    matrix: Tensor,
    weighting: Weighting,
    balanced: Dims,
    *,
    build: Callable[..., Topology],
    num_params: Callable[[Topology], int],
) -> Dims:
    """Find the leg sizes of least predicted loss, among balanced and unbalanced candidates.

    Compared by the geometric mean, over two sizes, of what truncating the widest bond loses in
    leg-whitened coordinates.

    Args:
        matrix: shape `(out, in)`.
        weighting: sensitivity of the loss to errors.
        balanced: the sizes to beat; the number of sites is theirs.
        build: makes a chain from features, `out_dims`, `in_dims` and `max_bond`.
        num_params: counts the numbers that a chain will store.
    """
    tried = [balanced, *unbalanced_dims(matrix.shape[0], matrix.shape[1], len(balanced[0]))]
    if not tried[1:]:
        return balanced
    return min(tried, key=lambda dims: _lost(matrix, weighting, dims, build, num_params))


def unbalanced_dims(rows: int, columns: int, sites: int) -> Iterator[Dims]:
    """List splits with one large out-leg on the first site and one large in-leg on the second."""
    if sites < 2:
        return
    for p in _SMALL:
        for q in _SMALL:
            outs, ins = (p,) * (sites - 1), (q,) * (sites - 1)
            large_out, large_in = rows // math.prod(outs), columns // math.prod(ins)
            fits = large_out * math.prod(outs) == rows and large_in * math.prod(ins) == columns
            if fits and large_out >= p and large_in >= q:
                yield (large_out, *outs), (ins[0], large_in, *ins[1:])


def _lost(
    matrix: Tensor,
    weighting: Weighting,
    dims: Dims,
    build: Callable[..., Topology],
    num_params: Callable[[Topology], int],
) -> float:
    """Compute the whitened energy fraction that truncating the widest bond discards."""
    rows, columns = matrix.shape
    full = build(rows, columns, out_dims=dims[0], in_dims=dims[1])
    bonds = max_bonds(*dims)
    widest = max(range(len(bonds)), key=bonds.__getitem__)
    left = math.prod(o * i for o, i in zip(dims[0][: widest + 1], dims[1][: widest + 1], strict=True))
    work = legs_of(full, weighting).whitened_matrix(matrix)
    sites = len(dims[0])
    order = [axis for k in range(sites) for axis in (k, sites + k)]
    unfolded = work.reshape(*dims[0], *dims[1]).permute(order).reshape(left, -1).float()
    gram = unfolded @ unfolded.T if left <= unfolded.shape[1] else unfolded.T @ unfolded
    energies = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    tails = energies.flip(0).cumsum(0).flip(0) / energies.sum().clamp_min(1e-30)
    result = 1.0
    for fraction in _FRACTIONS:
        low, high = 0, bonds[widest]
        while low < high:  # the widest bond that fits
            middle = (low + high + 1) // 2
            chain = build(rows, columns, out_dims=dims[0], in_dims=dims[1], max_bond=middle)
            fits = num_params(chain) <= fraction * matrix.numel()
            low, high = (middle, high) if fits else (low, middle - 1)
        result *= float(tails[low]) if low < len(tails) else 0.0
    return result

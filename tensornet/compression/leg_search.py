"""Choosing the leg sizes of a chain by what errors cost.

Balanced legs store a chain compactly, but what a trained weight holds is spread over them; legs of which one
is large keep more of it together. The splits tried here have no leg of size 1, so none of them is low rank.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tensornet.compression.network_fit import legs_of
from tensornet.linalg.tt_svd import max_bonds
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.encoding import Storage
from tensornet.topologies import topology_family

#: Sizes of the small legs.
_SMALL = (2, 3)
#: Shares of the parameters at which splits are compared.
_SHARES = (0.8, 0.5)

Dims = tuple[tuple[int, ...], tuple[int, ...]]


def best_dims(matrix: Tensor, weighting: Weighting, storage: Storage, balanced: Dims) -> Dims:
    """The leg sizes at which a chain leaves out least, balanced ones among them.

    Compared by the geometric mean, over two sizes, of what a cut of the widest bond leaves out in
    leg-whitened coordinates.

    Args:
        matrix: shape `(out, in)`.
        weighting: prices of errors.
        storage: how cores would be kept.
        balanced: the sizes to beat; the number of sites is theirs.
    """
    tried = [balanced, *unbalanced_dims(matrix.shape[0], matrix.shape[1], len(balanced[0]))]
    return min(tried, key=lambda dims: _left_out(matrix, weighting, storage, dims)) if tried[1:] else balanced


def unbalanced_dims(rows: int, columns: int, sites: int) -> Iterator[Dims]:
    """Splits with one large out-leg on the first site and one large in-leg on the second, others small."""
    if sites < 2:
        return
    for p in _SMALL:
        for q in _SMALL:
            outs, ins = (p,) * (sites - 1), (q,) * (sites - 1)
            large_out, large_in = rows // math.prod(outs), columns // math.prod(ins)
            fits = large_out * math.prod(outs) == rows and large_in * math.prod(ins) == columns
            if fits and large_out >= p and large_in >= q:
                yield (large_out, *outs), (ins[0], large_in, *ins[1:])


def _left_out(matrix: Tensor, weighting: Weighting, storage: Storage, dims: Dims) -> float:
    """Share of the whitened energy beyond the widest bond, at the bonds that the sizes compared afford."""
    build = topology_family("mpo").build
    full = build(matrix.shape[0], matrix.shape[1], out_dims=dims[0], in_dims=dims[1])
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
    for share in _SHARES:
        low, high = 0, bonds[widest]
        while low < high:  # the widest bond that fits
            middle = (low + high + 1) // 2
            chain = build(
                matrix.shape[0], matrix.shape[1], out_dims=dims[0], in_dims=dims[1], max_bond=middle
            )
            fits = storage.num_params(chain) <= share * matrix.numel()
            low, high = (middle, high) if fits else (low, middle - 1)
        result *= float(tails[low]) if low < len(tails) else 0.0
    return result

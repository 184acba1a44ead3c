"""Alternating least squares for tensor rings, which have no optimal closed form.

Reference: Zhao, Zhou, Xie, Zhang, Cichocki 2016, "Tensor Ring Decomposition", algorithm 2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

#: Directions of a core's normal equations below this share of the largest are left alone.
_CUTOFF = 1e-12


class Refined(NamedTuple):
    """Cores `(left, leg, right)`, the energy `|W - W'|^2`, sweeps taken, and whether they settled."""

    cores: list[Tensor]
    residual: float
    sweeps: int
    converged: bool


def refine_ring(tensor: Tensor, cores: list[Tensor], *, sweeps: int, settle: float = 1e-4) -> Refined:
    """Solve for one core after the other until the error settles; it never grows.

    Args:
        tensor: the merged legs `(s_0, ..., s_{n-1})`, double precision.
        cores: start, shapes `(b_{k-1}, s_k, b_k)`, of the same dtype.
        sweeps: most sweeps over all cores.
        settle: stop when a sweep lowers the error by less than this share.
    """
    sites, total = len(cores), float(torch.linalg.vector_norm(tensor)) ** 2
    before, done, residual, cores = total, 0, total, list(cores)
    while done < sweeps:
        for k in range(sites):
            others = cores[k + 1] if k + 1 < sites else cores[0]
            for step in range(2, sites):  # shape: (b_k, legs after k and around, b_{k-1})
                others = torch.tensordot(others, cores[(k + step) % sites], dims=1)
            right, left = others.shape[0], others.shape[-1]
            design = (
                others.reshape(right, -1, left).permute(1, 2, 0).flatten(1)
            )  # shape: (rest, left * right)
            order = [(k + step) % sites for step in range(sites)]
            wanted = tensor.permute(order).flatten(1)  # shape: (s_k, rest)
            moments = wanted @ design.conj()
            values, vectors = torch.linalg.eigh(design.mH @ design)
            inverse = torch.where(values > _CUTOFF * values[-1], 1 / values, 0)
            solution = moments @ (vectors.conj() * inverse) @ vectors.mT
            cores[k] = solution.reshape(-1, left, right).transpose(0, 1)
            residual = float(torch.linalg.vector_norm(wanted - solution @ design.mT)) ** 2
        done += 1
        if before - residual <= 2 * settle * residual or residual <= 1e-24 * total:
            return Refined(cores, residual, done, True)
        before = residual
    return Refined(cores, residual, done, False)

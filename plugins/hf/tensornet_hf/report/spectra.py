"""Singular-value spectra of the unfoldings that a decomposition truncates."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet.compression import LayerPlan
from tensornet.compression.planner import singular_values
from tensornet.linalg.tt_svd import pad_matrix
from tensornet.topology import Topology


@dataclass(frozen=True)
class BondSpectrum:
    """Spectrum that one bond truncates.

    Args:
        values: singular values in descending order, divided by the largest.
        kept: number of values that the bond keeps.
        exact: whether the bond truncates exactly this spectrum. If not (other families), `values`
            belong to the weight itself and `kept` is the rank of the same number of parameters.
    """

    values: tuple[float, ...]
    kept: int
    exact: bool = True


@torch.no_grad()
def bond_spectra(matrix: Tensor, layer: LayerPlan) -> tuple[BondSpectrum, ...]:
    """Return one spectrum for each planned bond; that of the weight for a layer that stays dense.

    Args:
        matrix: the dense weight, shape `(out_features, in_features)`.
        layer: its plan.
    """
    topology = layer.topology
    if topology is not None and topology.family == "mpo":
        return _chain_spectra(matrix, topology)
    known = layer.singular_values
    values = _relative(torch.tensor(known, dtype=torch.float64) if known else singular_values(matrix))
    if topology is None:
        return (BondSpectrum(values, len(values)),)
    if topology.family == "low_rank":
        return (BondSpectrum(values, max(topology.bond_dims.values())),)
    rank = min(len(values), max(1, topology.num_params // sum(topology.shape)))
    return (BondSpectrum(values, rank, exact=False),)


def _chain_spectra(matrix: Tensor, topology: Topology) -> tuple[BondSpectrum, ...]:
    """Return the spectra of a chain: bond `k` truncates the matrix with the legs before it as rows."""
    out_dims, in_dims = topology.out_dims, topology.in_dims
    sites = len(out_dims)
    order = [axis for site in range(sites) for axis in (site, sites + site)]
    padded = pad_matrix(matrix, *topology.padded_shape).reshape(*out_dims, *in_dims).permute(order)
    spectra = []
    for bond in range(1, sites):
        rows = math.prod(out_dims[:bond]) * math.prod(in_dims[:bond])
        kept = _bond_between(topology, bond)
        spectra.append(BondSpectrum(_relative(singular_values(padded.reshape(rows, -1))), kept))
    return tuple(spectra)


def _bond_between(topology: Topology, bond: int) -> int:
    """Return the size of the label that the cores on both sides of a bond share."""
    left, right = topology.cores[bond - 1], topology.cores[bond]
    (label,) = set(left.labels) & set(right.labels)
    return topology.size_of[label]


def _relative(values: Tensor) -> tuple[float, ...]:
    largest = float(values[0])
    return tuple((values / largest).tolist()) if largest > 0 else tuple(values.tolist())

"""Singular-value spectra of the unfoldings that a decomposition truncates."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet.compression import LayerPlan
from tensornet.linalg.svd import singular_values
from tensornet.linalg.tt_svd import pad_matrix
from tensornet.topologies import topology_family
from tensornet.topologies.structure import Side
from tensornet.topology import Topology


@dataclass(frozen=True)
class BondSpectrum:
    """Spectrum that one bond truncates.

    Args:
        values: singular values in descending order, divided by the largest.
        kept: how many of them the bond keeps.
        exact: whether the bond cuts exactly this spectrum. If no bond separates the network, `values`
            belong to the weight itself and `kept` is the rank of the same number of parameters.
    """

    values: tuple[float, ...]
    kept: int
    exact: bool = True


@torch.no_grad()
def bond_spectra(matrix: Tensor, layer: LayerPlan) -> tuple[BondSpectrum, ...]:
    """Compute one spectrum for each planned bond; that of the weight for a dense layer.

    Args:
        matrix: the dense weight, shape `(out_features, in_features)`.
        layer: its plan.
    """
    topology, known = layer.topology, layer.singular_values
    values = torch.tensor(known, dtype=torch.float64) if known else singular_values(matrix)
    if topology is None:
        return (BondSpectrum(_relative(values), len(values)),)
    cuts = topology_family(topology.family).bond_cuts(topology)
    if not cuts:
        rank = min(len(values), max(1, topology.num_params // sum(topology.shape)))
        return (BondSpectrum(_relative(values), rank, exact=False),)
    spectra = []
    for bond, side in cuts.items():
        whole = _separates_sides(topology, side)
        spectrum = values if whole else singular_values(_unfolding(matrix, topology, side))
        spectra.append(BondSpectrum(_relative(spectrum), topology.size_of[bond]))
    return tuple(spectra)


def _separates_sides(topology: Topology, side: Side) -> bool:
    """Return True if a bond separates all out-legs from all in-legs."""
    near, outs, ins = (
        {x for x in labels if topology.size_of[x] > 1}
        for labels in ((*side[0], *side[1]), topology.out_labels, topology.in_labels)
    )
    return topology.padded_shape == topology.shape and near in (outs, ins)


def _unfolding(matrix: Tensor, topology: Topology, side: Side) -> Tensor:
    """Unfold the matrix at a bond: legs on one side of it become rows, all others columns."""
    legs = (*topology.out_labels, *topology.in_labels)
    near = {x for labels in side for x in labels}
    order = sorted(range(len(legs)), key=lambda axis: legs[axis] not in near)
    padded = pad_matrix(matrix, *topology.padded_shape).reshape(*topology.out_dims, *topology.in_dims)
    rows = math.prod(topology.size_of[x] for x in near)
    return padded.permute(order).reshape(rows, -1)


def _relative(values: Tensor) -> tuple[float, ...]:
    largest = float(values[0])
    return tuple((values / largest).tolist()) if largest > 0 else tuple(values.tolist())

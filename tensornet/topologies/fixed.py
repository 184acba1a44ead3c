"""Topologies that a configuration fixes, one for every shape of matrix."""

from collections.abc import Mapping, Sequence
from typing import Any

from tensornet.errors import TopologyError
from tensornet.topologies.registry import topology_family
from tensornet.topology import Topology


def fixed_topologies(value: Any) -> tuple[Topology, ...]:
    """Read the topologies of a configuration; empty for other values, such as the name of a family.

    Args:
        value: a topology or its `to_dict`, or a sequence of these.

    Raises:
        TopologyError: a family that is not registered, or two topologies for one shape.

    Example:
        >>> from tensornet.topologies import low_rank
        >>> made = low_rank(out_features=8, in_features=6, rank=2)
        >>> fixed_topologies(made) == fixed_topologies([made.to_dict()]) == (made,), fixed_topologies("mpo")
        (True, ())
    """
    values = [value] if isinstance(value, Topology | Mapping) else value
    if isinstance(values, str) or not isinstance(values, Sequence):
        return ()
    if not all(isinstance(each, Topology | Mapping) for each in values):
        return ()
    found = tuple(each if isinstance(each, Topology) else Topology.from_dict(each) for each in values)
    for topology in found:
        topology_family(topology.family)  # layers of families that are not registered could not be loaded
    shapes = [topology.shape for topology in found]
    if twice := next((shape for shape in shapes if shapes.count(shape) > 1), None):
        raise TopologyError(f"Two topologies are for matrices of shape {twice}; give one for each shape.")
    return found


def topology_of_shape(topologies: Sequence[Topology], shape: tuple[int, int], what: str) -> Topology:
    """Select the topology for a matrix.

    Args:
        topologies: see `fixed_topologies`.
        shape: of the matrix, `(out_features, in_features)`.
        what: the matrix, for the error.

    Raises:
        TopologyError: none is for that shape.

    Example:
        >>> from tensornet.topologies import mpo
        >>> topology_of_shape([mpo(out_dims=(2, 3), in_dims=(2, 2))], (6, 4), "Layer 'up'").shape
        (6, 4)
    """
    for topology in topologies:
        if topology.shape == shape:
            return topology
    raise TopologyError(
        f"{what} is a matrix of shape {shape}, and the topologies given are for "
        f"{', '.join(str(topology.shape) for topology in topologies)}. Give one for this shape as well "
        "(topology=[...]), choose other layers (target_modules=...), or give the name of a family."
    )

"""Structure of a network: bonds with a free gauge, bonds that separate it, its kind, cores as matrices."""

import math

from tensornet.topology import Topology

#: Legs on one side of a bond: labels of the out-legs, labels of the in-legs.
Side = tuple[tuple[str, ...], tuple[str, ...]]


def gauge_bonds(topology: Topology, *, always: bool = False) -> dict[str, str]:
    """Choose, for each core but the last, a bond to a later core whose gauge the core can fix.

    Only a bond that exactly two cores share has a gauge: an invertible matrix and its inverse put into it
    change the cores, not the operator. The core needs at least as many other index values as the bond has.

    Args:
        topology: of any family.
        always: also where the row order that a fixed gauge stores takes more numbers than it leaves out.

    Returns:
        The largest such bond of each core that has one, by name of the core.

    Example:
        >>> gauge_bonds(tn.topologies.mpo(out_dims=(4, 4), in_dims=(4, 4), max_bond=6))
        {'0': 'b1'}
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
            if rows >= size and (always or size**2 > rows):
                fitting.append(label)
        if fitting:
            found[core.name] = max(reversed(fitting), key=sizes.__getitem__)
    return found


def bond_cuts(topology: Topology) -> dict[str, Side]:
    """Find the bonds that separate a network, each with the legs on the side of its first core.

    The bond then cuts one unfolding of the matrix, whose singular values say how much a smaller bond loses.

    Example:
        >>> bond_cuts(tn.topologies.low_rank(out_features=6, in_features=4, rank=2))
        {'b1': (('o0',), ('i0',))}
    """
    cuts = {}
    for label in topology.bond_dims:
        carriers = [k for k, core in enumerate(topology.cores) if label in core.labels]
        if len(carriers) != 2:
            continue
        side = _reachable(topology, carriers[0], label)
        if carriers[1] in side:
            continue
        labels = {x for k in side for x in topology.cores[k].labels}
        outs = tuple(x for x in topology.out_labels if x in labels)
        cuts[label] = outs, tuple(x for x in topology.in_labels if x in labels)
    return cuts


def is_chain(topology: Topology) -> bool:
    """Return True if the cores form a chain `(left, out, in, right)` with one leg of each kind per core.

    Example:
        >>> is_chain(tn.topologies.tucker(out_dims=(4, 4), in_dims=(4, 4), max_bond=2))
        False
    """
    legs = list(zip(topology.out_labels, topology.in_labels, strict=False))
    if not len(legs) == len(topology.out_labels) == len(topology.in_labels) == len(topology.cores):
        return False
    right: str | None = None
    for core, pair in zip(topology.cores, legs, strict=True):
        if len(core.labels) != 4 or core.labels[1:3] != pair or right not in (None, core.labels[0]):
            return False
        right = core.labels[3]
    ends = topology.cores[0].labels[0], topology.cores[-1].labels[3]
    return all(topology.size_of[x] == 1 for x in ends) and ends[0] != ends[1]


def is_matrix(topology: Topology) -> bool:
    """Return True if the network is one core, and that core is the matrix: out-legs, then in-legs, unpadded.

    Example:
        >>> is_matrix(tn.topologies.dense(out_features=6, in_features=4))
        True
    """
    labels = topology.cores[0].labels
    legs = (*topology.out_labels, *topology.in_labels)
    return len(topology.cores) == 1 and labels == legs and topology.shape == topology.padded_shape


def matrix_view(topology: Topology, name: str) -> tuple[int, int]:
    """View a core as a matrix whose rows are groups along the inputs, which share scales.

    Columns are the axes from the first in-leg on; the last axis alone where no axis comes before an in-leg.

    Example:
        >>> matrix_view(tn.topologies.low_rank(out_features=6, in_features=4, rank=2), "1")
        (2, 4)
    """
    labels = next(core.labels for core in topology.cores if core.name == name)
    legs = [axis for axis, label in enumerate(labels) if label in topology.in_labels]
    split = legs[0] if legs and legs[0] > 0 else len(labels) - 1
    shape = topology.core_shapes[name]
    return math.prod(shape[:split]), math.prod(shape[split:])


def _reachable(topology: Topology, start: int, without: str) -> set[int]:
    """Collect the cores connected to `start` by labels other than `without`."""
    side, waiting = {start}, [start]
    while waiting:
        labels = set(topology.cores[waiting.pop()].labels) - {without}
        for k, core in enumerate(topology.cores):
            if k not in side and labels & set(core.labels):
                side.add(k)
                waiting.append(k)
    return side

"""Plans without calibration data whose networks are stored without redundant elements."""

from dataclasses import replace

import tensornet as tn
from tensornet.nn.storage import Storage


def pivoted(plan: tn.CompressionPlan) -> tn.CompressionPlan:
    """Return a plan that stores the same networks without the elements that gauge freedom makes redundant."""
    layers = [
        x if x.topology is None else replace(x, storage=Storage(pivoted=True).for_topology(x.topology))
        for x in plan
    ]
    return replace(plan, layers=tuple(layers))

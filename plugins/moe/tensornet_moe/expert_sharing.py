"""Experts of a mixture that share a core when a model is compressed with `share_experts`.

A stack consists of one matrix, such as the up projection, of every expert in a mixture. The low-rank networks
of a stack may share a projection of the inputs, a basis of the outputs or a base matrix
(`shared_low_rank.py`).
"""

from collections.abc import Mapping, Sequence

from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.allocate import lower_hull
from tensornet.compression.apply import NewLayers
from tensornet.compression.candidates import layer_formats, relative_gap
from tensornet.compression.config import CompressionConfig
from tensornet.compression.plan import LayerPlan
from tensornet.compression.sensitivity import layer_sensitivity
from tensornet.compression.shared_cores import SharedCandidate
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.extension import ModelExtension, register_extension
from tensornet.nn.linear import linear_from_stored
from tensornet.nn.targets import Target
from tensornet.nn.unfuse import PartMatrix
from tensornet_moe.shared_low_rank import PATTERNS, fit_stored, pattern_of, shared_candidates


class ExpertSharing(ModelExtension):
    """Extension that finds and fits networks of experts which share a core."""

    def shared_candidates(
        self, targets: Sequence[Target], stats: CalibrationStats, config: CompressionConfig
    ) -> Mapping[tuple[str, ...], Sequence[SharedCandidate]]:
        """Predict the losses of all ways to share a core in each stack of experts.

        The experts of a stack share nothing if calibration found no gradient for one of them.
        """
        found: dict[tuple[str, ...], list[SharedCandidate]] = {}
        for group in stacks_of(targets):
            names = tuple(target.name for target in group)
            found[names] = []
            known = [layer_sensitivity(target, "curvature", stats) for target in group]
            weights = [sensitivity for sensitivity in known if sensitivity is not None]
            if len(weights) < len(group):
                continue
            matrices = [target.matrix for target in group]
            per_token = experts_per_token([target.names[0] for target in group], stats)
            formats = layer_formats(matrices, weights, config)
            pairs = [
                (core, candidate)
                for pattern, core in PATTERNS.items()
                for candidate in shared_candidates(pattern, matrices, weights, formats, per_token=per_token)
            ]
            # Only candidates on the lower convex hull of cost over bytes, or over parameters, can be chosen.
            costs = [candidate.cost for _, candidate in pairs]
            by_bytes = lower_hull([candidate.num_bytes for _, candidate in pairs], costs)
            by_params = lower_hull([candidate.params for _, candidate in pairs], costs)
            found[names] = [SharedCandidate(names, *pairs[k]) for k in sorted({*by_bytes, *by_params})]
        return found

    def fit_shared(
        self, targets: Sequence[Target], weightings: Sequence[Weighting], layer: LayerPlan
    ) -> list[NewLayers] | None:
        """Fit low-rank networks that share a core to a stack; None if these are other networks."""
        topology, storage = layer.topology, layer.storage
        assert topology is not None
        assert layer.shared_core is not None
        pattern = pattern_of(topology, layer.shared_core[0])
        if pattern is None:
            return None
        rank = max(topology.bond_dims.values())
        # The walk over the blocks may compute in float32, also where the model has 16 bits.
        stored = fit_stored(pattern, [x.matrix for x in targets], weightings, rank, storage)
        made: list[NewLayers] = []
        for target, tensors in zip(targets, stored, strict=True):
            (part,), (kind,) = target.modules, target.kinds
            new = linear_from_stored(topology, tensors, source=kind.name, storage=storage, like=target.matrix)
            assert isinstance(part, PartMatrix)
            new.bias = part.bias
            made.append(([new], relative_gap(target.matrix, new.to_matrix())))
        return made


def stacks_of(targets: Sequence[Target]) -> list[list[Target]]:
    """Group targeted experts into stacks."""
    stacks: dict[tuple[object, ...], list[Target]] = {}
    for target in targets:
        owner, number, matrix = ["", "", *target.name.rsplit(".", 2)][-3:]
        if len(target.names) == 1 and isinstance(target.modules[0], PartMatrix) and number.isdigit():
            kind = (matrix, target.matrix.shape, target.matrix.dtype)
            stacks.setdefault((owner, *kind), []).append(target)
    return [members for members in stacks.values() if len(members) > 1]


def experts_per_token(names: Sequence[str], stats: CalibrationStats) -> float:
    """Return the mean number of these experts that process a calibration token; at least 1.

    Args:
        names: names of the experts of one layer.
        stats: calibration statistics; if they have no token counts, two experts per token are assumed.
    """
    known = {name: stats.counts[name] for name in names if name in stats.counts}
    if not known:
        return float(min(2, len(names)))
    tokens = max(stats.tokens, stats.scored, 1)  # `stats.tokens` is too small if only experts were observed
    return max(1.0, sum(known.values()) / tokens)


register_extension(ExpertSharing())

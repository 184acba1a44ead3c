"""Stacks of matrices, such as the experts of a mixture, whose networks may share a core.

For each stack the losses of all shared forms are predicted at all ranks (`shared_forms.py`), beside the
candidates of its single matrices. Budgets of the whole model are then spent on both at once
(`joint_choice.py`). Where layers are planned one by one, a stack keeps the bytes that its separate networks
have, and takes the form of least cost: `share_alone`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensornet._util import progress_bar
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.format_candidates import layer_formats
from tensornet.compression.layer_plan import LayerPlan, low_rank_error
from tensornet.compression.sensitivity import layer_sensitivity
from tensornet.compression.shared_formats import form_curves
from tensornet.compression.shared_forms import SHARED_FORMS, FormCurve, form_of
from tensornet.compression.shared_rounding import fit_stored
from tensornet.errors import TargetError, TopologyError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.targets import Target
from tensornet.nn.unfuse import PartMatrix
from tensornet.quantization import NumberFormat

#: Where layers are planned one by one, a shared form must cost at most this fraction of separate networks.
_WORTH = 0.995


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape that may share a core, and what each form of sharing costs.

    Args:
        members: places of the matrices among the targets of the plan.
        shape: `(out_features, in_features)` of each.
        curves: of the forms and encodings that save anything.
    """

    members: tuple[int, ...]
    shape: tuple[int, int]
    curves: tuple[FormCurve, ...]


@dataclass(frozen=True)
class SharedChoice:
    """Choice of a shared form for one stack: the curve and its index, which is the rank minus one."""

    stack: Stack
    curve: FormCurve
    index: int

    def planned(self, layers: Sequence[LayerPlan], bound_by: str) -> list[LayerPlan]:
        """Turn the plans of the members into those of the form.

        Args:
            layers: plans of the members in their order; figures that do not depend on the form are kept.
            bound_by: the cap that decided.
        """
        form = SHARED_FORMS[self.curve.name]
        topology = form.build(*self.stack.shape, self.index + 1)
        size = int(self.curve.num_bytes[self.index])
        each = size // (len(layers) * layers[0].dtype.itemsize)
        return [
            replace(
                layer,
                topology=topology,
                bound_by=bound_by,
                storage=self.curve.storage,
                shared_core=form.core,
                shared_with=layers[0].name,
                error=float(self.curve.errors[place, self.index]),
                baseline_error=low_rank_error(
                    torch.tensor(layer.singular_values, dtype=torch.float64), layer.shape, each
                ),
                loss_increase=(
                    None if layer.loss_increase is None else float(self.curve.forecasts[place, self.index])
                ),
            )
            for place, layer in enumerate(layers)
        ]


@torch.no_grad()
def find_stacks(
    targets: Sequence[Target],
    objective: str,
    stats: CalibrationStats | None,
    damping: float,
    formats: Sequence[NumberFormat] = (),
    *,
    progress: bool = False,
) -> tuple[Stack, ...]:
    """Predict the losses of the shared forms of every stack of experts among the targets.

    Stacks with an expert that no gradient reached are left out: its errors cost nothing, so that it need not
    share.

    Args:
        targets: of the plan.
        objective: what an error costs.
        stats: the plan is made with.
        damping: of gradient moments.
        formats: number formats that cores may be stored in; the model's own alone if there are none.
        progress: show a progress bar.

    Raises:
        TargetError: no target is an expert of a mixture.
    """
    found = []
    groups = stacks_of_experts(targets)
    for members in progress_bar(groups, desc="sharing", disable=not progress, unit="stack"):
        group = [targets[k] for k in members]
        known = [layer_sensitivity(target, objective, stats, damping) for target in group]
        weights = [sensitivity for sensitivity in known if sensitivity is not None]
        if len(weights) < len(group):
            continue
        matrices = [target.matrix for target in group]
        per_token = experts_per_token([target.names[0] for target in group], stats)
        kept = layer_formats(matrices, weights, formats)
        curves = [
            curve
            for name in SHARED_FORMS
            for curve in form_curves(name, matrices, weights, kept, per_token=per_token)
        ]
        found.append(Stack(tuple(members), (matrices[0].shape[0], matrices[0].shape[1]), tuple(curves)))
    return tuple(stack for stack in found if stack.curves)


def experts_per_token(names: Sequence[str], stats: CalibrationStats | None) -> float:
    """Compute how many of some experts a token of calibration reached on average, at least 1.

    Args:
        names: of the experts.
        stats: where they have counted no tokens, as in files of older versions, it is taken to be two.

    Example:
        >>> from tensornet.compression.shared_stacks import experts_per_token
        >>> counts = {"experts.0.up": 60, "experts.1.up": 90}
        >>> experts_per_token([*counts], tn.CalibrationStats({}, {}, tokens=100, counts=counts))
        1.5
    """
    known = {} if stats is None else {name: stats.counts[name] for name in names if name in stats.counts}
    if stats is None or not known:
        return float(min(2, len(names)))
    tokens = max(stats.tokens, stats.scored, 1)  # where experts alone are observed, none of them sees all
    return max(1.0, sum(known.values()) / tokens)


def expert_groups(targets: Sequence[Target]) -> list[list[int]]:
    """Group targets that are experts of one mixture, of one name, shape and dtype."""
    names = [target.name for target in targets]
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, target in enumerate(targets):
        if len(target.names) == 1 and isinstance(target.modules[0], PartMatrix):
            relatives = tuple(target.kinds[0].relatives(target.name, names)) or (target.name,)
            groups.setdefault((relatives, target.matrix.shape, target.matrix.dtype), []).append(place)
    return [members for members in groups.values() if len(members) > 1]


def stacks_of_experts(targets: Sequence[Target]) -> list[list[int]]:
    """Group targets that are experts of one mixture; see `expert_groups`.

    Raises:
        TargetError: there are none.
    """
    if not (found := expert_groups(targets)):
        raise TargetError(
            f"share_experts found no stack of experts among the {len(targets)} targeted layers: nothing "
            "could share a core. Target the experts of a mixture that keeps them as one parameter of "
            "shape (experts, out, in), or leave out share_experts."
        )
    return found


def share_alone(
    layers: Sequence[LayerPlan], stacks: Sequence[Stack], costs: Sequence[float]
) -> list[LayerPlan]:
    """Let each stack share a core where that costs less with the bytes that its separate networks have.

    Args:
        layers: the plan of single layers.
        stacks: among them.
        costs: of each layer as planned, in the unit of the curves of the stacks.
    """
    made = list(layers)
    for stack in stacks:
        members = [layers[k] for k in stack.members]
        size = sum(layer.bytes_after for layer in members)
        least = _WORTH * sum(costs[k] for k in stack.members)
        best: SharedChoice | None = None
        for curve in stack.curves:
            index = int((curve.num_bytes <= size).sum()) - 1
            if index >= 0 and (cost := float(curve.costs[:, index].sum())) < least:
                best, least = SharedChoice(stack, curve, index), cost
        if best is not None:
            for place, layer in zip(stack.members, best.planned(members, members[0].bound_by), strict=True):
                made[place] = layer
    return made


def fit_stack(
    layers: Sequence[LayerPlan], targets: Sequence[Target], weightings: Sequence[Weighting]
) -> list[dict[str, Tensor]]:
    """Fit the networks of a planned stack, and encode them; see `fit_stored`.

    Raises:
        TopologyError: the layers are not one stack of a known form, all of whose layers are planned.
    """
    first = layers[0]
    form = None if first.topology is None else form_of(first.topology, first.shared_core)
    same = {(layer.shared_core, layer.topology, layer.shape, layer.storage) for layer in layers}
    if form is None or len(same) > 1 or first.name != first.shared_with:
        raise TopologyError(
            f"Layer {first.name!r} shares core {first.shared_core!r} with {first.shared_with!r}, which is "
            "not planned alike. Layers that share a core are carried out together: plan again, or give each "
            "a network of its own by plan.replace_layer(name, topology)."
        )
    if first.storage.pivoted:
        raise TopologyError(
            f"Layer {first.name!r} shares core {first.shared_core!r} with others and is stored as "
            f"{first.storage}; layers that share a core have number formats alone, not pivoted=True."
        )
    assert first.topology is not None
    rank = max(first.topology.bond_dims.values())
    return fit_stored(form, [target.matrix for target in targets], weightings, rank, first.storage)

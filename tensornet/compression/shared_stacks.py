"""Choice between separate and shared networks for stacks of matrices, such as the experts of a mixture.

The plan of single layers comes first. Each stack of layers that differ in their number alone then keeps the
bytes that this plan gives it, and takes the form of least predicted cost: the separate networks as planned,
or networks that share a core (`shared_forms.py`). So sharing never makes a plan larger, nor worse by what it
predicts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.layer_plan import LayerPlan, low_rank_error
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.sensitivity import layer_sensitivity
from tensornet.compression.shared_forms import SHARED_FORMS, fit_form
from tensornet.errors import TopologyError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.nn.compound import PartMatrix
from tensornet.nn.encoding import PLAIN
from tensornet.nn.targets import Target
from tensornet.topologies import topology_family

#: A shared form must predict at most this fraction of the cost of separate networks.
_WORTH = 0.995


@dataclass(frozen=True)
class SharedPlan:
    """Plan whose stacks share cores, and the networks that were fitted to make it.

    Args:
        plan: carried out by `apply_plan`, with or without the networks.
        networks: of the layers that share a core, by name; they hold for the weights of the plan alone.
    """

    plan: CompressionPlan
    networks: Mapping[str, TensorNetwork]


@torch.no_grad()
def share_stacks(
    plan: CompressionPlan, targets: Sequence[Target], stats: CalibrationStats | None
) -> SharedPlan:
    """Plan stacks of experts that share a core where that predicts less cost at the same bytes.

    Args:
        plan: of single layers, with floating-point cores.
        targets: the dense layers of the plan.
        stats: the plan was made with.
    """
    found = {target.name: target for target in targets}
    changed: dict[str, LayerPlan] = {}
    networks: dict[str, TensorNetwork] = {}
    for layers in stacks(plan, found):
        for layer, network in _shared(layers, [found[layer.name] for layer in layers], plan, stats):
            changed[layer.name], networks[layer.name] = layer, network
    return SharedPlan(replace(plan, layers=tuple(changed.get(x.name, x) for x in plan)), networks)


def stacks(plan: CompressionPlan, targets: dict[str, Target]) -> list[list[LayerPlan]]:
    """Group the layers of a plan that are experts of one mixture, of one name, shape and dtype."""
    names = [layer.name for layer in plan]
    groups: dict[tuple[object, ...], list[LayerPlan]] = {}
    for layer in plan:
        target = targets[layer.name]
        alone = len(target.names) == 1 and isinstance(target.modules[0], PartMatrix)
        if alone and not layer.storage.own_dtypes:
            relatives = tuple(target.kinds[0].relatives(layer.name, names)) or (layer.name,)
            groups.setdefault((relatives, layer.shape, layer.dtype), []).append(layer)
    return [layers for layers in groups.values() if len(layers) > 1]


def _shared(
    layers: Sequence[LayerPlan],
    targets: Sequence[Target],
    plan: CompressionPlan,
    stats: CalibrationStats | None,
) -> list[tuple[LayerPlan, TensorNetwork]]:
    """Return plans and networks of the best shared form of one stack; none if separate ones are better."""
    found = [layer_sensitivity(target, plan.objective, stats, plan.damping) for target in targets]
    known = [sensitivity for sensitivity in found if sensitivity is not None]
    if len(known) < len(layers):  # errors of an expert that no gradient reached cost nothing
        return []
    matrices = [target.matrix for target in targets]
    weightings = [sensitivity.choice for sensitivity in known]
    rows, columns = layers[0].shape
    numbers = sum(layer.bytes_after for layer in layers) // layers[0].dtype.itemsize
    least = _WORTH * sum(
        _cost(layer, target, weighting)
        for layer, target, weighting in zip(layers, targets, weightings, strict=True)
    )
    best: tuple[str, list[TensorNetwork]] | None = None
    for name, form in SHARED_FORMS.items():
        if (rank := form.rank(len(layers), rows, columns, numbers)) == 0:
            continue
        networks = fit_form(name, matrices, weightings, rank)
        cost = sum(
            weighting.cost(matrix - network.to_matrix().to(matrix))
            for matrix, network, weighting in zip(matrices, networks, weightings, strict=True)
        )
        if cost < least:
            best, least = (name, networks), cost
    if best is None:
        return []
    form = SHARED_FORMS[best[0]]
    made = []
    for layer, target, network, sensitivity in zip(layers, targets, best[1], known, strict=True):
        error = target.matrix - network.to_matrix().to(target.matrix)
        norm = float(target.matrix.norm())
        planned = replace(
            layer,
            topology=network.topology,
            storage=PLAIN,
            shared_core=form.core,
            shared_with=layers[0].name,
            error=float(error.norm()) / norm if norm > 0 else 0.0,
            baseline_error=low_rank_error(
                torch.tensor(layer.singular_values, dtype=torch.float64),
                layer.shape,
                numbers // len(layers),
            ),
            loss_increase=None if layer.loss_increase is None else sensitivity.forecast.cost(error),
        )
        made.append((planned, network))
    return made


def _cost(layer: LayerPlan, target: Target, weighting: Weighting) -> float:
    """Compute the cost of one layer as planned."""
    if layer.topology is None:
        return 0.0
    made = topology_family(layer.topology.family).fit(target.matrix, layer.topology, weighting)
    return weighting.cost(target.matrix - made.network.to_matrix().to(target.matrix))


def fit_stack(
    layers: Sequence[LayerPlan], targets: Sequence[Target], weightings: Sequence[Weighting]
) -> list[TensorNetwork]:
    """Fit the networks of a planned stack, as they were fitted for the plan.

    Raises:
        TopologyError: the layers are not one stack of a known form, all of whose layers are planned.
    """
    first = layers[0]
    forms = [
        name
        for name, form in SHARED_FORMS.items()
        if form.core == first.shared_core
        and first.topology is not None
        and form.build(*first.shape, max(first.topology.bond_dims.values())) == first.topology
    ]
    same = {(layer.shared_core, layer.topology, layer.shape) for layer in layers}
    if not forms or len(same) > 1 or first.name != first.shared_with:
        raise TopologyError(
            f"Layer {first.name!r} shares core {first.shared_core!r} with {first.shared_with!r}, which is "
            "not planned alike. Layers that share a core are carried out together: plan again, or give each "
            "a network of its own by plan.replace_layer(name, topology)."
        )
    assert first.topology is not None
    rank = max(first.topology.bond_dims.values())
    return fit_form(forms[0], [target.matrix for target in targets], weightings, rank)

"""Plans of single layers by the Frobenius error of their weights, without calibration statistics."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from tensornet._util import progress_bar
from tensornet.budget import Budget
from tensornet.compression.allocate import decide_alone
from tensornet.compression.config import CompressionConfig
from tensornet.compression.layer_plan import LayerPlan, with_baseline
from tensornet.errors import BudgetError
from tensornet.linalg.svd import MatrixSpectrum, singular_values
from tensornet.nn.encoding import Storage
from tensornet.nn.targets import Target
from tensornet.topologies import Decomposition, topology_family
from tensornet.topologies.registry import topology_of_shape
from tensornet.topologies.results import Prediction


class PlannedLayer(NamedTuple):
    """Plan of one layer, and its decomposition in the dtype of the weight, if it was asked for."""

    layer: LayerPlan
    decomposition: Decomposition | None = None


def plan_layers(
    targets: Sequence[Target], config: CompressionConfig, *, decompose: bool = False, progress: bool = False
) -> list[PlannedLayer]:
    """Plan every layer by the Frobenius error of its weight.

    Args:
        targets: the weights.
        config: what to compress and how far.
        decompose: decompose as well, where planning has done a part of that work.
        progress: show a progress bar.

    Raises:
        BudgetError: a layer cannot meet the budget; the message names it.
    """
    sizes = [target.matrix.numel() for target in targets]
    with progress_bar(total=len(targets), desc="planning", disable=not progress, unit="layer") as bar:

        def decide(index: int, ratio: float | None) -> PlannedLayer:
            made = plan_layer(targets[index], replace(config, param_ratio=ratio), decompose=decompose)
            bar.update()
            return made

        def stay(index: int) -> tuple[PlannedLayer, float]:
            target = targets[index]
            return PlannedLayer(_dense(target, singular_values(target.matrix))), sizes[index]

        if config.param_ratio is None:
            return [decide(index, None) for index in range(len(targets))]
        return decide_alone(sizes, config.param_ratio, decide, stay)


def plan_layer(target: Target, config: CompressionConfig, *, decompose: bool = False) -> PlannedLayer:
    """Plan one layer by the Frobenius error of its weight: choose the best family within the budget."""
    if config.fixed:
        return PlannedLayer(_fixed(target, config))
    matrix = target.matrix
    best: Prediction | None = None
    refusals = []
    spectrum = MatrixSpectrum(matrix, truncates=decompose)
    for family in config.families:
        try:
            options = config.family_options(family)
            found = topology_family(family).predict(matrix, config.budget, spectrum, **options)
        except BudgetError as error:
            refusals.append(f"{family}: {error}")
            continue
        if best is None or _better(found, best, config.budget):
            best = found
    if best is None:
        raise BudgetError(f"Layer {target.name!r} cannot meet the budget. " + " ".join(refusals))
    dense = _dense(target, spectrum())
    if not config.budget.unlimited and best.topology.num_params >= matrix.numel():
        return PlannedLayer(dense)
    made = with_baseline(replace(dense, topology=best.topology, bound_by=best.bound_by, error=best.error))
    if not decompose or best.decompose is None:
        return PlannedLayer(made)
    done = best.decompose()
    return PlannedLayer(made, replace(done, network=done.network.to(matrix.dtype)))


def _dense(target: Target, spectrum: Tensor) -> LayerPlan:
    shape = (target.matrix.shape[0], target.matrix.shape[1])
    return LayerPlan(target.name, shape, None, "dense", 0.0, 0.0, tuple(spectrum.tolist()))


def _fixed(target: Target, config: CompressionConfig) -> LayerPlan:
    """Plan the topology that the configuration gives for the shape of a layer; its error is found by fitting.

    Raises:
        TopologyError: the configuration has no topology for this shape.
    """
    dense = _dense(target, singular_values(target.matrix))
    topology = topology_of_shape(config.fixed, dense.shape, f"Layer {target.name!r}")
    storage = Storage(pivoted=bool(config.pivoted)).for_topology(topology)
    made = replace(dense, topology=topology, bound_by="topology", error=None, storage=storage)
    return with_baseline(made)


def _better(new: Prediction, old: Prediction, budget: Budget) -> bool:
    """Compare two plans: the smaller wins under `rel_error`, the more accurate one under a size cap."""
    if budget.rel_error is not None:
        kept_new, kept_old = new.error <= budget.rel_error, old.error <= budget.rel_error
        if kept_new and kept_old:
            return new.topology.num_params < old.topology.num_params
        if kept_new != kept_old:
            return kept_new
    return new.error < old.error

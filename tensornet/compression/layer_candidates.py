"""All candidates of one layer: families of networks, and number formats."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.candidates import (
    LayerCandidates,
    dense_candidate,
    family_candidates,
    joined,
    keep_promise,
    storage_of,
)
from tensornet.compression.config import CompressionConfig
from tensornet.compression.format_candidates import dense_candidates
from tensornet.compression.latency import Clock
from tensornet.compression.sensitivity import Sensitivity, layer_sensitivity
from tensornet.errors import BudgetError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.encoding import Storage
from tensornet.nn.targets import Target
from tensornet.quantization import NumberFormat
from tensornet.remembered import remembering
from tensornet.topologies import TopologyFamily, topology_family


def layer_candidates(
    target: Target,
    config: CompressionConfig,
    objective: str,
    stats: CalibrationStats | None,
    clock: Clock | None = None,
) -> LayerCandidates:
    """Build all candidates of one layer within its own caps; `clock` predicts their times.

    Raises:
        BudgetError: none is left.
    """
    sensitivity = layer_sensitivity(target, objective, stats, config.damping)
    if sensitivity is None:
        return _insensitive(target.matrix, config, clock)
    matrix = target.matrix
    with remembering():  # every format and encoding asks for the same decompositions
        found = _all_forms(matrix, sensitivity, config, objective, clock)
    if config.rel_error is not None:
        found = keep_promise(found, matrix, sensitivity.choice, config.rel_error)
    if len(found.params) == 0:
        raise BudgetError(
            f"Layer {target.name!r}: no rank up to max_bond={config.max_bond} has a relative error of at "
            f"most rel_error={config.rel_error}."
        )
    return found


def _all_forms(
    matrix: Tensor,
    sensitivity: Sensitivity,
    config: CompressionConfig,
    objective: str,
    clock: Clock | None,
) -> LayerCandidates:
    """Build the candidates of all families and, where they are planned, of all number formats."""
    plain = storage_of(config, objective)
    if not config.plans_formats:
        return _networks(matrix, sensitivity, plain, config, clock)
    found = dense_candidates(matrix, sensitivity, config.number_formats, clock)
    if objective == "weight":
        return found
    parts = [
        _network(matrix, sensitivity, storage, name, config, clock)
        for name in config.calibrated_families
        for storage in _storages(topology_family(name), plain.pivoted, config.number_formats)
    ]
    return joined([found, *(_without_dense(part) for part in parts)])


def _storages(family: TopologyFamily, pivoted: bool, formats: Sequence[NumberFormat]) -> list[Storage]:
    """List the encodings of the cores of one family where number formats are planned."""
    return [
        Storage(pivoted, number_format=number_format, core_formats=tuple(others.items()))
        for number_format, others in family.encodings(formats)
    ]


def _networks(
    matrix: Tensor, sensitivity: Sensitivity, storage: Storage, config: CompressionConfig, clock: Clock | None
) -> LayerCandidates:
    """Build the candidates of all families with one encoding."""
    found = [
        _network(matrix, sensitivity, storage, name, config, clock) for name in config.calibrated_families
    ]
    return joined(found)


def _network(
    matrix: Tensor,
    sensitivity: Sensitivity,
    storage: Storage,
    name: str,
    config: CompressionConfig,
    clock: Clock | None,
) -> LayerCandidates:
    """Build the candidates of one family with one encoding."""
    family, options = topology_family(name), config.family_options(name)
    max_bond = config.max_bond
    if storage.number_format.is_integer:
        max_bond = _largest_useful_bond(family, matrix, storage, max_bond, options)
    return family_candidates(
        matrix,
        sensitivity,
        storage,
        family,
        max_bond=max_bond,
        rel_error=config.rel_error,
        clock=clock,
        search_legs=config.dims == "auto",
        options=options,
    )


def _largest_useful_bond(
    family: TopologyFamily,
    matrix: Tensor,
    storage: Storage,
    max_bond: int | None,
    options: Mapping[str, Any],
) -> int:
    """Find the largest bond whose network is smaller than the dense matrix in the same format.

    Larger ones are never worth their rounding, which takes most of the time of planning.
    """
    rows, columns = matrix.shape
    limit = storage.number_format.nbytes((rows, columns), matrix.dtype)
    low, high = 1, min(rows, columns, max_bond or rows)
    while low < high:
        middle = (low + high + 1) // 2
        size = storage.num_bytes(family.build(rows, columns, max_bond=middle, **options), matrix.dtype)
        low, high = (middle, high) if size < limit else (low, middle - 1)
    return low


def _without_dense(found: LayerCandidates) -> LayerCandidates:
    """Remove the dense candidate, which is the last: formats decide how a layer may stay dense."""
    count = len(found.params)
    last = count > 0 and found.make(count - 1)[0] is None
    return found.only(range(count - 1)) if last else found


def _insensitive(matrix: Tensor, config: CompressionConfig, clock: Clock | None) -> LayerCandidates:
    """Build candidates of a layer without calibration statistics: only accurate ones.

    The most accurate integer format where formats are chosen, else the dense matrix.
    """
    integers = [x for x in config.number_formats if x.is_integer]
    if not integers:
        return dense_candidate(matrix, clock)
    largest = max(integers, key=lambda x: x.nbytes(matrix.shape))
    return dense_candidates(matrix, Sensitivity(Weighting(), Weighting()), [largest], clock).free()

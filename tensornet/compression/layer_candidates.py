"""All candidates of one layer: families of networks, and number formats."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from tensornet._util import remembering
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
from tensornet.compression.format_candidates import (
    MeasuredSample,
    dense_candidates,
    few_bits,
    layer_formats,
    measure_samples,
    sample_of,
)
from tensornet.compression.latency import Clock
from tensornet.compression.sensitivity import Sensitivity, layer_sensitivity
from tensornet.errors import BudgetError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.encoding import Storage
from tensornet.nn.targets import Target
from tensornet.quantization import NumberFormat
from tensornet.topologies import TopologyFamily, topology_family

#: Layers whose samples are rounded together, and bytes that the moments of one side may take meanwhile.
_LAYERS, _MOMENT_BYTES = 28, 1 << 28


def all_candidates(
    targets: Sequence[Target],
    config: CompressionConfig,
    objective: str,
    stats: CalibrationStats | None,
    clock: Clock | None = None,
) -> Iterator[LayerCandidates]:
    """Build the candidates of each layer within its own caps, a few layers at a time.

    Args:
        targets: the layers.
        config: what to compress and how far.
        objective: see `CompressionConfig`.
        stats: calibration statistics.
        clock: predicts times.

    Raises:
        BudgetError: no candidate is left of a layer.
    """
    few = few_bits(config.number_formats) if config.plans_formats else []
    for some in _chunks(targets):
        with remembering():  # layers that read the same inputs share a moment
            known = [
                layer_sensitivity(target, objective, stats, config.damping, config.rounding)
                for target in some
            ]
        sensitive = [k for k, sensitivity in enumerate(known) if sensitivity is not None]
        measured: dict[int, MeasuredSample] = {}
        if few:
            samples = [sample_of(some[k].matrix, x, few) for k in sensitive if (x := known[k]) is not None]
            measured = dict(zip(sensitive, measure_samples(samples, few), strict=True))
        for k, (target, sensitivity) in enumerate(zip(some, known, strict=True)):
            if sensitivity is None:
                yield _insensitive(target.matrix, config, clock)
            else:
                yield _layer_candidates(target, sensitivity, config, objective, clock, measured.get(k))


def _chunks(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Split layers into runs whose moments fit into a little memory, or single ones."""
    some: list[Target] = []
    size = 0
    for target in targets:
        moments = 8 * sum(x * x for x in target.matrix.shape)
        if some and (len(some) >= _LAYERS or size + moments > _MOMENT_BYTES):
            yield some
            some, size = [], 0
        some.append(target)
        size += moments
    if some:
        yield some


def _layer_candidates(
    target: Target,
    sensitivity: Sensitivity,
    config: CompressionConfig,
    objective: str,
    clock: Clock | None,
    measured: MeasuredSample | None,
) -> LayerCandidates:
    """Build all candidates of one layer.

    Raises:
        BudgetError: none is left.
    """
    matrix = target.matrix
    with remembering():  # every format and encoding asks for the same decompositions
        found = _all_forms(matrix, sensitivity, config, objective, clock, measured)
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
    measured: MeasuredSample | None,
) -> LayerCandidates:
    """Build the candidates of all families and, where they are planned, of all number formats."""
    plain = storage_of(config, objective)
    if not config.plans_formats:
        return _networks(matrix, sensitivity, plain, config, clock)
    formats = layer_formats([matrix], [sensitivity], config.number_formats)
    if formats != config.number_formats:
        measured = None  # in other formats
    found = dense_candidates(matrix, sensitivity, formats, clock, measured, config.number_formats)
    if objective == "weight":
        return found
    parts = [
        _network(matrix, sensitivity, storage, name, config, clock)
        for name in config.calibrated_families
        for storage in _storages(topology_family(name), plain.pivoted, formats)
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

"""Candidates of every layer: networks and number formats, with their sizes and predicted loss increases.

The first candidates are the dense matrix in each number format. How its loss is predicted depends on the kind
of format (see `format_losses`): for floats the matrix is rounded; for integers and levels of 4 or more bits
the moments suffice for most layers; otherwise, a sample of rows is rounded.

The other candidates are the networks of each topology family (`TopologyFamily.ladder`) with each number
format of their cores. Their bonds increase until a network is as large as the matrix in the same format.
Candidates above the lower convex hull of loss over size are dropped, since they are never the best choice.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensornet._util import remembering
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.allocate import Candidate, lower_hull
from tensornet.compression.config import AUTO, DEFAULT_FORMATS, CompressionConfig
from tensornet.compression.sensitivity import Sensitivity, layer_sensitivity
from tensornet.damping import COLUMN_DAMPING, DENSE_COLUMN_DAMPING, DENSE_ROW_DAMPING
from tensornet.errors import BudgetError, FormatError
from tensornet.linalg.svd import energy
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet.nn.storage import PLAIN, Storage, decode, encode
from tensornet.nn.targets import Target
from tensornet.quantization import NumberFormat, Rounding, predict_losses
from tensornet.quantization.grids import GRIDS, grid_of, on_some_grid, recover
from tensornet.quantization.menus import MENUS, bytes_for
from tensornet.quantization.predict import is_predictable, range_losses, spaced_rows
from tensornet.quantization.scales import scale_fault, storable_formats
from tensornet.topologies import TopologyFamily, dense, topology_family
from tensornet.topologies.base import RoundTrip
from tensornet.topologies.dense import round_dense
from tensornet.topologies.registry import topology_of_shape
from tensornet.topology import Topology

#: Smallest number of bits for which the loss of rounding is predicted without rounding anything.
PREDICTED_BITS = 4
#: Number of rows that are sampled to predict the residuals of all rows.
PREDICTED_ROWS = 64
#: Number of rows that are rounded to predict the losses of fewer bits, and of formats with a codebook. Fewer
#: would not suffice, since a few rows may have most of the loss.
ROUNDED_ROWS = 128

#: Cache for the sizes of networks. A ladder is a list of topologies of one family with increasing bonds. Each
#: entry has the number of stored values and the number of bytes of every network of one ladder. Layers of
#: equal shape share entries. The key is the first and the last topology, the number of topologies, the
#: storage of the cores, and the dtype of the model.
Counts = dict[tuple[Topology, Topology, int, Storage, torch.dtype], list[tuple[int, int]]]


class Priced(NamedTuple):
    """A weight whose candidates are to be found.

    Args:
        name: name of the weight, for errors.
        matrix: the weight, shape `(out, in)`.
        sensitivity: sensitivity of the loss to errors of the weight; None if errors do not change the loss.
    """

    name: str
    matrix: Tensor
    sensitivity: Sensitivity | None


def find_candidates(
    targets: Sequence[Target],
    config: CompressionConfig,
    objective: str,
    stats: CalibrationStats | None,
    families: Sequence[str] | None = None,
) -> Iterator[list[Candidate]]:
    """Yield the candidates of each layer as a list; all of them meet the limits on single layers.

    Args:
        targets: the weights to compress.
        config: the options; the limits are `max_bond` and `rel_error`.
        objective: `"weight"`, `"activation"` or `"curvature"`.
        stats: calibration statistics.
        families: topology families of networks; those of the configuration if absent.

    Raises:
        BudgetError: a layer has no candidate left.
        FormatError: a layer is complex, and none of the configured formats stores complex numbers.
    """
    counts: Counts = {}
    for group in groups_by_inputs(targets, config, objective, stats):
        yield from candidates_of_group(group, config, objective, families, counts)


def groups_by_inputs(
    targets: Sequence[Target], config: CompressionConfig, objective: str, stats: CalibrationStats | None
) -> Iterator[list[Priced]]:
    """Yield groups of neighbouring layers with the same inputs; the arguments are those of `find_candidates`.

    Raises:
        FormatError: see `find_candidates`.
    """
    if config.formats and not config.number_formats:
        raise FormatError(
            f"The menu {config.formats!r} has no number formats: the program of this target rounds weights "
            "itself. Write a recipe for it (tensornet recipe), or choose another menu."
        )
    if config.formats and NumberFormat() not in config.number_formats:
        for target in targets:
            if target.matrix.is_complex():
                raise FormatError(
                    f"Layer {target.name!r} has dtype {target.matrix.dtype}, which only the format 'float' "
                    "stores. Add it, as in formats=('float', 'int8'), or leave out the layer "
                    f"(exclude_modules={target.name!r})."
                )

    def inputs(target: Target) -> int:
        """Return a number that neighbouring layers have in common if they have the same inputs."""
        moment = None if stats is None else stats.columns.get(target.name)
        return id(target if moment is None else moment)

    for _, some in groupby(targets, inputs):
        with remembering():  # their sensitivities share the damped moment of the inputs
            group = [
                Priced(x.name, x.matrix, layer_sensitivity(x, objective, stats, config.rounding))
                for x in some
            ]
        yield group


def candidates_of_group(
    group: Sequence[Priced],
    config: CompressionConfig,
    objective: str,
    families: Sequence[str] | None = None,
    counts: Counts | None = None,
) -> list[list[Candidate]]:
    """Find the candidates of layers with the same inputs; all of them meet the limits on single layers.

    Args:
        group: the layers.
        config, objective, families: see `find_candidates`.
        counts: cache of the sizes of networks.

    Raises:
        BudgetError: a layer has no candidate left.
    """
    counts = {} if counts is None else counts
    found = []
    # Layers with the same inputs share a factorized moment, and all number formats need the same
    # decompositions of a layer. Both are cached, and since they are large, not for longer.
    with remembering():
        for layer in group:
            if config.fixed:
                found.append([_given(layer, config)])
            elif layer.sensitivity is None:
                found.append(_insensitive(layer.matrix, config))
            else:
                found.append(_of_layer(layer, layer.sensitivity, config, objective, counts, families))
    return found


def _of_layer(
    layer: Priced,
    sensitivity: Sensitivity,
    config: CompressionConfig,
    objective: str,
    counts: Counts,
    names: Sequence[str] | None,
) -> list[Candidate]:
    """Find all candidates of one layer, and drop those that are never the best choice.

    Raises:
        BudgetError: no candidate is left.
    """
    matrix = layer.matrix
    pivoted = config.method == "auto" and objective != "weight"  # baselines are stored as published
    # With calibration data, chains are not planned, since low rank is better. Nor are residual networks:
    # their losses are known only after rounding, so planning would take six times as long, for 1 % less loss.
    chains = ("mpo",) if config.topology == AUTO else ()
    families = [topology_family(x) for x in (config.families if names is None else names) if x not in chains]
    found: list[Candidate] = []
    if not config.formats:
        for family in families:
            found += network_candidates(matrix, sensitivity, Storage(pivoted=pivoted), family, config, counts)
    else:
        formats = layer_formats([matrix], [sensitivity], config)
        found = dense_candidates(matrix, sensitivity, formats, config.number_formats, config.menu)
        if (grid := grid_of(matrix, _grids_beside(config))) is not None:
            found += dense_candidates(matrix, sensitivity, [grid], target=config.menu)
        limited = config.rel_error is not None or config.param_ratio is not None
        rivals = [] if limited else found  # with these limits, larger networks may be better
        for family in families if objective != "weight" else []:
            for number_format, others in family.encodings(formats):
                storage = Storage(pivoted, number_format=number_format, core_formats=tuple(others.items()))
                known = rivals if number_format.is_integer else []
                more = network_candidates(matrix, sensitivity, storage, family, config, counts, known)
                # The dense matrix is already among the candidates.
                found = [*found, *(x for x in more if x.topology is not None)]
    if config.rel_error is not None:
        found = keep_promise(found, matrix, sensitivity.weighting, config.rel_error)
    if not found:
        raise BudgetError(
            f"Layer {layer.name!r}: no rank up to max_bond={config.max_bond} has a relative error of at "
            f"most rel_error={config.rel_error}."
        )
    return pruned(found) if objective == "curvature" else found  # other objectives have no common budget


def _grids_beside(config: CompressionConfig) -> list[str]:
    """List the formats that are planned only for layers whose weights lie on their grid.

    These are formats of the export target that are not on its menu or, for files of this library, all formats
    of `GRIDS`. Formats that the user has listed are not extended.
    """
    names: Sequence[str] = ()
    if config.method == "auto" and config.formats == DEFAULT_FORMATS:
        names = list(GRIDS)
    elif config.method == "auto" and isinstance(config.formats, str):
        names = MENUS[config.formats].on_request
    return [x for x in names if NumberFormat.parse(x) not in config.number_formats]


def _given(layer: Priced, config: CompressionConfig) -> Candidate:
    """Make the only candidate of a layer for whose shape the configuration gives a topology."""
    matrix, seen = layer.matrix, layer.sensitivity or Sensitivity(Weighting(), Weighting())
    shape = (matrix.shape[0], matrix.shape[1])
    topology = topology_of_shape(config.fixed, shape, f"Layer {layer.name!r}")
    storage = Storage().for_topology(topology)
    made = topology_family(topology.family).fit(matrix, topology, seen.weighting)
    losses = _losses(matrix, made.network.to_matrix(), seen)
    sizes = storage.num_bytes(topology, matrix.dtype), storage.num_params(topology)
    found = Candidate(topology, storage, *sizes, losses.predicted_loss, made.error, losses.cost)
    return found if layer.sensitivity is not None else found.scaled(0.0)


def _insensitive(matrix: Tensor, config: CompressionConfig) -> list[Candidate]:
    """Make the only candidate of a layer with zero gradients: the dense matrix, with no loss increase.

    If integer formats are planned, the matrix is stored in the largest of them.
    """
    integers = [x for x in config.number_formats if x.is_integer and not matrix.is_complex()]
    if not integers:
        return [Candidate(None, PLAIN, matrix.nbytes, matrix.numel(), 0.0, 0.0)]
    largest = max(integers, key=lambda x: x.nbytes(matrix.shape))
    made = dense_candidates(matrix, Sensitivity(Weighting(), Weighting()), [largest])
    return [x.scaled(0.0) for x in made]


def pruned(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Drop candidates above the lower convex hulls of cost over bytes and of cost over parameters.

    No Lagrange multiplier makes such a candidate the best choice. The dense matrix in each number format is
    always kept, since a plan may use one format for all layers.
    """
    costs = [x.cost for x in candidates]
    sizes = [[float(x.num_bytes) for x in candidates], [float(x.params) for x in candidates]]
    kept = {k for size in sizes for k in lower_hull(size, costs)}
    return [x for k, x in enumerate(candidates) if k in kept or x.number_format]


def hull_of(candidates: Sequence[Candidate]) -> tuple[tuple[int, float], ...]:
    """Return those points `(bytes, predicted loss)` of the candidates that are on their lower convex hull."""
    sizes = [x.num_bytes for x in candidates]
    losses = [x.predicted_loss for x in candidates]
    return tuple((sizes[k], losses[k]) for k in lower_hull(sizes, losses))


# --- networks ---------------------------------------------------------------------------------------


def network_candidates(
    matrix: Tensor,
    sensitivity: Sensitivity,
    storage: Storage,
    family: TopologyFamily,
    config: CompressionConfig,
    counts: Counts | None = None,
    rivals: Sequence[Candidate] = (),
) -> list[Candidate]:
    """List the candidates of one topology family and one storage for a matrix, by increasing bond.

    The dense matrix is the last candidate, unless `max_bond` excludes some networks.

    Args:
        matrix: the weight, shape `(out, in)`.
        sensitivity: sensitivity of the loss to errors of the weight.
        storage: how the cores are stored.
        family: a registered topology family.
        config: limits and options of the family; networks with an error above `rel_error` are dropped.
        counts: cache of sizes (see `Counts`); new sizes are added.
        rivals: other candidates of the layer. Networks above the lower convex hull of the rivals' costs over
            bytes are dropped. Since rounding only adds loss, some are dropped before their cores are rounded.

    Raises:
        TopologyError: an option is unknown, or does not fit the matrix.
    """
    counts = {} if counts is None else counts
    options, max_bond = config.family_options, config.max_bond
    rows, columns = matrix.shape
    number_format = storage.number_format
    if number_format.is_integer:  # bisect for the largest bond whose network is smaller than the dense matrix
        limit, low = number_format.nbytes((rows, columns), matrix.dtype), 1
        high = min(rows, columns, max_bond or rows)
        while low < high:
            middle = (low + high + 1) // 2
            size = storage.num_bytes(family.build(rows, columns, max_bond=middle, **options), matrix.dtype)
            low, high = (middle, high) if size < limit else (low, middle - 1)
        max_bond = low
    options = family.search_legs(matrix, sensitivity.weighting, storage.num_params, **options)
    weightings = sensitivity.weighting, sensitivity.forecast
    encoding = None
    if storage.quantized:
        # Predictions assume factors of equal magnitude. But if redundant elements are left out (`pivoted`),
        # one factor has the magnitude of the matrix. If the scales of this factor would be out of range, the
        # loss of the network is measured instead of predicted.
        predicted = number_format.is_integer and not scale_fault(matrix, number_format, sensitivity.weighting)
        encoding = RoundTrip(
            lambda network: round_trip(
                network, storage, matrix.dtype, sensitivity.weighting, sensitivity.rounding
            ),
            number_format if predicted else None,
        )
        if rivals and predicted:
            bound = family.ladder(matrix, weightings, max_bond=max_bond, **options)
            least = [size for _, size in _counted(bound.topologies, storage, matrix.dtype, counts)]
            useful = _below_hull(rivals, least, bound.losses[0].tolist())
            if not useful:
                return []
            max_bond = max(bound.topologies[useful[-1]].bond_dims.values(), default=1)
    ladder = family.ladder(matrix, weightings, max_bond=max_bond, round_trip=encoding, **options)
    known = _counted(ladder.topologies, storage, matrix.dtype, counts)
    (costs, losses), errors = ladder.losses.tolist(), ladder.errors.tolist()
    places: Sequence[int] = range(len(known))
    if rivals:
        places = _below_hull(rivals, [size for _, size in known], costs)
    found = []
    for k in places:
        params, size = known[k]
        saves = params < matrix.numel() or size < matrix.nbytes
        if (config.rel_error is not None and errors[k] > config.rel_error) or (ladder.complete and not saves):
            continue  # a network must save parameters or bytes
        stored = storage.for_topology(ladder.topologies[k])
        tensors = stored.num_tensors(ladder.topologies[k])
        found.append(
            Candidate(
                ladder.topologies[k], stored, size, params, losses[k], errors[k], costs[k], tensors=tensors
            )
        )
    if ladder.complete:
        found.append(Candidate(None, PLAIN, matrix.nbytes, matrix.numel(), 0.0, 0.0))
    return found


def _counted(
    topologies: Sequence[Topology], storage: Storage, dtype: torch.dtype, counts: Counts
) -> list[tuple[int, int]]:
    """Return `(stored values, bytes)` of each topology of a ladder (see `Counts`); `counts` is the cache."""
    key = (topologies[0], topologies[-1], len(topologies), storage, dtype)
    if key not in counts:
        counts[key] = [(storage.num_params(x), storage.num_bytes(x, dtype)) for x in topologies]
    return counts[key]


def _below_hull(rivals: Sequence[Candidate], sizes: Sequence[int], costs: Sequence[float]) -> list[int]:
    """Return indices of the points that are below the lower hull of the rivals or smaller than all rivals.

    Args:
        rivals: candidates that define the hull.
        sizes: bytes of the points.
        costs: costs of the points.
    """
    known = [x.num_bytes for x in rivals], [x.cost for x in rivals]
    hull = lower_hull(*known)
    ends, values = [known[0][k] for k in hull], [known[1][k] for k in hull]
    limits = np.interp(sizes, ends, values, left=np.inf, right=-np.inf)
    return [k for k, (cost, limit) in enumerate(zip(costs, limits, strict=True)) if cost < limit]


def keep_promise(
    candidates: Sequence[Candidate], matrix: Tensor, weighting: Weighting, rel_error: float
) -> list[Candidate]:
    """Drop candidates whose measured error exceeds `rel_error`.

    The errors of candidates are estimates. Rounding cores and fitting them to the loss may both increase the
    Frobenius error. So candidates are decomposed in the order of increasing number of parameters, until one
    has a small enough error. All smaller candidates are dropped.

    Args:
        candidates: candidates of one layer whose estimated errors are small enough.
        matrix: the weight, shape `(out, in)`.
        weighting: the weighting with which a plan decomposes the weight.
        rel_error: largest relative Frobenius error.
    """
    order = sorted(candidates, key=lambda x: x.params)
    place = 0
    while place < len(order):
        topology, storage = order[place].topology, order[place].storage
        if topology is None:
            break
        made = topology_family(topology.family).fit(matrix, topology, weighting)
        error = made.error
        if not storage.plain:
            stored = round_trip(made.network, storage, matrix.dtype, weighting)
            error = relative_gap(matrix, stored.to_matrix())
        if error <= rel_error:
            break
        wanted = order[place].error * rel_error / error
        later, step = range(place + 1, len(order)), max(1, (len(order) - place) // 8)
        place = next((k for k in later if order[k].error < wanted), place + step)
    return order[place:]


def round_trip(
    network: TensorNetwork,
    storage: Storage,
    dtype: torch.dtype,
    weighting: Weighting | None = None,
    rounding: Rounding = "two_sided",
) -> TensorNetwork:
    """Encode the cores of a network for storage, and decode them again, to find the effect of rounding.

    Args:
        network: the network to store.
        storage: how its cores are stored.
        dtype: dtype of the model.
        weighting: sensitivity of the loss to errors of the matrix, for rounding cores to integers.
        rounding: how integers are rounded (see `CompressionConfig`).
    """
    kept = encode(network.topology, storage, network.to(dtype).cores, weighting, rounding)
    # Cores with number formats are decoded to the dtype of the given cores, not to the dtype of the model.
    seen = network.cores[0].dtype if storage.own_dtypes else None
    return TensorNetwork(network.topology, decode(kept.values(), seen))


#: Number of rows that are converted to double precision at a time, so that they fit into the cache.
_ROWS = 64


def relative_gap(matrix: Tensor, other: Tensor) -> float:
    """Compute the relative error `|W - W'|_F / |W|_F` of a matrix `W'` that replaces `W`."""
    gap = size = 0.0
    for exact, found in zip(matrix.split(_ROWS), other.split(_ROWS), strict=True):
        wide = exact.double()
        size += float(wide.square().sum())
        gap += float((wide - found).square().sum())
    return math.sqrt(gap / max(size, 1e-300))


# --- the dense matrix in number formats -------------------------------------------------------------


class FormatLosses(NamedTuple):
    """Predicted losses and error of a dense matrix in one number format.

    Args:
        cost: loss increase under `Sensitivity.weighting`.
        predicted_loss: loss increase under `Sensitivity.forecast`.
        error: relative Frobenius error; an estimate if the matrix was not rounded.
    """

    cost: float
    predicted_loss: float
    error: float


def dense_candidates(
    matrix: Tensor,
    sensitivity: Sensitivity,
    formats: Sequence[NumberFormat],
    names: Sequence[NumberFormat] | None = None,
    target: str | None = None,
) -> list[Candidate]:
    """Make a candidate that stores the dense matrix in each number format, in the order of `formats`.

    Args:
        matrix: the weight, shape `(out, in)`.
        sensitivity: sensitivity of the loss to errors of the weight.
        formats: number formats that this layer may have.
        names: for each of `formats`, the format of the configuration that it replaces in this layer.
        target: export target in whose files the bytes are counted; None for files of this library.
    """
    topology = dense(out_features=matrix.shape[0], in_features=matrix.shape[1])
    losses = format_losses(matrix, sensitivity, formats)
    found = []
    for number_format, asked, loss in zip(formats, names or formats, losses, strict=True):
        stays = number_format == NumberFormat()
        storage = PLAIN if stays else Storage(number_format=number_format)
        found.append(
            Candidate(
                None if stays else topology,
                storage,
                bytes_for(target, number_format, topology.shape, matrix.dtype),
                storage.num_params(topology),
                loss.predicted_loss,
                loss.error,
                loss.cost,
                asked.name,
                storage.num_tensors(topology),
            )
        )
    return found


def format_losses(
    matrix: Tensor, sensitivity: Sensitivity, formats: Sequence[NumberFormat]
) -> list[FormatLosses]:
    """Predict the losses of a dense matrix in each number format, in the order of `formats`.

    - Integers and levels on whose grid all weights lie already: zero (see `grids`).
    - Floats, and integers whose scales are out of range: the matrix is rounded.
    - Integers and levels of at least `PREDICTED_BITS` bits: see `predict_losses`.
    - Fewer bits, and formats with a codebook: some rows are rounded, since clamping, the search for scales
      and coordinate descent decide the loss (see `_losses_of_rows`). So are some rows of a matrix for which
      predictions are not accurate (see `is_predictable`).

    Args:
        matrix: the weight, shape `(out, in)`.
        sensitivity: sensitivity of the loss to errors of the weight.
        formats: number formats.
    """
    exact: list[NumberFormat] = []
    if sensitivity.rounding == "two_sided" and on_some_grid(matrix):
        exact = [x for x in formats if recover(matrix, x) is not None]
    integers = [x for x in formats if x.is_integer and x not in exact]
    integers = [x for x in integers if not scale_fault(matrix, x, sensitivity.weighting)]
    many = [x for x in integers if x.points.run == 1 and x.points.bits >= PREDICTED_BITS]
    if many and not is_predictable(matrix, _fed_back(sensitivity), **_options(sensitivity)):
        many = []
    few = [x for x in integers if x not in many]
    found = dict(zip(many, _predicted(matrix, sensitivity, many), strict=True))
    found |= dict(zip(few, _losses_of_rows(matrix, sensitivity, few), strict=True))
    found |= dict.fromkeys(exact, FormatLosses(0.0, 0.0, 0.0))
    for number_format in (x for x in formats if x not in found):
        topology = dense(out_features=matrix.shape[0], in_features=matrix.shape[1])
        storage, network = Storage(number_format=number_format), TensorNetwork(topology, (matrix,))
        stored = round_trip(network, storage, matrix.dtype, sensitivity.weighting, sensitivity.rounding)
        found[number_format] = _losses(matrix, stored.to_matrix(), sensitivity)
    return [found[x] for x in formats]


def layer_formats(
    matrices: Sequence[Tensor], sensitivities: Sequence[Sensitivity], config: CompressionConfig
) -> tuple[NumberFormat, ...]:
    """Adapt the number formats of a configuration to one layer, or to layers that share a core.

    A format is replaced by the dtype of the model in two cases: if a weight is complex, or if the size of the
    format's super-blocks (for an export target, of its groups) does not divide the number of inputs. If the
    configuration has the default formats and 8-bit scales would be out of range, formats with 16-bit scales
    are used instead.

    Args:
        matrices: the weights.
        sensitivities: sensitivities of the loss to errors of these weights.
        config: the configuration.

    Returns:
        The formats, in the order of the configuration.
    """
    found = tuple(
        x if all(format_fits(x, w, config) for w in matrices) else NumberFormat()
        for x in config.number_formats
    )
    if config.formats == DEFAULT_FORMATS:
        for matrix, sensitivity in zip(matrices, sensitivities, strict=True):
            found = storable_formats(matrix, found, sensitivity.weighting)
    return found


def format_fits(number_format: NumberFormat, matrix: Tensor, config: CompressionConfig) -> bool:
    """Return True if a matrix can be stored in a number format, and in files of the export target, if any."""
    if number_format == NumberFormat():
        return True
    fits = number_format.fits if config.menu is None else number_format.divides
    return not matrix.is_complex() and fits(matrix.shape[1])


def _losses(matrix: Tensor, kept: Tensor, sensitivity: Sensitivity) -> FormatLosses:
    """Compute the losses and the relative error that result if the matrix `kept` replaces `matrix`."""
    error = matrix - kept
    if not bool(error.any()):
        return FormatLosses(0.0, 0.0, 0.0)
    return FormatLosses(
        sensitivity.weighting.cost(error), sensitivity.forecast.cost(error), relative_gap(matrix, kept)
    )


@torch.no_grad()
def _losses_of_rows(
    matrix: Tensor, sensitivity: Sensitivity, formats: Sequence[NumberFormat]
) -> list[FormatLosses]:
    """Round a sample of rows to each format, as all rows would be rounded, and estimate the losses of all.

    The losses of rows are assumed to be in proportion to `range_losses`. If the matrix has no more rows than
    the sample, its losses are exact.
    """
    rows = spaced_rows(matrix, ROUNDED_ROWS)
    if rows is None:
        part, seen = matrix, sensitivity
    else:
        part = matrix[rows]
        weighting, forecast = (_of_rows(x, rows) for x in (sensitivity.weighting, sensitivity.forecast))
        seen = Sensitivity(weighting, forecast, sensitivity.rounding)
    found = []
    for number_format in formats:
        made = round_dense(part, number_format, seen.weighting, rounding=seen.rounding)
        losses = _losses(part, made.dequantize(part.dtype), seen)
        if rows is not None:
            every, some = (
                range_losses(
                    each,
                    number_format,
                    [known.weighting, known.forecast, Weighting()],
                    DENSE_ROW_DAMPING,
                    known.rounding,
                )
                for each, known in ((matrix, sensitivity), (part, seen))
            )
            cost, predicted, plain = torch.where(some > 0, every / some, 0.0).tolist()
            size = plain * _energy(part) / _energy(matrix)
            losses = FormatLosses(
                cost * losses.cost, predicted * losses.predicted_loss, losses.error * size**0.5
            )
        found.append(losses)
    return found


def _energy(matrix: Tensor) -> float:
    return max(sum(float(energy(rows)) for rows in matrix.split(_ROWS)), 1e-300)


def _of_rows(weighting: Weighting, rows: Tensor) -> Weighting:
    """Return the weighting of some rows of a matrix."""
    moment = weighting.rows
    if moment is not None:
        moment = moment[rows] if moment.ndim == 1 else moment[rows][:, rows]
    return Weighting(moment, weighting.columns)


def _predicted(
    matrix: Tensor, sensitivity: Sensitivity, formats: Sequence[NumberFormat]
) -> list[FormatLosses]:
    """Predict the losses and errors of a matrix in integer formats, without rounding it."""
    weightings = [_fed_back(sensitivity), sensitivity.weighting, sensitivity.forecast, Weighting()]
    norm = _energy(matrix)
    sample = spaced_rows(matrix, PREDICTED_ROWS)
    found = predict_losses(matrix, formats, weightings, sample=sample, **_options(sensitivity))
    return [
        FormatLosses(cost, predicted, (2 * plain / norm) ** 0.5)
        for _, cost, predicted, plain in found.tolist()
    ]


def _fed_back(sensitivity: Sensitivity) -> Weighting:
    """Return the moments that rounding uses."""
    known = sensitivity.weighting
    if sensitivity.rounding == "two_sided":
        return known
    return Weighting(None, known.columns if sensitivity.rounding == "one_sided" else None)


def _options(sensitivity: Sensitivity) -> dict[str, Any]:
    """Return the dampings and the method with which `round_dense` rounds a matrix."""
    one_sided = sensitivity.rounding == "one_sided"
    return {
        "row_damping": DENSE_ROW_DAMPING,
        "column_damping": DENSE_COLUMN_DAMPING if one_sided else COLUMN_DAMPING,
        "rounding": sensitivity.rounding,
    }

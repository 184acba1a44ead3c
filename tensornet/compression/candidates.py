"""Candidates of every layer: networks and number formats, with their sizes and predicted loss increases.

The first candidates are the dense matrix in each number format. With 4 or more bits the loss is predicted
from the moments alone. With 2 and 3 bits, clamping and scales matter most. For one-sided rounding, a sample
of rows is rounded. Otherwise, a part of the matrix is rounded, and the prediction is corrected by the
measured loss of this part.

With codebooks, a few rows are rounded. If there is no feedback between rows, coordinate descent then lowers
the loss, by about the same share in all layers.

The other candidates are the networks of each topology family (`TopologyFamily.ladder`) with each number
format of their cores. Their bonds increase until a network is as large as the matrix in the same format.
Candidates above the lower convex hull of loss over size are dropped, since they are never the best choice.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

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
from tensornet.quantization.menus import bytes_for
from tensornet.quantization.predict import spaced_rows
from tensornet.quantization.scales import scale_fault, storable_formats
from tensornet.topologies import TopologyFamily, dense, topology_family
from tensornet.topologies.base import RoundTrip
from tensornet.topologies.dense import round_dense
from tensornet.topologies.registry import topology_of_shape
from tensornet.topology import Topology

#: Smallest number of bits for which the loss of rounding is predicted without rounding anything.
PREDICTED_BITS = 4
#: Number of rows that are sampled to estimate the rounding residuals of all rows.
PREDICTED_ROWS = 64
#: The same for formats with a codebook, whose rows are rounded.
CODEBOOK_ROWS = 32
#: Loss after coordinate descent divided by the loss before, with a codebook and no feedback between rows. In
#: five layers of SmolLM2 with five codebooks each, predictions are 0.92 to 1.04 times the losses of rounding,
#: and with feedback between rows 0.90 to 1.02 times.
_DESCENDED = 0.905
#: To estimate losses of 2 and 3 bits, only a part of a matrix is rounded. These are the numbers of its rows
#: and columns, and of the sweeps of coordinate descent. In integers, a whole matrix gets more sweeps, because
#: each sweep lowers the loss of a small part by 2 to 3 % more than that of the whole matrix.
SAMPLED_ROWS, SAMPLED_COLUMNS, _SWEEPS = 128, 512, 1
#: Largest number of layers whose parts are rounded together, and largest size of their moments in bytes.
_LAYERS, _MOMENT_BYTES = 28, 1 << 28

#: Cache for the sizes of networks. A ladder is a list of topologies of one family with increasing bonds. Each
#: entry has the number of stored values and the number of bytes of every network of one ladder. Layers of
#: equal shape share entries. The key is the first and the last topology, the number of topologies, the
#: storage of the cores, and the dtype of the model.
Counts = dict[tuple[Topology, Topology, int, Storage, torch.dtype], list[tuple[int, int]]]


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
    if config.formats and not config.number_formats:
        raise FormatError(
            f"The menu {config.formats!r} has no number formats: the program of this target rounds weights "
            "itself. Write a recipe for it (tensornet plan --recipe), or choose another menu."
        )
    if config.formats and NumberFormat() not in config.number_formats:
        for target in targets:
            if target.matrix.is_complex():
                raise FormatError(
                    f"Layer {target.name!r} has dtype {target.matrix.dtype}, which only the format 'float' "
                    "stores. Add it, as in formats=('float', 'int8'), or leave out the layer "
                    f"(exclude_modules={target.name!r})."
                )
    few = few_bits(config.number_formats) if config.rounding != "one_sided" else []
    counts: Counts = {}
    for some in _chunks(targets):
        with remembering():  # layers with the same inputs share the factorized moment
            rounding = config.rounding
            known = [layer_sensitivity(x, objective, stats, config.damping, rounding) for x in some]
        corrections: dict[int, Corrections] = {}
        if few:
            sensitive = {
                k: x for k, x in enumerate(known) if x is not None and not some[k].matrix.is_complex()
            }
            found = losses_of_parts([(some[k].matrix, x) for k, x in sensitive.items()], few)
            corrections = dict(zip(sensitive, found, strict=True))
        # All number formats need the same decompositions of a layer, so decompositions are cached. Since they
        # are large, a cache is cleared after the layers with the same input, which share a factorized moment.
        inputs = [0 if x is None else id(x.weighting.columns) for x in known]
        for _, places in groupby(range(len(some)), inputs.__getitem__):
            with remembering():
                run = [
                    [_given(some[k], known[k], config)]
                    if config.fixed
                    else _insensitive(some[k].matrix, config)
                    if (sensitivity := known[k]) is None
                    else _of_layer(
                        some[k], sensitivity, config, objective, counts, corrections.get(k), families
                    )
                    for k in places
                ]
            yield from run


def _chunks(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Split layers into lists of at most `_LAYERS` layers, with at most `_MOMENT_BYTES` of moments each.

    A layer whose moments are larger is a list by itself.
    """
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


def _of_layer(
    target: Target,
    sensitivity: Sensitivity,
    config: CompressionConfig,
    objective: str,
    counts: Counts,
    corrections: "Corrections | None",
    names: Sequence[str] | None,
) -> list[Candidate]:
    """Find all candidates of one layer, and drop those that are never the best choice.

    Raises:
        BudgetError: no candidate is left.
    """
    matrix = target.matrix
    pivoted = objective != "weight" if config.pivoted is None else config.pivoted
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
        if formats != config.number_formats:
            corrections = None  # the corrections were measured with other formats
        found = dense_candidates(
            matrix, sensitivity, formats, corrections, config.number_formats, config.menu
        )
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
            f"Layer {target.name!r}: no rank up to max_bond={config.max_bond} has a relative error of at "
            f"most rel_error={config.rel_error}."
        )
    return pruned(found) if objective == "curvature" else found  # other objectives have no common budget


def _given(target: Target, sensitivity: Sensitivity | None, config: CompressionConfig) -> Candidate:
    """Make the only candidate of a layer for whose shape the configuration gives a topology."""
    matrix, seen = target.matrix, sensitivity or Sensitivity(Weighting(), Weighting())
    shape = (matrix.shape[0], matrix.shape[1])
    topology = topology_of_shape(config.fixed, shape, f"Layer {target.name!r}")
    storage = Storage(pivoted=bool(config.pivoted)).for_topology(topology)
    made = topology_family(topology.family).fit(matrix, topology, seen.weighting)
    losses = _losses(matrix, made.network.to_matrix(), seen)
    sizes = storage.num_bytes(topology, matrix.dtype), storage.num_params(topology)
    found = Candidate(topology, storage, *sizes, losses.predicted_loss, made.error, losses.cost)
    return found if sensitivity is not None else found.scaled(0.0)


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
    options, max_bond = config.family_options(family.name), config.max_bond
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


#: For each format of `few_bits`, the measured and the predicted losses of a part of a matrix.
Corrections = Mapping[NumberFormat, tuple[FormatLosses, FormatLosses]]


def dense_candidates(
    matrix: Tensor,
    sensitivity: Sensitivity,
    formats: Sequence[NumberFormat],
    corrections: Corrections | None = None,
    names: Sequence[NumberFormat] | None = None,
    target: str | None = None,
) -> list[Candidate]:
    """Make a candidate that stores the dense matrix in each number format, in the order of `formats`.

    Args:
        matrix: the weight, shape `(out, in)`.
        sensitivity: sensitivity of the loss to errors of the weight.
        formats: number formats that this layer may have.
        corrections: see `format_losses`.
        names: for each of `formats`, the format of the configuration that it replaces in this layer.
        target: export target in whose files the bytes are counted; None for files of this library.
    """
    topology = dense(out_features=matrix.shape[0], in_features=matrix.shape[1])
    losses = format_losses(matrix, sensitivity, formats, corrections)
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
    matrix: Tensor,
    sensitivity: Sensitivity,
    formats: Sequence[NumberFormat],
    corrections: Corrections | None = None,
) -> list[FormatLosses]:
    """Predict the losses of a dense matrix in each number format, in the order of `formats`.

    Predictions for 2 and 3 bits are corrected by the measured losses of a part of the matrix, except with
    one-sided rounding. For floats, and for integers whose scales are out of range, the whole matrix is
    rounded.

    Args:
        matrix: the weight, shape `(out, in)`.
        sensitivity: sensitivity of the loss to errors of the weight.
        formats: number formats.
        corrections: losses of a part of the matrix, computed by `losses_of_parts` if absent; a single call of
            that function for several matrices is faster.
    """
    coarse = [x for x in formats if scale_fault(matrix, x, sensitivity.weighting)]
    integers = [x for x in formats if x.is_integer and x not in coarse]
    found = {}
    for number_format in (x for x in formats if x not in integers):
        topology = dense(out_features=matrix.shape[0], in_features=matrix.shape[1])
        storage, network = Storage(number_format=number_format), TensorNetwork(topology, (matrix,))
        stored = round_trip(network, storage, matrix.dtype, sensitivity.weighting, sensitivity.rounding)
        found[number_format] = _losses(matrix, stored.to_matrix(), sensitivity)
    books = [x for x in integers if x.points.run > 1]
    for some, count in (([x for x in integers if x not in books], PREDICTED_ROWS), (books, CODEBOOK_ROWS)):
        predicted = _predicted(matrix, sensitivity, some, spaced_rows(matrix, count))
        found |= dict(zip(some, predicted, strict=True))
    few = few_bits(integers)
    if few and sensitivity.rounding != "one_sided":
        known = corrections or losses_of_parts([(matrix, sensitivity)], few)[0]
        for x in few:
            if x in known:
                values = zip(found[x], *known[x], strict=True)
                found[x] = FormatLosses(*(a * real / told if told > 0 else real for a, real, told in values))
    if sensitivity.rounding == "two_sided" and not sensitivity.weighting.full:
        for x in books:
            cost, predicted_loss, relative = found[x]
            found[x] = FormatLosses(_DESCENDED * cost, _DESCENDED * predicted_loss, relative)
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


def few_bits(formats: Sequence[NumberFormat]) -> list[NumberFormat]:
    """List the integer formats with fewer than 4 bits but without a codebook; see `losses_of_parts`."""
    return [x for x in formats if x.is_integer and x.points.run == 1 and x.points.bits < PREDICTED_BITS]


def part_of(
    matrix: Tensor, sensitivity: Sensitivity, formats: Sequence[NumberFormat]
) -> tuple[Tensor, Sensitivity]:
    """Select the part of a matrix that is rounded to measure losses: some rows, and some groups of columns.

    Returns:
        The part, and the sensitivity of the loss to errors in this part.
    """
    rows = spaced_rows(matrix, SAMPLED_ROWS)
    if rows is None:
        rows = torch.arange(len(matrix), device=matrix.device)
    size = matrix.shape[1]
    width = max(x.span or size for x in formats)
    columns, count = torch.arange(size, device=matrix.device), max(1, SAMPLED_COLUMNS // width)
    if -(-size // width) > count:
        kept = torch.linspace(0, size // width - 1, count).long().tolist()
        columns = torch.cat([columns[k * width : (k + 1) * width] for k in dict.fromkeys(kept)])

    def some(moment: Tensor | None, places: Tensor) -> Tensor | None:
        if moment is None:
            return None
        return moment[places] if moment.ndim == 1 else moment[places][:, places]

    weighting, forecast = (
        Weighting(some(x.rows, rows), some(x.columns, columns))
        for x in (sensitivity.weighting, sensitivity.forecast)
    )
    return matrix[rows][:, columns], Sensitivity(weighting, forecast, sensitivity.rounding)


@torch.no_grad()
def losses_of_parts(
    layers: Sequence[tuple[Tensor, Sensitivity]], formats: Sequence[NumberFormat]
) -> list[Corrections]:
    """Measure the losses of a part of each matrix when it is rounded to 2 and 3 bits, and predict them too.

    Parts of equal shape are stacked and rounded together, since the overhead of many small calls would be
    larger than the arithmetic. Formats that do not fit a matrix are skipped.

    Args:
        layers: pairs of a weight and the sensitivity of the loss to its errors.
        formats: the result of `few_bits`.

    Returns:
        Measured and predicted losses of the part of each matrix, by format.
    """
    fitting = [[x for x in formats if x.fits(matrix.shape[1])] for matrix, _ in layers]
    parts = {k: part_of(*layers[k], some) for k, some in enumerate(fitting) if some}
    groups: dict[Hashable, list[int]] = {}
    for k, (part, seen) in parts.items():
        kind = (*fitting[k], part.shape, part.dtype, part.device, part.shape == layers[k][0].shape)
        groups.setdefault(kind if seen.weighting.full else k, []).append(k)
    found: list[Corrections] = [{} for _ in layers]
    for places in groups.values():
        some = [parts[k] for k in places]
        weights, seen = some[0]
        weighting = seen.weighting
        if len(some) > 1:
            weights = torch.stack([part for part, _ in some])
            rows, columns = (
                torch.stack([m for _, each in some if (m := getattr(each.weighting, side)) is not None])
                for side in ("rows", "columns")
            )
            weighting = Weighting(rows, columns)
        sweeps = None if some[0][0].shape == layers[places[0]][0].shape else _SWEEPS
        measured: list[dict[NumberFormat, FormatLosses]] = [{} for _ in places]
        with remembering():  # moments are factorized once for all formats
            for number_format in fitting[places[0]]:
                made = round_dense(weights, number_format, weighting, sweeps, seen.rounding)
                kept = made.dequantize(weights.dtype)
                matrices = kept.view(-1, *kept.shape[-2:])
                for losses, (part, each), matrix in zip(measured, some, matrices, strict=True):
                    losses[number_format] = _losses(part, matrix, each)
        for k, (part, each), known in zip(places, some, measured, strict=True):
            told = zip(known, _predicted(part, each, list(known)), strict=True)
            found[k] = {x: (known[x], losses) for x, losses in told}
    return found


def _losses(matrix: Tensor, kept: Tensor, sensitivity: Sensitivity) -> FormatLosses:
    """Compute the losses and the relative error that result if the matrix `kept` replaces `matrix`."""
    error = matrix - kept
    if not bool(error.any()):
        return FormatLosses(0.0, 0.0, 0.0)
    return FormatLosses(
        sensitivity.weighting.cost(error), sensitivity.forecast.cost(error), relative_gap(matrix, kept)
    )


def _predicted(
    matrix: Tensor,
    sensitivity: Sensitivity,
    formats: Sequence[NumberFormat],
    sample: Tensor | None = None,
) -> list[FormatLosses]:
    """Predict the losses and errors of a matrix in integer formats, without rounding it."""
    known = sensitivity.weighting  # the moments that rounding uses
    if sensitivity.rounding != "two_sided":
        known = Weighting(None, known.columns if sensitivity.rounding == "one_sided" else None)
    weightings = [known, sensitivity.weighting, sensitivity.forecast, Weighting()]
    norm = max(sum(float(energy(rows)) for rows in matrix.split(_ROWS)), 1e-300)
    found = predict_losses(
        matrix,
        formats,
        weightings,
        row_damping=DENSE_ROW_DAMPING,
        column_damping=DENSE_COLUMN_DAMPING if sensitivity.rounding == "one_sided" else COLUMN_DAMPING,
        rounding=sensitivity.rounding,
        sample=sample,
    )
    return [
        FormatLosses(cost, predicted, (2 * plain / norm) ** 0.5)
        for _, cost, predicted, plain in found.tolist()
    ]

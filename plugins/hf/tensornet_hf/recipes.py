"""Recipes for `llama-quantize`: a type for each tensor, chosen by losses under llama.cpp's rounding.

`llama-quantize --tensor-type-file` reads such a recipe, so a plan needs no rounding by this library. The
program rounds to the nearest point of a type, with scales searched under the mean squares of the inputs. Its
errors are larger than those of our rounding, so a recipe has its own survey: some rows of each matrix are
rounded by llama.cpp's code (the package `libgguf`), and the loss increase of their errors is predicted from
the moments of a survey.

GGUF stacks the experts of a layer in one tensor with a single type, whose predicted loss is their sum.
"""

import math
import re
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensornet._util import compact_bytes, import_optional
from tensornet.calibration.stats import CalibrationStats
from tensornet.calibration.walk import Loaded
from tensornet.compression.allocate import Candidate, CostCurve, SurveyedLayer, spend_size
from tensornet.compression.config import CompressionConfig
from tensornet.compression.sensitivity import Sensitivity, layer_sensitivity
from tensornet.compression.surveying import survey_or_load
from tensornet.errors import BudgetError, FormatError, TargetError
from tensornet.io import write_file
from tensornet.linalg.svd import OF_LAYER, check_finite
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.extension import ProvidedData
from tensornet.nn.storage import PLAIN
from tensornet.nn.targets import Target, find_targets
from tensornet.nn.unfuse import unfused
from tensornet.quantization.menus import MENUS, Menu
from tensornet.quantization.predict import spaced_rows
from tensornet_hf.checkpoint import resolve_folder
from tensornet_hf.compress import CompressOptions, OptionError, calibration_batches, open_source, text_of
from tensornet_hf.exporters.base import refuse_mixtures
from tensornet_hf.exporters.gguf import Place, empty_layout, find_places
from tensornet_hf.exporters.gguf_converter import ConvertedTensor
from tensornet_hf.imatrix import Importance, read_imatrix
from tensornet_hf.manifest import draft_heads

#: Types of llama.cpp that recipes use, by increasing size.
TYPES = (
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_0", "IQ4_NL", "Q4_K",
    "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0", "BF16",
)  # fmt: skip
#: Types to which `llama-quantize` rounds only with an importance matrix.
NEED_IMPORTANCE = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
#: Type of matrices that are not planned.
UNPLANNED = "BF16"
#: Type of draft heads: transformers does not run them, so that nothing is known about their inputs.
DRAFT_TYPE = "Q8_0"
#: Menu of plans for `llama-quantize`. It has no number formats, since the program rounds weights itself.
LLAMA_QUANTIZE = "llama-quantize"
MENUS.add(LLAMA_QUANTIZE, Menu((), whole_model=True))
#: Number of rows that are rounded to predict the loss of a type: of a matrix, and of an expert.
ROWS_OF_MATRIX, EXPERT_ROWS = 64, 8
#: Tensors whose types are options of `llama-quantize` of their own.
OPTIONS = {"token_embd.weight": "--token-embedding-type", "output.weight": "--output-tensor-type"}
#: Bytes that `llama-quantize` may add to the metadata: names of the importance matrix and of its text.
IMATRIX_METADATA = 512
#: Type of tensors that are not in the file; every tensor that the program quantizes is in it.
DEFAULT_TYPE = "q4_k"
_SPECIAL = re.compile(r"([.^$|()\[\]{}*+?\\])")


class SurveyedTensor(NamedTuple):
    """Tensor of a GGUF file, with the size and the loss of each type that fits.

    Args:
        name: name in the file.
        sizes: bytes by type.
        costs: loss by type for choosing types, in the same unit for all tensors (see `Candidate.cost`).
        losses: predicted loss by type.
    """

    name: str
    sizes: Mapping[str, int]
    costs: Mapping[str, float]
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Recipe:
    r"""A type for each tensor of a GGUF file.

    Args:
        types: type of every tensor that `llama-quantize` quantizes, by name.
        sizes: bytes of these tensors, by name.
        num_bytes: bytes of the file, with `IMATRIX_METADATA` for what `llama-quantize` adds to its metadata.
        predicted: sum of the losses of all tensors.
        unit: meaning and unit of `predicted`, such as `"loss increase in nats per token"`.
        notes: remarks about the recipe for the user.
        importance: importance matrix of the model, by name of the tensor, if inputs were observed.
        drafts: bytes of draft heads in `DRAFT_TYPE`, by number of their block.

    Example:
        >>> name = "blk.0.attn_q.weight"
        >>> recipe = th.Recipe({name: "Q5_K"}, {name: 704}, 1216, 0.1, "nats")
        >>> print(recipe.text)
        ^blk\.0\.attn_q\.weight$=q5_k
    """

    types: Mapping[str, str]
    sizes: Mapping[str, int]
    num_bytes: int
    predicted: float
    unit: str
    notes: tuple[str, ...] = ()
    importance: Mapping[str, Importance] = field(default_factory=dict, compare=False, repr=False)
    drafts: Mapping[int, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Content of the file for `--tensor-type-file`: a line for each tensor, with an anchored pattern.

        `llama-quantize` takes the first pattern that matches, and converts the file to lower case.

        Raises:
            TargetError: the name of a tensor has capital letters, so that no pattern can match.
        """
        lines = []
        for name, kind in self.types.items():
            if name in OPTIONS:
                continue
            if name != name.lower():
                raise TargetError(
                    f"llama-quantize converts recipes to lower case, so no recipe can name the tensor "
                    f"{name!r}. Write the file by tensornet compress instead."
                )
            pattern = _SPECIAL.sub(r"\\\1", name)
            lines.append(f"^{pattern}$={kind.lower()}")
        lines += [rf"^blk\.{block}\..*weight$={DRAFT_TYPE.lower()}" for block in self.drafts]
        return "\n".join(lines)

    def command(self, recipe: str = "plan.txt", imatrix: str = "im.gguf") -> str:
        """Return the command that writes the GGUF file; an importance matrix of `""` is left out."""
        words = ["llama-quantize", "--pure", *(["--imatrix", imatrix] if imatrix else [])]
        words += ["--tensor-type-file", recipe]
        options = {option: self.types[name] for name, option in OPTIONS.items() if name in self.types}
        if "output.weight" not in self.types and "token_embd.weight" in self.types:
            # Without a head, llama.cpp versions differ in which of the two options the embedding follows.
            options["--output-tensor-type"] = self.types["token_embd.weight"]
        for option, kind in options.items():
            words += [option, kind.lower()]
        return shlex.join([*words, "model-bf16.gguf", "out.gguf", DEFAULT_TYPE])

    def save(self, path: str | Path) -> None:
        """Write the file for `--tensor-type-file`.

        Raises:
            DestinationError: the file cannot be written.
            TargetError: see `text`.
        """
        write_file(Path(path), [f"{self.text}\n".encode()], what="The recipe")

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return {
            "types": dict(self.types),
            "tensor_bytes": dict(self.sizes),
            "file_bytes": self.num_bytes,
            "predicted": self.predicted,
            "unit": self.unit,
            "draft_bytes": dict(self.drafts),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        counts = Counter(self.types.values())
        order = [*TYPES, *sorted(counts.keys() - set(TYPES))]
        kinds = ", ".join(f"{counts[kind]} {kind}" for kind in order if kind in counts)
        total = sum(self.sizes.values())
        lines = [
            f"tensors     {len(self.types)}: {kinds}",
            f"bytes       {compact_bytes(total)} of these tensors, file {compact_bytes(self.num_bytes)}",
            f"predicted   {self.predicted:.4g} {self.unit}",
        ]
        return "\n".join([*lines, *(f"note        {x}" for x in self.notes)])


def choose_types(tensors: Sequence[SurveyedTensor], num_bytes: float) -> dict[str, str]:
    """Choose a type for each tensor, so that all tensors fit into `num_bytes` at a small sum of costs.

    This is a heuristic: types on the lower convex hull of cost over size, by a Lagrange multiplier, and the
    remaining bytes greedily. For few tensors the sum can be larger than the least possible one.

    Raises:
        BudgetError: the smallest types need more bytes.

    Example:
        >>> from tensornet_hf.recipes import SurveyedTensor, choose_types
        >>> sizes, costs = {"Q4_K": 4, "Q6_K": 6}, ({"Q4_K": 0.1, "Q6_K": 0.01}, {"Q4_K": 3.0, "Q6_K": 0.3})
        >>> choose_types([SurveyedTensor(name, sizes, x, x) for name, x in zip("ab", costs)], 10)
        {'a': 'Q4_K', 'b': 'Q6_K'}
    """
    curves = [
        CostCurve(
            torch.tensor([float(x.sizes[kind]) for kind in x.costs], dtype=torch.float64),
            torch.tensor([x.costs[kind] for kind in x.costs], dtype=torch.float64),
        )
        for x in tensors
    ]
    chosen = spend_size(curves, num_bytes)
    return {x.name: list(x.costs)[k] for x, k in zip(tensors, chosen, strict=True)}


# --- losses of the types of llama.cpp ---------------------------------------------------------------


def type_bytes(kind: str, shape: Sequence[int]) -> int | None:
    """Compute the bytes of a tensor in a GGUF type.

    Args:
        kind: name of the type.
        shape: shape `(..., rows, columns)`.

    Returns:
        The bytes; None if the rows do not consist of complete blocks, or the type is unknown.

    Example:
        >>> from tensornet_hf.recipes import type_bytes
        >>> type_bytes("Q4_K", (2, 256)), type_bytes("Q4_K", (2, 64))
        (288, None)
    """
    gguf = import_optional("gguf", extra="gguf", user="Recipes for llama-quantize")
    number = getattr(gguf.GGMLQuantizationType, kind, None)
    if number is None:
        return None
    block, size = gguf.GGML_QUANT_SIZES[number]
    return math.prod(shape) // block * size if shape[-1] % block == 0 else None


def round_rows(rows: Tensor, kind: str, importance: Tensor | None) -> Tensor:
    """Round rows of a matrix to a type of llama.cpp, as `llama-quantize` does.

    Args:
        rows: float32, shape `(rows, in)`.
        kind: name of the type.
        importance: mean squares of the inputs, shape `(in,)`; None without an importance matrix.
    """
    if kind == "BF16":
        return rows.bfloat16().float()
    libgguf = import_optional("libgguf", extra="gguf", user="Predicting losses of llama.cpp's types")
    weights = None if importance is None else importance.float().cpu().contiguous().numpy()
    number = libgguf.GGMLQuantizationType[kind]
    packed = libgguf.quantize_rows(rows.cpu().contiguous().numpy(), number, imatrix=weights)
    values = libgguf.dequantize_rows(packed, number, n_per_row=rows.shape[1])
    return torch.from_numpy(np.ascontiguousarray(values)).reshape(rows.shape).to(rows.device)


def type_losses(
    matrix: Tensor, weightings: Sequence[Weighting], importance: Tensor | None, count: int = ROWS_OF_MATRIX
) -> dict[str, list[float]]:
    """Predict the losses of a matrix in each type that fits, from the errors of some rows.

    The loss of a row is assumed to be proportional to the mean square of its outputs. So the loss of the
    chosen rows is multiplied by the sum over all rows, and divided by the sum over the chosen ones.

    Args:
        matrix: the weight, shape `(out, in)`.
        weightings: weightings of the loss, with the diagonal of the gradient moment.
        importance: see `round_rows`.
        count: number of rows to round.

    Returns:
        A loss for each weighting, by type.
    """
    weight = matrix.float()
    sample = spaced_rows(weight, count)
    part = weight if sample is None else weight[sample]
    sides = []
    for weighting in weightings:
        rows, columns = weighting.rows, weighting.columns
        rows = weight.new_ones(len(weight)) if rows is None else rows
        rows = (rows if rows.ndim == 1 else rows.diagonal()).double()
        columns = weight.new_ones(weight.shape[1]) if columns is None else columns.to(weight)
        diagonal = columns if columns.ndim == 1 else columns.diagonal()
        known = rows * (weight.square() @ diagonal).double()
        some = known if sample is None else known[sample]
        factor = float(known.sum() / some.sum()) if float(some.sum()) > 0 else 0.0
        sides.append((factor * (rows if sample is None else rows[sample]), columns))
    found = {}
    for kind in TYPES:
        if type_bytes(kind, weight.shape) is None or (importance is None and kind in NEED_IMPORTANCE):
            continue
        error = part - round_rows(part, kind, importance)
        found[kind] = [
            0.5
            * float(
                ((error * (error * c if c.ndim == 1 else error @ c)).sum(1, dtype=torch.float64) * r).sum()
            )
            for r, c in sides
        ]
    return found


def type_candidates(
    targets: Sequence[Target],
    config: CompressionConfig,
    *,
    stats: CalibrationStats,
    names: frozenset[str] | None = None,
) -> Iterator[list[Candidate]]:
    """Yield a candidate for each type of llama.cpp that fits a layer; the function `find` of a survey.

    Args:
        targets: the weights.
        config: the configuration, for its damping.
        stats: statistics with gradients.
        names: layers that the importance matrix of `llama-quantize` contains; all that read activations if
            absent.
    """
    for target in targets:
        importance = _importance(target, stats, names)
        sensitivity = layer_sensitivity(target, "curvature", stats, "nearest")
        seen = sensitivity or Sensitivity(Weighting(), Weighting())
        count = EXPERT_ROWS if target.kinds[0].name == "part" else ROWS_OF_MATRIX
        losses = type_losses(target.matrix, (seen.weighting, seen.forecast), importance, count)
        scale = 0.0 if sensitivity is None else 1.0  # errors do not change the loss if all gradients are zero
        yield [
            _candidate(kind, target.matrix, scale * cost, scale * loss)
            for kind, (cost, loss) in losses.items()
        ]


def _importance(target: Target, stats: CalibrationStats, names: frozenset[str] | None) -> Tensor | None:
    """Return the mean squares of a layer's inputs that `llama-quantize` will know."""
    for name, kind in zip(target.names, target.kinds, strict=True):
        # llama.cpp looks up embeddings, and has no importance for them even if the head shares them.
        if kind.name == "embedding" or (names is not None and name not in names):
            return None
        if name in stats.columns:
            moment = stats.columns[name]
            return moment if moment.ndim == 1 else moment.diagonal()
    return None


def _candidate(kind: str, matrix: Tensor, cost: float, loss: float) -> Candidate:
    return Candidate(None, PLAIN, _bytes(kind, matrix.shape), matrix.numel(), loss, 0.0, cost, kind)


def losses_by_inputs(
    targets: Iterable[Target], inputs: Mapping[str, Tensor], loaded: Loaded
) -> Iterator[SurveyedLayer]:
    """Predict losses as the relative error of a layer's outputs, from mean squares of its inputs alone.

    Without gradients it is unknown how much an error of a layer's outputs matters. Here the same relative
    error counts equally in every layer. For layers without known inputs, the error of the weight is used.

    Args:
        targets: the weights.
        inputs: mean squares of the inputs by name of the layer, shape `(in,)`.
        loaded: context in which the weights of given modules are in memory.

    Reference:
        Malinovskii et al. 2024, "Pushing the Limits of Large Language Model Quantization via the Linearity
        Theorem" (the loss is linear in squared relative errors, with a factor for each layer).
    """
    for target in targets:
        with loaded(list(target.modules), dtype=None):
            matrix = target.matrix
            check_finite(matrix, f"Layer {target.name!r}", OF_LAYER)
            known = inputs.get(target.name)
            count = EXPERT_ROWS if target.kinds[0].name == "part" else ROWS_OF_MATRIX
            losses = type_losses(matrix, (Weighting(None, known),), known, count)
            columns = torch.ones(matrix.shape[1]) if known is None else known
            energy = max(0.5 * float((matrix.float().cpu().square() @ columns).double().sum()), 1e-300)
            found = [
                _candidate(kind, matrix, loss / energy, loss / energy) for kind, (loss,) in losses.items()
            ]
            yield SurveyedLayer.of(target, found)


# --- tensors of the file ----------------------------------------------------------------------------


def _owners(place: Place, shape: Sequence[int]) -> list[list[tuple[str, int]]]:
    """List, for each matrix of a tensor, the layers of its rows and the numbers of these rows."""
    ends, layers = np.cumsum(list(place.layers.values())), list(place.layers)
    owners = np.searchsorted(ends, place.rows, side="right").reshape(math.prod(shape[:-2]), -1)
    found = []
    for row in owners:
        numbers, counts = np.unique(row, return_counts=True)
        found.append([(layers[k], int(count)) for k, count in zip(numbers, counts, strict=True)])
    return found


def layer_inputs(
    entries: Mapping[str, Importance],
    places: Mapping[str, Place],
    shapes: Mapping[str, Sequence[int]],
    what: str,
) -> dict[str, Tensor]:
    """Convert an importance matrix to mean squares of the inputs of layers.

    Args:
        entries: the importance matrix, by name of the tensor.
        places: the layers of each tensor of the file.
        shapes: shapes of these tensors.
        what: name of the importance matrix, for error messages.

    Raises:
        TargetError: the importance matrix belongs to another model, or has no tokens of an expert.
    """
    found: dict[str, Tensor] = {}
    if entries and not any(name in places for name in entries):
        raise TargetError(
            f"{what} belongs to another model: it names {next(iter(entries))!r}, and the tensors of this "
            f"model are {', '.join(list(places)[:2])}, ... Give the importance matrix of this model."
        )
    for name, place in places.items():
        if name in OPTIONS or name not in entries:
            continue
        owners = _owners(place, shapes[name])
        squares, counts = entries[name]
        if squares.numel() != len(owners) * place.width or (len(counts) not in (1, len(owners))):
            raise TargetError(
                f"{what} belongs to another model: {name!r} has {squares.numel():,} numbers for "
                f"{len(counts)} matrices, but the tensor needs {len(owners)} times {place.width:,}. Give the "
                "importance matrix of this model."
            )
        squares = squares.reshape(len(owners), place.width)
        alive = squares.any(1) & (counts > 0)
        if not bool(alive.all()):
            dead = (~alive).nonzero().flatten().tolist()
            which = f"expert {', '.join(map(str, dead[:4]))}{', ...' if len(dead) > 4 else ''} of "
            raise TargetError(
                f"{what}: no tokens reached {which if len(owners) > 1 else ''}{name!r}, so nothing is known "
                "about its inputs. Collect the importance matrix on more text, or leave it out and give a "
                "calibration text (calibration=), where such an expert gets the mean of its mixture."
            )
        back = torch.from_numpy(np.argsort(place.columns))
        for own, values in zip(owners, squares, strict=True):
            found |= {layer: values[back] for layer, _ in own}
    missing = [name for name in places if name not in entries and name not in OPTIONS]
    if missing:
        raise TargetError(
            f"{what} has no entry for {missing[0]!r} ({len(missing)} of {len(places)} tensors are missing). "
            "It may belong to another model; or give a calibration text (calibration=) instead."
        )
    return found


def file_importance(
    inputs: Mapping[str, tuple[Tensor, int]], places: Mapping[str, Place], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Importance]:
    """Make the importance matrix of a GGUF file from mean squares of the inputs of layers.

    An expert without tokens has the mean squares of its mixture, and counts as one token.

    Args:
        inputs: mean squares, shape `(in,)`, and numbers of tokens, by name of the layer.
        places, shapes: see `layer_inputs`.
    """
    found = {}
    for name, place in places.items():
        owners = _owners(place, shapes[name])
        first = [own[0][0] for own in owners]
        if name == "token_embd.weight" or not all(layer in inputs for layer in first):
            continue
        squares = torch.stack([inputs[layer][0][torch.from_numpy(place.columns)] for layer in first])
        counts = torch.tensor([max(inputs[layer][1], 1) for layer in first])
        found[name] = Importance(squares, counts)
    return found


def sum_over_layers(
    layers: Sequence[SurveyedLayer], places: Mapping[str, Place], shapes: Mapping[str, Sequence[int]]
) -> list[SurveyedTensor]:
    """Add up the predicted losses of the layers of each tensor, for every type that fits all of them.

    Args:
        layers: the surveyed layers; the types are the names of their number formats.
        places, shapes: see `layer_inputs`.

    Returns:
        The tensors of which all layers are surveyed.
    """
    known = {name: x for x in layers for name in x.names}
    found = []
    for name, place in places.items():
        if not known.keys() >= place.layers.keys():
            continue
        rows = Counter[str]()
        for own in _owners(place, shapes[name]):
            rows.update(dict(own))
        # If the rows of a layer are divided between tensors, its loss is divided like the rows.
        shares = {layer: count / known[layer].shape[0] for layer, count in rows.items()}
        options = [({x.number_format: x for x in known[y].candidates}, share) for y, share in shares.items()]
        kinds = [x for x in TYPES if all(x in candidates for candidates, _ in options)]
        costs = {x: sum(share * candidates[x].cost for candidates, share in options) for x in kinds}
        losses = {
            x: sum(share * candidates[x].predicted_loss for candidates, share in options) for x in kinds
        }
        found.append(SurveyedTensor(name, {x: _bytes(x, shapes[name]) for x in kinds}, costs, losses))
    return found


def _bytes(kind: str, shape: Sequence[int]) -> int:
    size = type_bytes(kind, shape)
    assert size is not None
    return size


# --- recipes for a model ----------------------------------------------------------------------------


def plan_recipe(
    source: str | Path,
    *,
    max_bytes: int | None = None,
    bits_per_weight: float | None = None,
    calibration: str | Path | Sequence[str | Path] | ProvidedData = (),
    imatrix: str | Path | None = None,
    formats: Sequence[str] = (),
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    survey: str | Path | None = None,
    weights: str | Path | None = None,
    calibration_tokens: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Recipe:
    """Plan the types with the smallest loss under `llama-quantize` at a given size; no weight is written.

    With a calibration text, the loss increase of llama.cpp's own rounding is predicted for every type. If an
    importance matrix is given too, the mean squares of the inputs are taken from it, and the gradients from
    the text. With an importance matrix alone, the relative errors of the layers' outputs are compared.

    Args:
        source: model folder, or hub id if there is no folder of that name.
        max_bytes: size of the GGUF file. Give this or `bits_per_weight`.
        bits_per_weight: mean number of bits over the tensors of the recipe.
        calibration, calibration_tokens: see `CompressOptions`.
        imatrix: importance matrix of the model, as a GGUF file or a legacy file.
        formats: types of llama.cpp that the recipe may use, such as `("q4_k", "q6_k")`; all of `TYPES` if
            empty.
        target_modules, exclude_modules: choice of layers (see `CompressionConfig`); all others get the type
            BF16.
        survey, weights, device, progress: see `CompressOptions`.

    Raises:
        OptionError: no budget or two of them are given, or neither a text nor an importance matrix.
        FormatError: an unknown type, or none of the types fits a tensor; or a file is damaged.
        TargetError: the converter does not support the model, or the importance matrix is that of another
            model or lacks an expert.
        BudgetError: the budget cannot be met.
        MissingDependencyError: the extra `gguf` is not installed.

    Example:
        >>> recipe = th.plan_recipe(
        ...     th.embedded.gpt2_path(),
        ...     max_bytes=1_200_000,
        ...     calibration="default",
        ...     calibration_tokens=512,
        ...     formats=("q8_0", "q4_0"),
        ... )
        >>> recipe.num_bytes <= 1_200_000
        True
    """
    kinds = check_types(formats)
    if (max_bytes is None) == (bits_per_weight is None):
        raise OptionError("A recipe needs one budget: max_bytes= (bytes) or bits_per_weight=.")
    options = CompressOptions(
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        survey=survey,
        weights=weights,
        device=device,
        progress=progress,
    )
    if not options.calibration and imatrix is None:
        raise OptionError(
            "A recipe needs to know how errors affect the model: give a text, calibration=, or an importance "
            "matrix, imatrix=, or both."
        )
    if survey is not None and not options.calibration:
        raise OptionError("survey= is made on a text; add calibration=, or leave out survey=.")
    config = CompressionConfig(
        max_bytes=max_bytes,
        bits_per_weight=bits_per_weight,
        formats=LLAMA_QUANTIZE,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
    )
    folder = resolve_folder(source)
    entries = {} if imatrix is None else read_imatrix(imatrix)
    with tempfile.TemporaryDirectory() as folder_of_states:
        work = Path(folder_of_states)
        lazy, opened = open_source(folder, options, work, runs=True)
        model: Any = lazy.model
        refuse_mixtures(model)
        with unfused(model):
            chosen = [x for x in find_targets(model, config) if not x.skip]
            names = [x.name for x in chosen]
        writer, tensors, places = find_places(model, folder, names)
        shapes = {name: tensors[name].shape for name in places}
        inputs = (
            layer_inputs(entries, places, shapes, f"The importance matrix {imatrix}") if entries else None
        )

        # Predict the losses of every layer in all types.
        notes: list[str] = []
        if options.calibration:
            data = calibration_batches(model, folder, config, options, text_of(options, folder))
            assert data is not None
            # Types are chosen for each tensor of the file, so a survey is needed, but no plan for layers.
            made = survey_or_load(
                model,
                list(data.batches),
                config,
                survey,
                tokens=calibration_tokens,
                loss_fn=data.loss_fn,
                source=data.source,
                states=opened.states("surveyed"),
                loaded=opened.loaded,
                device=opened.device,
                inputs=inputs,
                find=partial(type_candidates, names=None if inputs is None else frozenset(inputs)),
                progress=progress,
            )
            layers, unit = made.layers, "loss increase in nats per token"
            importance = entries or file_importance(made.inputs, places, shapes)
            if made.template.unrouted:
                notes.append(
                    f"{len(made.template.unrouted)} experts got no token; their mixture stands for them"
                )
        else:
            assert inputs is not None
            with unfused(model):
                found = [x for x in find_targets(model, config) if not x.skip]
                layers = tuple(losses_by_inputs(found, inputs, opened.loaded))
            unit = "sum of the squared relative errors of the layers' outputs"
            importance = entries
            notes.append(
                "an importance matrix says nothing about gradients: the plan cannot know which layers matter "
                "more for the loss, nor how much the loss increases; add a calibration text"
            )

    surveyed = [with_types(x, kinds) for x in sum_over_layers(layers, places, shapes)]
    drafts = {
        block: sum(_draft_bytes(lazy.source.tensors[name].shape) for name in names)
        for block, names in draft_heads(lazy).items()
    }
    notes += [
        f"draft head (MTP) in block {block}, {compact_bytes(size)}, gets {DRAFT_TYPE}: transformers does not "
        "run it, so nothing is known about its inputs"
        for block, size in drafts.items()
    ]
    return _recipe(writer, tensors, surveyed, config, unit, notes, importance, drafts)


def _draft_bytes(shape: Sequence[int]) -> int:
    """Return the bytes of a tensor of a draft head; vectors are stored in float32."""
    return (type_bytes(DRAFT_TYPE, shape) if len(shape) > 1 else None) or 4 * math.prod(shape)


def _recipe(
    writer: Any,
    tensors: Mapping[str, ConvertedTensor],
    surveyed: Sequence[SurveyedTensor],
    config: CompressionConfig,
    unit: str,
    notes: Sequence[str],
    importance: Mapping[str, Importance],
    drafts: Mapping[int, int],
) -> Recipe:
    """Choose the types of a file's tensors. Matrices not surveyed keep 16 bits, and vectors are float32.

    Args:
        writer, tensors: results of `find_places`.
        surveyed: the tensors of which some types have a predicted loss.
        config: the budget.
        unit, notes, importance, drafts: see `Recipe`.

    Raises:
        BudgetError: the budget cannot be met.
    """
    known = {x.name: x for x in surveyed}
    kept = [name for name, x in tensors.items() if name not in known and not x.float32 and len(x.shape) > 1]
    smallest = {name: min(x.sizes, key=x.sizes.__getitem__) for name, x in known.items()}
    layout = empty_layout(writer, tensors, smallest | dict.fromkeys(kept, UNPLANNED))
    fixed = layout.nbytes - sum(layout.parts[name][1] for name in known)
    fixed += (IMATRIX_METADATA if importance else 0) + sum(drafts.values())
    weights = sum(math.prod(tensors[name].shape) for name in known)
    if config.max_bytes is None:
        assert config.bits_per_weight is not None
        size = config.bits_per_weight / 8 * weights
    elif config.max_bytes <= fixed:
        raise BudgetError(
            f"max_bytes={config.max_bytes:,} is too small: what is outside of the recipe (vocabulary, "
            f"metadata, other tensors) takes {fixed:,} bytes. Allow more."
        )
    else:
        size = config.max_bytes - fixed
    chosen = choose_types(surveyed, size)
    if kept:
        shown = ", ".join(kept[:3]) + (", ..." if len(kept) > 3 else "")
        notes = [*notes, f"{len(kept)} tensors are not planned and get {UNPLANNED}: {shown}"]
    types = chosen | dict.fromkeys(kept, UNPLANNED)
    types = {name: types[name] for name in tensors if name in types}  # in the order of the file
    sizes = {name: _bytes(kind, tensors[name].shape) for name, kind in types.items()}
    return Recipe(
        types,
        sizes,
        fixed + sum(sizes[name] for name in known),
        sum(known[name].losses[kind] for name, kind in chosen.items()),
        unit,
        tuple(notes),
        importance,
        drafts,
    )


def check_types(types: Sequence[str]) -> tuple[str, ...]:
    """Check the names of types, and return them in capital letters; all of `TYPES` if there are none.

    Raises:
        FormatError: an unknown type; the message lists the known ones.
    """
    found = tuple(dict.fromkeys(x.upper() for x in types))
    if unknown := [x for x in found if x not in TYPES]:
        raise FormatError(
            f"Recipes have no type {', '.join(unknown).lower()}; choose from {', '.join(TYPES).lower()}."
        )
    return found or TYPES


def with_types(tensor: SurveyedTensor, kinds: Sequence[str]) -> SurveyedTensor:
    """Return a tensor with some of its types.

    Raises:
        FormatError: none of these types fits.
    """
    costs = {kind: cost for kind, cost in tensor.costs.items() if kind in kinds}
    if not costs:
        raise FormatError(
            f"None of the types {', '.join(kinds).lower()} fits the rows of {tensor.name!r}; llama-quantize "
            f"would silently take another one. Add one of {', '.join(tensor.costs).lower()}."
        )
    return tensor._replace(costs=costs)

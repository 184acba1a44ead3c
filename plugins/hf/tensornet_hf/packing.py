"""Pack fine-tuned models of one base: each becomes a small change of the base, priced by its own loss.

A fine-tuned model differs a little from its base in every weight. `pack` stores the difference of each
matrix in the number format or low rank that a plan chooses for it, by the curvature of the fine-tuned model's
loss on its own text. The difference is taken to the base as it is stored: if the base is rounded, the change
repairs errors of the base where this costs few bytes. Biases, norms and other small tensors stay as they are,
and so do a tokenizer, a chat template and generation settings that differ from those of the base.

Packed models are specialists (`PretrainedSpecialists`): one base in memory, with a model for each row.

Reference:
    Liu et al. 2024, "BitDelta" (one bit and a scale for each matrix of the difference).
"""

import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

import tensornet as tn
from tensornet._util import compact_bytes
from tensornet.compression.allocate import SurveyedLayer
from tensornet.compression.apply import set_submodule
from tensornet.compression.config import DEFAULT_FORMATS, SHARED_BUDGETS, CompressionConfig
from tensornet.compression.loss_increase import LossIncrease, RecordedLosses, measure, record_losses
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.compression.survey import Survey
from tensornet.compression.surveying import survey_or_load
from tensornet.errors import BudgetError, CalibrationWarning, DestinationError, TargetError
from tensornet.network import TensorNetwork
from tensornet.nn.embedding import embedding_from_network
from tensornet.nn.extension import ProvidedData
from tensornet.nn.layer_kinds import LayerKind, ScaledEmbedding, embedding_scale, kind_of, layer_kind
from tensornet.nn.linear import linear_from_network
from tensornet.nn.module import NetworkModule
from tensornet.topologies import dense
from tensornet_hf.checkpoint import load, read_dense, resolve_folder
from tensornet_hf.compress import CompressOptions, OptionError, calibration_batches, text_of
from tensornet_hf.specialist_files import (
    DESCRIPTION,
    PretrainedSpecialists,
    load_specialists,
    read_description,
    text_files,
)
from tensornet_hf.text import load_tokenizer
from tensornet_moe.changed_layers import Change, attach_changes, changes_of
from tensornet_moe.specialist_layers import check_name

#: Number formats of changes. They have no outliers, so that one scale for each row is enough.
CHANGE_FORMATS = ("int8:row", "int4:row", "int3:row", "int2:row", "int1:row")
#: File by which a folder of PEFT is recognized.
_ADAPTER = "adapter_config.json"
#: Largest number of elements of a tensor that is stored as it is, since it is no matrix of a layer.
_LARGEST_VALUE = 1 << 20
#: Smallest cosine of the weights of a model and of its base; models that were trained apart have about zero.
_LEAST_COSINE = 0.5
#: Largest factor by which the matrix of a change is multiplied, and the powers of factors that are tried.
_LARGEST_FACTOR, _POWERS = 8.0, (0.0, 0.25, 0.5, 0.75, 1.0)


class _Sum(nn.Module):
    """A layer of the base plus the difference of a fine-tuned model, as two layers.

    If `exact` is set, the layer computes with this difference in place of `scale * change`, and sums up two
    products over its inputs: of the outputs of `exact` with themselves, and with those of `change`.
    """

    def __init__(self, base_layer: nn.Module, change: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.change, self.scale = base_layer, change, 1.0
        self.exact: nn.Module | None = None
        self.exact_exact = self.exact_change = 0.0

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        change: Tensor = self.change(x)
        if self.exact is None:
            return y + self.scale * change.to(y.dtype)
        exact: Tensor = self.exact(x)
        self.exact_exact += float(exact.square().sum())
        self.exact_change += float((exact * change).sum())
        return y + exact.to(y.dtype)


@dataclass(frozen=True)
class PackedModel:
    """Facts on one fine-tuned model in a pack.

    Args:
        bytes: bytes of its change, with all tensors that are stored as they are.
        bits_per_weight: bytes of the changes of its matrices in bits, divided by their elements.
        measured: measured loss increase and divergence from the fine-tuned model, on calibration text.
        base: the same of the base alone.
        layers: number of layers by what is stored for their matrix.
        seconds: time that it took.
    """

    bytes: int
    bits_per_weight: float
    measured: LossIncrease | None
    base: LossIncrease | None
    layers: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class PackReport:
    """Result of `pack`; `print` shows a row for each model.

    Args:
        destination: the folder.
        models: facts on the models of this call, by name.
        others: names of the models that the folder contained before; their files did not change.

    Example:
        >>> from tensornet_hf.packing import PackedModel
        >>> law = PackedModel(240_000, 0.48, None, None, {"low_rank int4:row": 30}, seconds=60.0)
        >>> print(th.PackReport("pack", {"law": law}, others=("code",)))
        fine-tuned model             bytes    bits   KL divergence  of the base
        law                         240 kB   0.480
        unchanged: code
        written to  pack
    """

    destination: str
    models: dict[str, PackedModel]
    others: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'fine-tuned model':24}{'bytes':>10}{'bits':>8}{'KL divergence':>16}{'of the base':>13}"]
        for name, x in self.models.items():
            found = (None if y is None else y.kl_mean for y in (x.measured, x.base))
            kl, of_base = ("" if y is None else f"{y:.4f}" for y in found)
            numbers = f"{compact_bytes(x.bytes):>10}{x.bits_per_weight:>8.3f}{kl:>16}{of_base:>13}"
            lines.append(f"{name:24}{numbers}".rstrip())
        if self.others:
            lines.append(f"unchanged: {', '.join(self.others)}")
        return "\n".join([*lines, f"written to  {self.destination}"])


def pack(
    base: str | Path,
    destination: str | Path,
    fine_tuned: Mapping[str, str | Path],
    config: CompressionConfig | None = None,
    *,
    calibration: str | Path | Mapping[str, str | Path] = "default",
    calibration_tokens: int | None = None,
    shared_budget: bool = False,
    surveys: str | Path | None = None,
    progress: bool = False,
) -> PackReport:
    """Store fine-tuned models as small changes of their base, in a folder of specialists.

    Each model is surveyed and planned on its own, and its change is rounded to the plan; then it is added to
    the folder. A call that was interrupted has packed the first models completely: repeat it with the others.
    The base, one fine-tuned model and their difference are in memory, in float32. `load_specialists` loads
    the folder. The loss of a packed model is not predicted, but measured on its calibration text.

    Args:
        base: folder or hub id of the base, dense or compressed by this library. The folder refers to it.
        destination: a new folder, or one that this function wrote for this base. The files of the models that
            it contains do not change.
        fine_tuned: folders or hub ids of the models by name, of the class and shapes of the base; or folders
            of LoRA adapters that PEFT has written for the base.
        config: budget, layers and formats. `bits_per_weight` counts the changes of matrices, and `max_bytes`
            the bytes of each model; without a budget, 0.5 bits per weight. Formats are `CHANGE_FORMATS` and
            low ranks unless the configuration lists others. The effort is always `"thorough"`.
        calibration: text like the later input of each model, as in `CompressOptions`, by the name of the
            model; or one for all.
        calibration_tokens: see `CompressOptions`.
        shared_budget: plan all models of this call together, within a budget for all: `max_bytes` is then the
            sum over the models, and `bits_per_weight` the mean. A model that differs more from the base gets
            more.
        surveys: folder for the survey of each model, which takes most of the time: `NAME.safetensors` is read
            if it exists, and written otherwise. With it, other budgets can be tried in a fraction of the
            time.
        progress: show progress bars.

    Raises:
        TargetError: a model is of another base, class, vocabulary or shape, or is equal to the base; or the
            folder is of another base.
        ValueError: a name is taken or not a word.
        OptionError: there are no models, `calibration` names none of the models, or a budget is shared by
            changes that are not surveyed (`method`).
        BudgetError, FormatError, DestinationError: see `tensornet.compress` and
            `PretrainedSpecialists.save`.

    Example:
        >>> base, text = th.embedded.gpt2_path(), th.embedded.heldout_text()
        >>> model = th.load(base)
        >>> _ = model.transformer.h[0].mlp.c_fc.weight.data.mul_(1.01)
        >>> _ = th.save(model, "tuned", source=base)
        >>> report = th.pack(base, "pack", {"law": "tuned"})
        >>> th.load_specialists("pack").names, report.models["law"].layers
        (['law'], {'low_rank int4:row': 1})
    """
    if not fine_tuned:
        raise OptionError("pack needs fine-tuned models: {name: folder}.")
    texts = calibration if isinstance(calibration, Mapping) else dict.fromkeys(fine_tuned, calibration)
    if wrong := sorted(fine_tuned.keys() ^ texts.keys()):
        raise OptionError(
            f"calibration= needs a text for each of {', '.join(fine_tuned)} and for no others; "
            f"check {', '.join(wrong)}."
        )
    target, folder = Path(destination).expanduser().absolute(), resolve_folder(base)
    there = tuple(read_description(target).specialists) if (target / DESCRIPTION).is_file() else ()
    for k, name in enumerate(fine_tuned):
        check_name(name, [*there, *list(fine_tuned)[:k]])
    config = _with_defaults(config)
    found: dict[str, PackedModel] = {}
    with ExitStack() as stack:
        files = Path(surveys or stack.enter_context(tempfile.TemporaryDirectory())).expanduser()
        try:
            files.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DestinationError(f"{files} is no folder for surveys: {error}. Name another.") from error

        def prepared(name: str) -> _Prepared:
            options = CompressOptions(calibration=str(texts[name]), calibration_tokens=calibration_tokens)
            file = files / f"{name}.safetensors"
            return _prepared(folder, name, fine_tuned[name], config, options, file, progress)

        plans: dict[str, CompressionPlan] = {}
        if shared_budget:
            plans = _plans_together({name: _Surveyed.of(prepared(name)) for name in fine_tuned}, config)
        for name in fine_tuned:
            ready = prepared(name)
            plan = plans.get(name) or _plan_alone(ready, config)
            change, found[name] = _packed(ready, plan, progress)
            model = load(folder)
            if (target / DESCRIPTION).is_file():
                s = _with_change(load_specialists(target, model), name, change)
            else:
                attach_changes(model, {name: change})
                s = PretrainedSpecialists(model)
            if ready.own_text:
                s.tokenizers[name] = _folder_of(fine_tuned[name])
            s.save(target, trunk=str(base))
    return PackReport(str(destination), found, there)


def _with_defaults(config: CompressionConfig | None) -> CompressionConfig:
    """Set the effort, formats of changes unless others are given, and 0.5 bits unless a budget is given."""
    config = CompressionConfig() if config is None else config
    # A fast plan has no low ranks, so that a change would take at least one bit per weight.
    changes: dict[str, Any] = {"target_modules": config.target_modules or "all", "effort": "thorough"}
    if all(getattr(config, budget) is None for budget in SHARED_BUDGETS):
        changes["bits_per_weight"] = 0.5
    if config.formats is None or config.formats == DEFAULT_FORMATS:
        changes["formats"] = CHANGE_FORMATS
    return replace(config, **changes)


@dataclass(frozen=True)
class _Prepared:
    """A fine-tuned model as its base with sums as layers, and what is known of it.

    Args:
        name: its name.
        model: the base with sums as layers; it computes what the fine-tuned model does.
        sums: the sums by the name of the layer.
        owners: the first layer with the same weights, for each layer.
        values: values that replace those of the base, by layer and name.
        kept: bytes of these values.
        config: the configuration, with the differences as the layers to compress.
        data: the calibration data.
        survey: survey of the differences; None if the plan needs none.
        before: the losses of the fine-tuned model.
        base: how much the base differs from the fine-tuned model.
        own_text: True if its tokenizer, chat template or generation settings are not those of the base.
        started: time at which the work on this model began.
    """

    name: str
    model: PreTrainedModel
    sums: dict[str, _Sum]
    owners: dict[str, str]
    values: dict[str, dict[str, Tensor]]
    kept: int
    config: CompressionConfig
    data: ProvidedData | None
    survey: Survey | None
    before: RecordedLosses | None
    base: LossIncrease | None
    own_text: bool
    started: float


def _prepared(
    folder: Path,
    name: str,
    source: str | Path,
    config: CompressionConfig,
    options: CompressOptions,
    file: Path,
    progress: bool,
) -> _Prepared:
    """Load a fine-tuned model and its base, and survey their differences, unless the file has the survey."""
    started = time.perf_counter()
    base = load(folder, dtype=torch.float32)
    fine = _fine_tuned(folder, base, name, source)
    text = text_of(options, folder)
    data = calibration_batches(fine, folder, config, options, text)
    given, loss_fn = ([], None) if data is None else ([*data.batches], data.loss_fn)
    before = record_losses(fine, given, loss_fn=loss_fn)
    of_base = None if before is None else measure(base, before)
    own_text = _speaks_otherwise(base, folder, fine, _folder_of(source))
    values, sums = _as_sums(base, fine, name)
    del fine
    config = replace(config, target_modules=[f"{layer}.change" for layer in sums])
    kept = sum(x.nbytes for of_layer in values.values() for x in of_layer.values())
    _check_bytes(config, kept)
    survey = None
    if data is not None and given and config.reads_data and sums:
        survey = survey_or_load(
            base, given, config, file, loss_fn=loss_fn, source=data.source, progress=progress
        )
    first: dict[int, str] = {}
    return _Prepared(
        name,
        base,
        sums,
        {layer: first.setdefault(id(x.change.weight), layer) for layer, x in sums.items()},
        values,
        kept,
        config,
        data,
        survey,
        before,
        of_base,
        own_text,
        started,
    )


class _Surveyed(NamedTuple):
    """What a plan for several fine-tuned models needs of one of them; see `_Prepared`."""

    survey: Survey | None
    kept: int

    @classmethod
    def of(cls, model: _Prepared) -> "_Surveyed":
        """Keep the survey without the moments of the layers, which take memory."""
        known = None if model.survey is None else replace(model.survey, factors={}, inputs={}, heads={})
        return cls(known, model.kept)


def _budget_of_matrices(config: CompressionConfig, layers: Sequence[SurveyedLayer], kept: int) -> float:
    """Return the budget of a plan in bits per weight; if it is `max_bytes`, converted.

    Args:
        config: the configuration.
        layers: the surveyed differences.
        kept: bytes of tensors that are stored as they are.

    Raises:
        BudgetError: the bytes are too few.
    """
    if config.max_bytes is None:
        assert config.bits_per_weight is not None
        return config.bits_per_weight
    _check_bytes(config, kept, sum(min(x.num_bytes for x in layer.candidates) for layer in layers))
    return 8 * (config.max_bytes - kept) / sum(x.numel for x in layers)


def _check_bytes(config: CompressionConfig, kept: int, least: int = 1) -> None:
    """Raise BudgetError if `max_bytes` is too small.

    Args:
        config: the configuration.
        kept: bytes of tensors that are stored as they are.
        least: bytes of the smallest changes of matrices, if they are known.
    """
    if config.max_bytes is not None and config.max_bytes < kept + least:
        more = f", and the smallest changes of matrices {least:,}" if least > 1 else ""
        raise BudgetError(
            f"max_bytes={config.max_bytes:,} is too small: biases, norms and other tensors that are stored "
            f"as they are take {kept:,} bytes{more}. Allow more."
        )


def _plan_alone(model: _Prepared, config: CompressionConfig) -> CompressionPlan | CompressionConfig:
    """Plan one fine-tuned model; without a survey, its configuration is all that there is to plan."""
    if model.survey is None:
        if config.max_bytes is not None:
            raise OptionError(
                f"max_bytes= needs a plan by the loss, which method={config.method!r} does not make; use "
                "bits_per_weight=."
            )
        return model.config
    if config.max_bytes is None:
        return model.survey.plan()
    return model.survey.plan(bits_per_weight=_budget_of_matrices(config, model.survey.layers, model.kept))


def _plans_together(models: Mapping[str, _Surveyed], config: CompressionConfig) -> dict[str, CompressionPlan]:
    """Plan several fine-tuned models within one budget, so that the sum of their losses is the least.

    Raises:
        OptionError: a model was not surveyed.
        BudgetError: the budget cannot be met.
    """
    surveys = {name: x.survey for name, x in models.items() if x.survey is not None}
    if missing := sorted(models.keys() - surveys.keys()):
        raise OptionError(
            f"shared_budget=True needs a plan by the loss for each model, but {missing[0]} has none: it "
            f"changes no matrix, or method={config.method!r} needs no loss. Pack it in a call of its own."
        )
    layers = [
        replace(layer, names=tuple(f"{name}: {x}" for x in layer.names))
        for name, survey in surveys.items()
        for layer in survey.layers
    ]
    budget = _budget_of_matrices(config, layers, sum(x.kept for x in models.values()))
    first = next(iter(surveys.values()))
    plan = replace(first, layers=tuple(layers)).plan(bits_per_weight=budget)
    planned, plans = iter(plan.layers), {}
    for name, survey in surveys.items():
        own = [replace(next(planned), name=layer.name) for layer in survey.layers]
        plans[name] = replace(survey.template, layers=tuple(own))
    return plans


def _packed(
    ready: _Prepared, plan: CompressionPlan | CompressionConfig, progress: bool
) -> tuple[dict[str, Change], PackedModel]:
    """Find the change of each layer for one fine-tuned model, by the name of the layer."""
    model, sums, owners, before = ready.model, ready.sums, ready.owners, ready.before
    exact = {layer: x.change for layer, x in sums.items()}
    planned: Sequence[LayerPlan] = ()
    if sums:
        with warnings.catch_warnings():
            # Loss increases are predicted for errors that are independent of each other. The parts of a
            # change that are left out all pull the model back to its base, so predictions are far too small.
            warnings.filterwarnings("ignore", "Compression increased the loss", CalibrationWarning)
            made = tn.compress(model, plan, calibration=ready.data, survey=ready.survey, progress=progress)
        planned = made.plan.layers
    measured = None if before is None else _scale(model, sums, exact, owners, before)
    changes: dict[str, Change] = {}
    for layer in dict.fromkeys([*sums, *ready.values]):
        matrix = _as_network(sums[layer].change) if layer in sums else None
        if matrix is not None and owners[layer] != layer:
            matrix.share_cores(changes[owners[layer]].matrix)  # type: ignore[arg-type]
        scale = sums[layer].scale if layer in sums else 1.0
        changes[layer] = Change(matrix, ready.values.get(layer, {}), scale)
    families: dict[str, int] = {}
    for x in planned:
        scheme = x.storage.number_format.name
        if x.topology is not None and x.topology.family != "dense":
            scheme = f"{x.topology.family} {scheme}"
        families[scheme] = families.get(scheme, 0) + 1
    facts = PackedModel(
        made.plan.bytes_after + ready.kept if planned else ready.kept,
        made.plan.bits_per_weight if planned else 0.0,
        measured,
        ready.base,
        families,
        time.perf_counter() - ready.started,
    )
    return changes, facts


def _scale(
    model: nn.Module,
    sums: Mapping[str, _Sum],
    exact: Mapping[str, nn.Module],
    owners: Mapping[str, str],
    before: RecordedLosses,
) -> LossIncrease:
    """Choose the factors of all changes, on calibration data, in place.

    A rounded or truncated change `q` of a matrix has a smaller effect than the exact change `d`, in all
    layers in the same direction, back to the base. The factor `<d x, d x> / <q x, d x>` over the inputs `x`
    restores its effect, and increases the remaining error. Powers of these factors are tried; the first is 1.

    Args:
        model: the base with sums as layers.
        sums: the sums, with the changes of the plan.
        exact: the exact changes, as layers.
        owners: the first layer with the same weights, for each layer.
        before: the losses of the fine-tuned model.
    """
    for layer, x in sums.items():
        x.exact = exact[layer]
    measure(model, before)
    products: dict[str, list[float]] = {}
    for layer, x in sums.items():
        x.exact = None
        of_owner = products.setdefault(owners[layer], [0.0, 0.0])
        of_owner[0] += x.exact_exact
        of_owner[1] += x.exact_change
    factors = {x: min(max(a / b, 1.0), _LARGEST_FACTOR) if b > 0 else 1.0 for x, (a, b) in products.items()}
    best: tuple[float, float, LossIncrease] | None = None
    for power in _POWERS:
        _set_scales(sums, owners, factors, power)
        found = measure(model, before)
        divergence = found.mean if found.kl_mean is None else found.kl_mean
        if best is None or divergence < best[0]:
            best = divergence, power, found
    assert best is not None
    _set_scales(sums, owners, factors, best[1])
    return best[2]


def _set_scales(
    sums: Mapping[str, _Sum], owners: Mapping[str, str], factors: Mapping[str, float], power: float
) -> None:
    for layer, x in sums.items():
        x.scale = factors[owners[layer]] ** power


def _fine_tuned(folder: Path, base: PreTrainedModel, name: str, source: str | Path) -> PreTrainedModel:
    """Load a fine-tuned model in float32: a whole model, or a LoRA adapter that is merged into the base.

    Raises:
        TargetError: the model cannot be one of this base.
    """
    place = _folder_of(source)
    if (place / _ADAPTER).is_file():
        from tensornet_hf.peft import load_adapters, merge_adapters

        dense: PreTrainedModel = tn.decompress(load(folder, dtype=torch.float32))  # type: ignore[assignment]
        fine = merge_adapters(load_adapters(dense, place)).eval()
    else:
        read_dense(place)
        fine = load(place, dtype=torch.float32)
        _check_vocabulary(folder, place, name)
    if type(fine) is not type(base):
        raise TargetError(
            f"{name!r} is a {type(fine).__name__}, but the base is a {type(base).__name__}. Give the base of "
            "which the model was made."
        )
    return fine


def _folder_of(source: str | Path) -> Path:
    """Return the folder of a fine-tuned model or of an adapter."""
    place = Path(source).expanduser()
    return place if (place / _ADAPTER).is_file() else resolve_folder(source)


def _speaks_otherwise(
    base: PreTrainedModel, folder: Path, fine: PreTrainedModel, folder_of_fine: Path
) -> bool:
    """Return True if a model's tokenizer, chat template or generation settings differ from its base's."""
    settings = [
        {} if x.generation_config is None else x.generation_config.to_diff_dict() for x in (base, fine)
    ]
    old, new = ({k: x for k, x in y.items() if k != "transformers_version"} for y in settings)
    files = text_files(folder_of_fine)
    files.pop(
        GENERATION_CONFIG_NAME, None
    )  # compared above, since models without this file have settings too
    return old != new or any(
        not (folder / name).is_file() or (folder / name).read_bytes() != file.read_bytes()
        for name, file in files.items()
    )


def _check_vocabulary(base: Path, fine: Path, name: str) -> None:
    """Raise TargetError if the tokenizers of two folders map some token to different numbers."""
    try:
        own, theirs = (load_tokenizer(x).get_vocab() for x in (base, fine))
    except (OSError, ValueError):  # a folder without tokenizer: only the shapes can be compared
        return
    moved = [x for x, number in own.items() if theirs.get(x, number) != number]
    if moved or not own.keys() <= theirs.keys():
        raise TargetError(
            f"{name!r} has another vocabulary than the base: {len(moved)} tokens have other numbers, and "
            f"{len(own.keys() - theirs.keys())} are missing. Give the base of which the model was made."
        )


@torch.no_grad()
def _as_sums(
    base: PreTrainedModel, fine: PreTrainedModel, name: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, _Sum]]:
    """Turn the base into the fine-tuned model, in place: base layers plus dense differences, and own values.

    Returns:
        Values that replace those of the base, by layer and name; and the new sums by the name of the layer.

    Raises:
        TargetError: the models have other layers or shapes, have unrelated weights, or are equal.
    """
    values: dict[str, dict[str, Tensor]] = {}
    sums: dict[str, _Sum] = {}
    changes: dict[int, nn.Parameter] = {}  # of tied weights
    dot = own_square = base_square = 0.0
    for layer, module in list(fine.named_modules()):
        tensors = dict(_own_tensors(module))
        if not tensors:
            continue
        try:
            old = base.get_submodule(layer)
        except AttributeError:
            raise _other_base(name, f"it has a layer {layer!r}") from None
        kind = kind_of(module)
        if kind is not None:
            matrix, before = kind.matrix(module), _matrix_of(old)
            if before is None or before.shape != matrix.shape:
                got = "no such matrix" if before is None else f"shape {tuple(before.shape)}"
                raise _other_base(name, f"{layer}.weight has shape {tuple(matrix.shape)}, in the base {got}")
            weight = module.weight
            assert isinstance(weight, Tensor)
            del tensors["weight"]
            if id(weight) not in changes:
                before = before.to(matrix)
                dot += float((before * matrix).sum())
                own_square += float(matrix.square().sum())
                base_square += float(before.square().sum())
            if id(weight) in changes or not torch.equal(before.to(matrix), matrix):
                change = _layer_like(kind, module, matrix - before)
                change.weight = changes.setdefault(id(weight), change.weight)  # type: ignore[arg-type]
                sums[layer] = _Sum(old, change)
        there = dict(_own_tensors(old))
        for key, value in tensors.items():
            if key not in there or there[key].shape != value.shape:
                raise _other_base(name, f"{layer}.{key} has the shape {tuple(value.shape)}")
            if torch.equal(there[key].to(value), value):
                continue
            if value.numel() > _LARGEST_VALUE:
                raise TargetError(
                    f"{name!r} changes {layer}.{key} of shape {tuple(value.shape)}, which is no matrix of a "
                    "linear layer or embedding, and too large to be stored as it is. Models whose experts "
                    "were trained cannot be packed."
                )
            values.setdefault(layer, {})[key] = value.detach().clone()
            there[key].copy_(value)
    if dot < _LEAST_COSINE * (own_square * base_square) ** 0.5:
        cosine = dot / max((own_square * base_square) ** 0.5, 1e-30)
        raise _other_base(name, f"the cosine of both models' weights is {cosine:.2f}")
    if not sums and not values:
        raise TargetError(f"{name!r} is equal to its base; leave it out.")
    for layer, made in sums.items():
        set_submodule(base, layer, made)
    return values, sums


def _other_base(name: str, why: str) -> TargetError:
    return TargetError(f"{name!r} is of another base: {why}. Give the base of which the model was made.")


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a module without its children, and the buffers that its state dict contains."""
    yield from module.named_parameters(recurse=False)
    stored = module.state_dict(keep_vars=True)
    yield from ((name, x) for name, x in module.named_buffers(recurse=False) if name in stored)


def _matrix_of(layer: nn.Module) -> Tensor | None:
    """Return the matrix of a dense or compressed layer, shape `(out, in)`; None if it has no matrix."""
    if isinstance(layer, NetworkModule):
        return layer.to_matrix()
    kind = kind_of(layer)
    return None if kind is None else kind.matrix(layer)


def _layer_like(kind: LayerKind, module: nn.Module, matrix: Tensor) -> nn.Module:
    """Build a dense layer with another matrix and without a bias: an embedding like the module, or linear."""
    if kind.name != "embedding":
        return layer_kind("linear").build(matrix, None)
    scale = embedding_scale(module)
    if scale is None:
        return kind.build(matrix, None)
    rows, columns = matrix.shape
    made = ScaledEmbedding(rows, columns, scale, device="meta")
    made.weight = nn.Parameter(matrix)
    return made


def _as_network(layer: nn.Module) -> NetworkModule:
    """Return a compressed layer, or a dense one, which the plan has kept, as a network of one core."""
    if isinstance(layer, NetworkModule):
        return layer
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    network = TensorNetwork(dense(out_features=weight.shape[0], in_features=weight.shape[1]), (weight.data,))
    if isinstance(layer, nn.Embedding):
        return embedding_from_network(network, scale=embedding_scale(layer))
    return linear_from_network(network, bias=None, source="linear")


def _with_change(
    specialists: PretrainedSpecialists, name: str, changes: Mapping[str, Change]
) -> PretrainedSpecialists:
    """Add a fine-tuned model to others that are attached to the same base, in place."""
    model, known = specialists.model, changes_of(specialists)
    specialists.detach()
    attach_changes(model, {**known, name: changes})
    made = PretrainedSpecialists(model)
    made.tokenizers = specialists.tokenizers
    return made

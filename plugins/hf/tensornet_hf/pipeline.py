"""Steps from one model folder to another: open, calibrate, plan, execute, refit, heal, upcycle."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensornet._util import progress_bar
from tensornet.calibration import CalibrationStats, calibrate, cosine_losses
from tensornet.calibration.batches import BatchLike
from tensornet.compression import CompressionConfig, CompressionPlan, CompressionReport, apply_plan
from tensornet.compression.apply import MadeLayers
from tensornet.compression.measure import measure, record_losses, warn_of_loss
from tensornet.compression.report import Coverage, layer_reports, measure_coverage, model_size
from tensornet.errors import TargetError
from tensornet.healing import HealReport, RefineReport, heal, refine
from tensornet.nn.targets import all_targets, list_weights
from tensornet.nn.unfuse import unfused
from tensornet_hf.checkpoint import check_free, load, on_device, read_checkpoint, resolve_folder, save
from tensornet_hf.report.spectra import BondSpectrum, bond_spectra
from tensornet_hf.text.calibration_data import CalibrationData, calibration_data
from tensornet_hf.upcycling import MoEConfig, UpcycleReport, upcycle

#: Tokens of a validation text that are used: for the dense model and for each size that is measured.
VALIDATION_TOKENS = 10_240
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_dense(folder: Path) -> PreTrainedModel:
    """Load a model for compression, in the dtype in which it is stored.

    Raises:
        FormatError: the folder is not a model, or damaged.
        TargetError: it is compressed already.
    """
    if read_checkpoint(folder).compression is not None:
        raise TargetError(
            f"{folder} is compressed already. Compress the original again, or run tensornet decompress first."
        )
    return load(folder)


def open_compressed(folder: Path) -> PreTrainedModel:
    """Load a compressed model for decompression.

    Raises:
        FormatError: the folder is not a model, or damaged.
        TargetError: it is not compressed.
    """
    if read_checkpoint(folder).compression is None:
        raise TargetError(f"{folder} is an ordinary model; there is nothing to decompress.")
    return load(folder)


def collect_stats(
    model: PreTrainedModel,
    folder: Path,
    text: str,
    *,
    name: str,
    config: CompressionConfig,
    tokens: int,
    progress: bool = False,
) -> CalibrationStats:
    """Calibrate a model on a text.

    Args:
        model: dense; `tensornet_hf.text.calibration_data` makes batches of the text for it.
        folder: holds its tokenizer.
        text: similar to what the model will read; its beginning is used.
        name: of the text, for reports.
        config: observe the layers it selects.
        tokens: how much of the text to use; a few ten thousand are enough.
        progress: show a progress bar.

    Raises:
        TargetError: a model for which text alone says too little.
        ValueError: the text is too short.
    """
    data = calibration_data(model, folder, text, tokens=tokens)
    source = f"{data.tokens:,} tokens of {name}"
    return calibrate(
        model, data.batches, config=config, loss_fn=data.loss_fn, source=source, progress=progress
    )


def validation_data(model: PreTrainedModel, folder: Path, text: str) -> CalibrationData:
    """Build batches from the beginning of a text, for `correct_by_measuring`.

    Raises:
        TargetError: a classifier, a text has no labels for it, so no loss can be measured.
        ValueError: the text is too short.
    """
    data = calibration_data(model, folder, text, tokens=VALIDATION_TOKENS)
    labelled = all(isinstance(batch, Tensor) or "labels" in batch for batch in data.batches)
    if not labelled and data.loss_fn is not cosine_losses:
        raise TargetError(
            f"{type(model).__name__} is neither a language model nor an encoder: no loss could be measured "
            "on the validation text. Leave it out."
        )
    return data


def verification_batches(model: PreTrainedModel, folder: Path, text: str, *, tokens: int) -> list[BatchLike]:
    """Build the batches of `collect_stats` again, to measure losses on them; none for a classifier.

    A text has no labels for a classifier, so no loss could be measured.
    """
    data = calibration_data(model, folder, text, tokens=tokens)
    labelled = all(isinstance(batch, Tensor) or "labels" in batch for batch in data.batches)
    return list(data.batches) if labelled or data.loss_fn is cosine_losses else []


def heal_on(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    folder: Path,
    text: str,
    *,
    steps: int,
    checkpoint: Path | None = None,
    progress: bool = False,
) -> HealReport:
    """Train the cores on the teacher's outputs over a whole text, one batch for each step, in random order.

    With a checkpoint an interrupted run goes on where it was, see `tensornet.heal`.

    Raises:
        TargetError: there are no cores to train.
        ValueError: the text is too short.
    """
    batches = calibration_data(teacher, folder, text, window=256, window_batch=512).batches
    order = torch.randperm(
        len(batches), generator=torch.Generator("cpu").manual_seed(0), device="cpu"
    ).tolist()
    mixed = [batches[k] for k in order]
    return heal(model, teacher, mixed, steps=steps, checkpoint=checkpoint, progress=progress)


def refine_on(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    folder: Path,
    text: str,
    stats: CalibrationStats | None,
    *,
    tokens: int = 16_384,
    progress: bool = False,
) -> RefineReport:
    """Refit layer after layer on `tokens` tokens spread over a text.

    The beginning, which calibration has seen, is left out if the rest is long enough.

    Raises:
        TargetError: there are no compressed linear layers.
        ValueError: the text is too short.
    """
    data = calibration_data(teacher, folder, text)
    each, seen = data.tokens / len(data.batches), 0 if stats is None else stats.tokens
    fresh = data.batches[math.ceil(seen / each) :]
    batches = fresh if len(fresh) * each >= tokens / 2 else data.batches
    count = min(len(batches), max(8, round(tokens / each)))
    places = torch.linspace(0, len(batches) - 1, count).long().tolist()
    return refine(model, teacher, [batches[k] for k in places], stats, progress=progress)


def plan_spectra(
    model: PreTrainedModel, planned: CompressionPlan, *, progress: bool = False
) -> dict[str, tuple[BondSpectrum, ...]]:
    """Compute the spectrum that each bond of a plan truncates, by layer, on the dense model.

    Layers that stay matrices, in whatever number format, have no bond and are left out.
    """
    with unfused(model):
        matrices = {x.name: x.matrix for x in all_targets(model)}
    networks = [layer for layer in planned if layer.topology is not None and layer.topology.bond_dims]
    layers = progress_bar(networks, desc="spectra", unit="layer", disable=not progress)
    return {layer.name: bond_spectra(matrices[layer.name], layer) for layer in layers}


def carry_out(
    model: PreTrainedModel,
    planned: CompressionPlan,
    stats: CalibrationStats | None = None,
    *,
    started: float,
    progress: bool = False,
    made: MadeLayers | None = None,
    batches: Sequence[BatchLike] = (),
    allowed: float | None = None,
) -> CompressionReport:
    """Execute a plan and return the report of `tensornet.compress`.

    Args:
        model: changed in place.
        planned: made for it.
        stats: the plan was made with them.
        started: `time.perf_counter()` when the work began, planning included.
        progress: show a progress bar.
        made: layers that the loss check has rounded.
        batches: of calibration; the loss is measured on a few rows before and after, as `compress` does.
        allowed: `loss_increase` of the configuration; a warning says if more was measured.

    Raises: as `tensornet.apply_plan`.
    """
    before = model_size(model)
    coverage = planned_coverage(model, planned)
    dense = record_losses(model, batches)
    errors = apply_plan(model, planned, stats, progress=progress, made=made)
    after = model_size(model)
    measured = None if dense is None else measure(model, dense)
    if measured is not None:
        warn_of_loss(measured, planned.predicted_loss_increase, allowed)
    return CompressionReport(
        layers=layer_reports(planned, errors),
        model_params_before=before[0],
        model_params_after=after[0],
        model_bytes_before=before[1],
        model_bytes_after=after[1],
        seconds=time.perf_counter() - started,
        plan=planned,
        coverage=coverage,
        measured=measured,
    )


def planned_coverage(model: PreTrainedModel, planned: CompressionPlan) -> Coverage:
    """Count the parameters that a plan covers, before the plan is executed."""
    with unfused(model):
        weights = list_weights(model)
    return measure_coverage(weights, [layer.name for layer in planned], unseen=planned.unseen)


def dtype_of(name: str | None) -> torch.dtype | None:
    """Look up a dtype by name; None stays None.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"Unknown dtype {name!r}; choose one of {', '.join(DTYPES)}.")
    return None if name is None else DTYPES[name]


def stored_as(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Convert a model to a dtype in place and return it; None leaves it as it is."""
    if dtype is not None:
        torch.nn.Module.to(model, dtype=dtype)
    return model


def plan_summary(model: PreTrainedModel, planned: CompressionPlan) -> Mapping[str, int]:
    """Return sizes before and after a plan, without executing it."""
    params, size = model_size(model)
    with unfused(model):
        dtypes = {x.name: x.weight.dtype for x in all_targets(model)}
    before = sum(layer.params_before * dtypes[layer.name].itemsize for layer in planned)
    after = sum(layer.num_bytes(dtypes[layer.name]) for layer in planned)
    return {
        "model_params_before": params,
        "model_params_after": params - planned.params_before + planned.params_after,
        "model_bytes_before": size,
        "model_bytes_after": size - before + after,
        "layers_bytes_before": before,
        "layers_bytes_after": after,
    }


def upcycle_folder(
    source: str | Path,
    destination: str | Path | None,
    config: MoEConfig,
    *,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
    force: bool = False,
    progress: bool = False,
) -> UpcycleReport:
    """Turn a dense model folder into a mixture of experts that share cores, and save it as another folder.

    Args:
        source: model folder, or hub id if there is no folder of that name.
        destination: folder to write, or `hf://owner/name` to upload; None writes nothing.
        config: of the mixtures.
        dtype: store weights as `"float32"`, `"bfloat16"` or `"float16"`; as they are if absent.
        device: where the model runs.
        force: replace a destination that exists.
        progress: show a progress bar.

    Returns:
        Sizes of the mixtures.

    Raises:
        FormatError: the source is not a model, or damaged.
        TargetError: it is compressed already, or has no feed-forward network.
        DestinationError: the destination exists already, or cannot be written.

    Example:
        >>> report = th.upcycle_folder(th.embedded.gpt2_path(), None, th.MoEConfig(num_experts=2))
        >>> report.num_experts
        2
    """
    stored = dtype_of(dtype)
    folder = resolve_folder(source)
    if destination is not None:
        check_free(destination, force=force, sources=(folder,))
    model = on_device(open_dense(folder), device)
    report = upcycle(model, config, progress=progress)
    if destination is not None:
        save(stored_as(model, stored), destination, source=folder, force=force)
    return report

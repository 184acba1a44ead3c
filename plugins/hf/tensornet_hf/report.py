"""HTML report of a compression: loss, baselines of the same size, and a table of layers.

The report is a single file without scripts or network requests. Colours in matplotlib's SVG are replaced by
CSS variables, so that each plot works in light and dark mode.
"""

import copy
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

import tensornet as tn
from tensornet._util import compact_bytes, compact_count, require
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.config import CompressionConfig
from tensornet.compression.loss_increase import measure
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.report import CompressionReport, ModelFacts, model_size
from tensornet.io import write_file
from tensornet.quantization import NumberFormat
from tensornet.quantization.formats import BITS
from tensornet_hf.evaluate import record_held_out
from tensornet_hf.figures import draw_report, layer_names
from tensornet_hf.text import continue_text, load_tokenizer, text_config

#: Names of the baselines. Each baseline is another configuration of the same compression pipeline.
NEAREST, GPTQ, SVD = "round to nearest", "GPTQ", "plain SVD"
#: Number of words in the prompt of the samples, and number of generated tokens.
PROMPT_WORDS, SAMPLE_TOKENS = 12, 60
#: A loss increase smaller than this, in nats, counts as zero.
_NOTHING = 5e-5
#: A baseline counts as equal in size if its bits per weight are at most this factor times those of our model.
_SLACK = 1.02
#: Tables with at most this many layers are shown expanded.
_FEW = 8
#: Roles of the colors of the baselines (see `figures.COLORS`).
_COLORS = {NEAREST: "nearest", GPTQ: "gptq", SVD: "svd"}


@dataclass(frozen=True)
class Page:
    """Contents of the HTML report.

    Args:
        title: heading, for example the name of the model.
        report: report of the compression.
        models: facts about the original, the compressed model and baselines of the same size, in this order.
        losses: predicted loss increases of the baselines, by method and layer.
        made: pairs of label and text that describe how the report was made.
        notes: remarks shown below the comparison.
        prompt: prompt of the samples; None without samples.
    """

    title: str
    report: CompressionReport
    models: Sequence[ModelFacts]
    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    made: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    prompt: str | None = None


def baseline_configs(plan: CompressionPlan, stats: CalibrationStats | None) -> dict[str, CompressionConfig]:
    """Return, by name, the configurations of baselines whose size in bytes is about that of a plan.

    Without statistics there is no GPTQ baseline, since GPTQ needs second moments of the inputs.
    """
    names = [layer.name for layer in plan]
    formats = [
        NumberFormat.parse(f"int{bits}:g{group}") for bits in BITS for group in (64, 32, 128)
    ]  # with 16-bit scales
    sizes = {x: sum(x.nbytes(layer.shape) for layer in plan) for x in formats}
    fitting = [x for x in formats if sizes[x] <= 1.01 * plan.bytes_after]
    largest = max(fitting, key=sizes.__getitem__) if fitting else min(formats, key=sizes.__getitem__)
    integers = CompressionConfig(target_modules=names, formats=(largest.name,))
    low_rank = CompressionConfig(
        target_modules=names,
        topology="low_rank",
        method="svd",
        param_ratio=min(1.0, plan.bytes_after / (svd_itemsize(plan) * plan.params_before)),
    )
    found = {NEAREST: replace(integers, method="nearest")}
    if stats is not None:
        found[GPTQ] = replace(integers, method="gptq")
    return {**found, SVD: low_rank}


def svd_itemsize(plan: CompressionPlan) -> int:
    """Return the bytes of each value in the factors of the SVD baseline.

    This is 2 if the plan stores layers in number formats, else the itemsize of the model's dtype.
    """
    integers = any(layer.storage.own_dtypes for layer in plan)
    return 2 if integers else plan.layers[0].dtype.itemsize


def compare_methods(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    folder: Path,
    report: CompressionReport,
    stats: CalibrationStats | None,
    sizes: tuple[int, int],
    *,
    text: str | None = None,
    name: str = "held-out text",
    predicted: bool = True,
    progress: bool = False,
) -> tuple[list[ModelFacts], dict[str, dict[str, float]], str | None]:
    """Compare a compressed model with the original and with baselines of about the same size.

    Args:
        dense: the dense model; not changed.
        compressed: the compressed model.
        folder: folder with the tokenizer.
        report: report of the compression.
        stats: statistics with which the plan was made.
        sizes: bytes of the weight files before and after compression.
        text: held-out text; if None, losses are only predicted.
        name: name of the text.
        predicted: whether the plan's predicted loss increase applies to the compressed model; it does not
            after refitting or healing.
        progress: show progress bars.

    Returns:
        Facts about the original, the compressed model and the baselines; predicted loss increases of the
        baselines by method and layer; and the prompt that the first two models continued greedily, or None.

    Raises:
        TargetError: the model is not a language model, so it has no loss on text.
        ValueError: the text is too short.
    """
    plan = report.plan
    recorded = None if text is None else record_held_out(dense, folder, text, name=name)
    prompt, room = None, SAMPLE_TOKENS
    if text is not None and not dense.config.is_encoder_decoder:
        prompt = " ".join(text.split()[:PROMPT_WORDS])
        positions = getattr(text_config(dense), "max_position_embeddings", None)
        if positions is not None:
            room = min(room, positions - len(load_tokenizer(folder)(prompt).input_ids))
        prompt = prompt if room > 0 else None

    def measured(model: PreTrainedModel) -> dict[str, Any]:
        sample = None
        if prompt is not None:
            sample = continue_text(model, load_tokenizer(folder), prompt, max_new_tokens=room)
        return {"quality": None if recorded is None else measure(model, recorded), "sample": sample}

    params, size = report.model_params_before, model_size(dense)[1]
    bits = 8 * plan.bytes_before / plan.params_before
    models = [
        ModelFacts("original", params, sizes[0], bits, **measured(dense)),
        ModelFacts(
            "compressed",
            params - plan.params_before + plan.params_after,
            sizes[1],
            plan.bits_per_weight,
            "as planned" if predicted else "planned, then trained",
            predicted=plan.predicted_loss_increase if predicted else None,
            **measured(compressed),
        ),
    ]
    losses = {}
    configs = baseline_configs(plan, stats)
    for method in tqdm(list(configs), desc="measuring baselines", unit="baseline", disable=not progress):
        made, quality = tn.plan(dense, configs[method], stats), None
        if recorded is not None:
            copied = copy.deepcopy(dense)
            tn.apply_plan(copied, made, stats)
            quality = measure(copied, recorded)
            del copied
        ranks = [x.topology.bond_dims["b1"] for x in made if x.topology is not None and method == SVD]
        scheme = next((x.storage.number_format.name for x in made if x.topology is not None), "dense")
        if ranks:
            few, many = min(ranks), max(ranks)
            scheme = f"rank {few}" if few == many else f"rank {few} to {many}"
        bytes_made = made.params_after * svd_itemsize(plan) if method == SVD else made.bytes_after
        if made.predicted_loss_increase is not None and method != GPTQ:  # the table has no column for GPTQ
            losses[method] = {layer.name: layer.loss_increase or 0.0 for layer in made}
        models.append(
            ModelFacts(
                method,
                params - plan.params_before + made.params_after,
                size - plan.bytes_before + bytes_made,
                8 * bytes_made / plan.params_before,
                scheme,
                quality,
                made.predicted_loss_increase,
            )
        )
    return models, losses, prompt


def best_plain(models: Sequence[ModelFacts]) -> ModelFacts | None:
    """Return the baseline with the smallest loss increase, or None if no baseline can be compared.

    Baselines with more bits than the compressed model are ignored, and measured losses are not compared with
    predicted ones. `models` is ordered as in `Page`.
    """
    ours = models[1]
    found = [
        x
        for x in models[2:]
        if x.loss_increase is not None
        and (ours.loss_increase is None or x.measured == ours.measured)
        and (x.bits is None or ours.bits is None or x.bits <= _SLACK * ours.bits)
    ]
    return min(found, key=lambda x: x.loss_increase or 0.0, default=None)


def verdict(models: Sequence[ModelFacts]) -> str:
    """Summarize size, loss increase and comparison with the baselines; `models` is ordered as in `Page`."""
    original, compressed = models[0], models[1]
    size = ""
    if original.bytes and compressed.bytes:
        before, after = compact_bytes(original.bytes), compact_bytes(compressed.bytes)
        size = f"{before} became {after} ({100 * compressed.bytes / original.bytes:.1f} %). "
    if (ours := compressed.loss_increase) is None:
        return (
            f"{size}The loss increase is unknown: give a calibration text to predict it, or a held-out text "
            "to measure it."
        )
    how = "On held-out text" if compressed.measured else "As predicted,"
    change = f"the loss increases by {ours:.4f}" if ours > _NOTHING else "the loss does not increase"
    if (best := best_plain(models)) is None or (theirs := best.loss_increase) is None:
        return f"{size}{how} {change}."
    plain = f"The best baseline of at most this size, {best.name} ({best.scheme}),"
    if theirs < ours:
        return f"{size}{how} {change}. {plain} is better here: it increases the loss by {theirs:.4f}."
    times = f", {theirs / ours:.1f} times as much" if ours > _NOTHING else ""
    return f"{size}{how} {change}. {plain} increases the loss by {theirs:.4f}{times}."


def write_report(page: Page, path: str | Path) -> Path:
    """Write the HTML report to a file and return its path; an incomplete file never replaces an old one.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
        DestinationError: the file cannot be written.
    """
    write_file(Path(path), [render(page).encode()], what="The report")
    return Path(path)


def render(page: Page) -> str:
    """Render the HTML report as a string, with embedded styles and plots.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    require(("jinja2", "matplotlib"), extra="viz", user="the HTML report")
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": compact_count, "size": compact_bytes}
    environment.filters["loss"] = lambda x: "–" if x is None else f"{x:.2g}"
    environment.filters["increase"] = lambda x: "0.0000" if abs(x) < _NOTHING else f"{x:+.4f}"
    text = (files("tensornet_hf") / "data" / "report.html.j2").read_text(encoding="utf-8")
    pictures = draw_report(page.report.plan, page.models[1:], page.losses, _COLORS)
    return environment.from_string(text).render(
        page=page,
        report=page.report,
        plan=page.report.plan,
        models=page.models,
        best=best_plain(page.models),
        verdict=verdict(page.models),
        blocks=_blocks(page),
        unfolded=len(page.report.layers) <= _FEW,
        pictures={name: Markup(svg) for name, svg in pictures.items()},
        with_svd=any(layer.baseline_error is not None for layer in page.report.plan),
    )


def _blocks(page: Page) -> dict[str, list[dict[str, Any]]]:
    """Make the rows of the layer table, grouped by block."""
    plan, losses = page.report.plan, page.losses
    blocks: dict[str, list[dict[str, Any]]] = {}
    for name, layer in zip(layer_names([x.name for x in plan]), plan, strict=True):
        row = {
            "layer": layer,
            "short": name.kind,
            "bits": layer.bits_per_weight,
            "ours": layer.loss_increase,
            "nearest": losses.get(NEAREST, {}).get(layer.name),
            "svd": losses.get(SVD, {}).get(layer.name),
        }
        blocks.setdefault(name.place if name.block is not None else "", []).append(row)
    return blocks


def versions() -> str:
    """Return a line with the versions of this library, torch, transformers, safetensors and Python."""
    names = ("tensornet-torch", "torch", "transformers", "safetensors")
    python = f"Python {platform.python_version()}"
    return ", ".join([*(f"{name} {version(name)}" for name in names), python, sys.platform])


def display_name(source: str | Path) -> str:
    """Return a hub id as it is, or the last part of a folder's path, since reports must not show the rest."""
    path = Path(source).expanduser()
    local = path.exists() or path.is_absolute() or str(source).startswith((".", "~"))
    return path.resolve().name if local else str(source)


def display_command(words: Sequence[str]) -> str:
    """Join the words of a command, with absolute paths shortened to their last part."""
    return shlex.join([Path(word).name if Path(word).is_absolute() else word for word in words])

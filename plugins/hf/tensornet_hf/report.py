"""HTML page about one compression: what it cost, plain methods at the same bytes, and every layer.

The page is one file without scripts or requests. matplotlib cannot write CSS variables, so the colours of the
finished SVG are replaced by them: one picture serves light and dark pages.
"""

import copy
import io
import platform
import re
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
from tensornet._util import require
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.baselines import GPTQ, NEAREST, SVD, baseline_configs, svd_itemsize
from tensornet.compression.layer_plan import layer_names
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.report import CompressionReport, compact_count, model_size
from tensornet.compression.viz import COLORS
from tensornet.io import write_file
from tensornet_hf.evaluate import Judge, Quality, judge_of
from tensornet_hf.streaming import peak_memory
from tensornet_hf.text import continue_text, load_tokenizer

#: Words of the held-out text that samples continue, and the tokens they write.
PROMPT_WORDS, SAMPLE_TOKENS = 12, 60
#: A loss increase smaller than this, in nats, is not told from none.
_NOTHING = 5e-5
#: A method that takes so many times the bits still counts as one of the same bytes.
_SLACK = 1.02
#: Tables of models with at most so many layers start unfolded.
_FEW = 8
#: Width of pictures in inches; the page scales them to its own width.
_WIDTH = 10.0


@dataclass(frozen=True)
class ModelFacts:
    """One model of the comparison.

    Args:
        name: how the page calls it.
        params: stored numbers of the whole model, scales included.
        bytes: of its weight files, or counted where nothing was saved; None if unknown.
        bits: of a weight of the compressed layers, scales included; None if unknown.
        scheme: number format or ranks, in a few characters.
        quality: on held-out text, None if not measured.
        predicted: predicted loss increase, None if there is none.
        sample: generated text, if any.
    """

    name: str
    params: int
    bytes: int | None = None
    bits: float | None = None
    scheme: str = ""
    quality: Quality | None = None
    predicted: float | None = None
    sample: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return {
            "name": self.name,
            "scheme": self.scheme,
            "bytes": self.bytes,
            "bits_per_weight": self.bits,
            "parameters": self.params,
            "quality": None if self.quality is None else self.quality.to_dict(),
            "predicted_loss_increase": self.predicted,
            "sample": self.sample,
        }


@dataclass(frozen=True)
class Sampler:
    """Continues one prompt with every model it is given.

    Args:
        folder: holds the tokenizer.
        prompt: to continue.
        tokens: to write.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws.
    """

    folder: Path
    prompt: str
    tokens: int = SAMPLE_TOKENS
    temperature: float = 0.0
    seed: int = 0

    def __call__(self, model: PreTrainedModel) -> str:
        """Return the text that a model writes."""
        return continue_text(
            model,
            load_tokenizer(self.folder),
            self.prompt,
            max_new_tokens=self.tokens,
            temperature=self.temperature,
            seed=self.seed,
        )

    @classmethod
    def of(cls, model: PreTrainedModel, folder: Path, text: str) -> "Sampler | None":
        """Continue the first words of a text; None for models that continue no text."""
        if not model.can_generate() or model.config.is_encoder_decoder:
            return None
        prompt = " ".join(text.split()[:PROMPT_WORDS])
        positions = getattr(model.config, "max_position_embeddings", None)
        room = SAMPLE_TOKENS
        if positions is not None:
            room = min(room, positions - len(load_tokenizer(folder)(prompt).input_ids))
        return None if room < 1 else cls(folder, prompt, room)


@dataclass(frozen=True)
class Comparison:
    """A compressed model beside its dense model and plain methods of the same bytes.

    Args:
        models: the original first, then the compressed model, then plain methods.
        losses: predicted losses of the plain methods, by method and layer.
        prompt: text that the samples continue, None without samples.
        sampled: how tokens of the samples were chosen.
    """

    models: tuple[ModelFacts, ...]
    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    prompt: str | None = None
    sampled: str = ""


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
    sampler: Sampler | None = None,
    predicted: bool = True,
    progress: bool = False,
) -> Comparison:
    """Compare a compressed model with plain methods at the bytes of its plan.

    Args:
        dense: left as it is.
        compressed: made from it.
        folder: holds the tokenizer.
        report: of the compression.
        stats: the plan was made with them.
        sizes: bytes of the weight files before and after.
        text: held out; without one losses are predicted only.
        name: of the text.
        sampler: writes samples; if absent, the beginning of the text is continued greedily.
        predicted: whether the prediction is of this model: not after refitting or healing.
        progress: show progress bars.

    Raises:
        TargetError: a text has no labels for a model of this kind.
        ValueError: the text is too short.
    """
    plan = report.plan
    judge: Judge | None = None if text is None else judge_of(dense, folder, text, name=name)
    if sampler is None and text is not None:
        sampler = Sampler.of(dense, folder, text)

    def measured(model: PreTrainedModel) -> Quality | None:
        return None if judge is None else judge(model)

    params, size = report.model_params_before, model_size(dense)[1]
    models = [
        ModelFacts(
            "original",
            params,
            sizes[0],
            8 * plan.bytes_before / plan.params_before,
            quality=measured(dense),
            sample=None if sampler is None else sampler(dense),
        ),
        ModelFacts(
            "compressed",
            params - plan.params_before + plan.params_after,
            sizes[1],
            plan.bits_per_weight,
            "as planned" if predicted else "planned, then trained",
            measured(compressed),
            plan.predicted_loss_increase if predicted else None,
            None if sampler is None else sampler(compressed),
        ),
    ]
    losses = {}
    configs = baseline_configs(plan, stats)
    for method in tqdm(list(configs), desc="plain methods", unit="method", disable=not progress):
        made, quality = replace(tn.plan(dense, configs[method], stats), forecast=plan.forecast), None
        if judge is not None:
            copied = copy.deepcopy(dense)
            tn.apply_plan(copied, made, stats)
            quality = judge(copied)
            del copied
        ranks = [x.topology.bond_dims["b1"] for x in made if x.topology is not None and method == SVD]
        scheme = next((x.storage.number_format.name for x in made if x.topology is not None), "dense")
        if ranks:
            few, many = min(ranks), max(ranks)
            scheme = f"rank {few}" if few == many else f"rank {few} to {many}"
        bytes_made = made.params_after * svd_itemsize(plan) if method == SVD else made.bytes_after
        if made.predicted_loss_increase is not None:
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
    losses.pop(GPTQ, None)  # the page shows two methods by layer
    if sampler is None:
        return Comparison(tuple(models), losses)
    how = "greedy" if not sampler.temperature else f"temperature {sampler.temperature:g}, seed {sampler.seed}"
    return Comparison(tuple(models), losses, sampler.prompt, how)


@dataclass(frozen=True)
class Increase:
    """Loss increase of one model over the dense one.

    Args:
        value: in nats, or one minus the cosine of an encoder.
        measured: on held-out text, else predicted.
    """

    value: float
    measured: bool

    def __str__(self) -> str:
        return f"{self.value:+.4f}" if abs(self.value) >= _NOTHING else "0.0000"


def increase_of(model: ModelFacts, original: ModelFacts) -> Increase | None:
    """Return the measured loss increase, else the predicted one, else None."""
    if model.quality is not None and original.quality is not None:
        return Increase(model.quality.loss - original.quality.loss, True)
    return None if model.predicted is None else Increase(model.predicted, False)


def best_plain(models: Sequence[ModelFacts]) -> tuple[ModelFacts, Increase] | None:
    """Return the plain method (third and later models) with the smallest loss; None without any.

    Only loss increases that came about as that of the compressed model are compared, and only methods that
    take no more bits: the smallest number format may take more than a very small plan.
    """
    original, compressed, *plain = models
    ours, found = increase_of(compressed, original), []
    for model in plain:
        known = increase_of(model, original)
        larger = (
            model.bits is not None and compressed.bits is not None and model.bits > _SLACK * compressed.bits
        )
        if known is not None and not larger and (ours is None or known.measured == ours.measured):
            found.append((model, known))
    return min(found, key=lambda pair: pair[1].value, default=None)


def verdict(models: Sequence[ModelFacts], *, measure: str = "loss") -> str:
    """Summarize size, quality and the comparison with plain methods in two sentences.

    Args:
        models: original, compressed, then plain methods.
        measure: `"loss"` or `"one minus cosine"`.
    """
    original, compressed = models[0], models[1]
    size = ""
    if original.bytes and compressed.bytes:
        before, after = compact_bytes(original.bytes), compact_bytes(compressed.bytes)
        size = f"{before} became {after} ({100 * compressed.bytes / original.bytes:.1f} %). "
    ours = increase_of(compressed, original)
    if ours is None:
        return f"{size}Nothing says what that costs: give calibration text to predict it, or held-out text."
    how = "On held-out text" if ours.measured else "As predicted,"
    much = (
        f"the loss increases by {ours.value:.4f}" if measure == "loss" else f"{measure} is {ours.value:.4f}"
    )
    change = much if ours.value > _NOTHING else "nothing is lost"
    if (best := best_plain(models)) is None:
        return f"{size}{how} {change}."
    model, increase = best
    plain = f"The best plain method of at most these bytes, {model.name} ({model.scheme}),"
    if increase.value < ours.value:
        return f"{size}{how} {change}. {plain} is better here: {increase.value:.4f}."
    times = f", {increase.value / ours.value:.1f} times as much" if ours.value > _NOTHING else ""
    return f"{size}{how} {change}. {plain} costs {increase.value:.4f}{times}."


@dataclass(frozen=True)
class Page:
    """Contents of the page.

    Args:
        title: heading, for example the name of the model.
        comparison: of the models.
        report: of the compression.
        made: rows of label and text that say how the page was made.
        notes: remarks shown below the comparison.
    """

    title: str
    comparison: Comparison
    report: CompressionReport
    made: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    peak_memory: int = field(default_factory=peak_memory)

    @property
    def measure(self) -> str:
        """Name the measure of quality: a loss, or one minus the cosine."""
        if (quality := self.comparison.models[0].quality) is not None:
            return quality.measure
        plan = self.report.plan
        of_loss = plan.dense_loss is not None or plan.predicted_loss_increase is None
        return "loss" if of_loss else "one minus cosine"

    @property
    def label(self) -> str:
        """Label of the loss increase over the original, or of one minus the cosine."""
        return "loss increase" if self.measure == "loss" else self.measure

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return {
            "models": [model.to_dict() for model in self.comparison.models],
            "compression": self.report.to_dict(),
            "peak_memory": self.peak_memory,
            "made": dict(self.made),
        }


def write_report(page: Page, path: str | Path) -> Path:
    """Write the page; an older file of that name is replaced only by a finished one.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
        DestinationError: the file cannot be written.
    """
    write_file(Path(path), [render(page).encode()], what="The report")
    return Path(path)


def render(page: Page) -> str:
    """Render the page as HTML with styles and pictures inside.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    require(("jinja2", "matplotlib"), extra="viz", user="the HTML report")
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": compact_count, "size": compact_bytes, "loss": _short_loss}
    text = (files("tensornet_hf") / "data" / "report.html.j2").read_text(encoding="utf-8")
    models, report = page.comparison.models, page.report
    rows = [(model, increase_of(model, models[0])) for model in models]
    return environment.from_string(text).render(
        page=page,
        report=report,
        plan=report.plan,
        models=models,
        rows=rows,
        ours=rows[1][1],
        best=best_plain(models),
        verdict=verdict(models, measure=page.measure),
        blocks=_blocks(report.plan, page.comparison.losses),
        unfolded=len(report.layers) <= _FEW,
        pictures={name: Markup(svg) for name, svg in _pictures(page, rows).items()},
    )


def _short_loss(value: float | None) -> str:
    """Format a predicted loss increase with two digits; a dash where it is unknown."""
    return "–" if value is None else f"{value:.2g}"


def _blocks(
    plan: CompressionPlan, losses: Mapping[str, Mapping[str, float]]
) -> dict[str, list[dict[str, Any]]]:
    """Group the rows of the table of layers by block, each with predicted losses by method."""
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


def _pictures(page: Page, rows: Sequence[tuple[ModelFacts, Increase | None]]) -> dict[str, str]:
    """Draw figures as inline SVG: loss over bits, predicted losses of the layers, bits of the layers."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from tensornet.compression import viz

    colors = viz.COLORS
    by_method = {NEAREST: colors["nearest"], GPTQ: colors["gptq"], SVD: colors["svd"]}
    style: Any = {
        "svg.fonttype": "none",  # text stays text: searchable, and in the font of the page
        "svg.hashsalt": "tensornet",  # the same picture gives the same bytes
        "font.size": 9,
        "axes.edgecolor": colors["grid"],
        "axes.labelcolor": colors["muted"],
        "axes.titlecolor": colors["ink"],
        "text.color": colors["ink"],
        "xtick.color": colors["muted"],
        "ytick.color": colors["muted"],
        "xtick.labelcolor": colors["muted"],
        "ytick.labelcolor": colors["ink"],
        "grid.color": colors["grid"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    plan, found = page.report.plan, {}
    layers = list(plan)
    with matplotlib.rc_context(style):
        marks = [
            viz.Mark(model.name, model.bits, x.value, by_method.get(model.name, colors["ours"]), x.measured)
            for model, x in rows[1:]
            if x is not None and model.bits is not None
        ]
        curve = plan.curve(unit="bytes")
        if curve or len(marks) > 1:
            figure = Figure(figsize=(6.0, 4.0), layout="constrained")
            axes = figure.subplots()
            viz.draw_loss_over_bits(axes, layers, curve, marks, label=page.label)
            handles = [
                Line2D([], [], color=line.get_color(), label=str(line.get_label()))
                for line in axes.lines
                if not str(line.get_label()).startswith("_")
            ]
            for mark in marks:
                how = "measured" if mark.measured else "predicted"
                face = mark.color if mark.measured else "none"
                dot: Any = {"marker": "o", "linestyle": "none", "markerfacecolor": face}
                handles.append(Line2D([], [], color=mark.color, label=f"{mark.label}, {how}", **dot))
            figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=8)
            found["loss"] = _svg(figure)
        if all(layer.loss_increase is not None for layer in layers):
            found["layers"] = _svg(viz.losses_figure(layers, page.comparison.losses, width=_WIDTH))
        names, _, _ = viz.grid_of(layer_names([layer.name for layer in layers]))
        figure = Figure(figsize=(_WIDTH, 0.7 + 0.34 * len(names)), layout="constrained")
        viz.draw_bits(figure.subplots(), layers)
        found["bits"] = _svg(figure)
    return found


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # no XML header inside HTML
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:xmlns|xmlns:xlink)="[^"]*"', "", text, count=2)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same names in every picture of one page
    for role, color in COLORS.items():
        text = text.replace(color, f"var(--{role})")
    return text


def versions() -> str:
    """Return the versions of everything that the numbers depend on, in one line."""
    names = ("tensornet-torch", "torch", "transformers", "safetensors")
    python = f"Python {platform.python_version()}"
    return ", ".join([*(f"{name} {version(name)}" for name in names), python, sys.platform])


def compact_bytes(value: float) -> str:
    """Format a size with three significant digits: `1234567` -> `1.23 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{f'{value / size:#.3g}'.rstrip('.')} {unit}"
    return f"{value:g} B"


def display_name(source: str | Path) -> str:
    """Return a hub id unchanged and a folder's name without its path, since pages are shown to others.

    Example:
        >>> from tensornet_hf.report import display_name
        >>> display_name("HuggingFaceTB/SmolLM2-135M")
        'HuggingFaceTB/SmolLM2-135M'
    """
    path = Path(source).expanduser()
    local = path.exists() or path.is_absolute() or str(source).startswith((".", "~"))
    return path.resolve().name if local else str(source)


def display_command(words: Sequence[str]) -> str:
    """Join the words of a command, each path shortened to its last part.

    Example:
        >>> from tensornet_hf.report import display_command
        >>> display_command(["tensornet", "compress", "/home/me/model", "--bits", "4.25"])
        'tensornet compress model --bits 4.25'
    """
    return shlex.join([Path(word).name if Path(word).is_absolute() else word for word in words])

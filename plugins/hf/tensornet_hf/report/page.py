"""The report page: its contents, and writing it as one self-contained file."""

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from tensornet._util import require
from tensornet.compression import CompressionReport
from tensornet.compression.baselines import BaselineLosses
from tensornet.compression.report import compact_count
from tensornet.io import write_file
from tensornet_hf.report.blocks import MARGIN, WIDTH, table_of_layers
from tensornet_hf.report.facts import ModelFacts, compact_bytes
from tensornet_hf.report.spectra import BondSpectrum
from tensornet_hf.report.verdict import best_plain, rise_of, verdict


@dataclass(frozen=True)
class Page:
    """Contents of the report.

    Args:
        title: heading, for example the name of the model.
        models: rows of the comparison: the original first, then the compressed model, then plain methods.
        report: of the compression.
        spectra: by layer name (see `bond_spectra`); empty leaves the picture out.
        losses: of the plain methods by layer and over sizes; empty leaves them out of the pictures.
        prompt: text that the samples continue.
        sampled: how tokens of the samples were chosen.
        made: rows of label and text that say how the page was made.
        notes: remarks shown below the comparison.
        peak_memory: of the process, in bytes; None where the system does not tell.
    """

    title: str
    models: Sequence[ModelFacts]
    report: CompressionReport
    spectra: Mapping[str, Sequence[BondSpectrum]] = field(default_factory=dict)
    losses: BaselineLosses = field(default_factory=BaselineLosses)
    prompt: str | None = None
    sampled: str = ""
    made: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    peak_memory: int | None = None

    @property
    def rise(self) -> str:
        """Label of the loss increase over the original, or of one minus the cosine."""
        return f"rise of the {self.measure}" if self.measure == "loss" else self.measure

    @property
    def measure(self) -> str:
        """Name the measure of quality: a loss, or one minus the cosine."""
        if self.models[0].quality is not None:
            return self.models[0].quality.measure
        plan = self.report.plan
        of_loss = plan.dense_loss is not None or plan.predicted_loss_increase is None
        return "loss" if of_loss else "one minus cosine"


def write_report(page: Page, path: str | Path) -> Path:
    """Write the page; an older file of that name is replaced only by a finished one.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
        DestinationError: the file cannot be written.
    """
    write_file(Path(path), [render(page).encode()], what="The report")
    return Path(path)


def render(page: Page) -> str:
    """Render the page as HTML with styles and pictures inside, without scripts or requests.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    require(("jinja2", "matplotlib"), extra="viz", user="the HTML report")
    import jinja2
    from markupsafe import Markup

    from tensornet_hf.report import pictures

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": compact_count, "size": compact_bytes, "rise": _compact_rise}
    template = environment.from_string(
        (files("tensornet_hf.report") / "page.html.j2").read_text(encoding="utf-8")
    )
    original = page.models[0]
    plan = page.report.plan
    blocks, scale = table_of_layers(plan, page.report.layers, page.losses)
    rows = [(model, rise_of(model, original)) for model in page.models]
    drawn = {
        "loss_picture": pictures.loss_picture(plan, _marked(rows), page.losses, page.rise),
        "layer_losses_picture": pictures.layer_losses_picture(list(plan), page.losses),
        "bits_picture": pictures.bits_picture(list(plan)),
        "spectra_picture": pictures.spectra_picture(page.spectra) if page.spectra else None,
    }
    return template.render(
        page=page,
        report=page.report,
        plan=plan,
        original=original,
        compressed=page.models[1],
        rows=rows,
        ours=rise_of(page.models[1], original),
        best=best_plain(page.models),
        verdict=verdict(page.models, measure=page.measure),
        blocks=blocks,
        scale=scale,
        track={"width": WIDTH, "margin": MARGIN},
        spectra_shown=min(len(page.spectra), pictures.PANELS),
        **{name: None if svg is None else Markup(svg) for name, svg in drawn.items()},
    )


def _marked(rows: Sequence[tuple[ModelFacts, Any]]) -> list[tuple[ModelFacts, float, bool]]:
    """Collect the models that have a place in the picture of loss over bits."""
    return [
        (model, rise.value, rise.measured)
        for model, rise in rows[1:]
        if rise is not None and model.bits is not None
    ]


def _compact_rise(value: float | None) -> str:
    """Format a predicted loss increase with two digits; a dash where it is unknown."""
    return "–" if value is None else f"{value:.2g}"


def versions() -> str:
    """Return the versions of everything that the numbers depend on, in one line."""
    names = ("tensornet-torch", "torch", "transformers", "safetensors")
    python = f"Python {platform.python_version()}"
    return ", ".join([*(f"{name} {version(name)}" for name in names), python, sys.platform])


def display_name(source: str | Path) -> str:
    """Return a hub id unchanged and a folder's name without its path, since pages are shown to others.

    Example:
        >>> from tensornet_hf.report.page import display_name
        >>> display_name("HuggingFaceTB/SmolLM2-135M")
        'HuggingFaceTB/SmolLM2-135M'
    """
    path = Path(source).expanduser()
    local = path.exists() or path.is_absolute() or str(source).startswith((".", "~"))
    return path.resolve().name if local else str(source)


def display_command(words: Sequence[str]) -> str:
    """Join the words of a command, each path shortened to its last part.

    Example:
        >>> from tensornet_hf.report.page import display_command
        >>> display_command(["tensornet", "compress", "/home/me/model", "--bits", "4.25"])
        'tensornet compress model --bits 4.25'
    """
    return shlex.join([Path(word).name if Path(word).is_absolute() else word for word in words])


def plain(page: Page) -> dict[str, Any]:
    """Convert the numbers of the page to a JSON-ready form."""
    return {
        "models": [model.to_dict() for model in page.models],
        "compression": page.report.to_dict(),
        "peak_memory": page.peak_memory,
        "made": dict(page.made),
    }

"""The report page: its contents, and writing it as one self-contained file."""

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from tensornet.compression import CompressionPlan, CompressionReport
from tensornet.compression.reach import compact_count
from tensornet.io.atomic import write_file
from tensornet.optional import require
from tensornet_hf.report.spectra import BondSpectrum
from tensornet_hf.text.perplexity import Perplexity

#: Nats. Models with a larger predicted rise of the loss are useless.
_MEANINGFUL_RISE = 3.0
#: Smallest value that is drawn on the logarithmic axis.
_VISIBLE_RISE = 1e-5


@dataclass(frozen=True)
class ModelFacts:
    """One column of the comparison.

    Args:
        name: how the page calls this model.
        params: elements of all its parameters.
        file_bytes: size of its weight files, None if it was not saved.
        perplexity: on the held-out text, None if not measured.
        sample: generated text, if any.
    """

    name: str
    params: int
    file_bytes: int | None = None
    perplexity: Perplexity | None = None
    sample: str | None = None


@dataclass(frozen=True)
class Page:
    """Contents of the report.

    Args:
        title: heading, for example the name of the model.
        models: the columns of the comparison: the original first, then the compressed model, then baselines.
        report: of the compression.
        spectra: by layer name (see `bond_spectra`); empty leaves the picture out.
        prompt: text that the samples continue.
        made: rows of label and text that say how the page was made.
        notes: remarks shown below the comparison.
    """

    title: str
    models: Sequence[ModelFacts]
    report: CompressionReport
    spectra: Mapping[str, Sequence[BondSpectrum]] = field(default_factory=dict)
    prompt: str | None = None
    made: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


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

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"count": compact_count, "size": compact_bytes}
    template = environment.from_string(
        (files("tensornet_hf.report") / "page.html.j2").read_text(encoding="utf-8")
    )
    # The certified errors, which an edited plan may not have known.
    done = zip(page.report.plan, page.report.layers, strict=True)
    layers = [replace(planned, error=made.error) for planned, made in done]
    plan = page.report.plan
    curve = predicted_curve(plan)
    measure = "cosine" if plan.dense_loss is None else "perplexity" if plan.of_tokens else "loss"
    label = {"cosine": "predicted one minus cosine"}.get(measure, f"predicted {measure}")
    rise = plan.predicted_loss_increase
    shown = min(len(page.spectra), pictures.PANELS)
    return template.render(
        page=page,
        report=page.report,
        original=page.models[0],
        compressed=page.models[1],
        layers_picture=Markup(pictures.layers_picture(layers)),
        spectra_picture=Markup(pictures.spectra_picture(page.spectra)) if page.spectra else None,
        curve_picture=Markup(pictures.curve_picture(curve, page.report.param_ratio, label))
        if curve
        else None,
        predicted=None if rise is None or plan.dense_loss is None else _predicted(plan, rise),
        measure=measure,
        spectra_shown=shown,
    )


def predicted_curve(plan: CompressionPlan) -> list[tuple[float, float]]:
    """Compute the predicted perplexity over all budgets, `(keep ratio of targeted parameters, perplexity)`.

    Without a loss of tokens the loss itself; for an encoder one minus the cosine with its old outputs. Empty
    for a plan made without calibrated gradients. The curve ends where the prediction, which is of second
    order in the errors, becomes meaningless.

    Args:
        plan: made with calibrated gradients.
    """
    points = [(size / plan.params_before, rise) for size, rise in plan.curve()]
    if plan.dense_loss is None:
        return [point for point in points if _VISIBLE_RISE < point[1] < 1]
    return [(kept, _predicted(plan, rise)) for kept, rise in points if rise < _MEANINGFUL_RISE]


def _predicted(plan: CompressionPlan, rise: float) -> float:
    """Convert a loss increase to a perplexity, or to a loss if that is not one of tokens."""
    assert plan.dense_loss is not None
    loss = plan.dense_loss + rise
    return math.exp(loss) if plan.of_tokens else loss


def versions() -> str:
    """Return the versions of everything that the numbers depend on, in one line."""
    names = ("tensornet-torch", "torch", "transformers", "safetensors")
    python = f"Python {platform.python_version()}"
    return ", ".join([*(f"{name} {version(name)}" for name in names), python, sys.platform])


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def compact_bytes(value: float) -> str:
    """Format a size with three significant digits: `1234567` -> `1.23 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:g} B"


def plain(page: Page) -> dict[str, Any]:
    """Convert the numbers of the page to a JSON-ready form."""
    return {
        "models": [
            {
                "name": model.name,
                "parameters": model.params,
                "file_bytes": model.file_bytes,
                "perplexity": None if model.perplexity is None else model.perplexity.to_dict(),
                "sample": model.sample,
            }
            for model in page.models
        ],
        "compression": page.report.to_dict(),
        "made": dict(page.made),
    }

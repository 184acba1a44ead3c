"""`tensornet demo`: the main job from end to end, on a model that ships with the package."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tensornet_hf.cli import options as shared
from tensornet_hf.cli.values import parse_share
from tensornet_hf.demo import PROMPT, Demo, run_demo
from tensornet_hf.report.page import compact_bytes


def run(
    output: Annotated[Path, typer.Option(help="Folder for the model and the report.")] = Path("demo_out"),
    param_ratio: Annotated[
        float,
        typer.Option(
            parser=parse_share, metavar="SHARE", help="Share of the parameters of the linear layers to keep."
        ),
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    device: shared.Device = shared.CPU,
    force: shared.Force = False,
    as_json: shared.Json = False,
) -> None:
    """Compress a small trained GPT-2, evaluate it, save it, load it again, and write a report."""
    done = run_demo(
        output,
        param_ratio=param_ratio,
        seed=seed,
        device=device,
        force=force,
        command=shlex.join(["tensornet", *sys.argv[1:]]),
        progress=True,
    )
    if as_json:
        shared.print_json(done.to_dict())
    else:
        _print(done)


def _print(done: Demo) -> None:
    models = done.page.models
    rows = [
        ("parameters", *(f"{model.params:,}" for model in models)),
        ("share of the original", *(f"{model.params / models[0].params:.1%}" for model in models)),
        (
            "weight files",
            *(compact_bytes(model.file_bytes) if model.file_bytes else "not saved" for model in models),
        ),
        (
            "perplexity, held-out text",
            *(f"{model.perplexity.perplexity:.2f}" for model in models if model.perplexity is not None),
        ),
    ]
    shared.print_table(("", *(model.name for model in models)), rows)
    how = models[0].perplexity
    shared.print_lines(
        "",
        f"Perplexity, lower is better: {how.how if how else 'not measured'}. "
        "Plain SVD: every layer truncated to the same keep ratio.",
        "",
    )
    for model in models:
        shared.print_lines(f"{model.name} writes:", f"  {PROMPT}{model.sample}".replace("\n", "\n  "), "")
    steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in done.seconds.items())
    shared.print_lines(
        f"Time: {sum(done.seconds.values()):.1f} s ({steps}).",
        f"Model:  {done.folder} (import tensornet_hf, then AutoModelForCausalLM.from_pretrained)",
        f"Report: {done.report} (open it in a browser)",
    )

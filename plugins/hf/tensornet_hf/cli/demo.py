"""`tensornet demo`: the main job from end to end, on a model that ships with the package."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tensornet_hf.cli import options as shared
from tensornet_hf.demo import PROMPT, Demo, run_demo
from tensornet_hf.report import ModelFacts
from tensornet_hf.report.facts import compact_bytes
from tensornet_hf.report.page import display_command


def run(
    output: Annotated[Path, typer.Option(help="Folder for the model and the report.")] = Path("demo_out"),
    bits: Annotated[
        float, typer.Option(help="Bits of a weight of the linear layers, scales included.")
    ] = 4.25,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    device: shared.Device = shared.CPU,
    force: shared.Force = False,
    as_json: shared.Json = False,
) -> None:
    """Compress a small trained GPT-2, evaluate it, save it, load it again, and write a report."""
    done = run_demo(
        output,
        bits=bits,
        seed=seed,
        device=device,
        force=force,
        command=display_command(["tensornet", *sys.argv[1:]]),
        progress=True,
    )
    if as_json:
        shared.print_json(done.to_dict())
    else:
        _print(done)


def _print(done: Demo) -> None:
    models = done.page.models
    original = models[0].quality
    assert original is not None  # the demo measures every model
    header = ("", "bytes", "bits a weight", "parameters", "perplexity", "rise of the loss")
    shared.print_table(header, [_row(model, original.loss) for model in models])
    shared.print_lines(
        "",
        f"Measured on held-out text, lower is better: {original.how}.",
        "Bytes and parameters are those of the whole model, bits a weight those of the compressed layers.",
        "Plain methods: one format or ratio for all layers, not saved; GPTQ by our own code.",
        "",
    )
    for model in models[:2]:
        shared.print_lines(f"{model.name} writes:", f"  {PROMPT}{model.sample}".replace("\n", "\n  "), "")
    steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in done.seconds.items())
    shared.print_lines(
        f"Time: {sum(done.seconds.values()):.1f} s ({steps}).",
        f"Model:  {done.folder} (import tensornet_hf, then AutoModelForCausalLM.from_pretrained)",
        f"Report: {done.report} (open it in a browser)",
    )


def _row(model: ModelFacts, dense_loss: float) -> tuple[str, ...]:
    quality = model.quality
    assert quality is not None
    return (
        f"{model.name}, {model.form}" if model.form else model.name,
        compact_bytes(model.bytes or 0),
        f"{model.bits:.2f}",
        f"{model.params:,}",
        f"{quality.perplexity:.2f}",
        "" if quality.loss == dense_loss else f"{quality.loss - dense_loss:+.4f}",
    )

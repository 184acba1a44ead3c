"""`tensornet eval`: perplexity of a text, and tasks of lm-evaluation-harness."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tensornet_hf.checkpoint import load, on_device, resolve_folder
from tensornet_hf.cli import options as shared
from tensornet_hf.evaluation import run_tasks
from tensornet_hf.text.perplexity import perplexity
from tensornet_hf.text.tokens import load_tokenizer, read_text, require_causal, token_ids, usual_context


def run(
    path: shared.Source,
    text: Annotated[Path | None, typer.Option(help="Text file, UTF-8: perplexity.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness, separated by commas: arc_easy,hellaswag."),
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(help="Folder of task files of your own, or one such file.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples shown before each question. [default: of the task]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use so many examples of each task.")] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a window of --text. [default: all positions of the model, at most 1024]"
        ),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from window to window. [default: the context, no overlap]")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Most windows or examples run at once.")] = 16,
    device: shared.Device = shared.CPU,
    as_json: shared.Json = False,
) -> None:
    """Measure a language model: perplexity of a text, tasks, or both."""
    if text is None and tasks is None:
        raise typer.BadParameter(
            "Say what to measure: --text FILE (perplexity) or --tasks NAMES (lm-evaluation-harness)."
        )
    if task_path is not None and tasks is None:
        raise typer.BadParameter("--task-path belongs to --tasks, which is not given.")
    content = None if text is None else read_text(text)
    folder = resolve_folder(path)
    model = on_device(load(folder), device)
    tokenizer = load_tokenizer(folder)
    found: dict[str, Any] = {}
    if text is not None and content is not None:
        require_causal(model)
        measured = perplexity(
            model,
            token_ids(tokenizer, content),
            context=usual_context(model) if context is None else context,
            stride=stride,
            batch_size=batch,
            progress=True,
        )
        found |= {"text": str(text), **measured.to_dict(), "how": f"{measured.how} of {text.name}"}
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        scores = run_tasks(
            model, tokenizer, names, task_path=task_path, shots=shots, limit=limit, batch_size=batch
        )
        found["tasks"] = scores.to_dict()
    if as_json:
        shared.print_json({"model": path, **found})
        return
    if "perplexity" in found:
        shared.print_lines(f"perplexity {found['perplexity']:.4f}", f"loss {found['loss']:.5f}", found["how"])
    if "tasks" in found:
        _print_tasks(**found["tasks"])


def _print_tasks(scores: dict[str, dict[str, float]], samples: dict[str, int], version: str) -> None:
    rows = []
    for task, values in scores.items():
        for metric, value in values.items():
            name, comma, rest = metric.partition(",")
            if not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr{comma}{rest}")
                shown = "" if error is None else f"{error:.4f}"
                rows.append((task, metric, f"{value:.4f}", shown, f"{samples.get(task, 0):,}"))
    shared.print_table(("task", "metric", "score", "standard error", "examples"), rows)
    shared.print_lines(f"lm-evaluation-harness {version}")

"""`tensornet eval`: perplexity, tasks of lm-evaluation-harness, sentence encoders, classifiers."""

from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from tensornet_hf.checkpoint.load import load, on_device, resolve_folder
from tensornet_hf.cli import options as shared
from tensornet_hf.evaluation import measure_accuracy, measure_encoder, run_tasks
from tensornet_hf.evaluation.classifiers import read_examples
from tensornet_hf.evaluation.encoders import read_sentences
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
    sentences: Annotated[
        Path | None,
        typer.Option(
            help="Sentences, one a line: cosine with --reference. Pairs, separated by a tab: also retrieval."
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Dense model whose outputs are right, for --sentences.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help='JSON lines {"text": ..., "label": ...}: accuracy of a classifier of texts.'),
    ] = None,
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
    """Measure a model: perplexity, tasks, sentences or labelled texts, one or several of them."""
    _check_usage(text, tasks, sentences, labels, {"--task-path": task_path, "--reference": reference})
    content = None if text is None else read_text(text)
    said = None if sentences is None else read_sentences(sentences)
    folder = resolve_folder(path)
    model = on_device(load(folder), device)
    found: dict[str, Any] = {}
    if text is not None and content is not None:
        measured = _perplexity(model, folder, content, context=context, stride=stride, batch=batch)
        found |= {"text": str(text), **measured}
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        tokenizer = load_tokenizer(folder)
        options: dict[str, Any] = {"task_path": task_path, "shots": shots, "limit": limit}
        found["tasks"] = run_tasks(model, tokenizer, names, batch_size=batch, **options).to_dict()
    if said is not None:
        other = None
        if reference is not None:
            dense = resolve_folder(reference)
            other = (on_device(load(dense), device), dense)
        found["sentences"] = measure_encoder(model, folder, said, reference=other, batch_size=batch).to_dict()
    if labels is not None:
        examples = read_examples(labels, dict(model.config.label2id or {}))  # type: ignore[arg-type]  # numbers
        found["labels"] = measure_accuracy(model, folder, examples, batch_size=batch).to_dict()
    if as_json:
        shared.print_json({"model": path, **found})
    else:
        _print(found)


def _check_usage(
    text: Path | None, tasks: str | None, sentences: Path | None, labels: Path | None, more: dict[str, Any]
) -> None:
    """Raise BadParameter unless there is something to measure, and options have what they belong to."""
    if text is tasks is sentences is labels is None:
        raise typer.BadParameter(
            "Say what to measure: --text FILE (perplexity), --tasks NAMES (lm-evaluation-harness), "
            "--sentences FILE (encoders) or --labels FILE (classifiers)."
        )
    for option, needed, given in (
        ("--task-path", "--tasks", tasks),
        ("--reference", "--sentences", sentences),
    ):
        if more[option] is not None and given is None:
            raise typer.BadParameter(f"{option} belongs to {needed}, which is not given.")


def _perplexity(
    model: PreTrainedModel, folder: Path, text: str, *, context: int | None, stride: int | None, batch: int
) -> dict[str, Any]:
    require_causal(model)
    tokens = token_ids(load_tokenizer(folder), text)
    measured = perplexity(
        model,
        tokens,
        context=usual_context(model) if context is None else context,
        stride=stride,
        batch_size=batch,
        progress=True,
    )
    return {**measured.to_dict(), "how": measured.how}


def _print(found: dict[str, Any]) -> None:
    if "perplexity" in found:
        shared.print_lines(f"perplexity {found['perplexity']:.4f}", f"loss {found['loss']:.5f}", found["how"])
    if "tasks" in found:
        tasks = found["tasks"]
        rows = [
            (task, metric, f"{value:.4f}", _error(values, metric), f"{tasks['samples'].get(task, 0):,}")
            for task, values in tasks["scores"].items()
            for metric, value in values.items()
            if not metric.partition(",")[0].endswith("_stderr")
        ]
        shared.print_table(("task", "metric", "score", "standard error", "examples"), rows)
        shared.print_lines(f"lm-evaluation-harness {tasks['version']}")
    if "sentences" in found:
        names = {
            "cosine": "cosine with the reference",
            "hits": "own half found first",
            "reciprocal_rank": "mean reciprocal rank",
        }
        scores = found["sentences"]
        shared.print_lines(*(f"{text} {scores[x]:.4f}" for x, text in names.items() if scores[x] is not None))
        shared.print_lines(f"{scores['sentences']:,} sentences")
    if "labels" in found:
        scores = found["labels"]
        shared.print_lines(f"accuracy {scores['accuracy']:.4f}", f"loss {scores['loss']:.5f}")
        shared.print_lines(f"{scores['examples']:,} labelled texts")


def _error(values: dict[str, float], metric: str) -> str:
    name, comma, rest = metric.partition(",")
    error = values.get(f"{name}_stderr{comma}{rest}")
    return "" if error is None else f"{error:.4f}"

"""`tensornet eval`: perplexity, tasks of lm-evaluation-harness, encoders, classifiers of texts and images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from tensornet_hf.checkpoint.load import load, on_device, resolve_folder
from tensornet_hf.cli import options as shared
from tensornet_hf.evaluation import (
    measure_accuracy,
    measure_encoder,
    measure_image_accuracy,
    read_images,
    run_tasks,
)
from tensornet_hf.evaluation.classifiers import read_examples
from tensornet_hf.evaluation.encoders import read_sentences
from tensornet_hf.evaluation.images import require_image_classifier
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
    images: Annotated[
        Path | None,
        typer.Option(
            help="Accuracy of a classifier of images: a folder of FOLDER/CLASS/image.png, or JSON lines "
            '{"image": ..., "label": ...}.'
        ),
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
    """Measure a model: perplexity, tasks, sentences, labelled texts or images, one or several of them."""
    _check_usage(
        (text, tasks, sentences, labels, images),
        {"--task-path": (task_path, "--tasks", tasks), "--reference": (reference, "--sentences", sentences)},
    )
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
        examples = read_examples(labels, _label_names(model))
        found["labels"] = measure_accuracy(model, folder, examples, batch_size=batch).to_dict()
    if images is not None:
        require_image_classifier(model)
        listed = read_images(images, _label_names(model))
        seen = measure_image_accuracy(model, folder, listed, batch_size=batch, progress=True)
        found["images"] = seen.to_dict()
    if as_json:
        shared.print_json({"model": path, **found})
    else:
        _print(found)


def _check_usage(measured: Sequence[object], belonging: Mapping[str, tuple[object, str, object]]) -> None:
    """Raise BadParameter unless there is something to measure, and options have what they belong to.

    Args:
        measured: options that each name something to measure.
        belonging: option -> its value, the option that it belongs to, and the value of that one.
    """
    if all(option is None for option in measured):
        raise typer.BadParameter(
            "Say what to measure: --text FILE (perplexity), --tasks NAMES (lm-evaluation-harness), "
            "--sentences FILE (encoders), --labels FILE (classifiers of texts) or --images FOLDER "
            "(classifiers of images)."
        )
    for option, (value, needed, given) in belonging.items():
        if value is not None and given is None:
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


def _label_names(model: Any) -> dict[int, str]:
    """Return the names of a model's classes by number; none if its configuration names none."""
    return dict(model.config.id2label or {})


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
    for key, unit in (("labels", "texts"), ("images", "images")):
        if key in found:
            _print_accuracy(found[key], unit)


def _print_accuracy(scores: dict[str, Any], unit: str) -> None:
    shared.print_lines(f"accuracy {scores['accuracy']:.4f}")
    if scores["top5"] is not None:
        shared.print_lines(f"among the five likeliest {scores['top5']:.4f}")
    shared.print_lines(f"loss {scores['loss']:.5f}", f"{scores['examples']:,} labelled {unit}")


def _error(values: dict[str, float], metric: str) -> str:
    name, comma, rest = metric.partition(",")
    error = values.get(f"{name}_stderr{comma}{rest}")
    return "" if error is None else f"{error:.4f}"

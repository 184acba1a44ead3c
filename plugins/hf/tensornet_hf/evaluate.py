"""Evaluate language models: perplexity, loss on a held-out text, and tasks of lm-evaluation-harness."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tensornet._util import import_optional, in_eval_mode, without_cache
from tensornet.calibration import label_losses
from tensornet.calibration.batches import IGNORED, Batch
from tensornet.calibration.losses import scores_next_token
from tensornet.calibration.walk import Loaded, Walk, find_blocks, in_memory
from tensornet.compression.loss_increase import (
    RecordedLosses,
    mean_and_error,
    record_losses,
)
from tensornet.errors import NonFiniteError, ShapeError, TargetError, TensorNetError
from tensornet.softmax_losses import cross_entropies, kl_divergences
from tensornet_hf.lazy_model import LazyModel
from tensornet_hf.text import (
    bos_token,
    calibration_data,
    first_line,
    load_tokenizer,
    text_config,
    token_ids,
    usual_context,
)

#: Largest number of tokens that are read from a held-out text.
HELD_OUT_TOKENS = 32_768
#: Largest number of logits in a batch: 64 MB in float32.
MOST_LOGITS = 16_000_000


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text, and how it was measured.

    Args:
        perplexity: `exp(loss)`.
        loss: mean negative log-likelihood of a scored token, in nats.
        tokens: number of scored tokens. A token is scored once, in the first window that also contains its
            predecessor.
        windows: number of windows.
        context: tokens in a window (the last window may be shorter).
        stride: number of tokens from the start of a window to the start of the next.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    context: int
    stride: int

    @property
    def how(self) -> str:
        """Short description of the measurement, for reports."""
        return (
            f"{self.tokens:,} tokens scored in {self.windows:,} window{'s' if self.windows > 1 else ''} "
            f"of {self.context}, stride {self.stride}"
        )


def text_windows(
    tokens: Tensor,
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 16,
    bos: int | None = None,
) -> list[Batch]:
    """Cut a text into windows in which each token is scored at most once.

    The first token of a window cannot be predicted, so without overlap one token of each window is not
    scored. If `stride` is smaller than `context`, every token but the first of the text is scored, and most
    tokens have at least `context - stride` tokens before them.

    Args:
        tokens: token ids of the text, shape `(length,)`.
        context: number of tokens in a window, at least 2.
        stride: number of tokens from the start of a window to the start of the next, from 1 to `context` (the
            default).
        batch_size: largest number of windows in a batch.
        bos: token that replaces the first one of each window, which is never scored (see `text.bos_token`).

    Returns:
        Batches of `input_ids`, shape `(windows, at most context)`. If windows overlap, `labels` of the same
        shape select the scored tokens.

    Raises:
        ShapeError: `tokens` is not a vector of at least two tokens.
        ValueError: a value is out of its range.
    """
    if tokens.ndim != 1 or len(tokens) < 2 or tokens.is_floating_point():
        raise ShapeError(
            "A text needs at least two token ids of shape (length,), "
            f"got {tuple(tokens.shape)} {tokens.dtype}."
        )
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens, one to read and one to predict, got {context}.")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride must be between 1 and the context {context}, got {stride}: a larger stride would skip "
            "tokens."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    rows: list[Batch] = []
    scored = 0  # number of tokens that earlier windows cover
    for start in range(0, len(tokens) - 1, stride):
        ids = tokens[start : start + context]
        labels = ids.clone()
        labels[: max(scored - start, 0)] = IGNORED
        if bos is not None:
            ids = torch.cat([ids.new_tensor([bos]), ids[1:]])
        rows.append({"input_ids": ids} if stride == context else {"input_ids": ids, "labels": labels})
        scored = start + len(ids)
        if scored == len(tokens):
            break
    batches: list[Batch] = []
    for _, group in groupby(rows, key=lambda row: len(row["input_ids"])):  # the last window may be shorter
        same = list(group)
        for k in range(0, len(same), batch_size):
            part = same[k : k + batch_size]
            batches.append({name: torch.stack([row[name] for row in part]) for name in part[0]})
    return batches


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 16,
    bos: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Measure the perplexity of a text, `exp(-1/N sum log p(token | earlier tokens of the window))`.

    Every window starts at position 0. See `text_windows`.

    Args:
        model: a causal language model of transformers; or any module whose class name ends in `ForCausalLM`
            and whose output has `logits`.
        tokens: token ids of the text, shape `(length,)`.
        context: tokens in a window.
        stride: tokens from the start of a window to the start of the next; by default `context` (no overlap).
        batch_size: largest number of windows in a batch; smaller if the logits would exceed 64 MB.
        bos: token that replaces the first one of each window; many models need the one that their tokenizer
            puts before every text.
        progress: show a progress bar.

    Raises:
        ShapeError: `tokens` is not a vector of at least two tokens.
        ValueError: context, stride or batch size is out of range, or `context` exceeds the positions of the
            model.
        TargetError: the model does not predict the next token: its loss compares each position with the
            label of the same position.
        NonFiniteError: the model's loss is NaN or infinite.
    """
    device = next(model.parameters()).device
    batches = _windows(model, tokens, context, stride, batch_size, bos, device)
    total, count = 0.0, 0
    with in_eval_mode(model), without_cache(model):
        for batch in tqdm(batches, desc="perplexity", unit="batch", disable=not progress):
            losses = label_losses(model, batch).double()
            total += float(losses.sum())
            count += len(losses)
    if not math.isfinite(total):
        raise NonFiniteError(
            f"The model's loss on this text is {total}: check its weights, and use a dtype of larger range."
        )
    return _perplexity(total / count, count, batches, context, stride)


def _windows(
    model: nn.Module,
    tokens: Tensor,
    context: int,
    stride: int | None,
    batch_size: int,
    bos: int | None,
    device: torch.device,
) -> list[Batch]:
    """Cut a text into batches of windows for a causal language model, with the checks of `perplexity`."""
    if scores_next_token(model) is False:
        raise TargetError(
            f"{type(model).__name__} does not predict the next token (its loss compares each position with "
            "the label of the same position), so it has no perplexity. Compare such models by their own "
            "loss, or pass a causal language model."
        )
    config = text_config(model)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and context > positions:
        raise ValueError(f"context {context} is more than the {positions} positions of this model.")
    vocabulary = getattr(config, "vocab_size", None) or 1
    batch_size = min(batch_size, max(1, MOST_LOGITS // (max(context, 1) * vocabulary)))
    return text_windows(tokens.to(device), context=context, stride=stride, batch_size=batch_size, bos=bos)


def _perplexity(
    loss: float, count: int, batches: Sequence[Batch], context: int, stride: int | None
) -> Perplexity:
    windows = sum(len(batch["input_ids"]) for batch in batches)
    return Perplexity(math.exp(min(loss, 700.0)), loss, count, windows, context, stride or context)


@dataclass(frozen=True)
class Divergence:
    """Distance of a model's next-token predictions from those of a reference model, on the tokens of a text.

    Each value is a pair of an estimate and its standard error, which assumes independent tokens.

    Args:
        mean, median, percentile_99, percentile_99_9: statistics of the Kullback-Leibler divergence
            `KL(reference || model)` of the next token in nats.
        same_top: share of tokens for which both models consider the same token the most likely.
        loss_increase: mean difference of the losses in nats.
        perplexity: perplexity of the model on the text.
    """

    mean: tuple[float, float]
    median: tuple[float, float]
    percentile_99: tuple[float, float]
    percentile_99_9: tuple[float, float]
    same_top: tuple[float, float]
    loss_increase: tuple[float, float]
    perplexity: Perplexity

    def __str__(self) -> str:
        kl = ", ".join(
            f"{name} {value:.4f} +- {error:.1g}"
            for name, (value, error) in (
                ("mean", self.mean),
                ("median", self.median),
                ("99th percentile", self.percentile_99),
                ("99.9th percentile", self.percentile_99_9),
            )
        )
        share, error = self.same_top
        return (
            f"KL divergence {kl}\nsame top token {100 * share:.2f} +- {100 * error:.1g} %\n"
            f"loss increase {self.loss_increase[0]:+.4f} +- {self.loss_increase[1]:.1g}"
        )


@torch.no_grad()
def divergence(
    model: nn.Module,
    reference: nn.Module,
    tokens: Tensor,
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 16,
    bos: int | None = None,
    progress: bool = False,
) -> Divergence:
    """Compare the next-token predictions of two causal language models on the windows of a text.

    Both models run on the same windows, one batch at a time, so that no predictions have to be stored.

    Args:
        model: the model to measure.
        reference: the model to compare with, such as the original.
        tokens, context, stride, batch_size, bos, progress: see `perplexity`.

    Raises:
        ShapeError, ValueError: see `perplexity`.
        TargetError: a model does not predict the next token, or the vocabularies differ.
        NonFiniteError: a prediction is NaN or infinite.
    """
    device = next(model.parameters()).device
    batches = _windows(model, tokens, context, stride, batch_size, bos, device)

    def logits(number: int, batch: Batch) -> tuple[Tensor, Tensor]:
        ids, there = batch["input_ids"], next(reference.parameters()).device
        return model(input_ids=ids).logits, reference(input_ids=ids.to(there)).logits.to(device)

    with in_eval_mode(model), in_eval_mode(reference), without_cache(model), without_cache(reference):
        return _compared(batches, logits, context, stride, progress=progress)


@torch.no_grad()
def divergence_by_block(
    model: PreTrainedModel | LazyModel,
    reference: PreTrainedModel | LazyModel,
    tokens: Tensor,
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 16,
    bos: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Divergence:
    """Compute the same as `divergence`, with one block in memory of each model that is opened lazily.

    One model after the other is walked over block by block, on all windows. From the two last hidden states,
    both heads compute the predictions of one batch at a time.

    Args:
        model: the model to measure; in memory, or opened by `open_model`.
        reference: the model to compare with.
        tokens, context, stride, batch_size, bos, progress: see `perplexity`.
        device: device on which models that are opened lazily run, and that others are on.

    Raises:
        ShapeError, ValueError, NonFiniteError: see `perplexity`.
        TargetError: a model does not predict the next token or has no chain of blocks, or the vocabularies
            differ.
    """
    pair = (model, reference)
    ours, dense = (x.model if isinstance(x, LazyModel) else x for x in pair)
    loaded = [_as_stored(x, device) if isinstance(x, LazyModel) else in_memory for x in pair]
    batches = _windows(ours, tokens, context, stride, batch_size, bos, torch.device(device))
    with in_eval_mode(ours), in_eval_mode(dense), without_cache(ours), without_cache(dense):
        first, second = (
            _walked(x, batches, how, progress) for x, how in zip((ours, dense), loaded, strict=True)
        )

        def logits(number: int, batch: Batch) -> tuple[Tensor, Tensor]:
            found = []
            for walk in (first, second):
                with walk.leaving(number, walk.states[walk.position, number]):
                    found.append(walk.model(input_ids=batch["input_ids"]).logits)
            return found[0], found[1]

        with loaded[0](first.ends), loaded[1](second.ends):
            return _compared(batches, logits, context, stride, progress=progress)


def _as_stored(lazy: LazyModel, device: torch.device | str) -> Loaded:
    """Return the function that loads weights in the dtypes in which they are stored."""

    def loaded(
        modules: Iterable[nn.Module], *, dtype: torch.dtype | None = None
    ) -> AbstractContextManager[Any]:
        return lazy.loaded(modules, device=device, dtype=None)

    return loaded


def _walked(model: PreTrainedModel, batches: Sequence[Batch], loaded: Loaded, progress: bool) -> Walk:
    """Run all blocks of a model on all batches, and return the walk, which has the last hidden states."""
    given = [{"input_ids": batch["input_ids"]} for batch in batches]
    names = find_blocks(model, {"input_ids": given[0]["input_ids"][:1]}, loaded)
    if not names:
        raise TargetError(
            f"{type(model).__name__} has no single chain of blocks, so it cannot be compared block by block. "
            "With memory for two models, use tensornet_hf.evaluate.divergence in Python."
        )
    walk = Walk(model, names, given, loaded=loaded)
    with loaded([*walk.ends, *walk.block.modules()]):
        walk.enter(skip=True)
    for _ in tqdm(names, desc="running blocks", unit="block", disable=not progress):
        with loaded(walk.block.modules()):
            walk.advance()
    return walk


def _compared(
    batches: Sequence[Batch],
    logits: Callable[[int, Batch], tuple[Tensor, Tensor]],
    context: int,
    stride: int | None,
    *,
    progress: bool,
) -> Divergence:
    """Compare predictions.

    Args:
        batches: the windows.
        logits: function of the number of a batch and the batch that returns the logits of the model and of
            the reference, on one device.
        context, stride, progress: see `perplexity`.
    """
    losses: list[Tensor] = []
    divergences, same, increases = [], [], []
    for number, batch in enumerate(tqdm(batches, desc="divergence", unit="batch", disable=not progress)):
        labels = batch.get("labels", batch["input_ids"])[:, 1:]
        ours, dense = (x[:, :-1] for x in logits(number, batch))
        if ours.shape != dense.shape:
            raise TargetError(
                f"The models have vocabularies of {ours.shape[-1]} and {dense.shape[-1]} tokens; compare "
                "a compressed model with its original."
            )
        scored = labels != IGNORED
        ours, dense, labels = ours[scored], dense[scored], labels[scored]
        divergences.append(kl_divergences(ours, dense).double().cpu())
        same.append((ours.argmax(-1) == dense.argmax(-1)).double().cpu())
        loss, before = (cross_entropies(x, labels).double().cpu() for x in (ours, dense))
        losses.append(loss)
        increases.append(loss - before)
    found, agreed, increase, every = (torch.cat(x) for x in (divergences, same, increases, losses))
    if not bool(found.isfinite().all()):
        raise NonFiniteError(
            "A prediction is NaN or infinite: check the models' weights, and use a dtype of larger range."
        )
    return Divergence(
        mean_and_error(found),
        _quantile(found, 0.5),
        _quantile(found, 0.99),
        _quantile(found, 0.999),
        mean_and_error(agreed),
        mean_and_error(increase),
        _perplexity(float(every.mean()), len(every), batches, context, stride),
    )


def _quantile(values: Tensor, q: float) -> tuple[float, float]:
    """Compute the q-quantile, and its standard error from the quantiles at `q +- sqrt(q (1 - q) / n)`."""
    count = len(values)
    spread = (q * (1 - q) / count) ** 0.5
    low, middle, high = values.quantile(
        torch.tensor([max(q - spread, 0.0), q, min(q + spread, 1.0)], dtype=values.dtype)
    ).tolist()
    return middle, (high - low) / 2


def held_out_batches(
    model: PreTrainedModel,
    folder: Path,
    text: str,
    *,
    name: str = "held-out text",
    tokens: int | None = HELD_OUT_TOKENS,
) -> tuple[Sequence[Any], str]:
    """Cut a held-out text into batches for a language model, and describe them; see `record_held_out`.

    Raises:
        TargetError: the model is not a language model.
        ValueError: the text is too short.
    """
    if not model.can_generate():
        raise TargetError(
            f"{type(model).__name__} is not a language model, so no loss can be measured on text without "
            "labels. Leave out the held-out text, and measure the model in Python, as "
            "examples/sentence_encoder.py and examples/image_accuracy.py do."
        )
    if model.config.is_encoder_decoder:
        return calibration_data(model, folder, text, tokens=tokens).batches, name
    tokenizer, context = load_tokenizer(folder), usual_context(model)
    ids = token_ids(tokenizer, text)[:tokens]
    if len(ids) < 2:
        raise ValueError(f"{name} has only {len(ids)} tokens; give more text.")
    batch_size = max(1, 1024 // context)
    batches = text_windows(ids, context=context, batch_size=batch_size, bos=bos_token(tokenizer))
    return batches, f"{name} in {sum(len(x['input_ids']) for x in batches)} windows of {context}"


def record_held_out(
    model: PreTrainedModel,
    folder: Path,
    text: str,
    *,
    name: str = "held-out text",
    tokens: int | None = HELD_OUT_TOKENS,
) -> RecordedLosses:
    """Record the losses of a dense language model on a held-out text, for `tensornet.compression.measure`.

    Args:
        model: a causal language model or an encoder-decoder model.
        folder: folder with the model's tokenizer.
        text: text that was used neither in training nor in calibration.
        name: name of the text, for reports.
        tokens: number of tokens to read from the start of the text; None reads all.

    Raises:
        TargetError, ValueError: see `held_out_batches`; or no token of the text is scored.
    """
    batches, how = held_out_batches(model, folder, text, name=name, tokens=tokens)
    recorded = record_losses(model, batches, loss_fn=label_losses, source=how, tokens=None)
    if recorded is None:
        raise TargetError(f"{type(model).__name__} has no loss on {name}: it scores none of the tokens.")
    return recorded


_USER = "tensornet eval --tasks"
_OFFLINE = (
    "Offline, save the data as JSON lines in FILE, write a task file FOLDER/NAME.yaml with dataset_path: "
    "json and dataset_kwargs: {data_files: {validation: FILE}}, and run --tasks NAME --task-path FOLDER"
)


class TaskError(TensorNetError, ValueError):
    """Raised for an unknown task, or for a task whose data cannot be loaded."""


@dataclass(frozen=True)
class TaskScores:
    """Scores of a model in tasks of lm-evaluation-harness.

    Args:
        scores: scores by task and metric; the standard error of METRIC is listed as `METRIC_stderr`.
        samples: number of examples of each task.
        version: version of lm-evaluation-harness.
    """

    scores: Mapping[str, Mapping[str, float]]
    samples: Mapping[str, int]
    version: str


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> TaskScores:
    """Run tasks of lm-evaluation-harness on a compressed or dense model.

    Args:
        model: a causal language model or an encoder-decoder model.
        tokenizer: the model's tokenizer.
        tasks: names of tasks, which the harness or the files of `task_path` define.
        task_path: a task file, or a folder of task files.
        limit: largest number of examples of each task; None uses all.
        batch_size: number of requests that are run at once.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        TargetError: the model cannot generate text.
        TaskError: a task is unknown, or its data cannot be loaded.
    """
    harness: Any = import_optional("lm_eval", extra="eval", user=_USER)
    if not model.can_generate():
        raise TargetError(
            f"Tasks of lm-evaluation-harness need a model that generates text, but {type(model).__name__} "
            "does not. Measure encoders and classifiers in Python, as examples/sentence_encoder.py does."
        )
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    loaded = _load_tasks(tasks, task_path)
    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        device=str(model.device),
        dtype=model.dtype,
    )
    found: Any = evaluate(wrapped, loaded, limit=limit, bootstrap_iters=1000)
    scores = {name: _numbers(values) for name, values in found["results"].items()}
    samples = {name: counts["effective"] for name, counts in found["n-samples"].items()}
    return TaskScores(scores, samples, harness.__version__)


def _load_tasks(names: Sequence[str], task_path: str | Path | None) -> Any:
    """Load tasks and their data; raise TaskError for an unknown task or missing data."""
    from lm_eval.tasks import TaskManager

    folder = None if task_path is None else Path(task_path)
    if folder is not None and not folder.exists():
        raise TaskError(f"There is no task file or folder {folder}.")
    folder = folder.parent if folder is not None and folder.is_file() else folder
    manager = TaskManager(include_path=None if folder is None else str(folder.resolve()))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise TaskError(
            f"Unknown task {unknown[0]!r}: it is not among the {len(manager.all_tasks):,} tasks of "
            "lm-evaluation-harness (listed by lm-eval ls tasks) and of the folder --task-path."
        )
    try:
        return manager.load(list(names))
    except Exception as error:  # datasets and huggingface_hub raise many classes: no file, no network, ...
        raise TaskError(
            f"The data of {', '.join(names)} cannot be loaded ({first_line(error)}). Tasks of the harness "
            f"download their data from the hub unless the cache has it. {_OFFLINE}."
        ) from error


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a task by name, without the suffix `,none` of the default filter."""
    return {
        key.replace(",none", ""): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }

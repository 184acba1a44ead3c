"""Evaluate language models: perplexity, loss on a held-out text, and tasks of lm-evaluation-harness."""

import math
from collections.abc import Mapping, Sequence
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
from tensornet.compression.loss_increase import (
    LossIncrease,
    RecordedLosses,
    mean_and_error,
    record_losses,
)
from tensornet.errors import NonFiniteError, ShapeError, TargetError, TensorNetError
from tensornet_hf.text import calibration_data, first_line, load_tokenizer, token_ids, usual_context

#: Largest number of tokens of a held-out text.
HELD_OUT_TOKENS = 32_768
#: Largest number of logits of one batch: 64 MB in float32.
MOST_LOGITS = 16_000_000


@dataclass(frozen=True)
class ModelFacts:
    """One model of a comparison.

    Args:
        name: name in reports.
        params: stored numbers of the whole model, scales included.
        bytes: size of its weight files, or of its tensors if nothing was saved; None if unknown.
        bits: bits per weight, scales included, of the compressed layers (of the whole model in
            `tensornet_hf.compare`); None if unknown.
        scheme: number format, ranks or quantization method, in a few characters.
        quality: loss on a text, and its increase over the first model; None if not measured.
        predicted: predicted loss increase, None if there is none.
        sample: generated text, if any.
        milliseconds: time of one token, None if not measured.
    """

    name: str
    params: int
    bytes: int | None = None
    bits: float | None = None
    scheme: str = ""
    quality: LossIncrease | None = None
    predicted: float | None = None
    sample: str | None = None
    milliseconds: float | None = None

    @property
    def measured(self) -> bool:
        """True if the loss increase is measured, False if it is predicted or unknown."""
        return self.quality is not None

    @property
    def loss_increase(self) -> float | None:
        """Measured loss increase, else the predicted one."""
        return self.predicted if self.quality is None else self.quality.mean

    @property
    def perplexity(self) -> float | None:
        """Exponential of the measured loss."""
        return None if self.quality is None else math.exp(min(self.quality.loss, 700.0))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        quality = None
        if self.quality is not None:
            quality = {
                "loss": self.quality.loss,
                "perplexity": self.perplexity,
                "loss_increase": self.quality.mean,
                "stderr": self.quality.stderr,
                "kl": self.quality.kl_mean,
                "tokens": self.quality.tokens,
                "source": self.quality.source,
            }
        return {
            "name": self.name,
            "scheme": self.scheme,
            "bytes": self.bytes,
            "bits_per_weight": self.bits,
            "parameters": self.params,
            "quality": quality,
            "predicted_loss_increase": self.predicted,
            "sample": self.sample,
            "milliseconds": self.milliseconds,
        }


@dataclass(frozen=True)
class Perplexity:
    """Perplexity together with the windows over which it was measured.

    Args:
        perplexity: `exp(loss)`.
        loss: mean negative log-likelihood of a scored token, in nats.
        tokens: number of scored tokens. A token is scored once, in the first window that also contains its
            predecessor.
        windows: number of windows.
        context: tokens in a window (the last window may be shorter).
        stride: tokens from the start of one window to the start of the next.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    context: int
    stride: int

    @property
    def how(self) -> str:
        """Description of the measurement in a few words."""
        return (
            f"{self.tokens:,} tokens scored in {self.windows:,} window{'s' if self.windows > 1 else ''} "
            f"of {self.context}, stride {self.stride}"
        )


def text_windows(
    tokens: Tensor, *, context: int, stride: int | None = None, batch_size: int = 16
) -> list[Batch]:
    """Cut a text into windows that score each token once.

    The first token of a window has no predecessor in it, so each window without overlap leaves one token
    unscored. With a smaller stride every token but the first of the text is scored, most of them with at
    least `context - stride` tokens before them.

    Args:
        tokens: shape `(length,)`.
        context: tokens of a window, at least 2.
        stride: step between windows, from 1 to `context`; `context` if absent.
        batch_size: largest number of windows in a batch.

    Returns:
        Batches of `input_ids`, shape `(windows, at most context)`. If windows overlap, `labels` select the
        scored tokens.

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
        raise ValueError(f"context must be at least 2 tokens, one to see and one to predict, got {context}.")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride must lie between 1 and the context {context}, got {stride}: a larger one skips tokens."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    rows: list[Batch] = []
    scored = 0  # tokens before this one are done
    for start in range(0, len(tokens) - 1, stride):
        ids = tokens[start : start + context]
        labels = ids.clone()
        labels[: max(scored - start, 0)] = IGNORED
        rows.append({"input_ids": ids} if stride == context else {"input_ids": ids, "labels": labels})
        scored = start + len(ids)
        if scored == len(tokens):
            break
    batches: list[Batch] = []
    for _, group in groupby(rows, key=lambda row: len(row["input_ids"])):  # only the last can be shorter
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
    progress: bool = False,
) -> Perplexity:
    """Measure the perplexity of a text, `exp(-1/N sum log p(token | tokens before it in its window))`.

    No special tokens are added; every window starts at position 0.

    Args:
        model: a causal language model; it may be any module with `logits` in its output whose class name ends
            in `ForCausalLM`.
        tokens: the text, shape `(length,)`, integers.
        context: tokens of a window.
        stride: step between windows; `context` (no overlap) if absent.
        batch_size: largest number of windows in a batch; fewer if their logits would exceed 64 MB.
        progress: show a progress bar.

    Raises:
        ShapeError: `tokens` is not a vector of at least two tokens.
        ValueError: context, stride or batch size is out of range, or `context` exceeds the positions of the
            model.
        TargetError: the model is scored by the label of the same position, which it may read as input.
        NonFiniteError: the model's loss is NaN or infinite.
    """
    batches = _windows(model, tokens, context, stride, batch_size)
    total, count = 0.0, 0
    with in_eval_mode(model), without_cache(model):
        for batch in tqdm(batches, desc="perplexity", unit="batch", disable=not progress):
            losses = label_losses(model, batch).double()
            total += float(losses.sum())
            count += len(losses)
    if not math.isfinite(total):
        raise NonFiniteError(f"The model's loss over this text is {total}: its weights or dtype are broken.")
    return _perplexity(total / count, count, batches, context, stride)


def _windows(
    model: nn.Module, tokens: Tensor, context: int, stride: int | None, batch_size: int
) -> list[Batch]:
    """Cut a text into batches of windows for a causal language model, see `perplexity`."""
    if scores_next_token(model) is False:
        raise TargetError(
            f"The loss of {type(model).__name__} scores each label at its own position, so its logits are no "
            "predictions of the next token and have no perplexity. Compare such models by their own loss, or "
            "pass a causal language model."
        )
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is not None and context > positions:
        raise ValueError(f"context {context} is more than the {positions} positions this model has.")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    batch_size = min(batch_size, max(1, MOST_LOGITS // (context * vocabulary)))
    device = next(model.parameters()).device
    return text_windows(tokens.to(device), context=context, stride=stride, batch_size=batch_size)


def _perplexity(
    loss: float, count: int, batches: Sequence[Batch], context: int, stride: int | None
) -> Perplexity:
    windows = sum(len(batch["input_ids"]) for batch in batches)
    return Perplexity(math.exp(min(loss, 700.0)), loss, count, windows, context, stride or context)


@dataclass(frozen=True)
class Divergence:
    """How far the predictions of a model are from those of a reference, over all tokens of a text.

    Args:
        mean, median, percentile_99: of the Kullback-Leibler divergence `KL(reference || model)` of the next
            token, in nats, each with its standard error.
        same_top: share of tokens for which both models prefer the same next token, with its standard error.
        loss_increase: mean difference of the losses, with its standard error.
        perplexity: of the model on this text. Standard errors treat its tokens as independent.
    """

    mean: tuple[float, float]
    median: tuple[float, float]
    percentile_99: tuple[float, float]
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
    progress: bool = False,
) -> Divergence:
    """Compare the predictions of two causal language models on a text, window by window.

    Both models run on the same windows as in `perplexity`, so that no predictions are kept.

    Args: as for `perplexity`, and the model to compare with.

    Raises:
        ShapeError, ValueError: as for `perplexity`.
        TargetError: as for `perplexity`, or the vocabularies differ.
        NonFiniteError: a prediction is NaN or infinite.

    Example:
        >>> from tensornet_hf.evaluate import divergence
        >>> model = th.load(th.embedded.gpt2_path())
        >>> divergence(model, model, torch.arange(64), context=32).mean
        (0.0, 0.0)
    """
    device = next(model.parameters()).device
    batches = _windows(model, tokens, context, stride, batch_size)
    losses: list[Tensor] = []
    divergences, same, increases = [], [], []
    with in_eval_mode(model), in_eval_mode(reference), without_cache(model), without_cache(reference):
        for batch in tqdm(batches, desc="divergence", unit="batch", disable=not progress):
            ids = batch["input_ids"]
            labels = batch.get("labels", ids)[:, 1:]
            ours, dense = (
                x(input_ids=ids.to(next(x.parameters()).device)).logits[:, :-1].float().to(device)
                for x in (model, reference)
            )
            if ours.shape != dense.shape:
                raise TargetError(
                    f"The models have vocabularies of {ours.shape[-1]} and {dense.shape[-1]} tokens; compare "
                    "a model with the one that it was made from."
                )
            scored = labels != IGNORED
            q, p, labels = ours[scored].log_softmax(-1), dense[scored].log_softmax(-1), labels[scored]
            divergences.append((p.exp() * (p - q)).sum(-1).double().cpu())
            same.append((p.argmax(-1) == q.argmax(-1)).double().cpu())
            chosen = labels[:, None]
            losses.append(-q.gather(1, chosen)[:, 0].double().cpu())
            increases.append((p - q).gather(1, chosen)[:, 0].double().cpu())
    found, agreed, increase, loss = (torch.cat(x) for x in (divergences, same, increases, losses))
    if not bool(found.isfinite().all()):
        raise NonFiniteError("A prediction is NaN or infinite: the weights or dtype of a model are broken.")
    return Divergence(
        mean_and_error(found),
        _quantile(found, 0.5),
        _quantile(found, 0.99),
        mean_and_error(agreed),
        mean_and_error(increase),
        _perplexity(float(loss.mean()), len(loss), batches, context, stride),
    )


def _quantile(values: Tensor, q: float) -> tuple[float, float]:
    """Compute a quantile and its standard error, from the order statistics one binomial deviation away."""
    count = len(values)
    spread = (q * (1 - q) / count) ** 0.5
    low, middle, high = values.quantile(
        torch.tensor([max(q - spread, 0.0), q, min(q + spread, 1.0)], dtype=values.dtype)
    ).tolist()
    return middle, (high - low) / 2


def record_held_out(
    model: PreTrainedModel,
    folder: Path,
    text: str,
    *,
    name: str = "held-out text",
    tokens: int | None = HELD_OUT_TOKENS,
) -> RecordedLosses:
    """Run a dense language model on a held-out text, for `tensornet.compression.measure`.

    Args:
        model: a causal language model or an encoder-decoder.
        folder: folder with its tokenizer.
        text: text used neither in training nor in calibration.
        name: name of the text, for reports.
        tokens: how much of it to use; all if absent.

    Raises:
        TargetError: a model of another kind, for which text has no labels.
        ValueError: the text is too short.

    Example:
        >>> from tensornet_hf.evaluate import record_held_out
        >>> model = th.load(th.embedded.gpt2_path())
        >>> text = th.embedded.heldout_text()
        >>> recorded = record_held_out(model, th.embedded.gpt2_path(), text, tokens=512)
        >>> tn.compression.measure(model, recorded).mean
        0.0
    """
    if not model.can_generate():
        raise TargetError(
            f"{type(model).__name__} is no language model: a text has no labels for it, so no loss can be "
            "measured. Leave the held-out text out, and measure the model in Python, as "
            "examples/sentence_encoder.py and examples/image_accuracy.py do."
        )
    batches: Sequence[Any]
    if model.config.is_encoder_decoder:
        batches = calibration_data(model, folder, text, tokens=tokens).batches
        how = name
    else:
        ids, context = token_ids(load_tokenizer(folder), text)[:tokens], usual_context(model)
        if len(ids) < 2:
            raise ValueError(f"{name} has only {len(ids)} tokens; give more text.")
        batches = text_windows(ids, context=context, batch_size=max(1, 1024 // context))
        how = f"{name} in {sum(len(x['input_ids']) for x in batches)} windows of {context}"
    recorded = record_losses(model, batches, loss_fn=label_losses, source=how, tokens=None)
    if recorded is None:
        raise TargetError(f"{type(model).__name__} has no loss on {name}: no token of it is scored.")
    return recorded


_USER = "tensornet eval --tasks"
_OFFLINE = (
    "Offline: save the data as JSON lines, name that file in a task file, NAME.yaml, under "
    "dataset_path: json and dataset_kwargs: {data_files: {validation: FILE}}, and run --tasks NAME "
    "--task-path FOLDER"
)


class TaskError(TensorNetError, ValueError):
    """Raised for an unknown task, or a task whose data is not on this machine.

    Example:
        >>> from tensornet_hf.evaluate import TaskError
        >>> issubclass(TaskError, ValueError)
        True
    """


@dataclass(frozen=True)
class TaskScores:
    """Scores of tasks.

    Args:
        scores: scores by task and metric; standard errors are called `METRIC_stderr`.
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
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> TaskScores:
    """Run tasks of lm-evaluation-harness on a model, compressed or not.

    Args:
        model: language model, causal or encoder-decoder.
        tokenizer: its tokenizer.
        tasks: names of tasks, of the harness or in `task_path`.
        task_path: folder with task files, or one such file.
        shots: number of examples before each question; the default of the task if absent.
        limit: use only so many examples of each task.
        batch_size: requests run at once.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        TargetError: the model cannot generate text.
        TaskError: an unknown task, or its data is not on this machine.
    """
    harness: Any = import_optional("lm_eval", extra="eval", user=_USER)
    if not model.can_generate():
        raise TargetError(
            f"{type(model).__name__} writes no text, which the tasks of lm-evaluation-harness need; measure "
            "encoders and classifiers in Python, as examples/sentence_encoder.py does."
        )
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    loaded = _load_tasks(tasks, task_path)
    if shots is not None:
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=shots)
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
    """Load tasks with their data.

    Raises:
        TaskError: an unknown task, or its data cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    folder = None if task_path is None else Path(task_path)
    if folder is not None and not folder.exists():
        raise TaskError(f"There is no task file or folder {folder}.")
    folder = folder.parent if folder is not None and folder.is_file() else folder
    manager = TaskManager(include_path=None if folder is None else str(folder.resolve()))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise TaskError(
            f"Unknown task {unknown[0]!r} among the {len(manager.all_tasks):,} of lm-evaluation-harness "
            "(lm-eval ls tasks lists them) and of --task-path, which names a folder of your own."
        )
    try:
        return manager.load(list(names))
    except Exception as error:  # of datasets and huggingface_hub: missing files, no network, bad columns
        raise TaskError(
            f"The data of {', '.join(names)} cannot be loaded ({first_line(error)}). A task of the harness "
            f"takes its data from the hub, unless it is in the cache. {_OFFLINE}."
        ) from error


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of one task by name, without the name of the default filter."""
    return {
        key.replace(",none", ""): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }

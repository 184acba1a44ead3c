"""Evaluate models: perplexity, loss on a held-out text, and tasks of lm-evaluation-harness."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tensornet._util import import_optional, in_eval_mode
from tensornet.calibration import cosine_losses, label_losses, losses_against
from tensornet.calibration.batches import BatchLike
from tensornet.calibration.losses import TokenLosses, field, scores_next_token
from tensornet.compression.loss_increase import light_copy, measure, record_losses
from tensornet.errors import NonFiniteError, ShapeError, TargetError, TensorNetError
from tensornet_hf.text import calibration_data, load_tokenizer, scores_tokens, token_ids, usual_context

#: Logits of one batch held at a time, in elements: 64 MB in float32, whatever the vocabulary.
_LOGITS = 16_000_000


@dataclass(frozen=True)
class Perplexity:
    """Perplexity together with the windows over which it was measured.

    Args:
        perplexity: `exp(loss)`.
        loss: mean negative log-likelihood of a scored token, in nats.
        tokens: tokens scored. A token is scored once, in the first window that holds its predecessor too.
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

    def __str__(self) -> str:
        return f"{self.perplexity:.3f} ({self.how})"

    @property
    def how(self) -> str:
        """Measurement protocol in a few words."""
        return (
            f"{self.tokens:,} tokens scored in {self.windows:,} window{'s' if self.windows > 1 else ''} "
            f"of {self.context}, stride {self.stride}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True)
class Window:
    """Window of the tokens `start` to `end` of a text; those before `first_scored` are context only."""

    start: int
    end: int
    first_scored: int


def windows(length: int, *, context: int, stride: int) -> Iterator[Window]:
    """Split a text into windows of `context` tokens, `stride` apart, that score each token once.

    The first token of a window has no predecessor there, so non-overlapping windows
    (`stride == context`) leave one token each unscored; with a smaller stride every token but the first
    of the text is scored, most of them with at least `context - stride` tokens before them.

    Args:
        length: tokens of the text.
        context: tokens of a window, at least 2.
        stride: from 1 to `context`.

    Raises:
        ValueError: a value is out of its range.
    """
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens, one to see and one to predict, got {context}.")
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride must lie between 1 and the context {context}, got {stride}: a larger one skips tokens."
        )
    scored = 0  # tokens before this one are done
    for start in range(0, length - 1, stride):
        end = min(start + context, length)
        yield Window(start, end, max(scored, start + 1))
        scored = end
        if end == length:
            return


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

    No token is added; the model sees the windows as they are cut, each from position 0. The loss is summed
    in float64 from float32 log-probabilities, whatever the model's dtype.

    Args:
        model: maps `input_ids: (batch, length)` to an object or mapping whose `logits` have the shape
            `(batch, length, vocabulary)`, causally. Its training flag is put back afterwards.
        tokens: the text, shape `(length,)`, integers.
        context: tokens of a window.
        stride: step between windows; `context` (no overlap) if absent.
        batch_size: most windows run at once; fewer where their logits would exceed 64 MB.
        progress: show a progress bar.

    Raises:
        ShapeError: `tokens` is not a vector of at least two tokens.
        ValueError: context, stride or batch size out of range, or more context than the model has positions.
        TargetError: the model's own loss scores a label at its own position, so the model may see it.
        NonFiniteError: the model's loss is NaN or infinite.
    """
    if tokens.ndim != 1 or len(tokens) < 2 or tokens.is_floating_point():
        raise ShapeError(
            "perplexity needs at least two token ids of shape (length,), "
            f"got {tuple(tokens.shape)} {tokens.dtype}."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    _check_next_token(model)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is not None and context > positions:
        raise ValueError(f"context {context} is more than the {positions} positions this model has.")
    stride = context if stride is None else stride
    cut = list(windows(len(tokens), context=context, stride=stride))
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    loss, count = 0.0, 0
    bar = tqdm(total=len(cut), desc="perplexity", unit="window", disable=not progress)
    with in_eval_mode(model), bar:
        for batch in _batches(cut, _fitting(model, context, batch_size)):
            ids = torch.stack([tokens[w.start : w.end] for w in batch])
            logits = field(model(input_ids=ids), "logits")
            for row, window in enumerate(batch):
                first = window.first_scored - window.start
                predicted = logits[row, first - 1 : -1].float()  # shape: (scored, vocabulary)
                losses = nn.functional.cross_entropy(predicted, ids[row, first:], reduction="none")
                loss += float(losses.double().sum())
                count += len(losses)
            bar.update(len(batch))
    if not math.isfinite(loss):
        raise NonFiniteError(f"The model's loss over this text is {loss}: its weights or dtype are broken.")
    mean = loss / count
    return Perplexity(math.exp(min(mean, 700.0)), mean, count, len(cut), context, stride)


def _check_next_token(model: nn.Module) -> None:
    """Raise TargetError if a model is of a class that scores each label at its own position."""
    if scores_next_token(model) is False:
        raise TargetError(
            f"The loss of {type(model).__name__} scores each label at its own position, so its logits are no "
            "predictions of the next token and have no perplexity. Compare such models by their own loss, or "
            "pass a causal language model."
        )


def _batches(cut: list[Window], size: int) -> Iterator[list[Window]]:
    """Group neighbouring windows of one length; only the last can be shorter."""
    batch: list[Window] = []
    for window in cut:
        if batch and (len(batch) == size or window.end - window.start != batch[0].end - batch[0].start):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _fitting(model: nn.Module, context: int, batch_size: int) -> int:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    return max(1, min(batch_size, _LOGITS // (context * vocabulary)))


#: Tokens of a held-out text that are used.
HELD_OUT_TOKENS = 32_768


@dataclass(frozen=True)
class Quality:
    """Loss of a model on a held-out text.

    Args:
        loss: of a token in nats; of an encoder, one minus the cosine with the dense model's outputs.
        of_tokens: whether the loss is that of predicted tokens, so that its exponential is a perplexity.
        how: text and windows, in a few words.
        measure: what `loss` is: `"loss"` or `"one minus cosine"`.
        stderr: standard error of the loss increase over the dense model.
        kl: mean Kullback-Leibler divergence of the predictions from those of the dense model, in nats; None
            for models that predict no tokens.
    """

    loss: float
    of_tokens: bool
    how: str
    measure: str = "loss"
    stderr: float = 0.0
    kl: float | None = None

    @property
    def perplexity(self) -> float | None:
        """Exponential of the loss; None where it is not one of tokens."""
        return math.exp(min(self.loss, 700.0)) if self.of_tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return {**asdict(self), "perplexity": self.perplexity}


#: Measures a model; all models that one judge measures see the same tokens.
Judge = Callable[[PreTrainedModel], Quality]


def judge_of(
    dense: PreTrainedModel,
    folder: Path,
    text: str,
    *,
    name: str = "held-out text",
    tokens: int | None = HELD_OUT_TOKENS,
) -> Judge:
    """Make a judge of a dense model and its compressed versions on one text.

    Args:
        dense: stays in memory where models are judged by their distance from it.
        folder: holds its tokenizer.
        text: neither seen in training nor in calibration.
        name: of the text, for reports.
        tokens: how much of it to use; all if absent.

    Raises:
        TargetError: a classifier, for which a text has no labels.
        ValueError: the text is too short.

    Example:
        >>> from tensornet_hf.evaluate import judge_of
        >>> model = th.load(th.embedded.gpt2_path())
        >>> judge = judge_of(model, th.embedded.gpt2_path(), th.embedded.heldout_text(), tokens=512)
        >>> 10 < judge(model).perplexity < 30
        True
    """
    measured, of_tokens = "loss", True
    batches: list[BatchLike]
    if dense.can_generate() and not dense.config.is_encoder_decoder:
        ids, context = token_ids(load_tokenizer(folder), text)[:tokens], usual_context(dense)
        if len(ids) < 2:
            raise ValueError(f"{name} holds {len(ids)} tokens; give more text.")
        whole, rest = ids[: len(ids) // context * context], ids[len(ids) // context * context :]
        windows = whole.reshape(-1, context)
        batches = [*windows.split(max(1, 1024 // context))] if len(windows) else []
        batches += [rest[None]] if len(rest) > 1 else []
        losses: TokenLosses = label_losses
        how = f"tokens scored in {len(windows) + (len(rest) > 1)} windows of {context} of {name}"
    else:
        data = calibration_data(dense, folder, text, tokens=tokens)
        of_tokens = scores_tokens(type(dense))
        if not data.labelled:
            raise TargetError(
                f"{type(dense).__name__} is neither a language model nor an encoder: a text has no labels "
                "for it, so no loss can be measured. Leave the held-out text out, and measure the accuracy "
                "in Python."
            )
        measured = "one minus cosine" if data.loss_fn is cosine_losses else "loss"
        batches = list(data.batches)
        losses = losses_against(light_copy(dense))  # layers of the model itself will be replaced
        how = f"losses on {data.tokens:,} tokens of {name}"
    recorded = record_losses(dense, batches, loss_fn=losses, source=name, tokens=None)
    if recorded is None:
        raise TargetError(f"{type(dense).__name__} has no loss on {name}: no token of it is scored.")

    def judge(model: PreTrainedModel) -> Quality:
        found = measure(model, recorded)
        loss = max(found.dense_loss + found.mean, 0.0)  # a cosine above 1 is rounding
        return Quality(loss, of_tokens, f"{found.tokens:,} {how}", measured, found.stderr, found.kl_mean)

    return judge


_USER = "tensornet eval --tasks"
_OFFLINE = (
    "Offline: save the data as JSON lines, name that file in a task file, NAME.yaml, under "
    "dataset_path: json and dataset_kwargs: {data_files: {validation: FILE}}, and run --tasks NAME "
    "--task-path FOLDER"
)


class TaskError(TensorNetError, ValueError):
    """Unknown task, or a task whose data is not on this machine.

    Example:
        >>> from tensornet_hf.evaluate import TaskError
        >>> issubclass(TaskError, ValueError)
        True
    """


@dataclass(frozen=True)
class TaskScores:
    """Scores of tasks.

    Args:
        scores: by task and metric, standard errors as `METRIC_stderr`.
        samples: number of examples of each task.
        version: of lm-evaluation-harness.
    """

    scores: Mapping[str, Mapping[str, float]]
    samples: Mapping[str, int]
    version: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return asdict(self)


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
        tasks: names, of the harness or of files in `task_path`.
        task_path: folder of task files, or one such file.
        shots: examples shown before each question; as the task says if absent.
        limit: use only so many examples of each task.
        batch_size: requests run at once.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        TargetError: the model writes no text.
        TaskError: an unknown task, or one whose data is on the hub, which is not reached here.
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
        TaskError: an unknown task, or data that cannot be had.
    """
    from lm_eval.tasks import TaskManager

    folder = None if task_path is None else Path(task_path)
    if folder is not None and not folder.exists():
        raise TaskError(f"There is no task file or folder {folder}.")
    folder = folder.parent if folder is not None and folder.is_file() else folder
    include = None if folder is None else str(folder.resolve())
    # The index of the thousands of tasks that come with the harness takes seconds.
    manager = TaskManager(include_path=include, include_defaults=False)
    own = set(manager.all_tasks)
    if not own.issuperset(names):
        manager = TaskManager(include_path=include)
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known]:
        near = sorted(own) or "none, --task-path names a folder of them"
        raise TaskError(
            f"Unknown task {unknown[0]!r}: lm-evaluation-harness has {len(known) - len(own):,} tasks "
            f"(lm-eval ls tasks lists them), and there are task files of your own: {near}."
        )
    try:
        return manager.load(list(names))
    except Exception as error:  # of datasets and huggingface_hub: missing files, no network, bad columns
        raise TaskError(
            f"The data of {', '.join(names)} cannot be loaded: {_reason(error)}. A task of the harness takes "
            f"its data from the hub, unless it is in the cache. {_OFFLINE}."
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of one task by name, without the name of the default filter."""
    return {
        key.replace(",none", ""): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }

"""Loss functions that return the losses of single tokens; calibration differentiates these losses.

A loss function maps `(model, batch)` to the losses of all tokens that have a loss, shape `(tokens,)`; padding
has none. Any such function can be passed to `calibrate`. Some losses of this module draw random numbers, with
a fixed seed during calibration and otherwise with the global generator.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet._util import unwrapped
from tensornet.calibration.batches import IGNORED, Batch, run_model, takes_labels, token_mask
from tensornet.errors import TargetError
from tensornet.softmax_losses import cross_entropies, row_blocks

TokenLosses = Callable[[nn.Module, Batch], Tensor]


def label_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the cross entropy of the labels under the model's logits, shape `(tokens,)`.

    The labels are `batch["labels"]`, or, if absent, the `input_ids` without padding. For decoder classes of
    `transformers`, the logits of a position are scored by the label of the next position. For other models,
    they are scored by the label of the same position (`scores_next_token`). Logits of padding are not scored.

    The output of the model is an object or mapping with `logits` or `loss`, or one tensor `(..., classes)`
    for labels `(...)`. The model's own loss is used (`own_losses`) if its class is unknown and it computes a
    loss from token labels, or if labels and logits do not match token by token. If the labels are
    floating-point numbers in the shape of an output tensor, the loss of each row is the mean squared
    difference. See `tensornet.calibration.losses.BatchLoss`.

    Raises:
        TargetError: the model returns neither logits nor a loss, or a tensor that does not fit the labels; or
            the labels are the input tokens, but the class is not known to predict the next token.

    Example:
        >>> from tensornet.calibration import label_losses
        >>> model = torch.nn.Linear(8, 3)
        >>> label_losses(model, {"input": torch.randn(5, 8), "labels": torch.tensor([0, 1, 2, 0, 1])}).shape
        torch.Size([5])
    """
    return BatchLoss(model, batch).losses()


def own_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's own mean loss, repeated for each token that has a label, shape `(tokens,)`.

    The labels are `batch["labels"]`, or, if absent, the `input_ids` without padding.

    Raises:
        TargetError: the model returns no loss.
    """
    labels = _labels(batch)
    output = run_model(model, batch if labels is None else {**batch, "labels": labels})
    if (loss := field(output, "loss")) is None:
        raise TargetError(f"{type(model).__name__} returns no loss: pass a loss_fn of your own.")
    return loss.expand(_scored(labels, batch))


def sampled_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the cross entropy of labels that are sampled from the model's own predictions.

    The second moment of the gradients is the Fisher matrix, which equals the curvature of the divergence from
    the model's predictions. So, unlike with true labels, this moment does not shrink where the model predicts
    the text well. If a model classifies whole rows, there is one loss for each row.

    Raises:
        TargetError: the model returns no logits.

    Example:
        >>> from tensornet.calibration import sampled_losses
        >>> model = torch.nn.Linear(8, 3)
        >>> sampled_losses(model, {"input": torch.randn(5, 8), "labels": torch.tensor([0, 1, 2, 0, 1])}).shape
        torch.Size([5])
    """
    found = BatchLoss(model, batch)
    if found.logits is not None:
        logits, _, places = found.scored_logits()
    else:
        of_rows = _logits(found.output)
        if of_rows is None or of_rows.ndim != 2 or of_rows.shape[1] < 2 or _numbers(found.labels):
            raise TargetError(
                f"{type(model).__name__} returns no logits for tokens or rows, so no labels can be drawn; "
                "use label_losses, or pass a loss function of your own."
            )
        logits, places = of_rows, torch.arange(len(of_rows), device=of_rows.device)
    return cross_entropies(logits, drawn_labels(logits, places), places)


def cosine_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Compute a random projection of each row's mean-pooled, normalized hidden states, shape `(rows,)`.

    Projections are drawn from a normal distribution, so the second moment of the gradients is `J^T J`, with
    the Jacobian `J` of the normalized vectors. The predicted increase of this "loss" is then half the squared
    distance between the normalized vectors of the dense and the compressed model. This equals one minus the
    cosine of the two vectors.

    Example:
        >>> from tensornet.calibration import cosine_losses
        >>> class Encoder(torch.nn.Embedding):
        ...     def forward(self, input):
        ...         return {"last_hidden_state": super().forward(input)}
        >>> cosine_losses(Encoder(100, 8), {"input": torch.randint(100, (4, 6))}).shape
        torch.Size([4])
    """
    return _projected(pooled(run_model(model, batch), batch))


def output_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Compute a random projection of each row's normalized outputs, shape `(rows,)`.

    This is for models without labels. As with `cosine_losses`, the predicted increase of this "loss" is half
    the squared distance between the outputs of the dense and the compressed model for a row, relative to the
    squared norm of the dense output.

    Example:
        >>> from tensornet.calibration import output_losses
        >>> output_losses(torch.nn.Linear(3, 2), {"input": torch.ones(4, 3)}).shape
        torch.Size([4])
    """
    outputs = _output_rows(run_model(model, batch), batch)
    return _projected(outputs) / outputs.detach().norm(dim=-1).clamp_min(_TINY)


#: Losses that draw random projections. Only the gradients of these losses have a meaning, not the values.
PROJECTIONS: tuple[TokenLosses, ...] = (cosine_losses, output_losses)


def comparable_losses(loss_fn: TokenLosses | None, *, labelled: bool) -> TokenLosses | None:
    """Return the loss function by which a compressed model is compared with the dense one, or None.

    Losses of sampled labels are random, so the labels of the batches are used, if they have any. The values
    of random projections mean nothing; only their gradients do.

    Args:
        loss_fn: the loss function of calibration.
        labelled: whether the batches have labels.
    """
    if loss_fn is sampled_losses:
        return label_losses if labelled else None
    return None if loss_fn in PROJECTIONS else loss_fn


#: Kinds of losses that models have (see `BatchLoss`).
Rule = Literal["cross entropy", "squared error", "own", "hidden states", "outputs", "none"]


class BatchLoss:
    """The loss of a model on a batch: the model is run, and its output decides which kind of loss it has.

    - `"cross entropy"`: there are logits and a label for each token or row, and it is known which label
      belongs to which position. It is known if the labels are labels of rows, if the class is known to
      `scores_next_token`, or if the labels are not the input tokens.
    - `"own"`: the model computes a loss. It is used if the class is unknown, or if logits and labels do not
      match.
    - `"squared error"`: the output is a tensor, and the labels are floating-point numbers of its shape.
    - `"hidden states"`: the output contains only hidden states or embeddings; they are compared with those
      of the dense model by their cosine.
    - `"outputs"`: there are no labels; outputs are compared with those of the dense model.
    - `"none"`: there are labels, but none of the above applies.

    Args:
        model: the model.
        batch: its keyword arguments, and possibly labels.

    Attributes:
        labels: `batch["labels"]` or, without them, the `input_ids` without padding, or None.
        output: what the model returned.
        logits: the logits of the output if there is one row of them for each label, or None.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch, self.labels = model, batch, _labels(batch)
        # Encoder-decoder models make the inputs of the decoder from the labels.
        encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.output = (
            self._run_with_labels() if encodes and self.labels is not None else run_model(model, batch)
        )
        if isinstance(self.output, Tensor):  # may be hidden states, so input tokens are not used as labels
            self.labels = batch.get("labels")
        logits, labels = _logits(self.output), self.labels
        matches = logits is not None and labels is not None and logits.shape[:-1] == labels.shape
        self.logits = logits if matches and not _numbers(labels) else None

    def _run_with_labels(self) -> Any:
        return run_model(self.model, {**self.batch, "labels": self.labels})

    @cached_property
    def rule(self) -> Rule:
        """The kind of loss, chosen by the output of the model and the labels in the batch.

        A batch without labels has its input tokens as labels. If the class of the model does not say which
        position predicts which token, the model is run again with these labels, since it may return a loss.
        """
        labels, given = self.labels, "labels" in self.batch
        if only_hidden(self.output):
            return "hidden states"
        if self.logits is not None and labels is not None:
            if labels.ndim != 2 or scores_next_token(self.model) is not None:
                return "cross entropy"
            if not given and takes_labels(self.model):
                self.output = self._run_with_labels()
            if field(self.output, "loss") is not None:
                return "own"
            inputs = self.batch.get("input_ids", torch.empty(0))
            if not given:
                return "outputs"
            same = inputs.shape == labels.shape and bool(((inputs == labels) | (labels == IGNORED)).all())
            return "none" if same else "cross entropy"
        if isinstance(self.output, Tensor):
            fits = labels is not None and labels.is_floating_point() and labels.shape == self.output.shape
            return "squared error" if fits else "none" if given else "outputs"
        if field(self.output, "loss") is not None:
            return "own"
        return "outputs" if not given and _tensors(self.output, self.batch) else "none"

    def losses(self) -> Tensor:
        """Compute the losses of all tokens or rows that have a label; see `label_losses`.

        Raises:
            TargetError: there is no loss, or only one that compares outputs with those of the dense model.
        """
        match self.rule:
            case "cross entropy":
                return cross_entropies(*self.scored_logits())
            case "squared error":
                return (self.output - self.labels).square().reshape(len(self.output), -1).mean(-1)
            case "own":
                own: Tensor = field(self.output, "loss")
                return own.expand(_scored(self.labels, self.batch))
        raise self._without_loss()

    def scored_logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return all logits `(positions, classes)`, the labels that are not ignored, and their positions."""
        logits, labels, mask = self.logits, self.labels, self.batch.get("attention_mask")
        assert logits is not None
        assert labels is not None
        causal = labels.ndim == 2 and bool(scores_next_token(self.model))
        padded = causal and mask is not None and mask.shape == labels.shape
        if causal:  # each position is scored by the next label
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        keep = labels != IGNORED
        if padded:  # the last position of left padding would predict the first token
            keep &= self.batch["attention_mask"] != 0
        places = keep.reshape(-1).nonzero().squeeze(1)
        # Token indices may be int32, but losses accept only int64.
        return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)[places].long(), places

    def _without_loss(self) -> TargetError:
        name, labels = type(self.model).__name__, self.labels
        if isinstance(self.output, Tensor):
            what = (
                "no labels" if labels is None else f"labels of shape {tuple(labels.shape)} and {labels.dtype}"
            )
            return TargetError(
                f"{name} returns a tensor of shape {tuple(self.output.shape)}, and the batch has "
                f"{what}, so no loss can be computed. Pass pairs (inputs, labels), where labels are class "
                "indices, one for each row of logits, or floating-point numbers in the shape of the output; "
                "or choose method='gptq', which needs no loss; or call tensornet.calibrate with a "
                "loss_fn, a function (model, batch) -> losses of shape (tokens,), and pass "
                "calibration=statistics."
            )
        if self.logits is not None:
            return TargetError(
                f"{name} computes no loss, and the labels are the tokens that it reads. Only "
                "classes such as *ForCausalLM are known to predict the next token. Pass loss_fn, a function "
                "(model, batch) -> losses of shape (tokens,)."
            )
        return TargetError(
            f"{name} returns neither logits for each token nor a loss, so the effect of "
            "weight errors cannot be measured. For hidden states use tensornet.calibration.cosine_losses, "
            "otherwise a loss of your own: stats = tensornet.calibrate(model, batches, loss_fn=...), where "
            "loss_fn is a function (model, batch) -> losses of shape (tokens,), then "
            "tensornet.compress(model, config, calibration=stats)."
        )


@torch.no_grad()
def default_losses(model: nn.Module, batch: Batch) -> tuple[TokenLosses, bool]:
    """Choose the loss function for a model from its output for one batch (see `BatchLoss`).

    Returns:
        The loss function, and True if it is the cross entropy of tokens, whose exponential is the perplexity.
    """
    found = BatchLoss(model, batch)
    match found.rule:
        case "cross entropy":
            assert found.logits is not None
            return label_losses, found.logits.ndim == 3 and _has_table(model, found.logits.shape[-1])
        case "own":
            # A model that returns logits may compute its loss only if it is called with labels; `own_losses`
            # passes them. Without logits, `label_losses` takes the loss that the model returns.
            return label_losses if found.logits is None else own_losses, False
        case "hidden states":
            return cosine_losses, False
        case "outputs":
            return output_losses, False
    return label_losses, False


#: Suffixes of class names. The logits of models in `_DECODERS` are scored by the label of the next position,
#: and those of models in `_IN_PLACE` by the label of the same position.
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_IN_PLACE = (
    "XLNetLMHeadModel",
    "XLMWithLMHeadModel",
    "ForMaskedLM",
    "ForPreTraining",
    "ForTokenClassification",
)


def scores_next_token(model: nn.Module) -> bool | None:
    """Return True if a model predicts the next token, False if it predicts the label at the same position.

    Classes of `transformers` are recognized by the end of their name. Encoder-decoder models are recognized
    by their configuration; they shift the labels themselves. The result for any other class is None.
    """
    model = unwrapped(model)
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or name.endswith(_IN_PLACE):
        return False
    return True if name.endswith(_DECODERS) else None


def has_token_losses(model: nn.Module) -> bool:
    """Return True if the name of a model's class says that its labels are tokens."""
    return type(unwrapped(model)).__name__.endswith((*_DECODERS, "XLMWithLMHeadModel", "ForMaskedLM"))


def _has_table(model: nn.Module, classes: int) -> bool:
    """Return True if an embedding has as many rows as the model has classes.

    The classes are then assumed to be tokens. If `get_input_embeddings` does not return the embedding of the
    tokens, all embeddings are checked.
    """
    getter = getattr(model, "get_input_embeddings", None)
    named = getter() if callable(getter) else None
    tables = [named] if isinstance(getattr(named, "num_embeddings", None), int) else model.modules()
    return any(getattr(table, "num_embeddings", None) == classes for table in tables)


def losses_against(teacher: nn.Module, *, remember: bool = False) -> TokenLosses:
    """Make a loss function that compares compressed models with their dense model, the teacher.

    If the teacher has a loss on the first batch, the function is `label_losses` or `own_losses`. Otherwise it
    returns one distance from the teacher's output for each row, shape `(rows,)`. For hidden states, the
    distance is one minus the cosine of the mean-pooled states. For other outputs it is half the squared
    difference, relative to the squared norm of the teacher's output.

    Args:
        teacher: the dense model.
        remember: whether to store the teacher's output for each batch, to reuse it when the same batch object
            is passed again.

    Example:
        >>> import copy
        >>> from tensornet.calibration import losses_against
        >>> teacher = torch.nn.Linear(8, 4)
        >>> losses = losses_against(teacher)
        >>> losses(copy.deepcopy(teacher), {"input": torch.randn(5, 8)}).tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0]
    """
    judged_by: TokenLosses | None = None
    known: dict[int, tuple[Batch, Any]] = {}  # keeps the batch alive, so that its id stays unique

    def wanted_of(batch: Batch) -> Any:
        if id(batch) in known:
            return known[id(batch)][1]
        with torch.no_grad():
            output = run_model(teacher, batch)
        if remember:
            known[id(batch)] = batch, output
        return output

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal judged_by
        if judged_by is None:  # the first batch decides which loss is used
            judged_by, _ = default_losses(teacher, batch)
        if judged_by not in PROJECTIONS:
            return judged_by(model, batch)
        return output_distances(run_model(model, batch), wanted_of(batch), batch)

    return losses


def output_distances(outputs: Any, wanted: Any, batch: Batch) -> Tensor:
    """Compute the distance of each output row from the same row of a reference model, shape `(rows,)`.

    If the output contains only hidden states, the distance is one minus the cosine of the mean-pooled states.
    For other outputs it is half the squared difference, relative to the squared norm of the reference row.

    Args:
        outputs: output of a model: a tensor, or an object or mapping of tensors. The first dimension of each
            tensor is the rows of the batch.
        wanted: output of the reference model.
        batch: the arguments of both models; padding in outputs `(rows, tokens, ...)` is ignored.
    """
    if only_hidden(wanted):
        return 1 - (pooled(outputs, batch) * pooled(wanted, batch)).sum(-1)
    new, old = (_output_rows(x, batch) for x in (outputs, wanted))
    return (new - old).square().sum(-1) / (2 * old.square().sum(-1)).clamp_min(_TINY)


#: Lower limit of divisors, so that outputs of zero do not cause a division by zero.
_TINY = 1e-30


def _output_rows(output: Any, batch: Batch) -> Tensor:
    """Concatenate all floating-point outputs of each row, with padding set to 0: shape `(rows, values)`."""
    parts = []
    for value in _tensors(output, batch):
        mask = token_mask(batch, value.shape[:2]) if value.ndim > 2 else None
        kept = value if mask is None else value * mask.reshape(*mask.shape, *[1] * (value.ndim - 2)).to(value)
        parts.append(kept.float().reshape(len(value), -1))
    return torch.cat(parts, 1)


def _tensors(output: Any, batch: Batch) -> list[Tensor]:
    """List the floating-point tensors of an output that have one entry for each row of the batch."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        found: Iterable[Any] = output.values()
    else:
        found = output if isinstance(output, Iterable) else getattr(output, "__dict__", {}).values()
    rows = _rows(batch)
    return [x for x in found if isinstance(x, Tensor) and x.is_floating_point() and x.shape[:1] == (rows,)]


def _rows(batch: Batch) -> int:
    """Return the number of rows of a batch, from its first tensor."""
    return next((len(x) for x in batch.values() if isinstance(x, Tensor) and x.ndim > 0), 1)


def only_hidden(output: Any) -> bool:
    """Return True if an output contains hidden states or embeddings, but neither logits nor a loss."""
    hidden, judged = (
        any(field(output, name) is not None for name in names)
        for names in ((SENTENCE, "last_hidden_state"), ("logits", "loss"))
    )
    return hidden and not judged


#: Output field in which models that embed sentences return one vector for each row.
SENTENCE = "sentence_embedding"


def pooled(output: Any, batch: Batch) -> Tensor:
    """Return the normalized sentence embedding of each row or, without one, its normalized mean hidden state.

    Returns:
        Unit vectors, shape `(rows, width)`; padding does not count in the mean.
    """
    if (embedding := field(output, SENTENCE)) is not None:
        return nn.functional.normalize(embedding.float(), dim=-1)
    hidden = field(output, "last_hidden_state").float()  # shape: (rows, tokens, width)
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        mask = torch.ones_like(hidden[..., 0])
    weights = mask[..., None].to(hidden)
    return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def _projected(unit: Tensor) -> Tensor:
    like: Any = {"dtype": unit.dtype, "device": unit.device}
    return (unit * torch.randn(unit.shape, generator=draws_on(unit.device), **like)).sum(-1)


def field(output: Any, name: str) -> Any:
    """Return a field of a model output (an object or a mapping); None if the field is missing."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _logits(output: Any) -> Tensor | None:
    return output if isinstance(output, Tensor) else field(output, "logits")


def _numbers(labels: Tensor | None) -> bool:
    """Return True if labels are regression targets instead of classes."""
    return labels is not None and labels.is_floating_point()


def _labels(batch: Batch) -> Tensor | None:
    """Return the labels of a batch or, without labels, its input tokens, with `IGNORED` at padding."""
    labels = batch.get("labels")
    if labels is None and "input_ids" in batch:
        labels = batch["input_ids"].long()  # losses accept only int64
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == labels.shape:  # masks of other shapes are attention patterns
            labels = labels.masked_fill(mask == 0, IGNORED)
    return labels


def _scored(labels: Any, batch: Batch) -> int:
    """Count the tokens that have a label; count the rows if the labels are not classes of tokens."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 2:
        return _rows(batch)
    return int((labels != IGNORED).sum())


@torch.no_grad()
def drawn_labels(logits: Tensor, places: Tensor) -> Tensor:
    """Draw a class index from the predicted probabilities of each selected row of logits.

    Args:
        logits: logits of all positions, shape `(rows, classes)`.
        places: indices of the selected rows, shape `(tokens,)`.

    Returns:
        The class indices, shape `(tokens,)`.
    """
    like: Any = {"dtype": torch.float64, "device": logits.device}
    shares = torch.rand(len(places), 1, generator=draws_on(logits.device), **like)
    drawn = torch.empty_like(places)
    for part in row_blocks(len(places), logits):
        sums = logits[places[part]].float().softmax(1).cumsum(1, dtype=torch.float64)
        # Choose the first class whose cumulative sum exceeds the drawn number; its probability cannot be 0.
        drawn[part] = torch.searchsorted(sums, shares[part] * sums[:, -1:], right=True)[:, 0]
    return drawn.clamp_max_(logits.shape[1] - 1)


#: Random generators of the innermost `seeded_draws` context, by device; None outside of such contexts.
_drawing: ContextVar[dict[torch.device, torch.Generator] | None] = ContextVar("drawing", default=None)


@contextmanager
def seeded_draws() -> Iterator[None]:
    """Return a context in which losses draw random numbers from generators with a fixed seed.

    The generators are not reset between batches, so equal batches get different random numbers.
    """
    token = _drawing.set({})
    try:
        yield
    finally:
        _drawing.reset(token)


def draws_on(device: torch.device) -> torch.Generator | None:
    """Return the seeded generator of a device; None, the global generator, outside of `seeded_draws`."""
    known = _drawing.get()
    if known is None:
        return None
    if device not in known:
        known[device] = torch.Generator(device).manual_seed(0)
    return known[device]

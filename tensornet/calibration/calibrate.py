"""Calibration: run a model over data and accumulate second moments in bounded memory."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from operator import length_hint
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet._util import check_type, progress_bar, remembering
from tensornet.calibration.batches import (
    Batch,
    BatchLike,
    as_batch,
    check_batches,
    fullest_row,
    run_model,
)
from tensornet.calibration.coherence import CoherenceSample, HeldTokens
from tensornet.calibration.gathered import GatheredTokens, hidden_states
from tensornet.calibration.gram import add_gram, add_moment, mirrored, upper_gram
from tensornet.calibration.hooks import observed
from tensornet.calibration.losses import (
    PROJECTIONS,
    TokenLosses,
    default_losses,
    label_losses,
    sampled_losses,
    token_mask,
)
from tensornet.calibration.shared_inputs import InputSum, Reading
from tensornet.calibration.stats import CalibrationStats
from tensornet.errors import NonFiniteError, TargetError
from tensornet.nn.targets import LayerSelection, check_model
from tensornet.nn.weight_readers import Run, weight_readers

Fisher = Literal["labels", "sampled"]
#: Losses that first ask the model where it scores labels, which must not be observed.
_OWN = (label_losses, sampled_losses)


@torch.inference_mode(False)  # inside it nothing can be differentiated
def calibrate(
    model: nn.Module,
    batches: Iterable[BatchLike],
    *,
    config: LayerSelection | None = None,
    loss_fn: TokenLosses | None = None,
    fisher: Fisher = "labels",
    gradient_batches: int | None = None,
    full_up_to: int = 8192,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    source: str = "calibration data",
    progress: bool = False,
) -> CalibrationStats:
    """Collect the second moments that predict the loss increase of an error in each weight.

    Memory is that of the moments plus one batch; weights get no gradients. The model runs in eval mode on
    the device its parameters are on, and is left as it was.

    Args:
        model: any module; its layers of registered kinds are observed, see `tensornet.nn.kind_of`.
        batches: keyword arguments of the model (a Hugging Face batch); or tensors, which are its first
            argument, for language models token indices `(rows, tokens)`; or pairs `(inputs, labels)` as a
            `DataLoader` gives them.
        config: observe the layers it selects; all if absent.
        loss_fn: losses of single tokens, see `tensornet.calibration.losses`; overrules `fisher`. If absent,
            labels are scored where the model's own loss scores them; a model that returns hidden states
            alone is judged by their cosine (`cosine_losses`), and outputs without labels by their distance
            from the dense ones (`output_losses`).
        fisher: `"labels"` takes gradients at the labels of the text (the empirical Fisher matrix),
            `"sampled"` at labels drawn from the model (the true one).
        gradient_batches: number of first batches that are also differentiated, which costs three times as
            much as running the model; all if absent, 0 to collect inputs only.
        full_up_to: a side of a weight longer than this keeps only the diagonal of its moment.
        dtype: dtype of the accumulators.
        autocast: run the model in this dtype where that is safe, and multiply the gradients of one batch in
            it; `torch.bfloat16` makes calibration about twice as fast on processors that have it.
            Moments of inputs are always multiplied in `dtype`, and all are summed in it.
        source: what the data is, for reports.
        progress: show a progress bar.

    Raises:
        TargetError: no batch, or a batch of an unknown form.
        NonFiniteError: inputs or gradients of a layer are not finite; the message names it.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> batches = [(torch.randn(32, 8), torch.randint(4, (32,))) for _ in range(4)]  # (inputs, labels)
        >>> stats = tn.calibrate(model, batches)
        >>> sorted(stats.columns), stats.tokens, stats.has_gradients
        (['0', '2'], 128, True)
    """
    check_model(model)
    if config is not None:
        advice = "a CompressionConfig, or LayerSelection(target_modules=...)"
        check_type("config", config, LayerSelection, advice)
    check_batches(batches, "calibrate")
    _check_arguments(fisher, gradient_batches)
    recorder = MomentRecorder(full_up_to, dtype, autocast)
    runs = _Runs(model, recorder, loss_fn, fisher, gradient_batches)
    length = length_hint(batches) or None
    with observed(model, recorder, config):
        device = next(model.parameters()).device
        for batch in progress_bar(
            batches, desc="calibrating", disable=not progress, unit="batch", total=length
        ):
            with _in_dtype(device, autocast):
                runs.add(as_batch(batch, model, device))
    stats = recorder.finish(runs.scored, runs.mean_loss(), source)
    return replace(stats, of_tokens=runs.of_tokens)


def _in_dtype(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """Run the model under autocast to `dtype`, or under the caller's autocast if `dtype` is None."""
    if autocast is None:
        return nullcontext()
    # No cache of weights in 16 bits: nothing would clear it before the last batch.
    return torch.autocast(device.type, autocast, cache_enabled=False)


@dataclass
class _Runs:
    """Run the model on batch after batch, and average the losses of their tokens."""

    model: nn.Module
    recorder: "MomentRecorder"
    loss_fn: TokenLosses | None
    fisher: Fisher
    gradient_batches: int | None
    total: float = 0.0
    scored: int = 0
    count: int = 0
    of_tokens: bool = False

    def add(self, batch: Batch) -> None:
        """Run the model on a batch, with a backward pass while gradients are still collected."""
        self.recorder.batch = batch
        with_gradients = self.gradient_batches is None or self.count < self.gradient_batches
        if self.count == 0:
            self._first(batch, with_gradients)
        with torch.set_grad_enabled(with_gradients):
            if with_gradients:
                assert self.loss_fn is not None
                each = checked_losses(self.loss_fn(self.model, batch))
                each.sum().backward()
                self.total += float(each.detach().sum())
                self.scored += each.numel()
            elif self.loss_fn is not None:  # it knows how this model is called
                self.loss_fn(self.model, batch)
            else:
                run_model(self.model, batch)
        self.count += 1

    def _first(self, batch: Batch, with_gradients: bool) -> None:
        """Find readers of weights and the default loss on the first batch."""
        self.recorder.readers = weight_readers(self.model, [_batch_run(batch, self.loss_fn)])
        with torch.set_grad_enabled(with_gradients):
            if with_gradients if self.loss_fn is None else self.loss_fn in _OWN:
                with self.recorder.paused():
                    default = default_losses(self.model, fullest_row(batch), self.fisher)
                self.loss_fn = self.loss_fn or default.losses
                self.of_tokens = self.loss_fn in _OWN and default.of_tokens

    def mean_loss(self) -> float | None:
        """Return the mean loss of a token; None without gradients, NaN for random projections.

        Raises:
            TargetError: there was no batch, or no token with a loss.
        """
        if self.count == 0:
            raise TargetError("calibrate got no batches; pass at least one, better 30 of 1,000 tokens.")
        if self.gradient_batches == 0 and not self.scored:
            return None
        return mean_loss(self.total, self.scored, self.loss_fn)


def _batch_run(batch: Batch, loss_fn: TokenLosses | None) -> Run:
    return lambda twin: run_model(twin, batch) if loss_fn is None else loss_fn(twin, batch)


def checked_losses(losses: Any) -> Tensor:
    """Validate the losses that a user-supplied function returns.

    Raises:
        TargetError: they are not a tensor that requires gradients.
    """
    if isinstance(losses, Tensor) and losses.requires_grad:
        return losses
    got = "a tensor that does not" if isinstance(losses, Tensor) else type(losses).__name__
    raise TargetError(
        "A loss function returns the losses of all tokens that have one, shape (tokens,), and they depend on "
        f"layers that are calibrated; got {got}."
    )


def mean_loss(total: float, scored: int, loss_fn: TokenLosses | None) -> float:
    """Return the mean loss of a token; NaN for random projections, whose value means nothing.

    Raises:
        TargetError: no token has a loss.
    """
    if scored == 0:
        raise TargetError(
            "No token of the calibration data has a loss: rows of one token, or nothing but padding or "
            "ignored labels. Pass longer rows, or gradient_batches=0 to collect inputs alone."
        )
    return math.nan if loss_fn in PROJECTIONS else total / scored


def _check_arguments(fisher: str, gradient_batches: int | None) -> None:
    """Raise ValueError unless both options are valid.

    Raises:
        ValueError: an invalid value; the message names the option.
    """
    if fisher not in ("labels", "sampled"):
        raise ValueError(f"fisher must be 'labels' or 'sampled', got {fisher!r}.")
    if gradient_batches is not None and gradient_batches < 0:
        raise ValueError(f"gradient_batches must be at least 0, got {gradient_batches}.")


class MomentRecorder:
    """Running sums of one calibration: hooks add to them, `finish` divides."""

    def __init__(self, full_up_to: int, dtype: torch.dtype, autocast: torch.dtype | None = None) -> None:
        self.full_up_to, self.dtype, self.autocast = full_up_to, dtype, autocast
        self.batch: Batch = {}
        self.seeing = True
        self.frequencies: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.inputs: dict[str, InputSum] = {}  # layer -> sum that it shares with those that read the same
        self._last: Reading | None = None
        self.readers: frozenset[str] = frozenset()
        self._gathered = GatheredTokens()
        self._gathered_of: Batch = self.batch
        self._masks: dict[str, Tensor] = {}  # of inputs `(tokens, features)` of this batch, by layer
        self._samples: dict[str, CoherenceSample] = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend recording inside the block."""
        self.seeing = False
        try:
            yield
        finally:
            self.seeing = True

    def see_input(self, name: str, x: Tensor) -> None:
        """Add one input; layers that read the same tensor share its moment."""
        if not self.seeing:
            return
        if self._last is None or not self._last.joins(name, x):
            self._settle()
            tokens = _rows(x, self._mask(x, name))
            self._last = Reading(x, self._moment(tokens, self.dtype), tokens.shape[0])
        elif (mask := self._masks.get(self._last.layers[0])) is not None:
            self._masks[name] = mask
        self._last.layers.append(name)
        self.counts[name] = self.counts.get(name, 0) + self._last.tokens

    def _settle(self) -> None:
        """Add the moment of the pending tensor to the sums of the layers that read it.

        To explain how this works: layers share a sum as long as they have read the same tensors. A tensor
        that only some of them read (an expert may get no token in a batch) splits the sum in two.
        """
        if self._last is None:
            return
        layers, moment = self._last.layers, self._last.moment
        self._last = None
        if new := [name for name in layers if name not in self.inputs]:
            start = InputSum(new, torch.zeros_like(moment))
            self.inputs.update(dict.fromkeys(new, start))
        for shared in {id(x): x for x in (self.inputs[name] for name in layers)}.values():
            if rest := [name for name in shared.layers if name not in layers]:
                shared.layers = [name for name in shared.layers if name in layers]
                self.inputs.update(dict.fromkeys(rest, InputSum(rest, shared.total.clone())))
            add_moment(shared.total, moment)

    def see_states(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look for hidden states among the arguments of a module that holds layers."""
        if self._gathered_of is not self.batch:
            self._gathered, self._gathered_of = GatheredTokens(), self.batch
            self._masks.clear()
        mask = self.batch.get("attention_mask")
        found = hidden_states(args, kwargs, mask) if isinstance(mask, Tensor) else None
        if found is not None:
            self._gathered.remember(*found)

    def see_indices(self, name: str, indices: Tensor, rows: int) -> None:
        """Count the lookups of each row of an embedding."""
        if not self.seeing:
            return
        mask = token_mask(self.batch, indices.shape)
        chosen = (indices if mask is None else indices[mask]).reshape(-1)
        self.counts[name] = self.counts.get(name, 0) + chosen.numel()
        _accumulate(self.frequencies, name, torch.bincount(chosen, minlength=rows).to(self.dtype))

    def place(self, name: str, x: Tensor) -> None:
        """Find the padding in an input that is not recorded, for the gradients at its layer."""
        self._mask(x, name)

    def hold(self, name: str, x: Tensor) -> list[HeldTokens]:
        """Copy some tokens of the input of a layer, for its coherence, until the gradients arrive."""
        if not self.seeing:
            return []
        mask = self._known_mask(name, x)
        return self._samples.setdefault(name, CoherenceSample(name)).hold(x, mask, self.batch)

    def see_gradient(self, name: str, gradient: Tensor, held: Sequence[HeldTokens] = ()) -> None:
        """Add the gradient of the summed loss with respect to one output, with inputs that were held."""
        if held:
            self._samples[name].add(held, gradient, self.batch)
        mask = self._known_mask(name, gradient)
        tokens = _rows(gradient, mask)
        if tokens.shape[1] > self.full_up_to:
            _accumulate(self.gradients, name, self._moment(tokens, self.dtype))
            return
        if name not in self.gradients:
            self.gradients[name] = tokens.new_zeros(tokens.shape[1], tokens.shape[1], dtype=self.dtype)
        with torch.autocast(tokens.device.type, enabled=False):
            # Their damping hides the rounding of products in 16 bits, which inputs with outliers would not.
            add_gram(self.gradients[name], tokens.to(self.autocast or self.dtype))

    def _known_mask(self, name: str, x: Tensor) -> Tensor | None:
        """Tell tokens from padding in the input of a layer or in the gradient of its output."""
        mask = self._masks.get(name)
        return self._mask(x) if mask is None or mask.shape != x.shape[:-1] else mask

    def finish(
        self, scored: int, loss: float | None, source: str, inputs: Mapping[str, Tensor] | None = None
    ) -> CalibrationStats:
        """Divide the sums: inputs by the tokens of a layer, gradients by the tokens that have a loss.

        Args:
            scored: tokens that have a loss.
            loss: mean loss of a token.
            source: what the data is.
            inputs: moments of inputs by layer that another recorder has collected.
        """
        self._settle()
        rows = {name: x.div_(max(self.counts[name], 1)) for name, x in self.frequencies.items()}
        columns: dict[str, Tensor] = {}
        for shared in {id(x): x for x in self.inputs.values()}.values():
            if not self.counts[shared.layers[0]]:  # an expert that got nothing but padding never ran
                continue
            mean = mirrored(shared.total.div_(max(self.counts[shared.layers[0]], 1)))
            columns.update(dict.fromkeys(shared.layers, mean))
        for name, moment in self.gradients.items():
            (columns if name in self.frequencies else rows)[name] = mirrored(moment.div_(scored))
        for name, moment in (*columns.items(), *rows.items()):  # inputs first: where it began
            diagonal = moment if moment.ndim == 1 else moment.diagonal()  # no element of a moment is larger
            if not bool(torch.isfinite(diagonal).all()):
                raise NonFiniteError(
                    f"Calibration met NaN or infinite inputs or gradients at layer {name!r}; check the "
                    "checkpoint, run the model in float32, or exclude the layer."
                )
        tokens = max(self.counts.values(), default=0)
        readers = tuple(sorted(self.readers))
        coherence = self._coherence(rows, {**columns, **(inputs or {})})
        return CalibrationStats(
            rows,
            columns,
            tokens,
            loss,
            source,
            readers,
            coherence=coherence,
            counts=dict(self.counts),
            scored=scored,
        )

    def _coherence(self, rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> dict[str, float]:
        """Compute the coherence of each layer that has held tokens and both moments."""
        readers: dict[int, list[str]] = {}
        for name in sorted(name for name in self._samples if name in rows and name in columns):
            readers.setdefault(id(columns[name]), []).append(name)
        ratios: dict[str, float | None] = {}
        for names in readers.values():
            with remembering():  # the moment of a shared input is factorised once
                ratios |= {name: self._samples[name].ratio(columns[name], rows[name]) for name in names}
        return {name: ratio for name, ratio in sorted(ratios.items()) if ratio is not None}

    def _mask(self, x: Tensor, name: str | None = None) -> Tensor | None:
        """Tell tokens from padding, by the sizes of a tensor or, for the input of a layer, by its rows."""
        mask = token_mask(self.batch, x.shape[:-1])
        if name is not None and x.ndim == 2 and self._gathered_of is self.batch:
            mask = self._gathered.kept(name, x, mask)
            if mask is not None:
                self._masks[name] = mask
        return mask

    def _moment(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        # The model may run under autocast; sums of thousands of squares in 16 bits would be noise.
        with torch.autocast(tokens.device.type, enabled=False):
            if tokens.shape[1] <= self.full_up_to:
                return upper_gram(tokens.to(dtype))
            return tokens.to(self.dtype).square().sum(0)


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Select the rows of tokens, shape `(tokens, features)`; not a copy where all are tokens."""
    if mask is None or bool(mask.all()):
        return x.detach().reshape(-1, x.shape[-1])
    return x.detach()[mask]


def _accumulate(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value

"""Record second moments of the inputs and gradients of layers while a model runs, by hooks on the layers."""

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensornet._util import in_eval_mode, remembering, uncompiled, without_cache
from tensornet.calibration.batches import Batch, Stop, token_mask
from tensornet.calibration.coherence import CoherenceSample, HeldTokens
from tensornet.calibration.losses import (
    PROJECTIONS,
    TokenLosses,
    label_losses,
    own_losses,
    sampled_losses,
    seeded_draws,
)
from tensornet.calibration.moment_sums import (
    FULL_UP_TO,
    GRADIENT_PRIOR,
    PRIOR,
    Mixture,
    MomentSum,
    blended,
    find_siblings,
    has_bfloat16,
    mean_moment,
    mirrored,
    numbered_parts,
)
from tensornet.calibration.stats import CalibrationStats
from tensornet.errors import NonFiniteError, TargetError
from tensornet.nn.layer_kinds import embedding_scale, kind_of
from tensornet.nn.targets import LayerSelection, Target, find_targets
from tensornet.nn.unfuse import unfused

#: If the loss belongs to rows instead of tokens, as that of an encoder, this number of rows is read, since a
#: row has one independent gradient for many tokens.
ENOUGH_LOSSES = 1024
#: Smallest number of elements of a weight for which 16 bits are faster than float32, even with conversions.
_LARGE = 1 << 18
#: Losses that may be the cross entropy of tokens; `default_losses` tells whether they are.
OWN_LOSSES = (label_losses, own_losses, sampled_losses)


def fast_dtype(model: nn.Module) -> torch.dtype | None:
    """Return `torch.bfloat16` if autocast to this dtype makes a model faster on its device, else None.

    It is assumed to be faster for float32 models with matrices of at least 2^18 elements, if the device has
    bfloat16 arithmetic. These devices are Ampere and newer GPUs, and processors with AVX-512 BF16 or AMX.
    """
    large = large_matrices(model)
    if not large or any(p.dtype != torch.float32 for p in large):
        return None
    return torch.bfloat16 if has_bfloat16(large[0].device) else None


def large_matrices(model: nn.Module) -> list[nn.Parameter]:
    """List the matrices of a model that are large enough to be faster in bfloat16."""
    return [p for p in model.parameters() if p.ndim >= 2 and p.numel() >= _LARGE]


def lowered(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return an autocast context of this dtype; if it is None, the caller's autocast is kept."""
    # The cache of autocast is disabled, since 16-bit weights would stay in it until the last batch.
    return torch.autocast(device.type, dtype, cache_enabled=False) if dtype else nullcontext()


def checked_losses(losses: Any) -> Tensor:
    """Check and return the losses that a user's loss function returned.

    Raises:
        TargetError: the losses are not a tensor that requires gradients.
    """
    if isinstance(losses, Tensor) and losses.requires_grad:
        return losses
    got = "a tensor that does not" if isinstance(losses, Tensor) else type(losses).__name__
    raise TargetError(
        "A loss function must return the losses of all tokens that have a loss, shape (tokens,), as a tensor "
        f"that requires gradients, since it depends on the calibrated layers; got {got}."
    )


def mean_loss(total: float, scored: int, loss_fn: TokenLosses | None) -> float:
    """Return the mean loss of a token; NaN for random projections, since their mean has no meaning.

    Raises:
        TargetError: no token has a loss.
    """
    if scored == 0:
        raise TargetError(
            "No token of the calibration data has a loss: all rows have a single token, or all labels are "
            "padding or ignored. Pass longer rows, or gradients=False to collect only moments of inputs."
        )
    return math.nan if loss_fn in PROJECTIONS else total / scored


class MomentRecorder:
    """Sums of second moments over the batches of one calibration; hooks on the layers update the sums.

    Args:
        diagonal_gradients: whether only the diagonals of gradient moments are summed, except for embeddings.
        full_up_to: largest number of features for which full moments are stored, by default `FULL_UP_TO`. For
            moments of gradients the limit is at most `FULL_UP_TO`.
        rank: rank of the low-rank factors of gradient moments; 0 for none.
    """

    def __init__(
        self, *, diagonal_gradients: bool = False, full_up_to: int | None = None, rank: int = 0
    ) -> None:
        self.diagonal_gradients, self.rank = diagonal_gradients, rank
        self.full_up_to = FULL_UP_TO if full_up_to is None else full_up_to
        #: Layers with equal shapes whose names differ in one number only, by the name of each such layer;
        #: they may be the experts of a mixture.
        self.siblings: dict[str, list[str]] = {}
        self.layers: set[str] = set()  # names of all observed layers
        self.restart()

    def restart(self) -> None:
        """Delete all sums."""
        self.batch: Batch = {}
        self.seeing = True
        self.seen: list[str] = []  # layers that this batch has reached, in the order of their calls
        self.stops_at: str | None = None
        self.frequencies: dict[str, Tensor] = {}
        self.gradients: dict[str, MomentSum] = {}
        self.sketches: dict[str, Tensor] = {}  # products `R @ test_matrix`
        self.counts: dict[str, int] = {}
        self.inputs: dict[str, _InputSum] = {}  # maps layers to sums; layers with the same input share one
        self._last: _Reading | None = None
        self._samples: dict[str, CoherenceSample] = {}
        self._differentiating = False
        self._sampled: set[str] = set()  # layers for which tokens of this batch were sampled

    def expect(self, batch: Mapping[str, Any]) -> None:
        """Set the batch on which the model runs next; padding in the batch is ignored."""
        self.batch = dict(batch)
        self.seen.clear()
        self._sampled.clear()

    def stop_at_last(self, block: str = "") -> None:
        """From now on, raise `Stop` when a batch reaches the layer that was the last one to read this batch.

        Then all inputs are known, and the results are not needed. Nothing changes if this layer may be an
        expert, has read the batch more than once, or looks up rows, nor if a layer of the block did not run.

        Args:
            block: name of the block that runs, in which experts are not those of other blocks; empty if the
                whole model runs.
        """
        if block and any(x.startswith(f"{block}.") for x in self.layers.difference(self.seen)):
            return
        *_, last = self.seen or [""]
        experts = [x for x in self.siblings.get(last, ()) if not block or x.startswith(f"{block}.")]
        if last not in self.frequencies and len(experts) < 2 and self.seen.count(last) == 1:
            self.stops_at = last

    @contextmanager
    def differentiating(self) -> Iterator[None]:
        """Return a context for the backward pass, in which gradient checkpointing may run layers again.

        Inputs are not recorded again. Tokens are sampled only for layers that ran without gradients in the
        forward pass, as in reentrant checkpointing.
        """
        self._differentiating = True
        try:
            yield
        finally:
            self._differentiating = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context in which nothing is recorded."""
        self.seeing = False
        try:
            yield
        finally:
            self.seeing = True

    def see_input(self, name: str, x: Tensor) -> None:
        """Add the moment of a layer's input to its sum; layers that read the same tensor share the moment."""
        if not self.seeing or self._differentiating:
            return
        if self._last is None or not self._last.joins(name, x):
            self._settle()
            tokens = token_rows(x, token_mask(self.batch, x.shape[:-1]))
            if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
                tokens = tokens.to(torch.get_autocast_dtype(x.device.type))  # as the layer itself reads them
            self._last = _Reading(x, tokens)
        self._last.layers.append(name)
        self.counts[name] = self.counts.get(name, 0) + len(self._last.tokens)
        self.seen.append(name)
        if name == self.stops_at:
            raise Stop

    def _settle(self) -> None:
        """Add the moment of the last input tensor to the sums of the layers that have read this tensor.

        Layers share a sum as long as they read the same tensors. If only some of the layers that share a sum
        have read this tensor (an expert may get no token in a batch), the sum is split in two.
        """
        if self._last is None:
            return
        layers, tokens = self._last.layers, self._last.tokens
        self._last = None
        if new := [name for name in layers if name not in self.inputs]:
            features = tokens.shape[1]
            start = MomentSum(features, diagonal=features > self.full_up_to, device=tokens.device)
            self.inputs.update(dict.fromkeys(new, _InputSum(new, start)))
        for shared in {id(x): x for x in (self.inputs[name] for name in layers)}.values():
            if rest := [name for name in shared.layers if name not in layers]:
                shared.layers = [name for name in shared.layers if name in layers]
                self.inputs.update(dict.fromkeys(rest, _InputSum(rest, shared.sum.copy())))
            shared.sum.add(tokens)

    def see_indices(self, name: str, indices: Tensor, rows: int) -> None:
        """Count how often each row of an embedding is looked up."""
        if not self.seeing or self._differentiating:
            return
        mask = token_mask(self.batch, indices.shape)
        chosen = (indices if mask is None else indices[mask]).reshape(-1)
        self.seen.append(name)
        self.counts[name] = self.counts.get(name, 0) + chosen.numel()
        _accumulate(self.frequencies, name, torch.bincount(chosen, minlength=rows).float())

    def hold(self, name: str, x: Tensor) -> list[HeldTokens]:
        """Copy a layer's inputs at some tokens; `see_gradient` needs them to estimate the coherence."""
        if not self.seeing or (self._differentiating and name in self._sampled):
            return []
        self._sampled.add(name)
        mask = token_mask(self.batch, x.shape[:-1])
        return self._samples.setdefault(name, CoherenceSample(name)).hold(x, mask, self.batch)

    def see_gradient(self, name: str, gradient: Tensor | None, held: Sequence[HeldTokens] = ()) -> None:
        """Add the moment of a layer's output gradient, that is, of the gradient of the summed loss.

        Args:
            name: name of the layer.
            gradient: the gradient, shape `(..., out)`; None if the loss does not depend on the output, in a
                model with reentrant checkpointing.
            held: inputs of sampled tokens that `hold` has returned.
        """
        if gradient is None:
            return
        if held:
            self._samples[name].add(held, gradient, self.batch)
        tokens = token_rows(gradient, token_mask(self.batch, gradient.shape[:-1]))
        if name not in self.gradients:
            features = tokens.shape[1]
            diagonal = self.diagonal_gradients and name not in self.frequencies
            diagonal = diagonal or features > min(self.full_up_to, FULL_UP_TO)
            self.gradients[name] = MomentSum(features, diagonal=diagonal, device=tokens.device)
        self.gradients[name].add(tokens)
        if self.rank and tokens.shape[1] <= FACTORED_UP_TO:
            with torch.autocast(tokens.device.type, enabled=False):
                test = tokens.float() @ _test_matrix(tokens.shape[1], self.rank, tokens.device)
                _accumulate(self.sketches, name, tokens.float().T @ test)

    def _are_experts(self, group: Sequence[str]) -> bool:
        """Tell experts from other siblings by the numbers of tokens that they received.

        Experts receive different numbers, or some receive none. Layers of blocks that run one after the other
        are siblings too, and some blocks may not have run yet. Experts are inside of a numbered block, so
        their names have two numbers.
        """
        counts = {self.counts.get(name, 0) for name in group}
        return len(counts - {0}) > 1 or (len(counts) > 1 and len(numbered_parts(group[0])) > 1)

    def finish(self, scored: int, loss: float | None, source: str) -> CalibrationStats:
        """Divide the sums by numbers of tokens and return the statistics.

        Moments of inputs are divided by the number of tokens that the layer received, moments of gradients by
        the number of tokens that have a loss. Moments of experts are blended with those of their mixture. The
        sums are freed.

        Args:
            scored: number of tokens that have a loss.
            loss: mean loss of a token.
            source: name of the data.
        """
        self._settle()
        mixtures, frequencies = self._find_mixtures(), set(self.frequencies)
        wanted = dict.fromkeys((*self.counts, *mixtures))
        rows: dict[str, Tensor] = {}
        columns: dict[str, Tensor] = {}
        shared: dict[int, tuple[MomentSum, Tensor]] = {}  # moments of inputs that several layers read
        for name in wanted:
            mixture = mixtures.get(name, Mixture())
            own = found.sum if (found := self.inputs.pop(name, None)) else None
            if own is not None and own.count:
                if id(own) not in shared:
                    shared[id(own)] = own, blended(own, mixture.inputs, PRIOR * own.features)
                columns[name] = shared[id(own)][1]
            elif mixture.inputs is not None:  # without a mixture, a layer that got only padding never ran
                columns[name] = mixture.inputs
            gradients = self.gradients.pop(name, None)
            if name in self.frequencies:
                rows[name] = self.frequencies.pop(name).div_(max(self.counts[name], 1))
                if gradients is not None:
                    columns[name] = mirrored(gradients.upper() / scored)
            elif mixture.gradients is not None:
                mean = blended(gradients, mixture.gradients, GRADIENT_PRIOR)
                rows[name] = mean * (mixture.expected_tokens(self.counts.get(name, 0)) / scored)
            elif gradients is not None:
                rows[name] = mirrored(gradients.upper() / scored)
        # Inputs are checked first, since the first layer with bad inputs is nearest to the cause.
        for name, moment in (*columns.items(), *rows.items()):
            # The largest elements of a moment are on its diagonal.
            if not bool(torch.isfinite(_diagonal(moment)).all()):
                raise NonFiniteError(
                    f"Calibration found NaN or infinite inputs or gradients at layer {name!r}; check the "
                    "checkpoint, run the model in float32, or exclude the layer."
                )
        return CalibrationStats(
            rows,
            columns,
            max(self.counts.values(), default=0),
            loss,
            source,
            coherence=self._coherence(rows, columns),
            counts={name: self.counts.get(name, 0) for name in wanted},
            scored=scored,
            factors={
                name: _factor(self.sketches.get(name), _diagonal(gradients_of), scored)
                for name in (wanted if self.rank else ())
                if (gradients_of := (columns if name in frequencies else rows).get(name)) is not None
            },
        )

    def _find_mixtures(self) -> dict[str, Mixture]:
        """Find the layers that are experts, and average the moments of each mixture over all its tokens."""
        found: dict[str, Mixture] = {}
        means: dict[tuple[int, ...], Tensor] = {}  # layers that read the same tensors share the mean
        for group in {id(x): x for x in self.siblings.values()}.values():
            counts = [self.counts.get(name, 0) for name in group]
            if not self._are_experts(group):
                continue
            sides: list[Tensor | None] = []
            for sums in (
                [self.inputs[name].sum for name in group if name in self.inputs],
                [self.gradients[name] for name in group if name in self.gradients],
            ):
                key = tuple(map(id, sums))
                if sums and key not in means:
                    means[key] = mean_moment(sums)
                sides.append(means.get(key))
            mixture = Mixture(sides[0], sides[1], sum(counts), len(group))
            found.update(dict.fromkeys(group, mixture))
        return found

    def _coherence(self, rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> dict[str, float]:
        """Compute the coherence of each layer for which tokens were sampled and both moments are known."""
        readers: dict[int, list[str]] = {}
        for name in sorted(name for name in self._samples if name in rows and name in columns):
            readers.setdefault(id(columns[name]), []).append(name)
        ratios: dict[str, float | None] = {}
        for names in readers.values():
            with remembering():  # the moment of a shared input is factorized only once
                ratios |= {name: self._samples[name].ratio(columns[name], rows[name]) for name in names}
        return {name: ratio for name, ratio in sorted(ratios.items()) if ratio is not None}


#: Largest number of outputs of a layer for which a low-rank factor of the gradient moment is collected. For
#: more outputs, rounding with this factor would take several times as long as rounding without it.
FACTORED_UP_TO = 4096
#: Number of columns of a test matrix in addition to the rank of the factor.
_OVERSAMPLING = 8


def _test_matrix(size: int, rank: int, device: torch.device) -> Tensor:
    """Return a random matrix, shape `(size, columns)`, always the same for a size and rank."""
    generator = torch.Generator("cpu").manual_seed(size)
    columns = min(size, rank + _OVERSAMPLING)
    return torch.randn(size, columns, generator=generator, device="cpu").to(device)


def _factor(sketch: Tensor | None, diagonal: Tensor, scored: int) -> Tensor:
    """Approximate a moment `R` by `V V^T + diag(d)` with the same diagonal.

    Args:
        sketch: the product `scored * R @ test_matrix`, shape `(features, columns)`; None for `V = 0`.
        diagonal: the diagonal of `R`, shape `(features,)`.
        scored: number of tokens that have a loss.

    Returns:
        The columns of `V`, and `d` as the last column.

    Reference:
        Tropp et al. 2017, "Fixed-rank approximation of a positive-semidefinite matrix from streaming data",
        algorithm 3 (Nystrom approximation, shifted to be stable).
    """
    if sketch is None or not bool(sketch.any()):
        return diagonal[:, None].to(torch.bfloat16)
    size, columns = sketch.shape
    rank = size if columns == size else columns - _OVERSAMPLING
    test, found = _test_matrix(size, rank, sketch.device).double(), sketch.double() / scored
    shift = torch.finfo(torch.float32).eps * float(torch.linalg.matrix_norm(found, 2))
    found = found + shift * test
    middle = test.mT @ found
    values, vectors = torch.linalg.eigh((middle + middle.mT) / 2)
    kept = values > values[-1] * size * torch.finfo(torch.float64).eps
    u, s, _ = torch.linalg.svd(found @ (vectors[:, kept] * values[kept].rsqrt()), full_matrices=False)
    factor = ((u * (s.square() - shift).clamp_min(0).sqrt())[:, :rank]).to(torch.bfloat16)
    rest = (diagonal.double() - factor.double().square().sum(1)).clamp_min(0)
    return torch.cat([factor, rest[:, None].to(factor)], 1)


def _diagonal(moment: Tensor) -> Tensor:
    """Return the diagonal of a full moment; other moments are only a diagonal already."""
    return moment if moment.ndim == 1 else moment.diagonal()


def token_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Copy the vectors of all tokens that are not padding, shape `(tokens, features)`."""
    if mask is None or bool(mask.all()):
        return x.detach().reshape(-1, x.shape[-1]).clone()
    return x.detach()[mask]


def _accumulate(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value


@dataclass
class _InputSum:
    """Sum of input moments, shared by layers that have read the same tensors so far."""

    layers: list[str]
    sum: MomentSum


class _Reading:
    """Vectors of one input tensor, and the layers that have read this tensor."""

    def __init__(self, x: Tensor, tokens: Tensor) -> None:
        self.tokens = tokens  # shape: (tokens, features)
        self.layers: list[str] = []
        self._of = weakref.ref(x)
        self._version = _version(x)

    def joins(self, name: str, x: Tensor) -> bool:
        """Return True if `x` is this tensor with unchanged values, and the layer has not read it yet."""
        unchanged = self._version is not None and _version(x) == self._version
        return self._of() is x and unchanged and name not in self.layers


def _version(x: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None for inference tensors, which do not count this."""
    return None if x.is_inference() else x._version


@contextmanager
def observed(
    model: nn.Module, recorder: MomentRecorder, config: LayerSelection | None
) -> Iterator[list[Target]]:
    """Return a context in which the model is frozen and in eval mode, and hooks record inputs and gradients.

    Args:
        model: any module.
        recorder: receives the inputs and output gradients of the layers.
        config: selects the layers; all layers if absent.
    """
    with unfused(model), in_eval_mode(model), uncompiled(), without_cache(model), seeded_draws():
        weights = find_targets(model, config or LayerSelection(target_modules="all"))
        targets = [x for x in weights if not x.skip]
        layers = {id(m): (n, m) for x in targets for n, m in zip(x.names, x.modules, strict=True)}
        recorder.layers = {name for name, _ in layers.values()}
        recorder.siblings = find_siblings(
            {
                name: kind.matrix(module).shape
                for target in targets
                for name, module, kind in zip(target.names, target.modules, target.kinds, strict=True)
                if kind.name != "embedding" and layers[id(module)][0] == name
            }
        )
        wanted = [(p, p.requires_grad) for p in model.parameters()]
        handles = []
        for name, module in model.named_modules():
            # Other subclasses may be called with something other than indices, such as an attention mask.
            plain = type(module).forward is nn.Embedding.forward
            if isinstance(module, nn.Embedding) and (plain or kind_of(module) is not None):
                handles.append(module.register_forward_pre_hook(_index_hook(name), with_kwargs=True))
                # Reentrant checkpointing differentiates a block only if its input requires gradients.
                handles.append(module.register_forward_hook(_start_graph))
        for name, module in layers.values():
            handles.append(module.register_forward_pre_hook(_input_hook(name, recorder), with_kwargs=True))
            handles.append(module.register_forward_hook(_output_hook(name, recorder), with_kwargs=True))
        try:
            model.requires_grad_(False)
            yield targets
        finally:
            for handle in handles:
                handle.remove()
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)


def _start_graph(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Make an output require gradients, so that the autograd graph starts here; all weights are frozen."""
    if output.requires_grad or not torch.is_grad_enabled():
        return output
    # The model may change the output in place. Autograd forbids this for a leaf, so the output is copied.
    return output.detach().requires_grad_().clone()


def _index_hook(name: str) -> Any:
    def hook(module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for given in (*args, *kwargs.values()):
            if not isinstance(given, Tensor) or given.is_meta or not given.numel():
                continue
            low, high = (int(x) for x in given.aminmax())
            if low < 0 or high >= module.num_embeddings:
                raise TargetError(
                    f"A batch contains index {low if low < 0 else high}, but embedding {name!r} has only the "
                    f"rows 0 to {module.num_embeddings - 1}. The token ids may be from another tokenizer, or "
                    "the text may be longer than the model allows."
                )

    return hook


def _input_hook(name: str, recorder: MomentRecorder) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        (given,) = (*args, *kwargs.values())  # some models pass the input by keyword
        kind = kind_of(module)
        if kind is not None and kind.name == "embedding":
            recorder.see_indices(name, given, kind.matrix(module).shape[0])
        else:
            recorder.see_input(name, given)

    return hook


def _output_hook(name: str, recorder: MomentRecorder) -> Any:
    def hook(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        output = _start_graph(module, args, output)
        (given,) = (*args, *kwargs.values())
        paired = given.is_floating_point() and given.shape[:-1] == output.shape[:-1]
        held = recorder.hold(name, given) if paired else []
        # Moments belong to the rows of an embedding before they are multiplied by a constant.
        scale = embedding_scale(module)

        def see(gradient: Tensor | None) -> None:
            scaled = gradient if scale is None or gradient is None else scale.times(gradient)
            recorder.see_gradient(name, scaled, held)

        output.register_hook(see)
        return output

    return hook

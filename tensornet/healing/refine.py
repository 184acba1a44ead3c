"""Healing by refitting: fit each compressed layer in closed form to its inputs in the compressed model.

A layer was compressed for its inputs `x` in the dense model. After other compressed layers it gets inputs
`x'` instead. Let `E` be the mean over the tokens of the batches, and `C` the input moment from calibration.
Then

    M = W + correction W (E[x x'^T] - E[x' x'^T]) (E[x' x'^T] + anchor C)^-1

is a step from `W` towards the matrix whose outputs for `x'` are closest to the dense outputs `W x`. The best
network for `M` under the weighting `(R, E[x' x'^T] + anchor C)`, with the moment `R` of the output gradients,
replaces the old network of the layer. Layers are refitted in the order in which they run, with inputs from
the layers that were refitted before. Otherwise every layer would correct the same error. At high compression,
the full step (`correction=1`) increased the loss (benchmarks/records/quality.md).

Layers that share a core with other layers are not refitted; a warning names them.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tensornet._util import in_eval_mode, uncompiled, without_cache
from tensornet.calibration.batches import (
    Batch,
    BatchLike,
    Stop,
    as_batch,
    check_batches,
    run_model,
    token_mask,
)
from tensornet.calibration.moment_sums import mirrored, upper_gram
from tensornet.calibration.stats import CalibrationStats
from tensornet.calibration.walk import Walk, find_chains
from tensornet.damping import FIT_DAMPING, ROW_DAMPING
from tensornet.errors import TargetError
from tensornet.healing.heal import compressed_layers, output_distance
from tensornet.linalg.weighted_svd import Weighting, damped
from tensornet.nn.layer_kinds import kind_of
from tensornet.nn.linear import TensorNetworkLinear
from tensornet.nn.storage import encode
from tensornet.nn.unfuse import unfused
from tensornet.topologies import topology_family

NEVER_REACHED = "it never ran on the data"
#: Fraction of the batches that are not used for fitting, but to check whether refitting helped.
JUDGED = 1 / 8


@dataclass(frozen=True)
class RefineReport:
    """Result of `refine`.

    Args:
        before, after: relative squared error of the outputs of each layer, before and after it was refitted,
            by name. At both measurements, all earlier layers were already refitted.
        left: reason for each layer that was not refitted, by name.
        distances: distance from the dense model's outputs (`output_distance`) before and after refitting, on
            batches that were not used for fitting, or on the only batch.
        kept: True if the refitted cores are used; False if the old cores were restored because refitting
            increased the distance from the dense model.

    Example:
        >>> from tensornet.healing import RefineReport
        >>> report = RefineReport({"0": 0.02}, {"0": 0.01}, left={}, distances=(0.3, 0.2), kept=True)
        >>> report.kept, report.after["0"] < report.before["0"]
        (True, True)
    """

    before: dict[str, float]
    after: dict[str, float]
    left: dict[str, str]
    distances: tuple[float, float]
    kept: bool


@torch.no_grad()
def refine(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[BatchLike],
    stats: CalibrationStats | None = None,
    *,
    correction: float = 0.5,
    anchor: float = 1.0,
    damping: float = ROW_DAMPING,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> RefineReport:
    """Refit the linear layers of a compressed model, one after the other, to the dense model's outputs.

    Sizes and topologies do not change. If the blocks of the model form a chain (`find_chains`), hidden states
    of both models are stored for all batches. Each block is then run once for every group of layers with the
    same input. For layers outside of chains both models are run completely. An eighth of the batches is not
    used for fitting. If refitting increases the distance from the dense model's outputs on these batches, the
    old cores are restored.

    Args:
        model: the compressed model; it is changed in place.
        teacher: the dense model, on the same device; it is not changed.
        batches: batches as for `calibrate`, with tens of thousands of tokens, since matrices are fitted.
        stats: calibration statistics. They contain the sensitivity of the loss to output errors, and input
            moments over more tokens. If absent, all outputs have equal weight, and the input moments are
            those of the batches.
        correction: fraction of the step towards the dense model's outputs, from 0 to 1. With 0, the dense
            matrix is only fitted to the layer's inputs in the compressed model.
        anchor: weight of the layer's inputs in the dense model, relative to those in the compressed model.
        damping: fraction of the mean diagonal that is added to gradient moments.
        autocast: dtype in which both models run under autocast, as in `heal`.
        progress: whether to show a progress bar.

    Returns:
        Errors of the layers, and distances between the models, before and after refitting.

    Raises:
        TargetError: there is no compressed linear layer or no data, or the teacher has no stock layer with
            the name of a compressed layer.
        ValueError: an option is out of range.

    Reference:
        Wang et al. 2024, "SVD-LLM" (fits each layer to its inputs after compressed layers); Li et al. 2025,
        "GPTAQ" (fits to the dense model's outputs, for quantization).

    Example:
        >>> import copy
        >>> from tensornet.healing import refine
        >>> teacher = torch.nn.Sequential(
        ...     torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16)
        ... )
        >>> model = copy.deepcopy(teacher)
        >>> _ = tn.compress(model, tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)
        >>> report = refine(model, teacher, [torch.randn(64, 16) for _ in range(8)])
        >>> sorted(report.after)
        ['0', '2']
    """
    if not 0 <= correction <= 1 or not all(0 <= x < math.inf for x in (anchor, damping)):
        raise ValueError(
            "refine needs a correction from 0 to 1, and an anchor and a damping of at least 0; got "
            f"{correction}, {anchor} and {damping}."
        )
    layers = {n: x for n, x in compressed_layers(model).items() if isinstance(x, TensorNetworkLinear)}
    check_batches(batches, "refine")
    device = next(model.parameters()).device
    given = [as_batch(batch, model, device) for batch in batches]
    if not layers or not given:
        raise TargetError("refine needs a model with compressed linear layers, and at least one batch.")
    users: dict[int, list[str]] = {}
    for name, layer in compressed_layers(model).items():
        for tensor in layer.stored.values():
            users.setdefault(id(tensor), []).append(name)
    left = {
        name: f"it shares cores with {', '.join(others)}"
        for names in users.values()
        for name in names
        if name in layers and (others := [other for other in names if other != name])
    }
    if left:
        warnings.warn(
            f"Not refitted, because they share cores with other layers: {', '.join(left)}.", stacklevel=2
        )
    judged = math.ceil(JUDGED * len(given))
    judges, fitted = given[-judged:], given[:-judged] or given
    # Only the models run in the dtype `autocast`. Computations with moments need more accuracy.
    reduced = partial(torch.autocast, device.type, dtype=autocast, enabled=autocast is not None)
    with ExitStack() as stack:
        stack.enter_context(unfused(teacher))
        stocks = {name: _stock(teacher, name) for name in layers}
        settings = (in_eval_mode(model, teacher), uncompiled(), without_cache(model), without_cache(teacher))
        for context in settings:
            stack.enter_context(context)
        with reduced():
            distance = _distance(model, teacher, judges)
        old = [(tensor, tensor.clone()) for layer in layers.values() for tensor in layer.stored.values()]
        kept = False

        def restore() -> None:
            """Restore the old cores unless the new ones are kept; also runs after an interruption."""
            for tensor, value in () if kept else old:
                tensor.copy_(value)

        stack.callback(restore)
        before, after = dict[str, float](), dict[str, float]()
        with reduced():
            run = PairedRun(model, teacher, fitted)
            groups = run.groups([name for name in layers if name not in left])
        reached = {name for names in groups for name in names}
        left |= {name: NEVER_REACHED for name in layers if name not in reached and name not in left}
        for names in tqdm(groups, desc="refining", disable=not progress, unit="group"):
            with reduced():
                moments = run.moments(names)
            if isinstance(moments, str):
                left |= dict.fromkeys(names, moments)
                continue
            before |= {name: _output_error(layers[name], stocks[name], moments) for name in names}
            for name in names:
                rows = None if stats is None else stats.rows.get(name)
                columns = None if stats is None else stats.columns.get(name)
                weight, known, real = (x.double() for x in (stocks[name], moments.dense, moments.real))
                if columns is not None:
                    columns = columns.to(known) * moments.tokens
                    known = columns if columns.ndim == 2 else columns.diag()
                metric = damped(real + anchor * known, FIT_DAMPING)
                step = torch.linalg.solve(metric, (weight @ (moments.mixed.double() - real)).T).T
                layer = layers[name]
                wanted = (weight + correction * step).to(layer.weight.dtype)
                weighting = Weighting(None if rows is None else damped(rows, damping), metric)
                made = topology_family(layer.topology.family).fit(wanted, layer.topology, weighting)
                cores = [core.to(layer.weight.dtype) for core in made.network.cores]
                for core, new in encode(layer.topology, layer.storage, cores, weighting).items():
                    stored: Any = getattr(layer, core)
                    if isinstance(new, Tensor):
                        stored.copy_(new)
                        continue
                    for part, tensor in new.tensors.items():  # tensors of a packed core
                        getattr(stored, part).copy_(tensor)
            after |= {name: _output_error(layers[name], stocks[name], moments) for name in names}
        with reduced():
            distances = (distance, _distance(model, teacher, judges))
        kept = distances[1] <= distances[0]
    return RefineReport(before, after, left, distances, kept)


def _output_error(layer: TensorNetworkLinear, stock: Tensor, moments: "PairedMoments") -> float:
    """Compute the relative squared output error `E |W x - M x'|^2 / E |W x|^2` of a compressed layer.

    Args:
        layer: the compressed layer, with the matrix `M`.
        stock: the matrix `W` of the dense model.
        moments: moments of x and x'.
    """
    weight, matrix = stock.double(), layer.to_matrix().double()
    dense, mixed, real = (x.double() for x in (moments.dense, moments.mixed, moments.real))
    full = float((weight @ dense * weight).sum())
    cross, own = float((weight @ mixed * matrix).sum()), float((matrix @ real * matrix).sum())
    return (full - 2 * cross + own) / max(full, 1e-300)


def _stock(teacher: nn.Module, name: str) -> Tensor:
    """Return the matrix, shape `(out, in)`, of the teacher's layer with the given name.

    Raises:
        TargetError: the teacher has no stock layer of this name.
    """
    try:
        module: Any = teacher.get_submodule(name)
    except AttributeError:
        module = None
    kind = None if module is None else kind_of(module)
    if kind is None:
        raise TargetError(
            f"{name!r} is compressed in the model, but it is no stock layer in the teacher; the teacher must "
            "be the dense model that was compressed."
        )
    return kind.matrix(module)


def _distance(model: nn.Module, teacher: nn.Module, batches: Sequence[Batch]) -> float:
    """Compute the distance between the outputs of both models, averaged over batches."""
    gaps = (output_distance(run_model(model, batch), run_model(teacher, batch), batch) for batch in batches)
    return sum(float(gap) for gap in gaps) / len(batches)


# --- both models on the same batches -----------------------------------------------------------------


class PairedMoments(NamedTuple):
    """Sums over tokens of `x x^T` (`dense`), `x x'^T` (`mixed`) and `x' x'^T` (`real`).

    Here `x` is the input of a layer in the dense model, and `x'` is the input of the same layer in the
    compressed model.
    """

    dense: Tensor
    mixed: Tensor
    real: Tensor
    tokens: int


class PairedRun:
    """Compare the inputs of the same layers in a compressed and a dense model, on the same batches.

    In a chain of blocks, only the blocks up to the layer run, from the hidden states of the block before.

    Args:
        model: the compressed model; its layers may change between two calls of `moments`.
        teacher: the dense model.
        batches: keyword arguments of the models for each batch.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, batches: Sequence[Batch]) -> None:
        self.models, self.batches = (model, teacher), batches
        both = [find_chains(x, batches[0]) for x in self.models]
        self.chains = {name: blocks for name, blocks in both[0].items() if both[1].get(name) == blocks}
        self.at: tuple[str, list[Walk]] | None = None

    def groups(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Group layers that run one after the other on the same input tensor, in execution order."""
        seen: dict[str, Tensor] = {}  # keeps the tensors alive, so that their ids stay unique
        hooks = {self.models[0].get_submodule(name): partial(seen.setdefault, name) for name in names}
        with _hooked(hooks):
            run_model(self.models[0], self.batches[0])
        groups: list[tuple[str, ...]] = []
        for name, x in seen.items():
            last = groups[-1] if groups else ()
            if last and seen[last[-1]] is x and self._place(last[-1]) == self._place(name):
                groups[-1] = (*last, name)
            else:
                groups.append((name,))
        return groups

    def moments(self, names: Sequence[str]) -> PairedMoments | str:
        """Compute the input moments of a group of layers, or return the reason why they are unknown."""
        sums: list[Tensor] = []
        tokens = 0
        for number, batch in enumerate(self.batches):
            real, dense = (self._input(side, names[0], number, batch) for side in (0, 1))
            if len(dense) != len(real):
                return f"it got {len(dense)} tokens in the dense model, and {len(real)} in the compressed one"
            if not len(real):
                continue
            # Autocast is disabled, since refitting uses a small difference of two moments.
            with torch.autocast(real.device.type, enabled=False):
                found = [upper_gram(dense), dense.T @ real, upper_gram(real)]
            sums = [a.add_(b) for a, b in zip(sums, found, strict=True)] if sums else found
            tokens += len(real)
        return PairedMoments(mirrored(sums[0]), sums[1], mirrored(sums[2]), tokens) if sums else NEVER_REACHED

    def _input(self, side: int, name: str, number: int, batch: Batch) -> Tensor:
        """Run a model on a batch and return the inputs of one of its layers, shape `(tokens, in)`.

        Args:
            side: 0 for the compressed model, 1 for the dense model.
            name: name of the layer.
            number: index of the batch.
            batch: the batch.
        """
        found: list[Tensor] = []
        place = self._place(name)

        def keep(x: Tensor) -> None:
            mask = token_mask(batch, x.shape[:-1])
            found.append((x.reshape(-1, x.shape[-1]) if mask is None else x[mask]).float())
            if place is not None:  # the rest of the block is not needed
                raise Stop

        run = None
        if place is not None:  # advance before hooks are set, since advancing runs other blocks
            chain, index = place
            if self.at is None or self.at[0] != chain:
                self.at = chain, [Walk(x, self.chains[chain], self.batches) for x in self.models]
                for each in self.at[1]:
                    each.enter()
            for each in self.at[1]:
                while each.position < index:
                    each.advance()
            run = self.at[1][side]
        with _hooked({self.models[side].get_submodule(name): keep}), suppress(Stop):
            run_model(self.models[side], batch) if run is None else run.run(number)
        return torch.cat(found) if found else torch.empty(0, 0)

    def _place(self, name: str) -> tuple[str, int] | None:
        """Return the name of the chain and the index of the block that contain a layer; None if none does."""
        for chain, blocks in self.chains.items():
            for index, block in enumerate(blocks):
                if name == block or name.startswith(f"{block}."):
                    return chain, index
        return None


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[[Tensor], object]]) -> Iterator[None]:
    """Return a context in which each function in `hooks` is called with the inputs of its module."""

    def before(function: Callable[[Tensor], object]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            (x,) = (*args, *kwargs.values())  # some models pass the input by keyword
            function(x)

        return hook

    handles = [
        module.register_forward_pre_hook(before(function), with_kwargs=True)
        for module, function in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

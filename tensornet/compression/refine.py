"""`refine`: fit compressed layers again to what they really receive, in closed form.

A layer was compressed for the inputs it had in the dense model. Behind other compressed layers it receives
`x'` instead of `x`. The matrix that brings `M x'` closest to the old outputs `W x` is

    M = W E[x x'^T] E[x' x'^T]^-1,

and its best network under the weighting `(R, E[x' x'^T])` takes the place of the old one: errors from before
a layer are corrected by it, without a gradient.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tensornet.compression.calibrate import to_device
from tensornet.compression.heal import compressed_layers
from tensornet.compression.losses import Batch, token_mask
from tensornet.compression.stats import CalibrationStats
from tensornet.compression.weighted import decompose_weighted
from tensornet.errors import TargetError
from tensornet.nn.adapters import kind_of
from tensornet.nn.linear import TensorNetworkLinear
from tensornet.whitening import Weighting, damped

#: Weight of the dense matrix against the data, as a share of the mean diagonal of the input moment.
RIDGE = 1e-2


@dataclass(frozen=True)
class RefineReport:
    """Relative squared error of the outputs of each layer on the data, before and after, by name."""

    before: dict[str, float]
    after: dict[str, float]


@torch.no_grad()
def refine(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Batch | Tensor],
    stats: CalibrationStats | None = None,
    *,
    passes: int = 4,
    damping: float = 0.1,
    progress: bool = False,
) -> RefineReport:
    """Refit the linear layers of a compressed model to the dense model's outputs, in order, in place.

    Sizes and topologies stay. Each pass runs both models over the data and refits the next part of the layers
    behind those already refitted; more passes correct more faithfully and take proportionally longer.

    Args:
        model: compressed.
        teacher: the dense model.
        batches: as for `calibrate`; tens of thousands of tokens, since a matrix is fitted to them.
        stats: prices of output errors; all outputs count alike without.
        passes: number of parts.
        damping: of the gradient moments.
        progress: show a progress bar.

    Raises:
        TargetError: no compressed linear layer, or no data.
    """
    names = [name for name, x in compressed_layers(model).items() if isinstance(x, TensorNetworkLinear)]
    if not names or len(batches) == 0:
        raise TargetError("refine needs a model with compressed linear layers, and at least one batch.")
    training = (model.training, teacher.training)
    model.eval()
    teacher.eval()
    before, after = {}, {}
    size = -(-len(names) // max(1, min(passes, len(names))))
    bar = tqdm(
        total=-(-len(names) // size) * len(batches), desc="refining", disable=not progress, unit="batch"
    )
    for start in range(0, len(names), size):
        part = names[start : start + size]
        moments = _collect(model, teacher, part, batches, bar)
        for name in part:
            rows = None if stats is None or name not in stats.rows else damped(stats.rows[name], damping)
            before[name], after[name] = _refit(model, teacher, name, moments[name], rows)
    bar.close()
    model.train(training[0])
    teacher.train(training[1])
    return RefineReport(before, after)


@dataclass
class _Moments:
    """Sums over tokens: `x x^T`, `x x'^T` and `x' x'^T` of the dense inputs x and the real ones x'."""

    dense: Tensor
    mixed: Tensor
    real: Tensor


def _collect(
    model: nn.Module,
    teacher: nn.Module,
    names: Sequence[str],
    batches: Iterable[Batch | Tensor],
    bar: "tqdm[None]",
) -> dict[str, _Moments]:
    """Moments of the inputs of some layers, from running both models side by side."""
    moments: dict[str, _Moments] = {}
    wanted: dict[str, Tensor] = {}
    batch: Batch = {}

    def tokens(x: Tensor) -> Tensor:
        mask = token_mask(batch, x.shape[:-1])
        return (x.reshape(-1, x.shape[-1]) if mask is None else x[mask]).float()

    def keep(name: str) -> object:
        return lambda module, args: wanted.__setitem__(name, tokens(args[0]))

    def compare(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            dense, real = wanted.pop(name), tokens(args[0])
            new = (dense.T @ dense, dense.T @ real, real.T @ real)
            old = moments.get(name)
            moments[name] = (
                _Moments(*new)
                if old is None
                else _Moments(old.dense + new[0], old.mixed + new[1], old.real + new[2])
            )

        return hook

    handles = [teacher.get_submodule(n).register_forward_pre_hook(keep(n)) for n in names]  # type: ignore[arg-type]
    handles += [model.get_submodule(n).register_forward_pre_hook(compare(n)) for n in names]  # type: ignore[arg-type]
    device = next(model.parameters()).device
    try:
        for item in batches:
            batch = to_device(item, device)
            teacher(**batch)
            model(**batch)
            bar.update()
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _refit(
    model: nn.Module, teacher: nn.Module, name: str, moments: _Moments, rows: Tensor | None
) -> tuple[float, float]:
    """Replace the cores of one layer; relative squared output error before and after."""
    layer, stock = model.get_submodule(name), teacher.get_submodule(name)
    kind = kind_of(stock)
    if kind is None or not isinstance(layer, TensorNetworkLinear):
        raise TargetError(f"{name!r} is not a stock layer of the teacher and a compressed one of the model.")
    weight = kind.matrix(stock).double()
    real = damped(moments.real, RIDGE)
    ridge = RIDGE * float(moments.real.double().diagonal().mean())
    fitted = torch.linalg.solve(real, (weight @ moments.mixed.double() + ridge * weight).T).T
    old = layer.to_matrix().double()
    made = decompose_weighted(fitted.to(layer.weight.dtype), layer.topology, Weighting(rows, real))
    layer.set_cores([core.to(layer.weight.dtype) for core in made.network.cores])
    new = layer.to_matrix().double()
    before, after = (_output_error(weight, matrix, moments) for matrix in (old, new))
    return before, after


def _output_error(weight: Tensor, matrix: Tensor, moments: _Moments) -> float:
    """`E |W x - M x'|^2 / E |W x|^2`."""
    dense, mixed, real = (x.double() for x in (moments.dense, moments.mixed, moments.real))
    full = float((weight @ dense * weight).sum())
    cross, own = float((weight @ mixed * matrix).sum()), float((matrix @ real * matrix).sum())
    return (full - 2 * cross + own) / max(full, 1e-300)

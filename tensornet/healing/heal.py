"""`heal`: train the cores of a compressed model to do what the dense one did."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet.calibration.batches import Batch, BatchLike, as_batch, check_batches, run_model
from tensornet.calibration.label_shift import field
from tensornet.calibration.losses import only_hidden, output_distances, pooled, token_mask
from tensornet.checks import check_size
from tensornet.context import in_eval_mode
from tensornet.errors import NonFiniteError, TargetError
from tensornet.healing.checkpoint import load_state, save_state
from tensornet.io.tensor_files import check_place
from tensornet.nn.linear import TensorNetworkLinear
from tensornet.nn.module import NetworkModule
from tensornet.progress import progress_bar

#: Distance between the outputs of the dense and the compressed model on a batch: a scalar.
Distance = Callable[[Any, Any, Batch], Tensor]
#: Learning rates of cores, as a share of their size, and of whatever else is trained.
CORE_LR, ADAPTER_LR = 5e-4, 1e-4


@dataclass(frozen=True)
class HealReport:
    """What healing did.

    Args:
        losses: distance to the dense model at each end-to-end step made in this call.
        layer_losses: mean relative squared error of the layers' outputs at each layer-wise step.
        steps: steps made in all, earlier calls that were resumed included.
        trained: number of parameters that were trained.
        seconds: time of this call, by its clock.
    """

    losses: tuple[float, ...]
    layer_losses: tuple[float, ...]
    steps: int
    trained: int
    seconds: float


@torch.inference_mode(False)  # and with gradients, whatever a caller has switched off
def heal(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[BatchLike],
    *,
    steps: int = 300,
    layer_steps: int = 0,
    lr: float | None = None,
    temperature: float = 1.0,
    distance: Distance | None = None,
    parameters: Literal["cores", "trainable"] = "cores",
    autocast: torch.dtype | None = None,
    max_seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    checkpoint: str | Path | None = None,
    save_every: int = 50,
    progress: bool = False,
) -> HealReport:
    """Distil a dense model into the cores of its compressed twin; everything else stays frozen.

    First layer by layer (each compressed layer learns the dense layer's outputs for the dense layer's
    inputs, without a pass backwards through the model), then end to end. AdamW without weight decay,
    gradients clipped to norm 1, the learning rate rises for a twentieth of the way and falls to zero.

    Args:
        model: compressed, changed in place.
        teacher: the dense model, on the same device; not changed.
        data: batches as for `calibrate`; walked through again when they end. At least as varied as what the
            model will see, and much of it: a few ten thousand tokens heal well, a hundred overfit.
        steps: end-to-end steps, one batch each.
        layer_steps: layer-wise steps before them.
        lr: largest learning rate, for cores as a share of the root mean square of each: how large entries
            are differs from model to model. 5e-4 if absent, which suits some hundred steps of a pretrained
            model; models trained from scratch in an hour take five times as much. With
            `parameters="trainable"` it is taken as it is, and 1e-4 if absent.
        temperature: of the softmax whose divergence is lowered.
        distance: of the two outputs; divergence of the logits, one minus the cosine of mean-pooled hidden
            states where there are none, or the relative squared difference of outputs that are tensors.
        parameters: `"cores"`, or `"trainable"` for all that require gradients now, as adapters beside
            frozen cores do.
        autocast: run both models in this dtype where that is safe; `torch.bfloat16` is twice as fast on
            recent processors and makes no difference to the result worth mentioning.
        max_seconds: end earlier; the learning rate then falls by time.
        clock: what `max_seconds` and the report count: wall time, or `time.process_time` for the work of this
            process on a machine that others use too.
        checkpoint: safetensors file for cores and optimizer. Where it exists, healing goes on from it, so
            the same call can be repeated after an interruption, with a model compressed anew the same way.
        save_every: steps between two writes of it.
        progress: show a progress bar.

    Raises:
        TargetError: nothing to train, no data, or a teacher that is trained itself or has other layers.
        ValueError: an option is out of its range.
        NonFiniteError: the distance became NaN or infinite; the checkpoint holds an earlier state.
        FormatError: the checkpoint is damaged, of another model, or of a run with other `layer_steps`.
        DestinationError: the checkpoint cannot be written there.

    Reference:
        Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network"; Shazeer, Stern 2018,
        "Adafactor", section 8, for learning rates relative to the size of parameters.
    """
    start = clock()
    check_batches(data, "heal")
    _check_options(steps, layer_steps, lr, temperature, parameters, max_seconds, save_every)
    layers = compressed_layers(model)
    fixed: dict[str, Tensor] = {}
    if parameters == "cores":
        trained, lr = trainable_cores(layers), CORE_LR if lr is None else lr
        fixed, groups = _orders(layers), relative_groups(trained.values())
    else:
        lr = ADAPTER_LR if lr is None else lr
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise TargetError(
                "Nothing to heal: no parameter requires gradients. Add adapters, or train the cores."
            )
        groups = [{"params": [*trained.values()], "size": 1.0}]
    check_teacher(teacher, trained.values())
    stored = {id(tensor) for layer in layers.values() for tensor in layer.stored.values()}
    if layer_steps and not any(id(parameter) in stored for parameter in trained.values()):
        raise TargetError(
            "Layer-wise steps train cores, and none of them requires gradients; use layer_steps=0."
        )
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    path = None if checkpoint is None else Path(checkpoint)
    done = 0
    if path is not None:
        check_place("The checkpoint", path)
        done = load_state(path, trained, fixed, optimizer, layer_steps) if path.is_file() else 0
    total = layer_steps + steps
    losses: list[float] = []
    layer_losses: list[float] = []
    batches = _forever(data, skip=done)
    device = next(model.parameters()).device
    with in_eval_mode(model, teacher), _only_training(model, trained.values()):
        bar = progress_bar(total=total, initial=done, desc="healing", disable=not progress, unit="step")
        while done < total:
            share = _share(done, total, clock() - start, max_seconds)
            if share >= 1:
                if path is not None:
                    save_state(path, trained, fixed, optimizer, done, layer_steps)
                break
            for group in optimizer.param_groups:
                group["lr"] = lr * group["size"] * min(1.0, (share + 1 / total) * 20) * (1 - share)
            batch = as_batch(next(batches), model, device)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                if done < layer_steps:
                    loss = layer_step(layers, teacher, batch)
                    layer_losses.append(loss)
                else:
                    loss = _end_to_end(model, teacher, batch, distance or _distance(temperature))
                    losses.append(loss)
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"The distance to the dense model became {loss} at step {done}; use a smaller lr than "
                    f"{lr}."
                )
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")
            if path is not None and (done % save_every == 0 or done == total):
                save_state(path, trained, fixed, optimizer, done, layer_steps)
        bar.close()
    count = sum(parameter.numel() for parameter in trained.values())
    return HealReport(tuple(losses), tuple(layer_losses), done, count, clock() - start)


def _check_options(
    steps: int,
    layer_steps: int,
    lr: float | None,
    temperature: float,
    parameters: str,
    max_seconds: float | None,
    save_every: int,
) -> None:
    """Refuse options that are none.

    Raises:
        ValueError: naming the option.
    """
    check_size("steps", steps, least=0, error=ValueError)
    check_size("layer_steps", layer_steps, least=0, error=ValueError)
    check_size("save_every", save_every, error=ValueError)
    if parameters not in ("cores", "trainable"):
        raise ValueError(f"parameters must be 'cores' or 'trainable', got {parameters!r}.")
    for name, value in (("lr", lr), ("temperature", temperature), ("max_seconds", max_seconds)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value!r}.")


def check_teacher(teacher: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """Refuse a teacher that would change with the model.

    Raises:
        TargetError: saying how to get one that does not.
    """
    own = {id(parameter) for parameter in teacher.parameters()}
    if any(id(parameter) in own for parameter in trained):
        raise TargetError(
            "The teacher holds the very parameters that are trained. compress changes a model in place: "
            "keep the dense one before, teacher = copy.deepcopy(model)."
        )


def compressed_layers(model: nn.Module) -> dict[str, NetworkModule]:
    """Layers made of cores, by name; one that is used under several names comes once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NetworkModule)}


def trainable_cores(layers: Mapping[str, NetworkModule]) -> dict[str, nn.Parameter]:
    """Floating tensors that hold cores, by name; tied ones once.

    Raises:
        TargetError: there are none.
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in layers.items():
        for part, tensor in module.stored.items():
            if tensor.is_floating_point() and not module.storage.int8:
                assert isinstance(tensor, nn.Parameter)
                found.setdefault(id(tensor), (f"{name}.{part}", tensor))
    if not found:
        raise TargetError(
            "Nothing to heal: the model has no layer made of trainable cores. Compress it first; eight-bit "
            "cores are not trained, so heal before storing them so."
        )
    return dict(found.values())


def relative_groups(cores: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """A group of an optimizer for each core, with the root mean square of its entries as `size`."""
    sizes = ((core, float(core.detach().float().square().mean().sqrt())) for core in cores)
    return [{"params": [core], "size": max(size, 1e-6)} for core, size in sizes]


@contextmanager
def _only_training(model: nn.Module, trained: Collection[nn.Parameter]) -> Iterator[None]:
    """Only some parameters require gradients inside the block, and none holds one after it."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


def _orders(layers: Mapping[str, NetworkModule]) -> dict[str, Tensor]:
    """What says which row of a pivoted core is which, without which cores mean nothing; tied ones once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in layers.items():
        for part, tensor in module.stored.items():
            if tensor.dtype == torch.int32:
                found.setdefault(id(tensor), (f"{name}.{part}", tensor))
    return dict(found.values())


def layer_step(layers: Mapping[str, NetworkModule], teacher: nn.Module, batch: Batch) -> float:
    """Gradients of the relative squared error of every layer's outputs; returns their mean.

    Every layer reads the dense layer's input, so nothing is kept for a pass backwards through the model.
    """
    found: list[float] = []
    handles = []

    def compare(layer: NetworkModule) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
        ) -> None:
            (given,) = (*args, *kwargs.values())  # some models name the only argument
            mask = token_mask(batch, output.shape[:-1])
            with torch.enable_grad():
                gap = layer(given.detach()) - output.detach()
                gap, wanted = (x if mask is None else x[mask] for x in (gap, output.detach()))
                error = gap.square().mean() / wanted.square().mean().clamp_min(1e-12)
            error.backward()
            found.append(float(error.detach()))

        return hook

    for name, layer in layers.items():
        if isinstance(layer, TensorNetworkLinear):  # embeddings have no inputs to learn from
            stock = _counterpart(teacher, name)
            handles.append(stock.register_forward_hook(compare(layer), with_kwargs=True))
    try:
        with torch.no_grad():
            run_model(teacher, batch)
    finally:
        for handle in handles:
            handle.remove()
    return sum(found) / max(len(found), 1)


def _counterpart(teacher: nn.Module, name: str) -> nn.Module:
    """The layer of the teacher that a layer made of cores learns from.

    Raises:
        TargetError: it has none of that name.
    """
    try:
        return teacher.get_submodule(name)
    except AttributeError as error:
        raise TargetError(
            f"Layer-wise steps compare layers of one name, and {type(teacher).__name__} has no {name!r}: the "
            "teacher must be the dense model that was compressed, not one around or inside it. Or use "
            "layer_steps=0."
        ) from error


def output_distance(student: Any, teacher: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Mean divergence of the predicted distributions of all tokens, in nats.

    Where the model has no logits: one minus the cosine of each row's mean-pooled hidden states, or the
    squared difference of other outputs relative to the teacher's square, which calibration prices as well.
    Nothing is shifted: both models are compared at every position.
    """
    if isinstance(student, Tensor):
        return (student - teacher).float().square().sum() / teacher.float().square().sum().clamp_min(1e-30)
    new, old = (field(x, "logits") for x in (student, teacher))
    if new is None and only_hidden(student):
        return (1 - (pooled(student, batch) * pooled(teacher, batch)).sum(-1)).mean()
    if new is None:
        return output_distances(student, teacher, batch).mean()
    mask = token_mask(batch, new.shape[:-1])
    new, old = (x.float() if mask is None else x[mask].float() for x in (new, old))
    new, old = (x.reshape(-1, x.shape[-1]) / temperature for x in (new, old))
    divergence = nn.functional.kl_div(
        new.log_softmax(-1), old.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return divergence * temperature**2


def _distance(temperature: float) -> Distance:
    return lambda student, teacher, batch: output_distance(student, teacher, batch, temperature)


def _end_to_end(model: nn.Module, teacher: nn.Module, batch: Batch, distance: Distance) -> float:
    with torch.no_grad():
        wanted = run_model(teacher, batch)
    loss = distance(run_model(model, batch), wanted, batch)
    loss.backward()
    return float(loss.detach())


def _share(done: int, total: int, seconds: float, max_seconds: float | None) -> float:
    """How far healing has come, by steps or by time, whichever is further."""
    by_time = 0.0 if max_seconds is None else seconds / max_seconds
    return max(done / total, by_time)


def _forever(data: Iterable[BatchLike], *, skip: int) -> Iterator[BatchLike]:
    """Batches without end, from where an earlier run stopped."""
    position = 0
    while True:
        before = position
        for batch in data:
            if position >= skip:
                yield batch
            position += 1
        if position == before:
            raise TargetError(
                "heal ran out of batches; pass a list or another collection that can be walked again, "
                "not an iterator."
            )

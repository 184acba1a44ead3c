"""Healing: distil a dense model into the cores of its compressed student."""

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tensornet._util import check_size, in_eval_mode, uncompiled, without_cache
from tensornet.calibration.batches import Batch, BatchLike, as_batch, check_batches, run_model, token_mask
from tensornet.calibration.losses import field, only_hidden, output_distances, pooled
from tensornet.errors import FormatError, NonFiniteError, TargetError
from tensornet.healing.divergence import divergence
from tensornet.io import check_place, write_tensors
from tensornet.nn.linear import TensorNetworkLinear
from tensornet.nn.module import NetworkModule
from tensornet.nn.storage import TrainedCodes, pack_after_training, unpack_for_training
from tensornet.nn.unfuse import unfused

#: Function that returns the distance between the outputs of student and teacher on a batch, a scalar.
Distance = Callable[[Any, Any, Batch], Tensor]
#: Which parameters are trained.
Parameters = Literal["auto", "cores", "vectors", "codes", "trainable"]


@dataclass(frozen=True)
class HealingConfig:
    """Options of `heal`.

    Args:
        steps: number of end-to-end steps, one batch each.
        layer_steps: number of layer-wise steps before these.
        lr: largest learning rate. For cores it is relative to the root mean square of each core; the default
            5e-4 suits some hundred steps of a pretrained model, and small models trained from scratch need
            five times as much. Gains and biases have six times this rate, integer codes forty times (0.02
            units of the grid). With `parameters="trainable"` it is absolute, 1e-4 by default.
        temperature: temperature of the softmax in the divergence.
        distance: distance between the outputs of both models. If absent, the divergence of the logits; one
            minus the cosine of mean-pooled hidden states for models without logits; the relative squared
            difference for outputs that are tensors.
        parameters: what is trained. `"cores"`: cores, and 16-bit scales of integer cores (8-bit scales cannot
            be trained). `"vectors"`: these, and gains and biases of the model. `"codes"`: all of these and
            the integers, which are rounded in each pass with a straight-through gradient; this helps most at
            two and three bits and needs 16 bytes per weight in training. `"trainable"`: all parameters that
            require gradients now, such as adapters on frozen cores. `"auto"`: `"cores"` if every compressed
            layer then has something to train, else `"vectors"`.
        autocast: run both models under autocast to this dtype; `torch.bfloat16` is twice as fast on recent
            processors and changes the result little.
        max_seconds: stop after this time; the learning rate then decreases with time.
        clock: the clock for `max_seconds` and the time in the report: wall time by default; use
            `time.process_time` on a shared machine.
        checkpoint: safetensors file for cores and optimizer. If it exists, healing resumes from it. So after
            an interruption compress the model again in the same way, and repeat the call.
        save_every: number of steps between two checkpoints.
        progress: show a progress bar.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> tn.healing.HealingConfig(steps=100).rate
        0.0005
    """

    steps: int = 300
    layer_steps: int = 0
    lr: float | None = None
    temperature: float = 1.0
    distance: Distance | None = None
    parameters: Parameters = "auto"
    autocast: torch.dtype | None = None
    max_seconds: float | None = None
    clock: Callable[[], float] = time.perf_counter
    checkpoint: str | Path | None = None
    save_every: int = 50
    progress: bool = False

    def __post_init__(self) -> None:
        check_size("steps", self.steps, least=0, error=ValueError)
        check_size("layer_steps", self.layer_steps, least=0, error=ValueError)
        check_size("save_every", self.save_every, error=ValueError)
        if self.parameters not in get_args(Parameters):
            raise ValueError(f"parameters must be one of {get_args(Parameters)}, got {self.parameters!r}.")
        for name in ("lr", "temperature", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value!r}.")

    @property
    def selects_parameters(self) -> bool:
        """True if `heal` selects the parameters to train; False if all that require gradients are trained.

        If True, scales of integers are made trainable, learning rates are relative to the size of each
        parameter, and checkpoints contain the row order of pivoted cores.

        Example:
            >>> tn.healing.HealingConfig().selects_parameters
            True
            >>> tn.healing.HealingConfig(parameters="trainable").selects_parameters
            False
        """
        return self.parameters != "trainable"

    @property
    def rate(self) -> float:
        """Maximum learning rate; the default depends on `parameters`."""
        if self.lr is not None:
            return self.lr
        return 5e-4 if self.selects_parameters else 1e-4

    @property
    def total(self) -> int:
        """Number of steps of both kinds."""
        return self.layer_steps + self.steps


@dataclass(frozen=True)
class HealReport:
    """Result of healing.

    Args:
        losses: distance to the dense model at each end-to-end step made in this call.
        layer_losses: mean relative squared error of the layers' outputs at each layer-wise step.
        steps: total number of steps, including those of earlier calls that were resumed.
        trained: number of parameters that were trained.
        seconds: time of this call by `clock`.

    Example:
        >>> import copy
        >>> teacher = torch.nn.Linear(16, 16)
        >>> student = torch.nn.Sequential(copy.deepcopy(teacher))
        >>> _ = tn.compress(student, tn.CompressionConfig(max_bond=4, objective="weight"), progress=False)
        >>> report = tn.heal(student, torch.nn.Sequential(teacher), [torch.randn(64, 16)], steps=5)
        >>> report.steps, len(report.losses)
        (5, 5)
    """

    losses: tuple[float, ...]
    layer_losses: tuple[float, ...]
    steps: int
    trained: int
    seconds: float


@torch.inference_mode(False)  # gradients are needed, even if the caller disabled them
def heal(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[BatchLike],
    config: HealingConfig | None = None,
    **options: Any,
) -> HealReport:
    """Distil a dense model into the cores of its compressed student; matrices outside them stay frozen.

    Layers are trained first one by one (each compressed layer learns the dense layer's outputs for the dense
    layer's inputs, without a backward pass through the model), then all together, end to end. The optimizer
    is AdamW without weight decay, with gradients clipped to norm 1. The learning rate increases for a
    twentieth of the steps, then decreases to zero.

    Args:
        model: compressed, changed in place.
        teacher: the dense model, on the same device; not changed.
        data: batches as for `calibrate`, which are repeated when they end. They should be as varied as the
            later inputs of the model, and many: a few ten thousand tokens are enough, a hundred overfit.
        config: options as one object; or
        options: fields of `HealingConfig` as keyword arguments, such as `steps=300`.

    Returns:
        Losses and the number of steps.

    Raises:
        TargetError: nothing to train, no data, or a teacher that shares trained parameters or has other
            layers.
        TypeError: an option that `HealingConfig` does not have, or both a config and options.
        ValueError: an option is out of its range.
        NonFiniteError: the distance became NaN or infinite; the checkpoint has an earlier state.
        FormatError: the checkpoint is damaged, of another model, or of a run with other `layer_steps`.
        DestinationError: the checkpoint cannot be written there.

    Reference:
        Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network"; Shazeer, Stern 2018,
        "Adafactor", section 8, for learning rates relative to the size of parameters.

    Example:
        >>> import copy
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> model = copy.deepcopy(teacher)
        >>> _ = tn.compress(model, tn.CompressionConfig(max_bond=4, objective="weight"), progress=False)
        >>> report = tn.heal(model, teacher, [torch.randn(64, 16)], steps=30, lr=1e-2)
        >>> report.losses[-1] < report.losses[0]
        True
    """
    if config is not None and options:
        raise TypeError(
            f"heal takes a config or options, got both; put {', '.join(options)} into the config."
        )
    config = HealingConfig(**options) if config is None else config
    check_batches(data, "heal")
    chosen = config.selects_parameters
    begun = config.clock()
    with ExitStack() as stack:
        if chosen:
            stack.enter_context(trained_scales(model, codes=config.parameters == "codes"))
        trained = trained_parameters(model, teacher, config.parameters, config.layer_steps)
        layers = compressed_layers(model)
        fixed = row_orders(layers) if chosen else {}
        # Fused: one pass over memory in place of seven, which would take a quarter of a step on a CPU.
        fused = all(x.device.type == "cpu" and x.is_floating_point() for x in trained.values())
        optimizer = torch.optim.AdamW(
            relative_groups(trained.values()) if chosen else [{"params": [*trained.values()], "size": 1.0}],
            lr=config.rate,
            weight_decay=0.0,
            fused=fused or None,
        )
        done, losses, layer_losses = 0, list[float](), list[float]()
        checkpoint = None if config.checkpoint is None else Path(config.checkpoint)
        if checkpoint is not None:
            check_place("The checkpoint", checkpoint)
            if checkpoint.is_file():
                done = load_state(checkpoint, trained, fixed, optimizer, config.layer_steps)
        device = next(model.parameters()).device
        distance = config.distance or partial(output_distance, temperature=config.temperature)
        batches = _forever(data, skip=done)
        if config.layer_steps:
            stack.enter_context(unfused(teacher))
        for context in (in_eval_mode(model, teacher), without_cache(model), without_cache(teacher)):
            stack.enter_context(context)
        stack.enter_context(only_training(model, trained.values()))
        bar = stack.enter_context(
            tqdm(total=config.total, initial=done, desc="healing", disable=not config.progress, unit="step")
        )
        while done < config.total:
            spent = 0.0
            if config.max_seconds is not None:
                spent = (config.clock() - begun) / config.max_seconds
            gone = max(done / config.total, spent)  # progress in steps or in time
            if gone >= 1:
                break
            for group in optimizer.param_groups:
                warm_up = min(1.0, (gone + 1 / config.total) * 20)
                group["lr"] = config.rate * group["size"] * warm_up * (1 - gone)
            batch = as_batch(next(batches), model, device)
            with torch.autocast(device.type, dtype=config.autocast, enabled=config.autocast is not None):
                if done < config.layer_steps:
                    loss = layer_step(layers, teacher, batch)
                    layer_losses.append(loss)
                else:
                    with torch.no_grad():
                        wanted = run_model(teacher, batch)
                    gap = distance(run_model(model, batch), wanted, batch)
                    gap.backward()
                    loss = float(gap.detach())
                    losses.append(loss)
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"The distance to the dense model became {loss} at step {done}; use a smaller lr than "
                    f"{config.rate}."
                )
            # Unlike `clip_grad_norm_`, this does not write gradients that need no clipping.
            norm = nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
            if norm > 1:
                nn.utils.clip_grads_with_norm_(trained.values(), 1.0, norm)
            with torch.device("cpu"):  # counters of Adam must be on the CPU
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")
            if checkpoint is not None and done % config.save_every == 0 and done < config.total:
                save_state(checkpoint, trained, fixed, optimizer, done, config.layer_steps)
        if checkpoint is not None:
            save_state(checkpoint, trained, fixed, optimizer, done, config.layer_steps)
    count = sum(parameter.numel() for parameter in trained.values())
    return HealReport(tuple(losses), tuple(layer_losses), done, count, config.clock() - begun)


def _forever(data: Iterable[BatchLike], *, skip: int) -> Iterator[BatchLike]:
    """Yield batches endlessly, starting where an earlier run stopped."""
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


# --- objectives -----------------------------------------------------------------------------------


def layer_step(layers: Mapping[str, NetworkModule], teacher: nn.Module, batch: Batch) -> float:
    """Accumulate the gradients of the relative squared errors of all layers' outputs.

    Every layer reads the dense layer's input, so no activations are kept for a backward pass through the
    model.

    Args:
        layers: layers of the student, by name.
        teacher: the dense model; it is run on the batch.
        batch: keyword arguments of the teacher.

    Returns:
        Mean error over the layers.

    Raises:
        TargetError: the teacher has no layer of one of the names.
    """
    found: list[float] = []
    handles = []

    def compare(layer: NetworkModule) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
        ) -> None:
            (given,) = (*args, *kwargs.values())  # some models pass it by keyword
            mask = token_mask(batch, output.shape[:-1])
            with torch.enable_grad():
                gap = layer(given.detach()) - output.detach()
                gap, wanted = (x if mask is None else x[mask] for x in (gap, output.detach()))
                error = gap.square().mean() / wanted.square().mean().clamp_min(1e-12)
            error.backward()
            found.append(float(error.detach()))

        return hook

    for name, layer in layers.items():
        if isinstance(layer, TensorNetworkLinear):  # embeddings have no input features
            stock = _counterpart(teacher, name)
            handles.append(stock.register_forward_hook(compare(layer), with_kwargs=True))
    try:
        with torch.no_grad(), uncompiled():  # a compiled teacher would trace the hooks
            run_model(teacher, batch)
    finally:
        for handle in handles:
            handle.remove()
    return sum(found) / max(len(found), 1)


def _counterpart(teacher: nn.Module, name: str) -> nn.Module:
    """Look up the teacher's layer of the same name.

    Raises:
        TargetError: there is no such layer.
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
    """Compute the mean divergence of the predicted distributions of all tokens, in nats.

    For models without logits it is one minus the cosine of each row's mean-pooled hidden states, or the
    squared difference of other outputs relative to the square of the teacher's, as in calibration. Both
    models are compared at every position, without a shift of labels.

    Args:
        student: output of the compressed model.
        teacher: output of the dense model on the same batch.
        batch: the batch, whose mask marks the padding.
        temperature: temperature of the softmax; the divergence is multiplied by its square.

    Returns:
        Scalar.

    Example:
        >>> round(float(output_distance(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]), {})), 6)
        0.5
    """
    if isinstance(student, Tensor):
        return (student - teacher).float().square().sum() / teacher.float().square().sum().clamp_min(1e-30)
    new, old = (field(x, "logits") for x in (student, teacher))
    if new is None and only_hidden(student):
        return (1 - (pooled(student, batch) * pooled(teacher, batch)).sum(-1)).mean()
    if new is None:
        return output_distances(student, teacher, batch).mean()
    return divergence(new, old, token_mask(batch, new.shape[:-1]), temperature)


# --- what is trained ------------------------------------------------------------------------------

#: Factors on the learning rate of cores: for gains and biases, and for codes (in units of the grid). With the
#: rate of cores, gains would hardly change in some hundred steps. Codes start in the middle of their rounding
#: intervals, so none changes before its updates add up to half a unit; at much larger rates many change at
#: once.
VECTOR_RATE, CODE_RATE = 6.0, 40.0


def compressed_layers(model: nn.Module) -> dict[str, NetworkModule]:
    """Collect the tensor-network layers of a model by name; a layer with several names is listed once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NetworkModule)}


def trainable_cores(layers: Mapping[str, NetworkModule]) -> dict[str, nn.Parameter]:
    """Collect the trainable cores of layers by name, tied ones once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in layers.items():
        for part, core in module.stored.items():
            if isinstance(core, nn.Parameter):
                found.setdefault(id(core), (f"{name}.{part}", core))
    return dict(found.values())


def row_orders(layers: Mapping[str, NetworkModule]) -> dict[str, Tensor]:
    """Collect the row permutations of pivoted cores by name, tied ones once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in layers.items():
        for part, tensor in module.stored.items():
            if tensor.dtype == torch.int32:
                found.setdefault(id(tensor), (f"{name}.{part}", tensor))
    return dict(found.values())


def trained_parameters(
    model: nn.Module, teacher: nn.Module, parameters: Parameters, layer_steps: int
) -> dict[str, nn.Parameter]:
    """Collect the parameters that healing trains, by name.

    Args:
        model: the student.
        teacher: the teacher, which must not share trained parameters.
        parameters: see `HealingConfig`.
        layer_steps: number of layer-wise steps, which train only cores.

    Raises:
        TargetError: nothing can be trained, the teacher would be trained too or is on another device, or
            there are layer-wise steps but no core to train.
    """
    layers = compressed_layers(model)
    cores, named = trainable_cores(layers), dict(model.named_parameters())
    if parameters == "auto":
        every = all(any(isinstance(x, nn.Parameter) for x in y.stored.values()) for y in layers.values())
        parameters = "cores" if every else "vectors"
    if parameters == "trainable":
        trained = {name: p for name, p in named.items() if p.requires_grad}
        advice = "no parameter requires gradients. Add adapters, or train the cores"
    elif parameters == "cores":
        trained = cores
        advice = (
            "the model has no layer made of trainable cores. Compress it first. Integers with scales of "
            "eight bits are not trained: use parameters='vectors' or 'codes', or formats such as 'int4', "
            "whose scales have 16 bits"
        )
    else:
        kept = {id(core) for core in cores.values()}
        trained = {
            name: p for name, p in named.items() if p.is_floating_point() and (id(p) in kept or p.dim() < 2)
        }
        trained = trained if layers else {}
        advice = (
            "the model has no compressed layer, or no cores, gains or biases that can be trained. Compress "
            "it first; add adapters and use parameters='trainable'"
        )
        if trained and parameters == "codes" and not any(isinstance(x, TrainedCodes) for x in cores.values()):
            trained = {}
            advice = (
                "parameters='codes', and no layer has integers in a number format. Compress with "
                "bits_per_weight= or formats=(...), or train parameters='cores'"
            )
    if not trained:
        raise TargetError(f"Nothing to heal: {advice}.")
    own = {id(parameter) for parameter in teacher.parameters()}
    if any(id(parameter) in own for parameter in trained.values()):
        raise TargetError(
            "The teacher has the very parameters that are trained. compress changes a model in place: "
            "keep the dense one before, teacher = copy.deepcopy(model)."
        )
    devices = [next(iter(each.parameters())).device for each in (model, teacher)]
    if devices[0] != devices[1]:
        raise TargetError(
            f"The model is on {devices[0]} and its teacher on {devices[1]}, and each batch runs "
            f'through both; move one, as by teacher.to("{devices[0]}").'
        )
    stored = {id(tensor) for layer in layers.values() for tensor in layer.stored.values()}
    if layer_steps and not any(id(parameter) in stored for parameter in trained.values()):
        raise TargetError(
            "Layer-wise steps train cores, and none of them requires gradients; use layer_steps=0."
        )
    return trained


def relative_groups(trained: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Build one optimizer group for each parameter; its learning rate will be multiplied by `size`.

    The size is the root mean square of a core, `VECTOR_RATE` times that of a gain or bias, and `CODE_RATE`
    for codes.
    """
    groups: list[dict[str, Any]] = []
    for parameter in trained:
        size = float(parameter.detach().float().square().mean().sqrt())
        # A bias may start at zero but must be trained too.
        size = max(size, 1e-6) if parameter.dim() > 1 else VECTOR_RATE * max(size, 1e-2)
        size = CODE_RATE if isinstance(parameter, TrainedCodes) else size
        groups.append({"params": [parameter], "size": size})
    return groups


@contextmanager
def only_training(model: nn.Module, trained: Collection[nn.Parameter]) -> Iterator[None]:
    """Require gradients only of the given parameters inside the block; restore the flags after it."""
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


@contextmanager
def trained_scales(model: nn.Module, *, codes: bool = False) -> Iterator[None]:
    """Convert scales and bfloat16 cores to float32 parameters inside the block, and back after it.

    A nested block has no effect, since optimizers refer to the parameters of the outer block.

    Args:
        model: a model with compressed layers or experts; tied ones stay tied.
        codes: whether integers become parameters as well, see `NumberFormat.decode`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False))
        >>> _ = tn.compress(model, tn.CompressionConfig(formats=("int4",)), progress=False)
        >>> with tn.healing.trained_scales(model):
        ...     [name for name, _ in model.named_parameters()]
        ['0.core_matrix.scales']
        >>> [name for name, _ in model.named_parameters()]
        []
    """
    cores = unpack_for_training(model, codes=codes)
    try:
        yield
    finally:
        pack_after_training(cores)


# --- checkpoint -----------------------------------------------------------------------------------

#: Names of the gradient moments in the state of AdamW.
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    path: Path,
    trained: Mapping[str, nn.Parameter],
    fixed: Mapping[str, Tensor],
    optimizer: torch.optim.AdamW,
    done: int,
    layer_steps: int,
) -> None:
    """Write the checkpoint, replacing an earlier one.

    Args:
        path: path of the file.
        trained: trained parameters by name.
        fixed: tensors that are needed to interpret the trained ones, by name.
        optimizer: optimizer of the trained parameters.
        done: number of steps so far, including layer-wise ones.
        layer_steps: number of layer-wise steps of the run.

    Raises:
        DestinationError: the file cannot be written.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in fixed.items()}
    for name, parameter in trained.items():
        tensors[name] = parameter.detach().contiguous()
        for key in _MOMENTS:  # missing if the parameter never had a gradient
            if key in optimizer.state[parameter]:
                tensors[f"{name}/{key}"] = optimizer.state[parameter][key].contiguous()
    header = json.dumps({"step": done, "layer_steps": layer_steps})
    write_tensors(path, tensors, {"heal": header}, what="The checkpoint")


def load_state(
    path: Path,
    trained: Mapping[str, nn.Parameter],
    fixed: Mapping[str, Tensor],
    optimizer: torch.optim.AdamW,
    layer_steps: int,
) -> int:
    """Restore a run from its checkpoint and return the number of steps; change nothing after an error.

    Raises:
        FormatError: the file is damaged, of another model, or of a run with other layer-wise steps.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = json.loads(file.metadata()["heal"])
            done, before = int(header["step"]), header.get("layer_steps", layer_steps)
            if before != layer_steps:
                raise FormatError(
                    f"{path} is of a run with layer_steps={before}, not {layer_steps}: give the same, or "
                    "another checkpoint."
                )
            if absent := {*trained, *fixed} - {*file.keys()}:
                raise FormatError(f"{path} belongs to another compression: it lacks {min(absent)}.")
            found = {name: file.get_tensor(name) for name in (*trained, *fixed)}
            for name, parameter in {**trained, **fixed}.items():
                if found[name].shape != parameter.shape:
                    raise FormatError(
                        f"{path} belongs to another compression: {name} has shape "
                        f"{tuple(found[name].shape)} there, {tuple(parameter.shape)} here."
                    )
            moments = {
                name: {key: file.get_tensor(f"{name}/{key}").to(parameter) for key in _MOMENTS}
                for name, parameter in trained.items()
                if f"{name}/{_MOMENTS[0]}" in file.keys()  # noqa: SIM118 (not a dict)
            }
    except FormatError:
        raise
    except (OSError, KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise FormatError(f"Cannot resume healing from {path}: {error}") from error
    with torch.no_grad():
        for name, parameter in {**trained, **fixed}.items():
            parameter.copy_(found[name])
    for name, known in moments.items():
        optimizer.state[trained[name]] = {"step": torch.tensor(float(done)), **known}
    return done

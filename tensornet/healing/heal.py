"""Healing by training: train the cores of a compressed model to reproduce the outputs of the dense model."""

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

from tensornet._util import check_size, in_eval_mode, without_cache
from tensornet.calibration.batches import Batch, BatchLike, as_batch, check_batches, run_model, token_mask
from tensornet.calibration.losses import field, output_distances
from tensornet.errors import FormatError, NonFiniteError, TargetError
from tensornet.io import check_place, write_tensors
from tensornet.nn.module import NetworkModule
from tensornet.nn.storage import TrainedCodes, pack_after_training, unpack_for_training
from tensornet.softmax_losses import kl_divergences

#: Function that returns the scalar distance between the outputs of student and teacher on a batch.
Distance = Callable[[Any, Any, Batch], Tensor]
#: Choices for the parameters that healing trains (see `heal`).
Parameters = Literal["auto", "cores", "vectors", "codes", "trainable"]


@dataclass(frozen=True)
class HealReport:
    """Result of `heal`.

    Args:
        losses: distance between the outputs of both models at each step of this call.
        steps: total number of steps, including steps of earlier calls that this call resumed.
        trained: number of trained elements of all parameters.
        seconds: time of this call, measured by `clock`.

    Example:
        >>> from tensornet.healing import HealReport
        >>> HealReport(losses=(0.4, 0.3), steps=2, trained=1_000, seconds=1.5).losses[-1]
        0.3
    """

    losses: tuple[float, ...]
    steps: int
    trained: int
    seconds: float


@torch.inference_mode(False)  # gradients are needed even if the caller disabled them
def heal(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[BatchLike],
    *,
    steps: int = 300,
    lr: float | None = None,
    temperature: float = 1.0,
    distance: Distance | None = None,
    parameters: Parameters = "auto",
    autocast: torch.dtype | None = None,
    max_seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    checkpoint: str | Path | None = None,
    save_every: int = 50,
    progress: bool = False,
) -> HealReport:
    """Train the cores of a compressed model, the student, to reproduce the dense model, its teacher.

    By default, matrices that were not compressed stay frozen. The optimizer is AdamW without weight decay,
    with gradients clipped to norm 1. The learning rate increases for a twentieth of the steps, then decreases
    to zero. To refit the layers one by one, call `refine` first.

    Args:
        model: the compressed model; it is changed in place.
        teacher: the dense model, on the same device; it is not changed.
        data: batches as for `calibrate`; they are repeated if there are fewer batches than steps. They should
            be as varied as the later inputs of the model. Tens of thousands of tokens are enough; with a
            hundred tokens the model overfits.
        steps: number of steps, with one batch each.
        lr: largest learning rate. For cores it is relative to the root mean square of each core; the default
            5e-4 suits a few hundred steps of a pretrained model. Small models trained from scratch need five
            times as much. The rate is six times as large for gains and biases, and forty times as large for
            integer codes (0.02 units of the grid). With `parameters="trainable"` it is absolute, 1e-4 by
            default.
        temperature: temperature of the softmax in the divergence.
        distance: function that returns the distance between the outputs of both models; `output_distance` if
            absent.
        parameters: which parameters to train. `"cores"`: the cores, and the 16-bit scales of integer cores
            (8-bit scales cannot be trained). `"vectors"`: also gains and biases of the model. `"codes"`: also
            the integer codes, which are rounded in each forward pass with a straight-through gradient. This
            helps most at two and three bits and needs 16 bytes per weight during training. `"trainable"`: all
            parameters that require gradients now, such as adapters on frozen cores. `"auto"`: `"cores"` if
            every compressed layer then has something to train, else `"vectors"`.
        autocast: dtype in which both models run under autocast; on recent processors `torch.bfloat16` is
            twice as fast as float32, and it changes the result little.
        max_seconds: time after which training stops; the learning rate then decreases with time, not steps.
        clock: function that returns the time in seconds: wall time by default; use `time.process_time` on a
            shared machine.
        checkpoint: path of a safetensors file for the trained parameters and the state of the optimizer. If
            the file exists, healing resumes from it. So after an interruption, compress the model again in
            the same way, and repeat the call.
        save_every: number of steps between two checkpoints.
        progress: whether to show a progress bar.

    Raises:
        TargetError: there is nothing to train, or no data, or the teacher shares trained parameters.
        ValueError: an option is out of range.
        NonFiniteError: the distance became NaN or infinite; the checkpoint contains an earlier state.
        FormatError: the checkpoint is damaged or of another model.
        DestinationError: the checkpoint cannot be written.

    Reference:
        Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network"; Shazeer, Stern 2018,
        "Adafactor", section 8, for learning rates relative to the size of parameters.

    Example:
        >>> import copy
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> model = copy.deepcopy(teacher)
        >>> _ = tn.compress(model, tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)
        >>> report = tn.heal(model, teacher, [torch.randn(64, 16)], steps=30, lr=1e-2)
        >>> report.losses[-1] < report.losses[0]
        True
    """
    check_size("steps", steps, least=0, error=ValueError)
    check_size("save_every", save_every, error=ValueError)
    if parameters not in get_args(Parameters):
        raise ValueError(f"parameters must be one of {get_args(Parameters)}, got {parameters!r}.")
    for name, value in {"lr": lr, "temperature": temperature, "max_seconds": max_seconds}.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value!r}.")
    check_batches(data, "heal")
    chosen = parameters != "trainable"  # False if the caller has chosen the parameters by `requires_grad`
    rate = default_rate(parameters) if lr is None else lr
    distance = distance or partial(output_distance, temperature=temperature)
    device = next(model.parameters()).device
    begun, done, losses = clock(), 0, list[float]()
    with ExitStack() as stack:
        if chosen:
            stack.enter_context(trained_scales(model, codes=parameters == "codes"))
        trained = trained_parameters(model, teacher, parameters)
        kept: dict[str, Tensor] = {**(row_orders(compressed_layers(model)) if chosen else {}), **trained}
        # Without `fused`, AdamW passes over memory seven times, which takes a quarter of a step on a CPU.
        fused = all(x.device.type == "cpu" and x.is_floating_point() for x in trained.values())
        optimizer = torch.optim.AdamW(
            relative_groups(trained.values()) if chosen else [{"params": [*trained.values()], "size": 1.0}],
            lr=rate,
            weight_decay=0.0,
            fused=fused or None,
        )
        if checkpoint is not None:
            check_place("The checkpoint", Path(checkpoint))
            if Path(checkpoint).is_file():
                done = load_state(Path(checkpoint), kept, optimizer)
        batches = _forever(data, skip=done)
        for context in (in_eval_mode(model, teacher), without_cache(model), without_cache(teacher)):
            stack.enter_context(context)
        stack.enter_context(only_training(model, trained.values()))
        bar = stack.enter_context(
            tqdm(total=steps, initial=done, desc="healing", disable=not progress, unit="step")
        )
        while done < steps:
            spent = 0.0 if max_seconds is None else (clock() - begun) / max_seconds
            gone = max(done / steps, spent)  # progress from 0 to 1, in steps or in time
            if gone >= 1:
                break
            for group in optimizer.param_groups:
                warm_up = min(1.0, (gone + 1 / steps) * 20)
                group["lr"] = rate * group["size"] * warm_up * (1 - gone)
            batch = as_batch(next(batches), model, device)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                with torch.no_grad():
                    wanted = run_model(teacher, batch)
                gap = distance(run_model(model, batch), wanted, batch)
                gap.backward()
            loss = float(gap.detach())
            losses.append(loss)
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"The distance to the dense model became {loss} at step {done}; use a smaller lr than "
                    f"{rate}."
                )
            # `clip_grad_norm_` would rewrite all gradients even if it clips none.
            norm = nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
            if norm > 1:
                nn.utils.clip_grads_with_norm_(trained.values(), 1.0, norm)
            with torch.device("cpu"):  # AdamW needs its step counters on the CPU
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")
            if checkpoint is not None and done % save_every == 0 and done < steps:
                save_state(Path(checkpoint), kept, optimizer, done)
        if checkpoint is not None:
            save_state(Path(checkpoint), kept, optimizer, done)
    count = sum(parameter.numel() for parameter in trained.values())
    return HealReport(tuple(losses), done, count, clock() - begun)


def default_rate(parameters: Parameters) -> float:
    """Return the default learning rate: absolute for `"trainable"`, else relative (see `relative_groups`)."""
    return 1e-4 if parameters == "trainable" else 5e-4


def _forever(data: Iterable[BatchLike], *, skip: int) -> Iterator[BatchLike]:
    """Repeat the batches endlessly, without the first `skip` batches, which an earlier run has used."""
    position = 0
    while True:
        before = position
        for batch in data:
            if position >= skip:
                yield batch
            position += 1
        if position == before:
            raise TargetError(
                "heal ran out of batches; pass a list or another collection that can be iterated over again, "
                "not an iterator."
            )


def output_distance(student: Any, teacher: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Compute the mean Kullback-Leibler divergence `KL(teacher || student)` of the predicted tokens, in nats.

    For models without logits, the distance is the mean of `output_distances`.

    Args:
        student: output of the compressed model.
        teacher: output of the dense model on the same batch.
        batch: the batch; its mask marks the padding, which is ignored.
        temperature: temperature of the softmax; the divergence is multiplied by the squared temperature.

    Returns:
        The distance, a scalar; NaN if all tokens are padding.

    Reference:
        Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", equation 2.
    """
    new, old = (field(x, "logits") for x in (student, teacher))
    if new is None:
        return output_distances(student, teacher, batch).mean()
    mask = token_mask(batch, new.shape[:-1])
    rows = None if mask is None or bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(-1)
    new, old = (x.reshape(-1, x.shape[-1]) for x in (new, old))
    return kl_divergences(new, old, rows, temperature).mean() * temperature**2


# --- what is trained ------------------------------------------------------------------------------

#: Learning rates of gains and biases, and of integer codes, relative to the learning rate of cores. With the
#: rate of cores, gains would hardly change in a few hundred steps. Codes start in the middle of rounding
#: intervals, so a code changes only when its updates add up to half a step of the grid. At much larger rates
#: many codes would change in the same training step.
VECTOR_RATE, CODE_RATE = 6.0, 40.0


def compressed_layers(model: nn.Module) -> dict[str, NetworkModule]:
    """Collect the tensor-network layers of a model by name; a layer with several names is listed once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NetworkModule)}


def trainable_cores(layers: Mapping[str, NetworkModule]) -> dict[str, nn.Parameter]:
    """Return the trainable stored tensors of layers by name; each tied tensor is listed once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in layers.items():
        for part, core in module.stored.items():
            if isinstance(core, nn.Parameter):
                found.setdefault(id(core), (f"{name}.{part}", core))
    return dict(found.values())


def row_orders(layers: Mapping[str, NetworkModule]) -> dict[str, Tensor]:
    """Map names to the row permutations of pivoted cores (see `Storage`); a tied one is listed once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in layers.items():
        for part, tensor in module.stored.items():
            if tensor.dtype == torch.int32:
                found.setdefault(id(tensor), (f"{name}.{part}", tensor))
    return dict(found.values())


def trained_parameters(
    model: nn.Module, teacher: nn.Module, parameters: Parameters
) -> dict[str, nn.Parameter]:
    """Map names to the parameters that healing trains; `parameters` is explained in `heal`.

    Raises:
        TargetError: there is nothing to train, or the teacher shares these parameters or is on another
            device.
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
            "the model has no compressed layer with trainable cores. Compress it first. Integer cores with "
            "8-bit scales have nothing to train: use parameters='vectors' or 'codes', or formats such as "
            "'int4', whose scales have 16 bits"
        )
    else:
        kept = {id(core) for core in cores.values()}
        trained = {
            name: p
            for name, p in named.items()
            if layers and p.is_floating_point() and (id(p) in kept or p.dim() < 2)
        }
        advice = (
            "the model has no compressed layer, or no cores, gains or biases that can be trained. Compress "
            "it first, or add adapters and use parameters='trainable'"
        )
        if trained and parameters == "codes" and not any(isinstance(x, TrainedCodes) for x in cores.values()):
            trained = {}
            advice = (
                "parameters='codes' needs layers with integers, and there are none. Compress with "
                "bits_per_weight= or formats=(...), or use parameters='cores'"
            )
    if not trained:
        raise TargetError(f"Nothing to heal: {advice}.")
    own = {id(parameter) for parameter in teacher.parameters()}
    if any(id(parameter) in own for parameter in trained.values()):
        raise TargetError(
            "The teacher shares parameters that are trained. compress changes a model in place: copy the "
            "dense model before, by teacher = copy.deepcopy(model)."
        )
    devices = [next(iter(each.parameters())).device for each in (model, teacher)]
    if devices[0] != devices[1]:
        raise TargetError(
            f"The model is on {devices[0]} and its teacher on {devices[1]}, but both run on the same "
            f'batches; move one of them, as by teacher.to("{devices[0]}").'
        )
    return trained


def relative_groups(trained: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Make one optimizer group for each parameter; its entry `"size"` is a factor for the learning rate.

    The factor of a core is its root mean square. The factor of a gain or bias is `VECTOR_RATE` times its root
    mean square. The factor of integer codes is `CODE_RATE`.
    """
    groups: list[dict[str, Any]] = []
    for parameter in trained:
        size = float(parameter.detach().float().square().mean().sqrt())
        # With these lower limits, biases that start at zero are trained too.
        size = max(size, 1e-6) if parameter.dim() > 1 else VECTOR_RATE * max(size, 1e-2)
        size = CODE_RATE if isinstance(parameter, TrainedCodes) else size
        groups.append({"params": [parameter], "size": size})
    return groups


@contextmanager
def only_training(model: nn.Module, trained: Collection[nn.Parameter]) -> Iterator[None]:
    """Return a context in which only the given parameters require gradients."""
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
    """Return a context in which scales and bfloat16 cores are trainable float32 parameters.

    On exit they are converted back. A nested context has no effect, since optimizers refer to the parameters
    of the outer context.

    Args:
        model: a model with compressed layers or experts; tied cores stay tied.
        codes: whether integer codes become parameters too (see `NumberFormat.decode`).

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

#: Names of two running averages in the state of AdamW: of gradients and of squared gradients.
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(path: Path, kept: Mapping[str, Tensor], optimizer: torch.optim.AdamW, done: int) -> None:
    """Write a checkpoint: tensors by name, their running averages in AdamW, and the number of finished steps.

    Raises:
        DestinationError: the file cannot be written.
    """
    tensors = {}
    for name, tensor in kept.items():
        tensors[name] = tensor.detach().contiguous()
        moments = optimizer.state.get(tensor, {})  # empty if the tensor is not trained or had no gradient
        tensors |= {f"{name}/{key}": moments[key].contiguous() for key in _MOMENTS if key in moments}
    write_tensors(path, tensors, {"heal": json.dumps({"step": done})}, what="The checkpoint")


def load_state(path: Path, kept: Mapping[str, Tensor], optimizer: torch.optim.AdamW) -> int:
    """Load a checkpoint into the tensors and the optimizer, and return the number of finished steps.

    Raises:
        FormatError: the file is damaged or of another model.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            done = int(json.loads(file.metadata()["heal"])["step"])
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise FormatError(f"Cannot resume healing from {path}: {error}") from error
    for name, tensor in kept.items():
        if name not in found or found[name].shape != tensor.shape:
            raise FormatError(
                f"{path} belongs to another compressed model: {name} has shape {tuple(tensor.shape)} in the "
                f"model, {tuple(found[name].shape) if name in found else 'none'} in the file."
            )
    with torch.no_grad():
        for name, tensor in kept.items():
            tensor.copy_(found[name])
            moments = {key: found[f"{name}/{key}"] for key in _MOMENTS if f"{name}/{key}" in found}
            if moments:
                moments = {key: moment.to(tensor) for key, moment in moments.items()}
                optimizer.state[tensor] = {"step": torch.tensor(float(done)), **moments}
    return done

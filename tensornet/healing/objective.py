"""Objectives of healing: the distance between outputs, and the errors of single layers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensornet._util import uncompiled
from tensornet.calibration.batches import Batch, run_model
from tensornet.calibration.losses import field, only_hidden, output_distances, pooled
from tensornet.calibration.masks import token_mask
from tensornet.errors import TargetError
from tensornet.healing.config import Distance
from tensornet.healing.divergence import divergence
from tensornet.nn.linear import TensorNetworkLinear
from tensornet.nn.module import NetworkModule


def layer_step(layers: Mapping[str, NetworkModule], teacher: nn.Module, batch: Batch) -> float:
    """Accumulate gradients of the relative squared error of every layer's outputs.

    Every layer reads the dense layer's input, so no activations are kept for a backward pass through the
    model.

    Args:
        layers: the student's, by name.
        teacher: run on the batch.
        batch: keyword arguments of the teacher.

    Returns:
        Mean error over the layers.

    Raises:
        TargetError: the teacher has no layer of some name.
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
        with torch.no_grad(), uncompiled():  # a compiled teacher would trace the backward passes of the hooks
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

    Without logits: one minus the cosine of each row's mean-pooled hidden states, or the squared difference of
    other outputs relative to the teacher's square, as calibration measures them. Nothing is shifted: both
    models are compared at every position.

    Args:
        student: output of the compressed model.
        teacher: output of the dense model on the same batch.
        batch: says which tokens are padding.
        temperature: of the softmax; the divergence is multiplied by its square.

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


def end_to_end_step(model: nn.Module, teacher: nn.Module, batch: Batch, distance: Distance) -> float:
    """Accumulate gradients of the distance between the outputs of both models; return the distance."""
    with torch.no_grad():
        wanted = run_model(teacher, batch)
    loss = distance(run_model(model, batch), wanted, batch)
    loss.backward()
    return float(loss.detach())

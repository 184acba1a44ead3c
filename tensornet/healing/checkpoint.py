"""Checkpoint of a healing run: cores, their row permutations, and optimizer state."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from tensornet.errors import FormatError
from tensornet.io import write_tensors

#: Moments of the gradients of a parameter in the state of AdamW.
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
        path: of the file.
        trained: trained parameters by name.
        fixed: tensors that give them their meaning, by name.
        optimizer: of the trained parameters.
        done: steps made, layer-wise ones included.
        layer_steps: number of layer-wise steps of the run.

    Raises:
        DestinationError: the file cannot be written.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in fixed.items()}
    for name, parameter in trained.items():
        tensors[name] = parameter.detach().contiguous()
        for key in _MOMENTS:  # absent if the parameter never had a gradient
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
    """Restore a run from its checkpoint and return the number of steps made; change nothing unless all fits.

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

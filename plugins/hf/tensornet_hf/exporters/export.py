"""`export`: write a model in the format of another runtime."""

import os
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from tensornet.errors import DestinationError
from tensornet.quantization.menus import MENUS, Menu
from tensornet_hf.checkpoint import check_free, load, resolve_folder
from tensornet_hf.exporters.adapters import export_mlx_adapter, export_peft_adapter
from tensornet_hf.exporters.base import GGUF, ExportReport, Networks, refuse_mixtures
from tensornet_hf.exporters.compressed_tensors import (
    COMPRESSED_TENSORS_MENU,
    KINDS,
    export_compressed_tensors,
)
from tensornet_hf.exporters.folder import folder_constraints
from tensornet_hf.exporters.gguf import (
    GGUF_FAST_MENU,
    GGUF_MENU,
    check_files,
    export_gguf,
    export_gguf_adapter,
    file_constraints,
)
from tensornet_hf.exporters.mlx import MLX_MENU, export_mlx, packed_kinds


class Target(NamedTuple):
    """Export target: a function that writes models in its format, and what plans must know about the format.

    Args:
        export: function that writes a model to a destination. Its keyword arguments are `source` (folder of
            the tokenizer, or None), `force`, `networks`, and options of the target.
        constraints: function of a dense model and its folder that returns what a plan must know: the bytes
            that the files need in addition to the weights, and the names of layers that the target stores
            dense.
        menu: the number formats of plans for this target.
        adapter: function that writes low-rank changes of the layers of a model as a LoRA adapter, with the
            arguments of `export_peft_adapter`; None if the target has no adapters.
    """

    export: Callable[..., ExportReport]
    constraints: Callable[[PreTrainedModel, Path], tuple[int, tuple[str, ...]]]
    menu: Menu
    adapter: Callable[..., None] | None = None


#: Maps names to export targets (see `register_target`).
TARGETS: dict[str, Target] = {}


def register_target(name: str, target: Target) -> None:
    """Add a target for `export`; `CompressionConfig(formats=name)` then plans with its number formats.

    Raises:
        FormatError: another target has this name.
    """
    MENUS.add(name, target.menu)
    TARGETS[name] = target


register_target("gguf", Target(export_gguf, file_constraints, GGUF_MENU, export_gguf_adapter))
MENUS.add("gguf-fast", GGUF_FAST_MENU)
register_target(
    "compressed-tensors",
    Target(
        export_compressed_tensors,
        lambda model, _: folder_constraints(model, KINDS),
        COMPRESSED_TENSORS_MENU,
        export_peft_adapter,
    ),
)
register_target(
    "mlx",
    Target(
        export_mlx,
        lambda model, _: folder_constraints(model, packed_kinds(model)),
        MLX_MENU,
        export_mlx_adapter,
    ),
)


def find_target(destination: str | os.PathLike[str], target: str | None = None) -> str | None:
    """Return `target` if it is given, otherwise the target that the destination's suffix implies, or None.

    Raises:
        DestinationError: target and suffix contradict each other.
        ValueError: an unknown target.
    """
    is_gguf = Path(destination).suffix == GGUF
    name = target or ("gguf" if is_gguf else None)
    if name is not None and name not in TARGETS:
        raise ValueError(f"Unknown export target {name!r}; choose one of {', '.join(TARGETS)}.")
    if is_gguf != (name == "gguf"):
        raise DestinationError(
            f"{destination}: the target 'gguf' needs a name that ends in .gguf, and other targets need a "
            "name that does not."
        )
    return name


def export(
    model_or_folder: PreTrainedModel | str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    target: str | None = None,
    source: str | os.PathLike[str] | None = None,
    force: bool = False,
    networks: Networks = "dense",
    **options: Any,
) -> ExportReport:
    """Write a model in the format of another runtime, with exactly the same weights.

    | target | written | read by |
    |---|---|---|
    | `"gguf"` | one file, `.gguf` | llama.cpp, Ollama, LM Studio; transformers, but no mixtures |
    | `"compressed-tensors"` | a folder | transformers with `compressed-tensors`, vLLM |
    | `"mlx"` | a folder | `mlx-lm` |

    A layer that the target cannot store (a network of several cores, or a number format that the target does
    not have) is written dense, and the report lists it. Plans made with `CompressionConfig(formats=target)`
    only use what the target can store.

    Residual layers are a matrix of integers plus a low-rank matrix. With `networks="lora"` the integers are
    packed, and all low-rank matrices become a LoRA adapter with exactly the same factors, to be loaded
    together with the model. In a folder, the adapter is the subfolder `lora`. The adapter of `model.gguf` is
    the file `model-lora.gguf`, which `force` replaces or removes.

    Args:
        model_or_folder: a compressed or dense model (it is not changed), or its folder or hub id.
        destination: file or folder to write.
        target: name of the target; optional if the destination ends in `.gguf`.
        source: folder from which the tokenizer is taken; by default `model_or_folder`, if it is a folder.
        force: replace an existing destination.
        networks: how to write layers that are not a single matrix of integers. `"dense"` writes dense
            weights; `"lora"` writes residual layers as integers and an adapter, and other layers dense;
            `"refuse"` raises an error.
        options: options of the target. `"gguf"` has `skeleton=`, a GGUF file of the dense model from which
            everything but the compressed weights is taken.

    Returns:
        A report that lists the packed layers, and the reason for each layer that was written dense.

    Raises:
        DestinationError: the destination exists already, is the source, or cannot be written; no new files
            are left.
        TargetError: the target cannot store this model, or `networks="refuse"` forbids a layer. No target
            stores the mixtures of this library (see `stock_mixture`).
        ValueError: an unknown target or option.
        MissingDependencyError: a package that the target needs is not installed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> config = tn.CompressionConfig(bits_per_weight=4.25, formats=("int4",), objective="weight")
        >>> _ = tn.compress(model, config, progress=False)
        >>> report = th.export(model, "exported", target="compressed-tensors")
        >>> len(report.packed), report.dense
        (7, {})
    """
    name = find_target(destination, target)
    if name is None:
        raise ValueError(
            f"No export target is given. Choose {', '.join(TARGETS)} (target=, --target), or a file name "
            "that ends in .gguf."
        )
    exporter = TARGETS[name].export
    if unknown := options.keys() - signature(exporter).parameters.keys():
        raise ValueError(f"The target {name!r} has no option {', '.join(sorted(unknown))}.")
    origin = (
        None if isinstance(model_or_folder, PreTrainedModel) else resolve_folder(os.fspath(model_or_folder))
    )
    folder = origin if source is None else Path(source)
    if name == "gguf":
        check_files(Path(destination), force=force)
    else:
        check_free(destination, force=force, sources=() if folder is None else (folder,))
    model: Any = model_or_folder if origin is None else load(origin)
    refuse_mixtures(model)
    return exporter(model, Path(destination), source=folder, force=force, networks=networks, **options)

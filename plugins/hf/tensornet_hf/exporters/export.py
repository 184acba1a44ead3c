"""`export`: write a model for another runtime, in the format of its file name or of a given target."""

import os
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from tensornet.errors import DestinationError
from tensornet_hf.checkpoint import check_free, load, resolve_folder
from tensornet_hf.exporters.base import GGUF, ExportReport, Networks
from tensornet_hf.exporters.compressed_tensors import KINDS, export_compressed_tensors
from tensornet_hf.exporters.folder import folder_facts
from tensornet_hf.exporters.gguf import check_files, export_gguf, file_facts
from tensornet_hf.exporters.mlx import export_mlx, packed_kinds


class Target(NamedTuple):
    """Target of an export.

    Args:
        export: writes a model to a destination, with the keywords `source` (folder of the tokenizer, or
            None), `force`, `networks` and options of its own.
        facts: what a plan has to know about a dense model and its folder: the bytes of the files above those
            of the model, and the names of layers that stay dense.
    """

    export: Callable[..., ExportReport]
    facts: Callable[[PreTrainedModel, Path], tuple[int, tuple[str, ...]]]


#: Targets by name. A new one is an entry here; the number formats that it stores as they are go into
#: `tensornet.quantization.formats.MENUS`.
TARGETS: dict[str, Target] = {
    "gguf": Target(export_gguf, file_facts),
    "compressed-tensors": Target(export_compressed_tensors, lambda model, _: folder_facts(model, KINDS)),
    "mlx": Target(export_mlx, lambda model, _: folder_facts(model, packed_kinds(model))),
}


def find_target(destination: str | os.PathLike[str], target: str | None = None) -> str | None:
    """Return the target that is given, or that of the suffix of a destination; None without any.

    Raises:
        DestinationError: the suffix belongs to another target.
        ValueError: an unknown target.
    """
    is_gguf = Path(destination).suffix == GGUF
    name = target or ("gguf" if is_gguf else None)
    if name is not None and name not in TARGETS:
        raise ValueError(f"Unknown export target {name!r}; known are {', '.join(TARGETS)}.")
    if is_gguf != (name == "gguf"):
        raise DestinationError(f"{destination}: files of llama.cpp, and only these, end in .gguf.")
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
    | `"gguf"` | one file, `.gguf` | llama.cpp, Ollama, LM Studio; transformers (`gguf_file=`) |
    | `"compressed-tensors"` | a folder | transformers with `compressed-tensors`, vLLM |
    | `"mlx"` | a folder | `mlx-lm` |

    A layer that the target cannot store as it is (a network of several cores, a number format that the
    target does not have) is written dense, and the report lists it. Plans made with
    `CompressionConfig(formats=target)` contain only what the target stores.

    Residual layers are a matrix of integers plus a low rank. With `networks="lora"` the integers are packed,
    and all low ranks become one LoRA adapter with exactly the same factors, to be loaded with the model:
    `model-lora.gguf` for `model.gguf`; in a folder, its subfolder `lora`.

    Args:
        model_or_folder: a model, compressed or not (it is not changed), or its folder or hub id.
        destination: file or folder to write.
        target: name of the target; by default that of the suffix `.gguf`.
        source: folder whose tokenizer is written; by default the folder given.
        force: replace a destination that exists.
        networks: what becomes of layers that are not one matrix of integers: all `"dense"`; `"lora"`, an
            adapter for those that are integers plus a low rank, and the others dense; or `"refuse"`.
        options: of the target. `"gguf"` has `skeleton=`, a GGUF file of the dense model from which everything
            but the compressed weights is taken.

    Returns:
        What was packed, and why the rest was not.

    Raises:
        DestinationError: it exists already, is the source, or cannot be written; nothing is left there.
        TargetError: the target cannot store this model, or a network is refused.
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
            f"No export target is named; known are {', '.join(TARGETS)}. Name one (target=, --target), or "
            "end the file in .gguf."
        )
    exporter = TARGETS[name].export
    if rest := options.keys() - signature(exporter).parameters.keys():
        raise ValueError(f"The target {name!r} has no option {', '.join(sorted(rest))}.")
    origin = (
        None if isinstance(model_or_folder, PreTrainedModel) else resolve_folder(os.fspath(model_or_folder))
    )
    folder = origin if source is None else Path(source)
    if name == "gguf":
        check_files(Path(destination), networks=networks, force=force)
    else:
        check_free(destination, force=force, sources=() if folder is None else (folder,))
    model = model_or_folder if origin is None else load(origin)
    return exporter(model, Path(destination), source=folder, force=force, networks=networks, **options)

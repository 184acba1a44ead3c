"""Export targets: other runtimes, each with its number formats and the layout of its files.

`compress_folder` compresses into the files of a target block by block, and `export` writes a model in memory.
Both describe the files by the same function (`ExportTarget.lay_out`), and write them by a `FileSink`.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from tensornet.errors import DestinationError
from tensornet.quantization.menus import MENUS, Menu
from tensornet_hf.checkpoint import check_free, load, resolve_folder, weight_bytes
from tensornet_hf.exporters.adapters import export_mlx_adapter, export_peft_adapter
from tensornet_hf.exporters.base import GGUF, ExportReport, Networks, check_new_file, refuse_mixtures
from tensornet_hf.exporters.compressed_tensors import (
    COMPRESSED_TENSORS_MENU,
    KINDS,
    lay_out_compressed_tensors,
)
from tensornet_hf.exporters.folder import ADAPTER, folder_constraints
from tensornet_hf.exporters.gguf import (
    GGUF_FAST_MENU,
    GGUF_MENU,
    adapter_file,
    export_gguf_adapter,
    file_constraints,
    lay_out_gguf,
)
from tensornet_hf.exporters.gptq import GPTQ_MENU, lay_out_gptq
from tensornet_hf.exporters.gptq import KINDS as GPTQ_KINDS
from tensornet_hf.exporters.mlx import MLX_MENU, lay_out_mlx, packed_kinds
from tensornet_hf.file_sink import Files, FileSink, PlannedModel
from tensornet_hf.receipts import Receipt, digests_of, receipt_path, source_paths, written_paths
from tensornet_hf.report import display_name, versions
from tensornet_hf.staging import reading_or_writing


class ExportTarget(NamedTuple):
    """Export target: what plans must know about a format, and a function that describes its files.

    Args:
        lay_out: function that describes the files of a planned model, before its layers are compressed.
        constraints: function of a dense model and its folder that returns what a plan must know: the bytes
            that the files need in addition to the weights, and the names of layers that the target stores
            dense.
        menu: the number formats of plans for this target.
        suffix: suffix of destinations, such as `".gguf"`, if the target writes a file; empty for a folder.
        adapter: function that writes low-rank changes of the layers of a model as a LoRA adapter, with the
            arguments of `export_peft_adapter`; None if the target has no adapters.
    """

    lay_out: Callable[[PlannedModel], Files]
    constraints: Callable[[PreTrainedModel, Path], tuple[int, tuple[str, ...]]]
    menu: Menu
    suffix: str = ""
    adapter: Callable[..., None] | None = None


#: Maps names to export targets (see `register_target`).
EXPORT_TARGETS: dict[str, ExportTarget] = {}


def register_target(name: str, target: ExportTarget) -> None:
    """Add a target for `export`; `CompressionConfig(formats=name)` then plans with its number formats.

    Raises:
        FormatError: another target has this name.
    """
    MENUS.add(name, target.menu)
    EXPORT_TARGETS[name] = target


register_target("gguf", ExportTarget(lay_out_gguf, file_constraints, GGUF_MENU, GGUF, export_gguf_adapter))
MENUS.add("gguf-fast", GGUF_FAST_MENU)
#: Formats of Q8_0, Q6_K, Q4_K and Q4_0, the types that OpenVINO GenAI reads, beside F16 and Q4_1.
_OPENVINO = ("float", "int8:g32:float16", "int6:g16:s8", "int4:g32:s6:min", "int4:g32:float16")
MENUS.add("openvino", replace(GGUF_MENU, formats=_OPENVINO, on_request=()))
register_target(
    "compressed-tensors",
    ExportTarget(
        lay_out_compressed_tensors,
        lambda model, _: folder_constraints(model, KINDS),
        COMPRESSED_TENSORS_MENU,
        adapter=export_peft_adapter,
    ),
)
#: Formats for which vLLM has kernels on any GPU; 3, 5, 6 and 7 bits need Humming. On a CPU it has int4 alone.
_VLLM = ("float", "int8", "int8:g128", "int4:g32", "int4", "int4:g128")
MENUS.add("vllm", replace(COMPRESSED_TENSORS_MENU, formats=_VLLM, on_request=("nvfp4",)))
register_target(
    "gptq",
    ExportTarget(
        lay_out_gptq,
        lambda model, _: folder_constraints(model, GPTQ_KINDS),
        GPTQ_MENU,
        adapter=export_peft_adapter,
    ),
)
register_target(
    "mlx",
    ExportTarget(
        lay_out_mlx,
        lambda model, _: folder_constraints(model, packed_kinds(model)),
        MLX_MENU,
        adapter=export_mlx_adapter,
    ),
)


def find_target(destination: str | os.PathLike[str], target: str | None = None) -> str | None:
    """Return `target` if it is given, otherwise the target that the destination's suffix implies, or None.

    Raises:
        DestinationError: target and suffix contradict each other.
        ValueError: an unknown target.
    """
    suffix = Path(destination).suffix
    by_suffix = {x.suffix: name for name, x in EXPORT_TARGETS.items() if x.suffix}
    name = target or by_suffix.get(suffix)
    if name is not None and name not in EXPORT_TARGETS:
        raise ValueError(f"Unknown export target {name!r}; choose one of {', '.join(EXPORT_TARGETS)}.")
    wanted = "" if name is None else EXPORT_TARGETS[name].suffix
    if wanted != suffix and (wanted or suffix in by_suffix):
        ending = f"a name that ends in {wanted}" if wanted else f"a name that does not end in {suffix}"
        raise DestinationError(f"{destination}: the target {name!r} needs {ending}.")
    return name


def check_destination(
    destination: str | os.PathLike[str], target: str | None, *, force: bool, sources: tuple[Path, ...] = ()
) -> None:
    """Check that a destination may be written, before any work is done.

    Args:
        destination: the new folder or file.
        target: name of the export target; None is a model folder.
        force: allow replacing an existing destination.
        sources: folders that are read, and so must not be replaced.

    Raises:
        DestinationError: the destination exists and `force` is not set, or cannot be written; or it is or
            contains a source.
    """
    if target is None or not EXPORT_TARGETS[target].suffix:
        check_free(destination, force=force, sources=sources)
        return
    check_new_file(Path(destination), force=force)
    if target == "gguf":
        check_new_file(adapter_file(Path(destination)), force=force)  # it would be added to the new model


def export(
    model_or_folder: PreTrainedModel | str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    target: str | None = None,
    source: str | os.PathLike[str] | None = None,
    force: bool = False,
    networks: Networks = "dense",
) -> ExportReport:
    """Write a model in the format of another runtime, with exactly the same weights.

    | target | written | read by |
    |---|---|---|
    | `"gguf"` | one file, `.gguf` | llama.cpp, Ollama, LM Studio; transformers, but no mixtures |
    | `"compressed-tensors"` | a folder | transformers with `compressed-tensors`, vLLM |
    | `"gptq"` | a folder | ONNX Runtime GenAI, vLLM; transformers with `gptqmodel` |
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

    Returns:
        A report that lists the packed layers, and the reason for each layer that was written dense.

    Raises:
        DestinationError: the destination exists already, is the source, or cannot be written; no new files
            are left.
        TargetError: the target cannot store this model, or `networks="refuse"` forbids a layer. No target
            stores the mixtures of this library (see `stock_mixture`).
        ValueError: an unknown target.
        MissingDependencyError: a package that the target needs is not installed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> config = tn.CompressionConfig(bits_per_weight=4.25, formats=("int4",), method="nearest")
        >>> _ = tn.compress(model, config, progress=False)
        >>> report = th.export(model, "exported", target="compressed-tensors")
        >>> len(report.packed), report.dense
        (7, {})
    """
    name = find_target(destination, target)
    if name is None:
        raise ValueError(
            f"No export target is given. Choose {', '.join(EXPORT_TARGETS)} (target=), or a file name that "
            "ends in .gguf."
        )
    origin = (
        None if isinstance(model_or_folder, PreTrainedModel) else resolve_folder(os.fspath(model_or_folder))
    )
    folder = origin if source is None else Path(source)
    path = Path(destination).expanduser().absolute()
    check = partial(check_destination, path, name, force=force, sources=() if folder is None else (folder,))
    check()
    model = load(origin) if origin is not None else model_or_folder
    assert isinstance(model, PreTrainedModel)
    refuse_mixtures(model)
    title = (folder or path.with_suffix("")).resolve().name
    planned = PlannedModel(model, folder=folder, networks=networks, title=title)
    files = EXPORT_TARGETS[name].lay_out(planned)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        reading_or_writing(folder or path, path),
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work,
    ):
        FileSink(files, path, Path(work), force=force, check=check).finish()
        report = written_report(files, Path(destination), name)
        _receipt(path, origin, name, report.adapter).save(path)
    return report


def _receipt(path: Path, origin: Path | None, target: str, adapter: Path | None) -> Receipt:
    """Make the receipt of an exported model; the plan and its source are those of the compressed folder."""
    written = Receipt(
        digests_of(written_paths(path, adapter)),
        target=target,
        versions=versions(),
        options={} if adapter is None else {"networks": "lora"},
    )
    if origin is None:
        return written
    name, files = display_name(origin), digests_of(source_paths(origin))
    if not receipt_path(origin).is_file():
        return replace(written, source=name, source_files=files)
    earlier = Receipt.load(origin)
    return replace(
        earlier,
        files=written.files,
        target=target,
        versions=written.versions,
        options={**earlier.options, **written.options},
        exported_from={"name": name, "files": files},
    )


def written_report(files: Files, destination: Path, target: str) -> ExportReport:
    """Make the report of files that were written."""
    adapter = None
    if files.ranks:
        adapter = adapter_file(destination) if EXPORT_TARGETS[target].suffix else destination / ADAPTER
    adapter_bytes = 0 if adapter is None else weight_bytes(adapter)
    every = weight_bytes(destination)
    return ExportReport(
        destination, dict(files.packed), dict(files.dense), every, adapter, dict(files.ranks), adapter_bytes
    )

"""Check model folders, load models from them, and save models as folders.

Folders may come from untrusted sources. Nothing is unpickled, sizes are checked before memory is allocated,
and error messages name the entry that is missing, surplus or contradictory.
"""

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

import tensornet as tn
from tensornet._util import require, unwrapped
from tensornet.errors import DestinationError, FormatError, TargetError, TensorNetError
from tensornet.io import Slice, moved_aside, new_folder, read_headers, restore
from tensornet.nn import prepare_for_inference
from tensornet.nn.targets import adapter_names
from tensornet_hf.quantizer import (
    QUANT_METHOD,
    TensorNetworkConfig,
    check_layers,
    layer_descriptions,
    names_a_core,
    prepare_for_saving,
    without_guards,
)
from tensornet_hf.text import first_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Suffixes of weight files, which are never copied: a compressed model must not contain dense weights.
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot",
    ".npz", ".onnx_data", ".tflite", ".mlmodel",
)  # fmt: skip
#: Largest size in bytes of a JSON file that is read; real files are far smaller.
MAX_JSON = 256_000_000
#: Prefix of addresses on the hub.
HUB = "hf://"
#: Patterns of the files to download from the hub; none of these formats has to be unpickled.
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")
#: Options of `from_pretrained` that select files on the hub.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
#: Files that are copied with a model (tokenizer, templates, license); weights, pickles and code are not.
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe")
LEGAL_FILES = ("LICENSE", "NOTICE", "COPYING", "USE_POLICY")
#: Name of the receipt in a folder (see `receipts`).
RECEIPT = "receipt.json"
#: Small files that are not copied, since `save_pretrained` writes them or they describe the old weights.
NOT_COPIED = {"config.json", "generation_config.json", "quantize_config.json", RECEIPT}
#: File in which sentence-transformers lists its modules and their folders.
MODULES = "modules.json"
CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_CARD_TEXT = """\
---
library_name: transformers
tags:
- tensornet
- tensor-network
---

# Tensor networks replace layers of this model

Import `tensornet_hf` before loading the model. Without it, transformers does not know the quantization type
`tensornet`, and refuses the folder because empty tensors are stored in place of the dense weights.

```python
# pip install 'tensornet-torch[hf]'
import tensornet_hf

model = tensornet_hf.load("path/of/this/folder")
```

`AutoModel...from_pretrained` works as well, after the import. The class is `{architecture}`. The entry
`quantization_config` of `config.json` describes the replaced layers.

`tensornet decompress` converts the folder to an ordinary model.
"""


# --- reading --------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """Function from a stored tensor to the tensor of the model, with the dtype and shape of the result.

    Args:
        function: the function.
        dtype: dtype as named in a safetensors header, such as `"BF16"`.
        shape: shape of the result.
    """

    function: Callable[[Tensor], Tensor]
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checked model folder: configuration, description of compressed modules, tensor headers.

    Args:
        folder: the folder.
        config: content of `config.json`.
        compression: description of the compressed modules, None for an ordinary model.
        tensors: header of every stored tensor by name, without guards (see `quantizer.replaced_names`).
        changes: what must be done to stored tensors that differ from those of the model, by name.
    """

    folder: Path
    config: dict[str, Any]
    compression: TensorNetworkConfig | None
    tensors: dict[str, Slice]
    changes: dict[str, Change] = field(default_factory=dict)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Check the configuration and the weight-file headers of a model folder, and return them.

    No weights are read.

    Raises:
        FormatError: a file or tensor is missing, surplus, damaged or contradictory; the message names it.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        why = (
            "has no config.json" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        )
        advice = "Give a folder of save_pretrained, or a hub id."
        if folder.suffix == ".gguf":
            advice += " The commands eval and generate also read GGUF files; gguf-dump lists their tensors."
        if (earlier := moved_aside(folder)) is not None:
            advice = f"A run that was replacing it was interrupted, and left it as {earlier}: rename it."
        raise FormatError(f"{folder} is not a model folder: it {why}. {advice}")
    config = read_json(folder / "config.json")
    compression = read_compression(config)
    files, index = weight_files(folder)
    tensors = read_headers(files)
    for name, file in index.items():
        if name not in tensors or tensors[name].file.name != file:
            raise FormatError(
                f"{folder / INDEX} says that {file} contains {name!r}, but it does not. Either the index "
                "belongs to other files, or a file is incomplete. Copy or download the folder again."
            )
    if compression is not None:
        tensors = without_guards(tensors)
        check_layers(compression, tensors, where=str(folder))
    elif cores := [name for name in tensors if names_a_core(name)]:
        raise FormatError(
            f"{folder} contains cores ({cores[0]} and {len(cores) - 1} more), but its config.json has no "
            "quantization_config that describes them. Restore the config.json that was saved with the model, "
            "or save the model again with tensornet_hf.save(model, folder)."
        )
    return Checkpoint(folder, config, compression, tensors)


def read_dense(folder: str | Path) -> Checkpoint:
    """Check the folder of a model as `read_checkpoint` does, and check that the model is dense.

    Raises:
        FormatError: the folder is invalid (see `read_checkpoint`).
        TargetError: the model is compressed already.
    """
    checkpoint = read_checkpoint(folder)
    if checkpoint.compression is not None:
        raise TargetError(
            f"{folder} is compressed already. Compress the original again, or run tensornet decompress first."
        )
    return checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        FormatError: the file is absent, unreadable or too large, or it is not JSON, is nested too deeply, or
            contains something other than an object.
    """
    try:
        if (size := path.stat().st_size) <= MAX_JSON:
            content = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise FormatError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, or numbers of thousands of digits
        raise FormatError(f"{path} is not valid JSON ({error!s:.200}). Copy or download it again.") from error
    if size > MAX_JSON:
        raise FormatError(f"{path} has {size:,} bytes; JSON files of at most {MAX_JSON:,} bytes are read.")
    if not isinstance(content, dict):
        raise FormatError(f"{path} must contain a JSON object, but contains a {type(content).__name__}.")
    return content


def read_compression(config: Mapping[str, Any]) -> TensorNetworkConfig | None:
    """Return the description of compressed modules from the content of `config.json`.

    Returns:
        The description, or None for an ordinary model.

    Raises:
        FormatError: the description is damaged, or has an unknown version or another quantization method.
    """
    entry = config.get("quantization_config")
    if entry is None:
        return None
    method = entry.get("quant_method") if isinstance(entry, dict) else entry
    if not isinstance(entry, dict) or method != QUANT_METHOD:
        raise FormatError(
            f"The model is quantized by {method!r}, not by {QUANT_METHOD!r}. Use the original model with "
            "floating-point weights."
        )
    try:
        return TensorNetworkConfig(**entry)
    except (TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"The quantization_config of the model is damaged: {error}") from error


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Find the safetensors files of a model folder.

    Returns:
        The files, and the index `{tensor name: file name}`; the index is empty for a single file.

    Raises:
        FormatError: the folder has no safetensors files, or a file in the index is missing or outside the
            folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS], {}
    if not (folder / INDEX).is_file():
        other = sorted(x.name for x in folder.iterdir() if x.suffix in WEIGHT_SUFFIXES)
        if not other:
            raise FormatError(f"{folder} contains no weights: there is no {WEIGHTS} and no {INDEX}.")
        raise FormatError(
            f"{folder} has no {WEIGHTS} and no {INDEX}, only {', '.join(other)}. Pickles can run code and "
            "are never opened. If you trust the file, load it with transformers and save it with "
            "model.save_pretrained(folder)."
        )
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(x, str) for x in index.values()):
        raise FormatError(f"{folder / INDEX} has no weight_map from tensor names to file names.")
    names = sorted(set(index.values()))
    for name in names:
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise FormatError(
                f"{folder / INDEX} names {name!r:.200}, but only safetensors files in the folder of the "
                "index are read."
            )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FormatError(
            f"{folder} lacks {', '.join(missing)}, which {INDEX} lists. Copy or download the folder again."
        )
    return [folder / name for name in names], index


def weight_bytes(folder: str | Path) -> int:
    """Return the size in bytes of a file, or of a folder's safetensors files (other weight files if none)."""
    if Path(folder).is_file():
        return Path(folder).stat().st_size
    files = [file for file in Path(folder).iterdir() if file.suffix in WEIGHT_SUFFIXES]
    safe = [file for file in files if file.suffix == ".safetensors"]
    return sum(file.stat().st_size for file in safe or files)


# --- loading --------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    *,
    inference: bool | Literal["compiled"] = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a compressed or dense model as an instance of the class with which it was saved.

    `from_pretrained` only warns about missing or surplus tensors; this function raises an error. Compressed
    layers are never allocated as dense weights. Pickled weights are refused.

    Args:
        path: a folder written by `save_pretrained`, or a hub id.
        inference: True converts layers to forms that generate faster (see
            `tensornet.nn.prepare_for_inference`); the model can then be neither trained nor saved.
            `"compiled"` also makes `generate` use a static KV cache and compile the forward pass of a single
            token. The first call of `generate` then takes a minute or more. Compilation is repeated for each
            new cache length, so set `model.generation_config.max_cache_len` to the largest length. Do not
            change a compiled model.
        kwargs: passed to `from_pretrained`. The default dtype is the stored one; for inference it is
            bfloat16, the only dtype that the CPU kernels support. `revision`, `token`, `cache_dir`,
            `local_files_only` and `force_download` select files on the hub.

    Raises:
        FormatError: the path is not a model folder, or a file or tensor is missing, surplus or damaged.
        NonFiniteError: a stored core contains NaN or infinity.
        TargetError: `inference="compiled"` for a model that cannot generate.
        ValueError: unknown value of `inference`.

    Example:
        >>> type(th.load(th.embedded.gpt2_path())).__name__
        'GPT2LMHeadModel'
    """
    if inference not in (False, True, "compiled"):
        raise ValueError(f'inference must be False, True or "compiled", got {inference!r}.')
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    folder = resolve_folder(path, **hub) / kwargs.pop("subfolder", "")
    checkpoint = read_checkpoint(folder)
    kind = model_class(checkpoint, **kwargs)
    options = {
        "dtype": torch.bfloat16 if inference else "auto",
        **kwargs,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    try:
        loaded: Any = kind.from_pretrained(folder, **options)
    except (TensorNetError, MemoryError, torch.OutOfMemoryError, ImportError):
        raise
    except Exception as error:
        # Model classes may raise any exception for invalid configurations, or for options of the caller.
        # So if there are options, only an unreadable configuration becomes a FormatError.
        if kwargs and not isinstance(error, StrictDataclassError):
            raise
        raise FormatError(
            f"{folder} does not contain a {kind.__name__} that can be loaded: {type(error).__name__}: "
            f"{error!s:.300} Copy or download the folder again."
        ) from error
    model, info = loaded
    missing, surplus = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise FormatError(f"{folder} lacks weights: {', '.join(missing[:5])}.")
    if surplus:
        message = f"{folder} contains {len(surplus)} weights that the model does not have: "
        message += f"{', '.join(surplus[:5])}."
        if checkpoint.compression is not None:
            raise FormatError(message)
        # Models on the hub often have surplus tensors, such as pre-training heads or attention masks of older
        # versions of transformers.
        warnings.warn(message, stacklevel=2)
    if inference:
        prepare_for_inference(model)
    if inference == "compiled":
        compile_generation(model)
    return model


def load_gguf(file: Path) -> PreTrainedModel:
    """Load a GGUF file as a transformers model, with its weights dequantized to float32.

    Raises:
        FormatError: the file is missing or damaged, transformers does not know all weights of the model, or
            the model is a mixture that transformers would read as a dense Llama.
        MissingDependencyError: the package `gguf` is not installed.
    """
    require(("gguf",), extra="gguf", user="Reading GGUF files")
    verbosity = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        if config.model_type == "llama" and (experts := _count_experts(file)):
            raise FormatError(
                f"{file} is a mixture of {experts} experts, which transformers would load as a Llama with "
                "random feed-forward networks. Evaluate the folder from which the file was made, or run the "
                "file with llama.cpp."
            )
        if config.model_type == "gpt2":  # transformers only sets `n_ctx`
            config.n_positions = config.n_ctx
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # the parser may raise any exception for a damaged file
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"transformers cannot load {file}; it may be damaged, or of an architecture or version that "
            f"transformers does not read. {type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise FormatError(
            f"transformers does not find all weights of a {type(model).__name__} in {file}: "
            f"{', '.join(missing[:5])}. Evaluate the folder from which the file was made."
        )
    return model


def _count_experts(file: Path) -> int:
    """Read the number of experts in a layer of a GGUF file; Mixtral has the architecture "llama" there."""
    import gguf

    field = gguf.GGUFReader(file).fields.get(gguf.Keys.LLM.EXPERT_COUNT.format(arch="llama"))
    return 0 if field is None else int(field.contents())


def compile_generation(model: PreTrainedModel) -> None:
    """Make `generate` compile the forward pass of single tokens, but not the forward pass of the prompt.

    Raises:
        TargetError: the model cannot generate.
    """
    if not model.can_generate():
        raise TargetError(
            f'inference="compiled" compiles generation, but {type(model).__name__} cannot generate. Load it '
            "with inference=True."
        )

    # torch shares compiled code between equal backends. Each model needs a backend function of its own, since
    # the guards that would distinguish models are disabled below. torch finds a backend by its name only in
    # the private package `torch._dynamo`.
    def inductor(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        return lookup_backend("inductor")(graph, inputs)

    # Skip guards on the model's attributes: they would take a fifth of a step's time, and a prepared model
    # does not change.
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    mode: Any = None  # CompileConfig's default mode cannot be combined with options
    config: Any = CompileConfig(dynamic=False, backend=inductor, mode=mode, options=options)
    # This attribute is private, but without it transformers compiles only on accelerators, not on the CPU.
    config._compile_all_devices = True
    model.generation_config.update(cache_implementation="static", compile_config=config)


def on_device(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """Move a model to a device in place, without changing dtypes, and return it."""
    moving: Any = model  # transformers wraps `to` in a way that type checkers misread
    return moving.to(device=torch.device(device))


def resolve_folder(path: str | Path, **hub: Any) -> Path:
    """Return the local folder of a model; download a hub model that is not in the local cache.

    Args:
        path: a folder, or a hub id if there is no such folder.
        hub: options of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

    Raises:
        FormatError: the path is neither a folder nor a model on the hub or in its cache.
    """
    if Path(path).exists() or not isinstance(path, str) or path.startswith((".", "/", "~")):
        return Path(path)
    if path.endswith(".gguf"):
        raise FormatError(f"There is no file {path}.")
    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=list(HUB_FILES), **hub))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FormatError(
            f"{path} is not a local folder, and cannot be downloaded as a hub id: {first_line(error)}"
        ) from error


def model_class(checkpoint: Checkpoint, **kwargs: Any) -> type[PreTrainedModel]:
    """Import the model class that a configuration names in `architectures`.

    Args:
        checkpoint: contents of the model folder.
        kwargs: `trust_remote_code=True` allows classes that are defined in the folder.

    Raises:
        FormatError: the configuration names no class, or transformers does not have the class.
    """
    names = checkpoint.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    entries = checkpoint.config.get("auto_map")
    custom = entries.values() if isinstance(entries, dict) else ()
    reference = next((r for r in custom if isinstance(r, str) and r.endswith(f".{name}")), None)
    if reference is not None and kwargs.get("trust_remote_code"):
        return get_class_from_dynamic_module(reference, str(checkpoint.folder))
    raise FormatError(
        f"{checkpoint.folder}: config.json names the class {name!r} under 'architectures', which "
        f"transformers {transformers.__version__} does not have. Update transformers, or import tensornet_hf "
        "and load the folder with a suitable AutoModel class. A class that is defined in the folder needs "
        "trust_remote_code=True."
    )


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the dense model of a folder on the meta device, without running code from the folder.

    Raises:
        FormatError: transformers does not have the model's class, or cannot build it from the configuration.
    """
    kind = model_class(checkpoint)
    try:
        config: Any = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        vars(config).pop("quantization_config", None)
        config.name_or_path = ""
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # model classes may raise any exception
        raise FormatError(
            f"{checkpoint.folder}: config.json does not describe a {kind.__name__} that can be built: "
            f"{type(error).__name__}: {error!s:.300}"
        ) from error


# --- saving ---------------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    destination: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> str | Path:
    """Save a compressed or dense model as a complete folder: weights, configuration, tokenizer, model card.

    `model.save_pretrained(folder)` writes the same weights and configuration, but no tokenizer and no model
    card, and leaves an incomplete folder if it fails. It also writes no description of layers that were
    replaced by hand, or by compressing a submodule; save such a model with this function.

    Args:
        model: a transformers model, possibly wrapped by `DataParallel`, `DistributedDataParallel` or
            `torch.compile`.
        destination: the new folder, or `hf://owner/name` for a repository on the hub.
        source: the folder from which the model was loaded; its tokenizer and other small files are copied.
        force: replace an existing model folder. In an existing repository, remove the old weights and
            overwrite files of the same names.

    Returns:
        The destination.

    Raises:
        DestinationError: the destination exists already, is the source, or cannot be written (full disk). An
            existing folder is unchanged, and no new files are left; on the hub, an empty repository may be
            left.
        TargetError: PEFT adapters are attached to the model.
        TypeError: the model is not a transformers model.

    Example:
        >>> model = th.load(th.embedded.gpt2_path())
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, method="svd")
        >>> _ = tn.compress(model, config, progress=False)
        >>> folder = th.save(model, "small", source=th.embedded.gpt2_path())
        >>> sorted(path.name for path in folder.iterdir())[:2]
        ['README.md', 'config.json']
    """
    whole: Any = unwrapped(model) if isinstance(model, nn.Module) else model
    if not isinstance(whole, nn.Module) or not callable(getattr(whole, "save_pretrained", None)):
        raise TypeError(
            f"save takes a transformers model, got {type(whole).__name__}, which has no method "
            "save_pretrained. Use tensornet.save_model to write other PyTorch models to a file."
        )
    # PEFT sets `peft_config` on all adapted models, even on those with prompt tuning and no adapter layers.
    if adapter_names(whole) or getattr(whole, "peft_config", None):
        raise TargetError(
            f"Adapters are attached to this {type(whole).__name__}, but a folder contains either the model "
            "or the adapters. Save specialists by tensornet_hf.PretrainedSpecialists(model).save(folder). "
            "Save other adapters separately: model.save_pretrained(adapters) in PEFT, then "
            "tensornet_hf.save(model.unload(), folder); load them with "
            "tensornet_hf.peft.load_adapters(load(folder), adapters). Or save what "
            "tensornet_hf.peft.merge_adapters(model) returns."
        )
    sources = () if source is None else (Path(source),)
    check_free(destination, force=force, sources=sources)
    if str(destination).startswith(HUB):
        with tempfile.TemporaryDirectory(prefix="tensornet-") as parent:
            upload(save(whole, Path(parent) / "model", source=source), str(destination), force=force)
        return str(destination)
    prepare_for_saving(whole)
    with write_folder(destination, force=force, sources=sources) as folder:
        whole.save_pretrained(folder)  # type: ignore[operator]  # a method, as was checked
        for origin in sources:
            copy_small_files(origin, folder)
        if layer_descriptions(whole):
            write_card(folder, type(whole).__name__)
    return Path(destination)


def upload(folder: str | Path, destination: str, *, force: bool) -> None:
    """Upload a model folder to a repository on the hub.

    Raises:
        DestinationError: the upload failed.
    """
    name = _repository(destination)
    # Delete old weight files, which would otherwise be loaded together with the new ones.
    replaced = [*(f"*{suffix}" for suffix in WEIGHT_SUFFIXES), "*.index.json"] if force else None
    try:
        name = huggingface_hub.create_repo(name, exist_ok=force).repo_id  # includes the owner
        huggingface_hub.upload_folder(repo_id=name, folder_path=folder, delete_patterns=replaced)
    except Exception as error:  # huggingface_hub raises many unrelated classes
        raise DestinationError(
            f"Cannot upload to {destination}: {first_line(error)}. If this attempt created an empty "
            "repository, repeat it with force=True."
        ) from error


def decompress(model: nn.Module) -> nn.Module:
    """Replace compressed layers by dense layers, so that the saved model does not need this library.

    Unlike `tensornet.decompress`, this function raises an error if a module cannot be replaced.

    Returns:
        The same model.

    Raises:
        TargetError: the model has modules without a dense equivalent, such as experts that share cores.

    Example:
        >>> model = th.load(th.embedded.gpt2_path())
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, method="svd")
        >>> _ = tn.compress(model, config, progress=False)
        >>> type(th.decompress(model).transformer.h[0].mlp.c_fc).__name__
        'Conv1D'
    """
    layers = layer_descriptions(model)
    if stays := [name for name, spec in layers.items() if spec["type"] not in ("linear", "embedding")]:
        kinds = sorted({str(layers[name]["type"]) for name in stays})
        raise TargetError(
            f"{len(stays)} modules of type {', '.join(kinds)} cannot be converted to dense layers: "
            f"{', '.join(stays[:5])}. Nothing was changed."
        )
    return tn.decompress(model)


def write_card(folder: str | os.PathLike[str], architecture: str) -> None:
    """Write a model card into the folder of a compressed model, unless the folder already has one."""
    if not (card := Path(folder) / CARD).exists():
        card.write_text(_CARD_TEXT.format(architecture=architecture), encoding="utf-8")


@contextmanager
def write_folder(
    destination: str | os.PathLike[str], *, force: bool = False, sources: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `destination` if the `with` block ends without an error.

    After an error (such as a full disk) the temporary folder is removed, and `destination` is unchanged. The
    arguments are those of `check_free`.

    Raises:
        DestinationError: the destination exists already, or cannot be written.
    """
    target = Path(destination).expanduser().absolute()
    check_free(target, force=force, sources=sources)
    try:
        with new_folder(target, force=force) as folder:
            yield folder
            check_free(target, force=force, sources=sources)  # another process may have written the target
    except (OSError, SafetensorError) as error:
        # Errors about other files are raised as they are. Errors that name no file are converted too, since
        # safetensors does not name the file if the disk is full.
        names = [x for x in (getattr(error, "filename", None), getattr(error, "filename2", None)) if x]
        about = not names or any(str(name).startswith(str(target.parent)) for name in names)
        if isinstance(error, DestinationError) or not about:
            raise
        raise DestinationError(
            f"Writing {target} failed: {error}. Nothing was left there. Free some space or choose another "
            "destination."
        ) from error


def check_free(
    destination: str | os.PathLike[str], *, force: bool = False, sources: tuple[Path, ...] = ()
) -> None:
    """Check that a destination may be written, before any work is done.

    A run that is killed while it replaces a folder leaves the old folder under another name. In this case the
    old folder first gets its name back.

    Args:
        destination: the new folder, or `hf://owner/name`.
        force: allow replacing an existing model folder; not needed for an empty folder.
        sources: folders that are read, and so must not be replaced.

    Raises:
        DestinationError: the destination exists and `force` is not set; or it is or contains a source or the
            working directory, is a file, or is not a valid hub address.
    """
    if str(destination).startswith(HUB):
        name = _repository(str(destination))
        try:
            taken = huggingface_hub.repo_exists(name)
        except Exception as error:  # huggingface_hub raises many unrelated classes
            raise DestinationError(f"Cannot ask the hub about {destination}: {first_line(error)}") from error
        if taken and not force:
            raise DestinationError(
                f"{destination} exists already. Choose another name, or replace it with force=True."
            )
        return
    target = Path(destination).expanduser().absolute()
    if target.suffix == ".gguf":
        raise DestinationError(
            f"{target} would become a folder. Use `tensornet compress` or `tensornet export` to write GGUF "
            "files."
        )
    real = target.resolve()
    if Path.cwd().is_relative_to(real):  # replacing it would leave the process without a working directory
        raise DestinationError(
            f"{target} is or contains the working directory, which cannot be replaced while it is in use. "
            "Choose another destination, or run in another folder."
        )
    for source in sources:
        if source.exists() and (real == source.resolve() or real in source.resolve().parents):
            raise DestinationError(
                f"{target} is or contains the source {source}; choose another destination."
            )
    restore(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise DestinationError(f"{target} is a file, but a folder is to be written. Choose another name.")
    if not any(target.iterdir()):
        return
    if not force:
        raise DestinationError(
            f"{target} exists already. Choose another name, or replace it with force=True."
        )
    if not (target / "config.json").is_file():
        raise DestinationError(
            f"{target} is not a model folder (it has no config.json), so it is not replaced even with force. "
            "Remove it yourself, or choose another name."
        )


def copy_small_files(source: Path, destination: Path) -> list[str]:
    """Copy the tokenizer, templates, license and sentence-transformers modules of a model to a folder.

    Existing files are not overwritten.

    Returns:
        Paths of the copied files relative to the folder.

    Raises:
        FormatError: the list of modules is damaged, or contains a path outside the folder.
    """
    wanted = []
    for file in sorted(source.iterdir()):
        small = file.suffix in SMALL_FILES or file.stem.upper() in LEGAL_FILES
        if small and file.name not in NOT_COPIED and not file.name.endswith(".index.json") and file.is_file():
            wanted.append(file.name)
    if (source / MODULES).is_file():
        try:
            modules = json.loads((source / MODULES).read_bytes())
            paths = [str(module["path"]) for module in modules if module["path"]]
        except (ValueError, TypeError, KeyError) as error:
            raise FormatError(f"{source / MODULES} is not a list of modules: {error!s:.200}") from error
        for path in paths:
            if not (source / path).resolve().is_relative_to(source.resolve()):
                raise FormatError(f"{source / MODULES} contains {path!r}, which is outside the folder.")
            wanted += [
                x.relative_to(source).as_posix()
                for x in sorted((source / path).rglob("*"))
                if x.suffix in (*SMALL_FILES, ".safetensors") and x.is_file()
            ]
    copied = [name for name in wanted if not (destination / name).exists()]
    for name in copied:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, destination / name)  # follows the links of the hub's cache
    return copied


def other_files(folder: Path) -> list[str]:
    """Return the relative paths of all files but config.json, receipt, index, weights and hidden files."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        written = name in ("config.json", RECEIPT) or name.endswith(INDEX) or path.suffix in WEIGHT_SUFFIXES
        if path.is_file() and not written and not any(x.startswith(".") for x in name.split("/")):
            found.append(name)
    return found


def _repository(destination: str) -> str:
    name = destination.removeprefix(HUB)
    if not _HUB_ID.fullmatch(name):
        raise DestinationError(f"{destination!r} is not an address on the hub; write {HUB}owner/name.")
    return name

"""Model folders: read and check them, load a model from one, save a model as one.

Folders may come from untrusted sources. Nothing is unpickled, sizes are checked before anything is allocated,
and the error for a missing, surplus or contradictory entry names it.
"""

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from torch import nn
from torch._dynamo import lookup_backend
from transformers import AutoConfig, CompileConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import tensornet as tn
from tensornet._util import unwrapped
from tensornet.errors import DestinationError, FormatError, TargetError, TensorNetError
from tensornet.io import Slice, new_folder, read_headers
from tensornet.nn import prepare_for_inference
from tensornet.nn.targets import adapter_names
from tensornet_hf.quantizer import (
    METHOD,
    TensorNetworkConfig,
    check_layers,
    layer_descriptions,
    names_a_core,
    prepare_for_saving,
    without_guards,
)
from tensornet_hf.text import first_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Other formats of weights, which are not copied: a compressed model must not contain dense weights.
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot",
    ".npz", ".onnx_data", ".tflite", ".mlmodel",
)  # fmt: skip
#: Largest size of a configuration or index in bytes, far above all real ones.
MAX_JSON = 256_000_000
#: Prefix of addresses on the hub.
HUB = "hf://"
#: Files of a model to download from the hub; none of them has to be unpickled.
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")
#: Options of `from_pretrained` that select files on the hub.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
#: Files copied from the source of a model: tokenizer, templates, license; not weights, pickles and code.
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe")
LEGAL_FILES = ("LICENSE", "NOTICE", "COPYING", "USE_POLICY")
#: Files that are not copied: `save_pretrained` writes them, or they describe the old weights.
NOT_COPIED = {"config.json", "generation_config.json", "quantize_config.json"}
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

# Layers of this model are made of cores

`import tensornet_hf` first: without it, transformers does not know the quantization type `tensornet`, and
refuses the folder because of the empty tensors in place of dense weights.

```python
# pip install 'tensornet-torch[hf]'
import tensornet_hf

model = tensornet_hf.load("path/of/this/folder")
```

`AutoModel...from_pretrained` works as well, after the import. The class is `{architecture}`. Which layers are
made of cores, and of which, is said in `config.json` under `quantization_config`.

`tensornet decompress` makes an ordinary model of it again.
"""


# --- reading --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """Validated model folder: its configuration, description and tensor headers.

    Args:
        folder: the folder.
        config: content of `config.json`.
        compression: description of the compressed modules, None for an ordinary model.
        tensors: every stored tensor by name, without guards.
    """

    folder: Path
    config: dict[str, Any]
    compression: TensorNetworkConfig | None
    tensors: dict[str, Slice]


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read and check a model folder from the headers of its files.

    Raises:
        FormatError: something is missing, surplus, damaged or contradictory; the message names it.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        why = (
            "has no config.json" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        )
        raise FormatError(
            f"{folder} is not a model folder: it {why}. Give a folder of save_pretrained, or a hub id."
        )
    config = read_json(folder / "config.json")
    compression = read_compression(config)
    files, index = weight_files(folder)
    tensors = read_headers(files)
    for name, file in index.items():
        if name not in tensors or tensors[name].file.name != file:
            raise FormatError(
                f"{folder / INDEX} says that {file} holds {name!r}, and it does not: the index belongs to "
                "other files, or a file is incomplete. Copy or download the folder again."
            )
    if compression is not None:
        tensors = without_guards(tensors)
        check_layers(compression, tensors, where=str(folder))
    elif cores := [name for name in tensors if names_a_core(name)]:
        raise FormatError(
            f"{folder} stores cores ({cores[0]} and {len(cores) - 1} more), but its config.json has no "
            "quantization_config that describes them. Restore the config.json that was saved with the model, "
            "or save the model again, after import tensornet_hf."
        )
    return Checkpoint(folder, config, compression, tensors)


def read_dense(folder: str | Path) -> Checkpoint:
    """Read and check the folder of a model that is to be compressed.

    Raises:
        FormatError: as `read_checkpoint`.
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
        FormatError: absent, unreadable, too large, not JSON, nested without end, or not an object.
    """
    try:
        if (size := path.stat().st_size) <= MAX_JSON:
            content = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise FormatError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # also bad UTF-8, bad JSON, numbers of thousands of digits
        raise FormatError(f"{path} is not valid JSON ({error!s:.200}). Copy or download it again.") from error
    if size > MAX_JSON:
        raise FormatError(f"{path} has {size:,} bytes; at most {MAX_JSON:,} are read of a JSON file.")
    if not isinstance(content, dict):
        raise FormatError(f"{path} must contain a JSON object, it contains a {type(content).__name__}.")
    return content


def read_compression(config: Mapping[str, Any]) -> TensorNetworkConfig | None:
    """Return the description of the compressed modules in a configuration, None for an ordinary model.

    Raises:
        FormatError: it is damaged, of an unknown version, or of another quantization method.
    """
    entry = config.get("quantization_config")
    if entry is None:
        return None
    method = entry.get("quant_method") if isinstance(entry, dict) else entry
    if not isinstance(entry, dict) or method != METHOD:
        raise FormatError(
            f"The model is quantized by {method!r}, not by {METHOD!r}. Use the original model, with weights "
            "in floating point."
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
        The files, and the index `{tensor: file name}`, empty for a single file.

    Raises:
        FormatError: there are no such files, a file of the index is missing or outside the folder, or weights
            are pickled.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS], {}
    if not (folder / INDEX).is_file():
        other = sorted(x.name for x in folder.iterdir() if x.suffix in WEIGHT_SUFFIXES)
        if not other:
            raise FormatError(f"{folder} holds no weights: there is no {WEIGHTS} and no {INDEX}.")
        raise FormatError(
            f"{folder} has no {WEIGHTS} and no {INDEX}, only {', '.join(other)}. Pickles can run code and "
            "are never opened: convert them where you trust them, with model.save_pretrained(folder)."
        )
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(x, str) for x in index.values()):
        raise FormatError(f"{folder / INDEX} has no weight_map from tensors to files.")
    names = sorted(set(index.values()))
    for name in names:
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise FormatError(
                f"{folder / INDEX} names {name!r:.200}: only safetensors files next to the index are read, "
                "nothing outside the folder."
            )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FormatError(
            f"{folder} lacks {', '.join(missing)}, which {INDEX} names. Copy or download it again."
        )
    return [folder / name for name in names], index


def weight_bytes(folder: str | Path) -> int:
    """Sum the sizes of the safetensors files of a folder (of its other weight files if it has none)."""
    files = [file for file in Path(folder).iterdir() if file.suffix in WEIGHT_SUFFIXES]
    safe = [file for file in files if file.suffix == ".safetensors"]
    return sum(file.stat().st_size for file in safe or files)


# --- loading --------------------------------------------------------------------------------------------


def load(
    path: str | Path, *, inference: bool | Literal["compiled"] = False, **kwargs: Any
) -> PreTrainedModel:
    """Load a model, compressed or not, in the class that it was saved with.

    Unlike `from_pretrained`, which only warns of missing or surplus tensors, this function raises errors.
    Compressed layers are never allocated dense. Pickled weights are refused.

    Args:
        path: a folder written by `save_pretrained`, or a hub id.
        inference: prepare integer layers for generating on the CPU, see `tensornet.nn.prepare_for_inference`;
            the model can then be neither trained nor saved. With `"compiled"`, `generate` also compiles the
            step of one token in its first call, which takes a minute or more, and keeps keys and values in a
            static cache. Set `model.generation_config.max_cache_len` to the largest length, since another one
            is compiled again, and do not change the model.
        kwargs: passed to `from_pretrained`. The dtype is the stored one unless given; for inference it is
            bfloat16, the only one that the CPU's kernels support. `revision`, `token`, `cache_dir`,
            `local_files_only` and `force_download` select files on the hub.

    Raises:
        FormatError: the folder is not a model, or something in it is missing, surplus, damaged or wrong.
        NonFiniteError: a stored core contains NaN or infinity.
        TargetError: `inference="compiled"` for a model that does not generate.
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
        # Model classes may raise any exception for invalid configurations. If the caller gave options, these
        # may be the cause, so only a configuration that cannot be read is reported as an error of the folder.
        if kwargs and not isinstance(error, StrictDataclassError):
            raise
        raise FormatError(
            f"{folder} does not describe a {kind.__name__} that can be loaded: {type(error).__name__}: "
            f"{error!s:.300} Copy or download it again."
        ) from error
    model, info = loaded
    missing, surplus = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise FormatError(f"{folder} lacks weights: {', '.join(missing[:5])}.")
    if surplus:
        message = f"{folder} stores {len(surplus)} weights that the model does not have: "
        message += f"{', '.join(surplus[:5])}."
        if checkpoint.compression is not None:
            raise FormatError(message)
        # Surplus tensors are usual for models from the hub: heads of the pre-training, masks of older
        # versions.
        warnings.warn(message, stacklevel=2)
    if inference:
        prepare_for_inference(model)
    if inference == "compiled":
        compile_generation(model)
    return model


def compile_generation(model: PreTrainedModel) -> None:
    """Let `generate` compile the step of one token; prompts are read as before, in eager mode.

    Raises:
        TargetError: the model does not generate.
    """
    if not model.can_generate():
        raise TargetError(
            f'inference="compiled" compiles generation, and {type(model).__name__} does not generate. Load '
            "it with inference=True."
        )

    # Equal backends share compiled code. Each model needs its own function, since the checks that would tell
    # models apart are left out below.
    def inductor(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        return lookup_backend("inductor")(graph, inputs)

    # A prepared model does not change. Checking thousands of its attributes would take a fifth of a step.
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    mode: Any = None  # the default of the class cannot be combined with options
    config: Any = CompileConfig(dynamic=False, backend=inductor, mode=mode, options=options)
    # Private, but without it transformers compiles on accelerators only and generates in eager mode here.
    config._compile_all_devices = True
    model.generation_config.update(cache_implementation="static", compile_config=config)


def on_device(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """Move a model to a device in place and return it; dtypes do not change."""
    moving: Any = model  # transformers wraps `to` in a way that type checkers misread
    return moving.to(device=torch.device(device))


def resolve_folder(path: str | Path, **hub: Any) -> Path:
    """Return a local folder for a path or hub id; files on the hub are downloaded or taken from the cache.

    Args:
        path: a folder, or a hub id if there is no such folder.
        hub: `revision`, `token` and the like, passed to `huggingface_hub.snapshot_download`.

    Raises:
        FormatError: neither a folder nor a model on the hub or in its cache.
    """
    if Path(path).exists() or not isinstance(path, str) or path.startswith((".", "/", "~")):
        return Path(path)
    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=list(HUB_FILES), **hub))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FormatError(
            f"{path} is not a folder here, and as a hub id it could not be had: {first_line(error)}"
        ) from error


def model_class(checkpoint: Checkpoint, **kwargs: Any) -> type[PreTrainedModel]:
    """Import the model class that the configuration names in `architectures`.

    Args:
        checkpoint: the checkpoint that was read.
        kwargs: `trust_remote_code=True` allows classes defined in the folder.

    Raises:
        FormatError: no class is named, or transformers has no such class.
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
        f"transformers {transformers.__version__} does not have. Update transformers, or load the folder "
        "with the AutoModel class that fits (after import tensornet_hf); a class that the folder brings "
        "itself needs trust_remote_code=True."
    )


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the dense model of a folder on the meta device. Code in the folder is never run.

    Raises:
        FormatError: transformers does not have the class, or the configuration is impossible.
    """
    kind = model_class(checkpoint)
    try:
        config: Any = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        vars(config).pop("quantization_config", None)
        config.name_or_path = ""
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # model classes may raise anything
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
    """Save a model, compressed or not, as a complete folder: weights, configuration, tokenizer, model card.

    `model.save_pretrained(folder)` writes the same weights and configuration, but no tokenizer and no model
    card. If it fails, it leaves an incomplete folder. It also writes no description of layers that were
    replaced by hand, or in a part of the model alone; save such a model with this function.

    Args:
        model: a transformers model; may be wrapped by `DataParallel`, `DistributedDataParallel`,
            `torch.compile`.
        destination: the new folder, or `hf://owner/name` for a repository on the hub.
        source: the folder that the model came from; its tokenizer and other small files are copied.
        force: replace an existing model folder; in a repository, replace the weights and all files that the
            new model has too.

    Returns:
        The destination.

    Raises:
        DestinationError: it exists already, is the source, or cannot be written (full disk). An existing
            folder is unchanged, and no new files are left; on the hub, an empty repository may be left.
        TargetError: PEFT adapters are attached.
        TypeError: not a transformers model.

    Example:
        >>> model = th.load(th.embedded.gpt2_path())
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, objective="weight")
        >>> _ = tn.compress(model, config, progress=False)
        >>> folder = th.save(model, "small", source=th.embedded.gpt2_path())
        >>> sorted(path.name for path in folder.iterdir())[:2]
        ['README.md', 'config.json']
    """
    whole: Any = unwrapped(model) if isinstance(model, nn.Module) else model
    if not isinstance(whole, nn.Module) or not callable(getattr(whole, "save_pretrained", None)):
        raise TypeError(
            f"save takes a model of transformers, got {type(whole).__name__}, which has no method "
            "save_pretrained; tensornet.save_model writes models of plain PyTorch to a file."
        )
    # PEFT sets `peft_config` on adapted models, also for prompts, which have no adapter layers.
    if adapter_names(whole) or getattr(whole, "peft_config", None):
        raise TargetError(
            f"Adapters are attached to this {type(whole).__name__}, and a folder has either the model or the "
            "adapters. Save them apart: model.save_pretrained(adapters) in PEFT, then "
            "tensornet_hf.save(model.unload(), folder), and put them together by "
            "tensornet_hf.peft.load_adapters(load(folder), adapters); or save what "
            "tensornet_hf.peft.merge_adapters(model) returns."
        )
    sources = () if source is None else (Path(source),)
    check_free(destination, force=force, sources=sources)
    if str(destination).startswith(HUB):
        name = _repository(str(destination))
        # Old weight files would be loaded together with the new ones.
        replaced = [*(f"*{suffix}" for suffix in WEIGHT_SUFFIXES), "*.index.json"] if force else None
        with tempfile.TemporaryDirectory(prefix="tensornet-") as parent:
            folder = save(whole, Path(parent) / "model", source=source)
            try:
                name = huggingface_hub.create_repo(name, exist_ok=force).repo_id  # includes the owner
                huggingface_hub.upload_folder(repo_id=name, folder_path=folder, delete_patterns=replaced)
            except Exception as error:  # huggingface_hub raises many unrelated classes
                raise DestinationError(
                    f"Cannot upload to {destination}: {first_line(error)}. If the repository is new and "
                    "empty now, repeat with force=True (--force)."
                ) from error
        return str(destination)
    prepare_for_saving(whole)
    with write_folder(destination, force=force, sources=sources) as folder:
        whole.save_pretrained(folder)  # type: ignore[operator]  # a method, as was checked
        for origin in sources:
            copy_small_files(origin, folder)
        if layer_descriptions(whole):
            write_card(folder, type(whole).__name__)
    return Path(destination)


def decompress(model: nn.Module) -> nn.Module:
    """Replace compressed layers by stock layers, so that the saved model does not need this library.

    This does the same as `tensornet.decompress`, but raises if a module remains that needs this library.

    Returns:
        The same model.

    Raises:
        TargetError: the model has modules that cannot be made dense, such as experts.

    Example:
        >>> model = th.load(th.embedded.gpt2_path())
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, objective="weight")
        >>> _ = tn.compress(model, config, progress=False)
        >>> type(th.decompress(model).transformer.h[0].mlp.c_fc).__name__
        'Conv1D'
    """
    layers = layer_descriptions(model)
    if stays := [name for name, spec in layers.items() if spec["type"] not in ("linear", "embedding")]:
        kinds = sorted({str(layers[name]["type"]) for name in stays})
        raise TargetError(
            f"{len(stays)} modules of type {', '.join(kinds)} have no stock layer to go back to: "
            f"{', '.join(stays[:5])}. Nothing was changed."
        )
    return tn.decompress(model)


def write_card(folder: str | os.PathLike[str], architecture: str) -> None:
    """Write a model card into the folder of a compressed model, unless the folder has one."""
    if not (card := Path(folder) / CARD).exists():
        card.write_text(_CARD_TEXT.format(architecture=architecture), encoding="utf-8")


@contextmanager
def write_folder(
    destination: str | os.PathLike[str], *, force: bool = False, sources: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """Yield a new folder that becomes `destination` when the block ends without an error.

    After an error (such as a full disk) the new folder is removed, and `destination` is unchanged.

    Args: as `check_free`.

    Raises:
        DestinationError: the destination exists already, or cannot be written.
    """
    target = Path(destination).expanduser().absolute()
    check_free(target, force=force, sources=sources)
    try:
        with new_folder(target) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        # Errors of reading are not converted; safetensors does not name the file if the disk is full.
        names = [x for x in (getattr(error, "filename", None), getattr(error, "filename2", None)) if x]
        about = not names or any(str(name).startswith(str(target.parent)) for name in names)
        if isinstance(error, DestinationError) or not about:
            raise
        raise DestinationError(
            f"Writing {target} failed: {error}. Nothing was left there; free some space or choose another "
            "place."
        ) from error


def check_free(
    destination: str | os.PathLike[str], *, force: bool = False, sources: tuple[Path, ...] = ()
) -> None:
    """Check that a destination may be written, before any work is done.

    Args:
        destination: the new folder, or `hf://owner/name`.
        force: replace an existing model folder; not needed for an empty folder.
        sources: folders that are read, which must not be replaced.

    Raises:
        DestinationError: it exists and `force` is not set, it is a source, or it is not an address.
    """
    if str(destination).startswith(HUB):
        name = _repository(str(destination))
        try:
            taken = huggingface_hub.repo_exists(name)
        except Exception as error:  # huggingface_hub raises many unrelated classes
            raise DestinationError(f"Cannot ask the hub about {destination}: {first_line(error)}") from error
        if taken and not force:
            raise DestinationError(
                f"{destination} exists already. Choose another name, or replace it with force=True (--force)."
            )
        return
    target = Path(destination).expanduser().absolute()
    if target.suffix == ".gguf":
        raise DestinationError(
            f"{target} would be a folder. GGUF files are written by `tensornet compress` and `export`."
        )
    real = target.resolve()
    for source in sources:
        if source.exists() and (real == source.resolve() or real in source.resolve().parents):
            raise DestinationError(f"{target} is or holds the source {source}; choose another destination.")
    if not target.exists():
        return
    if not target.is_dir():
        raise DestinationError(f"{target} is a file; a folder is to be written there. Choose another name.")
    if not any(target.iterdir()):
        return
    if not force:
        raise DestinationError(
            f"{target} exists already. Choose another name, or replace it with force=True (--force)."
        )
    if not (target / "config.json").is_file():
        raise DestinationError(
            f"{target} is not a model folder (it has no config.json) and is not replaced, even with force. "
            "Remove it yourself, or choose another name."
        )


def copy_small_files(source: Path, destination: Path) -> list[str]:
    """Copy tokenizer, templates, license and sentence-transformers modules, without overwriting files.

    Returns:
        Names of the copied files, including the folders of modules.

    Raises:
        FormatError: the list of modules is damaged, or names a path outside the folder.
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
            raise FormatError(f"{source / MODULES} does not list modules: {error!s:.200}") from error
        for path in paths:
            if not (source / path).resolve().is_relative_to(source.resolve()):
                raise FormatError(f"{source / MODULES} names {path!r}, which lies outside the folder.")
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


def _repository(destination: str) -> str:
    name = destination.removeprefix(HUB)
    if not _HUB_ID.fullmatch(name):
        raise DestinationError(f"{destination!r} is not an address on the hub; write {HUB}owner/name.")
    return name

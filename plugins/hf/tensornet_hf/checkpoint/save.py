"""Save models as complete folders, and convert compressed models back to dense ones."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

import tensornet as tn
from tensornet._util import unwrapped
from tensornet.errors import FormatError, TargetError
from tensornet.nn.targets import adapter_names
from tensornet_hf.checkpoint.describe import layer_descriptions
from tensornet_hf.checkpoint.folders import write_folder
from tensornet_hf.checkpoint.links import inside
from tensornet_hf.checkpoint.quantizer import prepare_for_saving

#: Copied from the source: tokenizer, templates, licence. Weights, pickles and code are not.
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe")
LEGAL_FILES = ("LICENSE", "NOTICE", "COPYING", "USE_POLICY")
#: Where sentence-transformers lists its modules and their folders.
MODULES = "modules.json"
#: Written anew by `save_pretrained`, or about weights that are not copied.
NOT_COPIED = {"config.json", "generation_config.json", "quantize_config.json"}


def save_model(
    model: nn.Module,
    destination: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Save a model, compressed or not, as a complete folder: weights, configuration, tokenizer, model card.

    Args:
        model: of transformers; may be wrapped by `DataParallel`, `DistributedDataParallel`, `torch.compile`.
        destination: the new folder.
        source: the folder that the model came from; its tokenizer and other small files are copied.
        force: replace a model folder that is at the destination.

    Returns:
        The destination.

    Raises:
        DestinationError: it exists already, is the source, or cannot be written (full disk); nothing is left.
        TargetError: adapters of PEFT are attached.
        TypeError: no model that can save itself as a folder.

    Example:
        >>> model = th.load(th.embedded.gpt2_path())
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, objective="weight")
        >>> _ = tn.compress(model, config, progress=False)
        >>> folder = th.save_model(model, "small", source=th.embedded.gpt2_path())
        >>> sorted(path.name for path in folder.iterdir())[:2]
        ['README.md', 'config.json']
    """
    sources = (Path(source),) if source is not None else ()
    whole = _whole_model(model)
    prepare_for_saving(whole)
    with write_folder(destination, force=force, sources=sources) as folder:
        whole.save_pretrained(folder)
        for origin in sources:
            copy_small_files(origin, folder)
    return Path(destination)


def _whole_model(model: Any) -> Any:
    """Unwrap a model, and check that its `save_pretrained` writes all of it."""
    whole = unwrapped(model) if isinstance(model, nn.Module) else model
    if not isinstance(whole, nn.Module) or not callable(getattr(whole, "save_pretrained", None)):
        raise TypeError(
            f"save_model takes a model of transformers, got {type(whole).__name__}, which has no method "
            "save_pretrained; tensornet.save_model writes models of plain PyTorch to a file."
        )
    # PEFT sets `peft_config` on what it adapts; prompts are adapters without layers.
    if adapter_names(whole) or getattr(whole, "peft_config", None):
        raise TargetError(
            f"Adapters are attached to this {type(whole).__name__}, and a folder holds the model or the "
            "adapters. Save them apart: model.save_pretrained(adapters) in PEFT, then "
            "save_model(model.unload(), folder), and put them together by "
            "tensornet_hf.peft.load_adapters(load(folder), adapters); or save what "
            "tensornet_hf.peft.merge_adapters(model) returns."
        )
    return whole


def copy_small_files(source: Path, destination: Path) -> list[str]:
    """Copy tokenizer, templates, license and sentence-transformers modules, without overwriting files.

    Returns:
        Names of the copied files, those of modules with their folders.

    Raises:
        FormatError: a link that leads out of the folder, or a module that does not lie in it.
    """
    copied = []
    for file in sorted(source.iterdir()):
        wanted = file.suffix in SMALL_FILES or file.stem.upper() in LEGAL_FILES
        if not wanted or file.name in NOT_COPIED or file.name.endswith(".index.json") or not file.is_file():
            continue
        copied.append(file.name)
    copied += _module_files(source)
    copied = [name for name in copied if not (destination / name).exists()]
    for name in copied:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inside(source, name), destination / name)  # follows the links of the hub's cache
    return copied


def _module_files(source: Path) -> list[str]:
    """List the files in the folders that `modules.json` of sentence-transformers names, without pickles."""
    if not (source / MODULES).is_file():
        return []
    try:
        modules = json.loads(inside(source, MODULES).read_bytes())
        paths = [str(module["path"]) for module in modules if module["path"]]
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{source / MODULES} does not list modules: {error!s:.200}") from error
    found = []
    for path in paths:
        files = sorted(inside(source, path).rglob("*")) if (source / path).is_dir() else []
        suffixes = (*SMALL_FILES, ".safetensors")
        found += [x.relative_to(source).as_posix() for x in files if x.suffix in suffixes and x.is_file()]
    return found


def decompress(model: nn.Module) -> nn.Module:
    """Replace compressed layers by stock ones, so that transformers alone can load the saved folder.

    Same as `tensornet.decompress`, but refuses to leave anything behind that needs this library.

    Returns:
        The same model.

    Raises:
        TargetError: the model holds modules that have no dense form, such as experts.

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

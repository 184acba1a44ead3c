"""Folders of other quantizers: load them through transformers, and name the package that is missing."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import logging

from tensornet.errors import FormatError, MissingDependencyError
from tensornet_hf.checkpoint import WEIGHT_SUFFIXES, Checkpoint, load, model_class, read_json
from tensornet_hf.description import METHOD

#: Method in `quantization_config` -> module that transformers imports for it, and its name for pip.
_PACKAGES: Mapping[str, tuple[str, str]] = {
    "torchao": ("torchao", "torchao"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
    "hqq": ("hqq", "hqq"),
    "auto-round": ("auto_round", "auto-round"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "eetq": ("eetq", "eetq"),
    "higgs": ("flute", "flute-kernel"),
    "aqlm": ("aqlm", "aqlm"),
    "vptq": ("vptq", "vptq"),
    "quark": ("quark", "amd-quark"),
}
DENSE = "dense"


def quantization_method(folder: Path) -> str:
    """Return the method that a folder names in its configuration, `"dense"` without one.

    Raises:
        FormatError: the folder is not a model.

    Example:
        >>> from tensornet_hf.embedded import gpt2_path
        >>> from tensornet_hf.evaluation.quantizers import quantization_method
        >>> quantization_method(gpt2_path())
        'dense'
    """
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder} is not a model folder: it holds no config.json.")
    entry = read_json(folder / "config.json").get("quantization_config")
    if entry is None:
        return DENSE
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    return str(method or "unknown")


def load_any(folder: Path) -> PreTrainedModel:
    """Load a dense or compressed model, or one that another quantizer wrote.

    Raises:
        FormatError: the folder is not a model, or cannot be loaded.
        MissingDependencyError: the package of its quantizer is not installed; names the pip command.
    """
    method = quantization_method(folder)
    if method in (DENSE, METHOD):
        return load(folder)
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # transformers would load it, and leave weights random
        known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
        raise FormatError(f"{folder} is quantized by {method!r}, which transformers does not know: {known}.")
    module, package = _PACKAGES.get(method, (None, None))
    if module is not None and not _installed(module):
        raise MissingDependencyError(
            f"{folder} is quantized by {method!r}, whose package {package} is not installed here: run  "
            f"pip install {package}"
        )
    kind = model_class(Checkpoint(folder, read_json(folder / "config.json"), None, {}))
    verbosity = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        options: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "output_loading_info": True}
        loaded: Any = kind.from_pretrained(folder, **options)
    except Exception as error:  # of the packages of others, in all their ways
        reason = str(error).strip().partition("\n")[0]
        raise FormatError(
            f"transformers cannot load {folder}, which is quantized by {method!r}: {type(error).__name__}: "
            f"{reason:.300}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise FormatError(f"{folder} lacks weights that a {method!r} model has: {', '.join(missing[:5])}.")
    return model


def bytes_on_disk(folder: Path) -> int:
    """Return the size of all weight files of a folder, whatever their format.

    Example:
        >>> from tensornet_hf.embedded import gpt2_path
        >>> from tensornet_hf.evaluation.quantizers import bytes_on_disk
        >>> bytes_on_disk(gpt2_path()) > 4 * 940_800
        True
    """
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)


def count_weights(folder: Path) -> int:
    """Count the weights of the dense model that a folder describes, tied ones once; nothing is loaded.

    Example:
        >>> from tensornet_hf.embedded import gpt2_path
        >>> from tensornet_hf.evaluation.quantizers import count_weights
        >>> count_weights(gpt2_path())
        940800
    """
    config: Any = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = model_class(Checkpoint(folder, read_json(folder / "config.json"), None, {}))
    with torch.device("meta"):
        model = kind(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False

"""Compare models in folders and GGUF files by size, time per token, loss and sample text."""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import logging

from tensornet._util import in_eval_mode
from tensornet.compression.loss_increase import RecordedLosses, measure
from tensornet.compression.report import model_size
from tensornet.errors import FormatError, MissingDependencyError, TargetError
from tensornet_hf.checkpoint import (
    Checkpoint,
    empty_model,
    load,
    model_class,
    on_device,
    read_json,
    resolve_folder,
    weight_bytes,
)
from tensornet_hf.evaluate import ModelFacts, record_held_out
from tensornet_hf.quantizer import METHOD
from tensornet_hf.report import display_name
from tensornet_hf.text import continue_text, first_line, load_tokenizer

DENSE = "dense"
GGUF = ".gguf"
#: Number of tokens that are generated to measure time, and number of repetitions.
_TIMED_TOKENS, _REPEATS = 16, 3
_PROMPT_WORDS = 12


def compare_folders(
    paths: Sequence[str | Path],
    *,
    text: str | None = None,
    name: str = "the text",
    prompt: str | None = None,
    new_tokens: int = 40,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> list[ModelFacts]:
    """Measure size, speed, loss and sample text of several language models, loading one at a time.

    The text is tokenized by the tokenizer of the first model, and loss increases are relative to this model.
    Bits per weight are file size over number of weights, for the whole model. For models of other
    quantizers, `params` is the number of weights.

    Args:
        paths: at least one folder, hub id or GGUF file; models may be dense, compressed by this library, or
            quantized by another one. GGUF files are dequantized to float32 and run by transformers, so the
            measured time is not that of llama.cpp.
        text: text on which the loss is measured; None measures no loss.
        name: name of the text, for reports.
        prompt: prompt to continue greedily; by default the beginning of the text.
        new_tokens: length of the continuation in tokens.
        device: device on which the models run.
        progress: show a progress bar.

    Returns:
        The measured facts of each model, in the order of `paths`.

    Raises:
        FormatError: a path is not a model, or the model cannot be loaded.
        MissingDependencyError: the package of another quantizer is not installed.
        TargetError: a model cannot generate text.
    """
    folders = [resolve_folder(path) for path in paths]
    methods = [quantization_method(folder) for folder in folders]  # raises before models are loaded
    prompt = prompt_of(text) if prompt is None else prompt
    dense: RecordedLosses | None = None
    found: list[ModelFacts] = []
    work = zip(_names(paths), folders, methods, strict=True)
    bar = tqdm(work, desc="comparing", unit="model", total=len(folders), disable=not progress)
    for label, folder, method in bar:
        model = on_device(load_any(folder), device)
        if not model.can_generate():
            raise TargetError(
                f"{type(model).__name__} cannot generate text, and only language models are compared. "
                "Measure other models in Python, as examples/sentence_encoder.py and "
                "examples/image_accuracy.py do."
            )
        if text is not None and dense is None:
            dense = record_held_out(model, folder, text, name=name)
        if method == "gguf":
            weights, size = model_size(model)[0], folder.stat().st_size
        else:
            weights, size = count_weights(folder), weight_bytes(folder)
        sample = None
        if prompt is not None:
            sample = continue_text(model, load_tokenizer(folder), prompt, max_new_tokens=new_tokens)
        facts = ModelFacts(
            label,
            model_size(model)[0] if method in (DENSE, METHOD) else weights,
            size,
            8 * size / weights,
            method,
            quality=None if dense is None else measure(model, dense),
            sample=sample,
            milliseconds=_milliseconds(model),
        )
        found.append(facts)
    return found


def prompt_of(text: str | None) -> str | None:
    """Return the first words of a text as a prompt; None if there is no text."""
    return None if text is None else " ".join(text.split()[:_PROMPT_WORDS])


def quantization_method(folder: Path) -> str:
    """Return the quantization method of a model: `"gguf"` for a GGUF file, `"dense"` without quantization.

    Raises:
        FormatError: the path is neither a model folder nor a GGUF file.
    """
    if folder.suffix == GGUF and folder.is_file():
        return "gguf"
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder} is not a model folder: it has no config.json.")
    entry = read_json(folder / "config.json").get("quantization_config")
    if entry is None:
        return DENSE
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    return str(method or "unknown")


def load_any(folder: Path) -> PreTrainedModel:
    """Load a dense, compressed or quantized model from a folder, or dequantize a GGUF file.

    Raises:
        FormatError: the path is not a model, or the model cannot be loaded.
        MissingDependencyError: the package of its quantizer is not installed.
    """
    method = quantization_method(folder)
    if method in (DENSE, METHOD):
        return load(folder)
    if method not in ("gguf", *AUTO_QUANTIZATION_CONFIG_MAPPING):  # transformers would load random weights
        known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
        raise FormatError(
            f"{folder} is quantized by {method!r}, which transformers does not know. It knows {known}."
        )
    verbosity = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        loaded: Any
        if method == "gguf":
            config = AutoConfig.from_pretrained(folder.parent, gguf_file=folder.name)
            if config.model_type == "gpt2":  # transformers sets `n_ctx` only
                config.n_positions = config.n_ctx
            loaded = AutoModelForCausalLM.from_pretrained(
                folder.parent,
                gguf_file=folder.name,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
            )
        else:
            kind: Any = model_class(Checkpoint(folder, read_json(folder / "config.json"), None, {}))
            loaded = kind.from_pretrained(
                folder, dtype="auto", use_safetensors=True, output_loading_info=True
            )
    except FormatError:
        raise
    except ImportError as error:
        raise MissingDependencyError(
            f"{folder} is quantized by {method!r}, whose package is not installed: {first_line(error)}"
        ) from error
    except Exception as error:  # packages of quantizers may raise anything
        raise FormatError(
            f"transformers cannot load {folder}, which is quantized by {method!r}; a file may be damaged or "
            f"of another version. {type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise FormatError(f"{folder} lacks weights that a {method!r} model has: {', '.join(missing[:5])}.")
    return model


def count_weights(folder: Path) -> int:
    """Count the weights of a folder's dense model from its configuration; tied weights count once."""
    model = empty_model(Checkpoint(folder, read_json(folder / "config.json"), None, {}))
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def _names(paths: Sequence[str | Path]) -> list[str]:
    """Return a short name for each path, which includes the parent folder if two names are equal."""
    names = [display_name(path) for path in paths]
    twice = {name for name in names if names.count(name) > 1}
    return [
        f"{Path(path).resolve().parent.name}/{name}" if name in twice else name
        for path, name in zip(paths, names, strict=True)
    ]


@torch.no_grad()
def _milliseconds(model: PreTrainedModel) -> float:
    """Measure the milliseconds to generate a token: mean over a sequence, then median over repetitions."""
    generate: Any = model.generate
    ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
    count = _TIMED_TOKENS
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    taken = []
    with in_eval_mode(model):
        for _ in range(_REPEATS + 1):  # the first run is a warm-up
            started = time.perf_counter()
            generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            taken.append(time.perf_counter() - started)
    return 1000 * median(taken[1:]) / count

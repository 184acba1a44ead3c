"""Code shared by the targets compressed-tensors and MLX, which pack integer matrices into 32-bit words.

Both targets are folders of safetensors files. They differ in the tensors that store a matrix, and in the
entries of config.json.
"""

import copy
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tensornet.compression.apply import decompress, with_cores
from tensornet.compression.loss_increase import light_copy
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.errors import TargetError
from tensornet.io import contents
from tensornet.nn.embedding import MPOEmbedding
from tensornet.nn.extension import structure_changed
from tensornet.nn.linear import TensorNetworkLinear, linear_from_stored
from tensornet.nn.module import NetworkModule
from tensornet.nn.storage import PackedCore, Storage, stored_core
from tensornet.nn.targets import list_weights
from tensornet.nn.unfuse import Compound, StackedMatrices, unfused
from tensornet.quantization import NumberFormat
from tensornet.quantization.packing import pack, unpack
from tensornet.quantization.rounding import RoundedWeight
from tensornet.topologies import dense as dense_topology
from tensornet_hf.checkpoint import Checkpoint, copy_small_files, weight_bytes, write_folder
from tensornet_hf.exporters.base import (
    ExportReport,
    IntegerMatrix,
    LowRank,
    Networks,
    split_layers,
    split_weight,
    tied_layers,
)
from tensornet_hf.folder_writer import NAMES, Contents, entry, planned_model
from tensornet_hf.lazy_model import LazyModel

#: Subfolder of a model folder for the LoRA adapter.
ADAPTER = "lora"
#: Bytes that a tensor takes in the header of a safetensors file, without its name.
ENTRY = 68
#: Number format of a packed layer, and a dictionary from names (`weight_scale`, ...) to its packed tensors.
Packed = tuple[NumberFormat, dict[str, Tensor]]


class PackedModel(NamedTuple):
    """A model in the form in which it is written to a folder.

    Args:
        stock: copy of the model with dense layers, for `save_pretrained`.
        state: tensors to write, by name.
        packed: number format of every packed layer, by name.
        dense: reasons why the other compressed layers are written dense, by layer name.
        low_ranks: low-rank matrices that are added to packed layers, by name.
    """

    stock: PreTrainedModel
    state: dict[str, Tensor]
    packed: dict[str, str]
    dense: dict[str, str]
    low_ranks: dict[str, LowRank]


def packed_model(
    model: PreTrainedModel,
    pack_matrix: Callable[[IntegerMatrix, torch.dtype], Packed | str],
    *,
    networks: Networks,
    kinds: Collection[str],
    packs_tied: bool,
) -> PackedModel:
    """Pack the integer matrices of a model, and make all other layers dense.

    Args:
        model: a compressed model; it is not changed.
        pack_matrix: function of a matrix and the dtype of its layer; it returns the packed tensors, or the
            reason why the matrix cannot be packed.
        networks: how to write layers that are not a single matrix of integers (see `split_layers`).
        kinds: layer types that can be packed (see `tensornet.nn.layer_kinds`). With "part", a stack of
            matrices is packed as the linear layers of `stack_rows`.
        packs_tied: True if the runtime can tie a head to a packed embedding; if not, both are written dense.

    Raises:
        TargetError: no layer can be packed, or `networks="refuse"` forbids a layer.
    """
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, NetworkModule)
    }
    if not layers:
        raise TargetError(
            "This model has no compressed layers, so there is nothing to pack. Compress it first: "
            "`tensornet compress SOURCE FOLDER --export TARGET --bits 4.5 --calibration text.txt`, or in "
            'Python tensornet.compress(model, CompressionConfig(bits_per_weight=4.25, formats=("int4",))).'
        )
    integers, low_ranks, dense = split_layers(model, networks)
    tied = tied_layers(model)
    tensors: dict[str, dict[str, Tensor]] = {}
    packed: dict[str, str] = {}
    stacks = list_stacks(model) if "part" in kinds else {}
    stacked = {name for names, _, _ in stacks.values() for name in names if name in integers}
    inside: dict[str, str] = {}  # maps matrices of packed stacks to the names of their stacks
    for stack, (names, compound, place) in stacks.items():
        if stacked.isdisjoint(names):
            continue
        rows = stack_rows(model, stack, compound, place)
        matrices = [integers.get(name) for name in names]
        parts = _pack_stack(stack, rows, matrices, lambda x: pack_matrix(x, model.dtype))
        if isinstance(parts, str):
            dense |= {name: parts for name in names if name in stacked}
        else:
            packed |= {name: x[0].name for name, x in parts.items()}
            tensors |= {name: x[1] for name, x in parts.items()}
            inside |= dict.fromkeys(names, stack)
    for name, matrix in integers.items():
        layer = layers[name]
        found: Packed | str
        if name in stacked:
            continue
        if layer.source == "part":
            found = "one of several matrices that the model stores as one tensor, such as stacked experts"
        elif layer.source not in kinds:
            others = " and ".join(kind for kind in kinds if kind != "part")
            found = f"a layer of type {layer.source!r}; this target packs {others}"
        elif name in tied and not packs_tied:  # loading would tie the other layer to a missing weight
            found = f"its tensors are tied to those of {tied[name]}"
        else:
            found = pack_matrix(matrix, layer.dtype)
        if isinstance(found, str):
            dense[name] = found
        else:
            packed[name], tensors[name] = found[0].name, found[1]
    if not packed:
        raise TargetError(
            "No layer can be packed: "
            + "; ".join(f"{name}: {why}" for name, why in list(dense.items())[:3])
            + ". Compress with formats such as ('int4', 'int8'), or make all layers dense with "
            "tensornet_hf.decompress."
        )
    stock = light_copy(model)
    assert isinstance(stock, PreTrainedModel)
    stock.config = copy.deepcopy(model.config)
    # Dense weights of packed layers are not written, so build them on the meta device, without memory.
    shapes = {name: x.topology.shape for name, x in layers.items() if name in packed or name in inside}
    decompress(stock, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    state: dict[str, Tensor] = stock.state_dict()
    for name in set(inside.values()):
        del state[name]
    for name, made in tensors.items():
        if name in layers and name not in inside:
            del state[f"{name}.weight"]
        if f"{name}.weight" in stock.all_tied_weights_keys:
            del packed[name]
        else:
            state |= {f"{name}.{part}": tensor for part, tensor in made.items()}
    return PackedModel(
        stock, state, packed, dense, {name: x for name, x in low_ranks.items() if name in packed}
    )


def list_stacks(model: nn.Module) -> dict[str, tuple[list[str], Compound, StackedMatrices]]:
    """Find the parameters of a model that consist of several matrices (see `tensornet.nn.unfuse`).

    Args:
        model: an unfused model, or one in which matrices of these parameters were replaced.

    Returns:
        For each parameter by name: the names of its matrices, the module that replaces its module, and the
        location of the matrices.
    """
    return {
        f"{owner}.{stack.parameter}": ([f"{owner}.{name}" for name in stack.names], compound, stack)
        for owner, compound in model.named_modules()
        if isinstance(compound, Compound)
        for stack in compound.stacks
    }


def stack_rows(
    model: PreTrainedModel, stack: str, compound: Compound, place: StackedMatrices
) -> dict[str, Tensor]:
    """Find out as which linear layers a checkpoint of this architecture stores a stack of matrices.

    Args:
        model: model of the architecture.
        stack, compound, place: name and location of the stack (see `list_stacks`).

    Returns:
        For each layer by name, the indices of its rows among the rows of all matrices. The result is empty if
        checkpoints store the stack in another way, such as the experts of gpt-oss as one tensor.
    """
    shape = compound.stock.get_parameter(place.parameter).shape
    if place.transposed or shape[-1] != place.columns:
        return {}
    if len(shape) == 2 and not isinstance(compound.stock, nn.Linear):
        return {}
    # A compressed model that was loaded has no conversions (see `get_state_dict_and_metadata`).
    model = copy.copy(model)
    model._weight_conversions = getattr(model, "_weight_conversions", None) or None  # type: ignore[assignment]
    numbers = torch.arange(math.prod(shape[:-1])).view(*shape[:-1], 1)
    found = revert_weight_conversion(model, {stack: numbers})
    if any(x.ndim != 2 or not name.endswith(".weight") for name, x in found.items()):
        return {}
    return {name.removesuffix(".weight"): x.flatten() for name, x in found.items()}


def _pack_stack(
    stack: str,
    rows: Mapping[str, Tensor],
    matrices: Sequence[IntegerMatrix | None],
    pack_matrix: Callable[[IntegerMatrix], Packed | str],
) -> dict[str, Packed] | str:
    """Pack a stack of matrices as linear layers, or return why this is impossible.

    Args:
        stack: name of the stack, for the reason.
        rows: result of `stack_rows`.
        matrices: the matrices; None stands for one that is not stored as integers.
        pack_matrix: see `packed_model`.
    """
    if not rows:
        return f"{stack} is one tensor in checkpoints of this architecture, which this target does not pack"
    cores = [x.core for x in matrices if x is not None]
    if len(cores) < len(matrices) or len({core.number_format for core in cores}) > 1:
        return f"the matrices of {stack} have several number formats, but this target needs one for all"
    parts = {part: torch.cat([core.tensors[part] for core in cores]) for part in cores[0].names}
    shape = (len(parts["codes"]), cores[0].columns)
    whole = IntegerMatrix(PackedCore(cores[0].number_format, shape, cores[0].columns, parts))
    made: dict[str, Packed] = {}
    for name, index in rows.items():
        found = pack_matrix(whole.rows(index))
        if isinstance(found, str):
            return found
        made[name] = found
    if len({found[0] for found in made.values()}) > 1:
        return f"the codes of {stack} need several numbers of bits, but this target needs one for all"
    return made


def packed_contents(
    source: Checkpoint,
    lazy: LazyModel,
    plan: CompressionPlan,
    pack_matrix: Callable[[IntegerMatrix, torch.dtype], Packed | str],
    *,
    kinds: Collection[str],
    packs_tied: bool,
    finish: Callable[[PackedModel, Path], None],
) -> tuple[Contents, PackedModel]:
    """Find out what a folder of packed layers will contain, before any layer is compressed.

    Args:
        source: contents of the folder of the dense model.
        lazy: the dense model.
        plan: the plan. Layers that cannot be packed, or whose packed size depends on their values, are
            written dense.
        pack_matrix, kinds, packs_tied: see `packed_model`.
        finish: function that writes all files of the folder but the weight files.

    Returns:
        The files; and the planned model, with tensors on the meta device.

    Raises:
        TargetError: see `packed_model`; or a planned layer is one of several matrices in one tensor.
    """
    model, targets = planned_model(lazy.model, plan)
    if inside := [name for name, target in targets.items() if target.owners]:
        raise TargetError(
            f"{inside[0]} is one of several matrices that the model stores as one tensor, which can only be "
            "packed in memory. Leave out workers (--workers), or leave the layer dense "
            f"(exclude_modules=[{inside[0]!r}])."
        )
    structure_changed(model)
    layout = partial(_layout, pack_matrix)
    found = packed_model(model, layout, networks="dense", kinds=kinds, packs_tied=packs_tied)
    stored_as = {part: key for key, part in source.tensors.items()}
    tied = found.stock.all_tied_weights_keys
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    copied: dict[str, Callable[[], Iterator[bytes]]] = {}
    planned = {f"{name}.weight" for target in targets.values() for name in target.names}
    for name, x in found.state.items():
        origin = lazy.origins.get(name)
        if name in tied and tied[name] in found.state:
            continue
        if name in planned or origin is None:
            tensors[name] = NAMES[x.dtype], tuple(x.shape), x.nbytes
        elif len(origin.parts) == 1:
            tensors[name], copied[name] = entry(lazy, name, x), origin.contents
        else:  # `save_pretrained` writes the matrices of experts one by one too
            for part in origin.parts:
                key = stored_as[part]
                tensors[key] = part.dtype, part.shape, part.nbytes
                copied[key] = partial(contents, [part])
    for key, part in lazy.others.items():
        tensors[key], copied[key] = (part.dtype, part.shape, part.nbytes), partial(contents, [part])
    own_names = {
        layer: tuple(x for x in tensors if x not in copied and x.rpartition(".")[0] in targets[layer].names)
        for layer in targets
    }

    def pack_layer(layer: str, modules: list[nn.Module]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name, module in zip(targets[layer].names, modules, strict=True):
            assert isinstance(module, TensorNetworkLinear | MPOEmbedding)
            if name in found.packed:
                parts = split_weight(module)
                assert not isinstance(parts, str)
                done = pack_matrix(parts[0], module.dtype)
                here = {} if isinstance(done, str) else {f"{name}.{key}": x for key, x in done[1].items()}
                facts = {key: (NAMES[x.dtype], tuple(x.shape)) for key, x in here.items()}
                if isinstance(done, str) or facts != {key: tensors[key][:2] for key in facts}:
                    why = done if isinstance(done, str) else "its scales are not exact in the planned dtype"
                    raise TargetError(
                        f"{name} cannot be packed as planned: {why}. Leave it dense "
                        f"(exclude_modules=[{name!r}]), or choose another number format."
                    )
                made |= here
            elif f"{name}.weight" in tensors:
                stock: Any = module.to_embedding() if isinstance(module, MPOEmbedding) else module.to_linear()
                made[f"{name}.weight"] = stock.weight.detach()
        return made

    def unpack_layer(layer: LayerPlan, read: Callable[[str], Tensor]) -> list[nn.Module] | None:
        assert layer.topology is not None
        name, number_format = targets[layer.name].name, layer.storage.number_format
        packed = NumberFormat.parse(found.packed[name]) if name in found.packed else None
        if packed is None or packed.bits != number_format.bits or number_format.scales.count > 1:
            return None  # the codes are other ones, or none
        if not number_format.points.equal_steps:
            return None  # signs and magnitudes instead of codes
        words = next((x for x in ("weight", "weight_packed") if f"{name}.{x}" in tensors), "weight")
        scales = read(f"{name}.scales" if words == "weight" else f"{name}.weight_scale")
        codes = unpack_rows(read(f"{name}.{words}"), number_format.points.bits, layer.shape[1])
        scales = scales.to(number_format.scales.dtype)
        rounded = RoundedWeight(codes, scales, None, number_format, ("nearest",), torch.zeros(()))
        (core,) = layer.topology.core_names
        stored = stored_core(layer.topology, layer.storage, core, rounded, layer.dtype)
        like = torch.empty(0, dtype=layer.dtype)
        made = linear_from_stored(
            layer.topology, {f"core_{core}": stored}, source="linear", storage=layer.storage, like=like
        )
        return with_cores(targets[layer.name], made)

    ready = Contents(tensors, copied, own_names, pack_layer, unpack_layer, partial(finish, found))
    return ready, found


def _layout(
    pack_matrix: Callable[[IntegerMatrix, torch.dtype], Packed | str],
    matrix: IntegerMatrix,
    dtype: torch.dtype,
) -> Packed | str:
    """Return the number format of a packed layer, and tensors on the meta device of the packed shapes.

    They are found by packing a single row that contains all codes.
    """
    number_format, (rows, columns) = matrix.number_format, matrix.shape
    if number_format.minima is not None:
        return "its packed size depends on its minima, which are not known before it is compressed"
    codes = (torch.arange(columns) % (number_format.points.top + 1)).to(torch.uint8)[None]
    scales = number_format.storable(torch.ones(1, number_format.groups(columns)))
    rounded = RoundedWeight(codes, scales, None, number_format, ("nearest",), torch.zeros(()))
    topology, storage = (
        dense_topology(out_features=1, in_features=columns),
        Storage(number_format=number_format),
    )
    core = stored_core(topology, storage, "matrix", rounded, dtype)
    assert isinstance(core, PackedCore)
    found = pack_matrix(IntegerMatrix(core), dtype)
    if isinstance(found, str):
        return found
    shapes = {name: (rows, *x.shape[1:]) if x.ndim == 2 else x.shape for name, x in found[1].items()}
    return found[0], {
        name: torch.empty(shapes[name], dtype=x.dtype, device="meta") for name, x in found[1].items()
    }


def unpack_rows(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack the codes of each row; this is the inverse of `pack_rows`.

    Args:
        words: 32-bit words, shape `(rows, ceil(columns * bits / 32))`.
        bits: bits of a code, 2 to 8.
        columns: number of codes in a row.

    Returns:
        `torch.uint8`, shape `(rows, columns)`.
    """
    run = 8 // math.gcd(8, bits)
    count, planes = math.ceil(columns / run), run * bits // 8
    runs = words.view(torch.uint8)[:, : count * planes].unflatten(1, (count, planes))
    return unpack(runs, bits, run).flatten(1)[:, :columns]


def folder_constraints(model: PreTrainedModel, kinds: Collection[str]) -> tuple[int, tuple[str, ...]]:
    """Collect what a plan needs to know about a folder of packed layers (see `export.Target.constraints`).

    Args:
        model: the dense model.
        kinds: layer types that can be packed.

    Returns:
        The bytes that the names and shapes of tensors take in the weight files; and the names of the layers
        that cannot be packed, because of their type or because `stack_rows` does not find their layers.
    """
    with unfused(model):
        layers = [x for x in list_weights(model) if x.kinds]
        inside = {
            name: bool(stack_rows(model, stack, compound, place))
            for stack, (names, compound, place) in list_stacks(model).items()
            for name in names
            if "part" in kinds
        }
    others = [x.name for x in layers if not inside.get(x.name, all(kind.name in kinds for kind in x.kinds))]
    names = [*model.state_dict(), *(f"{x.name}.weight_scale {x.name}.biases" for x in layers)]
    return sum(ENTRY + len(name) for name in names), tuple(others)


def write_config(model: PackedModel, source: Path, folder: Path) -> None:
    """Write the configuration of a packed model, and copy small files such as the tokenizer, to a folder."""
    stock: Any = model.stock
    stock.config.architectures, stock.config.dtype = [type(stock).__name__], stock.dtype
    stock.config.save_pretrained(folder)
    if stock.can_generate():
        stock.generation_config.save_pretrained(folder)
    copy_small_files(source, folder)


@contextmanager
def model_folder(
    model: PackedModel,
    destination: Path,
    *,
    source: Path | None,
    force: bool,
    arrange: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> Iterator[Path]:
    """Context manager: yield a temporary folder with a packed model, then rename it to `destination`.

    The `with` block may add files. If it raises an error, the temporary folder is removed, and `destination`
    is unchanged. Small files of the folder `source`, such as its tokenizer, are copied.

    Args:
        model: the model.
        destination, source, force: see `export`.
        arrange: function of the tensors by their names in checkpoints of this architecture; it returns the
            tensors to write.
    """
    sources = () if source is None else (source,)
    with write_folder(destination, force=force, sources=sources) as folder:
        tensors = arrange(revert_weight_conversion(model.stock, dict(model.state)))
        model.stock.save_pretrained(folder, state_dict=tensors, save_original_format=False)
        for each in sources:
            copy_small_files(each, folder)
        yield folder


def write_adapter(folder: Path, file: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a LoRA adapter into a model folder.

    Args:
        folder: the model folder.
        file: name of the weight file in the subfolder `lora`.
        tensors: tensors of the adapter by name.
        config: content of `adapter_config.json`.
    """
    adapter = folder / ADAPTER
    adapter.mkdir()
    save_file({name: x.contiguous() for name, x in tensors.items()}, adapter / file, {"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    (adapter / "adapter_config.json").write_text(text, encoding="utf-8")


def folder_report(model: PackedModel, destination: Path) -> ExportReport:
    """Make the report of an export to a folder."""
    adapter = destination / ADAPTER if model.low_ranks else None
    return ExportReport(
        destination,
        model.packed,
        model.dense,
        weight_bytes(destination),
        adapter,
        {name: x.rank for name, x in model.low_ranks.items()},
        0 if adapter is None else weight_bytes(adapter),
    )


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack the codes of each row into a stream of bits, lowest bits first, stored as 32-bit words.

    Args:
        codes: `torch.uint8`, shape `(rows, columns)`.
        bits: bits of a code, 2 to 8.

    Returns:
        `torch.int32`, shape `(rows, ceil(columns * bits / 32))`.
    """
    columns, run = codes.shape[1], 8 // math.gcd(8, bits)  # `run` codes fill whole bytes
    runs = torch.nn.functional.pad(codes, (0, -columns % run)).unflatten(1, (-1, run))
    stream = pack(runs, bits).flatten(1)
    size = 4 * math.ceil(columns * bits / 32)
    return torch.nn.functional.pad(stream, (0, size - stream.shape[1])).view(torch.int32)

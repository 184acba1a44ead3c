"""Code shared by compressed-tensors, GPTQ and MLX, which pack integer matrices into 32-bit words.

These targets are folders of safetensors files. They differ in the tensors that store a matrix, and in the
entries of config.json.
"""

import copy
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tensornet.compression.apply import decompress
from tensornet.compression.loss_increase import light_copy
from tensornet.errors import TargetError
from tensornet.io import contents
from tensornet.nn.embedding import MPOEmbedding
from tensornet.nn.extension import structure_changed
from tensornet.nn.linear import TensorNetworkLinear
from tensornet.nn.module import NetworkModule
from tensornet.nn.storage import PackedCore, Storage, stored_core
from tensornet.nn.targets import list_weights
from tensornet.nn.unfuse import Compound, StackedMatrices, unfused
from tensornet.quantization import NumberFormat
from tensornet.quantization.packing import pack
from tensornet.quantization.rounding import RoundedWeight
from tensornet.topologies import dense as dense_topology
from tensornet_hf.checkpoint import copy_small_files
from tensornet_hf.exporters.base import (
    IntegerMatrix,
    LowRank,
    Networks,
    split_layers,
    split_weight,
    tied_layers,
)
from tensornet_hf.file_sink import (
    DTYPES,
    NAMES,
    Chunks,
    Files,
    Made,
    New,
    PlannedModel,
    sharded,
    tensor_bytes,
)
from tensornet_hf.lazy_model import Origin
from tensornet_hf.model_folder import stored_form

#: Subfolder of a model folder for the LoRA adapter.
ADAPTER = "lora"
#: Bytes that a tensor takes in the header of a safetensors file, without its name.
HEADER_ENTRY = 68
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
        parts: names of the tensors of every packed layer or stack, by name.
        stacks: for each packed stack, the names of its matrices, and the rows of each layer into which it is
            divided (see `stack_rows`).
    """

    stock: PreTrainedModel
    state: dict[str, Tensor]
    packed: dict[str, str]
    dense: dict[str, str]
    low_ranks: dict[str, LowRank]
    parts: dict[str, tuple[str, ...]]
    stacks: dict[str, tuple[list[str], dict[str, Tensor]]]


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
            "`tensornet compress SOURCE FOLDER --to TARGET --bits 4.5 --calibration text.txt`, or in "
            'Python tensornet.compress(model, CompressionConfig(bits_per_weight=4.25, formats=("int4",))).'
        )
    integers, low_ranks, dense = split_layers(model, networks)
    tied = tied_layers(model)
    tensors: dict[str, dict[str, Tensor]] = {}
    packed: dict[str, str] = {}
    stacks = list_stacks(model) if "part" in kinds else {}
    stacked = {name for names, _, _ in stacks.values() for name in names if name in integers}
    parts: dict[str, tuple[str, ...]] = {}
    done: dict[str, tuple[list[str], dict[str, Tensor]]] = {}
    for stack, (names, compound, place) in stacks.items():
        if stacked.isdisjoint(names):
            continue
        rows = stack_rows(model, stack, compound, place)
        matrices = [integers.get(name) for name in names]
        made = _pack_stack(stack, rows, matrices, lambda x: pack_matrix(x, model.dtype))
        if isinstance(made, str):
            dense |= {name: made for name in names if name in stacked}
        else:
            packed |= {name: x[0].name for name, x in made.items()}
            tensors |= {name: x[1] for name, x in made.items()}
            parts[stack] = tuple(f"{name}.{part}" for name, x in made.items() for part in x[1])
            done[stack] = names, rows
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
            parts[name] = tuple(f"{name}.{part}" for part in found[1])
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
    inside = {name for names, _ in done.values() for name in names}
    shapes = {name: x.topology.shape for name, x in layers.items() if name in packed or name in inside}
    decompress(stock, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    state: dict[str, Tensor] = stock.state_dict()
    for name in done:
        del state[name]
    for name, each in tensors.items():
        if name in layers and name not in inside:
            del state[f"{name}.weight"]
        if f"{name}.weight" in stock.all_tied_weights_keys:
            del packed[name]
        else:
            state |= {f"{name}.{part}": tensor for part, tensor in each.items()}
    low_ranks = {name: x for name, x in low_ranks.items() if name in packed}
    return PackedModel(stock, state, packed, dense, low_ranks, parts, done)


def dense_matrices(found: PackedModel) -> list[str]:
    """List the modules with a matrix that is written dense and multiplied with, such as routers and heads."""
    parts = dict(found.stock.named_modules())
    names = [name.removesuffix(".weight") for name, x in found.state.items() if x.ndim == 2]
    return [name for name in names if name in parts and not isinstance(parts[name], nn.Embedding)]


def list_stacks(model: nn.Module) -> dict[str, tuple[list[str], Compound, StackedMatrices]]:
    """Find the parameters of a model that consist of several matrices (see `tensornet.nn.unfuse`).

    Args:
        model: an unfused model, or one in which matrices of these parameters were replaced.

    Returns:
        For each parameter by name: the names of its matrices, the `Compound` in place of the module that had
        the parameter, and the location of the matrices in the parameter.
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
    """Find the linear layers into which checkpoints of this architecture divide a stack of matrices.

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
    # The attribute is private, but `revert_weight_conversion` reads nothing else.
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


class Tensors(NamedTuple):
    """The tensors of a packed model, and where their bytes come from.

    Args:
        facts: dtype as named in the header of a safetensors file, shape, and length in bytes, by name.
        made: tensors that are made of compressed layers.
        copied: bytes of all others, by name.
    """

    facts: dict[str, tuple[str, tuple[int, ...], int]]
    made: list[Made]
    copied: dict[str, Chunks]


@torch.no_grad()
def lay_out_packed(
    planned: PlannedModel,
    pack_matrix: Callable[[IntegerMatrix, torch.dtype], Packed | str],
    *,
    kinds: Collection[str],
    packs_tied: bool = False,
    check: Callable[[PackedModel], object] = lambda model: None,
    arrange: Callable[[PackedModel, Tensors], tuple[PackedModel, Tensors]] = lambda *both: both,
    complete: Callable[[PackedModel, Path], object] = lambda model, folder: None,
    write_adapter: Callable[[PackedModel, Path], object] = lambda model, folder: None,
) -> Files:
    """Describe the files of a folder with packed layers, for any target whose result is a folder.

    Args:
        planned: the model. Layers that cannot be packed, or whose packed size is unknown before they are
            compressed, are written dense.
        pack_matrix, kinds, packs_tied: see `packed_model`.
        check: function that raises TargetError if the runtime cannot load these layers.
        arrange: function that renames or joins tensors.
        complete: function that changes or adds files in the folder, after the configuration and small files
            such as the tokenizer have been written.
        write_adapter: function that writes the LoRA adapter into the folder; called if there is one.

    Raises:
        TargetError: see `packed_model`; or a planned layer is one of several matrices in one tensor that
            cannot be packed.
    """
    model = planned.model
    structure_changed(model)
    pack = partial(_layout, pack_matrix) if planned.targets else pack_matrix
    found = packed_model(model, pack, networks=planned.networks, kinds=kinds, packs_tied=packs_tied)
    check(found)
    found, tensors = arrange(found, _tensors(planned, found, pack_matrix))

    def finish(folder: Path) -> None:
        if found.low_ranks:
            write_adapter(found, folder)
        write_config(found, planned.folder, folder)
        complete(found, folder)

    layouts = sharded(tensors.facts, planned.max_shard_bytes)
    ranks = {name: x.rank for name, x in found.low_ranks.items()}
    return Files(
        layouts, tensors.made, tensors.copied, finish, packed=found.packed, dense=found.dense, ranks=ranks
    )


def _tensors(
    planned: PlannedModel,
    found: PackedModel,
    pack_matrix: Callable[[IntegerMatrix, torch.dtype], Packed | str],
) -> Tensors:
    """List the tensors of a packed model, and where their bytes come from.

    Tensors have the names of checkpoints of this architecture.
    """
    stock, lazy = found.stock, planned.lazy
    facts: dict[str, tuple[str, tuple[int, ...], int]] = {}
    copied: dict[str, Chunks] = {}
    made: list[Made] = []

    # Tensors that are made of new layers: packed ones, and planned layers that are written dense.
    stacked = {name: stack for stack, (names, _, _) in list_stacks(planned.model).items() for name in names}
    owners = {layer: target for target, layers in planned.targets.items() for layer in layers}
    for target, layers in planned.targets.items():
        own: list[str] = []
        if (stack := stacked.get(layers[0])) in found.stacks:
            continue
        if stack is not None:
            raise TargetError(
                f"{target} is one of several matrices that the model stores as one tensor, which cannot be "
                f"packed: {found.dense[target]}. Leave them dense (exclude_modules=[{target!r}])."
            )
        for layer in layers:
            own += found.parts[layer] if layer in found.packed else [f"{layer}.weight"]
        own = [x for x in own if x in found.state and not _is_tied(found, x)]
        make = partial(_make_layer, found, target, layers, tuple(own), pack_matrix)
        made.append(Made((target,), tuple(own), make))
    for stack, (names, rows) in found.stacks.items() if planned.targets else ():
        needed = tuple(owners[x] for x in names)
        make = partial(_make_stack, found, stack, rows, needed, pack_matrix)
        made.append(Made(needed, found.parts[stack], make))
    facts |= {x: _facts(found.state[x]) for each in made for x in each.names}

    # All other tensors, under the names that a checkpoint of this architecture has.
    stored_as = {} if lazy is None else {part: key for key, part in lazy.source.tensors.items()}
    for name, x in found.state.items():
        origin = None if lazy is None else lazy.origins.get(name)
        if name in facts or _is_tied(found, name):
            continue
        if origin is not None and len(origin.parts) > 1:  # experts that are stored one by one
            for part in origin.parts:
                key = stored_as[part]
                facts[key] = part.dtype, part.shape, part.nbytes
                copied[key] = partial(contents, [part])
            continue
        for key, y in revert_weight_conversion(stock, {name: x}).items():
            if origin is None:
                facts[key], copied[key] = _facts(y), tensor_bytes(y)
            elif y.shape == x.shape:
                assert lazy is not None
                facts[key], copied[key] = stored_form(lazy, name, x), origin.contents
            else:
                dtype = DTYPES[origin.dtype]
                facts[key] = origin.dtype, tuple(y.shape), y.numel() * dtype.itemsize
                copied[key] = partial(_part_of, stock, origin, name, tuple(x.shape), key)
    for key, part in {} if lazy is None else lazy.others.items():
        facts[key], copied[key] = (part.dtype, part.shape, part.nbytes), partial(contents, [part])
    return Tensors(facts, made, copied)


def _is_tied(found: PackedModel, name: str) -> bool:
    """Return True if a tensor is another one in the files too."""
    ties = found.stock.all_tied_weights_keys
    return name in ties and ties[name] in found.state


def _facts(x: Tensor) -> tuple[str, tuple[int, ...], int]:
    return NAMES[x.dtype], tuple(x.shape), x.nbytes


def _part_of(
    stock: PreTrainedModel, origin: Origin, name: str, shape: tuple[int, ...], key: str
) -> Iterator[bytes]:
    """Yield the bytes of one of the tensors into which checkpoints divide a parameter."""
    whole = origin.read().reshape(shape)
    yield from tensor_bytes(revert_weight_conversion(stock, {name: whole})[key])()


def _make_layer(
    found: PackedModel,
    target: str,
    layers: Sequence[str],
    names: Collection[str],
    pack_matrix: Callable[[IntegerMatrix, torch.dtype], Packed | str],
    new: New,
) -> dict[str, Chunks]:
    """Pack the new layers of a weight, or make them dense, as was planned.

    Raises:
        TargetError: the values of a layer cannot be packed.
    """
    made: dict[str, Tensor] = {}
    for layer, module in zip(layers, new[target], strict=True):
        assert isinstance(module, TensorNetworkLinear | MPOEmbedding)
        if layer in found.packed:
            parts = split_weight(module)
            assert not isinstance(parts, str)
            made |= _as_planned(found, layer, pack_matrix(parts[0], module.dtype))
        elif f"{layer}.weight" in names:
            stock: Any = module.to_embedding() if isinstance(module, MPOEmbedding) else module.to_linear()
            made[f"{layer}.weight"] = stock.weight.detach()
    return {name: tensor_bytes(x) for name, x in made.items() if name in names}


def _make_stack(
    found: PackedModel,
    stack: str,
    rows: Mapping[str, Tensor],
    targets: Sequence[str],
    pack_matrix: Callable[[IntegerMatrix, torch.dtype], Packed | str],
    new: New,
) -> dict[str, Chunks]:
    """Pack the new matrices of a stack as linear layers.

    Raises:
        TargetError: their values cannot be packed.
    """
    modules: list[Any] = [new[target][0] for target in targets]
    matrices = []
    for module in modules:
        parts = split_weight(module)
        assert not isinstance(parts, str)
        matrices.append(parts[0])
    made = _pack_stack(stack, rows, matrices, lambda x: pack_matrix(x, modules[0].dtype))
    if isinstance(made, str):
        return {name: tensor_bytes(x) for name, x in _as_planned(found, stack, made).items()}
    tensors = [_as_planned(found, layer, x) for layer, x in made.items()]
    return {name: tensor_bytes(x) for each in tensors for name, x in each.items()}


def _as_planned(found: PackedModel, layer: str, made: Packed | str) -> dict[str, Tensor]:
    """Return the tensors of a packed layer by name, if their shapes and dtypes are those of the plan."""
    here = {} if isinstance(made, str) else {f"{layer}.{part}": x for part, x in made[1].items()}
    if not here or any(_facts(x) != _facts(found.state[name]) for name, x in here.items()):
        why = made if isinstance(made, str) else "its scales are not exact in the planned dtype"
        raise TargetError(
            f"{layer} cannot be packed as planned: {why}. Leave it dense (exclude_modules=[{layer!r}]), or "
            "choose another number format."
        )
    return here


def _layout(
    pack_matrix: Callable[[IntegerMatrix, torch.dtype], Packed | str],
    matrix: IntegerMatrix,
    dtype: torch.dtype,
) -> Packed | str:
    """Return the number format of a packed layer, and tensors on the meta device of the packed shapes.

    They are found by packing matrices of 32 and of 64 rows that contain all codes. The sizes of a tensor are
    linear functions of the number of rows.
    """
    number_format, (rows, columns) = matrix.number_format, matrix.shape
    if number_format.minima is not None:
        return "its packed size depends on its minima, which are not known before it is compressed"
    found = pack_matrix(_sample(number_format, 32, columns, dtype), dtype)
    if isinstance(found, str):
        return found
    double = pack_matrix(_sample(number_format, 64, columns, dtype), dtype)
    assert not isinstance(double, str)
    if rows % 32:  # some numbers of rows cannot be packed
        own = pack_matrix(_sample(number_format, rows % 32, columns, dtype), dtype)
        if isinstance(own, str):
            return own
    made = {}
    for name, x in found[1].items():
        slopes = [b - a for a, b in zip(x.shape, double[1][name].shape, strict=True)]
        shape = [a + slope * (rows - 32) // 32 for a, slope in zip(x.shape, slopes, strict=True)]
        made[name] = torch.empty(shape, dtype=x.dtype, device="meta")
    return found[0], made


def _sample(number_format: NumberFormat, rows: int, columns: int, dtype: torch.dtype) -> IntegerMatrix:
    """Make a matrix whose rows contain all codes of a number format."""
    codes = (torch.arange(columns) % (number_format.points.top + 1)).to(torch.uint8).expand(rows, -1)
    scales = number_format.storable(torch.ones(rows, number_format.groups(columns)))
    rounded = RoundedWeight(codes, scales, None, number_format, ("nearest",), torch.zeros(()))
    topology = dense_topology(out_features=rows, in_features=columns)
    core = stored_core(topology, Storage(number_format=number_format), "matrix", rounded, dtype)
    assert isinstance(core, PackedCore)
    return IntegerMatrix(core)


def folder_constraints(model: PreTrainedModel, kinds: Collection[str]) -> tuple[int, tuple[str, ...]]:
    """Collect what a plan needs to know about a folder of packed layers (see `ExportTarget.constraints`).

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
    return sum(HEADER_ENTRY + len(name) for name in names), tuple(others)


def write_config(model: PackedModel, source: Path | None, folder: Path) -> None:
    """Write the configuration of a packed model, and copy small files such as the tokenizer, to a folder."""
    stock: Any = model.stock
    stock.config.architectures, stock.config.dtype = [type(stock).__name__], stock.dtype
    stock.config.save_pretrained(folder)
    if stock.can_generate():
        stock.generation_config.save_pretrained(folder)
    if source is not None:
        copy_small_files(source, folder)


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

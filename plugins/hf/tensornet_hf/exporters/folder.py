"""Folders of safetensors whose integer matrices are packed into 32-bit words: compressed-tensors and MLX.

These targets differ in the tensors that they make of one matrix and in what config.json says about them.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensornet.compression.apply import decompress
from tensornet.compression.loss_increase import light_copy
from tensornet.errors import TargetError
from tensornet.nn.module import NetworkModule
from tensornet.nn.targets import list_weights
from tensornet.nn.unfuse import unfused
from tensornet.quantization import NumberFormat
from tensornet.quantization.formats import pack
from tensornet_hf.checkpoint import copy_small_files, write_folder
from tensornet_hf.exporters.base import IntegerMatrix, integer_matrix

#: Bytes of the entry of one tensor in the header of a safetensors file, besides its name.
ENTRY = 68
#: Number format in the folder, and the packed tensors by their names in the layer.
Packed = tuple[NumberFormat, dict[str, Tensor]]


def packed_model(
    model: PreTrainedModel,
    pack_matrix: Callable[[IntegerMatrix, torch.dtype], Packed | str],
    *,
    kinds: Collection[str],
    packs_tied: bool,
) -> tuple[PreTrainedModel, dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Pack the integer matrices of a model; everything else becomes dense.

    Args:
        model: a compressed model; it is not changed.
        pack_matrix: packs a matrix for a layer that computes in the given dtype, or says why it cannot.
        kinds: kinds of layers that can be packed, see `tensornet.nn.layer_kinds`.
        packs_tied: whether a head that is tied to a packed embedding needs no tensors of its own. If not,
            both are written dense.

    Returns:
        A copy of stock layers, for `save_pretrained`; its tensors by name; the number format of every packed
        layer by name; and why the others are dense.

    Raises:
        TargetError: no layer can be packed.
    """
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, NetworkModule)
    }
    if not layers:
        raise TargetError(
            "This model has no tensor-network layers, so there is nothing to pack; compress it first, by "
            'tensornet.compress(model, CompressionConfig(bits_per_weight=4.25, formats=("int4",))).'
        )
    users: dict[int, list[str]] = {}  # names of the layers that share a tensor
    for name, layer in layers.items():
        users.setdefault(id(next(iter(layer.stored.values()))), []).append(name)
    tied = {name: names for names in users.values() if len(names) > 1 for name in names}
    tensors, packed, dense = {}, {}, {}
    for name, layer in layers.items():
        matrix = integer_matrix(layer)
        found: Packed | str
        if isinstance(matrix, str):
            found = matrix
        elif layer.source == "part":
            found = "one of several matrices that the model stores as one tensor, such as those of experts"
        elif layer.source not in kinds:
            found = f"a layer of the kind {layer.source!r}; this target packs {' and '.join(kinds)}"
        elif name in tied and not packs_tied:  # loading would tie the other layer to a missing weight
            found = f"its tensors are tied to those of {next(x for x in tied[name] if x != name)}"
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
            + ". Compress with formats such as ('int4', 'int8'), or write all layers dense by "
            "tensornet_hf.decompress."
        )
    stock = light_copy(model)
    assert isinstance(stock, PreTrainedModel)
    stock.config = copy.deepcopy(model.config)
    # Dense weights of packed layers would take much memory, and are not written.
    shapes = {name: layers[name].topology.shape for name in packed}
    decompress(stock, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    state: dict[str, Tensor] = stock.state_dict()
    for name, parts in tensors.items():
        del state[f"{name}.weight"]
        if f"{name}.weight" in stock.all_tied_weights_keys:
            del packed[name]
        else:
            state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return stock, state, packed, dense


def folder_facts(model: PreTrainedModel, kinds: Collection[str]) -> tuple[int, tuple[str, ...]]:
    """Look up what a plan for a folder of packed layers has to know.

    Args:
        model: the dense model.
        kinds: kinds of layers that can be packed.

    Returns:
        Bytes of the weight files above those of the model, which are names and shapes of tensors. And the
        names of layers that cannot be packed: of another kind, or one of several matrices in one tensor.
    """
    with unfused(model):
        layers = [x for x in list_weights(model) if x.kinds]
    others = [x.name for x in layers if x.owners or any(kind.name not in kinds for kind in x.kinds)]
    names = [*model.state_dict(), *(f"{x.name}.weight_scale {x.name}.biases" for x in layers)]
    return sum(ENTRY + len(name) for name in names), tuple(others)


@contextmanager
def model_folder(
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    destination: Path,
    *,
    source: Path | None,
    force: bool,
) -> Iterator[Path]:
    """Write a model folder, which becomes `destination` when the block ends without an error.

    Args:
        model: a model of stock layers; its own tensors may be on the meta device.
        state: the tensors to write.
        destination: the new folder.
        source: folder whose tokenizer and other small files are copied.
        force: replace an existing model folder.
    """
    sources = () if source is None else (source,)
    with write_folder(destination, force=force, sources=sources) as folder:
        model.save_pretrained(folder, state_dict=dict(state))
        for each in sources:
            copy_small_files(each, folder)
        yield folder


def words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into one stream of bits for each row, lowest bits first, in 32-bit words.

    Args:
        codes: `torch.uint8`, shape `(rows, columns)`.
        bits: bits of a code, 2 to 8.

    Returns:
        `torch.int32`, shape `(rows, ceil(columns * bits / 32))`.

    Example:
        >>> from tensornet_hf.exporters.folder import words
        >>> words(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 3).tolist()  # 0b011_010_001
        [[209]]
    """
    columns, run = codes.shape[1], 8 // math.gcd(8, bits)  # so many codes fill whole bytes
    runs = torch.nn.functional.pad(codes, (0, -columns % run)).unflatten(1, (-1, run))
    stream = pack(runs, bits).flatten(1)
    size = 4 * math.ceil(columns * bits / 32)
    return torch.nn.functional.pad(stream, (0, size - stream.shape[1])).view(torch.int32)

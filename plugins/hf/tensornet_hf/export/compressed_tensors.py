"""Export integer layers as a compressed-tensors checkpoint, which can be loaded without this library.

In that format the weight of an `nn.Linear` becomes three tensors: `weight_packed`, codes of 4 or 8 bits in
32-bit words, lowest bits first; `weight_scale`, a scale for each group of inputs; and `weight_shape`. The
configuration has one group of layers for each number format.
"""

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensornet.compression.loss_increase import light_copy
from tensornet.errors import TargetError
from tensornet.nn.module import NetworkModule
from tensornet.nn.storage import PackedCore
from tensornet.quantization import NumberFormat
from tensornet_hf.checkpoint import (
    check_free,
    copy_small_files,
    decompress,
    load,
    resolve_folder,
    write_folder,
)

#: Bits for which readers of `pack-quantized` such as vLLM have kernels.
EXPORTED_BITS = (4, 8)


@dataclass(frozen=True)
class ExportReport:
    """Report of an export: layers that were packed, and layers that were written dense.

    Args:
        destination: the folder.
        packed: number format of every packed layer, by name.
        dense: reason for every compressed layer that was written dense, by name.

    Example:
        >>> from pathlib import Path
        >>> print(ExportReport(Path("out"), packed={"lm_head": "int8"}, dense={}))
        1 layers packed, 0 written dense: out
    """

    destination: Path
    packed: dict[str, str]
    dense: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.packed)} layers packed, {len(self.dense)} written dense: {self.destination}"]
        return "\n".join([*lines, *(f"dense: {name}: {why}" for name, why in self.dense.items())])


@torch.no_grad()
def export_compressed_tensors(
    model_or_folder: PreTrainedModel | str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> ExportReport:
    """Write a folder that transformers with `compressed-tensors` loads, without this library.

    A layer is packed if it is an `nn.Linear` stored as one matrix of symmetric 4-bit or 8-bit integers, with
    groups that divide the inputs or one scale per row. All other layers are written dense, and the report
    lists them. vLLM reads this format as well (not tested here) if the projections that it fuses, query, key
    and value or gate and up, share a number format.

    Args:
        model_or_folder: a compressed model (not changed), or its folder or hub id.
        destination: the new folder.
        source: folder whose tokenizer and other small files are copied; by default the folder given.
        force: replace an existing model folder.

    Returns:
        Which layers were packed, and why others were not.

    Raises:
        DestinationError: it exists already, is the source, or cannot be written; no new files are left.
        TargetError: no layer can be packed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(config)
        >>> plan = tn.CompressionConfig(bits_per_weight=4.25, formats=("int4",), objective="weight")
        >>> report = tn.compress(model, plan, progress=False)
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = th.export_compressed_tensors(model, folder)
        >>> len(exported.packed), exported.dense
        (7, {})
    """
    if isinstance(model_or_folder, PreTrainedModel):
        given = model_or_folder
        folders = () if source is None else (Path(source),)
    else:
        origin = resolve_folder(os.fspath(model_or_folder))
        given = load(origin)
        folders = (Path(source or origin),)
    check_free(destination, force=force, sources=folders)
    model = light_copy(given)
    assert isinstance(model, PreTrainedModel)
    model.config = copy.deepcopy(given.config)
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
    tied = {
        name: next(x for x in names if x != name)
        for names in users.values()
        if len(names) > 1
        for name in names
    }
    decompress(model)
    state, packed, dense = model.state_dict(), {}, {}
    for name, layer in layers.items():
        found = _packed(layer, model.get_submodule(name), tied_to=tied.get(name))
        if isinstance(found, str):
            dense[name] = found
            continue
        del state[f"{name}.weight"]
        state |= {f"{name}.{part}": tensor for part, tensor in found.items()}
        packed[name] = layer.storage.format_of(layer.topology.core_names[0]).name
    if not packed:
        raise TargetError(
            "No layer can be packed: "
            + "; ".join(f"{name}: {why}" for name, why in list(dense.items())[:3])
            + ". Compress with formats such as ('int4', 'int8'), or write all layers dense by "
            "tensornet_hf.decompress."
        )
    model.config.quantization_config = quantization_entry(packed)
    with write_folder(destination, force=force, sources=folders) as folder:
        model.save_pretrained(folder, state_dict=state)
        for each in folders:
            copy_small_files(each, folder)
    return ExportReport(Path(destination), packed, dense)


def quantization_entry(packed: dict[str, str]) -> dict[str, Any]:
    """Build `quantization_config` of a checkpoint: one group of layers for each number format."""
    groups = {}
    for number, name in enumerate(sorted(set(packed.values()))):
        bits, size = NumberFormat.parse(name).bits, NumberFormat.parse(name).group
        weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True}
        weights["strategy"] = "channel" if size is None else "group"
        if size is not None:
            weights["group_size"] = size
        groups[f"group_{number}"] = {
            "targets": [layer for layer, used in packed.items() if used == name],
            "weights": weights,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


def _packed(layer: NetworkModule, stock: nn.Module, *, tied_to: str | None) -> dict[str, Tensor] | str:
    """Pack the tensors of one layer, or return the reason why it is written dense."""
    if type(stock) is not nn.Linear:
        kind = type(stock).__name__
        return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}; only nn.Linear can be packed"
    topology = layer.topology
    legs = (*topology.out_labels, *topology.in_labels)
    if [core.labels for core in topology.cores] != [legs] or topology.shape != topology.padded_shape:
        return f"a network of the family {topology.family!r}; only dense matrices can be packed"
    core = layer.topology.core_names[0]
    number_format = layer.storage.format_of(core)
    bits = number_format.bits
    if bits not in EXPORTED_BITS or number_format.zero_point:
        return f"stored as {number_format.name}; only symmetric integers of 4 or 8 bits can be packed"
    rows, columns = stock.weight.shape
    if number_format.group is not None and columns % number_format.group:
        return f"groups of {number_format.group} do not divide {columns} inputs"
    if tied_to is not None:  # loading would tie the other layer to a missing weight
        return f"its tensors are tied to those of {tied_to}"
    packed = layer.get_submodule(f"core_{core}")
    assert isinstance(packed, PackedCore)
    scale = packed.scale_values.to(stock.weight.dtype)
    if not torch.equal(scale.float(), packed.scale_values.float()):
        return f"scales are not exact in {stock.weight.dtype}"
    return {
        "weight_packed": words(number_format.unpack(packed.codes, columns), bits),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }


def words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of 4 or 8 bits into 32-bit words, lowest bits first, with rows padded by zeros.

    Args:
        codes: `torch.uint8`, shape `(rows, columns)`.
        bits: bits of a code.

    Example:
        >>> words(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()
        [[801]]
    """
    per_word = 32 // bits
    wide = nn.functional.pad(codes, (0, -codes.shape[1] % per_word)).to(torch.int64)
    shifts = torch.arange(per_word, device=codes.device) * bits
    joined = (wide.unflatten(1, (-1, per_word)) << shifts).sum(2)
    return (joined - ((joined >> 31) << 32)).to(torch.int32)  # the highest bit is the sign

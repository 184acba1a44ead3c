"""Export integer layers as a compressed-tensors checkpoint, which transformers and vLLM load.

In that format the weight of a linear layer becomes `weight_packed`, codes of 2 to 8 bits as one stream of
bits for each row; `weight_scale`, a scale for each group of inputs; and `weight_shape`. The configuration
has one group of layers for each number format. transformers cannot load packed embeddings.

Zero is the middle code of every layer here. The format has zero points as well, but transformers (5.24, with
compressed-tensors 0.18 to 0.20) fails to load them. So layers with zero points get codes of more bits where
necessary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensornet.errors import TargetError
from tensornet.nn.module import NetworkModule
from tensornet.quantization import NumberFormat
from tensornet_hf.exporters.base import ExportReport, IntegerMatrix, LowRank, Networks
from tensornet_hf.exporters.folder import (
    Packed,
    folder_report,
    model_folder,
    packed_model,
    words,
    write_adapter,
)

#: Kinds of layers that are packed, see `tensornet.nn.layer_kinds`.
KINDS = ("linear",)


@torch.no_grad()
def export_compressed_tensors(
    model: PreTrainedModel,
    destination: Path,
    *,
    source: Path | None = None,
    force: bool = False,
    networks: Networks = "dense",
) -> ExportReport:
    """Write a folder that transformers with `compressed-tensors` loads; see `tensornet_hf.export`.

    A layer is packed if it is an `nn.Linear` stored as one matrix of integers, with groups that divide the
    inputs or one scale per row, and scales that are exact in the dtype of the model. vLLM reads this format
    as well (not tested here) if the projections that it fuses, query, key and value or gate and up, share a
    number format.

    Args:
        model: a compressed model; it is not changed.
        destination: the new folder.
        source: folder whose tokenizer and other small files are copied.
        force: replace an existing model folder.
        networks: what becomes of layers that are not one matrix of integers. With "lora", the folder `lora`
            inside is a PEFT adapter of the low ranks that are added to integers.

    Raises:
        DestinationError: it exists already, is the source, or cannot be written; no new files are left.
        TargetError: no layer can be packed, a network is refused, or the model has experts.
    """
    found = packed_model(model, _pack, networks=networks, kinds=KINDS, packs_tied=False)
    if stacks := [name for name, x in found.stock.named_parameters() if x.ndim == 3 and "experts" in name]:
        raise TargetError(
            f"{stacks[0]} holds the matrices of all experts. transformers loads experts of such a folder "
            "only if they are packed too, which is not done here. Export to mlx or gguf."
        )
    found.stock.config.quantization_config = quantization_entry(found.packed)
    with model_folder(found, destination, source=source, force=force) as folder:
        if found.low_ranks:
            dtypes = {
                name: layer.dtype for name, layer in model.named_modules() if isinstance(layer, NetworkModule)
            }
            write_adapter(folder, "adapter_model.safetensors", *peft_adapter(found.low_ranks, dtypes))
    return folder_report(found, destination)


def peft_adapter(
    low_ranks: Mapping[str, LowRank], dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Make the tensors and the configuration of a LoRA adapter in the format of PEFT.

    Args:
        low_ranks: the low ranks by layer.
        dtypes: dtype of each layer, in which a factor is stored if that is exact; else it is in float32.
    """
    tensors = {}
    for name, (left, right, _) in low_ranks.items():
        for part, factor in (("lora_A", right), ("lora_B", left)):
            short = factor.to(dtypes[name])
            exact = torch.equal(short.to(factor.dtype), factor)
            tensors[f"base_model.model.{name}.{part}.weight"] = short if exact else factor
    # PEFT scales the product of each layer by its alpha / rank. vLLM scales all by `lora_alpha / r`, and
    # takes ranks from the shapes. All these are 1.
    ranks = {name: x.rank for name, x in low_ranks.items()}
    config = {
        "peft_type": "LORA",
        "inference_mode": True,
        "target_modules": list(ranks),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }
    return tensors, config


def quantization_entry(packed: Mapping[str, str]) -> dict[str, Any]:
    """Build `quantization_config` of a checkpoint: one group of layers for each number format."""
    groups = {}
    for number, name in enumerate(sorted(set(packed.values()))):
        found = NumberFormat.parse(name)
        weights: dict[str, Any] = {"num_bits": found.bits, "type": "int", "symmetric": True}
        weights["strategy"] = "channel" if found.group is None else "group"
        if found.group is not None:
            weights["group_size"] = found.group
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


def _pack(matrix: IntegerMatrix, dtype: torch.dtype) -> Packed | str:
    """Make the tensors of one layer, or say why it is written dense."""
    bits, group = matrix.number_format.bits, matrix.number_format.group
    assert bits is not None
    points, scales = matrix.points, matrix.scales
    rows, columns = points.shape
    if group is not None and columns % group:
        return f"groups of {group} do not divide {columns} inputs"
    if torch.any(points % 1):  # int2 has zero between two codes; in half steps, its points are odd integers
        points, scales = 2 * points, scales / 2
    # Zero points move the codes, so that they may need more bits around a fixed zero.
    least, most = int(points.min()), int(points.max())
    while least < -(2 ** (bits - 1)) or most >= 2 ** (bits - 1):
        bits += 1
    if bits > 8:
        return f"its zero points give multiples of the scales from {least} to {most}; 8 bits hold -128 to 127"
    scale = scales.to(dtype)
    if not torch.equal(scale.to(scales.dtype), scales):
        return f"scales are not exact in {dtype}"
    tensors = {
        "weight_packed": words((points + 2 ** (bits - 1)).to(torch.uint8), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    return NumberFormat(bits, group), tensors

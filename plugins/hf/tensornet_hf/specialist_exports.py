"""Take specialists elsewhere: one as a LoRA adapter for another runtime, or all as a mixture of experts."""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tensornet.compression.apply import set_submodule
from tensornet.errors import DestinationError, TargetError
from tensornet.io import new_folder
from tensornet.nn.layer_kinds import kind_of
from tensornet_hf.exporters.base import LowRank
from tensornet_hf.exporters.compressed_tensors import peft_adapter
from tensornet_hf.exporters.gguf import export_gguf_adapter
from tensornet_hf.exporters.mlx import mlx_adapter
from tensornet_hf.feed_forwards import find_feed_forwards
from tensornet_hf.upcycling import UpcycleReport, upcycle
from tensornet_moe import LowRankDeltaExperts, SharedCoreMoE, Specialists

#: Formats of LoRA adapters, and who reads them.
TARGETS: Mapping[str, str] = {"peft": "PEFT and vLLM", "gguf": "llama.cpp", "mlx": "mlx-lm"}


@torch.no_grad()
def export_specialist(
    specialists: Specialists,
    name: str,
    destination: str | os.PathLike[str],
    *,
    target: str | None = None,
    source: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Write one specialist as a LoRA adapter; see `Specialists.export`."""
    path = Path(destination).expanduser().absolute()
    target = target or ("gguf" if path.suffix == ".gguf" else "peft")
    if target not in TARGETS:
        raise ValueError(f"Unknown target={target!r}; choose one of {', '.join(TARGETS)}.")
    low_ranks = _low_ranks(specialists, [name])[name]
    if target != "gguf" and path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not (path / "adapter_config.json").is_file():
            raise DestinationError(f"{path} is not the folder of an adapter. Choose another name.")
        if not force:
            raise DestinationError(f"{path} exists already. Choose another name, or use force=True.")
    trunk: Any = specialists.model
    if target == "gguf":
        plain = copy.deepcopy(trunk, {id(x): x for x in (*trunk.parameters(), *trunk.buffers())})
        Specialists(plain).detach()
        folder = None if source is None else Path(source)
        export_gguf_adapter(plain, low_ranks, path, source=folder, force=force)
        return path
    layers = {layer: specialists.layers[layer] for layer in low_ranks}
    transposed = {x: getattr(kind_of(y.base_layer), "name", "") == "conv1d" for x, y in layers.items()}
    if target == "mlx":
        if any(transposed.values()):
            raise TargetError(
                f"mlx-lm has no adapters for layers of the type Conv1D, such as {next(iter(transposed))}. "
                "Export to peft or gguf."
            )
        file, (tensors, config) = "adapters.safetensors", mlx_adapter(low_ranks)
    else:
        dtypes = {layer: module.weight.dtype for layer, module in layers.items()}
        file, (tensors, config) = "adapter_model.safetensors", peft_adapter(low_ranks, dtypes)
        origin = getattr(getattr(trunk, "config", None), "_name_or_path", None) or None
        config |= {"base_model_name_or_path": origin, "fan_in_fan_out": any(transposed.values())}
    with new_folder(path, force=force) as made:
        save_file({key: x.contiguous() for key, x in tensors.items()}, made / file, {"format": "pt"})
        (made / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def _low_ranks(specialists: Specialists, names: Sequence[str]) -> dict[str, dict[str, LowRank]]:
    """Return the changes of specialists by name and layer, as products of two matrices in float32.

    Raises:
        TargetError: an unknown name, or changes that are not of low rank.
    """
    found: dict[str, dict[str, LowRank]] = {}
    for name in names:
        specialists.tensors(name)  # raises an error if the name is unknown
        found[name] = {}
        for layer_name, layer in specialists.layers.items():
            left, right = (x.detach().float().cpu() for x in layer.factors(name))
            found[name][layer_name] = LowRank(left, right)
    return found


@torch.no_grad()
def merge_specialists(
    specialists: Specialists, names: Sequence[str] | None = None, **options: Any
) -> UpcycleReport:
    """Make specialists the experts of mixtures; see `Specialists.merge`."""
    model, chosen, layers = specialists.model, list(names or specialists.names), dict(specialists.layers)
    low_ranks = _low_ranks(specialists, chosen)
    if len(chosen) < 2:
        raise TargetError(f"A mixture needs at least two specialists; there are {chosen or 'none'}.")
    rank = max(low_rank.rank for each in low_ranks.values() for low_rank in each.values())
    Specialists.detach(specialists)  # the router stays until the mixture is complete
    try:
        networks = find_feed_forwards(model)
        places = {f"{x.names[0]}.{path}": (x, k) for x in networks for k, path in enumerate(x.paths)}
        if outside := [name for name in layers if name not in places]:
            raise TargetError(
                f"{len(outside)} of the layers with specialists, such as {outside[0]}, are not in dense "
                "feed-forward networks, which are all that a mixture replaces. Train specialists of these "
                f"only: target_modules={sorted({path for x in networks for path in x.paths})}."
            )
        touched = {places[name][0].names[0]: places[name][0] for name in layers}
        words = {"experts": len(chosen), "share": "base", "rank": rank, "target_modules": list(touched)}
        report = upcycle(model, **{"top_k": 1, **options, **words})
    except Exception:
        for name, layer in layers.items():
            set_submodule(model, name, layer)
        specialists.layers = layers
        raise
    for network_name, network in touched.items():
        path = network_name if network.inside is None else f"{network_name}.{network.inside[0]}"
        mixture = model.get_submodule(path)
        assert isinstance(mixture, SharedCoreMoE)
        experts: Any = mixture.experts
        for matrix, layer_path in zip(network.matrices, network.paths, strict=True):
            bank = experts.bank(matrix)
            assert isinstance(bank, LowRankDeltaExperts)
            bank.left.zero_()
            for expert, name in enumerate(chosen):
                low_rank = low_ranks[name].get(f"{network_name}.{layer_path}")
                if low_rank is not None:
                    bank.left[expert, :, : low_rank.rank] = low_rank.left.to(bank.left)
                    bank.right[expert, : low_rank.rank] = low_rank.right.to(bank.right)
    specialists.detach()
    model.requires_grad_(True)
    return report

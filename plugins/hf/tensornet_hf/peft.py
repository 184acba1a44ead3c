"""LoRA adapters on compressed layers, and specialists that share cores, for PEFT.

Typical use (for specialists, see `tensornet_hf.specialist_adapters`):

    config = lora_config(model, target_modules="all-linear", r=8)
    adapted = peft.get_peft_model(model, config)  # train it, then adapted.save_pretrained(folder)
    adapted = load_adapters(model, folder)
    model = merge_adapters(adapted)
"""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensornet._util import require

require(("peft",), extra="peft", user="LoRA on compressed layers")

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from transformers import PreTrainedModel

from tensornet.errors import TargetError
from tensornet.network import TensorNetwork
from tensornet.nn import TensorNetworkLinear
from tensornet.nn.extension import structure_changed
from tensornet.nn.layer_kinds import carry_hooks, kind_of, layer_bias, layer_kind
from tensornet.nn.linear import empty_linear, linear_from_network
from tensornet.nn.storage import encode
from tensornet.nn.targets import compressed_names, split_by_adapters
from tensornet.topologies import topology_family
from tensornet.topology import Topology
from tensornet_hf.specialist_adapters import SpecialistsConfig

__all__ = ["SpecialistsConfig", "load_adapters", "lora_config", "merge_adapters"]

ALL_LINEAR = "all-linear"
#: Values of `init_lora_weights` that do not change the base layer.
STARTS = (True, False, "gaussian", "orthogonal")


class LoraNetworkLinear(nn.Module, LoraLayer):
    """Compressed linear layer with LoRA adapters: `y = W x + b + s B A x`, summed over active adapters.

    An adapter of rank `a` can be merged into a layer of rank `r`. The result is exact and has rank `r + a`.
    If the topology family cannot increase the rank (`TopologyFamily.with_rank`), the result is a dense layer.
    Integer cores are rounded again, with a warning. If the topology is a sum, only its last term changes.
    """

    merges_into_cores = True  # see `tensornet.nn.targets`

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *, config: LoraConfig, **options: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self._unmerged: nn.Module | None = None
        rank, alpha = options.pop("r", config.r), options.pop("lora_alpha", config.lora_alpha)
        self.update_layer(adapter_name, rank, lora_alpha=alpha, config=config, **options)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter to the layer; the arguments are those of PEFT's `LoraLayer.update_layer`.

        Raises:
            TargetError: an option needs the dense weight, or is not supported by `forward`.
        """
        if config.use_dora:
            raise TargetError("DoRA needs the norms of a dense weight; use plain LoRA on compressed layers.")
        if config.lora_bias:
            raise TargetError(
                "lora_bias=True is not supported for compressed layers; use bias='all' to train their biases."
            )
        if config.init_lora_weights not in STARTS:
            raise TargetError(
                f"init_lora_weights={config.init_lora_weights!r} decomposes the dense weight, which a "
                f"compressed layer does not have; choose one of {', '.join(map(repr, STARTS))}."
            )
        LoraLayer.update_layer(self, adapter_name, r, lora_alpha, config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Return the input and output sizes of a layer, which PEFT would otherwise guess with a warning."""
        assert isinstance(module, TensorNetworkLinear)
        return module.in_features, module.out_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `x: (..., in_features)` to `(..., out_features)`."""
        self._check_forward_args(x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.lora_A:
                down: Any = self.lora_A[name]
                up: Any = self.lora_B[name]
                hidden = down(self.lora_dropout[name](x.to(down.weight.dtype)))
                result = result + (up(hidden) * self.scaling[name]).to(result.dtype)
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update `s B A` of an adapter, shape `(out_features, in_features)`."""
        up: Any = self.lora_B[adapter]
        down: Any = self.lora_A[adapter]
        delta: Tensor = up.weight @ down.weight * self.scaling[adapter]
        return delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (by default the active ones) into the layer; `unmerge` restores it.

        Raises:
            ValueError: an adapter contains NaN or infinity.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base, total, rank = self.get_base_layer(), torch.zeros(()), 0
        for name in names:
            delta = self.get_delta_weight(name)
            if not bool(torch.isfinite(delta).all()):
                raise ValueError(f"Adapter {name!r} contains NaN or infinity, so it cannot be merged.")
            total, rank = total.to(delta) + delta, rank + self.r[name]
        self._unmerged = self._unmerged or base
        self.base_layer = _with_delta(base, total, rank)
        carry_hooks(base, self.base_layer)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the layer as it was before merging."""
        if self._unmerged is not None:
            self.base_layer, self._unmerged = self._unmerged, None
        self.merged_adapters.clear()


def lora_config(
    model: nn.Module, *, target_modules: str | list[str] = ALL_LINEAR, **options: Any
) -> LoraConfig:
    """Build a LoRA configuration of PEFT that also supports compressed layers.

    PEFT does not record in the adapter's files that layers are compressed. So use `load_adapters` to load
    adapters.

    Args:
        model: a compressed or dense model.
        target_modules: layers to adapt, as in PEFT; `"all-linear"` selects dense and compressed linear layers
            except the output head.
        options: further arguments of `LoraConfig`.

    Raises:
        TargetError: `target_modules` is `"all-linear"`, but the model has no linear layer.

    Example:
        >>> from peft import get_peft_model
        >>> from tensornet_hf.peft import lora_config
        >>> model = th.load(th.embedded.gpt2_path())
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, method="svd")
        >>> _ = tn.compress(model, config, progress=False)
        >>> adapted = get_peft_model(model, lora_config(model, target_modules=["c_fc"], r=4))
        >>> adapted.get_nb_trainable_parameters()[0] > 0
        True
    """
    if target_modules == ALL_LINEAR:  # PEFT itself would find only dense layers
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        target_modules = []
        for name, module in model.named_modules():
            kind = kind_of(module)
            linear = kind.name != "embedding" if kind is not None else isinstance(module, TensorNetworkLinear)
            if linear and module is not head:
                target_modules.append(name)
        if not target_modules:
            raise TargetError(f"{type(model).__name__} has no linear layer, neither dense nor compressed.")
    return _registered(LoraConfig(target_modules=target_modules, **options))


def _registered(config: LoraConfig) -> LoraConfig:
    """Register the class of compressed layers with a LoRA configuration, and return the configuration."""
    # This method is private, but it is the only way to register layer classes with PEFT.
    config._register_custom_module({TensorNetworkLinear: LoraNetworkLinear})
    return config


def load_adapters(model: PreTrainedModel, folder: str | Path, **options: Any) -> PeftModel:
    """Load adapters from a folder written by PEFT and attach them to a compressed model.

    Args:
        model: a model with the same layers as the model on which the adapters were trained.
        folder: folder written by `PeftModel.save_pretrained`.
        options: passed to `PeftModel.from_pretrained`, for example `is_trainable=True`.

    Example:
        >>> from peft import get_peft_model
        >>> from tensornet_hf.peft import load_adapters, lora_config
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, method="svd")
        >>> _ = th.compress_folder(th.embedded.gpt2_path(), "small", config)
        >>> model = th.load("small")
        >>> adapted = get_peft_model(model, lora_config(model, target_modules=["c_fc"], r=4))
        >>> adapted.save_pretrained("adapters")
        >>> load_adapters(th.load("small"), "adapters").active_adapter
        'default'
    """
    config = PeftConfig.from_pretrained(str(folder))
    if isinstance(config, LoraConfig):
        _registered(config)
    return PeftModel.from_pretrained(model, str(folder), config=config, **options)


def merge_adapters(adapted: PeftModel) -> PreTrainedModel:
    """Merge all adapters into the compressed layers and return the model without adapters.

    Raises:
        TargetError: the adapter of a compressed layer can only be merged into a dense weight; nothing was
            merged.

    Example:
        >>> from peft import get_peft_model
        >>> from tensornet_hf.peft import lora_config, merge_adapters
        >>> model = th.load(th.embedded.gpt2_path())
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, method="svd")
        >>> _ = tn.compress(model, config, progress=False)
        >>> adapted = get_peft_model(model, lora_config(model, target_modules=["c_fc"], r=4))
        >>> type(merge_adapters(adapted)).__name__
        'GPT2LMHeadModel'
    """
    _, wrapped = split_by_adapters(adapted, compressed_names(adapted))
    if wrapped:
        raise TargetError(
            f"{min(wrapped)} is compressed, but its adapter can only be merged into a dense weight. Call "
            "tensornet.decompress(adapted) before merging, or configure adapters of compressed models with "
            "tensornet_hf.peft.lora_config."
        )
    model = adapted.merge_and_unload()
    structure_changed(model)
    assert isinstance(model, PreTrainedModel)
    return model


def _with_delta(base: nn.Module, delta: Tensor, added: int) -> nn.Module:
    """Build a layer like `base` with `delta` added to the matrix; `added` limits the rank of `delta`."""
    if (kind := kind_of(base)) is not None:  # an earlier merge made the layer dense
        matrix = kind.matrix(base)
        return kind.build(matrix + delta.to(matrix), layer_bias(base))
    assert isinstance(base, TensorNetworkLinear)
    matrix = base.to_matrix()
    delta = delta.to(matrix)
    family = topology_family(base.topology.family)
    topology = family.with_rank(base.topology, added)
    if topology is None:
        return layer_kind(base.source).build(matrix + delta, base.bias)
    _, changed = base.topology.parts[-1]
    if any(base.storage.format_of(core).is_integer for core in changed.core_names):
        warnings.warn(
            "Merging rounds integer cores again, so outputs change a little. Keep the adapters separate from "
            "the model to get exactly the trained outputs.",
            stacklevel=3,
        )
    if topology.terms:
        return _with_last_term(base, topology, delta)
    matrix = matrix + delta
    network = family.decompose_to(matrix, topology).network.to(matrix.dtype)
    storage = base.storage
    return linear_from_network(
        network, bias=base.bias, source=base.source, strategy=base.strategy, storage=storage
    )


def _with_last_term(base: TensorNetworkLinear, topology: Topology, delta: Tensor) -> nn.Module:
    """Build a layer like `base`, whose matrix is a sum of networks, and add `delta` to the last network."""
    (places, old), (_, new) = base.topology.parts[-1], topology.parts[-1]
    cores, storage = base.cores, base.storage
    own = TensorNetwork(old, [cores[k] for k in places]).to_matrix()
    network = topology_family(new.family).decompose_to(own + delta, new).network.to(delta.dtype)
    formats = tuple((name, each) for name, each in storage.core_formats if name in new.core_names)
    stored = {
        f"core_{name}": copy.deepcopy(getattr(base, f"core_{name}"))
        for name in topology.core_names
        if name not in new.core_names
    }
    stored |= encode(new, replace(storage, core_formats=formats), network.cores)
    layer = empty_linear(
        topology,
        bias=False,
        source=base.source,
        strategy=base.strategy,
        storage=storage,
        device="meta",
        dtype=base.weight.dtype,
    )
    layer.set_stored(stored, base.bias if base.bias is not None else delta)
    if base.bias is not None:
        layer.bias = nn.Parameter(base.bias.detach().clone())
    return layer

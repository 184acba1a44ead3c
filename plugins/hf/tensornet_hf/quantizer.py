"""The quantization method "tensornet": how transformers loads and saves compressed models.

transformers asks the quantizer of a model three things. Before weights are loaded, it replaces layers of the
skeleton by uninitialized compressed ones, so that nothing dense is ever allocated. After loading it checks
that every core arrived, or compresses a model that was stored dense. When the model is saved, it gives the
tensors to write, and their description for `config.json`.
"""

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging

from tensornet.compression.apply import decompress
from tensornet.compression.compress import compress
from tensornet.errors import FormatError, NonFiniteError, TargetError
from tensornet.io import read_headers
from tensornet.nn.layer_kinds import kind_of
from tensornet.nn.module import NetworkModule, build_module
from tensornet.nn.storage import PackedCore, tie
from tensornet.nn.unfuse import fuse, unfuse
from tensornet_hf.aux_losses import join_aux_losses
from tensornet_hf.description import (
    GUARD_SHAPE,
    METHOD,
    TensorNetworkConfig,
    check_layers,
    describe,
    is_inside,
    replaced_names,
    without_guards,
)
from tensornet_hf.upcycling import make_room
from tensornet_moe.experimental.parallel import ParallelExperts
from tensornet_moe.tied import lend_shared_cores


class TensorNetworkQuantizer(HfQuantizer):
    """Quantizer of transformers that loads cores into compressed modules, or compresses dense weights.

    transformers makes one for each model that it loads, and `prepare_for_saving` one for each model that is
    compressed in memory.

    Args:
        quantization_config: description of the compressed modules.
        experts_spread: the experts of the model are spread over processes.
        kwargs: passed by transformers.
    """

    quantization_config: TensorNetworkConfig

    def __init__(
        self, quantization_config: TensorNetworkConfig, *, experts_spread: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(quantization_config, **kwargs)
        self.experts_spread = experts_spread
        self._layers: list[str] = []
        self._stored: tuple[str, ...] = ()
        self._tied_buffers: dict[str, str] = {}

    def is_serializable(self) -> bool:
        """Return True: every compressed model can be saved.

        Raises:
            TargetError: experts are spread over processes, so that this one does not have them all.
        """
        if self.experts_spread:
            raise TargetError(
                "The experts of this model are spread over processes, and one process writes the files. Call "
                "gather_experts(model) of tensornet_moe.experimental.parallel on every process first. For "
                "Trainer gather them too, or shard the model with FSDP; or train spread experts in a loop of "
                "your own (docs/guides/scale.md)."
            )
        return True

    @property
    def is_trainable(self) -> bool:
        """True, since cores are ordinary parameters.

        `Trainer` asks before it trains, and writes checkpoints from one process.

        Raises:
            TargetError: as `is_serializable`.
        """
        return self.is_serializable()

    @property
    def is_qat_trainable(self) -> bool:
        """True: otherwise `Trainer` demands an adapter."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: contractions are plain tensor code, and a trace takes their plan as a constant."""
        return True

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Replace stock layers of a skeleton by uninitialized compressed ones, on the meta device.

        Raises:
            FormatError: the weights are pickles, or the description does not fit them or the model.
            TargetError: the model is to be spread over devices in a way that cuts compressed layers.
        """
        files = [Path(file) for file in checkpoint_files or []]
        if pickles := [file.name for file in files if file.suffix != ".safetensors"]:
            raise FormatError(
                f"{', '.join(pickles)}: only safetensors files are loaded, pickles can run code when they "
                "are opened. Convert the model where you trust it, with model.save_pretrained(folder)."
            )
        if not self.pre_quantized:
            return
        layers = self.quantization_config.layers
        _refuse_cuts(model, layers)
        headers = read_headers(files)
        stored = without_guards(headers)
        self._stored = tuple(stored)
        if files:
            check_layers(self.quantization_config, stored, where=str(files[0].parent))
        # Private: transformers has no public list of names that are in the file but not in the model.
        guards = {name.removeprefix(f"{model.base_model_prefix}.") for name in headers.keys() - stored.keys()}
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {rf"(^|\.){re.escape(x)}$" for x in guards}

        unfuse(model, inside=[name for layer in layers for name in _possible_names(model, layer)])
        names = _place_layers(model, layers, dtype=dtype)
        self._layers = list(names.values())
        remove_dense_ties(model, self._layers, stored=set(stored) if files else None)
        for target, source in self.quantization_config.ties.items():
            name, owner = _renamed(target, names, layers), _renamed(source, names, layers)
            if name is None or owner is None:
                continue
            path, _, key = name.rpartition(".")
            module = model.get_submodule(path)
            if key in dict(module.named_parameters(recurse=False)):
                # transformers itself ties parameters that are listed here, and expects them in no file.
                model.all_tied_weights_keys[name] = owner
            else:  # a buffer is expected nowhere once it is an ordinary attribute
                buffer = getattr(module, key)
                delattr(module, key)
                vars(module)[key] = buffer
                self._tied_buffers[name] = owner

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Disable renaming for stored names that fit the model already: the renamings are for other folders.

        A compressed model is saved under the names of its class. Those of Qwen2-VL, for one, would be taken
        for names of an older version by the class without a head.
        """
        if not self.pre_quantized:
            return weight_conversions
        renamings = [x for x in weight_conversions if isinstance(x, WeightRenaming)]
        converters = [x for x in weight_conversions if isinstance(x, WeightConverter)]
        state, prefix = model.state_dict(), model.base_model_prefix

        def fitting(renamings: list[Any], converters: list[Any]) -> int:
            names = (rename_source_key(x, renamings, converters, prefix, state)[0] for x in self._stored)
            return sum(name in state for name in names)

        return [] if fitting([], []) >= fitting(renamings, converters) else weight_conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check that every core was loaded, or compress the model if its weights were stored dense.

        Raises:
            FormatError: a core is missing, which transformers reports and fills with random numbers.
            NonFiniteError: a core contains NaN or infinity.
        """
        compression = self.quantization_config.compression
        if not self.pre_quantized:
            options = self.quantization_config.compression_config
            compress(model, options, progress=logging.is_progress_bar_enabled())
            prepare_for_saving(model, compression=compression)
            return
        for name, owner in self._tied_buffers.items():
            tie(model, name, owner)
        layers = set(self._layers)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not is_inside(name, layers):
                continue
            # Private, and the only mark that transformers leaves on what it loaded.
            if not getattr(tensor, "_is_hf_initialized", False):
                raise FormatError(f"{name} was not among the weights that were given; every core is needed.")
            if isinstance(tensor, nn.Parameter) and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"{name} contains NaN or infinity. The file is damaged, or was saved from a model whose "
                    "training diverged."
                )
        for name in self._layers:
            for part, module in model.get_submodule(name).named_modules(prefix=name):
                if isinstance(module, PackedCore):
                    module.check_finite(part)
        prepare_for_saving(model, compression=compression)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict]:
        """Return the tensors to save, each once, and guards; called before the configuration is written."""
        # Layers may have been replaced by hand since the model was described.
        prepare_for_saving(model)
        if not hasattr(model, "hf_quantizer"):  # all layers are dense again
            return None, {}
        config: TensorNetworkConfig = model.config.quantization_config
        # Private: transformers would rename the tensors, and join experts, as in the files of dense models.
        model._weight_conversions = []  # type: ignore[assignment]
        tensors = {name: x for name, x in model.state_dict().items() if name not in config.ties}
        replaced = replaced_names(_dense_names(model, config), tensors | config.ties, config.layers)
        guards = {name: torch.empty(GUARD_SHAPE, dtype=model.dtype, device="cpu") for name in replaced}
        return tensors | guards, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Implement `model.dequantize()`."""
        decompress(model)
        return model


register_quantization_config(METHOD)(TensorNetworkConfig)
register_quantizer(METHOD)(TensorNetworkQuantizer)


def prepare_for_saving(model: nn.Module, *, compression: Mapping[str, Any] | None = None) -> bool:
    """Give the transformers models in a module a quantizer, or take it away if they are dense again.

    Everything of the library that replaces layers calls this, and `tensornet_hf.save` does. After it
    `save_pretrained`, `Trainer` and the rest of transformers treat the models as quantized.

    Args:
        model: a transformers model, or a module that contains some.
        compression: options to record, see `TensorNetworkConfig`; those recorded before if absent.

    Returns:
        True if there is such a model.
    """
    if not isinstance(model, PreTrainedModel):
        found = [prepare_for_saving(child, compression=compression) for child in model.children()]
        return any(found)
    if any(isinstance(part, ParallelExperts) for part in model.modules()):  # which cannot be described
        quantizer = TensorNetworkQuantizer(TensorNetworkConfig(), experts_spread=True)
        model.hf_quantizer = quantizer  # type: ignore[assignment]
        return True
    fuse(model)
    before = getattr(model, "hf_quantizer", None)
    if compression is None and isinstance(before, TensorNetworkQuantizer):
        compression = before.quantization_config.compression
    config = describe(model, compression=compression)
    if config.layers:
        model.hf_quantizer = TensorNetworkQuantizer(config)  # type: ignore[assignment]
        model.is_quantized = False  # type: ignore[assignment]  # the flag would only forbid .half() and .float()
        model.config.quantization_config = config
        remove_dense_ties(model, config.layers)
        join_aux_losses(model)
    elif isinstance(before, TensorNetworkQuantizer):
        before.remove_quantization_config(model)
        restore_dense_ties(model)
    return True


def _dense_names(model: PreTrainedModel, config: TensorNetworkConfig) -> Iterable[str]:
    """Return the names of all tensors of the dense model of this class and configuration."""
    try:
        with torch.device("meta"), no_init_weights():
            return tuple(type(model)(copy.deepcopy(model.config)).state_dict())
    except Exception:  # classes that compute while they are built, or that take more than a configuration
        return tuple(f"{layer}.weight" for layer in config.layers)


# --- skeletons ------------------------------------------------------------------------------------------


def _place_layers(
    model: PreTrainedModel, layers: Mapping[str, Any], *, dtype: torch.dtype | None
) -> dict[str, str]:
    """Replace modules of a skeleton by uninitialized ones built from descriptions.

    Args:
        model: on the meta device; changed in place.
        layers: descriptions by the name in the model that was saved.
        dtype: dtype of the new parameters.

    Returns:
        Name in this model of each module, by its name in the saved one. Another class than the saved one
        (with another head, or none) lacks some, which are then left out.

    Raises:
        FormatError: a module has no place in the model, or does not fit there.
    """
    make_room(model, layers)
    places = dict(model.named_modules(remove_duplicate=False))
    found = {layer: [x for x in _possible_names(model, layer) if x in places] for layer in layers}
    names = {layer: present[0] for layer, present in found.items() if present}
    saved_as = getattr(model.config, "architectures", None) or []
    absent = [layer for layer in layers if layer not in names]
    if absent and (not names or type(model).__name__ in saved_as):
        raise FormatError(
            f"{type(model).__name__} has no module {absent[0]!r}, which quantization_config describes; it "
            f"was saved as {', '.join(saved_as) or 'an unknown class'}."
        )
    built = {layer: build_module(layers[layer], device="meta", dtype=dtype) for layer in names}
    for layer, name in names.items():
        if isinstance(made := built[layer], NetworkModule):
            _check_place(name, places[name], layers[layer], made)
    for layer, name in names.items():
        # Every core is loaded, so the model's class has nothing to initialize: not in these modules, and not
        # in one that contains them, no tensor of its own (Funnel's embeddings would cut a row out of the
        # table) and no buffer further inside (Falcon-H1 computes those of its blocks there). The mark is
        # private, and the only one that transformers looks for.
        parent = places[name.rpartition(".")[0]]
        bare = next(chain(parent.parameters(recurse=False), parent.buffers()), None) is None
        for part in (*built[layer].modules(), *([parent] if bare else [])):
            part._is_hf_initialized = True
        model.set_submodule(name, built[layer])
    lend_shared_cores(model)
    return names


def _possible_names(model: PreTrainedModel, layer: str) -> tuple[str, str, str]:
    """Return a name as it is, with and without the prefix of the base model, which depends on the head."""
    prefix = f"{model.base_model_prefix}."
    return layer, prefix + layer, layer.removeprefix(prefix)


def _check_place(name: str, module: nn.Module, spec: Mapping[str, Any], made: NetworkModule) -> None:
    """Raise FormatError unless a described linear layer or embedding fits the layer in its place."""
    kind = kind_of(module)
    if kind is None or kind.name != spec.get("source"):
        raise FormatError(
            f"quantization_config describes {name!r} in place of a {spec.get('source')!r} layer, the "
            f"model has a {type(module).__name__} there."
        )
    if tuple(kind.matrix(module).shape) != made.topology.shape:
        raise FormatError(
            f"quantization_config describes {name!r} with shape {list(made.topology.shape)}, the model has "
            f"shape {list(kind.matrix(module).shape)} there (out_features, in_features)."
        )


def _renamed(tensor: str, names: Mapping[str, str], layers: Collection[str]) -> str | None:
    """Translate a tensor's name in the saved model to this model; None if its layer does not exist here."""
    ends = (end for end, letter in enumerate(tensor) if letter == ".")
    layer = next((tensor[:end] for end in ends if tensor[:end] in layers), None)
    if layer is None:
        return tensor
    return names[layer] + tensor[len(layer) :] if layer in names else None


def _refuse_cuts(model: PreTrainedModel, layers: Mapping[str, Any]) -> None:
    """Raise TargetError if a `DistributedConfig` would cut compressed layers.

    FSDP shards any parameter. Tensor parallelism cuts weights into rows or columns, and expert parallelism
    cuts stacks of experts; a layer of cores has neither.
    """
    config: Any = getattr(model.config, "distributed_config", None)
    if config is None:
        return
    for name, spec in layers.items():
        single, mixture = spec["type"] in ("linear", "embedding"), spec["type"].startswith("shared_core")
        if (single and config.tp_size > 1) or (mixture and config.ep_size > 1):
            raise TargetError(
                f"{name} is made of cores, which neither tensor nor expert parallelism of transformers can "
                "cut. Spread the model with DistributedConfig(fsdp_size=...) instead, or load it whole and "
                "spread experts that share cores with shard_experts(model) of "
                "tensornet_moe.experimental.parallel (docs/guides/scale.md)."
            )


# --- ties -----------------------------------------------------------------------------------------------


def remove_dense_ties(
    model: PreTrainedModel, layers: Iterable[str], *, stored: Collection[str] | None = None
) -> None:
    """Remove ties with weights of compressed modules from the lists of transformers, in place.

    transformers keeps ties as pairs of names, `{target: source}`, in `all_tied_weights_keys`, and looks for
    them again in `_tied_weights_keys` of every model inside when `tie_weights` is called. That attribute is
    private, but a pair that stayed there would make `tie_weights` ask for a weight that no longer exists.

    Args:
        model: compressed, or a skeleton about to be loaded.
        layers: names of the compressed modules.
        stored: names of the stored tensors; only for a skeleton.

    Raises:
        FormatError: a head would be tied to a compressed table, and is not stored.
    """
    names = set(layers)
    pairs = dict(model.all_tied_weights_keys)
    for target, source in pairs.items():
        if stored is None or target in stored or is_inside(target, names) or not is_inside(source, names):
            continue
        raise FormatError(
            f"{target} of {type(model).__name__} would be the table {source.removesuffix('.weight')}, which "
            "is made of cores here, and no head was saved. Load the model without a head (AutoModel), or "
            "compress and save the class that has one."
        )
    kept = {t: s for t, s in pairs.items() if not is_inside(t, names) and not is_inside(s, names)}
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._tied_weights_keys:
            part._tied_weights_keys = kept if part is model else {}
    model.all_tied_weights_keys = kept


def restore_dense_ties(model: PreTrainedModel) -> None:
    """Restore the lists of ties of a model that is dense again."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            vars(part).pop("_tied_weights_keys", None)
    get = model.get_parameter_or_buffer
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    # A configuration may claim ties that the weights do not have (T5 v1.1).
    model.all_tied_weights_keys = {t: s for t, s in pairs.items() if get(t) is get(s)}

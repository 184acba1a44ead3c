"""The quantization method "tensornet": how transformers loads and saves compressed models."""

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging

from tensornet.compression import compress, decompress
from tensornet.errors import FormatError, TargetError
from tensornet.nn.fixed_dtypes import FixedDtypes
from tensornet.nn.unfuse import fuse, unfuse
from tensornet_hf.checkpoint import ties
from tensornet_hf.checkpoint.attach import attach, detach, is_attached
from tensornet_hf.checkpoint.describe import describe, is_inside, layer_descriptions
from tensornet_hf.checkpoint.guards import make_guards, pass_by_guards, without_guards
from tensornet_hf.checkpoint.headers import check_layers, read_headers
from tensornet_hf.checkpoint.parallelism import check_distribution
from tensornet_hf.checkpoint.placement import place_layers, rename
from tensornet_hf.checkpoint.quantization_config import METHOD, TensorNetworkConfig
from tensornet_hf.moe.aux_losses import join_aux_losses
from tensornet_moe.experimental.parallel import ParallelExperts


class TensorNetworkQuantizer(HfQuantizer):
    """Quantizer of transformers that loads cores into compressed modules, or compresses dense weights.

    transformers makes one for each model it loads, and `tensornet.compress` one for each model it compresses.
    """

    quantization_config: TensorNetworkConfig

    def __init__(self, quantization_config: TensorNetworkConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._ties: dict[str, str] = {}
        self._layers: list[str] = []
        self._stored: tuple[str, ...] = ()
        self._experts_spread = False
        #: A weak reference: the model holds this quantizer, and a cycle would keep unused weights in memory.
        self._skeleton: weakref.ref[PreTrainedModel] | None = None

    @property
    def is_trainable(self) -> bool:
        """True, since cores are ordinary parameters; `Trainer` asks before it trains.

        Raises:
            TargetError: experts are spread over processes, and `Trainer` saves from one.
        """
        if self._experts_spread:
            raise TargetError(
                "The experts of this model are spread over processes, and Trainer writes checkpoints from "
                "one process, which does not hold them all. Call gather_experts(model) of "
                "tensornet_moe.experimental.parallel and let Trainer train every expert on every process (or "
                "shard them with FSDP); or train spread experts in a loop of your own (docs/guides/scale.md)."
            )
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: otherwise `Trainer` demands an adapter."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: contractions are plain tensor code, and a trace takes their plan as a constant."""
        return True

    def is_serializable(self) -> bool:
        """Return True: every compressed model can be saved."""
        return True

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Replace stock layers by uninitialized compressed ones on the meta device."""
        files = [Path(file) for file in checkpoint_files or []]
        if pickles := [file.name for file in files if file.suffix != ".safetensors"]:
            raise FormatError(
                f"{', '.join(pickles)}: only safetensors files are loaded, pickles can run code when they "
                "are opened. Convert the model where you trust it, with model.save_pretrained(folder)."
            )
        self._skeleton = weakref.ref(model)
        if not self.pre_quantized:
            return
        config = self.quantization_config
        headers = read_headers(files)
        stored = without_guards(headers)
        self._stored = tuple(stored)
        pass_by_guards(model, headers.keys() - stored.keys())
        if files:
            check_layers(config, stored, where=str(files[0].parent))
        prefix = f"{model.base_model_prefix}."  # with or without it: it depends on the head
        unfuse(model, inside=[y for x in config.layers for y in (x, prefix + x, x.removeprefix(prefix))])
        names = place_layers(model, config.layers, dtype=dtype)
        check_distribution(model, {name: config.layers[layer] for layer, name in names.items()})
        self._layers = list(names.values())
        if files:
            _refuse_random_head(model, self._layers, stored)
        known = config.layers.keys()
        renamed = {rename(k, names, known): rename(v, names, known) for k, v in config.ties.items()}
        self._ties = {k: v for k, v in renamed.items() if k and v and is_inside(k, self._layers)}
        ties.hand_over(model, self._layers, {}, loading=True)
        ties.detach_targets(model, self._ties)

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Disable renaming for stored names that fit the model already: the renamings are for other folders.

        A compressed model is saved under the names of its class. Those of Qwen2-VL, for one, would be taken
        for names of an older version by the class without a head.
        """
        # transformers before 5.21 does not hand the model over.
        model = self._skeleton() if model is None and self._skeleton is not None else model
        if not self.pre_quantized or model is None:
            return weight_conversions
        renamings = [x for x in weight_conversions if isinstance(x, WeightRenaming)]
        converters = [x for x in weight_conversions if isinstance(x, WeightConverter)]
        state, prefix = model.state_dict(), model.base_model_prefix

        def fitting(renamings: list[Any], converters: list[Any]) -> int:
            names = (rename_source_key(x, renamings, converters, prefix, state)[0] for x in self._stored)
            return sum(name in state for name in names)

        if state.keys() >= set(self._stored) or fitting([], []) >= fitting(renamings, converters):
            return []
        return weight_conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Tie shared cores, and compress the model if its weights were stored dense."""
        self._skeleton = None  # weak references cannot be pickled
        if not self.pre_quantized:
            detach(model)  # what `postprocess_model` put on describes nothing yet
            options = self.quantization_config.compression_config
            compress(model, options, progress=logging.is_progress_bar_enabled())
            _prepare(model, compression=self.quantization_config.compression)
            return
        _refuse_unloaded(model, self._layers)
        ties.attach_targets(model, self._ties)
        for name in self._layers:
            for part, module in model.get_submodule(name).named_modules(prefix=name):
                if isinstance(module, FixedDtypes):
                    module.check_finite_scales(part)
        _prepare(model, compression=self.quantization_config.compression)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict]:
        """Return the tensors to save, each once; called before the configuration is written."""
        config = describe(model, compression=self.quantization_config.compression)
        if not config.layers:
            detach(model)
            return None, {}
        self.quantization_config = config
        attach(model, config, self)
        tensors = {k: v for k, v in model.state_dict().items() if k not in config.ties}
        return tensors | make_guards(model, config), {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Implement `model.dequantize()`."""
        decompress(model)
        return model


def prepare_for_saving(model: nn.Module) -> bool:
    """Update the description with which a Hugging Face model is saved, compressed or not.

    `tensornet.compress`, `tensornet.decompress` and `tensornet_hf.upcycle` do this themselves. Call it after
    replacing layers by hand.

    Args:
        model: a Hugging Face model, or a module that holds one.

    Returns:
        True if there was a Hugging Face model.

    Example:
        >>> model = th.load(th.embedded.gpt2_path())
        >>> mlp = model.transformer.h[0].mlp
        >>> mlp.c_fc = tn.nn.MPOLinear.from_linear(mlp.c_fc, max_bond=16)  # replaced by hand
        >>> th.prepare_for_saving(model)
        True
    """
    found = _outermost(model)
    for part in found:
        _prepare(part)
    return bool(found)


def is_described(model: nn.Module) -> bool:
    """Return True if there are transformers models in a module, and all are saved with their descriptions.

    A model inside another one does not count, unless both share the configuration: the outer one is saved.
    """
    found = _outermost(model)
    return bool(found) and all(is_attached(x) or _shares_description(x) for x in found)


def _shares_description(model: PreTrainedModel) -> bool:
    """Return True if a model inside this one put a description of all layers into their configuration."""
    config, prefix = getattr(model.config, "quantization_config", None), f"{model.base_model_prefix}."
    if not isinstance(config, TensorNetworkConfig):
        return False
    known = {name.removeprefix(prefix) for name in config.layers}
    return all(name.removeprefix(prefix) in known for name in layer_descriptions(model))


def _prepare(model: PreTrainedModel, compression: dict[str, Any] | None = None) -> None:
    if any(isinstance(part, ParallelExperts) for part in model.modules()):
        # Not to be described, hence not saved, until they are gathered.
        quantizer = TensorNetworkQuantizer(TensorNetworkConfig())
        quantizer._experts_spread = True
        model.hf_quantizer = quantizer  # type: ignore[assignment]
        return
    fuse(model)
    config = describe(model, compression=compression)
    if config.layers:
        attach(model, config, TensorNetworkQuantizer(config))
        join_aux_losses(model)
    elif isinstance(getattr(model, "hf_quantizer", None), TensorNetworkQuantizer):
        detach(model)


def _outermost(module: nn.Module) -> list[PreTrainedModel]:
    if isinstance(module, PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in _outermost(child)]


def _refuse_random_head(model: PreTrainedModel, layers: list[str], stored: Iterable[str]) -> None:
    """Raise FormatError if the head was tied to a table of cores and the checkpoint holds none."""
    stored = set(stored)
    for target, source in model.all_tied_weights_keys.items():
        if is_inside(source, set(layers)) and not is_inside(target, set(layers)) and target not in stored:
            raise FormatError(
                f"{target} of {type(model).__name__} would be the table {source.removesuffix('.weight')}, "
                "which is made of cores here, and no head was saved. Load the model without a head "
                "(AutoModel), or compress and save the class that has one."
            )


def _refuse_unloaded(model: PreTrainedModel, layers: list[str]) -> None:
    """Raise FormatError for a missing core, which transformers reports and then fills with random numbers."""
    compressed = set(layers)
    for name, tensor in model.state_dict(keep_vars=True).items():
        # Set by transformers on everything that it loaded.
        if is_inside(name, compressed) and not getattr(tensor, "_is_hf_initialized", False):
            raise FormatError(f"{name} was not among the weights that were given; every core is needed.")


register_quantization_config(METHOD)(TensorNetworkConfig)
register_quantizer(METHOD)(TensorNetworkQuantizer)

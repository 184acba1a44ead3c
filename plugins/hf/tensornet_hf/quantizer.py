"""The quantization method "tensornet", by which transformers saves and loads compressed models.

The entry `quantization_config` in `config.json` describes every compressed module and lists shared tensors,
which are stored once. It determines the names, shapes and dtypes of all tensors of these modules.

transformers calls the quantizer of a model at three points:

- Before weights are loaded, the quantizer compares the description with the headers of the weight files. It
  replaces layers of the empty model by uninitialized compressed layers, so that no dense weight is allocated.
- After loading, it checks that every core was loaded, or compresses a model that was stored dense.
- When the model is saved, it returns the tensors to write and updates the description.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from tensornet.compression.apply import decompress
from tensornet.compression.compress import compress
from tensornet.compression.config import CompressionConfig
from tensornet.errors import FormatError, NonFiniteError, TargetError
from tensornet.io import FLOATS, MAPPED, Slice, read_headers
from tensornet.nn.layer_kinds import kind_of
from tensornet.nn.module import NetworkModule, build_module, module_spec
from tensornet.nn.storage import PackedCore, tie
from tensornet.nn.unfuse import fuse, unfuse
from tensornet_hf.aux_losses import join_aux_losses, joins_aux_losses
from tensornet_moe.experimental.parallel import ParallelExperts
from tensornet_moe.pool import connect_pools, find_pools

QUANT_METHOD = "tensornet"
FORMAT_VERSION = 1
LOAD_WITH = "import tensornet_hf, then AutoModel...from_pretrained(folder) or tensornet_hf.load(folder)"
#: Shape of a guard (see `replaced_names`). No weight is empty, so a guard cannot be taken for a weight.
GUARD_SHAPE = (0,)
#: Maps the name of a dtype in the header of a safetensors file to its name in torch.
DTYPES = {name: str(dtype).removeprefix("torch.") for name, dtype in MAPPED.items()}
#: Attribute of a base model that contains the pools of experts which `upcycle` made.
POOLS = "expert_pools"

_T = TypeVar("_T")


class TensorNetworkConfig(QuantizationConfigMixin):
    """Quantization config for transformers: describes a compressed model, or compresses a model on loading.

    To compress a model on loading, give the options of `tensornet.CompressionConfig`:
    `AutoModelForCausalLM.from_pretrained(folder, quantization_config=TensorNetworkConfig(param_ratio=0.5))`.
    The library itself writes and reads all other arguments.

    Args:
        layers: description of each compressed module by its name in the model (see `NetworkModule.spec`).
        ties: parameters that are stored under another name, as `{name: name of the stored parameter}`.
        aux_losses: whether the auxiliary losses of mixtures are added to the model's loss in training, as
            after `upcycle`; otherwise the training loop adds them.
        format_version: version of this description.
        quant_method: always `"tensornet"`.
        load_with: a hint for people who read the file.
        compression: options of `CompressionConfig` as a mapping, as an alternative to `options`.
        options: options of `CompressionConfig`.

    Raises:
        FormatError: an unknown version, or invalid descriptions.
        ValueError, BudgetError, TopologyError: options that `CompressionConfig` refuses.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> config = th.TensorNetworkConfig(topology="low_rank", param_ratio=0.5, method="svd")
        >>> model = AutoModelForCausalLM.from_pretrained(th.embedded.gpt2_path(), quantization_config=config)
        >>> type(model.transformer.h[0].mlp.c_fc).__name__
        'MPOLinear'
    """

    def __init__(
        self,
        *,
        layers: Mapping[str, Any] | None = None,
        ties: Mapping[str, str] | None = None,
        aux_losses: bool = False,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        load_with: str = LOAD_WITH,
        compression: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise FormatError(f"quant_method is {quant_method!r}, expected {QUANT_METHOD!r}.")
        if format_version != FORMAT_VERSION:
            raise FormatError(
                f"This model is stored in format version {format_version!r}, but the installed library reads "
                f"version {FORMAT_VERSION}. Update the library (pip install -U tensornet-torch), or save the "
                "model again with the installed version."
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers annotates an enum of its own
        self.format_version = format_version
        self.load_with = load_with
        self.layers: dict[str, Any] = _mapping("layers", layers, Mapping)
        self.ties: dict[str, str] = _mapping("ties", ties, str)
        if not isinstance(aux_losses, bool):
            raise FormatError(
                f"The entry 'aux_losses' of quantization_config is true or false, got {aux_losses!r:.200}"
            )
        self.aux_losses = aux_losses
        self.compression: dict[str, Any] | None = None
        if compression or options:
            self.compression = CompressionConfig.from_dict({**(compression or {}), **options}).to_dict()

    @property
    def compression_config(self) -> CompressionConfig:
        """The compression options as a `CompressionConfig`."""
        return CompressionConfig.from_dict(self.compression or {})


def _mapping(what: str, value: Any, kind: type) -> dict[str, Any]:
    value = {} if value is None else value
    entries = value.items() if isinstance(value, Mapping) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(entry, kind) for name, entry in entries):
        expected = "descriptions" if kind is Mapping else "names"
        raise FormatError(
            f"The entry {what!r} of quantization_config must map names to {expected}, got {value!r:.200}"
        )
    return dict(value)


# --- describing a model ---------------------------------------------------------------------------------


def config_of(model: nn.Module, *, compression: Mapping[str, Any] | None = None) -> TensorNetworkConfig:
    """Describe the compressed modules of a model for saving; `layers` is empty for an ordinary model.

    Args:
        model: any model.
        compression: options to record (see `TensorNetworkConfig`).
    """
    layers = layer_descriptions(model)
    base = getattr(model, "base_model_prefix", "")
    tensors = model.state_dict(keep_vars=True)
    declared: Collection[str] = tensors.keys()
    if isinstance(model, PreTrainedModel):
        # transformers ties what its classes declare, and what an earlier description of the model listed.
        old = getattr(getattr(model.config, "quantization_config", None), "ties", {})
        declared = model.all_tied_weights_keys.keys() - old.keys()
    ties = shared_tensors(tensors, layers, base=base, declared=declared)
    joins = joins_aux_losses(model)
    return TensorNetworkConfig(layers=layers, ties=ties, aux_losses=joins, compression=compression)


def layer_descriptions(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe each outermost tensor-network module of a model, under every name that the module has.

    Returns:
        The description (`NetworkModule.spec`) of each module by name.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        spec = module_spec(module)
        if spec is not None and name and not is_inside(name, found):
            found[name] = spec
    return found


def shared_tensors(
    tensors: Mapping[str, Tensor], layers: Collection[str], *, base: str, declared: Collection[str]
) -> dict[str, str]:
    """Map the names of shared tensors to the names under which they are stored.

    The result contains tensors in compressed modules, and others that the model's class does not tie itself,
    for example those of layers that run in several passes.

    A tensor is stored under its first name outside the compressed modules. If it has no such name, it is
    stored under its first name. Names in the base model come before names in a head, so that the base model
    can be loaded alone.

    Args:
        tensors: state dict of the model with the parameters themselves (`keep_vars=True`).
        layers: names of the compressed modules.
        base: name of the base model within the model; empty if there is none.
        declared: names of dense tensors that the class of the model ties itself.
    """
    named = [(name, id(tensor)) for name, tensor in tensors.items()]
    base_first = sorted(named, key=lambda item: not item[0].startswith(f"{base}."))
    owners: dict[int, str] = {}
    for inside in (False, True):
        for name, key in base_first:
            if is_inside(name, layers) is inside:
                owners.setdefault(key, name)
    return {
        name: owners[key]
        for name, key in named
        if owners[key] != name and (is_inside(name, layers) or name not in declared)
    }


def is_inside(name: str, layers: Collection[str]) -> bool:
    """Return True if a dotted name is inside one of the named modules; fast if `layers` is a set or dict."""
    end = name.rfind(".")
    while end > 0:
        if name[:end] in layers:
            return True
        end = name.rfind(".", 0, end)
    return False


def replaced_names(dense: Iterable[str], present: Iterable[str], layers: Iterable[str]) -> list[str]:
    """Return the names of dense weights that compressed layers replace; a *guard* is saved for each of them.

    Without this library, transformers only warns about an unknown quantization type, and initializes missing
    dense weights with random numbers. But loading a tensor of a wrong shape raises an error. So a saved
    folder contains an empty tensor, the guard, under the name of every replaced weight. This library ignores
    guards when it loads a model.

    Args:
        dense: names of the tensors of the dense model.
        present: names of the tensors of the compressed model.
        layers: names of the compressed layers. For stacks of experts, the layers are children of the module
            that had the weight.
    """
    layers = set(layers)
    around = {layer[:end] for layer in layers for end in range(len(layer)) if layer[end] == "."}
    absent = set(dense) - set(present)
    return sorted(x for x in absent if is_inside(x, layers) or x.rpartition(".")[0] in around)


def without_guards(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """Remove guards from a mapping of tensors or of their headers."""
    return {name: x for name, x in tensors.items() if getattr(x, "shape", None) != GUARD_SHAPE}


# --- comparing with stored tensors ----------------------------------------------------------------------


@dataclass(frozen=True)
class PromisedTensor:
    """Properties that a stored tensor must have, according to the description of its layer.

    Attributes:
        shape: shape of the stored tensor.
        dtype: its dtype, or None if every floating-point dtype is allowed.
        numbers: count of the numbers that the tensor encodes; more than its elements if integers are packed.
    """

    shape: tuple[int, ...]
    dtype: str | None
    numbers: int


def promised_tensors(layers: Mapping[str, Any]) -> dict[str, PromisedTensor]:
    """Derive the shapes and dtypes of all tensors, by name, from the descriptions of compressed modules.

    Raises:
        FormatError: a description is invalid.
    """
    found: dict[str, PromisedTensor] = {}
    known: dict[str, dict[str, PromisedTensor]] = {}  # maps descriptions to tensors; many are equal
    for layer, spec in layers.items():
        if (key := repr(spec)) not in known:
            try:
                known[key] = _tensors_of(build_module(spec, device="meta"))
            except (FormatError, RuntimeError, OverflowError, MemoryError) as error:
                # torch raises RuntimeError for sizes that overflow its integers
                raise FormatError(
                    f"The description of {layer!r} in quantization_config is invalid: {error!s:.500}"
                ) from error
        found |= {f"{layer}.{name}": tensor for name, tensor in known[key].items()}
    return found


def _tensors_of(module: nn.Module) -> dict[str, PromisedTensor]:
    counts: dict[str, int] = {}
    for part, inner in module.named_modules():
        if isinstance(inner, PackedCore):
            counts |= {f"{part}.{k}": count for k, count in inner.counts.items()}
    found = {}
    for name, x in module.state_dict().items():
        own = None if x.is_floating_point() else str(x.dtype).removeprefix("torch.")
        found[name] = PromisedTensor(tuple(x.shape), own, counts.get(name, x.numel()))
    return found


def check_layers(compression: TensorNetworkConfig, tensors: Mapping[str, Slice], *, where: str) -> None:
    """Check that the stored tensors are those that a description of compressed modules requires.

    Args:
        compression: the description.
        tensors: headers of the stored tensors, without guards (see `replaced_names`).
        where: name of the folder, for messages.

    Raises:
        FormatError: the description is invalid, or a tensor is missing, surplus, or of wrong shape or dtype.
    """
    expected = promised_tensors(compression.layers)
    stored = {name: tensor for name, tensor in expected.items() if name not in compression.ties}
    in_file = _renaming(list(stored), tensors)
    for name, tensor in stored.items():
        part = tensors.get(in_file(name))
        if part is None:
            raise FormatError(
                f"{where}: {name} is missing. config.json describes it, but no weight file contains it: the "
                "files belong to another save, or a file is incomplete."
            )
        if part.shape != tensor.shape:
            raise FormatError(
                f"{where}: {name} is stored with shape {list(part.shape)}, but its description says "
                f"{list(tensor.shape)}."
            )
        # The dtype of floating-point tensors is that of the model when it was saved, so all are allowed.
        found = DTYPES.get(part.dtype, part.dtype)
        if part.dtype not in FLOATS if tensor.dtype is None else found != tensor.dtype:
            raise FormatError(
                f"{where}: {name} is stored as {found}, but the number format of its layer in config.json "
                f"requires {tensor.dtype or 'a floating-point dtype'}. The weight files and config.json "
                "belong to different saves: restore the config.json that was saved with these weights, or "
                "compress the model again."
            )
    for name, owner in compression.ties.items():
        there, wanted = tensors.get(in_file(owner)), expected.get(name)
        fits = not is_inside(name, compression.layers) or (
            there is not None and wanted is not None and there.shape == wanted.shape
        )
        if there is None or owner in compression.ties or not fits:
            raise FormatError(
                f"{where}: quantization_config ties {name} to {owner}, which is not a stored tensor of the "
                "same shape."
            )
    described = {in_file(name) for name in stored}
    layers = {in_file(layer) for layer in compression.layers}
    if surplus := sorted(k for k in tensors.keys() - described if is_inside(k, layers) or names_a_core(k)):
        raise FormatError(
            f"{where}: the weight files contain {', '.join(surplus[:5])}, but config.json does not describe "
            "it. The weight files and config.json belong to different saves."
        )


def _renaming(names: list[str], tensors: Mapping[str, Slice]) -> Callable[[str], str]:
    """Return a function that converts names in the description to names in the weight files.

    The names differ by a prefix if either the description or the files were written for a submodule.
    """
    if not names or any(name in tensors for name in names):
        return str
    longer = next((key for key in tensors if key.endswith("." + names[0])), None)
    if longer is not None:
        return lambda name: longer.removesuffix(names[0]) + name
    part, _, shorter = names[0].partition(".")
    return (lambda name: name.removeprefix(part + ".")) if shorter in tensors else str


def names_a_core(name: str) -> bool:
    """Return True if the name of a tensor is that of a core, or of a part of a core (`core_0.scales`)."""
    return any(part.startswith("core_") for part in name.split(".")[-2:])


# --- hooks of transformers ------------------------------------------------------------------------------


class TensorNetworkQuantizer(HfQuantizer):
    """Quantizer of transformers that loads cores into compressed modules, or compresses dense weights.

    transformers creates a quantizer for each model that it loads. `prepare_for_saving` creates the quantizer
    of a model that is compressed in memory.

    Args:
        quantization_config: description of the compressed modules.
        experts_spread: True if the experts of the model are distributed over processes.
        kwargs: further arguments from transformers.
    """

    quantization_config: TensorNetworkConfig

    def __init__(
        self, quantization_config: TensorNetworkConfig, *, experts_spread: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(quantization_config, **kwargs)
        self.experts_spread = experts_spread
        self._layers: list[str] = []
        self._stored: tuple[str, ...] = ()
        self._tied_later: dict[str, str] = {}

    def is_serializable(self) -> bool:
        """Return True: every compressed model can be saved unless its experts are distributed over processes.

        Raises:
            TargetError: experts are distributed, so this process does not have all of them.
        """
        if self.experts_spread:
            raise TargetError(
                "The experts of this model are distributed over processes, but a single process writes the "
                "files. First call gather_experts(model) of tensornet_moe.experimental.parallel on every "
                "process. Trainer needs gathered experts too, or a model sharded with FSDP; your own "
                "training loop can train distributed experts (docs/guides/train_mixtures.md)."
            )
        return True

    @property
    def is_trainable(self) -> bool:
        """True, since cores are ordinary parameters. `Trainer` reads this property before training.

        Raises:
            TargetError: experts are distributed over processes, so that `Trainer`, which writes checkpoints
                from a single process, could not save them (see `is_serializable`).
        """
        return self.is_serializable()

    @property
    def is_qat_trainable(self) -> bool:
        """True, since `Trainer` would otherwise refuse to train the model without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True, since contractions are ordinary tensor operations whose order does not depend on values."""
        return True

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Replace dense layers of an empty model by uninitialized compressed layers on the meta device.

        Raises:
            FormatError: the weights are pickled, or the description does not fit the weights or the model.
            TargetError: the model would be distributed in a way that splits compressed layers.
        """
        files = [Path(file) for file in checkpoint_files or []]
        if pickles := [file.name for file in files if file.suffix != ".safetensors"]:
            raise FormatError(
                f"{', '.join(pickles)}: only safetensors files are loaded, since pickles can run code when "
                "they are opened. If you trust the model, load it with transformers and save it with "
                "model.save_pretrained(folder)."
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
        # This attribute is private, but transformers has no public list of stored names to ignore.
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
            if is_inside(target, layers) and key in dict(module.named_parameters(recurse=False)):
                # transformers ties the parameters that this dict lists, and does not expect them in files.
                model.all_tied_weights_keys[name] = owner
            else:
                # Make it a plain attribute: transformers would look for a buffer in the files, and would
                # adapt the bias of a dense layer to the shape of its tied weight, as in an output head.
                tensor = getattr(module, key)
                delattr(module, key)
                vars(module)[key] = tensor
                self._tied_later[name] = owner

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Disable the renaming of stored tensors if their names already match the model.

        A compressed model is saved under the current names of its class. When transformers loads such a file
        into Qwen2-VL without its head, for example, it would otherwise mistake these names for those of an
        older version.
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
            FormatError: a core is missing; transformers would fill it with random numbers.
            NonFiniteError: a core contains NaN or infinity.
        """
        compression = self.quantization_config.compression
        if not self.pre_quantized:
            options = self.quantization_config.compression_config
            compress(model, options, progress=logging.is_progress_bar_enabled())
            prepare_for_saving(model, compression=compression)
            return
        for name, owner in self._tied_later.items():
            tie(model, name, owner)
        layers = set(self._layers)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not is_inside(name, layers):
                continue
            # This attribute is private, but no other attribute marks loaded parameters.
            if not getattr(tensor, "_is_hf_initialized", False):
                raise FormatError(f"{name} is missing from the weights; every core is needed.")
            if isinstance(tensor, nn.Parameter) and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"{name} contains NaN or infinity. The file is damaged, or was saved from a model whose "
                    "training diverged."
                )
        for name in self._layers:
            for part, module in model.get_submodule(name).named_modules(prefix=name):
                if isinstance(module, PackedCore):
                    module.check_finite(part)
                    module.align()
        if self.quantization_config.aux_losses:
            join_aux_losses(model)
        prepare_for_saving(model, compression=compression)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict]:
        """Return the tensors to save, each shared tensor once, and guards (see `replaced_names`).

        transformers calls this method before it writes config.json.

        Raises:
            TargetError: a layer uses a pool of experts that the model does not contain.
        """
        find_pools(model)
        # Users may have replaced layers since the model was described.
        prepare_for_saving(model)
        if not hasattr(model, "hf_quantizer"):  # all layers are dense now
            return None, {}
        config: TensorNetworkConfig = model.config.quantization_config
        # This attribute is private, but if it is not cleared, transformers renames tensors and stacks experts
        # as for dense models.
        model._weight_conversions = []  # type: ignore[assignment]
        tensors = {name: x for name, x in model.state_dict().items() if name not in config.ties}
        replaced = replaced_names(_dense_names(model, config), tensors | config.ties, config.layers)
        guards = {name: torch.empty(GUARD_SHAPE, dtype=model.dtype, device="cpu") for name in replaced}
        return tensors | guards, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replace the compressed layers by dense layers; this implements `model.dequantize()`."""
        decompress(model)
        return model


register_quantization_config(QUANT_METHOD)(TensorNetworkConfig)
register_quantizer(QUANT_METHOD)(TensorNetworkQuantizer)


def prepare_for_saving(model: nn.Module, *, compression: Mapping[str, Any] | None = None) -> bool:
    """Set the quantizer of each transformers model in a module, or remove it if the model is dense.

    All functions of the library that replace layers call this function, and so does `tensornet_hf.save`.
    Afterwards `save_pretrained`, `Trainer` and the rest of transformers treat the models as quantized.

    Args:
        model: a transformers model, or a module that contains such models.
        compression: options to record (see `TensorNetworkConfig`); None keeps the recorded options.

    Returns:
        True if the module is or contains a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        found = [prepare_for_saving(child, compression=compression) for child in model.children()]
        return any(found)
    if any(isinstance(part, ParallelExperts) for part in model.modules()):  # these have no description
        quantizer = TensorNetworkQuantizer(TensorNetworkConfig(), experts_spread=True)
        model.hf_quantizer = quantizer  # type: ignore[assignment]
        return True
    fuse(model)
    before = getattr(model, "hf_quantizer", None)
    if compression is None and isinstance(before, TensorNetworkQuantizer):
        compression = before.quantization_config.compression
    config = config_of(model, compression=compression)
    if config.layers:
        model.hf_quantizer = TensorNetworkQuantizer(config)  # type: ignore[assignment]
        model.is_quantized = False  # type: ignore[assignment]  # True would only forbid .half() and .float()
        model.config.quantization_config = config
        remove_dense_ties(model, config.layers)
    elif isinstance(before, TensorNetworkQuantizer):
        before.remove_quantization_config(model)
        restore_dense_ties(model)
        if getattr(model, "_weight_conversions", None) == []:  # see `get_state_dict_and_metadata`
            model._weight_conversions = None  # type: ignore[assignment]  # those of the architecture
    return True


def _dense_names(model: PreTrainedModel, config: TensorNetworkConfig) -> Iterable[str]:
    """Return the names of all tensors of the dense model of this class and configuration."""
    try:
        with torch.device("meta"), no_init_weights():
            return tuple(type(model)(copy.deepcopy(model.config)).state_dict())
    except Exception:  # some classes read weights, which have no values here, or need further arguments
        return tuple(f"{layer}.weight" for layer in config.layers)


# --- models without weights -----------------------------------------------------------------------------


def _place_layers(
    model: PreTrainedModel, layers: Mapping[str, Any], *, dtype: torch.dtype | None
) -> dict[str, str]:
    """Replace modules of an empty model by uninitialized modules that are built from descriptions.

    Args:
        model: a model on the meta device; changed in place.
        layers: description of each module by its name in the saved model.
        dtype: dtype of the new parameters.

    Returns:
        `{name in the saved model: name in this model}` of each module. Modules that this model does not have,
        because its class has another head or no head, are skipped.

    Raises:
        FormatError: the model lacks a module of `layers`, or has a layer of another type or shape there.
    """
    make_room(model, layers)
    places = dict(model.named_modules(remove_duplicate=False))
    found = {layer: [x for x in _possible_names(model, layer) if x in places] for layer in layers}
    names = {layer: present[0] for layer, present in found.items() if present}
    saved_as = getattr(model.config, "architectures", None) or []
    absent = [layer for layer in layers if layer not in names]
    if absent and (not names or type(model).__name__ in saved_as):
        raise FormatError(
            f"{type(model).__name__} has no module {absent[0]!r}, which quantization_config describes. The "
            f"model was saved as {', '.join(saved_as) or 'an unknown class'}."
        )
    built = {layer: build_module(layers[layer], device="meta", dtype=dtype) for layer in names}
    for layer, name in names.items():
        if isinstance(made := built[layer], NetworkModule):
            _check_place(name, places[name], layers[layer], made)
    for layer, name in names.items():
        # All tensors of these modules are loaded, so the model class must not initialize the modules or
        # their parents: Funnel would change a row of its embeddings, and Falcon-H1 would recompute buffers of
        # its blocks. The attribute is private, but it is the only one that transformers checks.
        parent = places[name.rpartition(".")[0]]
        bare = next(chain(parent.parameters(recurse=False), parent.buffers()), None) is None
        for part in (*built[layer].modules(), *([parent] if bare else [])):
            part._is_hf_initialized = True
        model.set_submodule(name, built[layer])
    connect_pools(model)
    return names


def put_pools(model: nn.Module, pools: Mapping[str, nn.Module]) -> None:
    """Add pools of experts to the base model, each under its label."""
    place = model.base_model if isinstance(model, PreTrainedModel) else model
    if pools and not hasattr(place, POOLS):
        place.add_module(POOLS, nn.ModuleDict())
    for label, pool in pools.items():
        place.get_submodule(POOLS).add_module(label, pool)


def make_room(model: PreTrainedModel, layers: Mapping[str, Any]) -> None:
    """Add an empty module to a model for each pool of experts in the model's description.

    Model classes of transformers do not have such modules.

    Args:
        model: a model on the meta device; changed in place.
        layers: description of each module by its name in the saved model.
    """
    for layer in (name for name, spec in layers.items() if spec.get("type") == "expert_pool"):
        inner = layer.removeprefix(f"{model.base_model_prefix}.")
        *path, label = inner.split(".")
        # What `upcycle` adds belongs to the base model, whether the saved class has a head or not.
        part: nn.Module = model.base_model if inner != layer or path == [POOLS] else model
        for name in path:
            if not hasattr(part, name):  # for example the container of several pools
                part.add_module(name, nn.ModuleDict())
            part = part.get_submodule(name)
        part.add_module(label, nn.Module())


def _possible_names(model: PreTrainedModel, layer: str) -> tuple[str, str, str]:
    """Return possible names of a layer: as given, with the prefix of the base model, and without it."""
    prefix = f"{model.base_model_prefix}."
    return layer, prefix + layer, layer.removeprefix(prefix)


def _check_place(name: str, module: nn.Module, spec: Mapping[str, Any], made: NetworkModule) -> None:
    """Raise FormatError if the layer to replace does not have the type and shape given in `spec`."""
    kind = kind_of(module)
    if kind is None or kind.name != spec.get("source"):
        raise FormatError(
            f"quantization_config says that {name!r} replaces a {spec.get('source')!r} layer, but the model "
            f"has a {type(module).__name__} there."
        )
    if tuple(kind.matrix(module).shape) != made.topology.shape:
        raise FormatError(
            f"quantization_config describes {name!r} with shape {list(made.topology.shape)}, but the layer "
            f"of the model has shape {list(kind.matrix(module).shape)} (out_features, in_features)."
        )


def _renamed(tensor: str, names: Mapping[str, str], layers: Collection[str]) -> str | None:
    """Translate a tensor's name from the saved model to this model; None if this model lacks its layer."""
    ends = (end for end, letter in enumerate(tensor) if letter == ".")
    layer = next((tensor[:end] for end in ends if tensor[:end] in layers), None)
    if layer is None:
        return tensor
    return names[layer] + tensor[len(layer) :] if layer in names else None


def _refuse_cuts(model: PreTrainedModel, layers: Mapping[str, Any]) -> None:
    """Raise TargetError if a `DistributedConfig` would split compressed layers.

    FSDP can shard any parameter. But tensor parallelism needs weights with rows and columns, and expert
    parallelism needs stacks of experts, which compressed layers do not have.
    """
    config: Any = getattr(model.config, "distributed_config", None)
    if config is None:
        return
    for name, spec in layers.items():
        single, mixture = spec["type"] in ("linear", "embedding"), spec["type"].startswith("shared_core")
        if (single and config.tp_size > 1) or (mixture and config.ep_size > 1):
            raise TargetError(
                f"{name} is a tensor network, which tensor and expert parallelism of transformers cannot "
                "split. Distribute the model with DistributedConfig(fsdp_size=...) instead; or load it "
                "without a distributed config, and distribute experts that share cores with "
                "shard_experts(model) of tensornet_moe.experimental.parallel (docs/guides/train_mixtures.md)."
            )


# --- ties -----------------------------------------------------------------------------------------------


def remove_dense_ties(
    model: PreTrainedModel, layers: Iterable[str], *, stored: Collection[str] | None = None
) -> None:
    """Remove ties to weights of compressed modules from the tied keys of transformers, in place.

    transformers stores ties as pairs of names, `{target: source}`, in `all_tied_weights_keys`. `tie_weights`
    reads the pairs again from `_tied_weights_keys` of every nested model. This attribute is private, but must
    be changed: with a stale pair, `tie_weights` would look for a weight that no longer exists.

    Args:
        model: a compressed model, or an empty model before loading.
        layers: names of the compressed modules.
        stored: names of the stored tensors; only for an empty model.

    Raises:
        FormatError: an output head is tied to a compressed embedding, but was not saved itself.
    """
    names = set(layers)
    pairs = dict(model.all_tied_weights_keys)
    for target, source in pairs.items():
        if stored is None or target in stored or is_inside(target, names) or not is_inside(source, names):
            continue
        raise FormatError(
            f"{target} of {type(model).__name__} is tied to the weight of {source.removesuffix('.weight')}, "
            "which is a tensor network here, and no head was saved. Load the model without a head "
            "(AutoModel), or compress and save it as a class that has one."
        )
    kept = {t: s for t, s in pairs.items() if not is_inside(t, names) and not is_inside(s, names)}
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._tied_weights_keys:
            part._tied_weights_keys = kept if part is model else {}
    model.all_tied_weights_keys = kept


def restore_dense_ties(model: PreTrainedModel) -> None:
    """Restore the tied keys that `remove_dense_ties` removed, after the model has become dense again."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            vars(part).pop("_tied_weights_keys", None)
    get = model.get_parameter_or_buffer
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    # Keep only true ties: a configuration may declare ties of weights that differ (T5 v1.1).
    model.all_tied_weights_keys = {t: s for t, s in pairs.items() if get(t) is get(s)}

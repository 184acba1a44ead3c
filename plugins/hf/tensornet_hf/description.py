"""The description of a compressed model in `config.json`, and its comparison with the stored tensors.

The entry `quantization_config` describes every compressed module, and lists shared tensors, which the file
stores once. It determines the names, shapes and dtypes of all tensors of these modules. Only the headers of
files are read here: no weight is allocated, and nothing is unpickled.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from tensornet.compression.config import CompressionConfig
from tensornet.errors import FormatError
from tensornet.io import FLOATS, MAPPED, Slice
from tensornet.nn.module import build_module, module_spec
from tensornet.nn.storage import PackedCore

METHOD = "tensornet"
FORMAT_VERSION = 1
LOAD_WITH = "import tensornet_hf, then AutoModel...from_pretrained(folder) or tensornet_hf.load(folder)"
#: Shape of a guard, see `replaced_names`; real weights are never empty.
GUARD_SHAPE = (0,)
#: Names of dtypes as in torch, by their name in the header of a safetensors file.
DTYPES = {name: str(dtype).removeprefix("torch.") for name, dtype in MAPPED.items()}

_T = TypeVar("_T")


class TensorNetworkConfig(QuantizationConfigMixin):
    """Quantization config of transformers that describes a compressed model, or compresses one while loading.

    To compress while loading, give the options of `tensornet.CompressionConfig`:
    `AutoModelForCausalLM.from_pretrained(folder, quantization_config=TensorNetworkConfig(param_ratio=0.5))`.
    All other arguments are written and read by the library.

    Args:
        layers: description of each compressed module by its name in the model (see `NetworkModule.spec`).
        ties: parameters stored under another name: `{name: name of the stored parameter}`.
        format_version: version of this description.
        quant_method: always `"tensornet"`.
        load_with: a hint for people who read the file.
        compression: options of `CompressionConfig` as a mapping, as an alternative to `options`.
        options: options of `CompressionConfig`.

    Raises:
        FormatError: an unknown version, or invalid descriptions.
        ValueError, BudgetError, TopologyError: from the options.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> config = th.TensorNetworkConfig(topology="low_rank", param_ratio=0.5, objective="weight")
        >>> model = AutoModelForCausalLM.from_pretrained(th.embedded.gpt2_path(), quantization_config=config)
        >>> type(model.transformer.h[0].mlp.c_fc).__name__
        'MPOLinear'
    """

    def __init__(
        self,
        *,
        layers: Mapping[str, Any] | None = None,
        ties: Mapping[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        load_with: str = LOAD_WITH,
        compression: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if quant_method != METHOD:
            raise FormatError(f"quant_method is {quant_method!r}, expected {METHOD!r}.")
        if format_version != FORMAT_VERSION:
            raise FormatError(
                f"This model is stored in format version {format_version!r}, this library reads version "
                f"{FORMAT_VERSION}. Update it (pip install -U tensornet-torch), or save the model again with "
                "this one."
            )
        self.quant_method = METHOD  # type: ignore[assignment]  # an open set of names, typed as an enum
        self.format_version = format_version
        self.load_with = load_with
        self.layers: dict[str, Any] = _mapping("layers", layers, Mapping)
        self.ties: dict[str, str] = _mapping("ties", ties, str)
        self.compression: dict[str, Any] | None = None
        if compression or options:
            self.compression = CompressionConfig.from_dict({**(compression or {}), **options}).to_dict()

    @property
    def compression_config(self) -> CompressionConfig:
        """The options as a `CompressionConfig`."""
        return CompressionConfig.from_dict(self.compression or {})


def _mapping(what: str, value: Any, kind: type) -> dict[str, Any]:
    value = {} if value is None else value
    entries = value.items() if isinstance(value, Mapping) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(entry, kind) for name, entry in entries):
        expected = "descriptions" if kind is Mapping else "names"
        raise FormatError(
            f"The entry {what!r} of quantization_config must map names to {expected}: {value!r:.200}"
        )
    return dict(value)


# --- describing a model ---------------------------------------------------------------------------------


def describe(model: nn.Module, *, compression: Mapping[str, Any] | None = None) -> TensorNetworkConfig:
    """Return the description that is saved with a model; `layers` is empty for an ordinary model.

    Args:
        model: any model.
        compression: options to record, see `TensorNetworkConfig`.
    """
    layers = layer_descriptions(model)
    base = getattr(model, "base_model_prefix", "")
    ties = shared_tensors(model.state_dict(keep_vars=True), layers, base=base)
    return TensorNetworkConfig(layers=layers, ties=ties, compression=compression)


def layer_descriptions(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe the outermost tensor-network modules; a module used twice is listed under both names."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        spec = module_spec(module)
        if spec is not None and name and not is_inside(name, found):
            found[name] = spec
    return found


def shared_tensors(tensors: Mapping[str, Tensor], layers: Collection[str], *, base: str) -> dict[str, str]:
    """Map every shared tensor of a compressed module to the name under which it is stored.

    This is the first name outside the compressed modules, or else the first name inside. Names of the base
    model come before those of a head, so that the base model finds its tensors when it is loaded alone.

    Args:
        tensors: state dict of the model, with the parameters themselves.
        layers: names of the compressed modules.
        base: name of the base model in the model; empty if it has none.
    """
    named = [(name, id(tensor)) for name, tensor in tensors.items()]
    base_first = sorted(named, key=lambda item: not item[0].startswith(f"{base}."))
    owners: dict[int, str] = {}
    for inside in (False, True):
        for name, key in base_first:
            if is_inside(name, layers) is inside:
                owners.setdefault(key, name)
    return {name: owners[key] for name, key in named if is_inside(name, layers) and owners[key] != name}


def is_inside(name: str, layers: Collection[str]) -> bool:
    """Return True if a dotted name is inside one of the named modules; fast if these are a set or dict."""
    end = name.rfind(".")
    while end > 0:
        if name[:end] in layers:
            return True
        end = name.rfind(".", 0, end)
    return False


def replaced_names(dense: Iterable[str], present: Iterable[str], layers: Iterable[str]) -> list[str]:
    """Return the names of dense weights that compressed layers replace; each gets a *guard* in the file.

    If this library is not imported, transformers only warns of an unknown quantization type, and initializes
    missing dense weights with random numbers. But it raises an error for a tensor of another shape. So a
    saved folder contains an empty tensor, the guard, under the name of every replaced weight. This library
    ignores guards when loading.

    Args:
        dense: names of the tensors of the dense model.
        present: names of the tensors of the compressed model.
        layers: names of the compressed layers, which may be children of the module that had the weight, as
            for stacks of experts.
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
    """Shape of a described tensor, its dtype if a number format determines it, and its count of numbers."""

    shape: tuple[int, ...]
    dtype: str | None
    numbers: int


def promised_tensors(layers: Mapping[str, Any]) -> dict[str, PromisedTensor]:
    """Return the tensors of all described modules by name; modules are built on the meta device.

    Raises:
        FormatError: a description is invalid.
    """
    found: dict[str, PromisedTensor] = {}
    known: dict[str, dict[str, PromisedTensor]] = {}  # by description; many layers have the same
    for layer, spec in layers.items():
        if (key := repr(spec)) not in known:
            try:
                known[key] = _tensors_of(build_module(spec, device="meta"))
            except (FormatError, RuntimeError, OverflowError, MemoryError) as error:
                # torch raises RuntimeError for sizes beyond what it can count
                raise FormatError(
                    f"The description of {layer!r} in quantization_config is unusable: {error!s:.500}"
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
    """Compare the tensors of a description with the stored headers.

    Args:
        compression: the description.
        tensors: the headers, without guards.
        where: name of the folder, for messages.

    Raises:
        FormatError: an invalid description, or a missing, surplus or wrong tensor.
    """
    expected = promised_tensors(compression.layers)
    stored = {name: tensor for name, tensor in expected.items() if name not in compression.ties}
    in_file = _renaming(list(stored), tensors)
    for name, tensor in stored.items():
        part = tensors.get(in_file(name))
        if part is None:
            raise FormatError(
                f"{where}: {name} is missing. config.json lists it, the weight files do not: they "
                "belong to another save, or one is incomplete."
            )
        if part.shape != tensor.shape:
            raise FormatError(
                f"{where}: {name} is stored with shape {list(part.shape)}, its description says "
                f"{list(tensor.shape)}."
            )
        # Floating-point tensors may have any dtype: that of the model when it was saved.
        found = DTYPES.get(part.dtype, part.dtype)
        if part.dtype not in FLOATS if tensor.dtype is None else found != tensor.dtype:
            raise FormatError(
                f"{where}: {name} is stored as {found}, but the number format of its layer in config.json "
                f"claims {tensor.dtype or 'a floating-point dtype'}. The weight files and config.json belong "
                "to different saves: restore the config.json that was saved with these weights, or compress "
                "the model again."
            )
    for name, owner in compression.ties.items():
        there, wanted = tensors.get(in_file(owner)), expected.get(name)
        if there is None or owner in compression.ties or wanted is None or there.shape != wanted.shape:
            raise FormatError(
                f"{where}: quantization_config ties {name} to {owner}, which is not a stored tensor of that "
                "shape."
            )
    described = {in_file(name) for name in stored}
    layers = {in_file(layer) for layer in compression.layers}
    if surplus := sorted(k for k in tensors.keys() - described if is_inside(k, layers) or names_a_core(k)):
        raise FormatError(
            f"{where}: {', '.join(surplus[:5])} stored, but not described in config.json. The weight files "
            "and config.json belong to different saves."
        )


def _renaming(names: list[str], tensors: Mapping[str, Slice]) -> Callable[[str], str]:
    """Return the map from names in the description to names in the files.

    They differ by a prefix if one is of a part of the model and the other of the whole model.
    """
    if not names or any(name in tensors for name in names):
        return str
    longer = next((key for key in tensors if key.endswith("." + names[0])), None)
    if longer is not None:
        return lambda name: longer.removesuffix(names[0]) + name
    part, _, shorter = names[0].partition(".")
    return (lambda name: name.removeprefix(part + ".")) if shorter in tensors else str


def names_a_core(name: str) -> bool:
    """Return True if a tensor is named as the cores of a layer are."""
    return any(part.startswith("core_") for part in name.split(".")[-2:])

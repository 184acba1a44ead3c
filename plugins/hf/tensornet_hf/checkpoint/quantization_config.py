"""The entry `quantization_config` of `config.json`: the tensor-network layers and their topologies."""

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from tensornet.compression.config import CompressionConfig
from tensornet.errors import FormatError

METHOD = "tensornet"
FORMAT_VERSION = 1
LOAD_WITH = "import tensornet_hf, then AutoModel...from_pretrained(folder) or tensornet_hf.load(folder)"


class Descriptions(dict[str, Any]):
    """Descriptions of layers by name; copies share them, since transformers makes several while loading."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Descriptions":
        return Descriptions(self)


class TensorNetworkConfig(QuantizationConfigMixin):
    """Quantization config of transformers that describes a compressed model, or compresses one while loading.

    To compress while loading, give the options of `tensornet.CompressionConfig`:
    `AutoModelForCausalLM.from_pretrained(folder, quantization_config=TensorNetworkConfig(param_ratio=0.5))`.
    Everything else is written and read by the library.

    Args:
        layers: description of each compressed module by its name in the model (see `NetworkModule.spec`).
        ties: parameters stored under another name: `{name: name of the stored parameter}`.
        dtype: dtype in which parameters of compressed modules are stored, such as `"float32"`.
        other_dtypes: the parameters and buffers stored in another one.
        format_version: version of this description.
        quant_method: always `"tensornet"`.
        load_with: for readers of the file.
        compression: options of `CompressionConfig` as a mapping, as an alternative to `options`.
        options: options of `CompressionConfig`.

    Raises:
        FormatError: an unknown version, or descriptions that are not what they should be.
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
        dtype: str | None = None,
        other_dtypes: Mapping[str, str] | None = None,
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
        self.layers = Descriptions(_mapping("layers", layers, Mapping))
        self.ties: dict[str, str] = _mapping("ties", ties, str)
        self.dtype = dtype
        self.other_dtypes: dict[str, str] = _mapping("other_dtypes", other_dtypes, str)
        self.compression: dict[str, Any] | None = None
        if compression or options:
            self.compression = CompressionConfig.from_dict({**(compression or {}), **options}).to_dict()

    @property
    def compression_config(self) -> CompressionConfig:
        """The options as a `CompressionConfig`."""
        return CompressionConfig.from_dict(self.compression or {})

    def stored_dtype(self, parameter: str) -> str | None:
        """Look up the dtype in which a parameter of a compressed module is stored; None if not recorded."""
        return self.other_dtypes.get(parameter, self.dtype)


def _mapping(what: str, value: Any, kind: type) -> dict[str, Any]:
    value = {} if value is None else value
    entries = value.items() if isinstance(value, Mapping) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(entry, kind) for name, entry in entries):
        expected = "descriptions" if kind is Mapping else "names"
        raise FormatError(
            f"The entry {what!r} of quantization_config must map names to {expected}: {value!r:.200}"
        )
    return dict(value)

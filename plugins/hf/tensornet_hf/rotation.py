"""Rotate the weights of a Llama-like model so that its outputs do not change.

Let `R` be an orthogonal matrix. Every layer that writes to the residual stream is changed to write `R^T y`
instead of `y`, and every layer that reads the stream uses `W R` instead of `W`. Outputs do not change,
because an RMS norm without gain commutes with `R`. The output of attention is a weighted sum of values, so
the values of each head can be rotated too, if the output projection is multiplied by the inverse.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from tensornet._util import in_eval_mode
from tensornet.calibration.walk import Walk
from tensornet.errors import TargetError
from tensornet.nn.layer_kinds import is_plain
from tensornet.nn.module import NetworkModule
from tensornet_hf.checkpoint import Change
from tensornet_hf.file_sink import FileSink, PlannedModel
from tensornet_hf.lazy_model import LazyModel, Origin, open_model
from tensornet_hf.model_folder import lay_out_folder

#: Names of the norms and linear layers of a block.
NORMS = ("input_layernorm", "post_attention_layernorm")
LINEAR = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
#: Names of the norms of queries and keys, which some models have; they are not changed.
UNTOUCHED = ("self_attn.q_norm", "self_attn.k_norm")
#: Folder of a rotated model in a staging folder.
ROTATED = "rotated"
#: Largest change of the logits that float32 rounding can explain, relative to their norm.
TOLERANCE = 1e-3
#: Number of tokens on which logits are compared.
_TOKENS = 8
#: Number of rows that are multiplied at once, since a float64 copy of an embedding would be too large.
ROTATED_ROWS = 8192


@torch.no_grad()
def rotate(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Rotate the residual stream and the value heads of a model by random orthogonal matrices, in place.

    Logits change only by rounding, and outliers of the weights are spread over rows and columns. Whether this
    helps depends on the model and the method: on SmolLM2, rotation did not lower the loss of calibrated
    plans; with rounding to nearest at 3 bits, it increased the loss (docs/guides/language_models.md).

    Gains of norms are folded into the layers that follow. If the output head is tied to the embedding, it
    becomes a separate weight, so model and file grow by `vocab_size * hidden_size` weights.

    The model must have the structure of Llama, Mistral, Qwen 2 or Qwen 3: blocks with RMS norms before
    attention and MLP, with or without biases. Products are computed in float64 on the CPU. The model is
    converted to float32 and at the end back to its dtype, so weights in half precision are rounded once. The
    logits of a few tokens before and after rotation are compared.

    Args:
        model: a dense causal language model.
        seed: seed of the random matrices, which otherwise depend only on the sizes of the model.

    Returns:
        The same model.

    Raises:
        TargetError: the model is compressed or has another structure; nothing was changed. Or rotation
            changed the logits; the model must then be loaded again.

    Reference:
        Ashkboos et al., QuaRot (NeurIPS 2024), section 4; here with random orthogonal matrices, and
        without rotations that remain at run time.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> tokens = torch.arange(8)[None]
        >>> before = model(tokens).logits
        >>> torch.allclose(th.rotate(model)(tokens).logits, before, atol=1e-5)
        True
    """
    layers = _layers(model)
    if name := next((name for name, x in model.named_parameters() if x.is_meta), None):
        raise TargetError(f"This {type(model).__name__} cannot be rotated: {name} is not in memory.")
    changes = _changes(model, layers, _gains(layers), seed)
    dtypes = {name: x.dtype for name, x in model.named_parameters(remove_duplicate=False)}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    before = _logits(model)
    _untie(model)
    for name, change in changes.items():
        parameter = model.get_parameter(name)
        parameter.copy_(change(parameter.detach()))
    error = _difference(_logits(model), before)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    if not error <= TOLERANCE:
        raise _changed(model, error)
    return model


def rotated_folder(folder: Path, weights: str | Path | None, work: Path) -> Path:
    """Write the folder of a rotated model, in the memory of one block; an existing one is kept.

    Args:
        folder: folder of the dense model.
        weights: GGUF file with the weights of the model; by default, the files of the folder.
        work: staging folder, in which the subfolder `rotated` is written.

    Raises:
        TargetError: see `rotate`.
        FormatError: the folder is invalid, or its weights can only be loaded all together.
    """
    destination = work / ROTATED
    if not destination.is_dir():
        lazy = rotate_lazily(open_model(folder, weights))
        with tempfile.TemporaryDirectory(dir=work) as unfinished:
            files = lay_out_folder(PlannedModel(lazy.model, lazy=lazy))
            FileSink(files, destination, Path(unfinished)).finish()
    return destination


@torch.no_grad()
def rotate_lazily(lazy: LazyModel) -> LazyModel:
    """Open a model as it is after `rotate`: weights are rotated whenever they are read from the files.

    Args:
        lazy: the dense model, which is changed and must not be used afterwards.

    Raises:
        TargetError: the model has another structure, or rotation changes its logits.
    """
    model = lazy.model
    layers = _layers(model)
    with lazy.loaded(layers[name] for name in layers if _is_norm(layers[name])):
        gains = _gains(layers)
    changes = _changes(model, layers, gains, seed=0)
    before = _logits_by_block(lazy)
    stored = dict(model.named_parameters(remove_duplicate=False))
    origins, source = dict(lazy.origins), lazy.source
    if stored["lm_head.weight"] is stored["model.embed_tokens.weight"]:
        origins["lm_head.weight"] = origins["model.embed_tokens.weight"]
        source = replace(source, config={**source.config, "tie_word_embeddings": False})
    _untie(model)
    wide = dict(origins)
    for name, change in changes.items():
        own, shape = origins[name], tuple(stored[name].shape)
        known = own.change or Change(_unchanged, own.dtype, shape)
        for each, rounded in ((wide, False), (origins, True)):
            rotated = partial(_rotated, known.function, change, rounded)
            each[name] = Origin(own.parts, Change(rotated, known.dtype if rounded else "F32", shape))
        # A mapped weight would be used without the change.
        empty = nn.Parameter(torch.empty_like(stored[name], device="meta"), requires_grad=False)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]  # so initialize_weights skips it
        _set_parameter(model, name, empty)

    def opened(found: Mapping[str, Origin]) -> LazyModel:
        return LazyModel(model, found, lazy.others, lazy.surplus, source)

    error = _difference(_logits_by_block(opened(wide)), before)
    if not error <= TOLERANCE:
        raise _changed(model, error)
    return opened(origins)


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter at a dotted name."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)


def _unchanged(stored: Tensor) -> Tensor:
    return stored


def _rotated(
    function: Callable[[Tensor], Tensor], change: Callable[[Tensor], Tensor], rounded: bool, stored: Tensor
) -> Tensor:
    """Rotate a stored tensor in float32, after it was converted to the parameter.

    Args:
        function: conversion of the stored tensor to the parameter.
        change: the rotation.
        rounded: whether the result is rounded to the dtype of the parameter.
        stored: the stored tensor.
    """
    parameter = function(stored)
    found = change(parameter.to(torch.promote_types(parameter.dtype, torch.float32)))
    return found.to(parameter.dtype) if rounded else found


def _changes(
    model: PreTrainedModel, layers: Mapping[str, Any], gains: Mapping[str, Tensor], seed: int
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return a function for each parameter that changes it as the rotation requires, by name.

    Args:
        model: the model.
        layers: its layers by name.
        gains: gains of the norms, float64, shape `(size, 1)`, which are folded into the layers that follow.
        seed: seed of the random matrices.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    embedding = layers["model.embed_tokens"]
    rotation = _orthogonal(embedding.embedding_dim, generator)
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "model.embed_tokens.weight": partial(_product, right=rotation),
        "lm_head.weight": partial(_product, gain=gains["model.norm"], right=rotation),
    }
    found |= {f"{name}.weight": torch.ones_like for name in gains}
    for block in _blocks(model):
        q, v = (layers[f"{block}.self_attn.{x}_proj"] for x in "qv")
        size: Any = model.get_submodule(f"{block}.self_attn").head_dim
        queries, values = q.out_features // size, v.out_features // size
        heads = [_orthogonal(size, generator) for _ in range(values)]
        shared = [heads[head * values // queries] for head in range(queries)]
        before, after = (gains[f"{block}.{x}"] for x in NORMS)
        read = partial(_product, gain=before, right=rotation)
        sides = {"self_attn.q_proj": read, "self_attn.k_proj": read}
        sides["self_attn.v_proj"] = partial(_product, left=heads, gain=before, right=rotation)
        sides["self_attn.o_proj"] = partial(_product, left=rotation, right=shared)
        sides |= dict.fromkeys(
            ("mlp.gate_proj", "mlp.up_proj"), partial(_product, gain=after, right=rotation)
        )
        sides["mlp.down_proj"] = partial(_product, left=rotation)
        for name, product in sides.items():
            found[f"{block}.{name}.weight"] = product
            if "left" in product.keywords and layers[f"{block}.{name}"].bias is not None:
                found[f"{block}.{name}.bias"] = partial(_product_of_bias, product.keywords["left"])
    return found


def _product(
    weight: Tensor,
    *,
    left: Tensor | list[Tensor] | None = None,
    gain: Tensor | None = None,
    right: Tensor | list[Tensor] | None = None,
) -> Tensor:
    """Compute `left^T weight diag(gain) right` in float64, for a weight of shape `(out, in)`.

    Args:
        weight: the weight; the result is on its device.
        left, right: an orthogonal matrix, or the blocks of a block-diagonal one.
        gain: gain of the norm before the layer, shape `(in, 1)`.
    """
    left = torch.block_diag(*left) if isinstance(left, list) else left
    right = torch.block_diag(*right) if isinstance(right, list) else right
    right = right if gain is None or right is None else gain * right
    found = torch.empty_like(weight)
    for rows, target in (
        zip(weight.split(ROTATED_ROWS), found.split(ROTATED_ROWS), strict=True) if left is None else ()
    ):
        product = rows.to("cpu", torch.float64)
        target.copy_(product if right is None else product @ right)
    if left is not None:
        product = weight.to("cpu", torch.float64)
        found.copy_(left.T @ (product if right is None else product @ right))
    return found


def _product_of_bias(left: Tensor | list[Tensor], bias: Tensor) -> Tensor:
    """Compute `left^T bias` in float64, in the dtype of the bias."""
    left = torch.block_diag(*left) if isinstance(left, list) else left
    return (left.T @ bias.to("cpu", torch.float64)).to(bias)


def _gains(layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the gains of all norms in float64, shape `(size, 1)`, by name of the norm."""
    return {
        name: x.weight.detach().to("cpu", torch.float64, copy=True)[:, None]
        for name, x in layers.items()
        if _is_norm(x)
    }


def _is_norm(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Linear | nn.Embedding)


def _untie(model: Any) -> None:
    """Give the head a weight of its own, since the gain of the last norm is folded into it."""
    embedding, head = model.model.embed_tokens, model.lm_head
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.clone(), embedding.weight.requires_grad)
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def _difference(after: Tensor, before: Tensor) -> float:
    return float((after - before).norm() / before.norm())


def _changed(model: nn.Module, error: float) -> TargetError:
    return TargetError(
        f"Rotation changed the logits of this {type(model).__name__} by {error:.2g} of their norm; "
        f"rounding explains at most {TOLERANCE:g}. So its forward pass differs from that of Llama. Its "
        "weights have been changed: load the model again, and use it without rotation."
    )


def _logits_by_block(lazy: LazyModel) -> Tensor:
    """Compute the logits of a few tokens in float32, in the memory of one block."""
    model: Any = lazy.model
    batch = {"input_ids": torch.arange(_TOKENS)[None] % model.config.vocab_size, "use_cache": False}
    walk = Walk(model, tuple(_blocks(model)), [batch], {}, lazy.loaded)
    with walk.loaded([*walk.ends, *walk.block.modules()]):
        walk.enter(skip=True)
    while walk.position < len(walk.names):
        with walk.loaded(walk.block.modules()):
            walk.advance()
    with walk.loaded(walk.ends), walk.leaving(0, walk.states[walk.position, 0]):
        return model(**batch).logits.double()


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Draw a random orthogonal matrix in float64, shape `(size, size)`."""
    noise = torch.randn(size, size, dtype=torch.float64, generator=generator, device="cpu")
    return torch.linalg.qr(noise).Q


def _logits(model: PreTrainedModel) -> Tensor:
    """Compute the logits of a few tokens, in float64."""
    tokens = torch.arange(_TOKENS, device=model.device)[None] % model.config.vocab_size
    with in_eval_mode(model):
        return model(tokens, use_cache=False).logits.double().cpu()


def _blocks(model: PreTrainedModel) -> list[str]:
    """Return the names of the blocks in `model.layers`; empty if the model has none there."""
    blocks = getattr(getattr(model, "model", None), "layers", ())
    return [f"model.layers.{k}" for k in range(len(blocks))]


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    """Collect the embedding, the head, the linear layers and the norms of a Llama-like model by name.

    Raises:
        TargetError: the model does not have exactly these layers, or a layer has another type or size.
    """

    def refuse(name: str, why: str) -> TargetError:
        return TargetError(
            f"This {type(model).__name__} cannot be rotated: {name} {why}. A model like Llama is expected: "
            "embed_tokens, lm_head, and blocks with RMS norms before attention and MLP, and "
            f"{', '.join(LINEAR)}."
        )

    if name := next((name for name, x in model.named_modules() if isinstance(x, NetworkModule)), None):
        raise TargetError(f"{name} is compressed already; rotate the dense model, then compress it.")
    if not (blocks := _blocks(model)):
        raise refuse("model.layers", "is missing")
    plain: dict[str, type[nn.Module]] = {"model.embed_tokens": nn.Embedding, "lm_head": nn.Linear}
    plain |= {f"{block}.{x}": nn.Linear for block in blocks for x in LINEAR}
    norms = ["model.norm", *(f"{block}.{x}" for block in blocks for x in NORMS)]

    # Check that all expected modules exist.
    found: dict[str, Any] = {}
    for name in (*plain, *norms):
        try:
            found[name] = model.get_submodule(name)
        except AttributeError:
            raise refuse(name, "is missing") from None
    for name, kind in plain.items():
        if type(found[name]) is not kind or not is_plain(found[name]):
            raise refuse(name, f"is a {type(found[name]).__name__}, not a plain nn.{kind.__name__}")
    for name in norms:
        if not _is_rms_norm(found[name]):
            raise refuse(name, f"({type(found[name]).__name__}) does not compute weight * x / rms(x)")

    # Check that all heads have the same size.
    width = found["model.embed_tokens"].embedding_dim
    for block in blocks:
        size = getattr(model.get_submodule(f"{block}.self_attn"), "head_dim", None)
        q, k, v, o = (found[f"{block}.self_attn.{x}_proj"].weight.shape for x in "qkvo")
        if size is None or v[0] % size or q[0] % v[0] or k != v or o != (width, q[0]):
            raise refuse(f"{block}.self_attn", "does not consist of equal heads of queries, keys and values")

    # Check that only the modules in `found` have weights (except norms of queries and keys), and that no two
    # of them share a weight (except the embedding and the head).
    users: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layer = name.rpartition(".")[0]
        if layer not in found and not layer.endswith(UNTOUCHED):
            raise refuse(name, "is not part of such a model")
        other = users.setdefault(id(parameter), layer)
        if other != layer and {other, layer} != {"model.embed_tokens", "lm_head"}:
            raise refuse(name, f"is shared with {other}")
    return found


def _is_rms_norm(norm: nn.Module) -> bool:
    """Return True if a module computes `weight * x / rms(x)` for a test vector."""
    weights = dict(norm.named_parameters())
    if weights.keys() != {"weight"}:
        return False
    width, device = weights["weight"].shape[0], weights["weight"].device
    device = torch.device("cpu") if device.type == "meta" else device
    x, gain = torch.linspace(-1, 2, width, device=device), torch.linspace(2, 0.5, width, device=device)
    computed = functional_call(norm, {"weight": gain}, (x[None],))[0]
    return torch.allclose(computed, gain * x / x.square().mean().sqrt(), rtol=1e-3, atol=1e-3)

"""`rotate`: rotate the weights of a Llama-like model such that its outputs do not change.

Let `R` be an orthogonal matrix. Every layer that writes to the residual stream is changed to write `R^T y`
instead of `y`, and every layer that reads the stream uses `W R` instead of `W`. Outputs do not change,
because an RMS norm without gain commutes with `R`. The output of attention is a weighted sum of values, so
the values of each head can be rotated too, if the output projection is multiplied by the inverse.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from tensornet._util import in_eval_mode
from tensornet.errors import TargetError
from tensornet.nn.layer_kinds import is_plain
from tensornet.nn.module import NetworkModule

#: Names of the norms and linear layers of a block.
NORMS = ("input_layernorm", "post_attention_layernorm")
LINEAR = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
#: Names of the norms of queries and keys, which some models have; they are not changed.
UNTOUCHED = ("self_attn.q_norm", "self_attn.k_norm")
#: Largest change of the logits that float32 rounding can explain, relative to their norm.
TOLERANCE = 1e-3
#: Number of tokens on which logits are compared.
_TOKENS = 8
#: Number of rows that are multiplied at once, since a float64 copy of an embedding would be too large.
ROWS = 8192


@torch.no_grad()
def rotate(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Rotate the residual stream and the value heads of a model by random orthogonal matrices, in place.

    Logits change only by rounding, and outliers of the weights are spread over rows and columns. Whether this
    helps depends on the model and the method: on SmolLM2, rotation did not lower the loss of calibrated
    plans; with rounding to nearest at 3 bits, it raised the loss (docs/guides/language_models.md). Gains of
    norms are folded into the layers that follow. If the output head is tied to the embedding, it becomes a
    separate weight, so model and file grow by `vocab_size * hidden_size` weights.

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
    dtypes = {name: x.dtype for name, x in model.named_parameters(remove_duplicate=False)}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    before = _logits(model)
    embedding, head = layers["model.embed_tokens"], layers["lm_head"]
    generator = torch.Generator("cpu").manual_seed(seed)
    rotation = _orthogonal(embedding.embedding_dim, generator)

    # The gain of the last norm is folded into the head, which must therefore be untied from the embedding.
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.clone(), embedding.weight.requires_grad)
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    _multiply(embedding, right=rotation)
    _multiply(head, right=_take_gain(layers["model.norm"]) * rotation)

    for block in _blocks(model):
        q, k, v, o = (layers[f"{block}.self_attn.{x}_proj"] for x in "qkvo")
        size: Any = model.get_submodule(f"{block}.self_attn").head_dim
        queries, values = q.out_features // size, v.out_features // size
        heads = [_orthogonal(size, generator) for _ in range(values)]
        shared = [heads[head * values // queries] for head in range(queries)]
        read = _take_gain(layers[f"{block}.input_layernorm"]) * rotation
        _multiply(q, right=read)
        _multiply(k, right=read)
        _multiply(v, left=torch.block_diag(*heads).T, right=read)
        _multiply(o, left=rotation.T, right=torch.block_diag(*shared))
        read = _take_gain(layers[f"{block}.post_attention_layernorm"]) * rotation
        _multiply(layers[f"{block}.mlp.gate_proj"], right=read)
        _multiply(layers[f"{block}.mlp.up_proj"], right=read)
        _multiply(layers[f"{block}.mlp.down_proj"], left=rotation.T)

    error = float((_logits(model) - before).norm() / before.norm())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    if not error <= TOLERANCE:
        raise TargetError(
            f"Rotation changed the logits of this {type(model).__name__} by {error:.2g} of their norm; "
            f"rounding explains at most {TOLERANCE:g}. So its forward pass differs from that of Llama. Its "
            "weights have been changed: load the model again, and use it without rotation."
        )
    return model


def _multiply(layer: Any, *, left: Tensor | None = None, right: Tensor | None = None) -> None:
    """Replace the weight `(out, in)` of a layer by `left @ weight @ right`, and the bias by `left @ bias`."""
    for rows in layer.weight.split(ROWS) if left is None else (layer.weight,):
        product = rows.to("cpu", torch.float64)
        product = product if right is None else product @ right
        rows.copy_(product if left is None else left @ product)
    if left is not None and layer.bias is not None:
        layer.bias.copy_(left @ layer.bias.to("cpu", torch.float64))


def _take_gain(norm: Any) -> Tensor:
    """Set the gain of a norm to one, and return the old gain in float64, shape `(size, 1)`."""
    gain = norm.weight.to("cpu", torch.float64, copy=True)[:, None]
    norm.weight.fill_(1)
    return gain


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
    if name := next((name for name, x in model.named_parameters() if x.is_meta), None):
        raise refuse(name, "is not in memory")
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
    x, gain = torch.linspace(-1, 2, width, device=device), torch.linspace(2, 0.5, width, device=device)
    computed = functional_call(norm, {"weight": gain}, (x[None],))[0]
    return torch.allclose(computed, gain * x / x.square().mean().sqrt(), rtol=1e-3, atol=1e-3)

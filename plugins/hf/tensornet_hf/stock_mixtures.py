"""Convert upcycled models to transformers' own mixtures."""

import copy
from typing import Any

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from tensornet._util import check_type
from tensornet.errors import TargetError
from tensornet_hf.quantizer import POOLS, layer_descriptions
from tensornet_moe import ExpertFFN, SharedCoreMoE, SwitchRouter, TopKRouter
from tensornet_moe.pool import PooledExperts

#: For each dense class, the class and configuration of a mixture with the same attention.
COUNTERPARTS: dict[str, tuple[Any, Any]] = {
    "LlamaForCausalLM": (MixtralForCausalLM, MixtralConfig),
    "MistralForCausalLM": (MixtralForCausalLM, MixtralConfig),
    "Qwen3ForCausalLM": (Qwen3MoeForCausalLM, Qwen3MoeConfig),
}
_MIXTURE_TYPES = ("shared_core_moe", "expert_pool")
#: Configuration entries that are not copied, since they describe the dense model or its files.
_NOT_COPIED = (
    "architectures",
    "attention_bias",
    "mlp_bias",
    "model_type",
    "pretraining_tp",
    "quantization_config",
    "transformers_version",
)


@torch.no_grad()
def stock_mixture(model: PreTrainedModel) -> PreTrainedModel:
    """Convert an upcycled model to one of transformers' own mixtures, with dense experts.

    Llama and Mistral become Mixtral, and Qwen 3 becomes Qwen 3 MoE. Shared cores, low-rank deltas, integers
    and pools become dense experts in every layer; convert before you compress the other layers. Routers with
    biases have no counterpart. So models with pools made by `upcycle`, which need such routers, are refused.

    The new model computes the same as `model` in eval mode. Its `save_pretrained` writes a checkpoint that
    transformers loads without this library and runs with all of its implementations of experts (such as
    `experts_implementation="grouped_mm"`).

    Args:
        model: a model whose feed-forward networks are all mixtures; it is not changed.

    Returns:
        The new model, on the device, in the dtype and in the mode (training or eval) of `model`.

    Raises:
        TypeError: the model is not a transformers model.
        TargetError: the model or one of its mixtures has no counterpart in transformers; the message says
            why.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
        >>> _ = th.upcycle(model, share="none", experts=4, top_k=2)
        >>> stock = th.stock_mixture(model)
        >>> ids = torch.arange(8)[None]
        >>> type(stock).__name__, torch.allclose(stock(ids).logits, model(ids).logits, atol=1e-5)
        ('MixtralForCausalLM', True)
    """
    check_type("model", model, PreTrainedModel, "pass a model of transformers that was upcycled")
    name = type(model).__name__
    if name not in COUNTERPARTS:
        raise TargetError(
            f"No mixture of transformers has the attention of {name}; only {', '.join(COUNTERPARTS)} can be "
            "converted. Save the model without conversion: th.save(model, folder)."
        )
    kind, config_kind = COUNTERPARTS[name]
    layers: list[SharedCoreMoE] = []
    for index, block in enumerate(model.model.layers):
        if not isinstance(block.mlp, SharedCoreMoE):
            raise TargetError(
                f"model.layers.{index}.mlp is not a mixture, but all layers must be mixtures; see th.upcycle."
            )
        layers.append(block.mlp)
    facts = [_facts(f"model.layers.{index}.mlp", layer, kind) for index, layer in enumerate(layers)]
    for index, fact in enumerate(facts):
        if fact != facts[0]:
            raise TargetError(
                f"All layers of {kind.__name__} must be equal, but layer 0 is {facts[0]} and layer {index} "
                f"is {fact}."
            )
    _refuse_attention(model)
    found = layer_descriptions(model).items()
    if others := [part for part, spec in found if spec["type"] not in _MIXTURE_TYPES]:
        raise TargetError(
            f"{', '.join(others[:5])} are compressed, but mixtures of transformers have dense layers. First "
            "convert the model, then compress the result, which can also be exported to GGUF; or save this "
            "one without conversion: th.save(model, folder)."
        )

    # Build the configuration of the mixture, and a model with uninitialized weights.
    options = {key: x for key, x in model.config.to_dict().items() if key not in _NOT_COPIED}
    options |= {"hidden_act": facts[0]["activation"], "num_experts_per_tok": facts[0]["top_k"]}
    options |= {"intermediate_size": facts[0]["hidden"], "router_aux_loss_coef": layers[0].balance_coef}
    if config_kind is MixtralConfig:
        options["num_local_experts"] = facts[0]["experts"]
    else:
        options |= {"num_experts": facts[0]["experts"], "moe_intermediate_size": facts[0]["hidden"]}
        options |= {"norm_topk_prob": facts[0]["combine"] == "unit", "decoder_sparse_step": 1}
    with no_init_weights(), torch.device(model.device):
        made: PreTrainedModel = kind(config_kind(**options))

    # Copy all tensors except those of the mixtures, which become stacks of matrices.
    kept = {key: x for key, x in model.state_dict().items() if not {"mlp", POOLS} & set(key.split("."))}
    for index, layer in enumerate(layers):
        network = _network(layer.experts)
        used = layer.experts.experts if isinstance(layer.experts, PooledExperts) else range(layer.num_experts)
        gate, up, down = (network.bank(name).expert_matrices(used).to(model.dtype) for name in network.names)
        mlp = f"model.layers.{index}.mlp"
        kept[f"{mlp}.gate.weight"] = layer.router.weight
        kept[f"{mlp}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        kept[f"{mlp}.experts.down_proj"] = down
    made.load_state_dict({key: x.detach().clone() for key, x in kept.items()}, assign=True)
    made.requires_grad_(True)
    made.tie_weights()
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.train(model.training)


def _facts(name: str, layer: SharedCoreMoE, kind: type[PreTrainedModel]) -> dict[str, Any]:
    """Return the properties of a mixture layer that determine its counterpart in transformers.

    Raises:
        TargetError: the layer computes something that `kind` cannot compute.
    """
    router, network = layer.router, _network(layer.experts)
    steps = router.bias_steps
    combines = ("unit",) if kind is MixtralForCausalLM else ("unit", "prob")
    reasons = {
        f"a {type(router).__name__}": type(router) not in (TopKRouter, SwitchRouter),
        "normalized logits": router.normalize,
        "biases of the router": steps is not None and bool((steps != steps[0]).any()),
        f"combine={router.combine!r}": router.combine not in combines,
        "a capacity": layer.capacity_factor is not None,
        "an always-on expert": layer.shared_expert is not None,
        "dropout": layer.dropout > 0 or network.dropout > 0,
        "experts without a gate": not network.gated,
        "biases of experts": getattr(network, f"{network.names[0]}_bias") is not None,
        f"the activation {network.activation!r}": network.activation not in ACT2FN,
    }
    if found := [what for what, present in reasons.items() if present]:
        raise TargetError(
            f"{name} has {', '.join(found)}, which {kind.__name__} does not support. Save the model without "
            "conversion: th.save(model, folder)."
        )
    return {
        "experts": layer.num_experts,
        "top_k": router.top_k,
        "hidden": network.bank(network.names[0]).out_features,
        "activation": network.activation,
        "combine": router.combine,
    }


def _network(experts: Any) -> ExpertFFN:
    """Return the experts of a layer, or those of its pool if it uses a pool."""
    if isinstance(experts, PooledExperts):
        experts = experts.pool.experts
    check_type("The experts of a layer", experts, ExpertFFN, "gather_experts(model) if they are distributed")
    return experts


def _refuse_attention(model: PreTrainedModel) -> None:
    """Raise TargetError if the model sets an option that mixtures in transformers lack."""
    config: Any = model.config
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if getattr(config, name, False):
            raise TargetError(
                f"{name}=True has no counterpart in a mixture of transformers. Save the model without "
                "conversion: th.save(model, folder)."
            )

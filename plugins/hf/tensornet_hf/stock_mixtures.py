"""Mixtures as ordinary models of transformers, which need nothing of this library."""

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
from tensornet_hf.quantizer import OWNERS, layer_descriptions
from tensornet_moe import ExpertFFN, SharedCoreMoE, SwitchRouter, TopKRouter
from tensornet_moe.pool import PooledExperts

#: Class and configuration of the mixture that has the attention of a dense class.
COUNTERPARTS: dict[str, tuple[Any, Any]] = {
    "LlamaForCausalLM": (MixtralForCausalLM, MixtralConfig),
    "MistralForCausalLM": (MixtralForCausalLM, MixtralConfig),
    "Qwen3ForCausalLM": (Qwen3MoeForCausalLM, Qwen3MoeConfig),
}
_MIXTURE_TYPES = ("shared_core_moe", "expert_pool", "shared_cores")
#: Entries of a configuration that describe the dense model or its files.
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
    """Convert an upcycled model to an ordinary mixture of transformers, with dense experts.

    Llama and Mistral become Mixtral, Qwen 3 becomes Qwen 3 MoE. The matrices of all experts are built, so
    shared cores, low-rank deltas, integers and pools become dense experts of every layer. The new model
    computes the same as `model` in eval mode. Its `save_pretrained` writes a checkpoint that transformers
    loads without this library, and with every implementation of experts that it has
    (`experts_implementation="grouped_mm"`).

    Args:
        model: a model whose feed-forward networks are all mixtures; it is not changed.

    Returns:
        The new model, on the device and in the dtype of `model`, in the same mode.

    Raises:
        TypeError: not a transformers model.
        TargetError: the model or one of its mixtures has no ordinary counterpart; the message says why.

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
            f"No mixture of transformers has the attention of {name}; there is one for "
            f"{', '.join(COUNTERPARTS)}. Save the model as it is: th.save(model, folder)."
        )
    kind, config_kind = COUNTERPARTS[name]
    layers: list[SharedCoreMoE] = []
    for index, block in enumerate(model.model.layers):
        if not isinstance(block.mlp, SharedCoreMoE):
            raise TargetError(f"model.layers.{index}.mlp is no mixture; all layers must be, see th.upcycle.")
        layers.append(block.mlp)
    facts = [_facts(f"model.layers.{index}.mlp", layer, kind) for index, layer in enumerate(layers)]
    for index, fact in enumerate(facts):
        if fact != facts[0]:
            raise TargetError(
                f"All layers of {kind.__name__} are alike, and here layer 0 is {facts[0]}, layer {index} "
                f"{fact}."
            )
    _refuse_attention(model)
    found = layer_descriptions(model).items()
    if others := [part for part, spec in found if spec["type"] not in _MIXTURE_TYPES]:
        raise TargetError(
            f"{', '.join(others[:5])} are compressed, and mixtures of transformers have dense layers. Save "
            "the model as it is: th.save(model, folder)."
        )

    # Build the configuration of the mixture, and a model without values.
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

    # Keep every tensor but those of the mixtures, which become stacks of matrices.
    kept = {key: x for key, x in model.state_dict().items() if not {"mlp", OWNERS} & set(key.split("."))}
    for index, layer in enumerate(layers):
        network = _network(layer)
        gate, up, down = (network.bank(name).expert_matrices().to(model.dtype) for name in network.names)
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
    """Describe what a mixture of transformers can set.

    Raises:
        TargetError: the layer computes something that `kind` cannot.
    """
    router, network = layer.router, _network(layer)
    steps = router.bias_steps
    combines = ("unit",) if kind is MixtralForCausalLM else ("unit", "prob")
    reasons = {
        f"a {type(router).__name__}": type(router) not in (TopKRouter, SwitchRouter),
        "normalized logits": router.normalize,
        "biases of the router": steps is not None and bool((steps != steps[0]).any()),
        f"combine={router.combine!r}": router.combine not in combines,
        "a capacity": layer.capacity_factor is not None,
        "a network for every token": layer.shared_expert is not None,
        "dropout": layer.dropout > 0 or network.dropout > 0,
        "experts without a gate": not network.gated,
        "biases of experts": getattr(network, f"{network.names[0]}_bias") is not None,
        f"the activation {network.activation!r}": network.activation not in ACT2FN,
    }
    if found := [what for what, present in reasons.items() if present]:
        raise TargetError(
            f"{name} has {', '.join(found)}, which {kind.__name__} does not have. Save the model as it is: "
            "th.save(model, folder)."
        )
    return {
        "experts": layer.num_experts,
        "top_k": int(router.experts_per_token),
        "hidden": network.bank(network.names[0]).out_features,
        "activation": network.activation,
        "combine": router.combine,
    }


def _network(layer: SharedCoreMoE) -> ExpertFFN:
    """Return the experts of a layer, those of its pool if it uses one."""
    experts: Any = layer.experts.owner.experts if isinstance(layer.experts, PooledExperts) else layer.experts
    check_type("The experts of a layer", experts, ExpertFFN, "gather_experts(model) if they are spread")
    return experts


def _refuse_attention(model: PreTrainedModel) -> None:
    """Raise TargetError for variants of the attention that mixtures do not have."""
    config: Any = model.config
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if getattr(config, name, False):
            raise TargetError(
                f"{name}=True has no counterpart in a mixture; save the model as it is: th.save."
            )

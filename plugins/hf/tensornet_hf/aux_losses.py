"""Add the auxiliary losses of mixtures to the loss of a Hugging Face model.

Models like T5 and GPT-2 know nothing of routers. Hooks on the model tell its mixtures which tokens are
padding before a forward, and add their losses to the model's after it. Every part that can be called alone
(an encoder, a body without head) has them; only the outermost part that is being called acts.
"""

import inspect
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensornet_moe import SharedCoreMoE, collect_aux_losses

IGNORED_LABEL = -100
#: Inputs that are not tokens.
FRAMES = ("input_features", "input_values", "pixel_values")


def join_aux_losses(model: PreTrainedModel) -> bool:
    """Pass padding to the mixtures of a model, and add their auxiliary losses to its loss.

    In training, where labels are given, the loss becomes task loss + `collect_aux_losses(model).total`; in
    eval it stays the task loss, so that perplexities compare. When the trainer normalises the loss by the
    number of labels in several micro-batches (`num_items_in_batch`), the auxiliary losses are weighted by
    the share of this micro-batch. Calling it again changes nothing.

    Args:
        model: with or without mixtures.

    Returns:
        Whether the model has mixtures.
    """
    if not any(isinstance(module, SharedCoreMoE) for module in model.modules()):
        return False
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or not _mixtures(part):
            continue
        if any(isinstance(hook, _Before) for hook in part._forward_pre_hooks.values()):
            continue
        names = tuple(inspect.signature(part.forward).parameters)
        part.register_forward_pre_hook(_Before(names), with_kwargs=True)
        part.register_forward_hook(_After(names), with_kwargs=True, always_call=True)
    return True


class _Before:
    """Forward pre-hook that passes padding to mixtures; a class, so that models can be pickled."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(part, PreTrainedModel)
        if getattr(part, _INNER, False):
            return
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        for inner in part.modules():
            if isinstance(inner, PreTrainedModel) and inner is not part:
                setattr(inner, _INNER, True)
        encoder, decoder = _split(part)
        # Sound and pictures have more frames than their encoder makes tokens of: a mask over them fits none.
        frames = any(given.get(name) is not None for name in FRAMES)
        mask = None if frames else _fit(given.get("attention_mask"), given, "input_ids", "inputs_embeds")
        for mixture in encoder:
            mixture.token_mask, mixture.aux_losses = mask, None
        if decoder:
            mask = _decoder_mask(given)
            for mixture in decoder:
                mixture.token_mask, mixture.aux_losses = mask, None


class _After:
    """Forward hook that adds the auxiliary losses to the loss of the model."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if getattr(part, _INNER, False):
            return None
        for inner in part.modules():
            if isinstance(inner, PreTrainedModel) and inner is not part:
                setattr(inner, _INNER, False)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        labels = given.get("labels")
        if output is None or labels is None or not part.training or not torch.is_grad_enabled():
            return None
        total = collect_aux_losses(part).total * _share(labels, given.get("num_items_in_batch"))
        if isinstance(output, MutableMapping):
            output["loss"] = output["loss"] + total.to(output["loss"].device)
            return output
        return (output[0] + total.to(output[0].device), *output[1:])


#: On a part of a model: whether a part around it is being called, which then speaks for it.
_INNER = "_tensornet_inside_call"


def _mixtures(part: nn.Module) -> list[SharedCoreMoE]:
    return [module for module in part.modules() if isinstance(module, SharedCoreMoE)]


def _split(part: PreTrainedModel) -> tuple[list[SharedCoreMoE], list[SharedCoreMoE]]:
    """Split mixtures into those that read the input of the call and those of the decoder."""
    everything = _mixtures(part)
    if not getattr(part.config, "is_encoder_decoder", False):
        return everything, []
    inside = {id(module) for module in part.get_encoder().modules()}
    return [m for m in everything if id(m) in inside], [m for m in everything if id(m) not in inside]


def _decoder_mask(given: Mapping[str, Any]) -> Tensor | None:
    mask = given.get("decoder_attention_mask")
    if mask is not None:
        return _fit(mask, given, "decoder_input_ids", "decoder_inputs_embeds", "labels")
    labels = given.get("labels")
    # Without a mask of its own, what is not to be predicted is the padding of the decoder.
    return None if labels is None else labels != IGNORED_LABEL


def _fit(mask: Any, given: Mapping[str, Any], *tokens: str) -> Tensor | None:
    """Return the mask of this call's tokens; with a cache the attention mask covers earlier ones too."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None  # masks of attention patterns say nothing of single tokens
    called = next((given[name] for name in tokens if given.get(name) is not None), None)
    return mask if called is None else mask[:, -called.shape[1] :]


def _share(labels: Tensor, items: Tensor | int | None) -> Tensor | float:
    return 1.0 if items is None else (labels != IGNORED_LABEL).sum() / items

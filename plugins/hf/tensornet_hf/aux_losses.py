"""Add the auxiliary losses of mixtures to the loss of a Hugging Face model.

Models like T5 and GPT-2 have no code for routers. So hooks on the model pass the padding mask to its mixtures
before a forward pass, and add their losses to the model's loss after it. Every part that can be called alone
(an encoder, a body without head) has these hooks; only those of the outermost running part act.
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
#: Attribute of every part with hooks: True while an enclosing module runs, whose hooks then act instead.
_ENCLOSED = "_tensornet_enclosed"


def join_aux_losses(model: PreTrainedModel) -> None:
    """Pass padding to the mixtures of a model, and add their auxiliary losses to its loss.

    In training with labels the loss becomes task loss + `collect_aux_losses(model).total`; in eval mode it is
    the task loss alone, so that perplexities can be compared. When the trainer normalises the loss by the
    number of labels in several micro-batches (`num_items_in_batch`), the auxiliary losses are weighted by the
    share of this micro-batch. Calling it again changes nothing.

    Args:
        model: any model, with or without mixtures.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and _mixtures(part) and not hasattr(part, _ENCLOSED):
            hooks = _AuxLosses(tuple(inspect.signature(part.forward).parameters))
            setattr(part, _ENCLOSED, False)
            part.register_forward_pre_hook(hooks.before, with_kwargs=True)
            part.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)


class _AuxLosses:
    """Hooks of one part of a model, as methods of a class so that models can be pickled.

    Args:
        names: the parameters of the part's `forward`.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def before(self, part: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pass padding to mixtures."""
        if getattr(part, _ENCLOSED):
            return
        _mark_inner(part, True)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        # Encoders of sound and images make fewer tokens than there are frames, so masks of frames have
        # another length.
        frames = any(given.get(name) is not None for name in FRAMES)
        mask = None if frames else _fit(given.get("attention_mask"), given, "input_ids", "inputs_embeds")
        labels, decoder_mask = given.get("labels"), given.get("decoder_attention_mask")
        if decoder_mask is not None:
            decoder_mask = _fit(decoder_mask, given, "decoder_input_ids", "decoder_inputs_embeds", "labels")
        elif labels is not None:  # without a mask, ignored labels are the padding of the decoder
            decoder_mask = labels != IGNORED_LABEL
        encoder_decoder = getattr(part.config, "is_encoder_decoder", False)
        reads_input = part.get_encoder() if encoder_decoder else part
        inside = {id(module) for module in reads_input.modules()}
        for mixture in _mixtures(part):
            mixture.token_mask = mask if id(mixture) in inside else decoder_mask
            mixture.aux_losses = None

    def after(self, part: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Add the auxiliary losses to the loss of the model."""
        if getattr(part, _ENCLOSED):
            return None
        _mark_inner(part, False)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        labels, items = given.get("labels"), given.get("num_items_in_batch")
        if output is None or labels is None or not part.training or not torch.is_grad_enabled():
            return None
        share = 1.0 if items is None else (labels != IGNORED_LABEL).sum() / items
        total = collect_aux_losses(part).total * share
        if isinstance(output, MutableMapping):
            output["loss"] = output["loss"] + total.to(output["loss"].device)
            return output
        return (output[0] + total.to(output[0].device), *output[1:])


def _mark_inner(part: PreTrainedModel, enclosed: bool) -> None:
    for inner in part.modules():
        if hasattr(inner, _ENCLOSED) and inner is not part:
            setattr(inner, _ENCLOSED, enclosed)


def _mixtures(part: nn.Module) -> list[SharedCoreMoE]:
    return [module for module in part.modules() if isinstance(module, SharedCoreMoE)]


def _fit(mask: Any, given: Mapping[str, Any], *tokens: str) -> Tensor | None:
    """Return the part of the attention mask for the tokens of this call, without those in the cache."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None  # a mask of attention patterns is not a padding mask
    called = next((given[name] for name in tokens if given.get(name) is not None), None)
    return mask if called is None else mask[:, -called.shape[1] :]

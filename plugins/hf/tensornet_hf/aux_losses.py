"""Add the auxiliary losses of mixtures to the loss of a Hugging Face model.

Model classes such as T5 and GPT-2 have no code for routers, so forward hooks do the work. Before a forward
pass they give the padding mask to the mixtures in the model; after it they add the mixtures' auxiliary losses
to the model's loss. `upcycle` registers these hooks, and so does loading if the saved model had them. If you
put a mixture into a model by hand, no hooks are registered, since your training loop may add the losses.

Every submodule that can be called alone (an encoder, a model without its head) has these hooks, but only the
hooks of the outermost running module act.
"""

import inspect
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensornet_moe import SharedCoreMoE, collect_aux_losses

IGNORED_LABEL = -100
#: Arguments of `forward` that contain audio frames or pixels, not tokens.
FRAMES = ("input_features", "input_values", "pixel_values")
#: Attribute of every module with hooks. If it is True, an enclosing module is running, and hooks do nothing.
_ENCLOSED = "_tensornet_enclosed"


def joins_aux_losses(model: nn.Module) -> bool:
    """Return True if the auxiliary losses of a model's mixtures are added to its loss."""
    return any(hasattr(part, _ENCLOSED) for part in model.modules())


def join_aux_losses(model: nn.Module) -> None:
    """Register hooks that give a model's mixtures the padding mask and add their losses to the model's loss.

    If labels are given in training mode, the model returns task loss + `collect_aux_losses(model).total`. In
    eval mode it returns the task loss alone, so that perplexities can be compared. If `Trainer` divides the
    loss by the number of labels in several micro-batches (`num_items_in_batch`), the auxiliary losses are
    multiplied by the share of these labels in the current micro-batch. A second call changes nothing.

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
    """Forward hooks of one module, as methods instead of closures, so that the model can be pickled.

    Args:
        names: names of the arguments of the module's `forward`, in order.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def before(self, part: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give each mixture the padding mask of its tokens, before the module runs."""
        if getattr(part, _ENCLOSED):
            return
        _mark_inner(part, True)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        # Encoders of sound and images produce fewer tokens than there are frames, so a mask of the frames
        # does not fit the tokens.
        frames = any(given.get(name) is not None for name in FRAMES)
        mask = None if frames else _fit(given.get("attention_mask"), given, "input_ids", "inputs_embeds")
        labels, decoder_mask = given.get("labels"), given.get("decoder_attention_mask")
        if decoder_mask is not None:
            decoder_mask = _fit(decoder_mask, given, "decoder_input_ids", "decoder_inputs_embeds", "labels")
        elif labels is not None:  # without a mask, ignored labels mark the padding of the decoder
            decoder_mask = labels != IGNORED_LABEL
        encoder_decoder = getattr(part.config, "is_encoder_decoder", False)
        reads_input = part.get_encoder() if encoder_decoder else part
        inside = {id(module) for module in reads_input.modules()}
        for mixture in _mixtures(part):
            mixture.token_mask = mask if id(mixture) in inside else decoder_mask
            mixture.aux_losses = None

    def after(self, part: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Add the auxiliary losses to the loss in the module's output."""
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
    """Cut an attention mask, which may also cover cached tokens, to the tokens of this call."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None  # a mask of more dimensions is not a padding mask
    called = next((given[name] for name in tokens if given.get(name) is not None), None)
    return mask if called is None else mask[:, -called.shape[1] :]

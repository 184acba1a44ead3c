"""Teaching a model how it is stored: what transformers looks for on a model, put on and taken off."""

import os
from functools import wraps
from types import MethodType
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer

from tensornet.errors import TargetError
from tensornet_hf import ties
from tensornet_hf.card import write_card
from tensornet_hf.config import METHOD, TensorNetworkConfig
from tensornet_hf.structure import is_inside

#: What is put on a model.
ATTRIBUTES = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "_weight_conversions",
    "save_pretrained",
    "resize_token_embeddings",
)


def attach(model: PreTrainedModel, config: TensorNetworkConfig, quantizer: HfQuantizer) -> None:
    """Have `save_pretrained`, `Trainer` and the rest of transformers treat the model as compressed.

    Args:
        model: changed in place; may be attached already.
        config: describes it as it is now.
        quantizer: writes it.
    """
    attributes = {
        "hf_quantizer": quantizer,
        "quantization_method": METHOD,
        # Cores are ordinary parameters. The flag would only forbid .half() and .float().
        "is_quantized": False,
        # Stored under the names of the model: the ones of older checkpoints are made for dense weights.
        "_weight_conversions": [],
        "save_pretrained": MethodType(save_pretrained, model),
        "resize_token_embeddings": MethodType(resize_token_embeddings, model),
    }
    assert set(attributes) == set(ATTRIBUTES)
    for name, value in attributes.items():
        setattr(model, name, value)
    model.config.quantization_config = config
    ties.hand_over(model, config.layers, config.ties)


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`, once no compressed module is left."""
    for name in ATTRIBUTES:
        model.__dict__.pop(name, None)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.__dict__.pop("quantization_config", None)
        config.__dict__.pop("_is_quantized", None)
    ties.take_back(model)


# The two functions below stand on single models in place of the methods of their class. They bear the names
# of these methods because pickling looks a bound method up by the name of its function.


@wraps(PreTrainedModel.save_pretrained)
def save_pretrained(
    self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """Save, and put a model card beside that says how to load: transformers without us would not."""
    result = type(self).save_pretrained(self, save_directory, *args, **kwargs)
    write_card(save_directory, type(self).__name__)
    return result


@wraps(PreTrainedModel.resize_token_embeddings)
def resize_token_embeddings(
    self: PreTrainedModel, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Refuse where the rows are made of cores; transformers would fail on their shape."""
    tables = [self.get_input_embeddings(), self.get_output_embeddings()]
    names = [name for name, module in self.named_modules() if any(module is table for table in tables)]
    layers = set(self.config.quantization_config.layers)
    inside = [name for name in names if is_inside(f"{name}.weight", layers)]
    if inside and (new_num_tokens is not None or kwargs.get("pad_to_multiple_of") or any(args)):
        raise TargetError(
            f"{', '.join(inside)} is made of cores, which have no room for another number of tokens. Call "
            "tensornet.decompress(model), resize, and compress again; or compress with "
            f"exclude_modules={inside!r}."
        )
    return type(self).resize_token_embeddings(self, new_num_tokens, *args, **kwargs)

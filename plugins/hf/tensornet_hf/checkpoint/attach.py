"""Teaching a model how it is stored: what transformers looks for on a model, put on and taken off."""

import os
from functools import wraps
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer

from tensornet.errors import TargetError
from tensornet.extension import structure_changed
from tensornet.nn import MPOEmbedding
from tensornet_hf.checkpoint import ties
from tensornet_hf.checkpoint.describe import compressed_layers, is_inside
from tensornet_hf.checkpoint.model_card import write_card
from tensornet_hf.checkpoint.quantization_config import METHOD, TensorNetworkConfig

#: What is put on a model.
ATTRIBUTES = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "_weight_conversions",
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


def is_attached(model: PreTrainedModel) -> bool:
    """Whether `attach` was the last word."""
    return model.__dict__.get("quantization_method") == METHOD


# Two methods of PreTrainedModel do more for models that are attached. They are wrapped once, in its class: a
# bound method put on a model would be a cycle of references, and the weights of a model that nobody uses any
# more would stay in memory until Python happens to look for cycles, which may be many models later.

_save_pretrained = PreTrainedModel.save_pretrained
_resize_token_embeddings = PreTrainedModel.resize_token_embeddings


@wraps(_save_pretrained)
def save_pretrained(
    self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """Save, and put a model card beside that says how to load: transformers without us would not.

    Layers that were replaced by hand are described first.
    """
    if not is_attached(self) and compressed_layers(self):
        structure_changed(self)
    result = _save_pretrained(self, save_directory, *args, **kwargs)
    if is_attached(self):
        write_card(save_directory, type(self).__name__)
    return result


@wraps(_resize_token_embeddings)
def resize_token_embeddings(
    self: PreTrainedModel, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Refuse where the rows are made of cores, unless their number stays; transformers would fail on it."""
    if is_attached(self) and new_num_tokens is not None and not args and not kwargs:
        table = self.get_input_embeddings()
        if isinstance(table, MPOEmbedding) and table.num_embeddings == new_num_tokens:
            return table
    if is_attached(self) and (new_num_tokens is not None or kwargs.get("pad_to_multiple_of") or any(args)):
        _refuse_tables_of_cores(self)
    return _resize_token_embeddings(self, new_num_tokens, *args, **kwargs)


def _refuse_tables_of_cores(model: PreTrainedModel) -> None:
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is table for table in tables)]
    layers = set(model.config.quantization_config.layers)
    if inside := [name for name in names if is_inside(f"{name}.weight", layers)]:
        raise TargetError(
            f"{', '.join(inside)} is made of cores, which have no room for another number of tokens. Call "
            "tensornet.decompress(model), resize, and compress again; or compress with "
            f"exclude_modules={inside!r}."
        )


PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]
PreTrainedModel.resize_token_embeddings = resize_token_embeddings  # type: ignore[method-assign]

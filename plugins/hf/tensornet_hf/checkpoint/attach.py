"""Attach quantizer and configuration to a model, so that transformers saves it compressed; detach them.

Saving writes a model card as well, and resizing the vocabulary has to refuse tables made of cores. Both are
methods of the model's class. So an attached model gets a subclass of its class, made at run time under the
same name, as `torch.distributed.fsdp.fully_shard` does; no class of transformers is changed. Bound methods on
the instance would be a cycle of references, which keeps the weights of an unused model in memory until Python
collects cycles.
"""

import os
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer

from tensornet.errors import TargetError
from tensornet.nn import MPOEmbedding
from tensornet_hf.checkpoint import ties
from tensornet_hf.checkpoint.describe import is_inside
from tensornet_hf.checkpoint.model_card import write_card
from tensornet_hf.checkpoint.quantization_config import METHOD, TensorNetworkConfig

#: Attributes that are set on a model.
ATTRIBUTES = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "_weight_conversions",
)


class CompressedModel:
    """Methods of attached models, mixed into a subclass of the model's class."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save, and write a model card that says how to load: without tensornet_hf transformers fails."""
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if is_attached(self):
            write_card(save_directory, type(self).__name__)
        return result

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """Resize the vocabulary; a table of cores only if the number of tokens stays.

        Raises:
            TargetError: another number of tokens; the message names the tables that cannot be resized.
        """
        if is_attached(self) and new_num_tokens is not None and not args and not kwargs:
            table: Any = self.get_input_embeddings()  # type: ignore[attr-defined]
            if isinstance(table, MPOEmbedding) and table.num_embeddings == new_num_tokens:
                return table
        changes = new_num_tokens is not None or kwargs.get("pad_to_multiple_of") or any(args)
        if is_attached(self) and changes:
            _refuse_tables_of_cores(self)
        resized: nn.Module = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)  # type: ignore[misc]
        return resized

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy through transformers' own class, in place of the generated subclass."""
        state: Any = super().__reduce_ex__(max(2, protocol))
        return (_new, (_stock_class(type(self)),), *state[2:])


@cache
def _compressed_class(stock: Any) -> Any:
    """Build the subclass for attached models of a class, once for each class."""
    names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock)(stock.__name__, (CompressedModel, stock), names)


def _stock_class(kind: type) -> Any:
    """Return the class that a subclass was made for."""
    return kind.__mro__[kind.__mro__.index(CompressedModel) + 1]


def _new(stock: type) -> Any:
    """Make an empty attached model, which unpickling and copying fill."""
    kind = _compressed_class(stock)
    return kind.__new__(kind)


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
    if not isinstance(model, CompressedModel):
        model.__class__ = _compressed_class(type(model))  # type: ignore[arg-type]
    ties.hand_over(model, config.layers, config.ties)


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`, once no compressed module is left."""
    for name in ATTRIBUTES:
        model.__dict__.pop(name, None)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.__dict__.pop("quantization_config", None)
        config.__dict__.pop("_is_quantized", None)
    ties.take_back(model)
    if CompressedModel in type(model).__bases__:  # not if the class was derived once more
        model.__class__ = _stock_class(type(model))


def is_attached(model: Any) -> bool:
    """Return True if the model is attached; a detached model may still have the subclass."""
    return model.__dict__.get("quantization_method") == METHOD


def _refuse_tables_of_cores(model: Any) -> None:
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is table for table in tables)]
    layers = set(model.config.quantization_config.layers)
    if inside := [name for name in names if is_inside(f"{name}.weight", layers)]:
        raise TargetError(
            f"{', '.join(inside)} is made of cores, which have no room for another number of tokens. Call "
            "tensornet.decompress(model), resize, and compress again; or compress with "
            f"exclude_modules={inside!r}."
        )

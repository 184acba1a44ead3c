"""Default calibration text for language models that are compressed without calibration data."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from tensornet.errors import FormatError
from tensornet.nn.extension import ProvidedData
from tensornet_hf.embedded import calibration_text
from tensornet_hf.text.tokens import load_tokenizer, token_ids, usual_context

TOKENS = 16_384


def embedded_text(model: nn.Module) -> ProvidedData | None:
    """Tokenize the embedded chapters of the King James Bible for a causal language model.

    Returns None for models of other kinds, and if neither the model's folder nor the cache of the hub holds a
    tokenizer.
    """
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder or not model.can_generate():
        return None
    if not model.name_or_path:
        return None
    try:
        ids = token_ids(load_tokenizer(Path(model.name_or_path)), calibration_text())[:TOKENS]
    except FormatError:
        return None
    context = usual_context(model, limit=512)
    windows = ids[: len(ids) // context * context].reshape(-1, context)
    batches = windows.split(max(1, 1024 // context))
    return ProvidedData(batches, f"{windows.numel():,} tokens of the embedded text (King James Bible)")

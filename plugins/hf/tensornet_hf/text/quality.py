"""Quality of a model on a held-out text: loss and perplexity, or the cosine with the dense model."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tensornet.calibration import cosine_losses, losses_against
from tensornet.compression.measure import light_copy, mean_loss
from tensornet.errors import TargetError
from tensornet_hf.text.calibration_data import calibration_data, scores_tokens
from tensornet_hf.text.perplexity import perplexity
from tensornet_hf.text.tokens import load_tokenizer, token_ids, usual_context

#: Tokens of a held-out text that are used.
HELD_OUT_TOKENS = 32_768


@dataclass(frozen=True)
class Quality:
    """Loss of a model on a held-out text.

    Args:
        loss: of a token in nats; of an encoder, one minus the cosine with the dense model's outputs.
        of_tokens: whether the loss is that of predicted tokens, so that its exponential is a perplexity.
        how: text and windows, in a few words.
        measure: what `loss` is: `"loss"` or `"one minus cosine"`.
    """

    loss: float
    of_tokens: bool
    how: str
    measure: str = "loss"

    @property
    def perplexity(self) -> float | None:
        """Exponential of the loss; None where it is not one of tokens."""
        return math.exp(min(self.loss, 700.0)) if self.of_tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return {**asdict(self), "perplexity": self.perplexity}


#: Measures a model; all models that one judge measures see the same tokens.
Judge = Callable[[PreTrainedModel], Quality]


def judge_of(
    dense: PreTrainedModel,
    folder: Path,
    text: str,
    *,
    name: str = "held-out text",
    tokens: int | None = HELD_OUT_TOKENS,
    progress: bool = False,
) -> Judge:
    """Make a judge of a dense model and its compressed versions on one text.

    Args:
        dense: stays in memory where models are judged by their distance from it.
        folder: holds its tokenizer.
        text: neither seen in training nor in calibration.
        name: of the text, for reports.
        tokens: how much of it to use; all if absent.
        progress: show progress bars.

    Raises:
        TargetError: a classifier, for which a text has no labels.
        ValueError: the text is too short.

    Example:
        >>> from tensornet_hf.text.quality import judge_of
        >>> model = th.load(th.embedded.gpt2_path())
        >>> judge = judge_of(model, th.embedded.gpt2_path(), th.embedded.heldout_text(), tokens=512)
        >>> 10 < judge(model).perplexity < 30
        True
    """
    if dense.can_generate() and not dense.config.is_encoder_decoder:
        return _causal_judge(dense, folder, text, name=name, tokens=tokens, progress=progress)
    data = calibration_data(dense, folder, text, tokens=tokens)
    of_tokens = scores_tokens(type(dense))
    if not of_tokens and data.loss_fn is not cosine_losses:
        raise TargetError(
            f"{type(dense).__name__} is neither a language model nor an encoder: a text has no labels for "
            "it, so no loss can be measured. Leave the held-out text out, and measure the accuracy in Python."
        )
    measure = "one minus cosine" if data.loss_fn is cosine_losses else "loss"
    losses = losses_against(light_copy(dense))  # layers of the model itself will be replaced

    def judge(model: PreTrainedModel) -> Quality:
        loss, how = mean_loss(model, data.batches, losses), f"{data.tokens:,} tokens of {name}"
        return Quality(max(loss, 0.0), of_tokens, how, measure)  # a cosine above 1 is rounding

    return judge


def _causal_judge(
    dense: PreTrainedModel, folder: Path, text: str, *, name: str, tokens: int | None, progress: bool
) -> Judge:
    ids = token_ids(load_tokenizer(folder), text)[:tokens]
    if len(ids) < 2:
        raise ValueError(f"{name} holds {len(ids)} tokens; give more text.")
    context = usual_context(dense)

    def judge(model: PreTrainedModel) -> Quality:
        measured = perplexity(model, ids, context=context, progress=progress)
        return Quality(measured.loss, True, f"{measured.how} of {name}")

    return judge

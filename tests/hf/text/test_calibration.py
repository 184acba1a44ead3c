"""Calibration of transformers' architectures whose loss, layout or in-place operations are unusual."""

from __future__ import annotations

import pytest
import torch
import transformers
from hf_architectures import ENCODER, PAGE_ARCHITECTURES
from transformers import PreTrainedModel

import tensornet as tn
from tensornet.calibration import label_losses
from tensornet.calibration.losses import scores_next_token

#: Architectures of `hf_architectures`, and whether their loss scores the next token.
MODELS = {
    "LLaVA": True,
    "Qwen2-VL": True,
    "XLNet": False,
    "DeepSeek-V3": True,
    "Gemma 3n text": True,
    "BERT decoder": True,
    "BERT": False,
}


def build(name: str) -> PreTrainedModel:
    if name != "BERT decoder":
        return PAGE_ARCHITECTURES[name].dense
    return transformers.BertLMHeadModel(transformers.BertConfig(**ENCODER, is_decoder=True))


@pytest.mark.filterwarnings("ignore:Left dense")
@pytest.mark.parametrize(("name", "shifted"), MODELS.items())
def test_loss_and_moments_of_any_decoder(name: str, shifted: bool) -> None:
    """The loss is the model's own, and padding counts for nothing."""
    torch.manual_seed(0)
    model = build(name).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # logits of fresh models differ too little to tell one loss from another
            torch.nn.init.normal_(parameter, std=0.25)
    ids = torch.randint(5, 85, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    labels = ids.masked_fill(mask == 0, -100)
    assert scores_next_token(model) is shifted
    own = model(**batch, labels=labels).loss.item()
    assert label_losses(model, batch).mean().item() == pytest.approx(own, rel=1e-5)
    padded = tn.calibrate(model, [batch])
    assert padded.loss == pytest.approx(own, rel=1e-5)
    alone = tn.calibrate(
        model, [{k: v[:1] for k, v in batch.items()}, {k: v[1:, :6] for k, v in batch.items()}]
    )
    for side in ("rows", "columns"):
        assert getattr(padded, side).keys() == getattr(alone, side).keys()
        for name, moment in getattr(alone, side).items():
            if "position" not in name:  # one row of positions serves all rows of a batch
                found = getattr(padded, side)[name]
                assert float((found - moment).norm()) <= 1e-4 * float(moment.norm()), f"{side} of {name}"

"""Calibration of transformers' architectures whose loss, layout or in-place operations are unusual."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from hf_models import LLAMA, TOKENS
from transformers import PreTrainedModel

import tensornet as tn
from tensornet.calibration import label_losses
from tensornet.calibration.losses import scores_next_token

SIZES = {**LLAMA, **TOKENS}
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
PICTURES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
BERT = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}


def llava() -> PreTrainedModel:
    text, vision = transformers.LlamaConfig(**SIZES), transformers.CLIPVisionConfig(**PICTURES)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=99)
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10_000.0}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 24, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config={**SIZES, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=99,
        video_token_id=98,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def xlnet() -> PreTrainedModel:
    return transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(d_model=24, n_layer=1, n_head=4, d_inner=44, **TOKENS)
    )


def deepseek_v3() -> PreTrainedModel:
    config = transformers.DeepseekV3Config(**LATENT, first_k_dense_replace=2)
    return transformers.DeepseekV3ForCausalLM(config)


def gemma3n() -> PreTrainedModel:
    config = transformers.Gemma3nTextConfig(
        **SIZES,
        head_dim=6,
        vocab_size_per_layer_input=SIZES["vocab_size"],
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
    )
    return transformers.Gemma3nForCausalLM(config)


def bert_decoder() -> PreTrainedModel:
    return transformers.BertLMHeadModel(transformers.BertConfig(**BERT, is_decoder=True))


def bert() -> PreTrainedModel:
    return transformers.BertForMaskedLM(transformers.BertConfig(**BERT))


MODELS = {
    llava: True,
    qwen2_vl: True,
    xlnet: False,
    deepseek_v3: True,
    gemma3n: True,
    bert_decoder: True,
    bert: False,
}


@pytest.mark.filterwarnings("ignore:Left dense")
@pytest.mark.parametrize(("build", "shifted"), MODELS.items())
def test_loss_and_moments_of_any_decoder(build: Callable[[], PreTrainedModel], shifted: bool) -> None:
    """The loss is the model's own, and padding counts for nothing."""
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # logits of fresh models differ too little to tell one loss from another
            torch.nn.init.normal_(parameter, std=0.25)
    ids = torch.randint(5, 95, (2, 9), generator=torch.Generator().manual_seed(1))
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

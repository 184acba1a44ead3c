"""Small random models of the architectures in docs/architectures.md, with a batch for each.

The table says for each architecture how to build and call it. Steps that cannot work are listed by hand in
`EXCEPTIONS`, with their reason; every other step has to be right.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCAB = 101  # a prime: every vocabulary is padded
IMAGE = 90  # stands for a part of an image among the tokens
ROWS, LENGTH = 2, 7
SIDE, PATCH = 16, 8
IMAGE_TOKENS = (SIDE // PATCH) ** 2

TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {**SIZES, **TOKENS, **QUIET, "max_position_embeddings": 64}
DECODER = {**SIZES, **TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 64}
#: Rotary positions of some need a head size of their own.
HEADS = {"head_dim": 6}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
#: Names of the sizes in BART and its relatives.
BART = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 44,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **TOKENS,
}
T5 = {
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 44,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    **TOKENS,
}
VISION = {**SIZES, **QUIET, "image_size": SIDE, "patch_size": PATCH, "num_channels": 3}
SPEECH = {
    **ENCODER,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 8),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}
TEXT_TOWER = {**SIZES, **TOKENS, "max_position_embeddings": 16, "projection_dim": 16}
IMAGE_TOWER = {**SIZES, "image_size": SIDE, "patch_size": PATCH, "projection_dim": 16}
LLAMA_TEXT = {"model_type": "llama", **DECODER}
CLIP_VISION = {"model_type": "clip_vision_model", **IMAGE_TOWER}
SIGLIP_VISION = {"model_type": "siglip_vision_model", **IMAGE_TOWER}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000.0}

Inputs = dict[str, Tensor]


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _ids(length: int = LENGTH) -> Tensor:
    return torch.randint(3, IMAGE - 5, (ROWS, length), generator=torch.Generator().manual_seed(1))


def text() -> Inputs:
    """Tokens, with labels of the same length."""
    ids = _ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def bare_text() -> Inputs:
    """Tokens, for models that compute no loss."""
    return {"input_ids": _ids(), "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long)}


def seq2seq() -> Inputs:
    """Tokens of both sides."""
    return text() | {"labels": _ids(5)}


def long_texts() -> list[Inputs]:
    """Enough tokens on both sides for every expert to get some."""
    draw = torch.Generator().manual_seed(5)
    texts = [torch.randint(3, VOCAB, (8, 30), generator=draw) for _ in range(4)]
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(1)} for ids in texts
    ]


def text_with_global_attention() -> Inputs:
    """Tokens, of which the first attends to all."""
    inputs = text()
    first = torch.zeros_like(inputs["input_ids"])
    first[:, 0] = 1
    return inputs | {"global_attention_mask": first}


def image() -> Inputs:
    """An image and its class."""
    return {"pixel_values": _noise(ROWS, 3, SIDE, SIDE), "labels": torch.arange(ROWS) % 5}


def bare_image() -> Inputs:
    """An image alone."""
    return {"pixel_values": _noise(ROWS, 3, SIDE, SIDE)}


def large_image() -> Inputs:
    """An image that convolutions with strides leave something of."""
    return {"pixel_values": _noise(ROWS, 3, 64, 64), "labels": torch.arange(ROWS) % 5}


def pair() -> Inputs:
    """A text and an image."""
    return bare_text() | bare_image()


def _with_image(tokens: int) -> Inputs:
    inputs = text()
    ids = torch.cat(
        [inputs["input_ids"][:, :1], torch.full((ROWS, tokens), IMAGE), inputs["input_ids"][:, 1:]], 1
    )
    labels = torch.where(ids == IMAGE, -100, ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def image_in_text() -> Inputs:
    """A text that an image is part of."""
    return _with_image(IMAGE_TOKENS) | bare_image()


def wave() -> Inputs:
    """A sound."""
    return {"input_values": _noise(ROWS, 400)}


def spectrogram() -> Inputs:
    """A spectrogram and its transcript."""
    return {"input_features": _noise(ROWS, 8, 20), "labels": _ids(5)}


def frames() -> Inputs:
    """A spectrogram with time in front, and its transcript."""
    return {"input_features": _noise(ROWS, 20, 8), "labels": _ids(5)}


@dataclass(frozen=True)
class Architecture:
    """How to make a model of one architecture and call it.

    Args:
        name: of the row.
        model: class in transformers.
        options: of its configuration.
        inputs: makes a batch, with labels if the model has a loss.
        generates: whether the class has a `generate` that works from these inputs.
        calibration: makes the batches to calibrate on, if one of `inputs` does not reach every layer.
        seed: of the weights.
    """

    name: str
    model: str
    options: Mapping[str, Any] = field(repr=False)
    inputs: Callable[[], Inputs] = text
    generates: bool = False
    calibration: Callable[[], list[Inputs]] | None = None
    seed: int = 2

    @property
    def dense(self) -> PreTrainedModel:
        """A fresh copy of the dense model, in evaluation mode; always the same weights."""
        return copy.deepcopy(_dense(self.name))

    def batch(self, *, labels: bool = False) -> Inputs:
        """A batch; of labels only where they replace the inputs of a decoder, unless asked for."""
        inputs = self.inputs()
        found = None if labels else inputs.pop("labels", None)
        if found is not None and _dense(self.name).config.is_encoder_decoder:
            inputs["decoder_input_ids"] = found
        return inputs


def causal(name: str, model: str, **options: Any) -> Architecture:
    """A decoder of text."""
    return Architecture(name, model, {**DECODER, **options}, generates=True)


def encoder(name: str, model: str, **options: Any) -> Architecture:
    """An encoder of text that fills masks."""
    return Architecture(name, model, {**ENCODER, **options})


def vision(name: str, model: str, **options: Any) -> Architecture:
    """A classifier of images."""
    return Architecture(name, model, {**VISION, "num_labels": 5, **options}, image)


def of_images_and_text(
    name: str, model: str, inputs: Callable[[], Inputs] = image_in_text, **options: Any
) -> Architecture:
    """A decoder of text that reads images."""
    return Architecture(name, model, {**options}, inputs, generates=True)


def _layers(*kinds: str) -> dict[str, Any]:
    return {"layer_types": list(kinds)}


DENSE_DECODERS = (
    causal(
        "GPT-2",
        "GPT2LMHeadModel",
        n_layer=2,
        n_embd=24,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    causal(
        "GPT-Neo",
        "GPTNeoForCausalLM",
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
    ),
    causal("GPT-NeoX", "GPTNeoXForCausalLM"),
    causal(
        "GPT-J",
        "GPTJForCausalLM",
        n_layer=2,
        n_embd=24,
        n_head=4,
        rotary_dim=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    causal(
        "GPT-BigCode",
        "GPTBigCodeForCausalLM",
        n_layer=2,
        n_embd=24,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    causal("BLOOM", "BloomForCausalLM", n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0),
    causal("OPT", "OPTForCausalLM", ffn_dim=44, word_embed_proj_dim=24, dropout=0.0),
    causal("Falcon", "FalconForCausalLM"),
    causal("MPT", "MptForCausalLM", d_model=24, n_heads=4, n_layers=2, max_seq_len=32, expansion_ratio=2),
    causal(
        "CodeGen",
        "CodeGenForCausalLM",
        n_layer=2,
        n_embd=32,
        n_head=4,
        rotary_dim=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    causal("Llama", "LlamaForCausalLM"),
    causal("Mistral", "MistralForCausalLM", sliding_window=4),
    causal("Ministral", "MinistralForCausalLM", **HEADS),
    causal("Qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True),
    causal("Qwen3", "Qwen3ForCausalLM", **HEADS),
    causal("SmolLM3", "SmolLM3ForCausalLM"),
    causal("Gemma", "GemmaForCausalLM", **HEADS),
    causal("Gemma 2", "Gemma2ForCausalLM", **HEADS),
    causal("Gemma 3 text", "Gemma3ForCausalLM", **HEADS),
    causal(
        "Gemma 3n text",
        "Gemma3nForCausalLM",
        **HEADS,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0, 0.0],
        **_layers("sliding_attention", "full_attention"),
    ),
    causal("Cohere", "CohereForCausalLM"),
    causal("Cohere 2", "Cohere2ForCausalLM", sliding_window=4),
    causal("Granite", "GraniteForCausalLM"),
    causal("GLM", "GlmForCausalLM", **HEADS),
    causal("GLM-4", "Glm4ForCausalLM", **HEADS),
    causal("OLMo 2", "Olmo2ForCausalLM"),
    causal("OLMo 3", "Olmo3ForCausalLM", **_layers("sliding_attention", "full_attention")),
    causal("Phi", "PhiForCausalLM", hidden_size=32),
    causal("Phi-3", "Phi3ForCausalLM"),
    causal("StableLM", "StableLmForCausalLM"),
    causal("StarCoder 2", "Starcoder2ForCausalLM", residual_dropout=0.0, embedding_dropout=0.0),
    causal("Nemotron", "NemotronForCausalLM"),
    causal("Persimmon", "PersimmonForCausalLM", hidden_size=32),
    causal("EXAONE 4", "Exaone4ForCausalLM", **_layers("sliding_attention", "full_attention")),
    causal("ERNIE 4.5", "Ernie4_5ForCausalLM", **HEADS),
    causal("Seed-OSS", "SeedOssForCausalLM", **HEADS),
    causal(
        "XGLM",
        "XGLMForCausalLM",
        d_model=24,
        ffn_dim=44,
        num_layers=2,
        attention_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    causal("BioGPT", "BioGptForCausalLM", **QUIET, layerdrop=0.0),
    causal(
        "ModernBERT decoder",
        "ModernBertDecoderForCausalLM",
        cls_token_id=1,
        sep_token_id=2,
        **_layers("sliding_attention", "full_attention"),
    ),
    Architecture(
        "XLNet",
        "XLNetLMHeadModel",
        {**TOKENS, "d_model": 24, "n_layer": 2, "n_head": 4, "d_inner": 44, "dropout": 0.0},
        generates=True,
    ),
    causal(
        "XLM",
        "XLMWithLMHeadModel",
        emb_dim=24,
        n_layers=2,
        n_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
        n_langs=1,
        mask_token_id=3,
        lang_id=0,
    ),
    causal("DiffLlama", "DiffLlamaForCausalLM"),
)

MIXTURES = (
    causal("Mixtral", "MixtralForCausalLM", num_local_experts=4),
    causal("GPT-OSS", "GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2, **HEADS),
    causal("Qwen2-MoE", "Qwen2MoeForCausalLM", **EXPERTS, shared_expert_intermediate_size=12),
    causal("Qwen3-MoE", "Qwen3MoeForCausalLM", **EXPERTS, **HEADS),
    causal(
        "Llama 4 text",
        "Llama4ForCausalLM",
        num_local_experts=4,
        intermediate_size_mlp=44,
        interleave_moe_layer_step=1,
        **HEADS,
    ),
    causal("DeepSeek-V2", "DeepseekV2ForCausalLM", **LATENT, **ROUTED, first_k_dense_replace=1),
    causal("DeepSeek-V3", "DeepseekV3ForCausalLM", **LATENT, **ROUTED, first_k_dense_replace=1),
    causal("GLM-4-MoE", "Glm4MoeForCausalLM", **ROUTED, **HEADS, first_k_dense_replace=1),
    causal("OLMoE", "OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2),
    causal("PhiMoE", "PhimoeForCausalLM", num_local_experts=4),
    causal("JetMoE", "JetMoeForCausalLM", num_local_experts=4, num_key_value_heads=2, kv_channels=6),
    causal(
        "DBRX",
        "DbrxForCausalLM",
        d_model=24,
        n_heads=4,
        n_layers=2,
        max_seq_len=32,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 24, "ffn_hidden_size": 20, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    causal("Granite-MoE", "GraniteMoeForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    causal(
        "ERNIE 4.5 MoE",
        "Ernie4_5_MoeForCausalLM",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=12,
        moe_layer_start_index=1,
        **HEADS,
    ),
    causal(
        "MiniMax",
        "MiniMaxForCausalLM",
        num_local_experts=4,
        **HEADS,
        block_size=8,
        **_layers("full_attention", "linear_attention"),
    ),
    causal("DOTS 1", "Dots1ForCausalLM", **ROUTED, **HEADS, first_k_dense_replace=1),
)

RECURRENT = (
    causal("Mamba", "MambaForCausalLM", state_size=8, expand=2),
    causal(
        "Mamba 2",
        "Mamba2ForCausalLM",
        state_size=8,
        expand=2,
        num_heads=4,
        head_dim=12,
        n_groups=1,
        chunk_size=8,
    ),
    causal("Falcon-Mamba", "FalconMambaForCausalLM", state_size=8),
    causal(
        "Falcon-H1",
        "FalconH1ForCausalLM",
        mamba_d_ssm=48,
        mamba_n_heads=4,
        mamba_d_head=12,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    causal(
        "Bamba",
        "BambaForCausalLM",
        mamba_n_heads=4,
        mamba_d_head=12,
        mamba_d_state=8,
        mamba_chunk_size=8,
        attn_layer_indices=[1],
    ),
    causal(
        "Jamba",
        "JambaForCausalLM",
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    causal(
        "Granite-MoE hybrid",
        "GraniteMoeHybridForCausalLM",
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=20,
        mamba_n_heads=4,
        mamba_d_head=12,
        mamba_d_state=8,
        mamba_chunk_size=8,
        **_layers("mamba", "attention"),
    ),
    causal(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        **EXPERTS,
        **HEADS,
        shared_expert_intermediate_size=12,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=6,
        linear_value_head_dim=6,
        **_layers("linear_attention", "full_attention"),
    ),
    causal("LFM 2", "Lfm2ForCausalLM", block_auto_adjust_ff_dim=False, **_layers("conv", "full_attention")),
    causal(
        "RecurrentGemma",
        "RecurrentGemmaForCausalLM",
        lru_width=24,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
    ),
    causal("RWKV", "RwkvForCausalLM", attention_hidden_size=24, context_length=32),
)

ENCODERS = (
    encoder("BERT", "BertForMaskedLM"),
    encoder("RoBERTa", "RobertaForMaskedLM"),
    encoder("ALBERT", "AlbertForMaskedLM", embedding_size=16),
    encoder("ELECTRA", "ElectraForMaskedLM", embedding_size=16),
    encoder(
        "DistilBERT",
        "DistilBertForMaskedLM",
        dim=24,
        hidden_dim=44,
        n_layers=2,
        n_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    encoder(
        "DeBERTa-v2",
        "DebertaV2ForMaskedLM",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
    ),
    encoder("MPNet", "MPNetForMaskedLM"),
    encoder("ModernBERT", "ModernBertForMaskedLM", cls_token_id=1, sep_token_id=2),
    encoder("CamemBERT", "CamembertForMaskedLM"),
    encoder("XLM-RoBERTa", "XLMRobertaForMaskedLM"),
    encoder("FNet", "FNetForMaskedLM"),
    encoder("ConvBERT", "ConvBertForMaskedLM", embedding_size=16, head_ratio=2, conv_kernel_size=3),
    Architecture(
        "Longformer", "LongformerForMaskedLM", {**ENCODER, "attention_window": 4}, text_with_global_attention
    ),
    encoder("ESM", "EsmForMaskedLM", position_embedding_type="rotary", mask_token_id=3),
    Architecture(
        "Funnel",
        "FunnelForMaskedLM",
        {
            **TOKENS,
            "block_sizes": [1, 1],
            "d_model": 24,
            "n_head": 4,
            "d_head": 6,
            "d_inner": 44,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "num_decoder_layers": 1,
        },
    ),
    encoder("I-BERT", "IBertForMaskedLM"),
    encoder("NomicBERT", "NomicBertForMaskedLM"),
    encoder("EuroBERT", "EuroBertForMaskedLM", num_key_value_heads=2),
)


def translator(name: str, model: str, inputs: Callable[[], Inputs] = seq2seq, **options: Any) -> Architecture:
    """An encoder and a decoder."""
    return Architecture(name, model, options, inputs, generates=True)


def mixture_translator(name: str, model: str, **options: Any) -> Architecture:
    """An encoder and a decoder with experts, each of which needs a token to be calibrated."""
    return Architecture(name, model, options, seq2seq, generates=True, calibration=long_texts)


TRANSLATORS = (
    translator("T5", "T5ForConditionalGeneration", **T5),
    translator("mT5", "MT5ForConditionalGeneration", **T5),
    translator("UMT5", "UMT5ForConditionalGeneration", **T5),
    mixture_translator(
        "Switch Transformers",
        "SwitchTransformersForConditionalGeneration",
        **T5,
        num_decoder_layers=2,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    translator("LongT5", "LongT5ForConditionalGeneration", **T5, local_radius=3),
    translator("BART", "BartForConditionalGeneration", **BART),
    translator("mBART", "MBartForConditionalGeneration", **BART),
    translator("Pegasus", "PegasusForConditionalGeneration", **BART),
    translator("M2M100", "M2M100ForConditionalGeneration", **BART),
    translator("Marian", "MarianMTModel", **BART),
    translator("Blenderbot", "BlenderbotForConditionalGeneration", **BART),
    mixture_translator(
        "NLLB-MoE",
        "NllbMoeForConditionalGeneration",
        **BART,
        num_experts=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        expert_capacity=16,
        router_jitter_noise=0.0,
        moe_token_dropout=0.0,
    ),
    translator(
        "ProphetNet",
        "ProphetNetForConditionalGeneration",
        **TOKENS,
        hidden_size=24,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        encoder_ffn_dim=44,
        decoder_ffn_dim=44,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        decoder_start_token_id=0,
        max_position_embeddings=32,
    ),
    translator(
        "Whisper",
        "WhisperForConditionalGeneration",
        spectrogram,
        **{**BART, "decoder_start_token_id": 1},
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=12,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    translator(
        "Speech2Text",
        "Speech2TextForConditionalGeneration",
        frames,
        **BART,
        input_feat_per_channel=8,
        input_channels=1,
        conv_channels=16,
        max_source_positions=20,
        max_target_positions=12,
    ),
)

SOUND = (
    Architecture("Wav2Vec2", "Wav2Vec2Model", SPEECH, wave),
    Architecture("HuBERT", "HubertModel", SPEECH, wave),
    Architecture("WavLM", "WavLMModel", {**SPEECH, "num_buckets": 8}, wave),
    Architecture(
        "Audio Spectrogram Transformer",
        "ASTForAudioClassification",
        {
            **SIZES,
            **QUIET,
            "patch_size": 4,
            "num_mel_bins": 8,
            "max_length": 20,
            "frequency_stride": 4,
            "time_stride": 4,
        },
        lambda: {"input_values": _noise(ROWS, 20, 8)},
    ),
)


def point_in_image() -> Inputs:
    """An image, and a place in it."""
    return bare_image() | {"input_points": torch.tensor([[[[4.0, 5.0]]]] * ROWS)}


SWIN = {
    "image_size": SIDE,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
    "drop_path_rate": 0.0,
    "num_labels": 5,
    **QUIET,
}

IMAGES = (
    vision("ViT", "ViTForImageClassification"),
    vision("DeiT", "DeiTForImageClassification"),
    vision("BEiT", "BeitForImageClassification", drop_path_rate=0.0),
    vision("DINOv2", "Dinov2ForImageClassification", drop_path_rate=0.0),
    Architecture("DINOv3", "DINOv3ViTModel", {**VISION, "hidden_size": 32}, bare_image),
    Architecture("Swin", "SwinForImageClassification", SWIN, image),
    Architecture("Swin v2", "Swinv2ForImageClassification", SWIN, image),
    vision(
        "ConvNeXt",
        "ConvNextForImageClassification",
        hidden_sizes=[12, 24],
        depths=[1, 1],
        num_stages=2,
        patch_size=2,
        drop_path_rate=0.0,
    ),
    vision(
        "SegFormer",
        "SegformerForImageClassification",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    ),
    vision("ResNet", "ResNetForImageClassification", embedding_size=8, hidden_sizes=[12, 16], depths=[1, 1]),
    Architecture(
        "YOLOS",
        "YolosForObjectDetection",
        {**VISION, "image_size": [SIDE, SIDE], "num_detection_tokens": 5, "num_labels": 3},
        bare_image,
    ),
    Architecture(
        "DETR",
        "DetrForObjectDetection",
        {
            **BART,
            "num_queries": 4,
            "num_labels": 3,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 12],
                "depths": [1, 1],
                "out_features": ["stage2"],
            },
        },
        bare_image,
    ),
    Architecture(
        "SAM",
        "SamModel",
        {
            "vision_config": {
                **IMAGE_TOWER,
                "output_channels": 16,
                "window_size": 2,
                "global_attn_indexes": [1],
                "num_pos_feats": 8,
                "mlp_dim": 44,
            },
            "prompt_encoder_config": {
                "hidden_size": 16,
                "image_size": SIDE,
                "patch_size": PATCH,
                "mask_input_channels": 4,
            },
            "mask_decoder_config": {
                "hidden_size": 16,
                "mlp_dim": 20,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
            },
        },
        point_in_image,
        calibration=lambda: [point_in_image(), bare_image() | {"input_masks": _noise(ROWS, 1, 8, 8)}],
    ),
    Architecture(
        "DPT",
        "DPTForDepthEstimation",
        {
            **VISION,
            "is_hybrid": False,
            "backbone_out_indices": [0, 1],
            "neck_hidden_sizes": [4, 8],
            "fusion_hidden_size": 8,
            "reassemble_factors": [2, 1],
            "head_in_index": -1,
        },
        lambda: {"pixel_values": _noise(ROWS, 3, SIDE, SIDE)},
        seed=3,  # with others its last ReLU gives nothing but zeros
    ),
)

PAIRS = (
    Architecture(
        "CLIP",
        "CLIPModel",
        {"text_config": TEXT_TOWER, "vision_config": IMAGE_TOWER, "projection_dim": 16},
        pair,
    ),
    Architecture("SigLIP", "SiglipModel", {"text_config": TEXT_TOWER, "vision_config": IMAGE_TOWER}, pair),
    Architecture(
        "SigLIP 2",
        "Siglip2Model",
        {"text_config": TEXT_TOWER, "vision_config": {**IMAGE_TOWER, "num_patches": 16}},
        lambda: bare_text()
        | {
            "pixel_values": _noise(ROWS, 16, 192),
            "pixel_attention_mask": torch.ones(ROWS, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * ROWS),
        },
    ),
    Architecture(
        "BLIP",
        "BlipForConditionalGeneration",
        {
            "text_config": {**TEXT_TOWER, "encoder_hidden_size": 24, "sep_token_id": 2, **QUIET},
            "vision_config": IMAGE_TOWER,
            "projection_dim": 16,
            "image_text_hidden_size": 16,
        },
        lambda: text() | bare_image(),
        generates=True,
    ),
    Architecture("ViLT", "ViltModel", {**ENCODER, **VISION}, pair),
    Architecture(
        "CLIPSeg",
        "CLIPSegForImageSegmentation",
        {
            "text_config": TEXT_TOWER,
            "vision_config": {**IMAGE_TOWER, "hidden_size": 32},
            "projection_dim": 16,
            "reduce_dim": 16,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
            "extract_layers": [0, 1],
            "decoder_hidden_act": "relu",
        },
        pair,
    ),
)

QWEN_VISION = {
    "depth": 2,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}


def patches_in_text() -> Inputs:
    """A text that an image is part of, as the patches of Qwen: 4 x 4 of them, merged to 2 x 2 tokens."""
    inputs = _with_image(4)
    inputs |= {
        "pixel_values": _noise(ROWS * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long(),
    }
    return inputs


def gemma_image() -> Inputs:
    """Gemma tells tokens of images from others by their type."""
    inputs = image_in_text()
    return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def tiles_in_text() -> Inputs:
    """Idefics merges 2 x 2 patches; each row has one image."""
    return _with_image(1) | {"pixel_values": _noise(ROWS, 1, 3, SIDE, SIDE)}


QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": IMAGE + 1,
    "vision_start_token_id": IMAGE + 2,
    "vision_end_token_id": IMAGE + 3,
}
IDEFICS_VISION = {**SIZES, "image_size": SIDE, "patch_size": PATCH}

READERS = (
    of_images_and_text(
        "LLaVA",
        "LlavaForConditionalGeneration",
        text_config=LLAMA_TEXT,
        vision_config=CLIP_VISION,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    ),
    of_images_and_text(
        "Qwen2-VL",
        "Qwen2VLForConditionalGeneration",
        patches_in_text,
        text_config={**DECODER, "rope_parameters": MROPE},
        vision_config={**QWEN_VISION, "embed_dim": 16, "hidden_size": 24, "mlp_ratio": 2},
        **QWEN_TOKENS,
    ),
    of_images_and_text(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        patches_in_text,
        text_config={**DECODER, "rope_parameters": MROPE},
        vision_config={
            **QWEN_VISION,
            "hidden_size": 16,
            "intermediate_size": 20,
            "out_hidden_size": 24,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
        **QWEN_TOKENS,
    ),
    of_images_and_text(
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        patches_in_text,
        text_config={**DECODER, **HEADS, "rope_parameters": MROPE},
        vision_config={
            **QWEN_VISION,
            "hidden_size": 16,
            "intermediate_size": 20,
            "out_hidden_size": 24,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **QWEN_TOKENS,
    ),
    of_images_and_text(
        "PaliGemma",
        "PaliGemmaForConditionalGeneration",
        gemma_image,
        text_config={"model_type": "gemma", **DECODER, **HEADS},
        vision_config={**SIGLIP_VISION, "projection_dim": 24, "vision_use_head": False},
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        projection_dim=24,
    ),
    of_images_and_text(
        "Gemma 3",
        "Gemma3ForConditionalGeneration",
        gemma_image,
        text_config={"model_type": "gemma3_text", **DECODER, **HEADS, "hidden_size": 32},
        vision_config={**SIGLIP_VISION, "hidden_size": 32, "vision_use_head": False},
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
        boi_token_index=91,
        eoi_token_index=92,
    ),
    of_images_and_text(
        "Idefics 3",
        "Idefics3ForConditionalGeneration",
        tiles_in_text,
        text_config=LLAMA_TEXT,
        vision_config=IDEFICS_VISION,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    ),
    of_images_and_text(
        "SmolVLM",
        "SmolVLMForConditionalGeneration",
        tiles_in_text,
        text_config=LLAMA_TEXT,
        vision_config=IDEFICS_VISION,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    ),
    of_images_and_text(
        "Mistral 3",
        "Mistral3ForConditionalGeneration",
        lambda: _with_image(1) | bare_image() | {"image_sizes": torch.tensor([[SIDE, SIDE]] * ROWS)},
        text_config={"model_type": "mistral", **DECODER, **HEADS},
        vision_config={
            "model_type": "pixtral",
            **SIZES,
            "image_size": SIDE,
            "patch_size": PATCH,
            "head_dim": 6,
        },
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    ),
    of_images_and_text(
        "InternVL",
        "InternVLForConditionalGeneration",
        lambda: _with_image(1) | bare_image(),
        text_config={"model_type": "qwen2", **DECODER},
        vision_config={**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        image_token_id=IMAGE,
        image_seq_length=1,
    ),
    of_images_and_text(
        "Llama 4",
        "Llama4ForConditionalGeneration",
        lambda: _with_image(1) | bare_image(),
        text_config={**DECODER, **HEADS, "num_local_experts": 4, "intermediate_size_mlp": 44},
        vision_config={
            **SIZES,
            "hidden_size": 32,
            "image_size": SIDE,
            "patch_size": PATCH,
            "vision_output_dim": 24,
            "projector_input_dim": 24,
            "projector_output_dim": 24,
            "intermediate_size": 128,
        },
        image_token_index=IMAGE,
    ),
    of_images_and_text(
        "GIT", "GitForCausalLM", lambda: text() | bare_image(), **ENCODER, vision_config=IMAGE_TOWER
    ),
)

#: By the title on the page.
GROUPS: dict[str, tuple[Architecture, ...]] = {
    "Decoders": DENSE_DECODERS,
    "Mixtures of experts": MIXTURES,
    "State spaces and hybrids": RECURRENT,
    "Encoders": ENCODERS,
    "Encoders with decoders": TRANSLATORS,
    "Sound": SOUND,
    "Images": IMAGES,
    "Images and text": PAIRS,
    "Images in text": READERS,
}
#: By their names on the page; `hf_models.ARCHITECTURES` are the few that many tests run on.
PAGE_ARCHITECTURES = {x.name: x for group in GROUPS.values() for x in group}


@lru_cache(maxsize=1)
def _dense(name: str) -> PreTrainedModel:
    architecture = PAGE_ARCHITECTURES[name]
    kind = getattr(transformers, architecture.model)
    with torch.random.fork_rng():
        torch.manual_seed(architecture.seed)
        model = kind(kind.config_class(**copy.deepcopy(dict(architecture.options))))
        for parameter in model.parameters():
            constant = parameter.numel() > 0 and bool((parameter == parameter.flatten()[0]).all())
            if parameter.ndim == 1 or constant:  # from zero, what is lost or ignored would not be seen
                nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return model.eval()


@dataclass(frozen=True)
class Exceptional:
    """A step that does not work, and why.

    Args:
        outcome: `refused`: one of our errors says what is wrong; `fails`: a known defect; `transformers`: the
            dense model fails in the same way.
        message: of the error, a regular expression.
        reason: for the reader of the page.
        always: False where some versions of transformers that we allow do not fail.
    """

    outcome: Literal["refused", "fails", "transformers"]
    message: str
    reason: str
    always: bool = True


EXCEPTIONS: dict[str, dict[str, Exceptional]] = {
    "RWKV": {
        "dense": Exceptional(
            "transformers",
            "modified by an inplace operation",
            "Its backward pass fails without kernels for CUDA.",
        )
    },
    "Llama 4": {
        "dense": Exceptional(
            "transformers",
            "image_outputs",
            "Its forward pass expects images in the output of the text model.",
            always=False,
        )
    },
    "CLIPSeg": {
        "60 %": Exceptional(
            "refused",
            r"\d+ layers have one candidate",
            "CLIP runs inside it without gradients, so its layers stay dense. "
            "The rest alone cannot save 40 %.",
        ),
        "AutoModel": Exceptional(
            "refused",
            "has no module 'clip",
            "transformers 5.20 loads the class without a decoder; its modules have other names.",
            always=False,
        ),
    },
    "I-BERT": {
        "AutoModel": Exceptional(
            "refused",
            "has no module 'lm_head.dense'",
            "Only the head is compressed, because the other layers store integers. The class without a head "
            "therefore has nothing to load.",
        )
    },
    "NomicBERT": {
        "file to file": Exceptional(
            "refused",
            "than the model uses",
            "Query, key and value are stored as one matrix. Compress it in memory.",
        )
    },
}

#: Close relatives of others in the table, which only the nightly profile runs.
RELATIVES = frozenset(
    re.split(
        r";\s+",
        """GPT-BigCode; MPT; CodeGen; Ministral; Gemma; Gemma 2; Cohere; GLM; OLMo 3; Phi; Nemotron;
        Persimmon; Seed-OSS; XGLM; BioGPT; XLM; DiffLlama; Qwen2-MoE; PhiMoE; Granite-MoE; ERNIE 4.5;
        DOTS 1; Falcon-Mamba; Bamba; DistilBERT; XLM-RoBERTa; EuroBERT; Longformer; mT5; mBART; Pegasus;
        Blenderbot; LongT5; ProphetNet; Speech2Text; HuBERT; Swin v2; YOLOS; SegFormer; ViLT; Idefics 3;
        InternVL; GIT; Mistral 3; Qwen2.5-VL; SigLIP; StableLM; GPT-Neo; MiniMax; LFM 2; Marian; DPT;
        UMT5; M2M100; BLIP; FNet; ERNIE 4.5 MoE; CamemBERT; ModernBERT decoder; Granite""",
    )
)

"""Small random models of the architectures that the Hugging Face plugin is tested on."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import tensornet as tn
import tensornet_moe as tm
from tensornet_hf.quantizer import prepare_for_saving
from tensornet_hf.text import load_tokenizer

VOCAB = 101  # a prime: every vocabulary is padded
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
T5 = {"d_model": 24, "d_kv": 6, "d_ff": 44, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def chains(experts: int, sites: int = 5, *, router: str = "switch", **options: Any) -> dict[str, Any]:
    """Arguments for experts as in the MPOE paper: chains that share their center; with one core, dense."""

    def bank(weights: Tensor) -> tm.SharedCoreExperts:
        weight, share = weights[0], "none" if sites == 1 else "center"
        return tm.SharedCoreExperts.from_dense(weight, num_experts=experts, sites=sites, share=share)

    return {"experts": bank, "router": router, **options}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_embd=24,
            n_head=4,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **TOKENS,
        )
    )


def t5_relu() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(**T5, **TOKENS, decoder_start_token_id=0))


def t5_gated() -> PreTrainedModel:
    """Like T5 v1.1: gated, and with a head of its own, whatever the configuration says."""
    model = T5ForConditionalGeneration(
        T5Config(**T5, **TOKENS, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
    )
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, T5["d_model"]))
    model.all_tied_weights_keys.pop("lm_head.weight")
    return model


def bert() -> PreTrainedModel:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44}
    return BertForMaskedLM(BertConfig(**sizes, max_position_embeddings=64, **NO_DROPOUT, **TOKENS))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **TOKENS))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**LLAMA, **TOKENS, tie_word_embeddings=True))


def opt() -> PreTrainedModel:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 44}
    return OPTForCausalLM(
        OPTConfig(**sizes, word_embed_proj_dim=24, dropout=0.0, max_position_embeddings=64, **TOKENS)
    )


def falcon() -> PreTrainedModel:
    """Its linear layers are a class of their own."""
    return FalconForCausalLM(
        FalconConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, **TOKENS)
    )


def vit() -> PreTrainedModel:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5))


@dataclass(frozen=True)
class Architecture:
    """How to make a model of one architecture and call it."""

    name: str
    make: Callable[[], PreTrainedModel]
    generates: bool = True

    @property
    def takes_images(self) -> bool:
        return self.make is vit

    @property
    def has_decoder_inputs(self) -> bool:
        return self.make in (t5_relu, t5_gated)

    def inputs(self, *, labels: bool = False, rows: int = 2) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        if self.takes_images:
            images = torch.randn(rows, 3, 16, 16, generator=generator)
            return {"pixel_values": images, **({"labels": torch.arange(rows) % 5} if labels else {})}
        ids = torch.randint(3, VOCAB, (rows, 7), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if labels:
            inputs["labels"] = ids.clone()
        elif self.has_decoder_inputs:
            inputs["decoder_input_ids"] = ids[:, :5]
        return inputs

    @property
    def dense(self) -> PreTrainedModel:
        """A fresh copy of the dense model, in evaluation mode; always the same weights."""
        return copy.deepcopy(_dense(self.name))

    @property
    def compressed(self) -> PreTrainedModel:
        """A fresh copy of that model with every layer compressed at full rank."""
        return copy.deepcopy(_compressed(self.name))


#: The few that many tests run on; `hf_architectures.PAGE_ARCHITECTURES` are all that the page lists.
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("gpt2", gpt2),
        Architecture("t5_relu", t5_relu),
        Architecture("t5_gated", t5_gated),
        Architecture("bert", bert, generates=False),
        Architecture("llama", llama),
        Architecture("qwen2", qwen2),
        Architecture("opt", opt),
        Architecture("falcon", falcon),
        Architecture("vit", vit, generates=False),
    )
}
ALL = list(ARCHITECTURES.values())
GENERATING = [architecture for architecture in ALL if architecture.generates]
EVERY_LAYER = tn.CompressionConfig(target_modules="all", topology="mpo")


def logits(model: nn.Module, architecture: Architecture) -> Tensor:
    with torch.no_grad():
        return model(**architecture.inputs()).logits


def assert_generates_alike(found: Any, expected: Any, tolerance: float) -> None:
    """Compare the logits of each new token relative to the largest one.

    Both are what `generate` returns with `return_dict_in_generate=True, output_logits=True`. After a tie
    within rounding they may go on differently.
    """
    for a, b in zip(found.logits, expected.logits, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))
        if not torch.equal(a.argmax(-1), b.argmax(-1)):
            return
    assert torch.equal(found.sequences, expected.sequences)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Turn gradient checkpointing on; transformers 5.21 renamed the method and warns at the old name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def compressed_names(model: PreTrainedModel) -> set[str]:
    return set(prepare_for_saving(model) and model.config.quantization_config.layers)


@cache
def _dense(name: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = ARCHITECTURES[name].make()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases start at zero: a lost bias would not be seen
                nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return model.eval()


@cache
def _compressed(name: str) -> PreTrainedModel:
    model = copy.deepcopy(_dense(name))
    tn.compress(model, EVERY_LAYER, progress=False)
    return model


def copy_with_bos(source: Path, folder: Path) -> int:
    """Copy a model folder, let its tokenizer put BOS before every text, and return the id of this token."""
    shutil.copytree(source, folder)
    tokenizer = load_tokenizer(source)
    bos, name, begun = tokenizer.bos_token_id, tokenizer.bos_token, tokenizer.backend_tokenizer
    begun.post_processor = TemplateProcessing(single=f"{name} $A", special_tokens=[(name, bos)])
    PreTrainedTokenizerFast(tokenizer_object=begun, bos_token=name).save_pretrained(folder)
    return int(bos)

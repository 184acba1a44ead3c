"""A budget of memory leaves room for the context: predictions are what llama.cpp itself allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import BudgetError
from tensornet_hf.compress import OptionError
from tensornet_hf.exporters.gguf import file_runtime
from tensornet_hf.exporters.gguf_memory import Runtime

KEYS = {
    "block_count": 4, "context_length": 8192, "embedding_length": 64, "feed_forward_length": 128,
    "attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 1000,
}  # fmt: skip


def test_the_cache_has_a_key_and_a_value_of_each_layer_and_token() -> None:
    use = Runtime(KEYS).use(1024)
    assert use.cache == 4 * 1024 * 2 * (16 + 16) * 2
    wide = Runtime({**KEYS, "attention.key_length": 32, "attention.value_length": 32})
    assert wide.use(1024, "q8_0").cache == wide.use(1024).cache * 34 // 64
    assert Runtime(KEYS).use(1000).cache == use.cache  # whole blocks of 256 tokens


def test_sliding_layers_store_their_window_and_a_batch() -> None:
    keys = {**KEYS, "attention.sliding_window": 256}
    use = Runtime(keys, [True, True, True, False]).use(8192)
    assert use.cache == (3 * (256 + 512) + 8192) * 2 * 32 * 2


def test_recurrent_layers_have_states_that_do_not_grow() -> None:
    keys = {
        **KEYS, "attention.head_count_kv": [0, 0, 0, 2], "ssm.state_size": 16, "ssm.inner_size": 128,
        "ssm.conv_kernel": 4, "ssm.group_count": 1,
    }  # fmt: skip
    short, long = (Runtime(keys).use(x) for x in (1024, 8192))
    assert short.states == long.states == 3 * 4 * (3 * (128 + 2 * 16) + 16 * 128)
    assert short.cache == 1024 * 2 * 32 * 2


def test_draft_heads_have_no_keys_and_values() -> None:
    with_head = Runtime({**KEYS, "block_count": 5, "nextn_predict_layers": 1})
    assert with_head.use(1024).total == Runtime(KEYS).use(1024).total


def test_latent_vectors_are_stored_once() -> None:
    keys = {
        **KEYS, "attention.head_count_kv": 1, "attention.kv_lora_rank": 32, "attention.key_length": 48,
        "attention.value_length": 32, "attention.key_length_mla": 32,
    }  # fmt: skip
    assert Runtime(keys).use(1024).cache == 4 * 1024 * 48 * 2


def test_a_mamba_layer_needs_buffers_even_with_few_logits() -> None:
    keys = {
        **KEYS, "attention.head_count": 0, "attention.head_count_kv": 0, "vocab_size": 8,
        "ssm.state_size": 16, "ssm.inner_size": 128, "ssm.conv_kernel": 4, "ssm.time_step_rank": 4,
    }  # fmt: skip
    use = Runtime(keys).use(1024)
    assert use.cache == 0
    assert use.buffers == 4 * 512 * (15 * 64 + 4) + use.states // 4


def test_the_longest_context_just_fits() -> None:
    runtime = Runtime(KEYS)
    available = runtime.use(3072).total
    assert runtime.longest_fitting(available, "f16") == 3072
    assert runtime.longest_fitting(available - 1, "f16") == 2816
    assert runtime.longest_fitting(1, "f16") == 0
    assert runtime.longest_fitting(10**12, "f16") == 8192


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"context": 9000}, "8,192"),
        ({"context": 0}, "range"),
        ({"cache_type": "q3"}, "q8_0"),
        ({"cache_type": "q8_0"}, "32"),
    ],
)
def test_a_bad_context_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Runtime(KEYS).use(**{"context": 1024, **options})


def test_memory_needs_a_gguf_file_and_no_other_limit_of_its_size(tmp_path: Path) -> None:
    config = tn.CompressionConfig(formats=("int8",), method="nearest")
    options = th.CompressOptions(memory=10**9)
    with pytest.raises(OptionError, match=r"\.gguf"):
        th.compress_folder(th.embedded.gpt2_path(), tmp_path / "small", config, options)
    limited = tn.CompressionConfig(max_bytes=10**8, formats=("int8",), method="nearest")
    with pytest.raises(OptionError, match="max_bytes"):
        th.compress_folder(th.embedded.gpt2_path(), tmp_path / "small.gguf", limited, options)
    with pytest.raises(OptionError, match="memory="):
        th.CompressOptions(context=1024)


#: Large enough that small allocations do not matter.
WIDE = {
    **SIZES, "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 4096, "num_hidden_layers": 6,
    "num_attention_heads": 8, "max_position_embeddings": 65536, "initializer_range": 0.02,
}  # fmt: skip
WINDOWS = {**WIDE, "head_dim": 64, "sliding_window": 512}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
ROUTED = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "moe_intermediate_size": 256, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 8, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen2": WIDE,
    "gemma3_text": {**WINDOWS, "vocab_size": 1024, "query_pre_attn_scalar": 64},
    "gpt_oss": {**WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**WIDE, "head_dim": 64, **EXPERTS},
    "lfm2": {**WIDE, "layer_types": ["conv", "conv", "full_attention"] * 2},
    "mamba": WIDE,
    "mamba2": {**WIDE, "state_size": 64, "num_heads": 16, "head_dim": 64, "n_groups": 1},
    "llama4_text": {
        **WIDE, "head_dim": 64, "num_local_experts": 4, "intermediate_size": 256, "num_hidden_layers": 8,
    },
    "deepseek_v3": {**WIDE, **LATENT, **ROUTED},
    "glm4_moe": {**WIDE, "head_dim": 64, **ROUTED, "n_group": 1},
    "granitemoehybrid": {
        **WIDE, "layer_types": ["mamba", "mamba", "attention"] * 2, "mamba_n_heads": 16, "mamba_d_head": 64,
        "mamba_d_state": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256,
        "shared_intermediate_size": 256,
    },
}  # fmt: skip


#: Models for which llama.cpp refuses other types of keys and values, or that have none.
F16_ONLY = ("mamba", "mamba2")


@pytest.mark.slow  # needs the extra `gguf` and llama.cpp
@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_what_llama_cpp_allocates(name: str, tmp_path: Path) -> None:
    from tests.hf.export.llama_cpp import memory

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **MODELS[name])).half()
    source = th.embedded.gpt2_path() if name == "gemma3_text" else None
    path = tmp_path / "model.gguf"
    th.export(model, path, source=source)
    runtime = file_runtime(model, source)
    for context in (2048, 30000, 65536):
        for cache_type in ("f16", "q8_0") if name not in F16_ONLY else ("f16",):
            predicted, found = runtime.use(context, cache_type).total, memory(path, context, cache_type)
            size = path.stat().st_size
            assert predicted + size == pytest.approx(found + size, rel=0.02), (context, cache_type)


@pytest.mark.slow  # needs the extra `gguf` and llama.cpp
def test_a_file_and_its_context_fit_into_the_memory(tmp_path: Path) -> None:
    from tests.hf.export.llama_cpp import memory

    source, path = th.embedded.gpt2_path(), tmp_path / "small.gguf"
    config = tn.CompressionConfig(effort="fast")
    runtime = file_runtime(th.load(source), source)
    limit = runtime.use(runtime.longest).total + 800_000
    options = th.CompressOptions(memory=limit, calibration="default", calibration_tokens=256)
    done = th.compress_folder(source, path, config, options)
    whole = path.stat().st_size + memory(path, runtime.longest, "f16")
    assert 0.8 * limit < whole <= 1.02 * limit
    assert done.memory
    assert f"-c {runtime.longest}" in done.notes[0]
    assert "memory " in str(done)


@pytest.mark.slow  # needs the extra `gguf`
def test_too_little_memory_says_which_context_would_fit(tmp_path: Path) -> None:
    source = th.embedded.gpt2_path()
    config = tn.CompressionConfig()
    options = th.CompressOptions(memory=400_000, calibration="default")
    with pytest.raises(BudgetError, match="no context would fit"):
        th.compress_folder(source, tmp_path / "small.gguf", config, options)
    assert not list(tmp_path.glob("*.gguf"))

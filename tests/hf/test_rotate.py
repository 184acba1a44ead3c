"""Rotated models compute the same, and are models as any other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_architectures import PAGE_ARCHITECTURES
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import TargetError
from tensornet_hf.embedded import gpt2_path

SIZES = {
    "vocab_size": 48, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 6, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
#: Models that can be rotated; the width of queries is not that of the residual stream.
ALIKE: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with a tied head": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {"head_dim": 8},
    "qwen3": {"tie_word_embeddings": True},
    "smollm3": {},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
}


def model_of(name: str, **more: Any) -> PreTrainedModel:
    """A model whose norms and biases matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[0], **{**SIZES, **ALIKE.get(name, {}), **more})
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.3)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(40).reshape(2, 20)).logits.double()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", ALIKE)
def test_logits_stay_and_weights_change(name: str) -> None:
    model = model_of(name).double()
    wanted, before = logits(model), {key: x.clone() for key, x in model.state_dict().items()}
    assert th.rotate(model) is model
    assert error(logits(model), wanted) < 1e-5  # norms compute in float32
    assert model.dtype == torch.float64
    for key, parameter in model.named_parameters():
        if key.endswith("norm.weight") and "self_attn" not in key:
            assert bool((parameter == 1).all())
        elif "self_attn" not in key or "v_proj" in key or "o_proj" in key:
            same = key.endswith("bias") and ("gate_proj" in key or "up_proj" in key)
            assert torch.equal(parameter, before[key]) == same, key
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) is False


def test_every_value_head_has_a_matrix_of_its_own_and_every_seed() -> None:
    model, other = model_of("llama").double(), model_of("llama").double()
    block = model.model.layers[0]
    values = (block.self_attn.v_proj.weight * block.input_layernorm.weight).detach()
    th.rotate(model), th.rotate(other, seed=1)
    rotated, again = (x.model.layers[0].self_attn.v_proj.weight.detach() for x in (model, other))
    # A rotation of the inputs does not change products of rows, one of a head mixes its rows and no others.
    before, after = (x @ x.T for x in (values, rotated))
    blocks = [before[:16, :16], before[16:, 16:]], [after[:16, :16], after[16:, 16:]]
    for old, new in zip(*blocks, strict=True):
        assert error(new, old) > 0.1
        torch.testing.assert_close(torch.linalg.eigvalsh(new), torch.linalg.eigvalsh(old))
    assert error(again, rotated) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    model = model_of("llama").to(dtype)
    wanted = logits(model)
    inverse = model.model.rotary_emb.inv_freq.dtype
    th.rotate(model)
    assert {x.dtype for x in model.parameters()} == {dtype}
    assert model.model.rotary_emb.inv_freq.dtype == inverse
    assert error(logits(model), wanted) < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("GPT-2", "model.layers"),
        ("Gemma", "embed_tokens"),
        ("Gemma 2", "embed_tokens"),
        ("OLMo 2", "input_layernorm"),
        ("Phi-3", "q_proj"),
        ("Mixtral", "gate_proj"),
        ("Qwen3-MoE", "gate_proj"),
        ("StableLM", "norm"),
        ("BERT", "model.layers"),
    ],
)
def test_other_models_are_refused(name: str, word: str) -> None:
    model = PAGE_ARCHITECTURES[name].dense
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(TargetError, match=word):
        th.rotate(model)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_changed_models_are_refused() -> None:
    model = model_of("llama")
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(TargetError, match="shared"):
        th.rotate(model)
    model = model_of("llama")
    model.model.layers[0].scale = nn.Parameter(torch.ones(48))
    with pytest.raises(TargetError, match="scale"):
        th.rotate(model)
    model = model_of("llama")
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.down_proj)
    with pytest.raises(TargetError, match=r"layers\.1\.mlp\.down_proj"):
        th.rotate(model)
    model = model_of("llama")
    model.model.norm.to("meta")
    with pytest.raises(TargetError, match="memory"):
        th.rotate(model)
    model = model_of("llama")
    tn.compress(model, tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)
    with pytest.raises(TargetError, match="compressed already"):
        th.rotate(model)


def test_a_model_that_computes_something_else_is_found_out() -> None:
    model = model_of("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda layer, args, output: output.relu())
    with pytest.raises(TargetError, match=r"0\.\d+ of"):
        th.rotate(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama with a tied head", "qwen2", "qwen3"])
def test_transformers_alone_loads_a_rotated_model(name: str, tmp_path: Path) -> None:
    model = th.rotate(model_of(name))
    th.save(model, tmp_path / "rotated")
    plain = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.arange(40).reshape(2, 20)).logits.double(), sys.argv[1] + "/logits")
assert not any(name.startswith("tensornet") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", plain, str(tmp_path / "rotated")], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "rotated" / "logits"), logits(model))


@pytest.mark.parametrize(
    "name",
    ["llama with a tied head", *(pytest.param(x, marks=pytest.mark.slow) for x in ("qwen2", "qwen3"))],
)
def test_rotated_models_are_saved_and_compressed(name: str, tmp_path: Path) -> None:
    model = th.rotate(model_of(name))
    wanted = logits(model)
    th.save(model, tmp_path / "rotated")
    assert "quantization_config" not in json.loads((tmp_path / "rotated" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "rotated").eval()
    torch.testing.assert_close(logits(plain), wanted)
    model.tie_weights()  # it stays as it is
    torch.testing.assert_close(logits(model), wanted)
    config = tn.CompressionConfig(
        bits_per_weight=9, formats=("int8:g32",), target_modules="all", method="nearest"
    )
    tn.compress(model, config, progress=False)
    assert error(logits(model), wanted) < 0.1
    th.save(model, tmp_path / "small")
    torch.testing.assert_close(logits(th.load(tmp_path / "small")), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama with a tied head", "qwen2", "qwen3"])
def test_rotated_models_are_exported(name: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4}
    model = model_of(name, **sizes)
    before, plain = logits(model), model_of(name, **sizes).config
    th.rotate(model)
    formats = ("int8:g32:float16",)
    config = tn.CompressionConfig(bits_per_weight=9, formats=formats, target_modules="all", method="nearest")
    tn.compress(model, config, progress=False)
    assert error(logits(model), before) < 0.1
    plain.tie_word_embeddings = False
    th.export(model, tmp_path / "model.gguf")
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", config=plain).eval()
    torch.testing.assert_close(logits(back), logits(model), rtol=1e-4, atol=1e-4)
    from tests.hf.export.llama_cpp import logits as computed

    theirs = computed(tmp_path / "model.gguf", torch.arange(20)).double()
    assert float(torch.cosine_similarity(logits(model)[0].flatten(), theirs.flatten(), dim=0)) > 0.995
    readers = {
        "compressed-tensors": """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
with torch.no_grad():
    torch.save(model(torch.arange(40).reshape(2, 20)).logits, sys.argv[1] + "/logits")
""",
        "mlx": """
import pathlib, sys
import mlx.core as mx, numpy, torch
from mlx_lm.utils import load_model
model, _ = load_model(pathlib.Path(sys.argv[1]))
logits = model(mx.arange(40).reshape(2, 20)).astype(mx.float32)
torch.save(torch.from_numpy(numpy.array(logits)), sys.argv[1] + "/logits")
""",
    }
    for target, reader in readers.items():
        folder = tmp_path / target
        assert th.export(model, folder, target=target).packed
        subprocess.run([sys.executable, "-c", reader, str(folder)], check=True, capture_output=True)
        torch.testing.assert_close(
            torch.load(folder / "logits").double(), logits(model), rtol=1e-3, atol=1e-3
        )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a tied head and a tokenizer."""
    model = model_of("llama with a tied head", vocab_size=1024, hidden_size=96, intermediate_size=128)
    model.save_pretrained(tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(gpt2_path() / name, tmp_path / "dense")
    return tmp_path / "dense"


def test_compress_rotates_first(source: Path, tmp_path: Path) -> None:
    config = tn.CompressionConfig(bits_per_weight=9, formats=("int8:g32",), method="nearest")
    rotate = th.CompressOptions(rotate=True)
    planned = th.plan_folder(source, config, rotate)
    assert planned.model_params_before == th.rotate(th.load(source)).num_parameters()
    for name, options in (("rotated", rotate), ("small", None)):
        th.compress_folder(source, tmp_path / name, config, options)
    wanted, small, rotated = (th.load(tmp_path / x) for x in ("dense", "small", "rotated"))
    assert json.loads((tmp_path / "rotated" / "config.json").read_text())["tie_word_embeddings"] is False
    for model in (small, rotated):
        assert error(logits(model), logits(wanted)) < 0.1
    assert "lm_head.weight" in rotated.state_dict()


@pytest.mark.slow
def test_a_rotated_gguf_file_has_the_size_that_was_asked(source: Path, tmp_path: Path) -> None:
    config = tn.CompressionConfig(max_bytes=280_000)
    options = th.CompressOptions(rotate=True, calibration="default", calibration_tokens=1024)
    done = th.compress_folder(source, tmp_path / "model.gguf", config, options)
    assert 0.95 * 280_000 < done.file_bytes_after <= 282_800

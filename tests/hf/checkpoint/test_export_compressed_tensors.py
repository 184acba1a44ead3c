"""Integer layers go out as a compressed-tensors checkpoint with the same weights."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import DestinationError, TargetError
from tensornet_hf.cli.main import run
from tensornet_hf.embedded import gpt2_path

FORMATS = {
    "q_proj": "int4",
    "k_proj": "int4:g32:float8",
    "v_proj": "int8",
    "o_proj": "int8:row",
    "gate_proj": "int4:g128",
    "up_proj": "int4:row",
}
needs_compressed_tensors = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="needs the extra `export`"
)
REASONS = {"down_proj": "int3"}


def model(dtype: torch.dtype = torch.float32, **options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def compressed(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Every layer in a format of its own; one layer a low rank product, one dense in the model's float."""
    made = model(dtype)
    plan = tn.plan(made, tn.CompressionConfig(max_bond=4, topology="low_rank"))
    for layer in plan:
        kind = layer.name.rpartition(".")[2]
        if layer.name == "model.layers.1.mlp.up_proj":
            continue
        if layer.name == "model.layers.1.mlp.gate_proj":
            plan = plan.replace_layer(layer.name, None)
            continue
        plan = plan.replace_layer(layer.name, None, {**FORMATS, **REASONS}[kind])
    tn.apply_plan(made, plan)
    return made


def logits(made: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return made(torch.arange(24).reshape(2, 12)).logits


def test_packed_words_hold_the_codes_and_all_else_is_dense_and_listed(tmp_path: Path) -> None:
    made = compressed()
    before = logits(made)
    report = th.export_compressed_tensors(made, tmp_path / "out")
    assert torch.equal(logits(made), before)  # left as it was
    assert len(report.packed) == 10
    assert report.dense.keys() == {
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.up_proj",
    }
    assert "int3" in report.dense["model.layers.0.mlp.down_proj"]
    assert "low_rank" in report.dense["model.layers.1.mlp.up_proj"]
    assert "down_proj: stored as int3" in str(report)
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name, number_format in report.packed.items():
        bits = tn.quantization.NumberFormat.parse(number_format).bits
        packed, scale = state[f"{name}.weight_packed"].long(), state[f"{name}.weight_scale"]
        per_word = 32 // bits
        codes = torch.stack([(packed >> (bits * k)) & (2**bits - 1) for k in range(per_word)], 2).flatten(1)
        _, columns = state[f"{name}.weight_shape"].tolist()
        values = (codes[:, :columns] - 2 ** (bits - 1)).float()
        weight = values * scale.repeat_interleave(columns // scale.shape[1], 1)
        assert torch.equal(weight, made.get_submodule(name).to_matrix())
        assert f"{name}.weight" not in state
    assert torch.equal(
        state["model.layers.0.mlp.down_proj.weight"],
        made.get_submodule("model.layers.0.mlp.down_proj").to_matrix(),
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    named = [name for group in config["config_groups"].values() for name in group["targets"]]
    assert sorted(named) == sorted(report.packed)


def logits_of_transformers_alone(folder: Path) -> torch.Tensor:
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto').eval()\n"
        "assert not any(name.startswith('tensornet') for name in sys.modules)\n"
        "with torch.no_grad(): torch.save(model(torch.arange(24).reshape(2, 12)).logits, sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, str(folder), str(folder / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits.pt")


@pytest.mark.slow
@needs_compressed_tensors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_alone_computes_equal_logits(tmp_path: Path, dtype: torch.dtype) -> None:
    made = compressed(dtype)
    th.export_compressed_tensors(made, tmp_path / "out")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    found = logits_of_transformers_alone(tmp_path / "out")
    torch.testing.assert_close(found, logits(made), rtol=tolerance, atol=tolerance)


def tied_head() -> LlamaForCausalLM:
    made = model(tie_word_embeddings=True)
    options = {"bits_per_weight": 9, "formats": ("int8",), "target_modules": "all", "objective": "weight"}
    tn.compress(made, tn.CompressionConfig(**options), progress=False)
    return made


def test_a_head_tied_to_the_embedding_is_written_dense_once(tmp_path: Path) -> None:
    made = tied_head()
    report = th.export_compressed_tensors(made, tmp_path / "out")
    assert len(report.packed) == 14
    assert report.dense == {
        "lm_head": "its tensors are tied to those of model.embed_tokens",
        "model.embed_tokens": "an Embedding; only nn.Linear can be packed",
    }
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in state if name.startswith("lm_head")]
    assert torch.equal(state["model.embed_tokens.weight"], made.lm_head.to_matrix())


@pytest.mark.slow
@needs_compressed_tensors
def test_transformers_alone_ties_the_head_again(tmp_path: Path) -> None:
    made = tied_head()
    th.export_compressed_tensors(made, tmp_path / "out")
    found = logits_of_transformers_alone(tmp_path / "out")
    torch.testing.assert_close(found, logits(made), rtol=1e-5, atol=1e-5)


def test_command_exports_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    th.save(compressed(), tmp_path / "small")
    assert run(["export", str(tmp_path / "small"), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "10 layers packed, 3 written dense" in out
    assert "model.layers.1.mlp.up_proj" in out
    assert run(["export", str(tmp_path / "small"), str(tmp_path / "json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["packed"]) == 10
    assert len(found["dense"]) == 3
    assert run(["export", str(tmp_path / "small"), str(tmp_path / "out")]) != 0
    assert "exists already" in capsys.readouterr().err


def test_models_without_layers_to_pack_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no tensor-network layers"):
        th.export_compressed_tensors(model(), tmp_path / "out")
    gpt2 = GPT2LMHeadModel.from_pretrained(gpt2_path())
    config = tn.CompressionConfig(
        bits_per_weight=4.25, formats=("int4",), objective="weight", target_modules=("h.0.mlp.c_fc",)
    )
    tn.compress(gpt2, config, progress=False)
    with pytest.raises(TargetError, match=r"a Conv1D; only nn\.Linear"):
        th.export_compressed_tensors(gpt2, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(DestinationError, match="exists already"):
        th.export_compressed_tensors(gpt2, tmp_path / "out")

"""compressed-tensors and MLX: the foreign package loads the folder and computes our logits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import DestinationError, MissingDependencyError, TargetError
from tensornet_hf.cli.main import run
from tensornet_hf.embedded import gpt2_path
from tensornet_hf.exporters.folder import pack_rows
from tensornet_hf.exporters.target import EXPORT_TARGETS as REGISTERED

TARGETS = ("compressed-tensors", "mlx")
#: Layer of a model, its format, and what becomes of it in both targets: a format, or a word of the reason.
LAYERS = {
    "model.embed_tokens": ("int8", "embedding", "int8"),
    "model.layers.0.self_attn.q_proj": ("int4", "int4", "int4"),
    "model.layers.0.self_attn.k_proj": ("int4:g32:float8", "int4:g32", "int4:g32"),
    "model.layers.0.self_attn.v_proj": ("int8", "int8", "int8"),
    "model.layers.0.self_attn.o_proj": ("int8:row", "int8:row", "MLX has"),
    "model.layers.0.mlp.gate_proj": ("int4:g128", "int4:g128", "int4:g128"),
    "model.layers.0.mlp.up_proj": ("int3:row", "int3:row", "MLX has"),
    "model.layers.0.mlp.down_proj": ("int7", "int7", "MLX has"),
    "model.layers.1.self_attn.q_proj": ("int2:g32", "int3:g32", "int2:g32"),
    "model.layers.1.self_attn.k_proj": ("int2", "int3", "int2"),
    "model.layers.1.self_attn.v_proj": ("int3:g32:float8", "int3:g32", "int3:g32"),
    "model.layers.1.self_attn.o_proj": ("nl4:g32", "int8:g32", "MLX has"),
    "model.layers.1.mlp.gate_proj": ("int6", "int6", "int6"),
    "model.layers.1.mlp.up_proj": ("low_rank", "low_rank", "low_rank"),
    "model.layers.1.mlp.down_proj": ("int5:g128", "divide", "divide"),
    "lm_head": ("int5:g32:float16", "int5:g32", "int5:g32"),
}
SIZES = {
    "vocab_size": 48, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
}  # fmt: skip
#: Loads folders and saves their logits; it runs without this library.
READERS = {
    "compressed-tensors": """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        torch.save(model(torch.arange(24).reshape(2, 12)).logits.float(), folder + "/logits")
assert not any(name.startswith("tensornet") for name in sys.modules)
""",
    "mlx": """
import pathlib, sys
import mlx.core as mx, numpy, torch
from mlx_lm.utils import load_model
for folder in sys.argv[1:]:
    model, _ = load_model(pathlib.Path(folder))
    logits = model(mx.arange(24).reshape(2, 12)).astype(mx.float32)
    torch.save(torch.from_numpy(numpy.array(logits)), folder + "/logits")
""",
}


def random(model: PreTrainedModel) -> PreTrainedModel:
    """The model with random biases and norms."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def mixed(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Llama with every layer in the format that `LAYERS` gives."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).eval()
    config = tn.CompressionConfig(
        topology_options={"max_bond": 4}, topology="low_rank", target_modules="all", method="svd"
    )
    plan = tn.plan(model, config)
    for name, (number_format, *_) in LAYERS.items():
        if number_format != "low_rank":
            plan = plan.replace_layer(name, None, number_format)
    tn.apply_plan(model, plan)
    return model


def compressed(model: PreTrainedModel) -> PreTrainedModel:
    config = tn.CompressionConfig(
        bits_per_weight=5, formats=("int4:g32", "int8:g32"), target_modules="all", method="nearest"
    )
    tn.compress(random(model), config, progress=False)
    return model


def llama(**options: object) -> PreTrainedModel:
    return compressed(LlamaForCausalLM(LlamaConfig(**{**SIZES, **options})))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixed": mixed,
    "bfloat16": lambda: mixed(torch.bfloat16),
    "tied": lambda: llama(tie_word_embeddings=True),
    "llama3": lambda: llama(rope_parameters=LLAMA3),
    "qwen2": lambda: compressed(Qwen2ForCausalLM(Qwen2Config(**SIZES))),
    "phi3": lambda: compressed(Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0, eos_token_id=0))),
    "mixtral": lambda: compressed(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))),
    "qwen3_moe": lambda: compressed(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS))),
}
OF_MLX: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: compressed(th.load(gpt2_path())),
}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12)).logits.double()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_foreign_package_computes_our_logits(target: str, tmp_path: Path) -> None:
    expected, rounding = {}, {}
    for name, make in (MODELS | (OF_MLX if target == "mlx" else {})).items():
        torch.manual_seed(0)
        model = make()
        ours = logits(model)
        report = th.export(model, tmp_path / name, target=target)
        assert report.num_bytes == (tmp_path / name / "model.safetensors").stat().st_size
        assert torch.equal(logits(model), ours)  # left as it was
        expected[name] = logits(model.double())
        rounding[name] = (ours - expected[name]).abs().max()
    folders = [str(tmp_path / name) for name in expected]
    found = subprocess.run(
        [sys.executable, "-c", READERS[target], *folders], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    for name, exact in expected.items():
        error = (torch.load(tmp_path / name / "logits") - exact).abs().max()
        assert error <= 5 * rounding[name], name


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_packed_or_dense_for_a_reason(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = mixed(dtype)
    report = th.export(model, tmp_path / "out", target=target)
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name, (_, *expected) in LAYERS.items():
        kind = expected[TARGETS.index(target)]
        if name == "lm_head" and dtype == torch.bfloat16 and target == "compressed-tensors":
            kind = "exact"  # scales in float16 are not exact in bfloat16
        if kind.startswith("int"):
            assert report.packed[name] == kind
        else:
            assert kind in report.dense[name]
            assert torch.equal(state[f"{name}.weight"], model.get_submodule(name).to_matrix())
    assert len(report.packed) + len(report.dense) == len(LAYERS)
    assert "up_proj: a network" in str(report)


@pytest.mark.slow
def test_four_bit_floats_are_loaded_bit_for_bit(tmp_path: Path) -> None:
    """Beside integers, by a plan that names these formats; the package unpacks them to bfloat16."""
    torch.manual_seed(0)
    dense = random(LlamaForCausalLM(LlamaConfig(**SIZES | {"intermediate_size": 256}))).bfloat16()
    dense.save_pretrained(tmp_path / "dense")
    chosen = ("compressed-tensors", "nvfp4", "mxfp4", "int8")
    config = tn.CompressionConfig(bits_per_weight=4.7, formats=chosen, target_modules="*_proj")
    calibration = [{"input_ids": torch.arange(48).reshape(4, 12)}]
    model = th.load(tmp_path / "dense")
    tn.compress(model, config, calibration=calibration, progress=False)
    report = th.export(model, tmp_path / "out", target="compressed-tensors")
    assert set(report.packed.values()) == {"nvfp4", "mxfp4", "int8"}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    read(torch.arange(3)[None])  # the first pass unpacks the weights
    for name in report.packed:
        exact = model.get_submodule(name).to_matrix()
        assert torch.equal(read.get_submodule(name).weight, exact), name
    report = th.export(model.float(), tmp_path / "wide", target="compressed-tensors")
    assert set(report.packed.values()) == {"int8"}
    assert any("bfloat16" in why for why in report.dense.values())


def test_words_are_one_stream_of_bits_for_each_row() -> None:
    for bits in range(2, 9):
        for columns in (1, 9, 32, 50):
            codes = torch.randint(0, 2**bits, (3, columns), dtype=torch.uint8)
            found = pack_rows(codes, bits)
            assert found.shape == (3, -(-columns * bits // 32))
            for row, packed in zip(codes.tolist(), found.tolist(), strict=True):
                stream = sum(code << (bits * k) for k, code in enumerate(row))
                assert stream == sum((word % 2**32) << (32 * k) for k, word in enumerate(packed))


def test_a_head_tied_to_the_embedding(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    report = th.export(model, tmp_path / "out", target="compressed-tensors")
    assert report.dense.keys() == {"lm_head", "model.embed_tokens"}
    assert "tied to those of model.embed_tokens" in report.dense["lm_head"]
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in state if name.startswith("lm_head")]
    assert torch.equal(state["model.embed_tokens.weight"], model.lm_head.to_matrix())


@pytest.mark.slow
def test_mlx_stores_a_tied_matrix_once(tmp_path: Path) -> None:
    report = th.export(llama(tie_word_embeddings=True), tmp_path / "out", target="mlx")
    assert not report.dense
    assert "model.embed_tokens" in report.packed
    assert "lm_head" not in report.packed
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in state if name.startswith("lm_head")]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    th.save(mixed(), tmp_path / "small")
    arguments = ["export", str(tmp_path / "small"), str(tmp_path / "out"), "--to", "compressed-tensors"]
    assert run(arguments) == 0
    assert "13 tensors packed" in capsys.readouterr().out
    assert run([*arguments, "--force", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (len(found["packed"]), len(found["dense"])) == (13, 3)
    assert found["num_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert run(arguments) != 0
    assert "exists already" in capsys.readouterr().err
    assert run([*arguments[:-1], "paper"]) != 0
    assert "choose one of" in capsys.readouterr().err


@pytest.mark.parametrize("target", TARGETS)
def test_models_without_layers_to_pack_are_refused(target: str, tmp_path: Path) -> None:
    if target == "mlx":
        pytest.importorskip("mlx", reason="needs the extra `export`")
    dense = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(TargetError, match="no compressed layers"):
        th.export(dense, tmp_path / "out", target=target)
    tn.compress(dense, tn.CompressionConfig(topology_options={"max_bond": 2}, method="svd"), progress=False)
    with pytest.raises(TargetError, match="can be packed"):
        th.export(dense, tmp_path / "out", target=target)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(DestinationError, match="exists already"):
        th.export(dense, tmp_path / "out", target=target)
    with pytest.raises(DestinationError, match="gguf"):
        th.export(dense, tmp_path / "out.gguf", target=target)
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("target", ["compressed-tensors", pytest.param("mlx", marks=pytest.mark.slow)])
def test_a_saved_mixture_is_packed_like_the_original(target: str, tmp_path: Path) -> None:
    model = MODELS["mixtral"]()
    th.save(model, tmp_path / "saved")
    expected = th.export(model, tmp_path / "out", target=target)
    found = th.export(tmp_path / "saved", tmp_path / "again", target=target)
    assert (found.packed, found.dense) == (expected.packed, expected.dense)
    of_experts = [name for name in expected.packed if "experts" in name or "switch_mlp" in name]
    assert len(of_experts) == {"mlx": 2 * 3, "compressed-tensors": 2 * 3 * 4}[target]
    states = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def mixture_with(formats: dict[str, str]) -> PreTrainedModel:
    """Make a Mixtral in which the layers of these patterns have these number formats."""
    model = random(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)))
    for pattern, number_format in formats.items():
        config = tn.CompressionConfig(pattern, formats=(number_format,), method="nearest")
        tn.compress(model, config, progress=False)
    return model


def test_a_stack_of_several_formats_is_dense(tmp_path: Path) -> None:
    model = mixture_with({"*experts.[012].*": "int4:g32", "*experts.3.*": "int8:g32", "*q_proj": "int4:g32"})
    report = th.export(model, tmp_path / "out", target="compressed-tensors")
    assert sorted(set(report.packed.values())) == ["int4:g32"]
    assert not [name for name in report.packed if "experts" in name]
    assert "several number formats" in report.dense["model.layers.0.mlp.experts.0.down_proj"]
    state = load_file(tmp_path / "out" / "model.safetensors")
    down = model.get_submodule("model.layers.0.mlp.experts.3.down_proj").to_matrix()
    assert torch.equal(state["model.layers.0.block_sparse_moe.experts.3.w2.weight"], down)


@pytest.mark.parametrize(
    "formats",
    [{"*layers.0*experts*": "int4:g32"}, {"*experts*gate*": "int4:g32", "*experts*down*": "int8:g32"}],
)
def test_transformers_needs_one_format_for_all_experts(formats: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="exclude_modules"):
        th.export(mixture_with(formats), tmp_path / "out", target="compressed-tensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", REGISTERED)
def test_plans_give_matrices_of_a_stack_one_format(target: str) -> None:
    sizes = {**SIZES, "num_hidden_layers": 1}
    model = random(MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2)))
    ids = torch.randint(48, (16, 32))
    batches = [{"input_ids": ids, "labels": ids}]
    config = tn.CompressionConfig("all", bits_per_weight=5.5, formats=target, method="nearest")
    plan = tn.survey(model, batches, config).plan()
    formats: dict[str, set[str]] = {}
    for layer in plan:
        stack = re.sub(r"experts\.\d+", "experts", layer.name)
        formats.setdefault(stack, set()).add(
            "float" if layer.topology is None else layer.storage.number_format.name
        )
    assert all(len(found) == 1 for found in formats.values())
    of_experts = [found for name, found in formats.items() if "experts" in name]
    assert len(of_experts) == 2
    if target == "compressed-tensors":
        assert len(set.union(*of_experts)) == 1


def test_mlx_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(MissingDependencyError, match=r"mlx_lm.*\[export\]"):
        th.export(mixed(), tmp_path / "out", target="mlx")


@pytest.mark.slow
def test_mlx_names_a_model_that_it_does_not_have(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = compressed(BertForMaskedLM(BertConfig(vocab_size=64, **sizes)))
    with pytest.raises(TargetError, match="bert not supported"):
        th.export(model, tmp_path / "out", target="mlx")
    assert not list(tmp_path.iterdir())

"""Packed folders that are written block by block are those that are exported from a model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from folder_runs import compress_files
from sharded_folders import contents
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import TargetError
from tensornet_hf.embedded import gpt2_path

pytestmark = pytest.mark.slow  # needs the extra `export`
SIZES = {
    "vocab_size": 48, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: Formats of both menus, and four that are written dense in one of them.
FORMATS = ("int4", "int4:g32", "int8", "int6", "int5", "nvfp4", "int4:g128", "int8:row", "mxfp4")


def source_of(name: str, folder: Path) -> Path:
    if name == "gpt2":
        return gpt2_path()
    if name == "mixture":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
        MixtralForCausalLM(MixtralConfig(**SIZES, **experts)).save_pretrained(folder)  # type: ignore[arg-type]
        return folder
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=name == "tied")).bfloat16()  # type: ignore[arg-type]
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    return folder


def plan_of(source: Path, target: str, name: str) -> tn.CompressionPlan:
    """Layers in the formats by turns."""
    kept = {"target_modules": "all"} if target == "mlx" and name == "tied" else {}
    config = tn.CompressionConfig(bits_per_weight=9, formats=("int8",), method="nearest", **kept)  # type: ignore[arg-type]
    if name == "mixture":  # transformers needs one format for all experts
        return tn.plan(th.load(source), config)
    data = tn.plan(th.load(source), config).to_dict()
    for k, layer in enumerate(data["layers"]):
        layer["storage"] = {"number_format": FORMATS[k % len(FORMATS)]}
    return tn.CompressionPlan.from_dict(data)


@pytest.mark.parametrize(
    ("target", "name"),
    [("compressed-tensors", "mixture"), ("mlx", "mixture"), ("compressed-tensors", "llama"),
     ("compressed-tensors", "tied"), ("mlx", "llama"), ("mlx", "tied"), ("mlx", "gpt2")],
)  # fmt: skip
def test_the_same_folder_as_an_export(target: str, name: str, tmp_path: Path) -> None:
    source = source_of(name, tmp_path / "dense")
    plan = plan_of(source, target, name)
    compress_files(source, tmp_path / "ours", plan, export=target)
    model = th.load(source)
    tn.compress(model, plan, progress=False)
    th.export(model, tmp_path / "theirs", target=target, source=source)
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= {"receipt.json"}  # says how it was made


def test_what_no_target_can_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compressed-tensors, gptq, mlx"):
        compress_files(
            gpt2_path(),
            tmp_path / "out",
            tn.CompressionConfig(topology_options={"max_bond": 1}),
            export="onnx",
        )
    config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5, method="svd")
    with pytest.raises(TargetError, match="No layer can be packed"):
        compress_files(gpt2_path(), tmp_path / "out", config, export="mlx")
    assert not (tmp_path / "out").exists()

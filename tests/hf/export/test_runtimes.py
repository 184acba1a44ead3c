"""Runtimes that packages install: they load what was written for them, and generate our tokens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import tensornet as tn
import tensornet_hf as th
from tensornet.quantization import NumberFormat
from tensornet.quantization.menus import MENUS
from tensornet_hf.embedded import gpt2_path
from tensornet_hf.exporters.gptq import quantization_entry

SIZES = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1023,
}  # fmt: skip
PROMPT = torch.arange(5, 25)[None]
NEW = 12
#: Programs that generate greedily; their arguments are the model and the number of tokens in all.
ORT = """
import json, sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
parameters = og.GeneratorParams(model)
parameters.set_search_options(do_sample=False, max_length=int(sys.argv[2]))
generator = og.Generator(model, parameters)
generator.append_tokens(list(range(5, 25)))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps(generator.get_sequence(0).tolist()))
"""
OPENVINO = """
import json, sys
import numpy, openvino, openvino_genai
exact = {
    "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
pipeline = openvino_genai.LLMPipeline(sys.argv[1], "CPU", **exact)
config = openvino_genai.GenerationConfig()
config.max_new_tokens, config.do_sample, config.ignore_eos = int(sys.argv[2]) - 20, False, True
found = pipeline.generate(openvino.Tensor(numpy.arange(5, 25)[None]), config)
print(json.dumps([*range(5, 25), *map(int, found.tokens[0])]))
"""


def planned(model: PreTrainedModel, formats: str, **options: object) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    calibration = [{"input_ids": torch.randint(1000, (4, 64), generator=generator)}]
    config = tn.CompressionConfig(bits_per_weight=5.5, formats=formats, **options)
    tn.compress(model.eval(), config, calibration=calibration, progress=False)
    return model


def output(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_onnx_runtime_genai_generates_our_tokens(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    torch.manual_seed(0)
    if kind == "llama":
        dense: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        dense = Qwen2ForCausalLM(Qwen2Config(**SIZES))  # its query, key and value have biases
    model = planned(dense, "gptq")
    report = th.export(model, tmp_path / "packed", target="gptq", source=gpt2_path())
    bits = {NumberFormat.parse(x).bits for x in report.packed.values()}
    assert bits == {4, 8}, "a plan of one format tests no overrides"
    assert not report.dense
    folder = tmp_path / "packed"
    # Otherwise the builder would round the head too.
    exact = ("nodes_to_exclude=/lm_head/MatMul", "accuracy_level=1")
    builder = ("-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu", "--extra_options", *exact)
    output(*builder, "-m", folder, "-i", folder, "-o", tmp_path / "onnx", "-c", tmp_path / "cache")
    ours = model.generate(PROMPT, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    found = json.loads(output("-c", ORT, tmp_path / "onnx", PROMPT.shape[1] + NEW).splitlines()[-1])
    assert found == ours[0].tolist()


@pytest.mark.slow
def test_openvino_genai_reads_the_types_of_its_menu(tmp_path: Path) -> None:
    """It decodes them to groups of its own types, so later tokens of a random model may differ."""
    pytest.importorskip("openvino_genai")
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 4}))
    model = planned(dense, "openvino", target_modules="all")
    report = th.export(model, tmp_path / "model.gguf", source=gpt2_path())
    assert set(report.packed.values()) == {"Q4_K", "Q6_K", "Q8_0"}
    ours = model.generate(PROMPT, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[0].tolist()
    found = json.loads(output("-c", OPENVINO, tmp_path / "model.gguf", len(ours)).splitlines()[-1])
    assert len(found) == len(ours)
    assert found[PROMPT.shape[1]] == ours[PROMPT.shape[1]]


def test_menus_of_runtimes_are_parts_of_those_of_files() -> None:
    for runtime, file in (("openvino", "gguf"), ("gguf-fast", "gguf"), ("vllm", "compressed-tensors")):
        every = {NumberFormat.parse(x).name for x in (*MENUS[file].formats, *MENUS[file].on_request)}
        own = {NumberFormat.parse(x).name for x in (*MENUS[runtime].formats, *MENUS[runtime].on_request)}
        assert own < every, runtime


def test_overrides_match_layers_and_what_vllm_fuses_them_to() -> None:
    """vLLM asks for the name of a layer, ONNX Runtime GenAI for that of a tensor, both from the start."""
    first, second = "model.layers.1", "model.layers.11"
    packed = {f"{x}.self_attn.{p}_proj": "int8" for x in (first,) for p in "qkv"}
    packed |= {f"{second}.self_attn.{p}_proj": "int4:g32" for p in "qkv"}
    packed |= {f"{first}.mlp.experts.{k}.up_proj": "int8:row" for k in range(3)}
    packed |= {f"{second}.mlp.down_proj": "int4:g32"}
    entry = quantization_entry(packed, [f"{first}.mlp.gate", "lm_head"])
    assert (entry["bits"], entry["group_size"], entry["lm_head"]) == (4, 32, False)

    def found(name: str) -> dict[str, int] | None:
        hits = [x for x in entry["dynamic"] if re.match(x[2:], name)]
        assert len(hits) <= 1
        return entry["dynamic"][hits[0]] if hits else None

    assert found(f"{first}.self_attn.q_proj.qweight") == {"bits": 8, "group_size": 64}
    assert found(f"{first}.self_attn.qkv_proj") == {"bits": 8, "group_size": 64}
    assert found(f"{second}.self_attn.qkv_proj") is None
    assert found(f"{first}.mlp.experts") == {"bits": 8, "group_size": -1}
    assert found(f"{first}.mlp.gate") == {}
    assert found(f"{first}.mlp.gate_up_proj") is None


def test_layers_that_cannot_be_fused_have_an_entry_each() -> None:
    block = "model.layers.0.self_attn"
    packed = {f"{block}.q_proj": "int8", f"{block}.k_proj": "int4:g32", f"{block}.o_proj": "int4:g32"}
    entry = quantization_entry(packed, [f"{block}.v_proj"])
    found = {
        name: [y for x, y in entry["dynamic"].items() if re.match(x[2:], f"{block}.{name}_proj.qweight")]
        for name in "qkvo"
    }
    assert found == {"q": [{"bits": 8, "group_size": 64}], "k": [], "v": [{}], "o": []}
    assert (entry["bits"], entry["group_size"]) == (4, 32)

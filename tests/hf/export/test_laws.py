"""Every export target passes the laws of `tensornet_hf.testing`, its files read by the foreign package."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.checkpoint import load_gguf
from tensornet_hf.embedded import gpt2_path
from tensornet_hf.testing import ExportLaws

pytestmark = pytest.mark.slow  # needs the extras `export` and `gguf`


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    parts = model.named_modules(remove_duplicate=False)
    return {name: x.weight.detach() for name, x in parts if isinstance(x, nn.Linear | nn.Embedding)}


class TestGguf(ExportLaws):
    target = "gguf"
    destination = "model.gguf"
    formats = ("int4:g32:float16", "int8:g32:float16")

    def folder(self, model: PreTrainedModel, path: Path) -> Path:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(gpt2_path() / name, super().folder(model, path))
        return path

    def weights(self, destination: Path) -> dict[str, Tensor]:
        return matrices(load_gguf(destination))


class Gemma:
    """A table of tokens whose rows are multiplied by a constant, and a head that is tied to it."""

    target_modules = "all"
    kind = Gemma3ForCausalLM

    def model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        sizes = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
        # llama.cpp only computes the scalar of the published models.
        fixed = {"query_pre_attn_scalar": 32, "layer_types": ["sliding_attention"] * 2}
        return self.kind(self.kind.config_class(**sizes, **heads, **fixed)).eval()


class TestGgufOfGemma(Gemma, TestGguf):
    kind = Gemma2ForCausalLM  # the converter needs no tokenizer for it, but plans need a folder with one
    test_planned_layers_are_packed = None
    test_compressed_block_by_block = None


@pytest.mark.parametrize("budget", [{"max_bytes": 0.25}, {"bits_per_weight": 4.5}])
def test_plans_for_gguf_reach_the_whole_of_gemma_3(budget: dict[str, float], tmp_path: Path) -> None:
    """The table of tokens is most of a small Gemma; llama.cpp multiplies its rows by the same constant."""
    from tests.hf.export.llama_cpp import logits

    model = Gemma().model()
    size = sum(p.nbytes for p in model.parameters())
    if "max_bytes" in budget:
        budget = {"max_bytes": int(0.25 * size)}
    config = tn.CompressionConfig(**budget, target_modules="all", formats="gguf", method="nearest")
    tn.compress(model, config, progress=False)
    report = th.export(model, tmp_path / "model.gguf", source=gpt2_path())
    assert report.dense == {}
    assert report.num_bytes < 0.25 * size
    written, ids = load_gguf(tmp_path / "model.gguf"), torch.arange(5, 30)
    assert torch.equal(written.model.embed_tokens.weight, model.model.embed_tokens.to_matrix())
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
    theirs = logits(tmp_path / "model.gguf", ids)  # products with activations of 8 bits
    assert float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)) > 0.998


class TestGgufFloats(TestGguf):
    formats = ("mxfp4", "nvfp4")


class TestCompressedTensors(ExportLaws):
    target = "compressed-tensors"

    def weights(self, destination: Path) -> dict[str, Tensor]:
        model = AutoModelForCausalLM.from_pretrained(destination)
        model(torch.arange(3)[None])  # the first pass decompresses the weights
        return matrices(model)


class TestCompressedTensorsFloats(TestCompressedTensors):
    formats = ("nvfp4", "mxfp4")

    def model(self) -> PreTrainedModel:
        return super().model().bfloat16()


class TestGptq(ExportLaws):
    """The codes are decoded here as the format says; ONNX Runtime reads them in test_gptq.py."""

    target = "gptq"

    def model(self) -> PreTrainedModel:
        """Build a model whose rows are many, since the groups of its inputs take 4 bytes for each column."""
        torch.manual_seed(0)
        sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()

    def weights(self, destination: Path) -> dict[str, Tensor]:
        state = load_file(destination / "model.safetensors")
        found = {name.removesuffix(".weight"): x for name, x in state.items()}
        for name in [x.removesuffix(".qweight") for x in state if x.endswith(".qweight")]:
            words, zeros, scales, groups = (
                state[f"{name}.{part}"].long() for part in ("qweight", "qzeros", "scales", "g_idx")
            )
            scales = state[f"{name}.scales"].double()
            bits = 32 * len(words) // len(groups)
            shifts = torch.arange(0, 32, bits)
            codes = (words[:, None] >> shifts[:, None] & (1 << bits) - 1).flatten(0, 1)
            zero = (zeros[..., None] >> shifts & (1 << bits) - 1).flatten(1) + 1
            found[name] = (scales[groups] * (codes - zero[groups])).T
        return found


class TestMlx(ExportLaws):
    target = "mlx"

    def weights(self, destination: Path) -> dict[str, Tensor]:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        def matrix(part: object) -> Tensor:
            weight = part.weight
            if hasattr(part, "scales"):
                weight = mx.dequantize(weight, part.scales, part.biases, part.group_size, part.bits)
            return torch.from_numpy(numpy.array(weight.astype(mx.float32)))

        model, _ = load_model(destination)
        parts = [(name, x) for name, x in model.named_modules() if getattr(x, "weight", None) is not None]
        return {name: matrix(x) for name, x in parts if x.weight.ndim == 2}


class TestMlxOfGemma(Gemma, TestMlx):
    pass

"""Every export target passes the laws of `tensornet_hf.testing`, its files read by the foreign package."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

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

"""Layers of one description are read once: a model of hundreds of layers repeats a few descriptions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import FormatError
from tensornet_hf.checkpoint import headers
from tensornet_hf.checkpoint.quantization_config import TensorNetworkConfig


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=6, **sizes))
    tn.compress(model, tn.CompressionConfig(max_bond=4, topology="mpo"), progress=False)
    folder = tmp_path_factory.mktemp("repeated")
    th.save_model(model, folder)
    return folder


def test_equal_descriptions_are_built_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    promised = headers.promised_tensors

    def counting(layer: str, spec: Mapping[str, Any]) -> dict[str, headers.PromisedTensor]:
        built.append(layer)
        return promised(layer, spec)

    monkeypatch.setattr(headers, "promised_tensors", counting)
    layers = headers.read_checkpoint(saved).compression.layers
    assert len(layers) == 42
    assert len(built) == len({repr(spec) for spec in layers.values()}) == 3


def test_a_wrong_layer_among_equal_ones_is_named(saved: Path) -> None:
    checkpoint = headers.read_checkpoint(saved)
    layer = sorted(checkpoint.compression.layers)[-1]
    name = f"{layer}.core_0"
    tensors = {k: v for k, v in checkpoint.tensors.items() if k != name}
    with pytest.raises(FormatError, match=f"{name} is missing"):
        headers.check_layers(checkpoint.compression, tensors, where="here")


def test_copies_of_a_configuration_share_descriptions_and_nothing_else() -> None:
    config = TensorNetworkConfig(layers={"a": {"type": "linear"}}, ties={"a": "b"}, dtype="float32")
    for twin in (copy.deepcopy(config), TensorNetworkConfig(**config.to_dict())):
        assert twin.layers == config.layers
        assert twin.layers["a"] is config.layers["a"]
        twin.layers["c"] = twin.ties["c"] = "d"
        assert "c" not in config.layers
        assert "c" not in config.ties


def test_loading_formats_no_description(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formatted: list[bool] = []
    stock = LlamaConfig.to_json_string

    def noting(self: LlamaConfig, *args: Any, **options: Any) -> str:
        formatted.append(hasattr(self, "quantization_config"))
        return stock(self, *args, **options)

    monkeypatch.setattr(LlamaConfig, "to_json_string", noting)
    config = th.load(saved).config
    assert formatted == [False]
    assert config.to_dict() == LlamaForCausalLM.from_pretrained(saved).config.to_dict()
    assert th.load(saved, use_cache=False).config.use_cache is False  # read by transformers, with the option

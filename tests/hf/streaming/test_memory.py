"""Tables of a large vocabulary are in memory as they are stored, and only a few rows in other dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import peak
from folder_runs import compress_files
from hf_models import ARCHITECTURES
from sharded_folders import save
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tensornet as tn
from tensornet.nn.extension import ProvidedData
from tensornet_hf.lazy_model import open_model

ROWS, COLUMNS = 131072, 64


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_in_the_dtype_of_products_compute_the_same(name: str, tmp_path: Path) -> None:
    lazy = open_model(save(name, tmp_path / "dense", dtype=torch.bfloat16))
    found: list[list[torch.Tensor]] = []
    for products in (None, torch.bfloat16):
        with lazy.loaded(lazy.model.modules(), products=products):
            kinds = {type(x): x.weight.dtype for x in lazy.model.modules() if hasattr(x, "weight")}
            assert kinds[nn.Linear if nn.Linear in kinds else nn.Embedding] == (products or torch.float32)
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                made: Any = lazy.model(**ARCHITECTURES[name].inputs(), output_hidden_states=True)
        states = next(made[x] for x in ("hidden_states", "encoder_hidden_states") if made.get(x) is not None)
        found.append([*states, made.logits])
        assert all("forward" not in vars(x) for x in lazy.model.modules())
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_tables_are_surveyed_and_rounded_in_few_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides both tables, one of them is in memory in float32 and a second time in its own dtype."""
    monkeypatch.setattr("tensornet.calibration.walk.has_bfloat16", lambda device: True)
    sizes = {"hidden_size": COLUMNS, "intermediate_size": COLUMNS, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, num_hidden_layers=2, **sizes))
    model.bfloat16().save_pretrained(tmp_path / "dense")
    config = tn.CompressionConfig(bits_per_weight=6, formats=("int4", "int8"), target_modules="all")
    data = ProvidedData([{"input_ids": torch.tensor([[1, 2, 3]])}], "numbers")
    made: list[tn.CompressionReport] = []

    def compress() -> None:
        made.append(compress_files(tmp_path / "dense", tmp_path / "made", config, calibration=data))

    most = peak(compress)
    assert {"lm_head", "model.embed_tokens"} <= {x.name for x in made[0].plan if x.topology}
    assert most <= 5.2 * ROWS * COLUMNS * 2

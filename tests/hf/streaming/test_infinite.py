"""Folders whose configuration holds infinity, which JSON has no number for, are compressed file to file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 67, "pad_token_id": 0}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 36}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 12, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2}
#: Each has `time_step_limit = (0, inf)`, written by default as `{"__float__": "Infinity"}`.
MODELS: dict[str, dict[str, Any]] = {
    "Mamba2": {"num_heads": 4, "head_dim": 12, "n_groups": 1, "state_size": 8, "expand": 2},
    "FalconH1": {**ATTENTION, **MAMBA, "mamba_d_ssm": 48, "head_dim": 6},
    "Bamba": {**ATTENTION, **MAMBA, "attn_layer_indices": [1]},
    "GraniteMoeHybrid": {
        **ATTENTION,
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 20,
    },
}


def make(family: str) -> PreTrainedModel:
    config = getattr(transformers, f"{family}Config")(**SIZES, **MODELS[family])
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model: PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config)
    return model.eval()


# Their fused kernels read the output projection.
@pytest.mark.filterwarnings("ignore:Left dense")
@pytest.mark.parametrize("family", MODELS)
def test_infinity_in_the_configuration_is_read_and_written_again(family: str, tmp_path: Path) -> None:
    make(family).save_pretrained(tmp_path / "dense")
    assert '"__float__": "Infinity"' in (tmp_path / "dense" / "config.json").read_text()
    config = tn.CompressionConfig(param_ratio=0.5)
    th.compress_checkpoint(tmp_path / "dense", tmp_path / "ours", config)
    loaded, reference = th.load(tmp_path / "ours").eval(), th.load(tmp_path / "dense")
    tn.compress(reference, config, progress=False)
    assert loaded.config.to_dict().keys() >= reference.config.to_dict().keys()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, reference.eval()(ids).logits)

"""Plans for the target of an export: its formats, its bytes, and one format for layers that it fuses."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tensornet as tn
from tensornet.calibration import sampled_losses
from tensornet.compression import survey_from_stats
from tensornet.errors import FormatError
from tensornet.quantization import NumberFormat
from tensornet.quantization.codebooks import CODEBOOKS
from tensornet.quantization.menus import MENUS, bytes_for
from tensornet_hf.exporters.target import EXPORT_TARGETS


def llama(hidden: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=hidden, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def stats_of(model: LlamaForCausalLM) -> tn.CalibrationStats:
    batches = torch.randint(3, 96, (4, 8, 32), generator=torch.Generator().manual_seed(1))
    return tn.calibrate(model, list(batches), loss_fn=sampled_losses)


@pytest.mark.parametrize("target", EXPORT_TARGETS)
def test_plan_takes_only_what_the_target_stores(target: str) -> None:
    model = llama()
    config = tn.CompressionConfig(bits_per_weight=5, formats=target, method="nearest")
    plan = survey_from_stats(model, config, stats_of(model)).plan()
    assert ("model.embed_tokens" in [layer.name for layer in plan]) == (target in ("gguf", "mlx"))
    for layer in plan:
        assert layer.topology is None or layer.topology.family == "dense"
        assert layer.storage.number_format.name in MENUS[target].formats
    assert len({layer.storage.number_format for layer in plan}) > 1
    assert 4.5 < 8 * plan.bytes_after / plan.params_before <= 5


def test_fused_layers_share_a_format_and_cost_no_less() -> None:
    model = llama()
    stats, size = stats_of(model), {"bits_per_weight": 4.6}
    config = tn.CompressionConfig(formats="compressed-tensors", method="nearest", **size)  # type: ignore[arg-type]
    names = MENUS["compressed-tensors"].formats
    free = tn.CompressionConfig(
        formats=names, topology="low_rank", topology_options={"max_bond": 1}, method="nearest", **size
    )
    plan, other = (survey_from_stats(model, x, stats).plan() for x in (config, free))
    formats = {layer.name: layer.storage.number_format for layer in plan}
    for block in ("model.layers.0", "model.layers.1"):
        assert len({formats[f"{block}.self_attn.{x}_proj"] for x in "qkv"}) == 1
        assert len({formats[f"{block}.mlp.{x}_proj"] for x in ("gate", "up")}) == 1
    assert 8 * plan.bytes_after / plan.params_before <= 4.6
    assert other.predicted_loss_increase is not None
    assert plan.predicted_loss_increase is not None
    assert other.predicted_loss_increase <= plan.predicted_loss_increase * (1 + 1e-9)


def test_rows_that_groups_do_not_divide_stay_as_they_are() -> None:
    model = llama(hidden=48)
    plan = tn.plan(model, tn.CompressionConfig(bits_per_weight=28, formats="gguf"), stats_of(model))
    for layer in plan:
        if layer.shape[1] == 48:
            assert layer.storage.number_format.name == "float"
        else:
            assert layer.storage.number_format.is_integer


def test_menus_have_no_networks() -> None:
    with pytest.raises(FormatError, match="networks"):
        tn.CompressionConfig(bits_per_weight=5, formats="gguf", topology="low_rank")
    with pytest.raises(FormatError, match="compressed-tensors"):
        tn.CompressionConfig(bits_per_weight=5, formats="onnx")
    assert tn.CompressionConfig(bits_per_weight=5, formats=("gguf",)).menu == "gguf"


def test_formats_after_a_menu_are_the_only_ones_of_it() -> None:
    model = llama()
    chosen = ("gguf", "int8:g32:float16", "int4:g32:float16", "int6:g16:s8")
    config = tn.CompressionConfig(bits_per_weight=6, formats=chosen)
    assert (config.menu, len(config.number_formats), config.families) == ("gguf", 3, ())
    plan = survey_from_stats(model, config, stats_of(model)).plan()
    names = {layer.storage.number_format.name for layer in plan}
    assert names == {"int8:g32:float16", "int4:g32:float16"}  # no rows are divisible by 256, as Q6_K needs
    assert {layer.target for layer in plan} == {"gguf"}
    assert tn.CompressionConfig.from_dict(config.to_dict()) == config
    for wrong in (5, [["int4"]], ()):
        with pytest.raises(FormatError, match="format"):
            tn.CompressionConfig(bits_per_weight=6, formats=wrong)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"'gguf'.*int7"):
        tn.CompressionConfig(bits_per_weight=6, formats=("gguf", "int7"))


def test_the_fast_menu_has_no_slow_types() -> None:
    model = llama()
    stats = stats_of(model)
    slow, fast = (
        {x.storage.number_format.name for x in survey_from_stats(model, config, stats).plan()}
        for config in (tn.CompressionConfig(bits_per_weight=6, formats=x) for x in ("gguf", "gguf-fast"))
    )
    assert any(name.startswith(("int5", "nl4")) for name in slow)
    assert fast == {"int8:g32:float16", "int4:g32:float16"}  # no rows are divisible by 256, as Q6_K needs


@pytest.mark.parametrize("target", ["gguf", "compressed-tensors"])
def test_formats_on_request_are_planned_only_if_they_are_named(target: str) -> None:
    usual = tn.CompressionConfig(bits_per_weight=5, formats=target).number_formats
    assert not {x.name for x in usual} & {"mxfp4", "nvfp4"}
    config = tn.CompressionConfig(bits_per_weight=4.4, formats=(target, "mxfp4", "nvfp4"))
    model = llama()
    plan = survey_from_stats(model, config, stats_of(model)).plan()
    assert {x.storage.number_format.name for x in plan} == {"mxfp4", "nvfp4"}
    with pytest.raises(FormatError, match="nvfp4"):
        tn.CompressionConfig(bits_per_weight=5, formats=("mlx", "nvfp4"))


def test_codebooks_where_rows_fit_them() -> None:
    """Plans of few bits use them."""
    model = llama(hidden=256)
    stats = stats_of(model)
    config = tn.CompressionConfig(bits_per_weight=3, formats="gguf", method="gptq")
    plan = survey_from_stats(model, config, stats).plan()
    formats = {layer.name: layer.storage.number_format for layer in plan}
    assert any(x.is_integer and x.points.run > 1 for x in formats.values())
    assert all(
        not x.is_integer or x.points.run == 1 for name, x in formats.items() if "down_proj" in name
    )  # rows of 128
    size = sum(bytes_for("gguf", formats[x.name], x.shape, torch.float32) for x in plan)
    assert size == plan.bytes_after
    assert not set(CODEBOOKS) & set(MENUS["gguf-fast"].formats)


def test_bytes_are_those_of_the_file() -> None:
    shape, int2 = (128, 512), NumberFormat.parse("int2:g16:s4:min")
    assert 8 * bytes_for("gguf", int2, shape, torch.float32) == 2.625 * 128 * 512  # of Q2_K
    assert 8 * bytes_for("gguf", NumberFormat.parse("iq2_xs"), shape, torch.float32) == 2.3125 * 128 * 512
    # MLX has a scale and a bias in the model's dtype for each group.
    assert bytes_for("mlx", NumberFormat.parse("int4"), shape, torch.bfloat16) == 128 * (256 + 8 * 4)
    for target in (None, *EXPORT_TARGETS):
        assert bytes_for(target, NumberFormat(), shape, torch.bfloat16) == 2 * 128 * 512

"""Recipes for llama-quantize: llama.cpp writes the planned types, sizes and errors."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import BudgetError, FormatError, TargetError
from tensornet_hf.compress import OptionError
from tensornet_hf.embedded import calibration_text, gpt2_path
from tensornet_hf.imatrix import Importance, read_imatrix, write_imatrix
from tensornet_hf.recipes import IMATRIX_METADATA, TYPES, Recipe, plan_recipe

pytestmark = pytest.mark.slow  # needs the extra `gguf`

SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 64}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_embd=256, n_layer=2, n_head=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True)),
}
#: Types that are rounded quickly.
QUICK = ("q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "iq4_nl")


def folder_of(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model: PreTrainedModel = MODELS[name]()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gpt2_path()).save_pretrained(folder)
    return folder


def options(folder: Path, **more: Any) -> dict[str, Any]:
    text = folder / "text.txt"
    text.write_text(calibration_text()[:20_000])
    return {"calibration": text, "calibration_tokens": 1024, **more}


def carried_out(recipe: Recipe, folder: Path) -> tuple[Path, Path]:
    """Files before and after llama.cpp has quantized the model as the recipe's command says."""
    from tests.hf.export.llama_cpp import quantize

    dense, small = folder / "dense.gguf", folder / "small.gguf"
    th.export(folder, dense)
    words = shlex.split(recipe.command())
    chosen = {words[k]: words[k + 1] for k, word in enumerate(words) if word.endswith("-type")}
    quantize(dense, small, recipe.text, chosen, recipe.importance)
    return dense, small


def values(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    import gguf

    tensors = gguf.GGUFReader(file).tensors
    return {
        x.name: gguf.quants.dequantize(x.data, x.tensor_type).reshape([*map(int, x.shape[::-1])])
        for x in tensors
    }


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_writes_the_planned_types_and_bytes(name: str, tmp_path: Path) -> None:
    import gguf

    folder = folder_of(name, tmp_path / "model")
    config: dict[str, Any] = {"bits_per_weight": 6}
    recipe = plan_recipe(folder, **config, **options(folder), formats=QUICK)
    assert len(set(recipe.types.values())) > 1
    _, small = carried_out(recipe, folder)
    types = {x.name: x.tensor_type.name for x in gguf.GGUFReader(small).tensors}
    assert {tensor: kind for tensor, kind in types.items() if kind != "F32"} == dict(recipe.types)
    assert small.stat().st_size == recipe.num_bytes - IMATRIX_METADATA
    tied = name in ("tied", "gpt2")
    assert ("output.weight" in recipe.types) != tied
    assert ("output.weight" in recipe.importance) != tied
    if name == "qwen3_moe":
        assert recipe.importance["blk.0.ffn_gate_exps.weight"].squares.shape == (4, 256)
        assert recipe.types.keys() >= {f"blk.1.ffn_{x}_exps.weight" for x in ("gate", "up", "down")}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_losses_are_the_errors_of_llama_cpp(name: str, tmp_path: Path) -> None:
    """From an importance matrix alone, the predicted loss is the relative error of each layer's outputs."""
    folder = folder_of(name, tmp_path / "model")
    observed = plan_recipe(folder, bits_per_weight=9, **options(folder), formats=["q8_0"])
    known = {x: y for x, y in observed.importance.items() if x != "output.weight"}  # as llama-imatrix does
    write_imatrix(tmp_path / "im.dat", known, source="text.txt")
    config: dict[str, Any] = {"bits_per_weight": 5}
    recipe = plan_recipe(folder, **config, imatrix=tmp_path / "im.dat", formats=QUICK)
    assert any("gradients" in note for note in recipe.notes)
    before, after = map(values, carried_out(recipe, folder))
    expected = 0.0
    for tensor in recipe.types:
        exact, error = (x.astype(np.float64) for x in (before[tensor], before[tensor] - after[tensor]))
        exact, error = (x.reshape(-1, *x.shape[-2:]) for x in (exact, error))
        shape = (len(exact), 1, exact.shape[-1])
        weights = known[tensor].squares.double().numpy().reshape(shape) if tensor in known else np.ones(1)
        relative = (error**2 * weights).sum((1, 2)) / (exact**2 * weights).sum((1, 2))
        half = tensor.endswith(("gate_exps.weight", "up_exps.weight"))  # one layer of the model
        expected += float(relative.sum()) * (0.5 if half else 1.0)
    assert recipe.predicted == pytest.approx(expected, rel=0.02)  # of a sample of rows


def test_an_importance_matrix_replaces_the_moments_of_inputs(tmp_path: Path) -> None:
    """With the mean squares that the text itself has, almost the same plan; with others, another one."""
    folder = folder_of("llama", tmp_path / "model")
    config: dict[str, Any] = {"bits_per_weight": 5}
    from_text = plan_recipe(folder, **config, **options(folder), formats=QUICK)
    write_imatrix(tmp_path / "im.gguf", from_text.importance, source="text.txt")
    same = plan_recipe(folder, **config, **options(folder), imatrix=tmp_path / "im.gguf", formats=QUICK)
    assert same.predicted == pytest.approx(from_text.predicted, rel=0.3)  # only diagonals
    doubled = {x: Importance(2 * y.squares, y.counts) for x, y in from_text.importance.items()}
    write_imatrix(tmp_path / "twice.gguf", doubled, source="text.txt")
    twice = plan_recipe(folder, **config, **options(folder), imatrix=tmp_path / "twice.gguf", formats=QUICK)
    change = {x: (same.types[x], twice.types[x]) for x in same.types if same.types[x] != twice.types[x]}
    assert twice.predicted > 1.5 * same.predicted, change
    assert read_imatrix(tmp_path / "im.gguf").keys() == same.importance.keys()


def test_survey_in_a_file_is_for_recipes_only(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    kept = options(folder, survey=tmp_path / "survey")
    first = plan_recipe(folder, bits_per_weight=5, **kept)
    again = plan_recipe(folder, bits_per_weight=5, **kept)
    assert first == again
    assert first.importance.keys() == again.importance.keys()
    assert plan_recipe(folder, bits_per_weight=4, **kept).predicted > first.predicted
    with pytest.raises(BudgetError, match="formats='llama-quantize'"):
        th.compress_folder(
            folder, tmp_path / "out", tn.CompressionConfig(max_bytes=10**6), th.CompressOptions(**kept)
        )
    with pytest.raises(FormatError, match=r"llama-quantize.*recipe"):
        th.compress_folder(
            folder,
            tmp_path / "out",
            tn.CompressionConfig(bits_per_weight=5, formats="llama-quantize"),
            th.CompressOptions(**options(folder)),
        )
    write_imatrix(tmp_path / "im.gguf", first.importance, source="text.txt")
    with pytest.raises(BudgetError, match="another importance matrix"):
        plan_recipe(folder, bits_per_weight=5, **kept, imatrix=tmp_path / "im.gguf")


def test_importance_matrices_of_other_models(tmp_path: Path) -> None:
    folder = folder_of("qwen3_moe", tmp_path / "model")
    config, file = {"bits_per_weight": 5}, tmp_path / "im.gguf"
    good = plan_recipe(folder, **config, **options(folder), formats=["q8_0", "q4_0"]).importance
    stack = "blk.0.ffn_up_exps.weight"
    dead = good[stack].counts.clone()
    dead[2] = 0
    wrong = {
        "belongs to another model.*names 'blk.7": {"blk.7.attn_q.weight": good["blk.0.attn_q.weight"]},
        "no entry for 'blk.1.attn_k.weight'": {x: y for x, y in good.items() if x != "blk.1.attn_k.weight"},
        f"another model: '{stack}' has 12": {**good, stack: Importance(torch.rand(4, 32), dead)},
        f"no tokens reached expert 2 of '{stack}'": {**good, stack: good[stack]._replace(counts=dead)},
    }
    for message, entries in wrong.items():
        write_imatrix(file, entries, source="text.txt")
        with pytest.raises(TargetError, match=message):
            plan_recipe(folder, **config, imatrix=file)


def test_types_and_options_that_do_not_fit(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    config: dict[str, Any] = {"bits_per_weight": 5}
    with pytest.raises(FormatError, match="no type q9_0; choose from iq2_xxs"):
        plan_recipe(folder, **config, **options(folder), formats=["q9_0"])
    with pytest.raises(FormatError, match=r"q4_k, q6_k fits the rows of 'blk\.0\.ffn_down\.weight'.*q4_0"):
        plan_recipe(folder, **config, **options(folder), formats=["q4_k", "q6_k"])
    with pytest.raises(OptionError, match="needs to know"):
        plan_recipe(folder, **config)
    with pytest.raises(OptionError, match="one budget"):
        plan_recipe(folder, bits_per_weight=5, max_bytes=10**6, **options(folder))
    with pytest.raises(BudgetError, match="vocabulary"):
        plan_recipe(folder, max_bytes=1000, **options(folder), formats=["q8_0"])


def test_layers_that_are_not_chosen_keep_sixteen_bits(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "model")
    config: dict[str, Any] = {"bits_per_weight": 5, "exclude_modules": "*.q_proj"}
    recipe = plan_recipe(folder, **config, **options(folder), formats=QUICK)
    assert {recipe.types[f"blk.{k}.attn_q.weight"] for k in range(2)} == {"BF16"}
    _, small = carried_out(recipe, folder)
    assert small.stat().st_size == recipe.num_bytes - IMATRIX_METADATA


def test_the_text_of_a_recipe() -> None:
    import gguf

    names = ("token_embd.weight", "blk.0.attn_q.weight", "blk.10.ffn_up_exps.weight")
    recipe = Recipe(dict.fromkeys(names, "Q5_K"), dict.fromkeys(names, 1), 0, 0.0, "nats")
    assert recipe.text == "^blk\\.0\\.attn_q\\.weight$=q5_k\n^blk\\.10\\.ffn_up_exps\\.weight$=q5_k"
    assert recipe.command().split()[-7:-3] == [
        "--token-embedding-type", "q5_k", "--output-tensor-type", "q5_k"
    ]  # fmt: skip
    with pytest.raises(TargetError, match="lower case"):
        _ = Recipe({"blk.0.A.weight": "Q5_K"}, {}, 0, 0.0, "nats").text
    assert set(TYPES) <= set(gguf.GGMLQuantizationType.__members__)

"""The embedded models load offline, do what their records say, and stay small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from tensornet_hf import embedded

SLACK = 1.05  # torch versions and processors move a perplexity in its last digits, not by 5 %
FOLDERS = [embedded.gpt2_path(), embedded.t5_path()]


def record(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def gpt2() -> tuple[Model, Tokenizer]:
    folder = embedded.gpt2_path()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def t5() -> tuple[Model, Tokenizer]:
    folder = embedded.t5_path()
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def restore(t5: tuple[Model, Tokenizer], sources: list[str], shuffle: bool = False) -> list[str]:
    """Greedy restorations; ``shuffle`` gives every phrase the encoder input of its neighbour."""
    model, tokenizer = t5
    inputs = tokenizer(sources, padding=True, return_tensors="pt")
    ids, mask = inputs.input_ids, inputs.attention_mask
    if shuffle:
        ids, mask = ids.roll(1, dims=0), mask.roll(1, dims=0)
    return tokenizer.batch_decode(
        model.generate(input_ids=ids, attention_mask=mask), skip_special_tokens=True
    )


def exact(guesses: list[str], targets: list[str]) -> float:
    return sum(g == t for g, t in zip(guesses, targets, strict=True)) / len(targets)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folder_is_small_float32_and_recorded(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000_000
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        loaded = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in loaded.values())
    facts = record(folder)
    assert sum(tensor.numel() for tensor in loaded.values()) == facts["parameters"]
    assert {"seed", "steps"} <= facts["recipe"].keys()
    assert len(facts["text_sha256"]) == 64
    assert facts["loss_curve"][-1] == facts["final_loss"] < facts["loss_curve"][0]


def test_texts_have_the_promised_sizes_and_do_not_meet() -> None:
    calibration, heldout = embedded.calibration_text(), embedded.heldout_text()
    assert 150_000 < len(calibration) < 250_000
    assert 80_000 < len(heldout) < 120_000
    assert not set(calibration.split("\n\n")[:-1]) & set(heldout.split("\n\n")[:-1])


def test_gpt2_head_is_tied(gpt2: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = gpt2
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(tokenizer) == model.config.vocab_size == 1024


@pytest.mark.slow
@torch.no_grad()
def test_gpt2_heldout_perplexity(gpt2: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = gpt2
    ids = tokenizer(embedded.heldout_text(), return_tensors="pt", verbose=False).input_ids[0]
    facts = record(embedded.gpt2_path())
    assert len(ids) == facts["heldout_tokens"]
    windows = ids[: len(ids) // 128 * 128].view(-1, 128)
    # From the logits, not from the model's own loss: the record was made with that.
    losses = [
        functional.cross_entropy(model(rows).logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="sum")
        for rows in windows.split(32)
    ]
    found = math.exp(float(sum(losses)) / (windows.shape[0] * 127))
    assert facts["heldout_perplexity"] / SLACK < found < facts["heldout_perplexity"] * SLACK


@pytest.mark.slow
def test_t5_restores_heldout_vowels(t5: tuple[Model, Tokenizer]) -> None:
    sources, targets = (list(column) for column in zip(*embedded.t5_pairs("heldout"), strict=True))
    facts = record(embedded.t5_path())["heldout"]
    guesses = restore(t5, sources)
    assert exact(guesses, targets) > facts["exact_match"] / SLACK
    hits = [
        sum(a == b for a, b in zip(guess, target, strict=False)) / max(len(guess), len(target))
        for guess, target in zip(guesses, targets, strict=True)
    ]
    assert sum(hits) / len(hits) > facts["character_accuracy"] / SLACK
    # Without the right encoder input nothing is left: the answer comes through the cross-attention.
    assert exact(restore(t5, sources, shuffle=True), targets) < 0.05


@pytest.mark.parametrize("split", ["calibration", "heldout"])
def test_t5_pairs_are_distinct_and_readable(split: str, t5: tuple[Model, Tokenizer]) -> None:
    pairs = embedded.t5_pairs(split)
    assert len(pairs) == len(set(pairs)) == 400
    tokenizer = t5[1]
    for source, target in pairs:
        words = target.split(" ")
        assert source == " ".join("".join(c for c in word if c not in "aeiou") or word for word in words)
        assert 1 <= len(words) <= 3
        assert tokenizer.unk_token_id not in tokenizer(target).input_ids


def test_t5_pairs_refuses_an_unknown_split() -> None:
    with pytest.raises(ValueError, match="'train'"):
        embedded.t5_pairs("train")  # type: ignore[arg-type]


def test_missing_data_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "files", lambda _: tmp_path)
    with pytest.raises(FileNotFoundError, match="'gpt2' is missing"):
        embedded.gpt2_path()

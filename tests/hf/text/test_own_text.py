"""Text that a model writes itself for its calibration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from tensornet.errors import TargetError
from tensornet_hf.embedded import gpt2_path, heldout_text, t5_path
from tensornet_hf.text import load_tokenizer, own_text, token_ids

RUN = "from tensornet._entry import main; raise SystemExit(main())"
TEMPLATE = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return AutoModelForCausalLM.from_pretrained(gpt2_path()).eval()


def test_own_text_is_as_likely_as_text_and_the_same_for_a_seed(model: GPT2LMHeadModel) -> None:
    tokenizer = load_tokenizer(gpt2_path())
    state = torch.random.get_rng_state()
    text = own_text(model, tokenizer, tokens=1500)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert text == own_text(model, tokenizer, tokens=1500)
    assert text != own_text(model, tokenizer, tokens=1500, seed=1)

    def loss(text: str) -> float:
        windows = token_ids(tokenizer, text)[: 10 * 128].reshape(10, 128)
        with torch.no_grad():
            return float(model(input_ids=windows, labels=windows).loss)

    assert loss(text) < loss(heldout_text()) + 0.7
    assert len(token_ids(tokenizer, text)) > 1200


def test_half_of_the_texts_begin_as_a_chat(model: GPT2LMHeadModel) -> None:
    tokenizer = load_tokenizer(gpt2_path())
    tokenizer.chat_template = TEMPLATE
    text = own_text(model, tokenizer, tokens=1500)
    assert 1 <= text.count("[user] ") <= 12 or 1 <= text.count("user]") <= 12


def test_garbage_is_refused_with_its_figures(model: GPT2LMHeadModel) -> None:
    tokenizer = load_tokenizer(gpt2_path())
    with pytest.raises(TargetError, match=r"nats a token \(random tokens: 6\.93\)"):
        own_text(GPT2LMHeadModel(model.config).eval(), tokenizer, tokens=500)
    loops = AutoModelForCausalLM.from_pretrained(gpt2_path()).eval()
    with torch.no_grad():  # logits so large that sampling becomes greedy, which repeats itself
        loops.transformer.ln_f.weight.mul_(0)
        loops.transformer.ln_f.bias.copy_(100 * loops.transformer.wte.weight[300])
    with pytest.raises(TargetError, match="distinct"):
        own_text(loops, tokenizer, tokens=500)


@pytest.mark.slow
def test_the_command_calibrates_on_own_text(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, "plan", str(gpt2_path()), "--bits", "4.25"]
    command += ["--calibration-tokens", "1000", "--json", "--calibration"]
    done = subprocess.run([*command, "own"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "text that the model wrote itself" in json.loads(done.stdout)["calibration"]
    missing = subprocess.run([*command, "absent.txt"], capture_output=True, text=True, cwd=tmp_path)
    assert missing.returncode != 0
    said = " ".join(missing.stderr.split())
    assert "absent.txt" in said
    assert "'own'" in said
    t5 = [str(t5_path()) if x == str(gpt2_path()) else x for x in command]
    other = subprocess.run([*t5, "own"], capture_output=True, text=True, cwd=tmp_path)
    assert other.returncode != 0
    assert "causal" in other.stderr

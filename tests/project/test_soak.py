"""Hundreds of models through one process: memory and open files stay where they are."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path

import psutil
import pytest
import torch
from folder_runs import compress_files
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

import tensornet as tn
import tensornet_hf as th

pytestmark = pytest.mark.slow

ROUNDS, WARM = 200, 80
#: Allocators keep some pages; 120 leaks of one of these models would be 17 MB.
GROWTH = 6 * 2**20


def test_compress_load_generate_unload(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=211, n_positions=16, n_embd=64, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    options = tn.CompressionConfig(topology="mpo", topology_options={"max_bond": 12})
    logging.disable_progress_bar()  # captured by pytest, they would be what grows
    prompt, process = torch.tensor([[5, 6, 7]]), psutil.Process()
    before = (0, 0)
    for number in range(ROUNDS):
        compress_files(tmp_path / "dense", tmp_path / "out", options)
        model = th.load(tmp_path / "out")
        made = model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert made.shape[1] <= 6
        unloaded = weakref.ref(model)
        del model
        assert unloaded() is None  # at once: nothing waits for the collector of cycles, which is never called
        shutil.rmtree(tmp_path / "out")
        if number in (WARM, ROUNDS - 1):
            now = (process.memory_info().rss, process.num_fds())
            if number == WARM:
                before = now
    logging.enable_progress_bar()
    assert now[1] == before[1]
    assert now[0] - before[0] < GROWTH, f"{(now[0] - before[0]) / 2**20:.1f} MB more"

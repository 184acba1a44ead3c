"""Loading a compressed model never builds what was compressed: measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tensornet.compression.apply import set_submodule
from tensornet.nn import build_module
from tensornet.topologies import topology_family
from tensornet_hf.quantizer import prepare_for_saving

MB = 2**20

MEASURE = """
import resource, sys, threading, time
import psutil, torch
import tensornet_hf as th
from tensornet_hf.quantizer import prepare_for_saving

torch.set_num_threads(1)
th.load(sys.argv[1] + "/tiny")  # what is imported late is imported before the count starts

def peak_of(action):
    process, done, seen = psutil.Process(), threading.Event(), [0]
    def watch():
        while not done.is_set():
            seen.append(max(seen.pop(), process.memory_info().rss))
            time.sleep(0.001)
    highest = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before, record = process.memory_info().rss, highest()
    watcher = threading.Thread(target=watch)
    watcher.start()
    result = action()
    done.set()
    watcher.join()
    return result, max(seen[0], highest() if highest() > record else 0) - before

def load():
    model = th.load(sys.argv[1] + "/big")
    for parameter in model.parameters():
        parameter.sum()  # files are mapped into memory: pages count once they are read
    return model

model, loading = peak_of(load)
_, decompressing = peak_of(lambda: th.decompress(model))
print(loading, decompressing)
"""


def make(layers: int, hidden: int) -> tuple[PreTrainedModel, int, int]:
    """A model as compressing would leave it, but with random cores, which need no decomposition.

    Returns:
        The model, and the bytes of the dense model and of its largest weight.
    """
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    sizes = [p.numel() * 4 for p in model.parameters()]
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            topology = topology_family("mpo").build(module.out_features, module.in_features, max_bond=64)
            spec = {"type": "linear", "source": "linear", "bias": False, "topology": topology.to_dict()}
            set_submodule(model, name, build_module(spec, device="meta"))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.tie_weights()
    prepare_for_saving(model)
    return model, sum(sizes), max(sizes)


@pytest.mark.slow
def test_peak_is_the_compressed_size_and_one_dense_tensor(tmp_path: Path) -> None:
    make(1, 64)[0].save_pretrained(tmp_path / "tiny")
    model, dense, largest = make(8, 1024)
    model.save_pretrained(tmp_path / "big")
    compressed = sum(p.numel() * 4 for p in model.parameters())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    loading, decompressing = map(int, done.stdout.split())
    limit = compressed + largest + 64 * MB
    assert 0.9 * compressed < loading <= limit
    # That the limit could be exceeded, and that the measurement would see it:
    assert dense > 500 * MB > 2 * limit
    assert decompressing > 0.8 * (dense - compressed)

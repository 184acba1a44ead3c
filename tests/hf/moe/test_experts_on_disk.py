"""Mixtures that stay on disk: the same text, little memory, and clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tensornet_hf as th
import tensornet_moe as tm
from tensornet.errors import TargetError
from tensornet_hf.cli.main import run
from tensornet_hf.embedded import gpt2_path

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip


def saved(folder: Path, **options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    th.upcycle(model, **{"share": "center", "experts": 5, "top_k": 2, "noise": 0.3, **options})
    th.save(model, folder)
    return model


@pytest.mark.parametrize("options", [{}, {"share": "none"}, {"share": "none", "pool": "all", "experts": 9}])
def test_a_mixture_on_disk_computes_the_same(options: dict[str, object], tmp_path: Path) -> None:
    model = saved(tmp_path / "mixture", **options)
    ids = torch.arange(10).reshape(2, 5)
    expected = model(ids).logits
    loaded = th.load(tmp_path / "mixture", experts_cache=50_000)
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    texts = [x.generate(ids, max_new_tokens=8, do_sample=False) for x in (model, loaded)]
    assert torch.equal(*texts)
    with pytest.raises(TargetError, match="saved"):
        loaded.save_pretrained(tmp_path / "again")


def test_only_private_tensors_are_mapped(tmp_path: Path) -> None:
    saved(tmp_path / "mixture", share="center")
    loaded = th.load(tmp_path / "mixture", experts_cache=0)
    private = {
        x.data_ptr()
        for layer in loaded.modules()
        if isinstance(layer, tm.SharedCoreMoE)
        for name in layer.experts.names
        for x in layer.experts.bank(name).bank.private_tensors()
    }
    before = {name: x.clone() for name, x in loaded.named_parameters() if x.data_ptr() not in private}
    assert len(private) == 3 * 3 * 2  # layers, matrices and private cores
    # Whatever is written to the file is seen by mapped tensors only.
    file = tmp_path / "mixture" / "model.safetensors"
    size, start = file.stat().st_size, 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(bytes(size - start))
    names = dict(loaded.named_parameters())
    assert all(torch.equal(names[name], x) for name, x in before.items())
    assert all(not names[name].any() for name in names.keys() - before.keys())


MEASURED = """
import sys, torch
import tensornet_hf as th


def anonymous():  # memory that the system cannot take back, unlike pages of mapped files
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


before = anonymous()
model = th.load(sys.argv[1], experts_cache=1_000_000)
model(torch.arange(3)[None])
if sys.argv[2] == "all":
    copies = [x.clone() for x in model.parameters()]
print(anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the memory statistics of Linux")
def test_experts_on_disk_take_no_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 256, "intermediate_size": 1024}))
    th.upcycle(model, share="none", experts=24, top_k=1)
    th.save(model, tmp_path / "mixture")
    size = (tmp_path / "mixture" / "model.safetensors").stat().st_size
    grown = []
    for how in ("all", "disk"):
        command = [sys.executable, "-c", MEASURED, str(tmp_path / "mixture"), how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown.append(int(done.stdout))
    assert grown[0] > 0.8 * size
    assert grown[1] < 0.4 * size


def test_the_command_and_its_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = th.load(gpt2_path())
    th.upcycle(model, share="none", experts=3, top_k=1)
    th.save(model, tmp_path / "mixture", source=gpt2_path())
    arguments = ["generate", str(tmp_path / "mixture"), "--prompt", "The", "--max-new-tokens", "5", "--json"]
    assert run(arguments) == 0
    expected = json.loads(capsys.readouterr().out)["text"]
    assert run([*arguments, "--experts-cache", "1MB"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected
    assert run([*arguments, "--experts-cache", "many"]) != 0
    assert "not a size" in capsys.readouterr().err
    assert run([*arguments, "--experts-cache", "1MB", "--device", "meta"]) != 0
    assert "--device" in capsys.readouterr().err
    assert run(["generate", str(gpt2_path()), "--prompt", "The", "--experts-cache", "1MB"]) != 0
    assert "nothing to cache" in capsys.readouterr().err
    for name, value in (("inference", True), ("dtype", torch.float16), ("device_map", "cpu")):
        with pytest.raises(ValueError, match=name):
            th.load(tmp_path / "mixture", experts_cache=10, **{name: value})

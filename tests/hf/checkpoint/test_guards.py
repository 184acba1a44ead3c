"""A compressed folder read by a process that does not know this library: refused, never random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folder_runs import compress_files
from hf_models import ALL
from mixture_models import mixture
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.embedded import gpt2_path

#: Tries to load each folder by each call; prints what came of it, a line each.
STRANGER = """
import sys, torch, transformers
assert not any(name.startswith("tensornet") for name in sys.modules)
for line in sys.argv[1:]:
    folder, name = line.rsplit(":", 1)
    try:
        if name == "pipeline":
            transformers.pipeline("text-generation", model=folder)
        else:
            getattr(transformers, name).from_pretrained(folder)
    except (RuntimeError, ValueError) as error:
        print("refused", "ignore_mismatched_sizes" in str(error) or str(error)[:200], line)
    else:
        print("LOADED", line)
"""


def strangers(*tries: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STRANGER, *tries], capture_output=True, text=True, timeout=1200
    )
    assert run.returncode == 0, run.stderr
    return [line for line in run.stdout.splitlines() if line.startswith(("refused", "LOADED"))]


@pytest.mark.slow
def test_every_class_is_refused_without_the_plugin(tmp_path: Path) -> None:
    tries = []
    for architecture in ALL:
        folder = tmp_path / architecture.name
        model = architecture.compressed
        model.save_pretrained(folder)
        tries += [f"{folder}:{type(model).__name__}", f"{folder}:AutoModel"]
    tries += [f"{tmp_path / 'gpt2'}:{name}" for name in ("AutoModelForCausalLM", "pipeline")]
    found = strangers(*tries)
    assert found == [f"refused True {line}" for line in tries]


@pytest.mark.slow
def test_other_ways_to_make_a_folder(tmp_path: Path) -> None:
    """File to file, by mixtures, by experts of a mixture, and saved again after loading."""
    dense = ALL[0].dense
    dense.save_pretrained(tmp_path / "dense")
    config = tn.CompressionConfig(param_ratio=0.5, method="svd")
    compress_files(tmp_path / "dense", tmp_path / "files", config)
    tn.compress(dense, config, progress=False)
    dense.save_pretrained(tmp_path / "memory")
    th.load(tmp_path / "memory").save_pretrained(tmp_path / "again")
    upcycled = ALL[0].dense
    th.upcycle(upcycled, experts=2)
    upcycled.save_pretrained(tmp_path / "upcycled")
    experts = mixture("mixtral")
    tn.compress(experts, config, progress=False)
    experts.save_pretrained(tmp_path / "experts")
    experts.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    names = ("files", "memory", "again", "upcycled", "experts", "parts")
    tries = [f"{tmp_path / name}:AutoModelForCausalLM" for name in names]
    assert strangers(*tries) == [f"refused True {line}" for line in tries]
    assert guards_of(tmp_path / "files") == guards_of(tmp_path / "memory") == guards_of(tmp_path / "again")
    for name in names:
        th.load(tmp_path / name)


def guards_of(folder: Path) -> dict[str, str]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        found |= {name: x.get_dtype() for name, x in parts.items() if x.get_shape() == [0]}
    return found


@pytest.mark.slow
def test_pipelines_work_after_the_import(tmp_path: Path) -> None:
    model, tokenizer = th.load(gpt2_path()), AutoTokenizer.from_pretrained(gpt2_path())
    tn.compress(model, tn.CompressionConfig(param_ratio=0.9, method="svd"), progress=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.arange(5)[None]
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model.eval()(ids).logits
    )
    assert pipeline("text-generation", model=str(tmp_path))("One", max_new_tokens=2)

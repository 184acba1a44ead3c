"""Low ranks added to integers leave as LoRA adapters: each tool loads them, and computes our logits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.compression.apply import decompress
from tensornet.errors import DestinationError, TargetError
from tensornet.io import ResumableFile
from tensornet.nn.linear import TensorNetworkLinear, linear_from_stored
from tensornet.nn.module import NetworkModule
from tensornet.nn.storage import PackedCore, Storage, encode
from tensornet.topologies import CoreSpec
from tensornet_hf.cli.main import run
from tensornet_hf.exporters.base import LowRank, split_weight
from tests.hf.export.test_gguf import model_of, tokenizer

pytestmark = [
    pytest.mark.slow,  # needs the extras `gguf`, `peft` and `export`
    pytest.mark.filterwarnings("ignore:.*a bound on the error"),
]

FOLDERS = ("compressed-tensors", "mlx")
#: Load a model and its adapter; save the logits of the model alone and with the adapter.
READERS = {
    "compressed-tensors": """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
for folder in sys.argv[1:]:
    how = CompressedTensorsConfig(dequantize=True)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=how).eval()
    model, ids = PeftModel.from_pretrained(base, folder + "/lora"), torch.arange(5, 17)[None]
    with torch.no_grad():
        found = model(ids).logits[0]
        with model.disable_adapter():
            torch.save([x.float() for x in (model(ids).logits[0], found)], folder + "/logits")
assert not any(name.startswith("tensornet") for name in sys.modules)
""",
    "mlx": """
import pathlib, sys
import mlx.core as mx, numpy, torch
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
for folder in sys.argv[1:]:
    model, ids = load_model(pathlib.Path(folder))[0], mx.arange(5, 17).reshape(1, 12)
    before = model(ids)
    load_adapters(model, folder + "/lora").eval()
    found = [numpy.array(x.astype(mx.float32))[0] for x in (before, model(ids))]
    torch.save([torch.from_numpy(x) for x in found], folder + "/logits")
""",
}


def residual_plan(model: PreTrainedModel, base: str, factors: str = "int8") -> tn.CompressionPlan:
    """Plan in which all layers become integers plus low ranks of 4, 8 and 12 by turns."""
    config = tn.CompressionConfig(
        topology_options={"max_bond": 4}, topology="low_rank", target_modules="all", method="svd"
    )
    plan = tn.plan(model, config)
    storage = Storage(number_format=factors, core_formats={"base": base})  # type: ignore[arg-type]
    for k, layer in enumerate(plan.layers):
        rows, columns = layer.shape
        topology = tn.topologies.residual(out_features=rows, in_features=columns, rank=4 + 4 * (k % 3))
        plan = plan.replace_layer(layer.name, topology, storage)
    return plan


def residual(
    name: str, base: str = "int3:g32:float16", factors: str = "int8", **more: Any
) -> PreTrainedModel:
    model = model_of(name, **more)
    tn.apply_plan(model, residual_plan(model, base, factors))
    return model.eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found = model(torch.arange(5, 17)[None])
    return found.last_hidden_state[0] if "Bert" in type(model).__name__ else found.logits[0]


def likeness(first: Tensor, second: Tensor) -> float:
    return float(torch.cosine_similarity(first.flatten(), second.flatten(), dim=0))


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Decoded tensors of a GGUF file."""
    import gguf

    return {
        x.name: torch.from_numpy(gguf.quants.dequantize(x.data, x.tensor_type).copy())
        for x in gguf.GGUFReader(path).tensors
    }


# llama has permuted rows, GPT-2 transposed weights, phi3 fused ones, GPT-NeoX rows sorted by head
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2", "gpt_neox", "mixtral", "bert"])
def test_llama_cpp_adds_the_adapter(name: str, tmp_path: Path) -> None:
    from tests.hf.export.llama_cpp import logits as computed

    model = residual(name)
    source = tokenizer(tmp_path / "words") if name == "bert" else None
    report = th.export(model, tmp_path / "model.gguf", networks="lora", source=source)
    adapter = tmp_path / "model-lora.gguf"
    assert (report.adapter, report.adapter_bytes) == (adapter, adapter.stat().st_size)
    assert report.num_bytes == (tmp_path / "model.gguf").stat().st_size
    assert set(report.ranks.values()) == {4, 8, 12}
    # The converter makes the file of the integers, and file plus adapter of the whole weight.
    th.export(th.decompress(residual(name)), tmp_path / "dense.gguf", source=source)
    integers = {
        layer: split[0].values
        for layer, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, NetworkModule) and not isinstance(split := split_weight(module), str)
    }
    th.export(decompress(residual(name), integers), tmp_path / "integers.gguf", source=source)
    base, low, dense, alone = (
        tensors_of(tmp_path / f"{x}.gguf") for x in ("model", "model-lora", "dense", "integers")
    )
    assert low.keys() == {f"{x}.lora_{y}" for x in report.ranks for y in "ab"}
    for key, weight in dense.items():
        if key in report.ranks:
            assert torch.equal(base[key], alone[key])
            product = low[f"{key}.lora_b"].double() @ low[f"{key}.lora_a"].double()
            torch.testing.assert_close(base[key] + product, weight.double(), rtol=0, atol=1e-6)
        else:
            assert torch.equal(base[key], weight)
    ids, ours = torch.arange(5, 17), logits(model)
    without, both = (computed(tmp_path / "model.gguf", ids, x) for x in (None, adapter))
    assert likeness(both, ours) > 0.998
    assert likeness(without, ours) < 0.99


@pytest.mark.parametrize("target", FOLDERS)
def test_the_foreign_package_adds_the_adapter(target: str, tmp_path: Path) -> None:
    expected, rounding = {}, {}
    half = ["qwen2", *(["gpt2"] if target == "mlx" else [])]
    for name, dtype in (("llama", torch.float32), *((x, torch.bfloat16) for x in half)):
        model = residual(name, base="int3:g32").to(dtype)
        folder = tmp_path / name
        report = th.export(model, folder, target=target, networks="lora")
        assert set(report.ranks.values()) == {4, 8, 12}
        assert report.adapter == folder / "lora"
        (file,) = (folder / "lora").glob("*.safetensors")
        assert report.adapter_bytes == file.stat().st_size
        assert report.num_bytes == (folder / "model.safetensors").stat().st_size
        ours = logits(model).double()
        expected[str(folder)] = logits(model.double())
        rounding[str(folder)] = (ours - expected[str(folder)]).abs().max()
    found = subprocess.run(
        [sys.executable, "-c", READERS[target], *expected], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    for folder_name, exact in expected.items():
        alone, both = torch.load(Path(folder_name) / "logits")
        assert (both - exact).abs().max() <= 5 * rounding[folder_name], folder_name
        assert likeness(alone.double(), exact) < 0.99


@pytest.mark.parametrize(
    ("factors", "dtype", "stored"),
    [
        ("int8", torch.bfloat16, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("float", torch.float32, torch.float32),
    ],
)
def test_factors_are_exact_in_the_adapter_of_peft(
    factors: str, dtype: torch.dtype, stored: torch.dtype, tmp_path: Path
) -> None:
    model = residual("llama", base="int3:g32", factors=factors).to(dtype)
    report = th.export(model, tmp_path / "out", target="compressed-tensors", networks="lora")
    state = load_file(tmp_path / "out" / "lora" / "adapter_model.safetensors")
    for name in report.ranks:
        layer = model.get_submodule(name)
        assert isinstance(layer, NetworkModule)
        for part, core in (("lora_A", 2), ("lora_B", 1)):
            found, factor = state[f"base_model.model.{name}.{part}.weight"], layer.stored_cores[core]
            assert found.dtype == stored
            exact = factor if isinstance(factor, Tensor) else factor(torch.float32)
            assert torch.equal(found.float(), exact.float().reshape(found.shape))
    settings = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == settings["alpha_pattern"] == report.ranks
    assert settings["r"] == settings["lora_alpha"] == 12


def test_factors_that_float16_lacks(tmp_path: Path) -> None:
    """Factors of a bfloat16 model that are too small or too large for float16 are stored in bfloat16."""
    model = residual("llama", base="int3:g32:float16", factors="float").to(torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, NetworkModule):
            _, left, right = layer.stored_cores
            left.data.mul_(2.0**20)  # the product of the factors stays the same
            right.data.mul_(2.0**-20)
    report = th.export(model, tmp_path / "model.gguf", networks="lora")
    assert "blk.1.ffn_down.weight" in report.ranks
    found = tensors_of(tmp_path / "model-lora.gguf")
    _, left, right = model.model.layers[1].mlp.down_proj.stored_cores
    for ending, factor in (("a", right), ("b", left)):
        stored = found[f"blk.1.ffn_down.weight.lora_{ending}"]
        assert torch.equal(stored, factor.detach().float().reshape(stored.shape))


def plus_mpo(rank: int) -> TensorNetworkLinear:
    """Layer of integers plus an MPO whose matrix has the given rank."""
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(64, rank, generator=generator) for _ in range(2)]
    legs = tn.topologies.mpo(out_dims=(8, 8), in_dims=(8, 8), max_bond=64)
    mpo = tn.topologies.topology_family("mpo").decompose_to(factors[0] @ factors[1].T, legs).network
    storage, whole = Storage(number_format="int4:g32"), tn.topologies.dense(out_features=64, in_features=64)  # type: ignore[arg-type]
    packed = encode(whole, storage, [torch.randn(64, 64, generator=generator)])["core_matrix"]
    base = CoreSpec("base", (*legs.out_labels, *legs.in_labels))
    topology = replace(
        legs, cores=(base, *legs.cores), terms=(("dense", ("base",)), ("mpo", legs.core_names))
    )
    packed = PackedCore(packed.number_format, (8, 8, 8, 8), 64, packed.tensors)
    formats = Storage(core_formats={"base": "int4:g32"})  # type: ignore[arg-type]
    cores = {
        f"core_{name}": core
        for name, core in zip(("base", *legs.core_names), (packed, *mpo.cores), strict=True)
    }
    return linear_from_stored(topology, cores, source="linear", storage=formats, like=torch.empty(0))


def test_another_network_becomes_its_exact_factors() -> None:
    layer = plus_mpo(3)
    integers, low_rank = split_weight(layer)
    assert isinstance(low_rank, LowRank)
    assert low_rank.rank == 3
    torch.testing.assert_close(integers.values + low_rank.left @ low_rank.right, layer.to_matrix())
    assert "rank 40, too high" in str(split_weight(plus_mpo(40)))


@pytest.mark.parametrize("target", ["gguf", *FOLDERS])
def test_what_no_adapter_can_hold_is_dense_for_a_reason(target: str, tmp_path: Path) -> None:
    model = residual("llama", base="int4:g32", tie_word_embeddings=True)
    first = model.model.layers[0].self_attn
    pure = tn.nn.MPOLinear(64, 64, max_bond=4, bias=False)
    pure.source = "linear"
    first.q_proj, first.o_proj = pure, plus_mpo(40)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    file = tmp_path / ("model.gguf" if target == "gguf" else "model")
    report = th.export(model, file, target=target, networks="lora")
    words = {"q_proj": "mpo", "o_proj": "too high", "lm_head": "tied", "model.embed_tokens": "embedding"}
    for ending, word in words.items():
        (why,) = (why for name, why in report.dense.items() if name.endswith(ending) and "1" not in name)
        assert word in why
    assert len(report.ranks) == 12
    assert "12 low ranks, 4 to 12" in str(report)
    assert str(report.adapter) in str(report)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    if target == "gguf":
        plain = th.export(model, tmp_path / "plain.gguf")
        assert plain.adapter is None
        assert sum("networks='lora'" in why for why in plain.dense.values()) == 12
    else:  # nothing would be packed
        with pytest.raises(TargetError, match="networks='lora'"):
            th.export(model, tmp_path / "refused", target=target)
    with pytest.raises(TargetError, match="networks"):
        th.export(model, tmp_path / f"refused{file.suffix}", target=target, networks="refuse")
    with pytest.raises(ValueError, match="loras"):
        th.export(model, tmp_path / f"refused{file.suffix}", target=target, networks="loras")  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*refused*"))


def test_two_files_are_one_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = residual("llama", base="int4:g32"), tmp_path / "model.gguf"
    adapter = tmp_path / "model-lora.gguf"
    # Neither file is left if writing the second one fails.
    written, write = [], ResumableFile.write

    def full(self: ResumableFile, name: str, chunks: Any) -> None:
        written.append(self.what)
        if self.what == "The model" and written.count("The model") == 2:
            raise DestinationError("No space left on device")
        write(self, name, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableFile, "write", full)
        with pytest.raises(DestinationError, match="No space"):
            th.export(model, file, networks="lora")
    assert {*written} == {"The adapter", "The model"}
    assert not list(tmp_path.iterdir())
    # An adapter that exists is kept, unless with force.
    adapter.write_text("mine")
    with pytest.raises(DestinationError, match="exists"):
        th.export(model, file, networks="lora")
    assert [x.name for x in tmp_path.iterdir()] == ["model-lora.gguf"]
    assert adapter.read_text() == "mine"
    report = th.export(model, file, networks="lora", force=True)
    assert report.adapter_bytes == adapter.stat().st_size > 4
    # Another file without low ranks replaces both.
    for changed, networks in ((model_of("llama"), "lora"), (model, "dense")):
        adapter.write_text("old")
        report = th.export(changed, file, networks=networks, force=True)
        assert (report.adapter, report.adapter_bytes) == (None, 0)
        assert {x.name for x in tmp_path.iterdir()} == {"model.gguf", "model.gguf.receipt.json"}
    # So an adapter that is alone is not given another model without force.
    file.rename(adapter)
    (tmp_path / "model.gguf.receipt.json").unlink()
    with pytest.raises(DestinationError, match=r"model-lora\.gguf exists"):
        th.export(model, file)
    assert [x.name for x in tmp_path.iterdir()] == ["model-lora.gguf"]


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    residual_plan(th.load(th.embedded.gpt2_path()), "int4:g32").save(tmp_path / "plan.json")

    def compressed(name: str, *more: str) -> int:
        arguments = ["compress", th.embedded.gpt2_path(), str(tmp_path / name)]
        return run([*map(str, arguments), "--plan", str(tmp_path / "plan.json"), *more])

    assert compressed("folder", "--networks", "lora") != 0
    assert "--networks" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()
    assert compressed("folder") == 0
    assert compressed("made.gguf", "--networks", "lora") == 0
    assert "made-lora.gguf" in capsys.readouterr().err
    assert compressed("made.gguf", "--networks", "lora") != 0
    # The export of the folder is the same.
    arguments = ["export", str(tmp_path / "folder"), str(tmp_path / "model.gguf"), "--networks", "lora"]
    assert run(arguments) == 0
    assert "LoRA adapter of" in capsys.readouterr().out
    assert (tmp_path / "model-lora.gguf").read_bytes() == (tmp_path / "made-lora.gguf").read_bytes()
    assert run([*arguments, "--force", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapter"] == str(tmp_path / "model-lora.gguf")
    assert found["adapter_bytes"] == (tmp_path / "model-lora.gguf").stat().st_size
    assert run(arguments) != 0
    assert "exists already" in capsys.readouterr().err

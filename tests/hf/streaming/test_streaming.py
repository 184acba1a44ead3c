"""Compressing a folder block by block gives the model that compressing it in memory gives, however it ran."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_runs import compress_files
from hf_models import ARCHITECTURES
from mixture_models import EXPERTS, FAMILIES, logits, mixture, tokens
from safetensors.torch import load_file, save_file
from sharded_folders import HALF, contents, save

import tensornet as tn
import tensornet_hf as th
from tensornet.compression import road
from tensornet.errors import FormatError, NonFiniteError, TargetError
from tensornet.io import read_header
from tensornet.nn.extension import ProvidedData
from tensornet_hf.file_sink import ERRORS
from tensornet_hf.lazy_model import open_model
from tensornet_hf.staging import staging_folder

EVERYTHING = tn.CompressionConfig(target_modules="all", topology="mpo", param_ratio=0.6)
LINEARS = tn.CompressionConfig(**HALF)
PACKED = tn.CompressionConfig(method="svd", **HALF)
INTEGERS = tn.CompressionConfig(bits_per_weight=5, formats=("int8", "int4"), method="nearest")
EXACT = tn.CompressionConfig(topology="mpo", method="svd")
WAYS = {"linears": LINEARS, "everything": EVERYTHING, "packed": PACKED, "integers": INTEGERS}
#: One expert of the first mixture, and no expert: the others leave their stacks as they are.
ONE = tn.CompressionConfig(target_modules=["re:.*layers.0.mlp.experts.1.*"], param_ratio=0.5, method="svd")
NONE = tn.CompressionConfig(target_modules=["q_proj"], param_ratio=0.5, method="svd")
SMALL = {"max_shard_bytes": 6_000}
MIXTURE = {"max_shard_bytes": 30_000}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def described(folder: Path) -> dict[str, Any]:
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {key: entry[key] for key in ("layers", "ties", "format_version")}


def same_folder(source: Path, config: tn.CompressionConfig, folder: Path) -> tuple[tn.CompressionReport, Any]:
    """Compress both ways and compare files, descriptions and reports; return the report and the model."""
    before = contents(source)
    report = compress_files(source, folder / "ours", config)
    assert contents(source) == before
    model = th.load(source)
    expected = tn.compress(model, config, progress=False)
    model.save_pretrained(folder / "reference")
    # One shard, so the file is the same to the byte: tensors, their order, dtypes and header.
    ours, reference = (folder / x / "model.safetensors" for x in ("ours", "reference"))
    assert ours.read_bytes() == reference.read_bytes()
    assert described(folder / "ours") == described(folder / "reference")
    assert [x.name for x in report.layers] == [x.name for x in expected.layers]
    for name in ("param_ratio", "model_params_before", "model_params_after", "model_bytes_after"):
        assert getattr(report, name) == getattr(expected, name)
    return report, model


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *(pytest.param("gpt2", x, id=f"gpt2-{y}") for y, x in WAYS.items()),
        pytest.param("t5_gated", EVERYTHING, id="t5_gated-everything"),
        *(
            pytest.param(name, x, id=f"{name}-{y}", marks=pytest.mark.slow)
            for name in ("llama", "t5_gated")
            for y, x in WAYS.items()
            if (name, y) != ("t5_gated", "everything")
        ),
    ],
)
def test_same_folder_as_compressing_the_model(
    name: str, config: tn.CompressionConfig, tmp_path: Path
) -> None:
    _, model = same_folder(save(name, tmp_path / "dense"), config, tmp_path)
    loaded, inputs = th.load(tmp_path / "ours").eval(), ARCHITECTURES[name].inputs()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save("llama", tmp_path / "dense", dtype=dtype)
    compress_files(source, tmp_path / "ours", LINEARS)
    assert {x.dtype for x in weights(tmp_path / "ours").values()} == {dtype}
    assert th.load(tmp_path / "ours").dtype == dtype


def test_shards_and_index(tmp_path: Path) -> None:
    source = save("gpt2", tmp_path / "dense")
    compress_files(source, tmp_path / "one", LINEARS)
    compress_files(source, tmp_path / "many", LINEARS, **SMALL)
    files = sorted(x.name for x in (tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"]) == set(one)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in one.values())
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)
    for name, file in index["weight_map"].items():
        assert name in read_header(tmp_path / "many" / file)
    assert th.load(tmp_path / "many").lm_head.weight.shape == (101, 24)


def test_everything_else_is_copied(tmp_path: Path) -> None:
    source = save("bert", tmp_path / "dense")
    (source / "README.md").write_text("# mine")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_bytes(b"dense weights in another form")
    (source / "onnx" / "notes.txt").write_text("kept")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("left")
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    compress_files(source, tmp_path / "ours", LINEARS)
    copied = contents(tmp_path / "ours")
    assert set(copied) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "onnx/notes.txt",
        "receipt.json",
        "tokenizer.json",
    }
    for name in ("README.md", "onnx/notes.txt", "tokenizer.json"):
        assert copied[name] == contents(source)[name]


def test_names_without_the_prefix_of_the_model(tmp_path: Path) -> None:
    """GPT-2 on the hub is stored without `transformer.` and with masks that are no parameters."""
    source = save("gpt2", tmp_path / "dense", shard="1GB")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(source / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"not copied.*h\.0\.attn\.bias"):
        compress_files(source, tmp_path / "ours", LINEARS)
    compress_files(save("gpt2", tmp_path / "full"), tmp_path / "reference", LINEARS)
    ours, reference = (tmp_path / x / "model.safetensors" for x in ("ours", "reference"))
    assert ours.read_bytes() == reference.read_bytes()


def test_a_given_plan_is_applied(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "dense")
    config = tn.CompressionConfig(target_modules="*.mlp.*", topology="mpo", topology_options={"max_bond": 4})
    plan = tn.plan(th.load(source), config)
    report = compress_files(source, tmp_path / "ours", plan)
    assert [(x.name, x.topology) for x in report.plan] == [(x.name, x.topology) for x in plan]
    other = tn.plan(ARCHITECTURES["gpt2"].dense, LINEARS)
    with pytest.raises(TargetError, match=r"h\.0\.attn\.c_attn"):
        compress_files(source, tmp_path / "other", other)


@pytest.mark.parametrize("config", [LINEARS, INTEGERS], ids=["networks", "integers"])
@pytest.mark.parametrize("how", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_same_bytes_from_workers(
    how: str, config: tn.CompressionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensornet.compression.tasks.PART_ROWS", 16)  # most matrices have several parts
    source = save("gpt2", tmp_path / "dense")
    compress_files(source, tmp_path / "one", config, **SMALL)
    if how == "processes":
        compress_files(source, tmp_path / "many", config, workers=2, **SMALL)
    else:
        with ThreadPoolExecutor(2) as executor:
            compress_files(source, tmp_path / "many", config, executor=executor, **SMALL)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


class Stop(Exception):
    """What a test raises where a run shall end."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Let a run end when some layers have been compressed; list those that were."""
    original = road.compress_alone

    def arm(count: int) -> list[str]:
        compressed: list[str] = []

        def compress(matrix: torch.Tensor, layer: Any, *rest: Any) -> Any:
            if len(compressed) == count:
                raise Stop
            compressed.append(layer.name)
            return original(matrix, layer, *rest)

        monkeypatch.setattr(road, "compress_alone", compress)
        return compressed

    return arm


@pytest.mark.parametrize(("count", "left"), [(0, 8), (4, 4), (5, 5), (7, 5)])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, stop_after: Callable[[int], list[str]], count: int, left: int
) -> None:
    """Of two blocks with four layers each, finished ones are not compressed again."""
    source, out = save("gpt2", tmp_path / "dense"), tmp_path / "out"
    compress_files(source, tmp_path / "expected", LINEARS, **SMALL)
    stop_after(count)
    with pytest.raises(Stop):
        compress_files(source, out, LINEARS, **SMALL)
    assert not out.exists()
    with pytest.raises(FormatError, match="other options"):
        compress_files(source, out, EVERYTHING, **SMALL)
    if count == 5:  # the last line on finished layers was cut short
        log = staging_folder(out) / ERRORS
        log.write_bytes(log.read_bytes()[:-5])
    if count == 7:  # a tensor that was damaged meanwhile is made again
        files = (staging_folder(out) / "out").glob("*.safetensors")
        found = next(
            x for file in files for name, x in read_header(file).items() if "h.0.mlp.c_fc.co" in name
        )
        damaged = bytearray(found.file.read_bytes())
        damaged[found.start] ^= 1
        found.file.write_bytes(damaged)
    again = stop_after(-1)
    compress_files(source, out, LINEARS, **SMALL)
    assert len(again) == left
    assert contents(out) == contents(tmp_path / "expected")
    assert not staging_folder(out).exists()


def test_a_source_that_changed_is_refused(tmp_path: Path, stop_after: Callable[[int], list[str]]) -> None:
    source, out = save("gpt2", tmp_path / "dense"), tmp_path / "out"
    stop_after(1)
    with pytest.raises(Stop):
        compress_files(source, out, LINEARS, **SMALL)
    (source / "tokenizer.json").write_text("{}")
    again = stop_after(-1)
    with pytest.raises(FormatError, match=r"tokenizer\.json.*changed"):
        compress_files(source, out, LINEARS, **SMALL)
    compress_files(source, out, LINEARS, resume=False, **SMALL)
    assert len(again) == 8


# --- mixtures of experts ---------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=["mixtral", *(pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES[1:])]
)
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "dense"
    mixture(request.param).save_pretrained(folder, max_shard_size="15KB")
    return folder


@pytest.mark.parametrize(
    "config", [EXACT, dataclasses.replace(PACKED, exclude_modules=["re:.*_expert_gate"])]
)
def test_same_folder_for_experts(experts: Path, config: tn.CompressionConfig, tmp_path: Path) -> None:
    if config.exclude_modules and not any("expert_gate" in name for name in weights(experts)):
        config = PACKED
    _, model = same_folder(experts, config, tmp_path)
    loaded = th.load(tmp_path / "ours")
    torch.testing.assert_close(logits(loaded), logits(model))
    if config is EXACT:
        torch.testing.assert_close(logits(loaded), logits(th.load(experts)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [ONE, NONE], ids=["one expert", "no expert"])
def test_experts_that_are_not_compressed_are_kept(
    experts: Path, config: tn.CompressionConfig, tmp_path: Path
) -> None:
    compress_files(experts, tmp_path / "ours", config, **MIXTURE)
    model = th.load(experts)
    tn.compress(model, config, progress=False)
    torch.testing.assert_close(logits(th.load(tmp_path / "ours")), logits(model))
    dense = [k for k in weights(tmp_path / "ours") if k.endswith(".matrix")]
    assert len(dense) == (2 * (EXPERTS - 1) if config is ONE else 0)


@pytest.mark.slow
def test_experts_are_mapped_and_calibrated_without_loading(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensornet.calibration.walk.has_bfloat16", lambda device: False)  # as in memory
    lazy = open_model(experts)
    with lazy.loaded(lazy.model.modules()):
        torch.testing.assert_close(logits(lazy.model), logits(th.load(experts)), rtol=1e-4, atol=1e-4)
    batches = [{"input_ids": tokens(2) + k, "labels": tokens(2) + k} for k in (0, -1)]
    for number, batch in enumerate(batches):  # each with padding of its own
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][number, 2 + number :] = 0
    config = tn.CompressionConfig(param_ratio=0.6)
    data = ProvidedData(batches, "made up")
    compress_files(experts, tmp_path / "ours", config, calibration=data, **MIXTURE)
    model = th.load(experts)
    tn.compress(model, config, calibration=data, progress=False)
    # Moments are summed in another order here and there, and singular values may be close to each other.
    torch.testing.assert_close(logits(th.load(tmp_path / "ours")), logits(model), rtol=1e-3, atol=1e-4)


W1 = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"


def drop_expert(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("w1", "w2", "w3"):
        del tensors[W1.format(2).replace("w1", name)]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (drop_expert, FormatError, r"3 experts in .*gate_up_proj"),
        (
            lambda x: x.update({W1.format(1): torch.ones(40, 24)}),
            FormatError,
            r"\[88, 24\].*\[84, 24\]",
        ),
        (lambda x: x[W1.format(1)].fill_(torch.inf), NonFiniteError, r"experts\.1\.gate_up_proj"),
    ],
)
def test_damaged_experts(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], error: type[Exception], match: str
) -> None:
    mixture("mixtral").save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=match):
        compress_files(tmp_path / "dense", tmp_path / "ours", tn.CompressionConfig(param_ratio=0.5))

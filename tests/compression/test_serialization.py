"""Models of plain PyTorch on disk: compressed layers, shared weights, and files of something else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tensornet as tn
from tensornet.errors import FormatError, TargetError


class Model(nn.Module):
    """An embedding tied to its head, a block that runs twice, a normalisation with buffers."""

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(40, width)
        self.first = nn.Linear(width, width)
        self.again = self.first
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(blocks))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, indices: Tensor) -> Tensor:
        x = self.again(self.first(self.table(indices)).relu())
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(self.norm(x))


INDICES = torch.arange(20)


def model(seed: int, **options: int) -> Model:
    torch.manual_seed(seed)
    return Model(**options).eval()


def compressed(**options: object) -> Model:
    made = model(0)
    made.norm.running_mean += 1.0  # type: ignore[operator]
    config = tn.CompressionConfig(method="svd", **options)  # type: ignore[arg-type]
    tn.compress(made, config, progress=False)
    return made


@pytest.mark.parametrize(
    "options",
    [
        {"param_ratio": 0.5},
        {"param_ratio": 0.5, "target_modules": "all"},
        {
            "topology": "mpo",
            "topology_options": {"sites": 3, "max_bond": 3},
            "target_modules": ["blocks.*", "table"],
        },
        {"param_ratio": 0.6, "topology": "tucker", "exclude_modules": ["first"]},
    ],
    ids=lambda options: str(options.get("topology", "auto")),
)
def test_round_trip(options: dict[str, object], tmp_path: Path) -> None:
    saved, path = compressed(**options), tmp_path / "model.safetensors"
    tn.save_model(saved, path)
    fresh = model(1)
    loaded = tn.load_model(fresh, path)
    assert loaded is fresh
    torch.testing.assert_close(loaded(INDICES), saved(INDICES), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in saved.state_dict().items())
    assert [type(m) for m in loaded.modules()] == [type(m) for m in saved.modules()]
    assert loaded.first is loaded.again
    both = (loaded.head, loaded.table)
    head, table = (list(getattr(x, "stored", {"weight": x.weight}).values()) for x in both)
    assert all(a is b for a, b in zip(head, table, strict=True))
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in saved.parameters())
    assert path.stat().st_size < 4 * sum(p.numel() for p in saved.state_dict().values()) + 20_000
    assert [x.name for x in tmp_path.iterdir()] == ["model.safetensors"]
    again = tn.load_model(copy.deepcopy(loaded), path)  # layers that are there already are filled
    torch.testing.assert_close(again(INDICES), loaded(INDICES))


def test_loaded_models_train_and_come_back_to_dense(tmp_path: Path) -> None:
    tn.save_model(compressed(param_ratio=0.5, target_modules="all"), tmp_path / "m")
    loaded = tn.load_model(model(1), tmp_path / "m")
    loaded(INDICES).square().mean().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    expected = loaded(INDICES)
    torch.testing.assert_close(tn.decompress(loaded)(INDICES), expected, rtol=1e-4, atol=1e-5)


def test_the_model_keeps_its_dtype(tmp_path: Path) -> None:
    tn.save_model(compressed(param_ratio=0.5), tmp_path / "m")
    loaded = tn.load_model(model(1).double(), tmp_path / "m")
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}


def test_tensors_that_overlap_in_memory(tmp_path: Path) -> None:
    saved = model(0)
    rows = torch.randn(17, 16)
    for block, part in zip(saved.blocks, (rows[:-1], rows[1:]), strict=True):
        block.weight = nn.Parameter(part)
    tn.save_model(saved, tmp_path / "m")
    torch.testing.assert_close(tn.load_model(model(1), tmp_path / "m")(INDICES), saved(INDICES))


def test_uncompressed_models_too(tmp_path: Path) -> None:
    tn.save_model(model(0), tmp_path / "m")
    torch.testing.assert_close(tn.load_model(model(1), tmp_path / "m")(INDICES), model(0)(INDICES))


def changed(name: str, value: object) -> nn.Module:
    other = model(1)
    setattr(other, name, value)
    return other


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model(1, width=24), r"'first' has shape \(24, 24\) in the model, \(16, 16\) in the file"),
        (lambda: model(1, blocks=1), r"Model has no module 'blocks.1'"),
        (lambda: model(1, blocks=3), r"it lacks blocks.2.weight"),
        (
            lambda: changed("first", nn.Embedding(16, 16)),
            r"is a Embedding in the model, .* of the kind 'linear'",
        ),
        (lambda: changed("more", nn.Parameter(torch.ones(2))), r"it lacks more"),
    ],
)
def test_another_model_is_refused_and_stays(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    tn.save_model(compressed(param_ratio=0.5), tmp_path / "m")
    other = make()
    state, modules = copy.deepcopy(other.state_dict()), [*other.modules()]
    with pytest.raises(FormatError, match=f"another model: .*{message}"):
        tn.load_model(other, tmp_path / "m")
    assert all(a is b for a, b in zip(other.modules(), modules, strict=True))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())


def test_files_of_something_else(tmp_path: Path) -> None:
    good = tmp_path / "good"
    tn.save_model(compressed(param_ratio=0.5), good)
    save_file({"x": torch.ones(2)}, tmp_path / "plain")
    save_file({"x": torch.ones(2)}, tmp_path / "later", metadata={"tensornet": json.dumps({"version": 99})})
    save_file({"x": torch.ones(2)}, tmp_path / "odd", metadata={"tensornet": "[1]"})
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-50])
    (tmp_path / "noise").write_bytes(b"\x00" * 100)
    for name, message in {
        "plain": "was not written by tensornet.save_model",
        "later": "version 99, this library reads version 1",
        "odd": "Cannot read a model",
        "cut": "Cannot read a model",
        "noise": "Cannot read a model",
        "absent": "Cannot read a model",
    }.items():
        with pytest.raises(FormatError, match=message):
            tn.load_model(model(1), tmp_path / name)


def test_models_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        empty = Model()
    with pytest.raises(TargetError, match=r"'table\.weight'"):
        tn.save_model(empty, tmp_path / "m")
    tn.save_model(compressed(param_ratio=0.5), tmp_path / "m")
    with pytest.raises(TargetError, match="meta device"):
        tn.load_model(empty, tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    with pytest.raises(OSError, match="cannot be written"):
        tn.save_model(model(0), tmp_path / "no" / "folder")
    assert (tmp_path / "m").read_bytes() == before
    assert [x.name for x in tmp_path.iterdir()] == ["m"]
    monkeypatch.setattr(Path, "replace", lambda self, target: target.missing())
    with pytest.raises(AttributeError, match="missing"):
        tn.save_model(model(0), tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before
    assert [x.name for x in tmp_path.iterdir()] == ["m"]

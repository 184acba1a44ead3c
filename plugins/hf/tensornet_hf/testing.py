"""Tests that every export target must pass; subclass `ExportLaws` in your tests.

    class TestMine(ExportLaws):
        target = "mine"

        def weights(self, destination):
            return read_as_the_other_program_does(destination)

The tests need pytest (extra `testing`).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import tensornet as tn
from tensornet._util import require
from tensornet.errors import DestinationError, TargetError
from tensornet.nn.extension import ProvidedData
from tensornet.nn.module import NetworkModule
from tensornet.quantization.menus import MENUS
from tensornet_hf.compress import CompressOptions, compress_folder, plan_folder
from tensornet_hf.exporters.target import EXPORT_TARGETS, export
from tensornet_hf.file_sink import FileSink

require(("pytest",), extra="testing", user="tensornet_hf.testing")

import pytest  # noqa: E402 - `require` must run first

_SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
}


class ExportLaws:
    """Laws that an export target must satisfy; set `target` to its registered name, and define `weights`."""

    target: str
    #: Name of the destination, with a suffix if the target writes a file.
    destination = "exported"
    #: Number formats in which the target can pack layers whose number of inputs is a multiple of 64.
    formats = ("int4:g32", "int8:g32")
    #: Layers to compress (see `tensornet.CompressionConfig`); None leaves embeddings and output heads dense.
    target_modules: str | None = None

    def weights(self, destination: Path) -> dict[str, Tensor]:
        """Read the matrices `(out, in)` of all layers that were written, by their names in the model."""
        raise NotImplementedError(f"{type(self).__name__} must define weights(destination).")

    def model(self) -> PreTrainedModel:
        """Build a dense model of a class that the target supports."""
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**_SIZES, num_attention_heads=2)).eval()

    def folder(self, model: PreTrainedModel, path: Path) -> Path:
        """Save the dense model, with a tokenizer if the target needs one."""
        model.save_pretrained(path)
        return path

    def test_weights(self, tmp_path: Path) -> None:
        """Check that the files have the model's weights, and that the export does not change the model."""
        model = self._mixed()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        export(model, tmp_path / self.destination, target=self.target)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], x) for name, x in after.items())
        found = self.weights(tmp_path / self.destination)
        for name, layer in _layers(model).items():
            matrix = layer.to_matrix().detach()
            error = (found[name].to(matrix) - matrix).abs().max() / matrix.abs().max()
            assert float(error) <= 1e-6, f"{name}: relative error {float(error):.3g}"

    def test_report(self, tmp_path: Path) -> None:
        """Check that the report states the size, and lists each layer once as packed or dense."""
        model = self._mixed()
        report = export(model, tmp_path / self.destination, target=self.target)
        assert report.packed, "no layer is packed"
        assert set(report.dense) <= set(_layers(model))
        assert len(report.packed) + len(report.dense) == len(_layers(model))
        assert all(report.dense.values()), "a layer is dense without a reason"
        path = tmp_path / self.destination
        files = [path] if path.is_file() else [x for x in path.rglob("*") if x.is_file()]
        assert report.destination == path
        assert 0 < report.num_bytes <= sum(x.stat().st_size for x in files)

    def test_existing_destination(self, tmp_path: Path) -> None:
        """Check that an existing destination is replaced only if `force` is set."""
        path, model = tmp_path / self.destination, self._mixed()
        export(model, path, target=self.target)
        before = _content(path)
        with pytest.raises(DestinationError):
            export(model, path, target=self.target)
        assert _content(path) == before
        export(model, path, target=self.target, force=True)
        assert _content(path).keys() == before.keys()

    def test_networks_are_refused(self, tmp_path: Path) -> None:
        """Check that `networks="refuse"` raises an error for a low-rank layer, and writes nothing."""
        with pytest.raises(TargetError):
            export(self._mixed(), tmp_path / self.destination, target=self.target, networks="refuse")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("bits", [4.6, 8.6])
    def test_planned_layers_are_packed(self, bits: float, tmp_path: Path) -> None:
        """Check that the target can pack all layers of a plan that was made for it."""
        model = self.model()
        assert self.target in MENUS, f"register the target {self.target!r} by register_target"
        _, dense = EXPORT_TARGETS[self.target].constraints(model, self.folder(model, tmp_path / "dense"))
        config = tn.CompressionConfig(
            bits_per_weight=bits,
            formats=self.target,
            target_modules=self.target_modules,
            exclude_modules=dense or None,
            method="nearest",
        )
        tn.compress(model, config, progress=False)
        report = export(model, tmp_path / self.destination, target=self.target)
        assert report.dense == {}
        assert len(report.packed) == len(_layers(model))

    @pytest.mark.parametrize("bits", [4.6, 8.6])
    def test_compressed_block_by_block(
        self, bits: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Check that a folder is compressed into this target, also after an interruption.

        The relative errors of the written weights must be those of the report.
        """
        model = self.model()
        source = self.folder(model, tmp_path / "dense")
        ids = torch.randint(_SIZES["vocab_size"], (4, 64), generator=torch.Generator().manual_seed(0))
        data = ProvidedData([{"input_ids": ids, "labels": ids}], "random tokens")
        config = tn.CompressionConfig(bits_per_weight=bits)
        options = CompressOptions(export=self.target, calibration=data, calibration_tokens=256)
        planned = plan_folder(source, config, options)
        (tmp_path / "whole").mkdir()
        path = tmp_path / "whole" / self.destination
        done = compress_folder(source, path, config, options)
        assert isinstance(done, tn.CompressionReport)
        assert [x.storage for x in done.plan] == [x.storage for x in planned]
        found, packed = self.weights(path), 0
        for layer in done.plan:
            before = model.get_submodule(layer.name).weight
            assert isinstance(before, Tensor)
            matrix = before.detach().double()
            error = float((found[layer.name].double() - matrix).norm() / matrix.norm())
            assert layer.error is not None
            assert abs(error - layer.error) <= 1e-3 * layer.error + 1e-6, layer.name
            packed += layer.topology is not None
        assert packed, "no layer is packed"

        # A run that is interrupted in its second block goes on there.
        put, calls = FileSink.put, []

        def stopping(self: FileSink, block: str, layers: Any) -> None:
            calls.append(block)
            if len(calls) == 2:
                raise KeyboardInterrupt
            put(self, block, layers)

        (tmp_path / "again").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(FileSink, "put", stopping)
            with pytest.raises(KeyboardInterrupt):
                compress_folder(source, tmp_path / "again" / self.destination, config, options)
        compress_folder(source, tmp_path / "again" / self.destination, config, options)
        assert _content(tmp_path / "again") == _content(tmp_path / "whole")

    def _mixed(self) -> PreTrainedModel:
        """Compress the second layer to a low rank, and the others to integers."""
        model = self.model()
        config = tn.CompressionConfig(
            topology="low_rank",
            topology_options={"max_bond": 4},
            method="svd",
            target_modules=self.target_modules,
        )
        plan = tn.plan(model, config)
        for number, layer in enumerate(plan):
            if number != 1:
                plan = plan.replace_layer(layer.name, None, self.formats[number % len(self.formats)])
        tn.apply_plan(model, plan)
        return model


def _layers(model: PreTrainedModel) -> dict[str, NetworkModule]:
    """Return the compressed layers by name; of layers that share their cores, only the first."""
    found: dict[tuple[int, ...], tuple[str, NetworkModule]] = {}
    for name, x in model.named_modules():
        if isinstance(x, NetworkModule):
            found.setdefault(tuple(map(id, x.stored.values())), (name, x))
    return dict(found.values())


def _content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [x for x in path.rglob("*") if x.is_file()]
    return {x.name: x.read_bytes() for x in files}

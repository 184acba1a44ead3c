"""Write the GGUF file of a compressed model tensor by tensor, as soon as the weights are known."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from tensornet.compression.plan import LayerPlan
from tensornet.errors import DestinationError
from tensornet.nn.module import NetworkModule
from tensornet_hf.exporters.gguf import GGUFLayout, adapter_file
from tensornet_hf.folder_writer import NewLayers, read_errors, record_error
from tensornet_hf.report import compact_bytes


class GGUFWriter:
    """Unfinished GGUF file, into which the tensors of the result are written.

    Args:
        work: staging folder, locked by this process.
        layout: layout of the file.
        key: text that identifies all that the content depends on.

    Raises:
        DestinationError: the disk has no room for the file.
        FormatError: the unfinished file is that of a run with another plan or other options.
    """

    def __init__(self, work: Path, layout: GGUFLayout, *, key: str) -> None:
        self.work, self.layout = work, layout
        #: Bytes of the file, vocabulary and metadata included.
        self.tensor_bytes = layout.nbytes
        out = work / "out"
        out.mkdir(exist_ok=True)
        path = out / "model.gguf"
        room = shutil.disk_usage(out).free + (path.stat().st_blocks * 512 if path.exists() else 0)
        if layout.nbytes > room:
            raise DestinationError(
                f"The file will have {compact_bytes(layout.nbytes)}, but the disk of {work.parent} has "
                f"{compact_bytes(room)} left. Free some space, or choose another destination."
            )
        self._file = layout.open(path, key=key)
        self._missing = set(self._file.missing())
        self._weights: dict[str, NetworkModule] = {}
        #: Relative errors of the finished layers.
        self.errors = read_errors(work)

    def has_all(self, layer: str) -> bool:
        """Return True if the tensors that need a layer have been written."""
        needing = {name for name, tensor in self.layout.tensors.items() if layer in tensor.layers}
        return layer in self.errors and self._missing.isdisjoint(needing)

    def finished(self, layer: LayerPlan) -> NewLayers | None:
        """Return None: layers are not read back from blocks of llama.cpp, but rounded again."""
        return None

    def put(self, block: str, layers: Mapping[str, NewLayers]) -> None:
        """Write all tensors whose new weights are known; those that were written before are skipped.

        Args:
            block: name of the block.
            layers: new modules and relative error of each layer, by name.

        Raises:
            DestinationError: the disk is full; finished tensors are kept.
            TargetError: a weight is not stored exactly by the type of its tensor.
        """
        for name, (modules, error) in layers.items():
            record_error(self.work, self.errors, name, error)
            self._weights[name] = _network(modules[0])
        self._write(self.layout.ready(self._weights))
        waiting = {x for name in self._missing for x in self.layout.tensors[name].layers}
        self._weights = {name: x for name, x in self._weights.items() if name in waiting}

    def _write(self, names: list[str]) -> None:
        for name in names:
            if name in self._missing and self.layout.tensors[name].layers:
                self.layout.write(self._file, name, self._weights)
                self._missing.discard(name)

    def finish(self) -> None:
        """Write the tensors that no layer changes.

        Raises:
            DestinationError: the disk is full; finished tensors are kept.
            ValueError: a layer has not been written.
        """
        for name in self._file.missing():
            self.layout.write(self._file, name, self._weights)

    def take_place(self, destination: Path, *, force: bool) -> None:
        """Rename the complete file to its final path.

        Raises:
            DestinationError: the file exists and `force` is not set, or it cannot be renamed.
        """
        self._file.finish(destination, force=force)
        if force:  # an adapter beside the replaced file was made for that file
            adapter_file(destination).unlink(missing_ok=True)


def _network(module: nn.Module) -> NetworkModule:
    assert isinstance(module, NetworkModule)
    return module

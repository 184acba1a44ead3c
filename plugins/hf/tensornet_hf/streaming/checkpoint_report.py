"""Report of the compression of a checkpoint: sizes, files, time and memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensornet.compression import CompressionReport


@dataclass(frozen=True)
class CheckpointReport:
    """Result of `compress_checkpoint`.

    Args:
        compression: layers, sizes and plan, as `tensornet.compress` reports them.
        files: SHA-256 of every file written, by name.
        left_out: stored tensors that the model does not have; loading a compressed model would refuse them.
        resumed: layers taken over from an interrupted run.
        workers: processes that computed, this one included where it did.
        largest_tensor: bytes of the largest tensor read.
        peak_memory: largest resident size of this process since it started, in bytes.
        worker_memory: the same of the largest worker; 0 where there was none.

    Example:
        >>> config = tn.CompressionConfig(topology="low_rank", param_ratio=0.5)
        >>> report = th.compress_checkpoint(th.embedded.gpt2_path(), "small", config)
        >>> report.param_ratio <= 0.5, sorted(report.files)[-1]
        (True, 'training.json')
    """

    compression: CompressionReport
    files: Mapping[str, str]
    left_out: tuple[str, ...]
    resumed: int
    workers: int
    largest_tensor: int
    peak_memory: int
    worker_memory: int

    @property
    def param_ratio(self) -> float:
        """Fraction of the parameters of the targeted weights that is kept."""
        return self.compression.param_ratio

    def __str__(self) -> str:
        lines = [str(self.compression)]
        if self.resumed:
            lines.append(
                f"resumed: {self.resumed} of {len(self.compression.layers)} layers were finished before"
            )
        if self.left_out:
            lines.append(f"left out, not part of the model: {', '.join(self.left_out)}")
        return "\n".join([*lines, self.memory])

    @property
    def memory(self) -> str:
        """Peak memory of the run, in a line."""
        largest = f"largest tensor {self.largest_tensor / 1e6:,.1f} MB"
        workers = f", {self.worker_memory / 1e6:,.0f} MB in the largest of {self.workers} workers"
        return (
            f"peak memory: {self.peak_memory / 1e6:,.0f} MB in this process"
            f"{workers if self.worker_memory else ''} ({largest})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return self.compression.to_dict() | {
            "files": dict(self.files),
            "left_out": list(self.left_out),
            "resumed": self.resumed,
            "workers": self.workers,
            "largest_tensor": self.largest_tensor,
            "peak_memory": self.peak_memory,
            "worker_memory": self.worker_memory,
        }

"""Second moments that calibration collects, and their file format."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from tensornet._util import html_table
from tensornet.errors import FormatError, TargetError
from tensornet.io import write_tensors
from tensornet.nn.targets import Target

STATS_VERSION = 1


@dataclass(frozen=True)
class CalibrationStats:
    """Second moments of inputs and output gradients of every layer: the curvature of the loss.

    A change `dW: (out, in)` of the weight of one layer increases the loss of a token by about `1/2 tr(R dW C
    dW^T)`, with `R` from `rows` and `C` from `columns` (the K-FAC approximation of the Fisher matrix), times
    its `coherence`. For a linear layer with inputs `x`, and gradients `g` of the summed loss with respect to
    its outputs, `C = E[x x^T]` and `R = E[g g^T]`. For an embedding `R` has the frequencies of its rows, and
    `C` is the gradient moment.

    Args:
        rows: by module name, shape `(out, out)`, or `(out,)` if only the diagonal is kept.
        columns: by module name, shape `(in, in)` or `(in,)`. Layers that read one input (q, k, v) share
            one tensor.
        tokens: number of tokens that the moments are averaged over, without padding.
        loss: mean loss of a token, None if no loss was computed.
        source: name of the data, for reports.
        of_tokens: True if the loss is the cross entropy of tokens, whose exponential is the perplexity.
        coherence: by module name, a factor of `R`: the mean square of the first-order loss change of a row (a
            text, an image), relative to independent tokens, for errors that are isotropic after `R` and `C`
            are whitened. Estimated from 32 tokens of each of 16 rows; 1 if absent.
        counts: by module name, number of tokens that reached the layer: fewer than `tokens` behind a router.
        scored: number of tokens that have a loss.
        fingerprint: by module name, four elements of the weight, to recognize the model.

    Reference:
        Martens, Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature".
        Eschenhagen et al. 2023, "Kronecker-Factored Approximate Curvature for Modern Neural Network
        Architectures", section 3, on weights that are shared by the tokens of a row.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> stats = tn.calibrate(model, [torch.randn(64, 8)])
        >>> stats.columns[""].shape, stats.rows[""].shape, stats.tokens
        (torch.Size([8, 8]), torch.Size([4, 4]), 64)
    """

    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    tokens: int
    loss: float | None = None
    source: str = field(default="calibration data")
    of_tokens: bool = False
    coherence: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    scored: int = 0
    fingerprint: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def check_weights(self, targets: Iterable[Target]) -> None:
        """Raise TargetError if the statistics were collected on a model of other weights.

        Args:
            targets: targets of the model; those that are not in the statistics are ignored.

        Raises:
            TargetError: a weight differs by more than its rounding to 16 bits; the message names the layer.
        """
        for name, found in weight_samples(x for x in targets if x.name in self.fingerprint).items():
            known = self.fingerprint[name]
            tolerance = 0.01 * max(map(abs, known))
            if len(known) != len(found) or any(
                abs(a - b) > tolerance for a, b in zip(known, found, strict=True)
            ):
                raise TargetError(
                    f"These statistics ({self.source}) were collected on another model: the weight of "
                    f"{name!r} differs. Calibrate this model, or pass the statistics collected on it."
                )

    @property
    def has_gradients(self) -> bool:
        """True if losses can be predicted, False if only errors of layer outputs can."""
        return self.loss is not None

    @property
    def num_bytes(self) -> int:
        """Memory of the distinct tensors."""
        distinct = {id(x): x for x in (*self.rows.values(), *self.columns.values())}
        return sum(x.numel() * x.element_size() for x in distinct.values())

    def _repr_html_(self) -> str:
        """Format as a table for notebooks."""
        known = self.loss is not None and self.loss == self.loss  # NaN: the loss has no meaning
        loss = f", loss {self.loss:.4f}" if known else ""
        caption = f"Statistics of {self.tokens:,} tokens of {self.source}{loss}"
        rows = []
        for name, columns in self.columns.items():
            traces = [_trace(side[name]) for side in (self.rows, self.columns) if name in side]
            sensitivity = (
                f"{0.5 * traces[0] * traces[1]:.3g}" if self.has_gradients and len(traces) == 2 else ""
            )
            rows.append((name, f"{len(columns):,}", f"{self.counts.get(name, self.tokens):,}", sensitivity))
        return html_table(caption, ("layer", "inputs", "tokens", "1/2 tr R tr C"), rows)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; a tensor that several layers share is written once.

        Raises:
            DestinationError: the file cannot be written there.
        """
        tensors: dict[str, Tensor] = {}
        sides = {side: _deduplicate(getattr(self, side), side, tensors) for side in ("rows", "columns")}
        header = {
            "version": STATS_VERSION,
            "tokens": self.tokens,
            "loss": self.loss,
            "source": self.source,
            "of_tokens": self.of_tokens,
            "coherence": dict(self.coherence),
            "counts": dict(self.counts),
            "scored": self.scored,
            "fingerprint": {name: list(values) for name, values in self.fingerprint.items()},
            **sides,
        }
        metadata = {"calibration": json.dumps(header)}
        write_tensors(path, tensors, metadata, what="The statistics")

    @classmethod
    def load(cls, path: str | Path) -> "CalibrationStats":
        """Read a file written by `save`.

        Raises:
            FormatError: the file is missing, damaged, or contains something else.
        """
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})["calibration"])
                if header["version"] != STATS_VERSION:
                    raise FormatError(
                        f"{path} has calibration statistics of version {header['version']}, this library "
                        f"reads version {STATS_VERSION}; calibrate again."
                    )
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            sides = {
                side: {name: tensors[key] for name, key in header[side].items()}
                for side in ("rows", "columns")
            }
            return cls(
                **sides,
                tokens=header["tokens"],
                loss=header["loss"],
                source=header["source"],
                of_tokens=header["of_tokens"],
                coherence=header.get("coherence", {}),
                counts=header.get("counts", {}),
                scored=header.get("scored", 0),
                fingerprint={name: tuple(x) for name, x in header.get("fingerprint", {}).items()},
            )
        except FormatError:
            raise
        except (OSError, KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
            raise FormatError(f"Cannot read calibration statistics from {path}: {error}") from error


def _deduplicate(moments: Mapping[str, Tensor], side: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Add each distinct tensor to `tensors` under the first layer's name; return layer -> key."""
    keys: dict[int, str] = {}
    for name, moment in moments.items():
        key = keys.setdefault(id(moment), f"{side}.{name}")
        tensors.setdefault(key, moment.contiguous())
    return {name: keys[id(moment)] for name, moment in moments.items()}


def weight_samples(targets: Iterable[Target]) -> dict[str, tuple[float, ...]]:
    """Read four elements of the weight of each target, by name; none on the meta device."""
    found = {}
    for target in targets:
        matrix = target.matrix
        if not matrix.is_meta:
            rows, columns = (
                torch.linspace(0, size - 1, 4, device=matrix.device).round().long() for size in matrix.shape
            )
            found[target.name] = tuple(matrix[rows, columns].float().tolist())
    return found


def _trace(moment: Tensor) -> float:
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    return float(diagonal.double().sum())

"""Statistics that calibration collects, and how to save and load them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import safetensors
from torch import Tensor

from tensornet._util import spaced_places
from tensornet.errors import FormatError, TargetError
from tensornet.io import write_tensors
from tensornet.nn.targets import Target

STATS_VERSION = 1


@dataclass(frozen=True)
class CalibrationStats:
    """Second moments of every layer's inputs and output gradients; they predict loss increases.

    A change `dW: (out, in)` of one layer's weight increases the loss of a token by about `coherence * 1/2
    tr(R dW C dW^T)`, in the K-FAC approximation of the Fisher matrix. For a linear layer with inputs `x`, and
    gradients `g` of the summed loss with respect to its outputs, `C = E[x x^T]` and `R = E[g g^T]`. For an
    embedding the diagonal of `R` is the frequency of each row, and `C` is the moment of the gradients.

    Args:
        rows: the moment `R` by module name, shape `(out, out)`, or `(out,)` if only the diagonal is stored.
        columns: the moment `C` by module name, shape `(in, in)` or `(in,)`. Layers with the same input (q, k,
            v) share one tensor.
        tokens: number of tokens over which the moments are averaged, without padding.
        loss: mean loss of a token; None if no loss was computed.
        source: name of the data, for reports.
        of_tokens: True if the loss is the cross entropy of tokens, whose exponential is the perplexity.
        coherence: by module name, a measure of whether the first-order loss changes of the tokens of one text
            or image add up. It is the mean square of the sum of these changes, divided by its value for
            independent tokens. It is estimated from 32 tokens of each of 16 texts (see
            `tensornet.calibration.coherence`). A missing entry means 1.
        counts: number of tokens that each layer received, by module name; layers after a router receive
            fewer than `tokens`. The moments of experts are blended with the mean of their mixture (see
            `tensornet.calibration.moment_sums`); those of an expert with count 0 are equal to this mean.
        scored: number of tokens that have a loss.
        fingerprint: four elements of each weight, by module name, to recognize the model.
        factors: moments of gradients by module name as `V V^T + diag(d)`, shape `(features, rank + 1)`: the
            columns of `V`, then `d`. Only a survey collects them.

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
    factors: Mapping[str, Tensor] = field(default_factory=dict)

    def check_weights(self, targets: Iterable[Target]) -> None:
        """Check that the statistics were collected on the weights of a model.

        Args:
            targets: targets of the model; targets that are not in the statistics are ignored.

        Raises:
            TargetError: a weight differs by more than its rounding to 16 bits; the message names the layer.
        """
        if (name := first_difference(self.fingerprint, targets)) is not None:
            raise TargetError(
                f"These statistics ({self.source}) were collected on another model: the weight of {name!r} "
                "differs. Calibrate this model, or pass the statistics collected on it."
            )

    @property
    def has_gradients(self) -> bool:
        """True if loss increases can be predicted, False if only errors of layer outputs can."""
        return self.loss is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of all moments; a tensor that layers share is counted once."""
        distinct = {id(x): x for x in (*self.rows.values(), *self.columns.values())}
        return sum(x.numel() * x.element_size() for x in distinct.values())

    def save(self, path: str | Path) -> None:
        """Write the statistics to a safetensors file; a tensor that layers share is written once.

        Raises:
            DestinationError: the file cannot be written.
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
        """Read statistics from a file that `save` wrote.

        Raises:
            FormatError: the file is missing or damaged, or does not contain statistics.
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
    """Collect the distinct tensors among the moments of all layers.

    Args:
        moments: moments by layer; layers may share a tensor.
        side: `"rows"` or `"columns"`.
        tensors: receives each distinct tensor, under a key with the name of its first layer.

    Returns:
        The key of each layer's tensor.
    """
    keys: dict[int, str] = {}
    for name, moment in moments.items():
        key = keys.setdefault(id(moment), f"{side}.{name}")
        tensors.setdefault(key, moment.contiguous())
    return {name: keys[id(moment)] for name, moment in moments.items()}


def weight_samples(targets: Iterable[Target]) -> dict[str, tuple[float, ...]]:
    """Map the name of each target to four elements of its weight.

    Empty weights and those on the meta device are omitted.
    """
    found = {}
    for target in targets:
        matrix = target.matrix if target.kinds else target.weight.detach().reshape(1, -1)
        if matrix.numel() and not matrix.is_meta:
            rows, columns = (spaced_places(size, 4) for size in matrix.shape)
            found[target.name] = tuple(matrix[rows, columns].real.float().tolist())
    return found


def first_difference(samples: Mapping[str, Sequence[float]], targets: Iterable[Target]) -> str | None:
    """Return the name of the first weight that differs from its sample by more than 16-bit rounding, or None.

    Args:
        samples: samples from `weight_samples`; weights without a sample are not compared.
        targets: targets of a model.
    """
    for name, found in weight_samples(x for x in targets if samples.get(x.name)).items():
        tolerance = 0.01 * max(map(abs, samples[name]))
        pairs = zip_longest(samples[name], found, fillvalue=math.inf)
        if any(abs(a - b) > tolerance for a, b in pairs):
            return name
    return None

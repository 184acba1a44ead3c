"""Report of a compression: sizes, errors, losses, where it was written, and comparisons with other models."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from tensornet._util import compact_bytes
from tensornet.compression.coverage import Coverage, SourceTensor
from tensornet.compression.loss_increase import LossIncrease
from tensornet.compression.plan import NO_CHOICE, CompressionPlan, LayerPlan
from tensornet.nn.storage import PackedCore
from tensornet.nn.targets import shortened

#: Largest loss whose exponential does not overflow.
_MOST = 700.0


@dataclass(frozen=True)
class ModelFacts:
    """Size and quality of a model in a comparison.

    Args:
        name: name in reports.
        params: count of stored numbers of the whole model, scales included.
        bytes: size of the weight files, or of the tensors if nothing was saved; None if unknown.
        bits: bits per weight of the compressed layers, scales included; None if unknown.
        scheme: short name of the number format or ranks.
        quality: loss on a text, and loss increase over the first model; None if not measured.
        predicted: predicted loss increase, or None.
        sample: generated text, or None.
    """

    name: str
    params: int
    bytes: int | None = None
    bits: float | None = None
    scheme: str = ""
    quality: LossIncrease | None = None
    predicted: float | None = None
    sample: str | None = None

    @property
    def measured(self) -> bool:
        """True if the loss increase was measured, False if it is predicted or unknown."""
        return self.quality is not None

    @property
    def loss_increase(self) -> float | None:
        """Measured loss increase if there is one, otherwise the predicted loss increase, or None."""
        return self.predicted if self.quality is None else self.quality.mean

    @property
    def perplexity(self) -> float | None:
        """Exponential of the measured loss; None if no loss was measured."""
        return None if self.quality is None else math.exp(min(self.quality.loss, _MOST))

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        quality = None
        if self.quality is not None:
            quality = {
                "loss": self.quality.loss,
                "perplexity": self.perplexity,
                "loss_increase": self.quality.mean,
                "stderr": self.quality.stderr,
                "kl": self.quality.kl_mean,
                "tokens": self.quality.tokens,
                "source": self.quality.source,
            }
        return {
            "name": self.name,
            "scheme": self.scheme,
            "bytes": self.bytes,
            "bits_per_weight": self.bits,
            "parameters": self.params,
            "quality": quality,
            "predicted_loss_increase": self.predicted,
            "sample": self.sample,
        }


@dataclass(frozen=True)
class CompressionReport:
    """Result of `compress` and of `tensornet_hf.compress_folder`.

    `print` shows the table of the plan with the certified errors; or, if the model was written to files, a
    summary.

    Args:
        model_params_before, model_params_after: number of stored values of the whole model: elements of
            parameters, integer codes, scales and minima. Tied tensors are counted once.
        model_bytes_before, model_bytes_after: bytes of these values in memory.
        seconds: wall time of the compression.
        plan: the plan that was applied, with the certified error of each layer.
        coverage: counts of the parameters that the plan covers and does not cover.
        measured: loss increase measured on a few rows of the data, to compare with
            `plan.predicted_loss_increase`; None if there were no batches or the model has no loss.
        rounded: number formats of parameters that do not belong to layers, such as the shared cores of
            experts, by name. The plan and its predictions do not include these parameters.
        measured_layers: loss increase measured before the parameters in `rounded` were rounded, to compare
            with the prediction of the plan; equal to `measured` if `rounded` is empty.
        source, destination: what was read and written by `compress_folder`; None for a model in memory.
        file_bytes_before, file_bytes_after: total size of the weight files in bytes, if files were written.
        notes: lines about refitting, healing and the export.
        uncorrected: names of weights that were rounded without correcting errors of earlier layers, since
            the correction would have changed them too much.
        models: facts about the original model, the compressed model and baselines of equal size, if a report
            or a held-out text was requested.
        memory: bytes that the runtime needs in addition to the file, by use, if there was a budget of memory.
        tensors: what became of every tensor of the source, if files were written.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
        >>> config = tn.CompressionConfig(param_ratio=0.5, method="svd")
        >>> report = tn.compress(model, config, progress=False)
        >>> report.param_ratio <= 0.5, len(report.layers)
        (True, 2)
    """

    model_params_before: int
    model_params_after: int
    model_bytes_before: int
    model_bytes_after: int
    seconds: float
    plan: CompressionPlan
    coverage: Coverage
    measured: LossIncrease | None = None
    rounded: Mapping[str, str] = field(default_factory=dict)
    measured_layers: LossIncrease | None = None
    source: str | None = None
    destination: str | None = None
    file_bytes_before: int | None = None
    file_bytes_after: int | None = None
    notes: tuple[str, ...] = ()
    models: tuple[ModelFacts, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    tensors: tuple[SourceTensor, ...] = ()
    uncorrected: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """Plans of all layers, one for each targeted weight."""
        return self.plan.layers

    @property
    def byte_ratio(self) -> float:
        """Bytes of the whole model after compression, divided by its bytes before."""
        return self.model_bytes_after / self.model_bytes_before

    @property
    def param_ratio(self) -> float:
        """Parameters of the targeted weights after compression, divided by their parameters before."""
        return self.plan.params_after / self.plan.params_before

    def __str__(self) -> str:
        return self._table() if self.destination is None else self._summary()

    def _summary(self) -> str:
        plan = self.plan
        dense = sum(layer.scheme == "dense" for layer in self.layers)
        kept = f" ({dense} of them stay dense)" if dense else ""
        sizes = [compact_bytes(size or 0) for size in (self.file_bytes_before, self.file_bytes_after)]
        lines = [
            f"files       {' -> '.join(sizes)}",
            f"layers      {len(self.layers)}{kept}, {plan.bits_per_weight:.2f} bits a weight of these layers",
            f"parameters  {self.model_params_before:,} -> {self.model_params_after:,}, scales included",
            f"coverage    {str(self.coverage).removeprefix('covers ')}",
        ]
        if (predicted := plan.predicted_loss_increase) is not None:
            kl = "" if plan.predicted_kl is None else f", KL {plan.predicted_kl:.4f}"
            what = f"{predicted:.4f}{plan.predicted_change()}{kl}"
            lines.append(f"predicted   loss increase {what} (on {plan.calibration})")
        if left := [x for x in self.tensors if x.became == "left out"]:
            kinds = Counter[str]()
            for one in left:
                kinds[one.reason] += one.num_bytes
            sizes = [f"{kind} {compact_bytes(size)}" for kind, size in kinds.items()]
            lines.append(f"left out    {len(left)} tensors: {', '.join(sizes)}")
        lines += [f"grid        {line}" for line in plan.grid_lines()]
        if self.memory:
            parts = {"file": self.file_bytes_after or 0, **self.memory}
            said = " + ".join(f"{name} {compact_bytes(size)}" for name, size in parts.items())
            lines.append(f"memory      {said} = {compact_bytes(sum(parts.values()))}")
        if plan.has_no_choice:
            lines.append(f"note        {NO_CHOICE}")
        if self.uncorrected:
            lines.append(f"note        {self._uncorrected()}")
        if self.measured is not None:
            lines.append(f"measured    loss increase {self.measured}")
        for model in self.models:
            if (found := model.quality) is not None:
                divergence = "" if found.kl_mean is None else f", KL {found.kl_mean:.4f}"
                more = f"loss increase {found.mean:+.4f}{divergence}, perplexity {model.perplexity:.4g}"
                scheme = f"{model.scheme}, " if model.scheme else ""
                lines.append(f"held out    {model.name} ({scheme}{model.bits:.2f} bits): {more}")
        return "\n".join([*lines, f"seconds     {self.seconds:.1f}", f"written to  {self.destination}"])

    def _uncorrected(self) -> str:
        return (
            f"errors of earlier layers are not corrected in {len(self.uncorrected)} layers, since this would "
            f"have changed them too much: {shortened(self.uncorrected)}"
        )

    def _table(self) -> str:
        lines = [str(self.plan)]
        found = self.measured
        if found is not None:
            before, after = found.dense_loss, found.dense_loss + found.mean
            change = ""
            if self.plan.of_tokens and after < _MOST:
                change = f", perplexity {math.exp(before):.4g} -> {math.exp(after):.4g}"
            lines.append(f"measured loss increase: {found}{change}")
        elif self.plan.predicted_loss_increase is not None:
            lines.append("measured loss increase: none, since there were no batches")
        lines.append(
            f"whole model: {self.model_bytes_before / 1e6:.2f} -> {self.model_bytes_after / 1e6:.2f} MB, "
            f"{self.model_params_before:,} -> {self.model_params_after:,} parameters, {self.seconds:.1f} s"
        )
        lines.append(str(self.coverage))
        if self.uncorrected:
            lines.append(self._uncorrected())
        if self.rounded:
            counts = Counter(self.rounded.values()).items()
            lines.append("rounded outside of layers: " + ", ".join(f"{n} in {name}" for name, n in counts))
            if self.plan.predicted_loss_increase is not None:
                part = self.measured_layers
                known = "" if part is None else f"; without them {part.mean:.4f} was measured"
                lines.append(f"the predicted loss increase leaves these parameters out{known}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready dict."""
        return {
            "layers": [layer.summary() for layer in self.layers],
            **{name: value for name, value in vars(self).items() if name != "plan"},
            "notes": list(self.notes),
            "uncorrected": list(self.uncorrected),
            "models": [model.to_dict() for model in self.models],
            "tensors": [tensor._asdict() for tensor in self.tensors],
            "byte_ratio": self.byte_ratio,
            "bits_per_weight": self.plan.bits_per_weight,
            "param_ratio": self.param_ratio,
            "coverage": self.coverage.to_dict(),
            "measured": None if self.measured is None else asdict(self.measured),
            "measured_layers": None if self.measured_layers is None else asdict(self.measured_layers),
            "rounded": dict(self.rounded),
            "unrouted": list(self.plan.unrouted),
            **self.plan.predictions(),
        }

    def to_json(self) -> str:
        """Convert the result of `to_dict` to JSON text."""
        return json.dumps(self.to_dict(), indent=1)


def model_size(model: nn.Module) -> tuple[int, int]:
    """Return the number of stored values of a model, and the number of bytes that they take.

    A packed code, scale or minimum counts as one value; tied tensors are counted once.
    """
    sizes = {id(x): (x.numel(), x.nbytes) for x in model.parameters()}
    for layer in model.modules():
        if isinstance(layer, PackedCore):
            tensors = layer.tensors
            sizes |= {id(tensors[name]): (n, tensors[name].nbytes) for name, n in layer.counts.items()}
    return sum(count for count, _ in sizes.values()), sum(size for _, size in sizes.values())

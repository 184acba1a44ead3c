"""Options for compressing a model folder, and the rules between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tensornet.compression import CompressionConfig, CompressionPlan
from tensornet.errors import DestinationError
from tensornet_hf.pipeline import dtype_of


class OptionError(ValueError):
    """Options that exclude or need one another.

    Args:
        template: message with the names of options in braces.

    Example:
        >>> str(th.OptionError("{refine} needs {calibration}."))
        'refine needs calibration.'
    """

    def __init__(self, template: str) -> None:
        self.template = template
        super().__init__(template.format_map(_Plain()))

    @property
    def for_command_line(self) -> str:
        """Message with every option as it is written on the command line."""
        return self.template.format_map(_Flags())


class _Plain(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return name


class _Flags(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class CompressOptions:
    """Options of `compress_folder`.

    Args:
        config: which layers, and how far; or
        plan: what every layer becomes, a plan or a file of one.
        calibration: text file, similar to what the model will read, or several, of which pieces are taken by
            turns. Without, embedded text may serve, or the error of the weights decides.
        calibration_tokens: how much of it to use.
        validation: text file of another source, on which the loss is measured at a few sizes, which corrects
            the predicted loss increase. Not for classifiers.
        held_out: text file on which the dense, the compressed model and plain methods of the same bytes are
            measured. Not for classifiers. Holds two models in memory.
        refine: refit each layer to the dense model's outputs afterwards, on the rest of the calibration text.
        heal: steps of training the cores to the dense model's outputs afterwards, on the calibration text.
        dtype: store weights as `"float32"`, `"bfloat16"` or `"float16"`; as they are if absent.
        device: where the model runs.
        workers: compress weight by weight in this many processes, without ever loading the model.
        resume: go on with an interrupted run of `workers` or `heal`.
        report: HTML page to write.
        force: replace a destination that exists.
        command: named on the page.
        progress: show progress bars.

    Raises:
        OptionError: options exclude or need one another.
        DestinationError: the report cannot be written there.
        ValueError: an unknown dtype.

    Example:
        >>> config = tn.CompressionConfig(bits_per_weight=4.25)
        >>> th.CompressOptions(config, calibration="text.txt").calibration_tokens
        32768
    """

    config: CompressionConfig | None = None
    plan: CompressionPlan | str | Path | None = None
    calibration: str | Path | Sequence[str | Path] | None = None
    calibration_tokens: int = 32_768
    validation: str | Path | None = None
    held_out: str | Path | None = None
    refine: bool = False
    heal: int = 0
    dtype: str | None = None
    device: torch.device | str = "cpu"
    workers: int | None = None
    resume: bool = True
    report: str | Path | None = None
    force: bool = False
    command: str = "tensornet_hf.compress_folder"
    progress: bool = False

    def __post_init__(self) -> None:
        self._check_validation()
        self._check_held_out()
        if self.config is None and self.plan is None:
            raise OptionError("Give a config, which says how far to compress, or a {plan}.")
        if self.config is not None and self.plan is not None:
            raise OptionError("{plan} says already what every layer becomes; leave out the config.")
        self._check_correction()
        dtype_of(self.dtype)
        if self.report is not None:
            path = Path(self.report)
            if path.is_dir() or not path.absolute().parent.is_dir():
                raise DestinationError(
                    f"The report cannot be written to {path}: name a file in a folder that exists."
                )
        if self.workers is not None:
            self.check_needs_no_model({"dtype": self.dtype, "report": self.report})

    @property
    def calibration_files(self) -> tuple[Path, ...]:
        """Calibration texts; empty without any."""
        if self.calibration is None:
            return ()
        given = [self.calibration] if isinstance(self.calibration, (str, Path)) else self.calibration
        return tuple(Path(file) for file in given)

    def _check_validation(self) -> None:
        if self.validation is None:
            return
        if self.plan is not None:
            raise OptionError("{plan} holds a forecast already; leave out {validation}.")
        objective = "auto" if self.config is None else self.config.objective
        if objective in ("weight", "activation"):
            raise OptionError(
                f"{{validation}} corrects a forecast of the loss, which {{objective}} {objective} does not "
                "make; leave one of them out."
            )
        if any(_same_file(self.validation, file) for file in self.calibration_files):
            raise OptionError("{validation} is the text of {calibration}; give one of another source.")

    def _check_held_out(self) -> None:
        seen = [("calibration", file) for file in self.calibration_files] + [("validation", self.validation)]
        for name, file in seen:
            if self.held_out is not None and _same_file(self.held_out, file):
                raise OptionError(
                    f"{{held_out}} is the text of {{{name}}}, which the model was made with; give another."
                )

    def _check_correction(self) -> None:
        if self.refine and not self.calibration_files:
            raise OptionError("{refine} fits layers on the text of {calibration}; give one.")
        if self.heal and not self.calibration_files:
            raise OptionError("{heal} trains on the text of {calibration}; give one.")

    def check_needs_no_model(self, more: Mapping[str, object]) -> None:
        """Raise OptionError if an option needs the model in memory, which workers never load."""
        asked = {**more, "refine": self.refine, "heal": self.heal, "validation": self.validation}
        asked["held_out"] = self.held_out
        if given := [f"{{{name}}}" for name, value in asked.items() if value]:
            raise OptionError(
                f"{{workers}} never loads the model, which {' and '.join(given)} would need; leave one of "
                "them out."
            )

    def load_plan(self) -> CompressionPlan | None:
        """Return the plan, read from its file if a path is given."""
        if self.plan is None or isinstance(self.plan, CompressionPlan):
            return self.plan
        return CompressionPlan.load(self.plan)


def _same_file(one: str | Path | None, other: str | Path | None) -> bool:
    paths = [Path(x) for x in (one, other) if x is not None]
    return len(paths) == 2 and all(x.exists() for x in paths) and paths[0].samefile(paths[1])

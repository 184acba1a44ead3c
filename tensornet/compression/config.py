"""Configuration of `tensornet.compress`: which layers to compress, how far, and how.

The options of the command line are made from the fields of `CompressionConfig` and from its docstring.
"""

# ruff: noqa: RUF009 (`option` returns a `dataclasses.field`)

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from tensornet._util import check_number, check_size, check_type
from tensornet.budget import Budget
from tensornet.errors import BudgetError, FormatError, TopologyError
from tensornet.gone import advice, explains_gone
from tensornet.nn.targets import ALL, LayerSelection
from tensornet.quantization import NumberFormat, Rounding
from tensornet.quantization.menus import MENUS
from tensornet.topologies import TopologyFamily, topology_family, topology_names
from tensornet.topologies.base import check_options
from tensornet.topologies.registry import fixed_topologies
from tensornet.topology import Topology

Method = Literal["auto", "gptq", "nearest", "svd"]
METHODS = get_args(Method)
#: How each method rounds integers.
ROUNDING_OF: dict[str, Rounding] = {
    "auto": "two_sided",
    "gptq": "one_sided",
    "nearest": "nearest",
    "svd": "nearest",
}
#: Methods that need no calibration data.
WITHOUT_DATA = ("nearest", "svd")
#: Limits on each network, which are given among the options of its topology.
NETWORK_LIMITS = ("max_bond", "rel_error")
Effort = Literal["fast", "thorough"]
EFFORTS = get_args(Effort)
AUTO = "auto"
#: Budgets for all layers together; they need the sensitivity of the loss to errors in each layer.
SHARED_BUDGETS = ("bits_per_weight", "max_bytes", "loss_increase", "tokens_per_second")
#: Budgets that limit bytes, or the time that it takes to read them.
BYTE_BUDGETS = ("bits_per_weight", "max_bytes", "tokens_per_second")
#: Number formats to plan with if a budget of bytes is given without formats.
DEFAULT_FORMATS = (
    "float",
    "int8",
    "int6:g32:float8",
    "int5:g32:float8",
    "int4:g32:float8",
    "int3:g32:float8",
    "int2:g32:float8",
)


def option(
    default: Any, group: str, kind: str = "choice", *, choices: Sequence[str] = (), name: str = ""
) -> Any:
    """Declare a dataclass field that is also an option of the command line.

    The help text of the option is the first sentence about the field in the docstring of its class.

    Args:
        default: default value.
        group: group in the help text: `"budget"`, `"data"`, `"layers"`, `"experts"`, `"routing"` or
            `"advanced"`.
        kind: form of the value: `"number"`, `"integer"`, `"share"` (0.5), `"size"` (60MB), `"text"`,
            `"choice"`, `"names"` (a,b), `"pairs"` (key=value), `"patterns"`, `"pool"` (all, or a number
            of layers), `"flag"`.
        choices: allowed values of an option of kind `"choice"`.
        name: name on the command line, if it differs from the name of the field.
    """
    return field(default=default, metadata={"group": group, "kind": kind, "choices": choices, "name": name})


@explains_gone
@dataclass(frozen=True)
class CompressionConfig(LayerSelection):
    """Options of `compress`. Several limits may be combined; a plan meets all of them.

    Args:
        target_modules: layers to compress: a name, the end of a name, a glob, or re:REGEX (default: all
            linear layers but the output head). A pattern is a whole module name, the part of a name after a
            dot (`"c_fc"`), or a glob (`"*.mlp.*"`). With the prefix `"re:"` it is a regular expression for
            the whole name. `"all"` selects embeddings and output heads too.
        exclude_modules: layers to leave dense, named in the same way.
        topology: family of tensor networks, such as low_rank or mpo; auto takes the best one for each layer.
            With calibration data `"auto"` means low rank, which is better than chains on pretrained layers.
            A `Topology` is allowed too, or a list of topologies for matrices of different shapes. Every
            targeted layer then gets the topology of its shape, and budgets are not allowed.
        topology_options: option of the topology, such as max_bond=64 or sites=4. In Python, a dictionary. It
            may contain two limits for every network: `max_bond`, the largest bond, and `rel_error`, the
            largest relative error of the weight (Frobenius norm). Other options are those of the family's
            `build`, such as `{"out_dims": (8, 96)}`. An option that does not fit a layer raises an error when
            this layer is planned. Leg sizes that are not given are chosen by the predicted loss, if there is
            calibration data.
        param_ratio: share of the parameters of the targeted layers to keep, such as 0.5. If the loss increase
            is predicted, the limit is for all layers together; if not, for each layer.
        bits_per_weight: mean bits per weight of the targeted layers, scales included, such as 4.25. All
            budgets of bytes need calibration data; without them, all layers become int8 if this fits the
            budget.
        max_bytes: largest size of the weight file in bytes, such as 60MB. Embeddings, biases, buffers and the
            header of the file are counted; embeddings and heads are compressed too unless `target_modules`
            is given.
        formats: number formats that layers may have, such as float,int8,int4 (default with a budget of bytes,
            or with loss_increase alone: the dtype of the model and integers of 8 to 2 bits). Names are read
            by `NumberFormat.parse`: `"float"` is the dtype of the model, `"int4"` has groups of 64. Dense
            layers may have any of these formats; cores of networks may have floats and integers of at least
            four bits. In layers whose weights are too small for 8-bit scales, formats of `DEFAULT_FORMATS`
            are replaced by formats of the same size with 16-bit scales. The name of a menu is allowed too: a
            menu is a list of formats for an export target, and is planned without networks. tensornet_hf
            registers the menus `"gguf"`, `"mlx"`, `"gptq"` and `"compressed-tensors"`. They contain the
            formats of these file types, and sizes are then the bytes in such a file. `"gguf-fast"` is the
            part of `"gguf"` for which llama.cpp has fast kernels, `"openvino"` the part that OpenVINO GenAI
            reads; `"vllm"` is the part of `"compressed-tensors"` that vLLM computes on any GPU. Menus of
            GGUF and MLX plan embeddings and heads too. If formats follow the name of a menu, only these
            formats of the menu are used, as in `("gguf", "int4:g32:float16", "float")`. The formats `"mxfp4"`
            and `"nvfp4"` of the menus `"gguf"` and `"compressed-tensors"` are planned only if they are named
            so.
        loss_increase: predicted loss increase per token that all layers together may cause, in nats. It needs
            calibration data. Without another budget, the smallest model within this limit is planned.
        tokens_per_second: least speed at which the weights alone let a runtime generate text, such as 30. It
            needs calibration data and `speeds`. A token reads the rows of embeddings, and its own experts,
            so these are counted by the share of the tokens that read them.
        speeds: JSON file with the bytes of weights that a runtime reads and computes in a second, by number
            format; benchmarks/speeds.py measures those of llama.cpp. In Python, a dictionary such as
            `{"float": 9e9, "int4:g32:float16": 8e9}`.
        method: how to compress: auto minimizes the predicted loss increase; gptq, nearest and svd are the
            usual baselines. `"auto"` divides budgets among the layers, and rounds integers with error
            feedback along inputs and outputs. Without calibrated gradients it minimizes the errors of the
            layers' outputs, and without calibration data those of the weights. `"gptq"` minimizes the errors
            of the outputs, which needs no loss: integers are rounded with error feedback along the inputs
            (Frantar et al., arXiv:2210.17323), and networks are fitted to the outputs. `"nearest"` rounds to
            the nearest number. `"svd"` decomposes weights alone; with `topology="low_rank"`, by the truncated
            SVD. The last two need no calibration data. Only `"auto"` leaves out elements of networks that are
            redundant because of their gauge freedom (see `tensornet.nn.storage`). A budget for all layers
            together is always divided by the predicted loss increase; `"nearest"` without calibration data
            stores all layers in one format.
        share_experts: let the experts of each layer share cores where this lowers the predicted loss
            increase. The experts of a mixture share a projection of their inputs, a basis of their outputs
            or a base matrix, which is stored once. Needs calibration data, a budget, and a mixture that
            keeps its experts as one parameter; the plan is a thorough one.
        effort: how much time to spend on a plan of number formats. Both efforts visit the blocks of the model
            one by one, and round each block on the inputs that it will really get. thorough reads eight times
            as many tokens to predict losses and twice as many to round, collects full moments of the
            gradients, and also plans low-rank parts. Plans without number formats do not depend on it.

    Raises:
        BudgetError: a limit is not a number, out of range, or in conflict with the method.
        TargetError: a pattern is not a string.
        TopologyError: the topology is unknown, or the family does not have one of the options.
        ValueError: the method or effort is unknown, or the value of another option is invalid.

    Example:
        >>> tn.CompressionConfig(bits_per_weight=4.25).formats[:2]
        ('float', 'int8')
        >>> tn.CompressionConfig(target_modules="*.mlp.*", topology_options={"max_bond": 64}).max_bond
        64
    """

    target_modules: str | Sequence[str] | None = option(None, "layers", "patterns", name="target")
    exclude_modules: str | Sequence[str] | None = option(None, "layers", "patterns", name="exclude")
    topology: str | TopologyFamily | Topology | Sequence[Topology] = option(AUTO, "advanced", "text")
    topology_options: Mapping[str, Any] | None = option(None, "advanced", "pairs", name="topology_option")
    param_ratio: float | None = option(None, "budget", "share")
    bits_per_weight: float | None = option(None, "budget", "number", name="bits")
    max_bytes: int | None = option(None, "budget", "size")
    formats: str | Sequence[str] | None = option(None, "advanced", "names")
    loss_increase: float | None = option(None, "budget", "number")
    tokens_per_second: float | None = option(None, "budget", "number")
    speeds: Mapping[str, float] | str | os.PathLike[str] | None = option(None, "advanced", "text")
    method: Method = option("auto", "advanced", choices=METHODS)
    share_experts: bool = option(False, "layers", "flag")
    effort: Effort = option("fast", "budget", choices=EFFORTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "topology_options", _checked_options(self))
        object.__setattr__(self, "formats", _checked_formats(self))
        whole = self.menu is not None and MENUS[self.menu].whole_model
        if self.target_modules is None and (whole or self.max_bytes is not None):
            object.__setattr__(self, "target_modules", ALL)
        object.__setattr__(self, "topology", _checked_topology(self))
        named = (("method", METHODS), ("effort", EFFORTS))
        for name, choices in named:
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"Unknown {name} {value!r}; choose one of {', '.join(choices)}.")
        if not isinstance(self.share_experts, bool):
            raise ValueError(f"share_experts must be True or False, got {self.share_experts!r}.")
        object.__setattr__(self, "speeds", _checked_speeds(self))
        self._check_budgets()
        if self.share_experts:
            self._check_sharing()

    def _check_sharing(self) -> None:
        """Raise BudgetError for options that cannot be combined with shared cores; make the plan thorough."""
        apart = {
            "max_bond": self.max_bond is not None,
            "rel_error": self.rel_error is not None,
            "topology": bool(self.fixed),
            "method": self.method != "auto",
            "tokens_per_second": self.tokens_per_second is not None,
        }
        if conflicts := [name for name, is_set in apart.items() if is_set]:
            raise BudgetError(
                "share_experts chooses shared cores only by their size and predicted loss: drop "
                f"{', '.join(conflicts)}, or leave out share_experts."
            )
        object.__setattr__(self, "effort", "thorough")

    def _check_budgets(self) -> None:
        """Check that budgets are in range and do not contradict other options.

        Raises:
            BudgetError: a budget is out of range, or contradicts another option.
        """
        _ = self.budget  # checks the limits on each layer
        for name in SHARED_BUDGETS:
            if (value := getattr(self, name)) is None:
                continue
            check_number(name, value)
            if not value > 0:
                raise BudgetError(f"{name} must be above 0, got {value!r}.")
        if self.param_ratio is not None and self.param_ratio > 1:
            # `Budget` allows ratios above 1, for networks larger than the matrix, so this is checked here.
            raise BudgetError(
                f"param_ratio is a fraction of the parameters to keep, at most 1; got {self.param_ratio!r}. "
                "50 % is param_ratio=0.5."
            )
        if self.method == "svd" and (self.formats or self.needs_curvature):
            given = [x for x in SHARED_BUDGETS if getattr(self, x) is not None] or ["formats"]
            raise BudgetError(
                "method='svd' stores networks by the errors of their weights alone, without number formats: "
                f"leave out {', '.join(given)}, or use method='nearest' or 'auto'."
            )
        if self.method == "nearest" and not self.formats:
            raise BudgetError(
                "method='nearest' rounds to number formats: give formats=('int4',) or bits_per_weight=, or "
                "use method='svd' for networks."
            )

    def check_says_how_far(self) -> None:
        """Check that the options determine how far to compress.

        Raises:
            BudgetError: no option does.

        Example:
            >>> tn.CompressionConfig(param_ratio=0.5).check_says_how_far()
        """
        budgets = not self.budget.unlimited or self.needs_curvature
        if not (budgets or self.formats or self.topology != AUTO):
            raise BudgetError(
                "No option says how far to compress. Give a budget: bits_per_weight=4.25, max_bytes=, "
                "param_ratio=0.5 or loss_increase=. Or limit each network by "
                'topology_options={"max_bond": 64} or {"rel_error": 0.1}, or give topology= to store every '
                "layer as such a network without loss."
            )

    @property
    def max_bond(self) -> int | None:
        """Largest bond of every network, one of the `topology_options`."""
        return (self.topology_options or {}).get("max_bond")

    @property
    def rel_error(self) -> float | None:
        """Largest relative error of each weight, one of the `topology_options`."""
        return (self.topology_options or {}).get("rel_error")

    @property
    def family_options(self) -> dict[str, Any]:
        """The `topology_options` that are options of the family, not limits."""
        return {k: v for k, v in (self.topology_options or {}).items() if k not in NETWORK_LIMITS}

    @property
    def objective(self) -> str:
        """How errors are weighted: `"weight"`, `"activation"`, `"curvature"`, or `"auto"`.

        `"weight"` is the Frobenius norm, `"activation"` the error of the layer's outputs, `"curvature"` the
        predicted loss increase, and `"auto"` the last of these for which the calibration data suffice.
        """
        if self.share_experts:
            return "curvature"
        if self.method == "auto" or (self.needs_curvature and self.method != "svd"):
            return "auto"
        return "activation" if self.method == "gptq" else "weight"

    @property
    def rounding(self) -> Rounding:
        """How integers are rounded (see `tensornet.quantization.round_weight`)."""
        return ROUNDING_OF[self.method]

    @property
    def number_formats(self) -> tuple[NumberFormat, ...]:
        """Number formats in which layers may be stored; empty if only floating-point networks are planned."""
        names = MENUS[self.formats].formats if isinstance(self.formats, str) else self.formats or ()
        return tuple(NumberFormat.parse(name) for name in names if name not in MENUS)

    @property
    def menu(self) -> str | None:
        """Name of the menu at the beginning of `formats`, or None."""
        first = self.formats if isinstance(self.formats, str) else (self.formats or ("",))[0]
        return first if first in MENUS else None

    @property
    def one_format_keeps(self) -> bool:
        """True if a plan without calibration data can meet the budgets: one number format for all layers."""
        others = (self.param_ratio, self.loss_increase, self.tokens_per_second)
        return self.formats is not None and all(x is None for x in others)

    @property
    def survey_kind(self) -> str:
        """Kind of a survey: `"fast"` if it looks at number formats alone, `"networks"`, or `"thorough"`."""
        limited = self.param_ratio is not None or not self.budget.unlimited
        networks = not self.formats or self.topology != AUTO or limited
        return "networks" if networks and self.effort == "fast" else self.effort

    @property
    def reads_data(self) -> bool:
        """True if a plan uses calibration data when there are any."""
        limited = self.needs_curvature or self.formats or not self.budget.unlimited
        return self.objective != "weight" and bool(limited or self.fixed)

    @property
    def needs_curvature(self) -> bool:
        """True if a budget for all layers together is set; such budgets need the predicted loss."""
        return any(getattr(self, name) is not None for name in SHARED_BUDGETS)

    @property
    def budget(self) -> Budget:
        """Limits on each layer: `max_bond`, `rel_error` and `param_ratio`."""
        return Budget(self.max_bond, self.rel_error, self.param_ratio)

    @property
    def fixed(self) -> tuple[Topology, ...]:
        """Topologies that the user has given, one for each matrix shape; empty if a family is given."""
        return self.topology if isinstance(self.topology, tuple) else ()

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the topology families that a plan may use; empty if `formats` names a menu."""
        if self.menu is not None:
            return ()
        if self.fixed:
            return tuple(dict.fromkeys(topology.family for topology in self.fixed))
        assert isinstance(self.topology, str)
        return ("low_rank", "mpo") if self.topology == AUTO else (self.topology,)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready dict; `from_dict` is the inverse."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.fixed:
            data["topology"] = [topology.to_dict() for topology in self.fixed]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "CompressionConfig":
        """Restore a configuration from the result of `to_dict`.

        Raises:
            ValueError: an option is unknown; the message lists the known options.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(data.keys() - known):
            raise ValueError(
                f"Unknown compression options {', '.join(unknown)}; the options are "
                f"{', '.join(sorted(known))}.{advice(unknown)}"
            )
        return cls(**data)


def _checked_topology(config: CompressionConfig) -> str | tuple[Topology, ...]:
    """Check and return the topology of a configuration: the name of a family, or the given topologies.

    Raises:
        TopologyError: the family is unknown, the value has another type, or topologies are given together
            with options that choose a topology.
    """
    given = config.topology
    if isinstance(given, str | TopologyFamily):
        return AUTO if given == AUTO else topology_family(given).name
    if not (found := fixed_topologies(given)):
        raise TopologyError(
            "topology must be the name of a family, a registered family, a Topology or a list of topologies, "
            f"got {given!r:.200}."
        )
    choosing = ("topology_options", "param_ratio", "formats")
    if clashing := [name for name in (*choosing, *SHARED_BUDGETS) if getattr(config, name) is not None]:
        raise TopologyError(
            f"A topology fixes all dims and bonds: leave out {', '.join(clashing)}, or give the name of a "
            "family."
        )
    return found


def _checked_speeds(config: CompressionConfig) -> dict[str, float] | None:
    """Read and check the speeds of number formats; the result has the canonical names of the formats.

    Raises:
        BudgetError: there are no speeds, but a budget needs them; or the file, or a speed, is not valid.
        FormatError: a number format is unknown.
    """
    given: Any = config.speeds
    if given is None:
        if config.tokens_per_second is not None:
            raise BudgetError(
                "tokens_per_second needs speeds: a JSON file, or a dictionary, with the bytes of weights "
                "that a runtime computes in a second in each format. benchmarks/speeds.py measures them."
            )
        return None
    if isinstance(given, str | os.PathLike):
        try:
            given = json.loads(Path(given).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BudgetError(f"speeds={str(config.speeds)!r} cannot be read: {error}.") from error
    if not isinstance(given, Mapping) or not given:
        raise BudgetError(f"speeds must map number formats to bytes in a second, got {given!r:.100}.")
    for name, speed in given.items():
        check_number(f"speeds[{name!r}]", speed)
        if not 0 < speed < math.inf:
            raise BudgetError(f"speeds[{name!r}] must be above 0 and finite, got {speed!r}.")
    return {NumberFormat.parse(name).name: float(speed) for name, speed in given.items()}


def _checked_formats(config: CompressionConfig) -> tuple[str, ...] | str | None:
    """Check and return the number formats of a configuration: their names, or the name of a menu.

    Returns:
        The names in canonical form; `DEFAULT_FORMATS` if none are given but a budget needs formats; None if
        no formats are planned.

    Raises:
        FormatError: the value is not a sequence of names, or a name is unknown.
    """
    formats = config.formats
    if formats is None:
        limits = ("param_ratio", *NETWORK_LIMITS, *SHARED_BUDGETS)
        given = [name for name in limits if getattr(config, name) is not None]
        alone = given == ["loss_increase"] and config.topology == AUTO
        if not alone and not set(given) & set(BYTE_BUDGETS):
            return None
        formats = DEFAULT_FORMATS
    listed = (formats,) if isinstance(formats, str) else formats
    if isinstance(listed, Sequence) and listed and isinstance(listed[0], str) and listed[0] in MENUS:
        menu, *chosen = listed
        if config.topology != AUTO:
            raise FormatError(f"formats={menu!r} has no networks; leave out topology={config.topology!r}.")
        names = dict.fromkeys(NumberFormat.parse(name).name for name in chosen)
        possible = (*MENUS[menu].formats, *MENUS[menu].on_request)
        menu_names = {NumberFormat.parse(name).name for name in possible}
        if others := [name for name in names if name not in menu_names]:
            raise FormatError(f"The formats of {menu!r} are {', '.join(possible)}; got {', '.join(others)}.")
        return (menu, *names) if names else menu
    if isinstance(formats, str):
        _ = MENUS[formats]  # raises an error that lists the menus
    if not isinstance(formats, Sequence) or not formats:
        raise FormatError(
            f"formats must be a sequence of names such as {DEFAULT_FORMATS[:3]}, or the name of a menu; got "
            f"{formats!r}. Write a single format as ('int4',)."
        )
    try:
        return tuple(dict.fromkeys(NumberFormat.parse(name).name for name in formats))
    except FormatError as error:
        menus = ", ".join(MENUS)
        raise FormatError(f"{error} {f'Menus are {menus}.' if menus else MENUS.hint}") from error


def _checked_options(config: CompressionConfig) -> dict[str, Any] | None:
    """Check and return the `topology_options` of a configuration in JSON-ready form.

    Returns:
        The options; None if there are none.

    Raises:
        BudgetError: a limit is out of range.
        TopologyError: the options are not a mapping, no family is given, or the family lacks one of the
            options.
    """
    options = config.topology_options
    if options is None or options == {}:
        return None
    if not isinstance(options, Mapping):
        raise TopologyError(f'topology_options must be a mapping such as {{"sites": 4}}, got {options!r}.')
    kept = dict(options)
    if kept.get("max_bond") is not None:  # NumPy integers become Python integers
        kept["max_bond"] = check_size("max_bond", kept["max_bond"], error=BudgetError)
    named = {key: value for key, value in options.items() if key not in NETWORK_LIMITS}
    if named and config.topology == AUTO:
        raise TopologyError(
            f"topology_options {sorted(named)} need the name of a family, such as topology='mpo'; "
            f"registered are {', '.join(topology_names())}. "
            f"Without it, the options are {' and '.join(NETWORK_LIMITS)}."
        )
    if named:
        family = topology_family(config.families[0])
        check_options(family.name, named, family.options)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}


def check_config(config: Any) -> None:
    """Check that `config` is a `CompressionConfig`.

    Raises:
        TypeError: it is not; the message shows its type.
    """
    advice = "write CompressionConfig(param_ratio=0.5), or CompressionConfig.from_dict for a dictionary"
    check_type("config", config, CompressionConfig, advice)

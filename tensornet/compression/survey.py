"""Surveys: the size and the predicted loss of every way to store every layer, from which plans are made.

A survey contains no weights, so it is a small file. A plan for any budget is computed from it in seconds.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tensornet._util import check_number, check_size, on_cpu_unless_said
from tensornet.calibration.stats import first_difference
from tensornet.compression.allocate import (
    MOST_ENTRY,
    Candidate,
    SurveyedLayer,
    choose_candidates,
    joined,
    uniform,
)
from tensornet.compression.candidates import hull_of
from tensornet.compression.config import SHARED_BUDGETS, CompressionConfig
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.compression.report import model_size
from tensornet.compression.shared_cores import SharedCandidate, choose_shared
from tensornet.errors import BudgetError, FormatError, TargetError
from tensornet.io import write_tensors
from tensornet.nn.storage import Storage
from tensornet.nn.targets import Target, list_weights
from tensornet.nn.unfuse import unfused
from tensornet.quantization.menus import MENUS
from tensornet.topology import Topology

SURVEY_VERSION = 5
#: Budgets that `Survey.plan` can change, since the candidates do not depend on them.
BUDGETS = ("param_ratio", *SHARED_BUDGETS)


@dataclass(frozen=True)
class Survey:
    """Candidates of all targeted layers; finding them is slow, but they are the same for all budgets.

    `tensornet.survey` makes a survey from batches, and `survey_from_stats` from calibration statistics.

    Args:
        config: the configuration.
        layers: the weights to compress and their candidates, in model order.
        template: a plan without layers, which contains the other results of calibration.
        untargeted: number of elements and number of bytes of all parameters that are not targeted, and all
            other bytes of the model's file; they count in budgets of the whole model.
        key: everything else that the predicted losses depend on, such as the text, by name.
        losses: losses of the dense model on the tokens that were read, to compare with the compressed model;
            empty if the losses are random.
        samples: four elements of every weight of the model, targeted or not, by name; they recognize the
            model. Weights that can only be read with their block have none.
        factors: moments of gradients by name of a module, as a diagonal and a low-rank factor (see
            `CalibrationStats`). Networks are fitted with them, and rounding feeds errors back along outputs.
        inputs: mean squares of the inputs of each weight, shape `(in,)`, and the number of its tokens, by
            name; they make up an importance matrix.
        heads: moments of the inputs of heads that are tied to an embedding, shape `(in, in)`, by name of the
            module; only if networks are candidates.
        shared: candidates of stacks whose networks share a core, if `config.share_experts` is set.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> batches = [(torch.randn(64, 64), torch.randint(8, (64,)))]
        >>> survey = tn.survey(model, batches, tn.CompressionConfig(bits_per_weight=4.25))
        >>> plans = [survey.plan(bits_per_weight=bits) for bits in (3.25, 6)]
        >>> plans[0].predicted_loss_increase > plans[1].predicted_loss_increase
        True
    """

    config: CompressionConfig
    layers: tuple[SurveyedLayer, ...]
    template: CompressionPlan
    untargeted: tuple[int, int, int] = (0, 0, 0)
    key: Mapping[str, str] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)
    factors: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    inputs: Mapping[str, tuple[Tensor, int]] = field(default_factory=dict, compare=False, repr=False)
    heads: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    shared: tuple[SharedCandidate, ...] = ()

    @torch.no_grad()
    @on_cpu_unless_said
    def plan(self, **budget: Any) -> CompressionPlan:
        """Compute the plan of least predicted loss for one budget.

        Args:
            budget: any of `param_ratio`, `bits_per_weight`, `max_bytes`, `loss_increase` and
                `tokens_per_second`; they replace the budgets of the configuration. `speeds` replace its
                speeds.

        Raises:
            BudgetError: the budget cannot be met; or it contains another limit, such as `max_bond`, which
                cannot be changed because the candidates depend on it.
        """
        if unknown := sorted(budget.keys() - {*BUDGETS, "speeds"}):
            raise BudgetError(
                f"The budget of a plan can be {', '.join(BUDGETS)}; got {', '.join(unknown)}. Survey "
                "the model again with other options."
            )
        config = replace(self.config, **{**dict.fromkeys(BUDGETS), **budget}) if budget else self.config
        config.check_says_how_far()
        objective = self.template.objective
        alone = self.config.formats is not None and config.one_format_keeps
        if config.needs_curvature and objective != "curvature" and not alone:
            raise BudgetError(
                f"{', '.join(budget)} needs predicted losses, but method={self.config.method!r} was surveyed "
                "without them. Survey the model with method='auto'."
            )
        if self.shared:
            choice = choose_shared(self.layers, self.shared, config, self.untargeted)
            return self.planned(choice.chosen, choice.bound_by, choice.shared)
        # Layers that need the same number format in the export target are planned as one.
        names = [layer.name for layer in self.layers]
        keys: dict[Hashable, list[int]] = {}
        for k, layer in enumerate(self.layers):
            key = k if config.menu is None else MENUS[config.menu].group(layer.name, layer.stack)
            keys.setdefault(key, []).append(k)
        groups = list(keys.values())
        options = [_joined([self.layers[k].candidates for k in group]) for group in groups]
        found, bound_by = choose_candidates(
            self.layers,
            [candidates for candidates, _ in options],
            config,
            objective,
            untargeted=self.untargeted,
            names=[", ".join(names[k] for k in group) for group in groups],
            shares=[self._share([self.layers[k] for k in group]) for group in groups],
        )
        chosen = [0] * len(names)
        for group, (_, places), index in zip(groups, options, found, strict=True):
            for k, place in zip(group, places[index], strict=True):
                chosen[k] = place
        return self.planned(chosen, bound_by)

    def _share(self, layers: Sequence[SurveyedLayer]) -> float:
        """Compute the share of tokens that are multiplied with the weights of a group of layers.

        It is 0 for tables, of which a token reads a row, and below 1 for the experts of a mixture.
        """
        tokens = int(self.key.get("tokens", 0))
        total = 0.0
        for layer in layers:
            count = self.inputs[layer.name][1] if layer.name in self.inputs else 0
            total += layer.numel * min(1.0, count / max(tokens, 1))
        return total / sum(x.numel for x in layers)

    def planned(
        self, chosen: Sequence[int], bound_by: str, shared: Sequence[SharedCandidate] = ()
    ) -> CompressionPlan:
        """Make the plan that consists of the chosen candidate of each layer.

        Args:
            chosen: index of the chosen candidate of each layer.
            bound_by: name of the tightest budget.
            shared: the chosen candidates of stacks that share a core, which replace those of their layers.
        """
        predicts = self.template.objective == "curvature"
        layers = []
        sharing = {name: x for x in shared for name in x.names}
        for layer, index in zip(self.layers, chosen, strict=True):
            stack = sharing.get(layer.name)
            candidate = layer.candidates[index] if stack is None else stack.candidate
            loss = candidate.predicted_loss / (1 if stack is None else len(stack.names))
            planned = LayerPlan(
                name=layer.name,
                shape=layer.shape,
                topology=candidate.topology,
                bound_by="dense" if candidate.topology is None else bound_by,
                error=candidate.error if stack is None else None,
                storage=candidate.storage,
                loss_increase=loss if predicts else None,
                curve=hull_of(layer.candidates) if predicts and stack is None else (),
                dtype=layer.dtype,
                sample=layer.sample,
                target=self.config.menu,
                shared_core=None if stack is None else (stack.core, stack.names[0]),
                grid=layer.grid,
            )
            layers.append(planned.with_baseline(layer.spectrum) if layer.spectrum else planned)
        return replace(self.template, layers=tuple(layers))

    def with_config(self, config: CompressionConfig) -> "Survey":
        """Return the survey for a configuration that differs from the first only in its budgets.

        Raises:
            BudgetError: the survey depends on an option that differs; the message names it.
        """
        for x in fields(config):
            if x.name not in (*BUDGETS, "speeds") and getattr(config, x.name) != getattr(self.config, x.name):
                raise BudgetError(
                    f"The survey was made with {x.name}={getattr(self.config, x.name)!r}, not "
                    f"{getattr(config, x.name)!r}. Use the same option, or survey the model again."
                )
        return replace(self, config=config)

    def check_model(self, model: nn.Module) -> None:
        """Check that the survey was made for this model; weights that are not surveyed are checked too.

        Budgets of the whole model count the bytes of all parameters, and a measured loss increase is compared
        with losses of the dense model, so a model that differs anywhere needs a survey of its own.

        Raises:
            TargetError: a weight is missing, has another size, or differs by more than its rounding to 16
                bits.
        """

        def refuse(why: str) -> TargetError:
            return TargetError(f"The survey was made for another model: {why}. Survey this model.")

        with unfused(model):
            weights = list_weights(model)
            known = {target.name: target for target in weights}
            for layer in self.layers:
                if layer.name not in known or tuple(known[layer.name].matrix.shape) != layer.shape:
                    raise refuse(f"this one has no weight {layer.name!r} of shape {layer.shape}")
            samples = {**self.samples, **{x.name: x.sample for x in self.layers}}
            if self.samples and (missing := sorted(self.samples.keys() - known.keys())):
                raise refuse(f"this one has no weight {missing[0]!r}")
            name = first_difference(samples, weights)
        if name is not None:
            raise refuse(f"the weight of {name!r} differs")
        # Names in the header of the file are those of the fused model.
        sizes = untargeted_sizes(model, [known[layer.name] for layer in self.layers])
        if sizes != self.untargeted:
            raise refuse(
                f"the weights that are not surveyed have {sizes[0]:,} parameters and {sizes[1]:,} bytes, not "
                f"{self.untargeted[0]:,} and {self.untargeted[1]:,}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the survey to a safetensors file, which replaces an existing file when it is complete.

        Raises:
            DestinationError: the file cannot be written.
        """
        schemes: dict[tuple[Topology | None, Storage], int] = {}
        layers = []
        for layer in self.layers:
            rows = [
                [
                    schemes.setdefault((x.topology, x.storage), len(schemes)),
                    *(getattr(x, y) for y in _NUMBERS),
                ]
                for x in layer.candidates
            ]
            facts = {"names": layer.names, "shape": layer.shape, "dtype": str(layer.dtype).split(".")[1]}
            facts |= {"sample": layer.sample, "spectrum": layer.spectrum, "stack": layer.stack}
            facts["candidates"] = rows
            layers.append(facts)
        shared = [
            [
                x.names,
                x.core,
                schemes.setdefault((x.candidate.topology, x.candidate.storage), len(schemes)),
                *(getattr(x.candidate, y) for y in _NUMBERS),
            ]
            for x in self.shared
        ]
        data = {
            "version": SURVEY_VERSION,
            "config": self.config.to_dict(),
            "key": dict(self.key),
            "losses": self.losses,
            "samples": self.samples,
            "untargeted": self.untargeted,
            "template": self.template.to_dict(),
            "schemes": [[t and t.to_dict(), storage.to_dict()] for t, storage in schemes],
            "layers": layers,
            "shared": shared,
        }
        data["tokens"] = {name: count for name, (_, count) in self.inputs.items()}
        tensors = {f"factor.{name}": x.contiguous() for name, x in self.factors.items()}
        tensors |= {f"inputs.{name}": x.contiguous() for name, (x, _) in self.inputs.items()}
        tensors |= {f"head.{name}": x.contiguous() for name, x in self.heads.items()}
        text = json.dumps(data)
        metadata = {"survey": text, "sha256": content_digest(text, tensors)}
        write_tensors(Path(path), tensors, metadata, what="The survey")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Survey":
        """Read a survey from a file that `save` wrote.

        Raises:
            FormatError: the file cannot be read, or does not contain a survey of this version.
        """
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                data = json.loads(metadata["survey"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["sha256"] != content_digest(metadata["survey"], tensors):
                raise ValueError("its checksum does not match, so the file is damaged")
            if data["version"] != SURVEY_VERSION:
                raise ValueError(f"it has version {data['version']}, expected {SURVEY_VERSION}")
            schemes = {
                place: (t and Topology.from_dict(t), Storage.from_dict(s))
                for place, (t, s) in enumerate(data["schemes"])
            }
            layers = tuple(
                SurveyedLayer(
                    _listed(x["names"], str),
                    _listed(x["shape"], int),
                    getattr(torch, x["dtype"]),
                    tuple(
                        Candidate(*schemes[place], **dict(zip(_NUMBERS, numbers, strict=True)))
                        for place, *numbers in x["candidates"]
                    ),
                    _listed(x["sample"], float),
                    _listed(x["spectrum"], float),
                    *_listed([x["stack"]], str),
                )
                for x in data["layers"]
            )
            parts: dict[str, dict[str, Tensor]] = {"factor": {}, "inputs": {}, "head": {}}
            for name, tensor in tensors.items():
                kind, _, layer = name.partition(".")
                parts[kind][layer] = tensor
            found = cls(
                CompressionConfig.from_dict(data["config"]),
                layers,
                CompressionPlan.from_dict(data["template"], complete=False),
                _listed(data["untargeted"], int),
                data["key"],
                _listed(data["losses"], float),
                {name: _listed(x, float) for name, x in data["samples"].items()},
                parts["factor"],
                {name: (x, int(data["tokens"][name])) for name, x in parts["inputs"].items()},
                parts["head"],
                tuple(
                    SharedCandidate(
                        _listed(names, str),
                        core,
                        Candidate(*schemes[place], **dict(zip(_NUMBERS, numbers, strict=True))),
                    )
                    for names, core, place, *numbers in data["shared"]
                ),
            )
            _check(found)
            return found
        except (
            OSError,
            SafetensorError,
            KeyError,
            ValueError,
            TypeError,
            IndexError,
            AttributeError,
            RecursionError,
            OverflowError,
        ) as error:
            raise FormatError(
                f"Cannot read a survey from {path}: {error}. Give a file of Survey.save, or of "
                "tensornet compress --survey."
            ) from error


#: Fields of a candidate that a file stores; its topology and storage are stored once for all layers.
_NUMBERS = tuple(x.name for x in fields(Candidate) if x.name not in ("topology", "storage"))


def _listed(values: Any, kind: type) -> tuple[Any, ...]:
    """Return the values of a list in a file as a tuple.

    Raises:
        TypeError: it is not a list, or a value has another type.
    """
    if not isinstance(values, list) or any(type(x) is not kind for x in values):
        raise TypeError(f"expected a list of {kind.__name__}, got {values!r:.60}")
    return tuple(values)


def _check(survey: Survey) -> None:
    """Check that a survey read from a file is consistent.

    Raises:
        ValueError, TypeError: the survey is inconsistent; the message says which part.
    """
    if not isinstance(survey.key, dict) or any(not isinstance(x, str) for x in survey.key.values()):
        raise TypeError(f"key must map names to texts, got {survey.key!r:.60}")
    if len(survey.untargeted) != 3 or min(survey.untargeted) < 0:
        raise ValueError(f"untargeted must be three sizes, got {survey.untargeted!r:.60}")
    names = [name for layer in survey.layers for name in layer.names]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"layer {twice[0]!r} is listed twice")
    for layer in survey.layers:
        if not layer.names or not layer.candidates or not isinstance(layer.dtype, torch.dtype):
            raise ValueError(f"layer {layer.names!r:.60} lacks names, candidates or a dtype")
        if len(layer.shape) != 2 or min(layer.shape) < 1 or math.prod(layer.shape) >= 2**63:
            raise ValueError(f"layer {layer.name!r} must have two sizes, got {layer.shape}")
        for candidate in layer.candidates:
            for name in ("num_bytes", "params", "tensors"):
                check_size(f"{name} of layer {layer.name!r}", getattr(candidate, name))
            for name in ("predicted_loss", "error", "cost"):
                check_number(f"{name} of layer {layer.name!r}", getattr(candidate, name))
            if not isinstance(candidate.number_format, str):
                raise TypeError(f"number_format must be a text, got {candidate.number_format!r:.60}")
            if candidate.topology is not None and candidate.topology.shape != layer.shape:
                raise ValueError(f"a topology of layer {layer.name!r} has shape {candidate.topology.shape}")
    for x in survey.shared:
        topology = x.candidate.topology
        if topology is None or x.core not in topology.core_names or not set(x.names) <= set(names):
            raise ValueError(f"the shared core {x.core!r} of {x.names!r:.60} is not that of known layers")
    shapes = {name: layer.shape for layer in survey.layers for name in layer.names}
    for name, factor in survey.factors.items():
        if factor.ndim != 2 or len(factor) not in shapes.get(name, ()) or not bool(factor.isfinite().all()):
            raise ValueError(f"the factor of layer {name!r} does not fit, or is not finite")
    for name, moment in survey.heads.items():
        if name not in shapes or moment.shape[-1] != shapes[name][1] or not bool(moment.isfinite().all()):
            raise ValueError(f"the moment of the head {name!r} does not fit, or is not finite")
    inputs = {layer.name: (layer.shape[1],) for layer in survey.layers}
    for name, (squares, _) in survey.inputs.items():
        if tuple(squares.shape) != inputs.get(name) or not bool(squares.isfinite().all()):
            raise ValueError(f"the inputs of layer {name!r} do not fit, or are not finite")


def content_digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 checksum of the content of a file: its text, and the bytes of its tensors."""
    checksum = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        checksum.update(name.encode())
        checksum.update(tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return checksum.hexdigest()


def _joined(group: Sequence[Sequence[Candidate]]) -> tuple[list[Candidate], list[tuple[int, ...]]]:
    """Make a joint candidate of several layers in each format; its size and loss are sums over the layers.

    Args:
        group: the candidates of each layer; a single layer keeps its candidates.

    Returns:
        The joint candidates, and for each of them the index of the candidate of each layer.
    """
    if len(group) == 1:
        return list(group[0]), [(k,) for k in range(len(group[0]))]
    by_format = [uniform(found) for found in group]
    places = [tuple(x[name] for x in by_format) for name in by_format[0] if all(name in x for x in by_format)]
    return [joined([found[k] for found, k in zip(group, x, strict=True)]) for x in places], places


def untargeted_sizes(model: nn.Module, targets: Sequence[Target]) -> tuple[int, int, int]:
    """Count what a plan does not compress.

    Returns:
        Number of elements and number of bytes of all parameters that are not targets, and all other bytes of
        the model's file.
    """
    params, size = model_size(model)
    return (
        params - sum(x.matrix.numel() for x in targets),
        size - sum(x.matrix.numel() * x.matrix.element_size() for x in targets),
        _other_bytes(model, targets, size),
    )


def _other_bytes(model: nn.Module, targets: Sequence[Target], size: int) -> int:
    """Bound the bytes of a safetensors file of a model that belong to no parameter: buffers and the header.

    Args:
        model: the dense model.
        targets: the weights to compress, whose entries in the header are counted with their candidates.
        size: bytes of the parameters.
    """
    state = {
        id(x): (name, x) for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)
    }
    buffers = sum(x.nbytes for _, x in state.values()) - size
    planned = {id(module.weight) for target in targets for module in target.modules}
    header = sum(MOST_ENTRY + len(name) for key, (name, _) in state.items() if key not in planned)
    return max(buffers, 0) + header

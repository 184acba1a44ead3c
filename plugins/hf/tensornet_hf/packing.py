"""Pack fine-tuned models of one base: each becomes a small change of the base, priced by its own loss.

A fine-tuned model differs a little from its base in every weight. `pack` stores the difference of each
matrix in the number format or low rank that a plan chooses for it, by the curvature of the fine-tuned model's
loss on its own text. The difference is taken to the base as it is stored: if the base is rounded, the change
repairs errors of the base where this costs few bytes. Biases, norms and other small tensors stay as they are.

Packed models are specialists (`PretrainedSpecialists`): one base in memory, with a model for each row.

Reference:
    Liu et al. 2024, "BitDelta" (one bit and a scale for each matrix of the difference).
"""

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tensornet as tn
from tensornet._util import compact_bytes
from tensornet.compression.apply import set_submodule
from tensornet.compression.config import DEFAULT_FORMATS, SHARED_BUDGETS, CompressionConfig
from tensornet.compression.loss_increase import LossIncrease, RecordedLosses, measure, record_losses
from tensornet.errors import BudgetError, CalibrationWarning, TargetError
from tensornet.network import TensorNetwork
from tensornet.nn.embedding import embedding_from_network
from tensornet.nn.layer_kinds import LayerKind, ScaledEmbedding, embedding_scale, kind_of, layer_kind
from tensornet.nn.linear import linear_from_network
from tensornet.nn.module import NetworkModule
from tensornet.topologies import dense
from tensornet_hf.checkpoint import load, read_dense, resolve_folder
from tensornet_hf.compress import CompressOptions, OptionError, calibration_batches, text_of
from tensornet_hf.specialist_files import (
    DESCRIPTION,
    PretrainedSpecialists,
    load_specialists,
    read_description,
)
from tensornet_hf.text import load_tokenizer
from tensornet_moe.changed_layers import Change, attach_changes, changes_of
from tensornet_moe.specialist_layers import check_name

#: Number formats of changes. They have no outliers, so that one scale for each row is enough.
CHANGE_FORMATS = ("int8:row", "int4:row", "int3:row", "int2:row", "int1:row")
#: File by which a folder of PEFT is recognized.
_ADAPTER = "adapter_config.json"
#: Largest number of elements of a tensor that is stored as it is, since it is no matrix of a layer.
_LARGEST_VALUE = 1 << 20
#: Smallest cosine of the weights of a model and of its base; models that were trained apart have about zero.
_LEAST_COSINE = 0.5
#: Largest factor by which the matrix of a change is multiplied, and the powers of factors that are tried.
_LARGEST_FACTOR, _POWERS = 8.0, (0.0, 0.25, 0.5, 0.75, 1.0)


class _Sum(nn.Module):
    """A layer of the base plus the difference of a fine-tuned model, as two layers.

    If `exact` is set, the layer computes with this difference in place of `scale * change`, and sums up two
    products over its inputs: of the outputs of `exact` with themselves, and with those of `change`.
    """

    def __init__(self, base_layer: nn.Module, change: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.change, self.scale = base_layer, change, 1.0
        self.exact: nn.Module | None = None
        self.exact_exact = self.exact_change = 0.0

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        change: Tensor = self.change(x)
        if self.exact is None:
            return y + self.scale * change.to(y.dtype)
        exact: Tensor = self.exact(x)
        self.exact_exact += float(exact.square().sum())
        self.exact_change += float((exact * change).sum())
        return y + exact.to(y.dtype)


@dataclass(frozen=True)
class PackedModel:
    """Facts on one fine-tuned model in a pack.

    Args:
        bytes: bytes of its change, with all tensors that are stored as they are.
        bits_per_weight: bytes of the changes of its matrices in bits, divided by their elements.
        measured: measured loss increase and divergence from the fine-tuned model, on calibration text.
        layers: number of layers by what is stored for their matrix.
        seconds: time that it took.
    """

    bytes: int
    bits_per_weight: float
    measured: LossIncrease | None
    layers: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class PackReport:
    """Result of `pack`; `print` shows a row for each model.

    Args:
        destination: the folder.
        models: facts on the models of this call, by name.
        others: names of the models that the folder contained before; their files did not change.

    Example:
        >>> from tensornet_hf.packing import PackedModel
        >>> law = PackedModel(240_000, 0.48, None, {"low_rank int4:row": 30}, seconds=60.0)
        >>> print(th.PackReport("pack", {"law": law}, others=("code",)))
        fine-tuned model             bytes    bits   KL divergence
        law                         240 kB   0.480
        unchanged: code
        written to  pack
    """

    destination: str
    models: dict[str, PackedModel]
    others: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'fine-tuned model':24}{'bytes':>10}{'bits':>8}{'KL divergence':>16}"]
        for name, x in self.models.items():
            kl = "" if x.measured is None or x.measured.kl_mean is None else f"{x.measured.kl_mean:.4f}"
            lines.append(f"{name:24}{compact_bytes(x.bytes):>10}{x.bits_per_weight:>8.3f}{kl:>16}".rstrip())
        if self.others:
            lines.append(f"unchanged: {', '.join(self.others)}")
        return "\n".join([*lines, f"written to  {self.destination}"])


def pack(
    base: str | Path,
    destination: str | Path,
    fine_tuned: Mapping[str, str | Path],
    config: CompressionConfig | None = None,
    *,
    calibration: str | Path | Mapping[str, str | Path] = "default",
    calibration_tokens: int | None = None,
    progress: bool = False,
) -> PackReport:
    """Store fine-tuned models as small changes of their base, in a folder of specialists.

    Each model is surveyed and planned on its own, and its change is rounded to the plan; then it is added to
    the folder. A call that was interrupted has packed the first models completely: repeat it with the others.
    The base, one fine-tuned model and their difference are in memory, in float32. `load_specialists` loads
    the folder. The loss of a packed model is not predicted, but measured on its calibration text.

    Args:
        base: folder or hub id of the base, dense or compressed by this library. The folder refers to it.
        destination: a new folder, or one that this function wrote for this base. The files of the models that
            it contains do not change.
        fine_tuned: folders or hub ids of the models by name, of the class and shapes of the base; or folders
            of LoRA adapters that PEFT has written for the base.
        config: budget, layers and formats. `bits_per_weight` counts the changes of matrices, and `max_bytes`
            the bytes of each model; without a budget, 0.5 bits per weight. Formats are `CHANGE_FORMATS` and
            low ranks unless the configuration lists others.
        calibration: text like the later input of each model, as in `CompressOptions`, by the name of the
            model; or one for all.
        calibration_tokens: see `CompressOptions`.
        progress: show progress bars.

    Raises:
        TargetError: a model is of another base, class, vocabulary or shape, or is equal to the base; or the
            folder is of another base.
        ValueError: a name is taken or not a word.
        OptionError: there are no models, or `calibration` names none of the models.
        BudgetError, FormatError, DestinationError: see `tensornet.compress` and
            `PretrainedSpecialists.save`.

    Example:
        >>> base, text = th.embedded.gpt2_path(), th.embedded.heldout_text()
        >>> model = th.load(base)
        >>> _ = model.transformer.h[0].mlp.c_fc.weight.data.mul_(1.01)
        >>> _ = th.save(model, "tuned", source=base)
        >>> report = th.pack(base, "pack", {"law": "tuned"})
        >>> th.load_specialists("pack").names, report.models["law"].layers
        (['law'], {'low_rank int4:row': 1})
    """
    if not fine_tuned:
        raise OptionError("pack needs fine-tuned models: {name: folder}.")
    texts = calibration if isinstance(calibration, Mapping) else dict.fromkeys(fine_tuned, calibration)
    if wrong := sorted(fine_tuned.keys() ^ texts.keys()):
        raise OptionError(
            f"calibration= needs a text for each of {', '.join(fine_tuned)} and for no others; "
            f"check {', '.join(wrong)}."
        )
    target, folder = Path(destination).expanduser().absolute(), resolve_folder(base)
    there = tuple(read_description(target).specialists) if (target / DESCRIPTION).is_file() else ()
    for k, name in enumerate(fine_tuned):
        check_name(name, [*there, *list(fine_tuned)[:k]])
    config = _with_defaults(config)
    found: dict[str, PackedModel] = {}
    for name, source in fine_tuned.items():
        options = CompressOptions(calibration=str(texts[name]), calibration_tokens=calibration_tokens)
        change, found[name] = _packed(folder, name, source, config, options, progress)
        model = load(folder)
        if (target / DESCRIPTION).is_file():
            s = _with_change(load_specialists(target, model), name, change)
        else:
            attach_changes(model, {name: change})
            s = PretrainedSpecialists(model)
        s.save(target, trunk=str(base))
    return PackReport(str(destination), found, there)


def _with_defaults(config: CompressionConfig | None) -> CompressionConfig:
    """Set formats and effort for changes unless formats are given, and 0.5 bits unless a budget is given."""
    config = CompressionConfig() if config is None else config
    changes: dict[str, Any] = {"target_modules": config.target_modules or "all"}
    if all(getattr(config, budget) is None for budget in SHARED_BUDGETS):
        changes["bits_per_weight"] = 0.5
    if config.formats is None or config.formats == DEFAULT_FORMATS:
        changes |= {"formats": CHANGE_FORMATS, "effort": "thorough"}
    return replace(config, **changes)


def _packed(
    folder: Path,
    name: str,
    source: str | Path,
    config: CompressionConfig,
    options: CompressOptions,
    progress: bool,
) -> tuple[dict[str, Change], PackedModel]:
    """Find the change of each layer for one fine-tuned model, by the name of the layer."""
    started = time.perf_counter()
    base = load(folder, dtype=torch.float32)
    fine = _fine_tuned(folder, base, name, source)
    text = text_of(options, folder)
    data = calibration_batches(fine, folder, config, options, text)
    values, sums = _as_sums(base, fine, name)
    del fine
    first: dict[int, str] = {}
    owners = {layer: first.setdefault(id(x.change.weight), layer) for layer, x in sums.items()}
    kept = sum(x.nbytes for of_layer in values.values() for x in of_layer.values())
    chosen = _chosen(config, sums, kept)
    given = data.batches if data is not None else ()
    before = record_losses(base, given, loss_fn=None if data is None else data.loss_fn)
    exact = {layer: x.change for layer, x in sums.items()}
    with warnings.catch_warnings():
        # Loss increases are predicted for errors that are independent of each other. The parts of a change
        # that are left out all pull the model back to its base, so predictions are far too small here.
        warnings.filterwarnings("ignore", "Compression increased the loss", CalibrationWarning)
        made = tn.compress(base, chosen, calibration=data, progress=progress)
    measured = None if before is None else _scale(base, sums, exact, owners, before)
    changes: dict[str, Change] = {}
    for layer in dict.fromkeys([*sums, *values]):
        matrix = _as_network(sums[layer].change) if layer in sums else None
        if matrix is not None and owners[layer] != layer:
            matrix.share_cores(changes[owners[layer]].matrix)  # type: ignore[arg-type]
        changes[layer] = Change(matrix, values.get(layer, {}), sums[layer].scale if layer in sums else 1.0)
    families: dict[str, int] = {}
    for planned in made.plan:
        scheme = planned.storage.number_format.name
        if planned.topology is not None and planned.topology.family != "dense":
            scheme = f"{planned.topology.family} {scheme}"
        families[scheme] = families.get(scheme, 0) + 1
    facts = PackedModel(
        made.plan.bytes_after + kept,
        made.plan.bits_per_weight,
        measured,
        families,
        time.perf_counter() - started,
    )
    return changes, facts


def _scale(
    model: nn.Module,
    sums: Mapping[str, _Sum],
    exact: Mapping[str, nn.Module],
    owners: Mapping[str, str],
    before: RecordedLosses,
) -> LossIncrease:
    """Choose the factors of all changes, on calibration data, in place.

    A rounded or truncated change `q` of a matrix has a smaller effect than the exact change `d`, in all
    layers in the same direction, back to the base. The factor `<d x, d x> / <q x, d x>` over the inputs `x`
    restores its effect, and increases the remaining error. Powers of these factors are tried; the first is 1.

    Args:
        model: the base with sums as layers.
        sums: the sums, with the changes of the plan.
        exact: the exact changes, as layers.
        owners: the first layer with the same weights, for each layer.
        before: the losses of the fine-tuned model.
    """
    for layer, x in sums.items():
        x.exact = exact[layer]
    measure(model, before)
    products: dict[str, list[float]] = {}
    for layer, x in sums.items():
        x.exact = None
        of_owner = products.setdefault(owners[layer], [0.0, 0.0])
        of_owner[0] += x.exact_exact
        of_owner[1] += x.exact_change
    factors = {x: min(max(a / b, 1.0), _LARGEST_FACTOR) if b > 0 else 1.0 for x, (a, b) in products.items()}
    best: tuple[float, float, LossIncrease] | None = None
    for power in _POWERS:
        _set_scales(sums, owners, factors, power)
        found = measure(model, before)
        divergence = found.mean if found.kl_mean is None else found.kl_mean
        if best is None or divergence < best[0]:
            best = divergence, power, found
    assert best is not None
    _set_scales(sums, owners, factors, best[1])
    return best[2]


def _set_scales(
    sums: Mapping[str, _Sum], owners: Mapping[str, str], factors: Mapping[str, float], power: float
) -> None:
    for layer, x in sums.items():
        x.scale = factors[owners[layer]] ** power


def _fine_tuned(folder: Path, base: PreTrainedModel, name: str, source: str | Path) -> PreTrainedModel:
    """Load a fine-tuned model in float32: a whole model, or a LoRA adapter that is merged into the base.

    Raises:
        TargetError: the model cannot be one of this base.
    """
    place = Path(source).expanduser()
    if (place / _ADAPTER).is_file():
        from tensornet_hf.peft import load_adapters, merge_adapters

        dense: PreTrainedModel = tn.decompress(load(folder, dtype=torch.float32))  # type: ignore[assignment]
        fine = merge_adapters(load_adapters(dense, place)).eval()
    else:
        place = resolve_folder(source)
        read_dense(place)
        fine = load(place, dtype=torch.float32)
        _check_vocabulary(folder, place, name)
    if type(fine) is not type(base):
        raise TargetError(
            f"{name!r} is a {type(fine).__name__}, but the base is a {type(base).__name__}. Give the base of "
            "which the model was made."
        )
    return fine


def _check_vocabulary(base: Path, fine: Path, name: str) -> None:
    """Raise TargetError if the tokenizers of two folders map some token to different numbers."""
    try:
        own, theirs = (load_tokenizer(x).get_vocab() for x in (base, fine))
    except (OSError, ValueError):  # a folder without tokenizer: only the shapes can be compared
        return
    moved = [x for x, number in own.items() if theirs.get(x, number) != number]
    if moved or not own.keys() <= theirs.keys():
        raise TargetError(
            f"{name!r} has another vocabulary than the base: {len(moved)} tokens have other numbers, and "
            f"{len(own.keys() - theirs.keys())} are missing. Give the base of which the model was made."
        )


@torch.no_grad()
def _as_sums(
    base: PreTrainedModel, fine: PreTrainedModel, name: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, _Sum]]:
    """Turn the base into the fine-tuned model, in place: base layers plus dense differences, and own values.

    Returns:
        Values that replace those of the base, by layer and name; and the new sums by the name of the layer.

    Raises:
        TargetError: the models have other layers or shapes, have unrelated weights, or are equal.
    """
    values: dict[str, dict[str, Tensor]] = {}
    sums: dict[str, _Sum] = {}
    changes: dict[int, nn.Parameter] = {}  # of tied weights
    dot = own_square = base_square = 0.0
    for layer, module in list(fine.named_modules()):
        tensors = dict(_own_tensors(module))
        if not tensors:
            continue
        try:
            old = base.get_submodule(layer)
        except AttributeError:
            raise _other_base(name, f"it has a layer {layer!r}") from None
        kind = kind_of(module)
        if kind is not None:
            matrix, before = kind.matrix(module), _matrix_of(old)
            if before is None or before.shape != matrix.shape:
                got = "no such matrix" if before is None else f"shape {tuple(before.shape)}"
                raise _other_base(name, f"{layer}.weight has shape {tuple(matrix.shape)}, in the base {got}")
            weight = module.weight
            assert isinstance(weight, Tensor)
            del tensors["weight"]
            if id(weight) not in changes:
                before = before.to(matrix)
                dot += float((before * matrix).sum())
                own_square += float(matrix.square().sum())
                base_square += float(before.square().sum())
            if id(weight) in changes or not torch.equal(before.to(matrix), matrix):
                change = _layer_like(kind, module, matrix - before)
                change.weight = changes.setdefault(id(weight), change.weight)  # type: ignore[arg-type]
                sums[layer] = _Sum(old, change)
        there = dict(_own_tensors(old))
        for key, value in tensors.items():
            if key not in there or there[key].shape != value.shape:
                raise _other_base(name, f"{layer}.{key} has the shape {tuple(value.shape)}")
            if torch.equal(there[key].to(value), value):
                continue
            if value.numel() > _LARGEST_VALUE:
                raise TargetError(
                    f"{name!r} changes {layer}.{key} of shape {tuple(value.shape)}, which is no matrix of a "
                    "linear layer or embedding, and too large to be stored as it is. Models whose experts "
                    "were trained cannot be packed."
                )
            values.setdefault(layer, {})[key] = value.detach().clone()
            there[key].copy_(value)
    if dot < _LEAST_COSINE * (own_square * base_square) ** 0.5:
        cosine = dot / max((own_square * base_square) ** 0.5, 1e-30)
        raise _other_base(name, f"the cosine of both models' weights is {cosine:.2f}")
    if not sums and not values:
        raise TargetError(f"{name!r} is equal to its base; leave it out.")
    for layer, made in sums.items():
        set_submodule(base, layer, made)
    return values, sums


def _other_base(name: str, why: str) -> TargetError:
    return TargetError(f"{name!r} is of another base: {why}. Give the base of which the model was made.")


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a module without its children, and the buffers that its state dict contains."""
    yield from module.named_parameters(recurse=False)
    stored = module.state_dict(keep_vars=True)
    yield from ((name, x) for name, x in module.named_buffers(recurse=False) if name in stored)


def _matrix_of(layer: nn.Module) -> Tensor | None:
    """Return the matrix of a dense or compressed layer, shape `(out, in)`; None if it has no matrix."""
    if isinstance(layer, NetworkModule):
        return layer.to_matrix()
    kind = kind_of(layer)
    return None if kind is None else kind.matrix(layer)


def _layer_like(kind: LayerKind, module: nn.Module, matrix: Tensor) -> nn.Module:
    """Build a dense layer with another matrix and without a bias: an embedding like the module, or linear."""
    if kind.name != "embedding":
        return layer_kind("linear").build(matrix, None)
    scale = embedding_scale(module)
    if scale is None:
        return kind.build(matrix, None)
    rows, columns = matrix.shape
    made = ScaledEmbedding(rows, columns, scale, device="meta")
    made.weight = nn.Parameter(matrix)
    return made


def _as_network(layer: nn.Module) -> NetworkModule:
    """Return a compressed layer, or a dense one, which the plan has kept, as a network of one core."""
    if isinstance(layer, NetworkModule):
        return layer
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    network = TensorNetwork(dense(out_features=weight.shape[0], in_features=weight.shape[1]), (weight.data,))
    if isinstance(layer, nn.Embedding):
        return embedding_from_network(network, scale=embedding_scale(layer))
    return linear_from_network(network, bias=None, source="linear")


def _chosen(config: CompressionConfig, sums: Mapping[str, _Sum], kept: int) -> CompressionConfig:
    """Choose the differences as the layers to compress, and convert a budget of bytes to bits per weight.

    Args:
        config: the configuration, whose patterns name layers of the base.
        sums: the layers that differ.
        kept: bytes of tensors that are stored as they are.
    """
    changes: dict[str, Any] = {"target_modules": [f"{layer}.change" for layer in sums]}
    if config.max_bytes is not None:
        elements = {id(x.change.weight): x.change.weight.numel() for x in sums.values()}  # type: ignore
        left = config.max_bytes - kept
        if left <= 0:
            raise BudgetError(
                f"max_bytes={config.max_bytes:,} is too small: biases, norms and other tensors that are "
                f"stored as they are take {kept:,} bytes. Allow more."
            )
        changes |= {"max_bytes": None, "bits_per_weight": 8 * left / sum(elements.values())}
    return replace(config, **changes)


def _with_change(
    specialists: PretrainedSpecialists, name: str, changes: Mapping[str, Change]
) -> PretrainedSpecialists:
    """Add a fine-tuned model to others that are attached to the same base, in place."""
    model, known = specialists.model, changes_of(specialists)
    specialists.detach()
    attach_changes(model, {**known, name: changes})
    return PretrainedSpecialists(model)

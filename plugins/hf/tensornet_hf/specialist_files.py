"""Folders of specialists: the shared cores once, a file for each specialist, and checksums of all weights.

A folder contains

- `specialists.json`: the trunk, the topology of each layer, and the specialists, with checksums;
- `shared.safetensors`: the shared cores, once, each keyed by `layer.core_k`;
- `NAME.safetensors`: the private cores of the specialist NAME.

Packed models (`pack`) have no shared cores. `specialists.json` describes the change of each layer for each
model, and `NAME.safetensors` contains the tensors of the changes. If the tokenizer, the chat template or the
generation settings of a model differ from those of the base, the folder `NAME` contains them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import tensornet_moe as tm
from tensornet._util import in_eval_mode
from tensornet.compression.surveying import tensor_digest
from tensornet.errors import DestinationError, FormatError, TargetError, TensorNetError
from tensornet.io import new_folder, restore
from tensornet.topology import Topology
from tensornet_hf.checkpoint import load, read_json
from tensornet_hf.specialist_exports import (
    export_specialist,
    merge_specialists,
    unpack_specialist,
)
from tensornet_hf.text import require_causal
from tensornet_hf.upcycling import UpcycleReport
from tensornet_moe.changed_layers import attach_changes, changes_of, describe_changes, load_changes
from tensornet_moe.specialist_layers import SpecialistLayer, attach, is_name

FORMAT_VERSION = 1
DESCRIPTION, SHARED = "specialists.json", "shared.safetensors"
#: Files that say how text is made of and for a model: tokenizer, chat template, generation settings.
_OF_TEXT = (
    "tokenizer*", "*.model", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template*", "generation_config.json",
)  # fmt: skip
#: Number of tokens at the beginning of a text by which its specialist is chosen.
_PREFIX = 64


class PretrainedSpecialists(tm.Specialists):
    """The specialists of a transformers model: `tensornet_moe.Specialists`, with files and exports.

    Args:
        model: a model prepared by `specialists` or `load_specialists`, or adapted by PEFT with a
            `tensornet_hf.peft.SpecialistsConfig`.

    Example:
        >>> s = th.specialists(th.load(th.embedded.gpt2_path()), rank=8)
        >>> s.add("python")
        >>> s.add("perl")
        >>> sorted(path.name for path in s.save("specialists").iterdir())
        ['perl.safetensors', 'python.safetensors', 'shared.safetensors', 'specialists.json']
        >>> s = th.load_specialists("specialists")
        >>> s.remove("perl")
        >>> s.names
        ['python']
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        #: Folders with the tokenizer of each specialist that has its own, by name; see `text_files`.
        self.tokenizers: dict[str, Path] = {}

    @torch.no_grad()
    def choose(self, **batch: Tensor) -> list[str | None]:
        """Choose a specialist for each text of a batch, for `use`: the one that finds the text most likely.

        The model runs once with each specialist and once without any, and the losses on the first 64 tokens
        are compared. If the trunk alone is at least as good, the choice is None. To generate text, choose for
        the prompts: `with s.use(s.choose(**inputs)): model.generate(**inputs)`.

        Args:
            batch: `input_ids` and, with padding, `attention_mask`, each `(rows, tokens)`.

        Raises:
            TargetError: the model is not a causal language model, or a text has fewer than two tokens.

        Example:
            >>> s = th.specialists(th.load(th.embedded.gpt2_path()), rank=8)
            >>> s.add("python")
            >>> s.choose(input_ids=torch.tensor([[3, 1, 4]]))  # not trained, so equal to the trunk
            [None]
        """
        require_causal(self.model)
        device = next(iter(self.layers.values())).weight.device
        ids, mask = batch["input_ids"].to(device), batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.to(device)
        order = mask.argsort(dim=1, descending=True, stable=True)[:, :_PREFIX]  # moves padding to the right
        ids, mask = ids.gather(1, order), mask.gather(1, order)
        if ids.shape[1] < 2 or bool((mask.sum(1) < 2).any()):
            raise TargetError(
                "A text of fewer than two tokens has no likelihood: give a longer text, or choose a "
                "specialist by name."
            )
        names: list[str | None] = [None, *self.names]
        losses = []
        for name in names:
            with self.use(name), in_eval_mode(self.model):
                logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            each = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            losses.append((each * mask[:, 1:]).sum(1))
        return [names[k] for k in torch.stack(losses).argmin(0).tolist()]

    def save(self, folder: str | os.PathLike[str], *, trunk: str | None = None, force: bool = False) -> Path:
        """Write the shared cores once, and a file for each specialist.

        To add specialists to a folder, load it, add and train them, and save to the same folder: the files of
        the others keep their contents. The trunk itself is not written.

        Args:
            folder: a new folder, or a folder of specialists.
            trunk: folder or hub id of the trunk, recorded for `load_specialists`; by default, what the model
                was loaded from.
            force: also replace a folder if specialists in it would be lost, or would change because the
                shared cores were trained since.

        Raises:
            DestinationError: the folder contains something else, or is protected as `force` says; nothing was
                written.
            TargetError: there is no specialist.
        """
        target = Path(folder).expanduser().absolute()
        if not self.names:
            raise TargetError("There is no specialist to save; call add(name) first.")
        parts = {"shared": _stored(self.tensors()), **{x: _stored(self.tensors(x)) for x in self.names}}
        digests = {name: tensor_digest([tensors]) for name, tensors in parts.items()}
        restore(target)
        old: Description | None = None
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            if not (target / DESCRIPTION).is_file():
                raise DestinationError(
                    f"{target} exists already, and is not a folder of specialists. Choose another name."
                )
            old = read_description(target)
            lost = sorted(set(old.specialists) - set(self.names))
            if lost and not force:
                raise DestinationError(
                    f"{target} also contains {', '.join(lost)}, which would be lost. Load all specialists "
                    "first, choose another folder, or remove them with force=True."
                )
            if old.shared != digests["shared"] and not force:
                raise DestinationError(
                    f"The shared cores were trained since {target} was written, so that its specialists "
                    f"{', '.join(old.specialists)} would change. Choose another folder, or replace them "
                    "with force=True; Specialists.movement says how much they moved."
                )
        path = (
            trunk or (old and old.trunk) or getattr(getattr(self.model, "config", None), "name_or_path", "")
        )
        if path and Path(path).expanduser().is_dir():
            path = str(Path(path).expanduser().resolve())
        by_id = {id(layer): name for name, layer in self.layers.items()}
        layers = {}
        for name, layer in self.layers.items():
            if not isinstance(layer, tm.SpecialistLinear):
                continue
            layers[name] = {"topology": layer.topology.to_dict(), "shared": list(layer.shared)}
            if layer.owners:
                layers[name]["owner"] = by_id[id(layer.owners[0])]
        changes = {name: describe_changes(x) for name, x in changes_of(self).items()}
        description = {
            "format_version": FORMAT_VERSION,
            "trunk": path or None,
            "weights": weight_digests(self.model),
            "shared": digests.pop("shared"),
            "layers": layers,
            "specialists": digests,
            **({"changes": changes} if changes else {}),
        }
        try:
            with new_folder(target, force=old is not None) as made:
                for name, tensors in parts.items():
                    save_file(tensors, made / f"{name}.safetensors", {"format": "pt"})
                for name in self.tokenizers.keys() & digests.keys():
                    (made / name).mkdir()
                    for title, origin in text_files(self.tokenizers[name]).items():
                        shutil.copyfile(origin, made / name / title)
                for file in () if old is None else target.iterdir():
                    if file.suffix != ".safetensors" and file.name != DESCRIPTION and file.is_file():
                        shutil.copyfile(file, made / file.name)
                text = json.dumps(description, indent=1) + "\n"
                (made / DESCRIPTION).write_text(text, encoding="utf-8")
        except OSError as error:
            raise DestinationError(f"Writing {target} failed: {error}. Nothing was changed there.") from error
        return target

    def unpack(
        self,
        name: str,
        destination: str | os.PathLike[str],
        *,
        target: str | None = None,
        source: str | os.PathLike[str] | None = None,
        force: bool = False,
    ) -> Path:
        """Write one specialist as a dense model of its own, which needs neither the trunk nor this library.

        Args:
            name: the specialist.
            destination: the new folder, or file of a target.
            target: an export target, such as `"gguf"` (see `tensornet_hf.export`); by default `"gguf"` for a
                name that ends in `.gguf`, else a folder for transformers.
            source: folder of the tokenizer; by default, that of the specialist or, if it has none of its own,
                what the trunk was loaded from.
            force: replace an existing model.

        Raises:
            TargetError: an unknown name, or the target cannot store this model.
            DestinationError: the destination exists already, or cannot be written.
            ValueError: an unknown target.
        """
        own = source or self.tokenizers.get(name)
        return unpack_specialist(self, name, destination, target=target, source=own, force=force)

    def export(
        self,
        name: str,
        destination: str | os.PathLike[str],
        *,
        target: str | None = None,
        rank: int | None = None,
        source: str | os.PathLike[str] | None = None,
        force: bool = False,
    ) -> Path:
        """Write one specialist as a LoRA adapter; the product of the adapter's factors is the change.

        | target | written | read by |
        |---|---|---|
        | `"peft"` | a folder | PEFT, vLLM; with a compressed trunk, `tensornet_hf.peft.load_adapters` |
        | `"gguf"` | one file | llama.cpp, together with the GGUF file of the trunk |
        | `"mlx"` | a folder | `mlx-lm` |

        Other export targets can be used too if they were registered with a function `adapter`.

        Factors that an adapter needs as one matrix, such as `A S_s`, are multiplied once; nothing else is
        rounded unless a `rank` is given. A packed model (`pack`) can be exported if it changes only linear
        layers, for example since it was a LoRA adapter; `unpack` writes any.

        Args:
            name: the specialist.
            destination: the new folder or file.
            target: a target of the table; by default `"gguf"` for a name that ends in `.gguf`, else
                `"peft"`.
            rank: largest rank of a layer's change. Changes of a higher rank, or of no low rank at all, are
                replaced by the closest matrix of this rank (truncated SVD). By default, changes are exact.
            source: folder of the trunk's tokenizer, which some architectures need for `"gguf"`.
            force: replace an existing adapter.

        Raises:
            TargetError: the changes are not of low rank and no `rank` is given, a packed model changes other
                tensors than the weights of linear layers, the name is unknown, or the target has no adapters
                for these layers.
            DestinationError: the destination exists already, or cannot be written.
            ValueError: an unknown target.
            BudgetError: the rank is not a positive number.
        """
        return export_specialist(
            self, name, destination, target=target, rank=rank, source=source, force=force
        )

    def merge(self, names: Sequence[str] | None = None, **options: Any) -> UpcycleReport:
        """Make specialists the experts of mixtures with routers, in the place of feed-forward networks.

        The trunk becomes a model as made by `tensornet_hf.upcycle(model, share="base")`: each expert is the
        dense network plus the change of one specialist. Its routers are new, so train the model, for example
        with only the routers unfrozen. There are no specialists afterwards.

        Args:
            names: the specialists, which become experts 0, 1, ...; all if absent.
            options: options of `tensornet_hf.upcycle` for the routing, such as `top_k=` (1 if absent),
                `router=`, `balance_coef=`.

        Raises:
            TargetError: layers outside of feed-forward networks have specialists, the trunk is compressed,
                changes are not of low rank, or there are fewer than two specialists; nothing was changed.
            ValueError: an option is out of its range; nothing was changed.
        """
        return merge_specialists(self, names, **options)


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def specialists(model: PreTrainedModel, **options: Any) -> PretrainedSpecialists:
    """Freeze a transformers model, and prepare its linear layers for specialists, in place.

    Args:
        model: the trunk: dense, compressed, or with mixtures (whose experts do not change).
        options: `rank`, `share`, `pool`, `target_modules` and `exclude_modules`; see
            `tensornet_moe.specialists`.

    Raises:
        TargetError, ShapeError, ValueError: see `tensornet_moe.specialists`.

    Example:
        >>> model = th.load(th.embedded.gpt2_path())
        >>> s = th.specialists(model, rank=8, share="ends")
        >>> s.add("python")
        >>> with s.use("python"):
        ...     loss = model(input_ids=torch.arange(10)[None], labels=torch.arange(10)[None]).loss
        >>> s.bytes()
        {'shared': 262144, 'python': 4096, 'next': 4096}
    """
    tm.specialists(model, **options)
    return PretrainedSpecialists(model)


def load_specialists(
    folder: str | os.PathLike[str],
    model: PreTrainedModel | None = None,
    *,
    names: Sequence[str] | None = None,
    check_trunk: bool = True,
) -> PretrainedSpecialists:
    """Load specialists, and their trunk unless a model is given. The shared cores are frozen.

    Args:
        folder: folder written by `PretrainedSpecialists.save`.
        model: the trunk; None loads what the folder names.
        names: the specialists to load; all if absent.
        check_trunk: refuse another trunk than that on which the specialists were trained: all its weights are
            compared, as rounded to bfloat16. Set it to False to use a trunk that was rounded to fewer bits
            since.

    Raises:
        FormatError: a file is missing, damaged, or was changed since the folder was written.
        TargetError: the model is another trunk, already has specialists, or a name is unknown.
        ShapeError: the layers of the model have other shapes.

    Example:
        >>> s = th.specialists(th.load(th.embedded.gpt2_path()), rank=8)
        >>> s.add("law")
        >>> s.add("code")
        >>> _ = s.save("two")
        >>> th.load_specialists("two", names=["code"]).names
        ['code']
    """
    path = Path(folder).expanduser()
    description = read_description(path)
    known = description.specialists
    wanted = list(known) if names is None else list(names)
    if unknown := sorted(set(wanted) - set(known)):
        raise TargetError(f"{path} has no specialist {', '.join(unknown)}; it has {', '.join(known)}.")
    digests = {"shared": description.shared, **{name: known[name] for name in wanted}}
    cores = {name: _read(path / f"{name}.safetensors", expected) for name, expected in digests.items()}
    if model is None:
        if not description.trunk:
            raise TargetError(f"{path} does not say where its trunk is: pass the trunk as model=.")
        model = load(description.trunk)
    if check_trunk:
        _check_trunk(model, description.weights)
    if description.changes:
        made = {name: load_changes(description.changes[name], cores[name]) for name in wanted}
        attach_changes(model, made)
        found = PretrainedSpecialists(model)
        found.tokenizers = {name: path / name for name in wanted if (path / name).is_dir()}
        return found
    for name, tensors in cores.items():
        if {key: tuple(x.shape) for key, x in tensors.items()} != description.shapes(shared=name == "shared"):
            raise FormatError(
                f"{path / name}.safetensors does not contain the cores that {path / DESCRIPTION} describes."
            )
    attach(model, description.layers)
    found = PretrainedSpecialists(model)
    for name in wanted:
        found.add(name)
    found.restore(cores)
    found.freeze()
    return found


def text_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder that contain a tokenizer, a chat template or generation settings."""
    return {x.name: x for pattern in _OF_TEXT for x in sorted(folder.glob(pattern)) if x.is_file()}


class Description(NamedTuple):
    """Content of `specialists.json`.

    Args:
        trunk: folder or hub id of the trunk; None if it is unknown.
        weights: checksum of each weight of the trunk, see `weight_digests`.
        shared: checksum of the shared cores.
        layers: the topology, the names of the shared cores, and the name of the layer that owns these (None
            for the layer itself), by the name of the layer.
        specialists: checksum of the private cores of each specialist, by name.
        changes: for packed models, the description of each change by layer (see `Change.spec`), by the name
            of the model; empty for other specialists.
    """

    trunk: str | None
    weights: dict[str, str]
    shared: str
    layers: dict[str, tuple[Topology, tuple[str, ...], str | None]]
    specialists: dict[str, str]
    changes: dict[str, dict[str, Any]]

    def shapes(self, *, shared: bool) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the shared or the private cores, by the keys of their file."""
        return {
            f"{layer}.core_{core}": shape
            for layer, (topology, cores, owner) in self.layers.items()
            for core, shape in topology.core_shapes.items()
            if (core in cores) == shared and not (shared and owner)
        }


def read_description(folder: Path) -> Description:
    """Read and check `specialists.json`.

    Raises:
        FormatError: the folder has no such file, or the file is damaged or of another version.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        raise FormatError(
            f"{folder} is not a folder of specialists: it has no {DESCRIPTION}. PretrainedSpecialists.save "
            "writes it."
        )
    entries = read_json(file)
    try:
        if (version := entries["format_version"]) != FORMAT_VERSION:
            raise ValueError(f"its version is {version!r}, and this library reads {FORMAT_VERSION}")
        layers: dict[str, tuple[Topology, tuple[str, ...], str | None]] = {}
        for name, form in entries["layers"].items():
            topology, owner = Topology.from_dict(form["topology"]), form.get("owner")
            shared = tuple(form["shared"])
            if (
                not isinstance(form["shared"], list)
                or not set(shared) < set(topology.core_names)
                or (owner is not None and owner not in layers)
            ):
                raise ValueError(f"the entry of the layer {name!r} is wrong")
            layers[name] = topology, shared, owner
        found = Description(
            None if entries["trunk"] is None else _text(entries["trunk"]),
            {name: _text(x) for name, x in entries["weights"].items()},
            _text(entries["shared"]),
            layers,
            {name: _text(x) for name, x in entries["specialists"].items()},
            {name: dict(x) for name, x in entries.get("changes", {}).items()},
        )
        if wrong := [name for name in found.specialists if not is_name(name)]:
            raise ValueError(f"a specialist cannot be named {wrong[0]!r}")
        if not (layers or found.changes) or not found.specialists:
            raise ValueError("it has no layers or no specialists")
        if found.changes and (layers or found.changes.keys() != found.specialists.keys()):
            raise ValueError("it does not describe the changes of each model")
    except (AttributeError, KeyError, TypeError, ValueError, TensorNetError) as error:
        raise FormatError(
            f"{file} is damaged, or of another version: {type(error).__name__}: {error}. Restore the file, "
            "or save the specialists again."
        ) from error
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {value!r}")
    return value


@torch.no_grad()
def weight_digests(model: nn.Module) -> dict[str, str]:
    """Return a checksum of each weight of a trunk by name, whether specialists are attached to it or not.

    Numbers are rounded to bfloat16 first, so that a trunk in this dtype is recognized too.
    """
    layers = {name for name, part in model.named_modules() if isinstance(part, SpecialistLayer)}
    found = {}
    for key, value in model.state_dict().items():
        outer, _, inner = key.rpartition(".base_layer.")
        if outer in layers:
            key = f"{outer}.{inner}"
        elif not isinstance(value, Tensor) or any(key.startswith(f"{name}.") for name in layers):
            continue  # a core of the specialists
        tensor = value.bfloat16() if value.is_floating_point() else value
        state = hashlib.sha256(repr(tuple(value.shape)).encode())
        state.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
        found[key] = state.hexdigest()[:16]
    return found


def _check_trunk(model: nn.Module, expected: Mapping[str, str]) -> None:
    """Check that the weights of a model are those with which the specialists were saved.

    Raises:
        TargetError: a weight is missing, or has other values.
    """
    found = weight_digests(model)
    if wrong := sorted(x for x in found.keys() | expected.keys() if found.get(x) != expected.get(x)):
        raise TargetError(
            f"These specialists are of another trunk: {len(wrong)} of its {len(expected)} weights differ or "
            f"are missing, such as {', '.join(wrong[:3])}. Load the trunk that they were trained on; if it "
            "was only rounded to few bits since, pass check_trunk=False."
        )


def _read(file: Path, expected: str) -> dict[str, Tensor]:
    """Read the cores of a file with a known checksum."""
    try:
        found = load_file(file)
    except Exception as error:  # safetensors raises its own class and OSError
        raise FormatError(f"{file} is missing or damaged: {error}.") from error
    if tensor_digest([found]) != expected:
        raise FormatError(
            f"{file} was changed since {file.with_name(DESCRIPTION)} was written, so that it would "
            "compute something else. Restore the file."
        )
    return found

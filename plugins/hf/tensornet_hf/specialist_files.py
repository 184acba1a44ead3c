"""Folders of specialists: the shared cores once, a file for each specialist, and what the trunk was.

A folder contains

- `specialists.json`: the trunk, the topology of each layer, and the specialists;
- `shared.safetensors`: the shared cores, once, each keyed by `layer.core_k`;
- `NAME.safetensors`: the private cores of the specialist NAME;
- `router.safetensors`: the router, if there is one.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import tensornet_moe as tm
from tensornet._util import check_size, in_eval_mode
from tensornet.compression.survey import digest
from tensornet.errors import DestinationError, FormatError, TargetError
from tensornet.io import new_folder, restore
from tensornet.topology import Topology
from tensornet_hf.checkpoint import load, read_json
from tensornet_hf.specialist_exports import export_specialist, merge_specialists
from tensornet_hf.text import require_causal
from tensornet_hf.upcycling import UpcycleReport
from tensornet_moe.specialist_layers import attach, layer_shape
from tensornet_moe.specialist_routers import Scope

FORMAT_VERSION = 1
DESCRIPTION, SHARED = "specialists.json", "shared.safetensors"
ROUTER_FILE = "router.safetensors"
#: Attribute of the model that contains the router.
ROUTER = "specialist_router"
#: Number of outputs of each trunk layer, for a fixed input, by which a folder recognizes its trunk.
_PROBED = 8
#: Number of tokens at the beginning of a text by which its specialist is chosen.
_PREFIX = 64
#: Number of hidden states, evenly spaced, that a router reads.
_STATES = 5
#: Largest relative difference of these outputs; rounding the trunk to bfloat16 changes them by about 0.004.
_SAME_TRUNK = 0.02


class Specialists(tm.Specialists):
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

    @property
    def router(self) -> tm.SpecialistRouter | None:
        """The router, which the model owns; None before `fit_router`."""
        return getattr(self.model, ROUTER, None)

    def remove(self, name: str) -> None:
        """Remove a specialist; no other one changes, and the router no longer chooses it."""
        super().remove(name)
        if self.router is not None:
            setattr(self.model, ROUTER, self.router.without(name))

    @torch.no_grad()
    def fit_router(
        self,
        loaders: Mapping[str, Iterable[Mapping[str, Tensor]]],
        *,
        scope: Scope = "sequence",
        top_k: int = 1,
        prefix: int = _PREFIX,
        **options: Any,
    ) -> dict[str, float]:
        """Fit a router that chooses specialists from hidden states of the trunk.

        The router reads up to five hidden states, from the embeddings to the last one. `route` first runs the
        trunk alone. The choice is then the same in all layers, so a router costs one more pass over what it
        reads. A choice by likelihood (see `route`) costs one pass for each specialist, and is better.

        Args:
            loaders: batches of each domain, by the name of its specialist. Draw about a thousand texts from
                all parts of a domain: a router that reads only its beginning chooses worse.
            scope: `"sequence"`: one choice for a text, from its beginning; `"token"`: one for each token.
            top_k: number of specialists for each choice.
            prefix: number of tokens at the beginning of a text that `scope="sequence"` reads.
            options: `steps`, `weight_decay` and `seed` of `tensornet_moe.SpecialistRouter.fit`.

        Returns:
            The share of correct choices for each domain, on a fifth of the examples that is held out.

        Raises:
            TargetError: an unknown specialist, fewer than two domains, or a domain with too little text; an
                earlier router stays.
            ValueError: an option is out of its range.
        """
        for name in loaders:
            self.tensors(name)  # raises an error if the name is unknown
        check_size("prefix", prefix, error=ValueError)
        examples: dict[str, Tensor] = {}
        router: tm.SpecialistRouter | None = None
        for name, batches in loaders.items():
            seen = []
            for batch in batches:
                features, mask = self._features(batch, prefix if scope == "sequence" else None)
                if router is None:
                    names, choice = list(loaders), {"scope": scope, "top_k": top_k, "prefix": prefix}
                    router = tm.SpecialistRouter(names, features.shape[-1], **choice)  # type: ignore[arg-type]
                    router.to(features.device)
                found = router.pooled(features, mask)
                seen.append(found if scope == "sequence" else found[mask.bool()])
            if not seen:
                raise TargetError(f"Too little text for {name!r}: its loader has no batch.")
            examples[name] = torch.cat(seen)
        if router is None:
            raise TargetError("A router needs the texts of at least two specialists, got none.")
        accuracy = router.fit(examples, **options)
        setattr(self.model, ROUTER, router)
        return accuracy

    def _beginning(self, batch: Mapping[str, Tensor], prefix: int | None) -> tuple[Tensor, Tensor]:
        """Return the first tokens of each text, with padding moved to the right, and their mask.

        Without a prefix, all tokens stay where they are.
        """
        device = next(iter(self.layers.values())).weight.device
        ids, mask = batch["input_ids"].to(device), batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.to(device)
        if prefix is None:
            return ids, mask
        order = mask.argsort(dim=1, descending=True, stable=True)[:, :prefix]
        return ids.gather(1, order), mask.gather(1, order)

    def _features(self, batch: Mapping[str, Tensor], prefix: int | None) -> tuple[Tensor, Tensor]:
        """Return hidden states of the trunk for each token of a batch, and the mask of the tokens."""
        ids, mask = self._beginning(batch, prefix)
        reader: Any = self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model
        with self.use(None), in_eval_mode(self.model):
            states = reader(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        last = len(states) - 1
        index = sorted({round(k * last / (_STATES - 1)) for k in range(_STATES)})
        return torch.cat([states[k] for k in index], -1), mask

    @torch.no_grad()
    def route(
        self, *, by: Literal["router", "likelihood"] | None = None, **batch: Tensor
    ) -> dict[str, Tensor]:
        """Choose specialists for a batch, as weights for `use`.

        By likelihood, a text gets the specialist with the lowest loss on its first 64 tokens. All specialists
        are compared, also those that were added after a router was fitted. A text of a domain that no
        specialist knows goes to the most similar specialist. To generate text, route the prompts, with a
        router of `scope="sequence"` or by likelihood:
        `with s.use(s.route(**inputs)): model.generate(**inputs)`.

        Args:
            by: `"router"`: one pass of the trunk, then the router; `"likelihood"`: one pass with each
                specialist. By default, the router if there is one.
            batch: `input_ids` and, with padding, `attention_mask`, each `(rows, tokens)`.

        Returns:
            Weights by name, each `(rows,)` or `(rows, tokens)`.

        Raises:
            TargetError: `by="router"`, but no router was fitted; or a choice by likelihood, but there is no
                specialist, the model is not a causal language model, or a text has fewer than two tokens.
            ValueError: `by` is unknown.

        Example:
            >>> s = th.specialists(th.load(th.embedded.gpt2_path()), rank=8)
            >>> s.add("python")
            >>> s.route(input_ids=torch.tensor([[3, 1, 4]]))
            {'python': tensor([1.])}
        """
        if by not in (None, "router", "likelihood"):
            raise ValueError(f"Unknown by={by!r}; choose 'router', 'likelihood' or None.")
        router = None if by == "likelihood" else self.router
        if router is not None:
            features = self._features(batch, router.prefix if router.scope == "sequence" else None)
            found: dict[str, Tensor] = router(*features)
            return found
        if by == "router":
            raise TargetError(
                "There is no router; call fit_router({name: batches of its domain}) first, or choose by "
                "likelihood."
            )
        if not self.names:
            raise TargetError("There is no specialist to choose; call add(name) first.")
        require_causal(self.model)
        ids, mask = self._beginning(batch, _PREFIX)
        if ids.shape[1] < 2 or bool((mask.sum(1) < 2).any()):
            raise TargetError(
                "A text of fewer than two tokens has no likelihood: give a longer text, fit a router, or "
                "choose a specialist by name."
            )
        losses = []
        for name in self.names:
            with self.use(name), in_eval_mode(self.model):
                logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            each = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            losses.append((each * mask[:, 1:]).sum(1))
        best = torch.stack(losses).argmin(0)
        return {name: (best == k).float() for k, name in enumerate(self.names)}

    def detach(self) -> None:
        """Put the layers of the trunk back, and remove the router; the specialists are lost unless saved."""
        super().detach()
        if self.router is not None:
            delattr(self.model, ROUTER)

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
        shared = {key: core.detach().cpu() for key, core in self.tensors().items()}
        state = digest([shared])
        restore(target)
        old: dict[str, Any] = {}
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            if not (target / DESCRIPTION).is_file():
                raise DestinationError(
                    f"{target} exists already, and is not a folder of specialists. Choose another name."
                )
            old = read_description(target)
            lost = sorted(set(old["specialists"]) - set(self.names))
            if lost and not force:
                raise DestinationError(
                    f"{target} also contains {', '.join(lost)}, which would be lost. Load all specialists "
                    "first, choose another folder, or remove them with force=True."
                )
            if old["shared"] != state and not force:
                raise DestinationError(
                    f"The shared cores were trained since {target} was written, so that its specialists "
                    f"{', '.join(old['specialists'])} would change. Choose another folder, or replace them "
                    "with force=True; Specialists.movement says how much they moved."
                )
        path = trunk or old.get("trunk") or getattr(getattr(self.model, "config", None), "_name_or_path", "")
        if path and Path(path).expanduser().is_dir():
            path = str(Path(path).expanduser().resolve())
        by_id = {id(layer): name for name, layer in self.layers.items()}
        layers = {}
        for name, layer in self.layers.items():
            layers[name] = {"topology": layer.topology.to_dict(), "shared": list(layer.shared)}
            if layer.owners:
                layers[name]["owner"] = by_id[id(layer.owners[0])]
        description = {
            "format_version": FORMAT_VERSION,
            "trunk": path or None,
            "probe": probe(self),
            "shared": state,
            "layers": layers,
            "specialists": {name: f"{name}.safetensors" for name in self.names},
        }
        if (router := self.router) is not None:
            options = {name: getattr(router, name) for name in ("names", "scope", "top_k", "prefix")}
            description["router"] = {**options, "num_features": router.num_features}
        try:
            with new_folder(target, force=bool(old)) as made:
                save_file(_stored(shared), made / SHARED, {"format": "pt"})
                for name in self.names:
                    own = _stored(self.tensors(name))
                    save_file(own, made / f"{name}.safetensors", {"shared": state})
                if router is not None:
                    save_file(_stored(router.state_dict()), made / ROUTER_FILE)
                for file in () if not old else target.iterdir():
                    if file.suffix != ".safetensors" and file.name != DESCRIPTION and file.is_file():
                        shutil.copyfile(file, made / file.name)
                text = json.dumps(description, indent=1) + "\n"
                (made / DESCRIPTION).write_text(text, encoding="utf-8")
        except OSError as error:
            raise DestinationError(f"Writing {target} failed: {error}. Nothing was changed there.") from error
        return target

    def export(
        self,
        name: str,
        destination: str | os.PathLike[str],
        *,
        target: str | None = None,
        source: str | os.PathLike[str] | None = None,
        force: bool = False,
    ) -> Path:
        """Write one specialist as a LoRA adapter; the product of the adapter's factors is the change.

        | target | written | read by |
        |---|---|---|
        | `"peft"` | a folder | PEFT, vLLM; with a compressed trunk, `tensornet_hf.peft.load_adapters` |
        | `"gguf"` | one file | llama.cpp, together with the GGUF file of the trunk |
        | `"mlx"` | a folder | `mlx-lm` |

        Factors that an adapter needs as one matrix, such as `A S_s`, are multiplied once; nothing else is
        rounded.

        Args:
            name: the specialist.
            destination: the new folder or file.
            target: `"peft"`, `"gguf"` or `"mlx"`; by default `"gguf"` for a name that ends in `.gguf`, else
                `"peft"`.
            source: folder of the trunk's tokenizer, which some architectures need for `"gguf"`.
            force: replace an existing adapter.

        Raises:
            TargetError: the changes are not of low rank (`share="center"`), the name is unknown, or the
                target has no adapters for these layers.
            DestinationError: the destination exists already, or cannot be written.
            ValueError: an unknown target.
        """
        return export_specialist(self, name, destination, target=target, source=source, force=force)

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


def specialists(model: PreTrainedModel, **options: Any) -> Specialists:
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
    return Specialists(model)


def load_specialists(
    folder: str | os.PathLike[str],
    model: PreTrainedModel | None = None,
    *,
    names: Sequence[str] | None = None,
    check_trunk: bool = True,
) -> Specialists:
    """Load specialists, and their trunk unless a model is given. The shared cores are frozen.

    Args:
        folder: folder written by `Specialists.save`.
        model: the trunk; None loads what the folder names.
        names: the specialists to load; all if absent.
        check_trunk: refuse another trunk than that on which the specialists were trained. Set it to False to
            use them with a trunk that was rounded to few bits since.

    Raises:
        FormatError: a file is missing or damaged, or a specialist was trained with other shared cores.
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
    known = description["specialists"]
    wanted = list(known) if names is None else list(names)
    if unknown := sorted(set(wanted) - set(known)):
        raise TargetError(f"{path} has no specialist {', '.join(unknown)}; it has {', '.join(known)}.")
    shared = _read(path / SHARED)
    if digest([shared]) != description["shared"]:
        raise FormatError(
            f"{path / SHARED} was changed since {path / DESCRIPTION} was written: somebody trained the "
            "shared cores, so that these specialists would compute something else. Restore the file."
        )
    own = {}
    for name in wanted:
        file = path / known[name]
        own[name] = _read(file)
        with safe_open(file, "pt") as opened:
            trained_with = (opened.metadata() or {}).get("shared")
        if trained_with != description["shared"]:
            raise FormatError(
                f"{file} was trained with other shared cores than {path / SHARED}, so that it would compute "
                "something else. Take both from one folder."
            )
    forms = {
        name: (Topology.from_dict(form["topology"]), tuple(form["shared"]), form.get("owner"))
        for name, form in description["layers"].items()
    }
    router = None
    if options := description.get("router"):
        router = tm.SpecialistRouter(**options)
        try:
            router.load_state_dict(_read(path / ROUTER_FILE))
        except RuntimeError as error:
            raise FormatError(f"{path / ROUTER_FILE} is not the router of {path / DESCRIPTION}.") from error
        router.requires_grad_(False)
    if model is None:
        if not description["trunk"]:
            raise TargetError(f"{path} does not say where its trunk is: pass the trunk as model=.")
        model = load(description["trunk"])
    shapes: dict[bool, dict[str, tuple[int, ...]]] = {True: {}, False: {}}  # by "is shared"
    for layer, (topology, cores, owner) in forms.items():
        for core, shape in topology.core_shapes.items():
            if core not in cores or owner is None:
                shapes[core in cores][f"{layer}.core_{core}"] = shape
    for file_name, tensors in ((SHARED, shared), *((known[name], own[name]) for name in wanted)):
        if {key: tuple(x.shape) for key, x in tensors.items()} != shapes[file_name == SHARED]:
            raise FormatError(
                f"{path / file_name} does not contain the cores that {path / DESCRIPTION} describes."
            )
    if check_trunk:
        _check_trunk(model, description["probe"])
    attach(model, forms)
    found = Specialists(model)
    for name in wanted:
        found.add(name)
    found.restore({"shared": shared, **own})
    found.freeze()
    if router is not None:
        router.to(next(iter(found.layers.values())).weight.device)
        for name in set(known) - set(wanted):
            router = None if router is None else router.without(name)
        setattr(model, ROUTER, router)
    return found


def read_description(folder: Path) -> dict[str, Any]:
    """Read `specialists.json`, and check its version and entries.

    Raises:
        FormatError: the folder has no such file, or the file is damaged or of another version.
    """
    if not (folder / DESCRIPTION).is_file():
        raise FormatError(
            f"{folder} is not a folder of specialists: it has no {DESCRIPTION}. Specialists.save writes it."
        )
    description = read_json(folder / DESCRIPTION)
    entries = {"format_version", "trunk", "probe", "shared", "layers", "specialists"}
    if not entries <= description.keys() or description["format_version"] != FORMAT_VERSION:
        raise FormatError(
            f"{folder / DESCRIPTION} is damaged, or of another version than {FORMAT_VERSION}: it has the "
            f"entries {sorted(description)}."
        )
    return description


@torch.no_grad()
def probe(specialists: tm.Specialists) -> dict[str, list[float]]:
    """Return the first outputs of each trunk layer for a fixed input, by which its weights are recognized."""
    return {name: _outputs(layer.base_layer) for name, layer in specialists.layers.items()}


def _outputs(layer: nn.Module) -> list[float]:
    drawn = torch.randn(1, layer_shape(layer)[1], generator=torch.Generator().manual_seed(0), device="cpu")
    weight: Any = layer.weight
    y = layer(drawn.to(weight.device, weight.dtype))
    return [round(float(value), 6) for value in y[0, :_PROBED].float().cpu()]


@torch.no_grad()
def _check_trunk(model: nn.Module, expected: Mapping[str, list[float]]) -> None:
    """Check that the layers of a model are those on which the specialists were trained.

    Raises:
        TargetError: a layer is missing, or computes something else.
    """
    for name, values in expected.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise TargetError(
                f"These specialists are of another trunk: {type(model).__name__} has no layer {name!r}."
            ) from None
        if isinstance(layer, tm.SpecialistLinear):
            layer = layer.base_layer
        old, new = torch.tensor(values), torch.tensor(_outputs(layer))
        if not torch.linalg.vector_norm(new - old) <= _SAME_TRUNK * torch.linalg.vector_norm(old):
            raise TargetError(
                f"These specialists are of another trunk: {name!r} computes {_outputs(layer)[:3]} where the "
                f"trunk of the specialists computed {values[:3]}. Load the trunk that they were trained on; "
                "if it was only rounded to few bits since, pass check_trunk=False."
            )


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises its own class and OSError
        raise FormatError(f"{file} is missing or damaged: {error}.") from error

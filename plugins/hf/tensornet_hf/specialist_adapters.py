"""Specialists as a method of PEFT: adapters by name that share their large cores.

Importing this module registers the method `"SPECIALISTS"`. Typical use:

    from tensornet_hf.peft import SpecialistsConfig

    model = peft.get_peft_model(trunk, SpecialistsConfig(r=16), adapter_name="law")
    model.add_adapter("code", SpecialistsConfig(r=16))  # the shared cores are frozen from here on
    model(input_ids=ids, adapter_names=["law", "code", "__base__"])
    model.save_pretrained(folder)

Each folder of PEFT contains one adapter with its shared cores.
`tensornet_hf.PretrainedSpecialists(model).save(folder)` writes one folder with the shared cores once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet._util import require

require(("peft",), extra="peft", user="Specialists as adapters of PEFT")

from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from tensornet.errors import TargetError
from tensornet.nn.targets import LayerSelection
from tensornet_moe.sharing import Share
from tensornet_moe.specialist_layers import (
    SpecialistLinear,
    Specialists,
    adaptable_layers,
    change_form,
    layer_shape,
)

#: Name of the method in PEFT's tables and in `adapter_config.json`.
PEFT_METHOD = "SPECIALISTS"
#: Name that PEFT uses in `adapter_names` for rows without an adapter.
TRUNK = "__base__"


@dataclass
class SpecialistsConfig(PeftConfig):
    """Configuration of specialists for PEFT; see `tensornet_moe.specialists`.

    Args:
        r: rank of the changes.
        share: what the specialists of a layer share: `"none"`, `"in"`, `"out"`, `"ends"` or `"center"`.
        pool: `"shape"`: all layers with matrices of one shape share one set of shared cores.
        target_modules: layers to adapt, as in PEFT; by default all linear layers, dense or compressed, except
            output heads.
        exclude_modules: layers to skip, as in PEFT.

    Example:
        >>> import peft
        >>> from tensornet_hf.peft import SpecialistsConfig
        >>> trunk = th.load(th.embedded.gpt2_path())
        >>> model = peft.get_peft_model(trunk, SpecialistsConfig(r=8), adapter_name="law")
        >>> model.add_adapter("code", SpecialistsConfig(r=8))
        >>> th.PretrainedSpecialists(model.get_base_model()).names
        ['law', 'code']
    """

    r: int = field(default=32)
    share: Share = field(default="ends")
    pool: Literal["shape"] | None = field(default=None)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_METHOD
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                setattr(self, name, set(value))


class SpecialistAdapterLinear(SpecialistLinear, BaseTunerLayer):  # type: ignore[misc]  # bias may be None
    """`SpecialistLinear` whose specialists are adapters of PEFT; the active adapters are in use."""

    def __init__(self, base_layer: nn.Module, *form: Any) -> None:
        super().__init__(base_layer, *form)
        self.merged_adapters: list[str] = []

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Use these specialists, and train no others."""
        BaseTunerLayer.set_adapter(self, adapter_names, inference_mode)
        self._follow()

    def enable_adapters(self, enabled: bool) -> None:
        """Use the active specialists, or only the trunk."""
        BaseTunerLayer.enable_adapters(self, enabled)
        self._follow()

    def _follow(self) -> None:
        """Set the specialists in use to PEFT's active adapters."""
        active = () if self.disable_adapters else self.active_adapters
        self.parts = tuple((name, 1.0) for name in active if name in self.specialists)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge.

        Raises:
            TargetError: always.
        """
        raise TargetError(
            "Merging would lose the other specialists. Export one as a LoRA adapter, by "
            "tensornet_hf.PretrainedSpecialists(model).export(name, folder), and merge that."
        )

    def unmerge(self) -> None:
        """Do nothing: specialists are never merged."""


class SpecialistsModel(BaseTuner):
    """Model with specialists for PEFT; `peft.get_peft_model` builds it."""

    prefix = "specialists_"
    tuner_layer_cls = SpecialistAdapterLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (PEFT declares the type)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules in (None, "all-linear"):
            known = [n for n, x in self.model.named_modules() if isinstance(x, SpecialistLinear)]
            peft_config.target_modules = set(known or adaptable_layers(self.model, LayerSelection()))
        return peft_config

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        for other in self.peft_config.values():
            for name in ("r", "share", "pool"):
                if getattr(other, name) != getattr(config, name):
                    raise ValueError(
                        f"All specialists of a trunk have the same {name}, since they share cores; got "
                        f"{name}={getattr(config, name)!r} and {getattr(other, name)!r}."
                    )

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter. A second adapter freezes the shared cores, so that the first does not change."""
        super().inject_adapter(*args, **kwargs)
        if len(self.peft_config) > 1:
            Specialists(self.model).freeze()

    def _create_and_replace(  # type: ignore[override]  # PEFT's other methods differ in the same way
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, SpecialistAdapterLinear):
            target.add(adapter_name)
            return
        topology, shared = change_form(peft_config.share, *layer_shape(target), rank=peft_config.r)
        owner = None
        if peft_config.pool == "shape":
            layers = (x for x in self.model.modules() if isinstance(x, SpecialistLinear))
            owner = next((x for x in layers if x.topology == topology and not x.owners), None)
        layer = SpecialistAdapterLinear(target, topology, shared, owner)
        layer.add(adapter_name)
        if peft_config.inference_mode:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Do nothing: cores have float32 already, unless the whole model was cast."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Use the names in `adapter_names=`, one for each row, in one call of `forward` or `generate`."""
        names: Sequence[str] | None = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        # As often as `generate` repeats each row: the returned sequences are some of the beams.
        repeats = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        rows = [None if name == TRUNK else name for name in names for _ in range(repeats)]
        with Specialists(self.model).use(rows):
            yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Refuse an adapter whose shared cores would replace those of the adapters in the model."""
        others = [name for name in model.peft_config if name != adapter_name]  # type: ignore[union-attr]
        now = model.state_dict() if others else {}
        for key, core in state_dict.items():
            known = now.get(key) if ".shared_cores." in key else None
            if known is not None and not torch.equal(known.cpu(), core.to(known.dtype).cpu()):
                raise TargetError(
                    f"The adapter {adapter_name!r} was trained with other shared cores than "
                    f"{', '.join(others)}, which loading it would change: {key} differs. Load it into a "
                    "trunk of its own."
                )
        found: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return found


# `peft.utils.register_peft_method` only accepts members of PEFT's enumeration, which nobody else can extend.
# The enumeration consists of strings, so a plain string works as a key of the tables that it fills.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_METHOD] = SpecialistsConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_METHOD] = SpecialistsModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_METHOD] = SpecialistsModel.prefix  # type: ignore[index]

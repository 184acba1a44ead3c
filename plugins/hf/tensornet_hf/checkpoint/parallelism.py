"""Compatibility of compressed models with transformers' `DistributedConfig`.

* FSDP (`fsdp_size`) shards any parameter: it fits.
* Tensor parallelism (`tp_size`) cuts the weight of a named layer into rows or columns, and the activations
  between layers to match. A layer of cores has no such weight. It fits as long as no rule of the plan names
  a compressed layer; a mixture, which no rule names, is kept whole by every process.
* Expert parallelism (`ep_size`) hands an experts module `(hidden_states, top_k_index, top_k_weights)` and
  cuts its stacks `(experts, ...)` along the first dimension. Experts that share cores take rows that their
  own router has sorted and limited, and their center belongs to all: `shard_experts` of
  `tensornet_moe.experimental.parallel` spreads them.

Loading with a plan that does not fit is refused: transformers would compute something else, or fail on a
shape.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from tensornet.errors import TargetError


def check_distribution(model: PreTrainedModel, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless a `DistributedConfig` fits the compressed layers.

    Args:
        model: a skeleton whose configuration says how it will be spread over processes, or nothing of it.
        layers: descriptions of its compressed modules, by name.

    Raises:
        TargetError: it does not fit; the message names layers, and what to do instead.
    """
    config: Any = getattr(model.config, "distributed_config", None)
    if config is None:
        return
    if config.tp_size > 1:
        own = {} if config.tp_plan == {} else model.tp_plan  # which takes all rules away
        cut = _named(layers, _plan(own, config.tp_plan))
        if cut:
            raise TargetError(
                f"Tensor parallelism cuts the weights of layers, and {', '.join(cut[:3])} "
                f"{'and others have' if len(cut) > 3 else 'has'} cores in place of one. Spread the model "
                "with DistributedConfig(fsdp_size=...) instead."
            )
    if config.ep_size > 1:
        modules = _plan(model.ep_plan, config.ep_plan)
        mixtures = [name for name, spec in layers.items() if spec["type"].startswith("shared_core")]
        cut = sorted({*mixtures, *_named(layers, modules)})
        if cut:
            raise TargetError(
                f"The experts of {cut[0]} are made of cores, which the expert-parallel plan of transformers "
                "does not cut. Load the model without ep_size, then spread experts that share cores with "
                "shard_experts(model) of tensornet_moe.experimental.parallel (docs/guides/scale.md); any "
                "model takes DistributedConfig(fsdp_size=...)."
            )


def _plan(own: Mapping[str, str] | None, given: Any) -> set[str]:
    """List the modules that have a parallelism rule, of the model or of the caller."""
    return {*(own or {}), *(given if isinstance(given, Mapping) else {})}


def _named(layers: Iterable[str], rules: Iterable[str]) -> list[str]:
    """List the layers that a rule matches, or that lie inside its match; `*` stands for a layer number."""
    patterns = [re.compile(re.escape(rule).replace(r"\*", r"\d+")) for rule in rules]
    found = []
    for layer in layers:
        outer = [layer[: match.start()] for match in re.finditer(r"\.", layer)]
        if any(pattern.fullmatch(name) for pattern in patterns for name in (layer, *outer)):
            found.append(layer)
    return found

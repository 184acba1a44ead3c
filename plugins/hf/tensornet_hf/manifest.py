"""List the tensors of a model folder, how each one is written, and why some are not."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable

from tensornet._util import compact_bytes
from tensornet.compression.coverage import SourceTensor
from tensornet.compression.plan import CompressionPlan
from tensornet.nn.targets import BIAS, Target
from tensornet_hf.lazy_model import LazyModel

#: What becomes of a tensor that is not written.
LEFT_OUT = "left out"
#: What tensors of draft heads are called.
DRAFT = "draft head (MTP)"
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
#: Patterns of names of tensors that classes of transformers do not have, and what these tensors are.
_KINDS = (
    (re.compile(r"(^|[._])(mtp|nextn)|eh_proj"), DRAFT),
    (re.compile(r"vision|visual|image|multi_modal"), "vision tower or its projector"),
    (re.compile(r"audio|speech"), "audio tower"),
    (re.compile(r"inv_freq|rotary|attn\.(masked_)?bias$"), "constant that the model computes itself"),
)
#: Largest number of names in a warning, of each kind.
_NAMED = 3


def why_left_out(name: str, layers: int | None) -> str:
    """Return why a stored tensor is not in the model.

    Args:
        name: name of the tensor.
        layers: number of layers of the model, if known; draft heads are stored as further layers.
    """
    found = _LAYER.search(name)
    if found is not None and layers is not None and int(found[1]) >= layers:
        return DRAFT
    return next(
        (what for pattern, what in _KINDS if pattern.search(name)), "not in the model of transformers"
    )


def draft_heads(lazy: LazyModel) -> dict[int, list[str]]:
    """Return the names of the stored tensors of draft heads, by number of their block in llama.cpp's files.

    There, draft heads follow the other blocks, also if they are stored under a name of their own (`mtp`).
    """
    layers = getattr(lazy.model.config.get_text_config(), "num_hidden_layers", None)
    if layers is None:
        return {}
    blocks: dict[int, list[str]] = defaultdict(list)
    for name in lazy.surplus:
        if why_left_out(name, layers) == DRAFT:
            found = _LAYER.search(name)
            number = 0 if found is None else int(found[1])
            blocks[number if number >= layers else layers + number].append(name)
    return dict(blocks)


def warn_of_left_out(lazy: LazyModel) -> None:
    """Warn of stored tensors that will not be written, by kind, with their sizes."""
    layers = getattr(lazy.model.config.get_text_config(), "num_hidden_layers", None)
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in lazy.surplus:
        kinds[why_left_out(name, layers)].append(name)
    said = []
    for kind, names in kinds.items():
        size = compact_bytes(sum(lazy.source.tensors[name].nbytes for name in names))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        said.append(f"{kind}, {size} ({', '.join(names[:_NAMED])}{more})")
    if said:
        warnings.warn(
            "Tensors are not copied because the model that transformers loads does not have them: "
            f"{'; '.join(said)}.",
            stacklevel=2,
        )


def list_tensors(
    lazy: LazyModel, plan: CompressionPlan, weights: Iterable[Target]
) -> tuple[SourceTensor, ...]:
    """List what becomes of every stored tensor.

    Args:
        lazy: the model.
        plan: the plan.
        weights: all weights of the model, with the reasons why some are not compressed.
    """
    schemes = {layer.name: layer.scheme for layer in plan}
    unrouted, unseen = set(plan.unrouted), set(plan.unseen)
    became: dict[str, dict[str, None]] = defaultdict(dict)
    reasons: dict[str, dict[str, None]] = defaultdict(dict)
    for target in weights:
        planned = next((x for x in target.names if x in schemes), None)
        reason = "" if target.skip == BIAS else target.skip
        if planned is not None:
            reason = "expert without tokens; moments of the others" if planned in unrouted else ""
        elif target.name in unseen:
            reason = "never ran in calibration"
        owners = [target.stack] if target.stack else [f"{x}.weight" for x in target.names]
        for parameter in owners if target.parameter is None else target.names:
            became[parameter][schemes.get(planned or "", "dense")] = None
            if reason:
                reasons[parameter][reason] = None
    users = defaultdict(list)
    for parameter, origin in lazy.origins.items():
        for part in origin.parts:
            users[part.file, part.start].append(parameter)
    layers = getattr(lazy.model.config.get_text_config(), "num_hidden_layers", None)
    surplus, found = set(lazy.surplus), []
    for name, part in lazy.source.tensors.items():
        owners = users.get((part.file, part.start), [])
        scheme = ", ".join(dict.fromkeys(x for owner in owners for x in became[owner])) or "dense"
        reason = "; ".join(dict.fromkeys(x for owner in owners for x in reasons[owner]))
        if name in surplus:
            scheme, reason = LEFT_OUT, why_left_out(name, layers)
        found.append(SourceTensor(name, part.shape, part.dtype, part.nbytes, scheme, reason))
    return tuple(found)

"""Find the feed-forward networks that must not see later tokens, by running the model."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensornet._util import in_eval_mode, uncompiled, without_cache
from tensornet.errors import TargetError
from tensornet_hf.moe.feed_forward import FeedForward

_TOKENS = 8
#: Relative change of a row below which it counts as the same: kernels may add up in another order.
_SAME = 1e-5

Rows = dict[int, list[Tensor]]


@torch.no_grad()
def causal_networks(
    model: nn.Module, networks: Sequence[FeedForward], *, example: Mapping[str, Any] | None = None
) -> list[str]:
    """Name the feed-forward networks whose earlier tokens do not depend on later ones.

    To explain how this works: the model runs twice on one sequence, of which the last token is exchanged.
    The exchange reaches some networks. If earlier rows changed in none of these, the model computes them from
    left to right, and they are causal. Each input of the model is exchanged in turn: the networks of T5's
    encoder see all of `input_ids`, those of its decoder only what precedes in `decoder_input_ids`.

    Args:
        model: run in evaluation mode, without gradient.
        networks: of the model.
        example: keyword arguments of one call, batch first; made from the configuration of a transformers
            model if absent.

    Returns:
        Names of the causal networks, in the order given.

    Raises:
        TargetError: no example is given and none can be made, the model does not run on it, or no input
            reaches a network, so that nothing can be said about it.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from tensornet_hf.moe.finder import find_feed_forwards
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))
        >>> causal_networks(model, find_feed_forwards(model))
        ['transformer.h.0.mlp']
    """
    inputs = _one_row(_example_inputs(model) if example is None else example)
    before = _rows_seen(model, networks, inputs)
    causal: set[int] = set()
    reached: set[int] = set()
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.dtype == torch.bool or "mask" in name:
            continue
        after = _rows_seen(model, networks, {**inputs, name: _last_exchanged(value)})
        moved = {k: _moved(before[k], after[k]) for k in range(len(networks))}
        touched = {k for k, rows in moved.items() if any(bool(r.any()) for r in rows)}
        reached |= touched
        if all(not bool(r[: r.nonzero().max()].any()) for k in touched for r in moved[k] if bool(r.any())):
            causal |= touched
    if silent := [network.name for k, network in enumerate(networks) if k not in reached]:
        raise TargetError(
            f"Exchanging the last element of {', '.join(inputs)} changes nothing that {silent[0]} reads, so "
            "whether it may look at later tokens cannot be told; pass example={...} with the arguments of a "
            "call that reaches it."
        )
    return [network.name for k, network in enumerate(networks) if k in causal]


def _example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Generate one random row for a transformers model that reads tokens or images.

    Raises:
        TargetError: another model.
    """
    main = model.main_input_name if isinstance(model, PreTrainedModel) else None
    generator = torch.Generator("cpu").manual_seed(0)
    if isinstance(model, PreTrainedModel) and main == "input_ids":
        embedding = getattr(model.get_input_embeddings(), "num_embeddings", None) or model.config.vocab_size
        ids = torch.randint(embedding, (1, _TOKENS), generator=generator, device="cpu").to(model.device)
        inputs = {"input_ids": ids}
        if "decoder_input_ids" in inspect.signature(model.forward).parameters:
            inputs["decoder_input_ids"] = ids.clone()
        return inputs
    if isinstance(model, PreTrainedModel) and main == "pixel_values":
        size = getattr(model.config, "image_size", None)
        size = size if isinstance(size, Sequence) else (size, size)
        if all(isinstance(x, int) for x in size):
            shape = (1, getattr(model.config, "num_channels", 3), *size)
            image = torch.randn(shape, generator=generator, device="cpu")
            return {"pixel_values": image.to(model.device, model.dtype)}
    raise TargetError(
        f"Whether {type(model).__name__} is causal is found by running it, and its inputs are not known. "
        "Pass example={...} with the keyword arguments of one call, for example "
        'upcycle(model, config, example={"x": torch.randn(1, 8, 64)}).'
    )


def _one_row(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Select the first row of a batch: then tokens are in order even where layers flatten them."""
    return {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _last_exchanged(value: Tensor) -> Tensor:
    changed = value.clone(memory_format=torch.contiguous_format)
    flat = changed.view(-1)
    if value.is_floating_point():
        flat[-1] = 10 - flat[-1]
    else:
        others = flat[flat != flat[-1]]
        flat[-1] = others[0] if len(others) else (flat[-1] - 1).abs()
    return changed


def _rows_seen(model: nn.Module, networks: Sequence[FeedForward], inputs: Mapping[str, Any]) -> Rows:
    """Record the inputs `(tokens, features)` of the first layer of each network, call by call."""
    seen: Rows = {k: [] for k in range(len(networks))}
    with _watching(networks, seen), in_eval_mode(model), uncompiled(), without_cache(model):
        try:
            model(**inputs)
        except Exception as error:  # a model of unknown kind may fail in every way there is
            raise TargetError(
                f"{type(model).__name__} does not run on {', '.join(inputs)}, which would show whether it is "
                f"causal: {type(error).__name__}: {error!s:.200}. Pass example={{...}} with the keyword "
                "arguments of one call."
            ) from error
    return seen


@contextmanager
def _watching(networks: Sequence[FeedForward], seen: Rows) -> Iterator[None]:
    def note(index: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        seen[index].append(x.detach().reshape(-1, x.shape[-1]).clone())

    with ExitStack() as hooks:
        for index, network in enumerate(networks):
            layer = network.layer(network.matrices[0])
            hooks.callback(layer.register_forward_pre_hook(partial(note, index)).remove)
        yield


def _moved(before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
    """Compare the rows of two runs call by call; True where they differ, shape `(tokens,)`."""
    return [
        (new.float() - old.float()).norm(dim=-1) > _SAME * old.float().norm(dim=-1).max()
        for old, new in zip(before, after, strict=True)
        if old.shape == new.shape
    ]

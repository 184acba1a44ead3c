"""Hooks that show a recorder what layers read, and the gradients of what they return."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensornet._util import in_eval_mode, uncompiled, without_cache
from tensornet.calibration.draws import seeded_draws
from tensornet.errors import TargetError
from tensornet.nn.layer_kinds import kind_of
from tensornet.nn.targets import LayerSelection, check_loaded, find_targets
from tensornet.nn.unfuse import unfused

if TYPE_CHECKING:
    from tensornet.calibration.calibrate import MomentRecorder


@contextmanager
def observed(model: nn.Module, recorder: "MomentRecorder", config: LayerSelection | None) -> Iterator[None]:
    """Record the chosen layers inside the block, in eval mode, with frozen weights and repeatable draws."""
    with (
        unfused(model),
        in_eval_mode(model),
        uncompiled(),
        without_cache(model),
        seeded_draws(),
        _hooked(model, recorder, config),
    ):
        yield


@contextmanager
def _hooked(model: nn.Module, recorder: "MomentRecorder", config: LayerSelection | None) -> Iterator[None]:
    weights = find_targets(model, config or LayerSelection(target_modules="all"))
    targets = [x for x in weights if not x.skip]
    check_loaded(targets)
    layers = {id(m): (n, m) for target in targets for n, m in zip(target.names, target.modules, strict=True)}
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    holders = {name[:k] for name, _ in layers.values() for k, x in enumerate(name) if x == "."}
    handles = [
        x.register_forward_pre_hook(_index_hook(name), with_kwargs=True)
        for name, x in model.named_modules()
        # Subclasses may read something else, such as a mask that they make positions of.
        if isinstance(x, nn.Embedding) and type(x).forward is nn.Embedding.forward
    ]
    handles += [
        model.get_submodule(name).register_forward_pre_hook(_states_hook(recorder), with_kwargs=True)
        for name in sorted(holders)
    ]
    handles += [
        handle
        for name, module in layers.values()
        for handle in (
            module.register_forward_pre_hook(_input_hook(name, recorder), with_kwargs=True),
            module.register_forward_hook(_output_hook(name, recorder), with_kwargs=True),
        )
    ]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


def _index_hook(name: str) -> Any:
    def hook(module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for given in (*args, *kwargs.values()):
            if not isinstance(given, Tensor) or given.is_meta or not given.numel():
                continue
            low, high = (int(x) for x in given.aminmax())
            if low < 0 or high >= module.num_embeddings:
                raise TargetError(
                    f"Embedding {name!r} has {module.num_embeddings:,} rows, and a batch asks for row "
                    f"{low if low < 0 else high}: token ids of another tokenizer, or a text longer than the "
                    f"model takes? Indices go from 0 to {module.num_embeddings - 1}."
                )

    return hook


def _states_hook(recorder: "MomentRecorder") -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.see_states(args, kwargs)

    return hook


def _input_hook(name: str, recorder: "MomentRecorder") -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        (given,) = (*args, *kwargs.values())  # some models name the only argument
        kind = kind_of(module)
        if kind is not None and kind.name == "embedding":
            recorder.see_indices(name, given, kind.matrix(module).shape[0])
        else:
            recorder.see_input(name, given)

    return hook


def _output_hook(name: str, recorder: "MomentRecorder") -> Any:
    def hook(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if not output.requires_grad:  # the first layer: with frozen weights the graph starts here
            # A copy, since the model may change its output in place, which no leaf of a graph allows.
            output = output.detach().requires_grad_().clone()
        (given,) = (*args, *kwargs.values())
        paired = given.is_floating_point() and given.shape[:-1] == output.shape[:-1]
        held = recorder.hold(name, given) if paired else []
        output.register_hook(lambda gradient: recorder.see_gradient(name, gradient, held))
        return output

    return hook

"""Sample runs of Hugging Face models on generated inputs, to find weights read outside their layers."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensornet.nn.extension import Run
from tensornet.nn.layer_kinds import kind_of

#: Rows and tokens of the data.
_ROWS, _TOKENS = 1, 8
#: Side of an image for models that take any size.
_SIDE = 224


def sample_runs(model: nn.Module) -> Iterable[Run]:
    """List runs of initialization, a training step and inference for every part that is a transformers model.

    Parts are tried one by one: a whole multimodal model may want its inputs to fit together in a way that
    only its processor knows, where its image encoder alone is content with an image.
    """
    parts = [name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    reached: dict[str, set[str]] = {"train": set(), "eval": set()}
    return [run for name in parts for run in (_initialise(name), *_forward(model, name, reached))]


def _initialise(name: str) -> Run:
    def run(twin: nn.Module) -> None:
        """Initialize weights as loading does, with every tensor marked as loaded."""
        model = twin.get_submodule(name)
        assert isinstance(model, PreTrainedModel)
        if not next(model.parameters()).is_meta:
            return  # initialising asks for no values, and these are the user's weights
        for tensor in (*model.parameters(), *model.buffers()):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        for module in model.modules():
            # Layers that are replaced are not initialised, and models inside have a run of their own.
            if kind_of(module) is None and (module is model or not isinstance(module, PreTrainedModel)):
                with suppress(Exception):  # of modules of a model inside, which others initialise
                    model._init_weights(module)

    return run


def _forward(model: nn.Module, name: str, reached: dict[str, set[str]]) -> Iterator[Run]:
    """Run a training step and inference of one part, unless it runs inside another part."""
    part = model.get_submodule(name)
    assert isinstance(part, PreTrainedModel)
    if (inputs := sample_inputs(part)) is None:
        return

    def step(twin: nn.Module) -> None:
        module = twin.get_submodule(name).train()
        if name not in reached["train"]:
            with _noting(twin, name, reached["train"]):
                outputs = [x for x in _tensors(module(**_on_device(inputs, module))) if x.requires_grad]
                if outputs:
                    torch.autograd.backward([x.sum() for x in outputs])

    def infer(twin: nn.Module) -> None:
        module = twin.get_submodule(name).eval()
        if name not in reached["eval"]:
            with torch.no_grad(), _noting(twin, name, reached["eval"]):
                module(**_on_device(inputs, module))

    yield step
    yield infer


@contextmanager
def _noting(twin: nn.Module, name: str, reached: set[str]) -> Iterator[None]:
    """Add the parts below `name` that run inside the block to `reached`, unless the block fails."""
    seen: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, args, inner=inner: seen.add(inner))
        for inner, module in twin.named_modules()
        if isinstance(module, PreTrainedModel) and inner.startswith(f"{name}.".lstrip("."))
    ]
    try:
        yield
        reached |= seen
    finally:
        for handle in handles:
            handle.remove()


def _on_device(inputs: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    first = next(p for p in module.parameters() if p.is_floating_point())
    return {
        name: x.to(first.device, first.dtype if x.is_floating_point() else None) for name, x in inputs.items()
    }


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def sample_inputs(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Generate inputs for the arguments of a model's `forward`, with sizes from its configuration.

    Returns None if `forward` names no argument that inputs can be generated for.
    """
    names = inspect.signature(model.forward).parameters
    found: dict[str, Tensor] = {}
    for name, make in _MAKERS.items():
        if name in names and (value := make(model, names)) is not None:
            found[name] = value
    return found or None


def _size(model: PreTrainedModel, *names: str, inside: str = "") -> Any:
    """Return the first entry found in the configuration of the model, or of one of its parts."""
    config = model.config
    for place in (getattr(config, inside, None) if inside else None, config):
        for name in names:
            if (value := getattr(place, name, None)) is not None:
                return value
    return None


def _ids(model: PreTrainedModel, names: Any) -> Tensor | None:
    vocabulary = _size(model, "vocab_size", inside="text_config")
    if not isinstance(vocabulary, int):
        return None
    return (torch.arange(_TOKENS, device="cpu") % vocabulary).expand(_ROWS, -1)


def _decoder_ids(model: PreTrainedModel, names: Any) -> Tensor | None:
    return _ids(model, names) if model.config.is_encoder_decoder else None


def _pixels(model: PreTrainedModel, names: Any) -> Tensor | None:
    channels = _size(model, "num_channels", inside="vision_config") or 3
    patch = _size(model, "patch_size", inside="vision_config")
    if "spatial_shapes" in names:
        patches = _size(model, "num_patches", inside="vision_config")
        return None if patches is None else torch.zeros(_ROWS, patches, channels * patch**2, device="cpu")
    if model.main_input_name == "input_ids" and "image_grid_thw" in names:
        return None
    size = _size(model, "image_size", inside="vision_config") or _SIDE
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return torch.zeros(_ROWS, channels, height, width, device="cpu")


def _patch_mask(model: PreTrainedModel, names: Any) -> Tensor | None:
    patches = _size(model, "num_patches", inside="vision_config")
    return None if patches is None else torch.ones(_ROWS, patches, dtype=torch.long, device="cpu")


def _spatial_shapes(model: PreTrainedModel, names: Any) -> Tensor | None:
    patches = _size(model, "num_patches", inside="vision_config")
    return None if patches is None else torch.tensor([[1, patches]] * _ROWS, device="cpu")


def _features(model: PreTrainedModel, names: Any) -> Tensor | None:
    bins, positions = _size(model, "num_mel_bins"), _size(model, "max_source_positions")
    if bins is None:
        return None
    length = 2 * positions if positions is not None else 64
    return torch.zeros(_ROWS, bins, length, device="cpu")


def _point(model: PreTrainedModel, names: Any) -> Tensor:
    return torch.zeros(_ROWS, 1, 1, 2, device="cpu")


def _box(model: PreTrainedModel, names: Any) -> Tensor:
    return torch.zeros(_ROWS, 1, 4, device="cpu")


def _samples(model: PreTrainedModel, names: Any) -> Tensor | None:
    strides = _size(model, "conv_stride")
    if strides is None:
        return None
    length = 1
    for kernel, stride in zip(reversed(_size(model, "conv_kernel")), reversed(strides), strict=True):
        length = length * stride + kernel
    return torch.zeros(_ROWS, 16 * length, device="cpu")


#: By name of an argument of `forward`.
_MAKERS: dict[str, Callable[[PreTrainedModel, Any], Tensor | None]] = {
    "input_ids": _ids,
    "decoder_input_ids": _decoder_ids,
    "pixel_values": _pixels,
    "pixel_attention_mask": _patch_mask,
    "spatial_shapes": _spatial_shapes,
    "input_points": _point,
    "input_boxes": _box,
    "input_features": _features,
    "input_values": _samples,
}

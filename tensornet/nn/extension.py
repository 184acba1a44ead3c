"""Extensions: the interface by which a library adds support for its own model classes.

A model class may store many matrices in one parameter, have its own file format, or come with calibration
data. A plugin subclasses `ModelExtension`, overrides methods and registers one instance.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from tensornet._util import check_type
from tensornet.errors import TargetError
from tensornet.nn.module import module_spec
from tensornet.registry import Registry


@dataclass(frozen=True)
class ProvidedData:
    """Named calibration data, from an extension or from the argument `calibration` of `tensornet.compress`.

    Args:
        batches: calibration batches, as for `tensornet.calibrate`; the loss is measured on a few of them.
        source: name of the data, for reports.
        loss_fn: function that returns the losses of a batch (see `tensornet.calibrate`); by default, the loss
            that the model returns.
    """

    batches: Iterable[Any]
    source: str
    loss_fn: Callable[[nn.Module, Any], Any] | None = None


class ModelExtension:
    """Base class of extensions; its methods do nothing unless they are overridden.

    Example:
        >>> from tensornet.nn.extension import ProvidedData
        >>> class Mine(tn.nn.ModelExtension):
        ...     def calibration_data(self, model):
        ...         if isinstance(model, torch.nn.Linear):
        ...             return ProvidedData([torch.ones(1, 8)], "ones")
        >>> Mine().calibration_data(torch.nn.Linear(8, 8)).source
        'ones'
    """

    def unfused(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which every weight matrix of the model is a layer.

        The context is used while a model is calibrated, planned or changed. On exit, layers that were not
        replaced are converted back to the form in which the model stores them.

        Args:
            model: any model; it is changed in place inside the context.
        """
        return nullcontext()

    def next_batch(self, block: nn.Module, batch: Mapping[str, Any]) -> None:
        """Pass information about a batch, such as its padding, to modules inside `block`.

        This is called before `block` is run without the rest of the model.

        Args:
            block: part of an unfused model.
            batch: keyword arguments of the whole model.
        """

    def layers_replaced(self, model: nn.Module) -> bool:
        """Adapt a model after layers were compressed or decompressed.

        Args:
            model: the model; this method is called once, after the last layer was replaced.

        Returns:
            True if the extension adapts how the model is saved. If no extension does and the model has a
            method `save_pretrained`, a warning says that this method cannot save the new layers.
        """
        return False

    def check_whole(self, model: nn.Module) -> None:
        """Raise TargetError if modules of a model use parameters that the model does not contain.

        This is called before a model is saved or loaded.

        Args:
            model: the whole model.
        """

    def round_others(self, model: nn.Module, config: Any) -> Mapping[str, str]:
        """Round parameters that do not belong to layers, such as cores of expert banks, to number formats.

        This is called after all layers were replaced.

        Args:
            model: the model; it is changed in place.
            config: the `CompressionConfig`, which contains the formats and the bits per weight.

        Returns:
            The name of the number format of each rounded parameter, by the name of the parameter.
        """
        return {}

    def shared_candidates(
        self, targets: Sequence[Any], stats: Any, config: Any
    ) -> Mapping[tuple[str, ...], Sequence[Any]]:
        """Find stacks of weights whose networks may share a core, with `CompressionConfig.share_experts`.

        Args:
            targets: the targeted weights of a block (`tensornet.nn.targets.Target`).
            stats: calibration statistics with gradients.
            config: the `CompressionConfig`.

        Returns:
            The candidates (`tensornet.compression.shared_cores.SharedCandidate`) of each stack, by the names
            of its weights; a stack that cannot share a core has none.
        """
        return {}

    def fit_shared(
        self, targets: Sequence[Any], weightings: Sequence[Any], layer: Any
    ) -> Sequence[Any] | None:
        """Fit the networks of a stack that share a core.

        Args:
            targets: the weights of the stack.
            weightings: sensitivity of the loss to errors in each weight.
            layer: plan of one of them (`LayerPlan`).

        Returns:
            The new layer and the relative error of each weight; None if the extension does not know stacks
            with this topology and shared core.
        """
        return None

    def calibration_data(self, model: nn.Module) -> ProvidedData | None:
        """Return default calibration data for a model, or None if the extension has none.

        Args:
            model: the model before compression.
        """
        return None

    def dense_layers(self, model: nn.Module) -> Mapping[str, str]:
        """Return the names of layers that must stay dense, each with a short reason.

        An example is a layer whose `weight` is read by other code of the model: once compressed, the layer
        would not have this matrix.

        Args:
            model: the unfused model.
        """
        return {}


#: Extensions by the full names of their classes.
_EXTENSIONS: Registry[ModelExtension] = Registry("model extension", error=TypeError)


def register_extension(extension: ModelExtension) -> ModelExtension:
    """Register an extension, so that its methods are called for every model.

    Args:
        extension: an instance, not a class; only one instance of each class can be registered.

    Returns:
        The same extension.

    Raises:
        TypeError: `extension` is not a `ModelExtension`, or another instance of its class is registered.

    Example:
        >>> class Mine(tn.nn.ModelExtension):
        ...     pass
        >>> isinstance(tn.nn.register_extension(Mine()), Mine)
        True
    """
    check_type("extension", extension, ModelExtension, "pass an instance of your subclass of it")
    kind = type(extension)
    _EXTENSIONS.add(f"{kind.__module__}.{kind.__qualname__}", extension)
    return extension


def extensions() -> tuple[ModelExtension, ...]:
    """Return the registered extensions, in the order of their registration."""
    return _EXTENSIONS.values()


def provided_data(model: nn.Module) -> ProvidedData | None:
    """Return the calibration data of the first extension that has data for this model, or None."""
    return next((data for x in extensions() if (data := x.calibration_data(model)) is not None), None)


def dense_layers(model: nn.Module) -> dict[str, str]:
    """Call `ModelExtension.dense_layers` of every extension, and merge the results."""
    return {name: reason for x in extensions() for name, reason in x.dense_layers(model).items()}


def shared_candidates(
    targets: Sequence[Any], stats: Any, config: Any
) -> dict[tuple[str, ...], Sequence[Any]]:
    """Call `ModelExtension.shared_candidates` of every extension, and merge the results."""
    return {k: x for each in extensions() for k, x in each.shared_candidates(targets, stats, config).items()}


def fit_shared(targets: Sequence[Any], weightings: Sequence[Any], layer: Any) -> Sequence[Any]:
    """Fit a stack that shares a core, with the first extension that knows how.

    Raises:
        TargetError: no registered extension knows how.
    """
    for extension in extensions():
        if (made := extension.fit_shared(targets, weightings, layer)) is not None:
            return made
    raise TargetError(
        f"Nobody knows how to fit {layer.scheme} for {layer.name!r}, which shares the core "
        f"{layer.shared_core[0]!r} with others. Import the package with which the plan was made, such as "
        "tensornet_moe."
    )


def round_others(model: nn.Module, config: Any) -> dict[str, str]:
    """Call `ModelExtension.round_others` of every extension, and merge the results."""
    rounded: dict[str, str] = {}
    for extension in extensions():
        rounded |= extension.round_others(model, config)
    if rounded:
        structure_changed(model)
    return rounded


def structure_changed(model: nn.Module) -> None:
    """Tell every extension that layers were replaced; warn if none knows how to save the model.

    Code that replaces layers calls this once, after the last one.
    """
    handled = [extension.layers_replaced(model) for extension in extensions()]
    if any(handled) or not callable(getattr(type(model), "save_pretrained", None)):
        return
    if any(map(_is_special, model.modules())):
        warnings.warn(
            f"save_pretrained of this {type(model).__name__} does not describe compressed layers, so that "
            "the folder could not be loaded. Save the model with tensornet_hf.save(model, folder), or make "
            "it dense by tensornet.decompress(model).",
            stacklevel=2,
        )


def _is_special(module: nn.Module) -> bool:
    """Return True if saving must describe this module; this includes modules whose `spec` raises an error."""
    try:
        return module_spec(module) is not None
    except TargetError:
        return True

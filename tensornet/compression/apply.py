"""Replace stock layers by tensor-network layers according to a plan, and convert them back."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tensornet._util import check_type, in_eval_mode, uncompiled, without_cache
from tensornet.calibration.batches import Batch, run_model
from tensornet.calibration.stats import CalibrationStats, first_difference
from tensornet.compression.candidates import relative_gap
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.compression.sensitivity import layer_weighting
from tensornet.errors import NonFiniteError, TargetError, TopologyError
from tensornet.linalg.svd import result_dtype
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.embedding import MPOEmbedding
from tensornet.nn.extension import fit_shared, structure_changed
from tensornet.nn.layer_kinds import carry_hooks, embedding_scale, has_own_forward, layer_bias, layer_kind
from tensornet.nn.linear import TensorNetworkLinear, empty_linear, linear_from_network
from tensornet.nn.module import NetworkModule
from tensornet.nn.storage import PackedCore, Storage
from tensornet.nn.targets import (
    ADAPTER,
    Target,
    check_holder,
    compressed_names,
    list_weights,
    matches,
    refuse_wrapped,
    shortened,
    split_by_adapters,
)
from tensornet.nn.unfuse import fuse, reason_against, unfused
from tensornet.nn.weight_facts import WeightReadError
from tensornet.quantization import NumberFormat, Rounding
from tensornet.quantization.scales import scale_fault
from tensornet.topologies import topology_family
from tensornet.topology import Topology

#: New modules for a weight, one for each module that uses the weight, and the relative error of the weight.
NewLayers = tuple[list[nn.Module], float]
#: Maps the name and scheme of a layer to its new modules.
LayerCache = dict[tuple[str, Topology | None, Storage], NewLayers]
#: Largest number of layers named in a warning.
_NAMED = 5


@torch.inference_mode(False)  # parameters made in inference mode could not be trained
@torch.no_grad()
def apply_plan(
    model: nn.Module,
    plan: CompressionPlan,
    stats: CalibrationStats | None = None,
    *,
    progress: bool = False,
    cache: LayerCache | None = None,
    batch: Batch | None = None,
    call: Callable[[nn.Module, Batch], object] = run_model,
) -> dict[str, float]:
    """Decompose the planned layers and replace them in place; if a decomposition fails, no layer is replaced.

    Args:
        model: the model for which the plan was made.
        plan: the plan; it may have been edited or loaded.
        stats: the statistics with which the plan was made. The cores depend on the moments, which a plan does
            not contain.
        progress: whether to show a progress bar.
        cache: new layers by name and scheme. Layers in the cache are reused, others are added to it.
        batch: batch on which the model is run once, before the replacement is final.
        call: function that runs a model on this batch; by default, the batch has the arguments of the model.

    Returns:
        Certified relative Frobenius error of each replaced layer, by name.

    Raises:
        TargetError: the model has no layer of a planned name, shape or dtype; the plan or the statistics
            were made for other weights; the statistics are missing; or code outside of a layer reads the
            layer's weight when the model is run.
        TopologyError: the family of a planned topology makes cores of other shapes than planned.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64))
        >>> plan = tn.plan(model, tn.CompressionConfig(topology_options={"max_bond": 4}))
        >>> errors = tn.apply_plan(model, plan)
        >>> model[0].topology.bond_dims, sorted(errors)
        ({'b0': 1, 'b1': 4, 'b2': 1}, ['0'])
    """
    check_holder(model)
    check_type("plan", plan, CompressionPlan, "CompressionPlan.load reads one from a file")
    check_stats(stats)
    work = [layer for layer in plan if layer.topology is not None]
    known = {} if cache is None else cache
    if not all((x.name, x.topology, x.storage) in known for x in work):
        check_objective(plan, stats)
    modules: dict[str, nn.Module] = {}
    errors = {}
    with unfused(model):
        targets = {target.name: target for target in list_weights(model) if target.kinds}
        for layer in work:
            check_fits(model, layer, targets.get(layer.name))
        _, wrapped = split_by_adapters(model, (name for x in work for name in targets[x.name].names))
        refuse_wrapped(wrapped)
        planned = [targets[layer.name] for layer in work]
        check_samples(plan, planned)
        if stats is not None and plan.objective != "weight":
            stats.check_weights(planned)
        fresh = [targets[x.name] for x in work if (x.name, x.topology, x.storage) not in known]

        def weighting_of(target: Target) -> Weighting:
            return layer_weighting(target, plan.objective, stats) or Weighting()

        for names in plan.stacks:
            if any((x, plan[x].topology, plan[x].storage) not in known for x in names):
                stack = [targets[x] for x in names]
                fitted = fit_shared(stack, [weighting_of(x) for x in stack], plan[names[0]])
                for name, made in zip(names, fitted, strict=True):
                    known = {**known, (name, plan[name].topology, plan[name].storage): made}
        for layer in tqdm(work, desc="compressing", disable=not progress, unit="layer"):
            target, key = targets[layer.name], (layer.name, layer.topology, layer.storage)
            if key in known:
                new, errors[layer.name] = known[key]
                for module, old in zip(new, target.modules, strict=True):
                    assert isinstance(module, NetworkModule)
                    for stored in module.stored.values():  # the model may have been frozen in calibration
                        if isinstance(stored, nn.Parameter):
                            stored.requires_grad_(target.weight.requires_grad)
                    if isinstance(module, TensorNetworkLinear):
                        module.bias = layer_bias(old)
            else:
                made, errors[layer.name] = compress_layer(
                    target.matrix, layer, weighting_of(target), plan.rounding
                )
                new = with_cores(target, made)
                if cache is not None:
                    cache[key] = new, errors[layer.name]
            modules.update(zip(target.names, new, strict=True))
        warn_of_scales(fresh, modules, weighting_of)
        dense = {name: model.get_submodule(name) for name in modules}
        with replaced(model, modules):
            if batch is not None:
                _refuse_readers(model, batch, call, dense)
            structure_changed(model)
    return errors


@torch.no_grad()
def run_once(model: nn.Module, batch: Batch, call: Callable[[nn.Module, Batch], object] = run_model) -> None:
    """Run a model once in eval mode, without gradients; the random state does not change."""
    on_gpu = {x.device for x in model.parameters() if x.device.type == "cuda"}
    with torch.random.fork_rng(devices=on_gpu), in_eval_mode(model), uncompiled(), without_cache(model):
        call(model, batch)


def _refuse_readers(
    model: nn.Module,
    batch: Batch,
    call: Callable[[nn.Module, Batch], object],
    dense: Mapping[str, nn.Module],
) -> None:
    """Run a compressed model, and raise an error if code outside of a replaced layer reads its weight.

    Args:
        model: the compressed model. Layers whose weight is read from outside are dense afterwards.
        batch, call: see `apply_plan`.
        dense: the replaced modules, by name.

    Raises:
        TargetError: a weight is read from outside; the message shows patterns that exclude all such layers.
    """
    patterns: list[str] = []
    while True:
        try:
            run_once(model, batch, call)
            break
        except WeightReadError as error:
            read = [name for name in dense if model.get_submodule(name) is error.layer]
            if not read:
                raise
            # The same layer of the other blocks is read too, so one pattern names the layers of all blocks.
            new = [".".join("*" if x.isdigit() else x for x in name.split(".")) for name in read]
            patterns += new
            for name in dense:
                if any(matches(name, pattern) for pattern in new):
                    set_submodule(model, name, dense[name])
    if patterns:
        raise TargetError(
            f"The code of {type(model).__name__} reads the weight of {', '.join(patterns)} outside of the "
            "layer, but compressed layers do not have this matrix. No layer was replaced. Keep these layers "
            f"dense by exclude_modules={patterns}; in a plan, by plan.replace_layer(name, None)."
        )


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the modules at dotted names; if the `with` block raises an error, all old modules return."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            set_submodule(model, name, module)
            carry_hooks(before[name], module)
        yield
    except BaseException:  # a KeyboardInterrupt must restore the layers too
        for name, module in before.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        raise


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set a module at a dotted name, and give it the training mode of its new parent module."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module.train(parent.training)
    setattr(parent, child, module)


@torch.inference_mode(False)
@torch.no_grad()
def decompress(model: nn.Module, matrices: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Replace every tensor-network layer by a stock layer, such as `nn.Linear`; tied layers stay tied.

    An embedding that multiplies its rows by a constant becomes a `ScaledEmbedding`, whatever its class was.

    Args:
        model: the compressed model.
        matrices: weights for the stock layers, by name; other weights are rebuilt from the cores.

    Returns:
        The same model; frozen parameters stay frozen.

    Raises:
        TargetError: the model itself is a tensor-network layer, or the `forward` of a layer was replaced.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> _ = tn.compress(model, tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)
        >>> type(model[0]).__name__, type(tn.decompress(model)[0]).__name__
        ('MPOLinear', 'Linear')
    """
    if isinstance(model, NetworkModule):
        raise TargetError(
            "decompress replaces layers inside a model; for a single layer call to_linear() or "
            "to_embedding() of the layer."
        )
    names = compressed_names(model)
    if odd := [name for name in names if has_own_forward(model.get_submodule(name))]:
        raise TargetError(
            f"{shortened(odd)} has its own forward, which a stock layer would lose: delete it "
            "first (`del layer.forward`), and set it again afterwards."
        )
    dense: dict[tuple[int, ...], nn.Module] = {}  # keys: ids of the stored tensors, which tied layers share
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, TensorNetworkLinear | MPOEmbedding):
            continue
        matrix = None if matrices is None else matrices.get(name)
        convert = module.to_embedding if isinstance(module, MPOEmbedding) else module.to_linear
        stock = convert(matrix)
        stored = list(module.stored.values())
        cores = [x for x in stored if isinstance(x, nn.Parameter)]  # empty if all cores are integers
        stock.weight.requires_grad_(not cores or any(x.requires_grad for x in cores))
        copy = dense.setdefault(tuple(map(id, stored)), stock)
        if copy is not stock:
            layer_kind(module.source).share(stock, copy.weight)  # type: ignore[arg-type]
        if (bias := layer_bias(module)) is not None:
            stock.bias = bias  # the same parameter object, as in `apply_plan`
        set_submodule(model, name, stock)
        carry_hooks(module, stock)
    fuse(model)
    structure_changed(model)
    return model


def check_stats(stats: Any) -> None:
    """Check that `stats` is a `CalibrationStats` or None.

    Raises:
        TypeError: it is neither; the message shows its type.
    """
    advice = "collect them by tensornet.calibrate(model, batches), or read a file by CalibrationStats.load"
    if stats is not None:
        check_type("stats", stats, CalibrationStats, advice)


def check_samples(plan: CompressionPlan, targets: Iterable[Target]) -> None:
    """Raise TargetError if a weight differs from the weight for which a plan was made."""
    if (name := first_difference({layer.name: layer.sample for layer in plan}, targets)) is not None:
        raise TargetError(
            f"The plan was made for another model: the weight of {name!r} differs. Plan the compression "
            "of this model."
        )


def check_objective(plan: CompressionPlan, stats: CalibrationStats | None) -> None:
    """Raise TargetError if a plan was made with statistics, and `stats` cannot be those."""
    if stats is None and plan.objective != "weight":
        raise TargetError(
            f"This plan was made with objective={plan.objective!r}: pass the same calibration statistics, "
            "apply_plan(model, plan, stats)."
        )
    if plan.objective == "curvature" and stats is not None and not stats.has_gradients:
        raise TargetError(
            "This plan was made with statistics of gradients, and these statistics contain none; pass the "
            "statistics with which it was made, or calibrate again."
        )


def check_fits(model: nn.Module, layer: LayerPlan, target: Target | None) -> None:
    """Raise TargetError if a model has no weight (`target`) of the planned name, shape and dtype."""
    if target is None:
        if layer.name in compressed_names(model):
            raise TargetError(
                f"Layer {layer.name!r} is a tensor-network layer already, but a plan is for the dense model. "
                "tensornet.decompress(model) makes it dense, but does not undo the error of compression."
            )
        found = dict(model.named_modules()).get(layer.name)
        if found is not None and (reason := reason_against(found)) is not None:
            raise TargetError(f"The plan names {layer.name!r}, which cannot be replaced: {reason}.")
        raise TargetError(f"The plan names a layer {layer.name!r} that this model does not have.")
    if target.skip not in ("", ADAPTER):  # adapters get another message
        raise TargetError(
            f"The plan names {layer.name!r}, which cannot be replaced: {target.skip}. Keep it dense by "
            f"plan.replace_layer({layer.name!r}, None)."
        )
    planned, found = (layer.shape, layer.dtype), (tuple(target.matrix.shape), target.matrix.dtype)
    if planned != found:
        raise TargetError(
            f"The plan was made for {layer.name!r} of shape {planned[0]} in {planned[1]}, but in this model "
            f"it has shape {found[0]} in {found[1]}. Plan the compression of this model."
        )


def warn_of_scales(
    targets: Iterable[Target],
    new: Mapping[str, nn.Module],
    weighting: Callable[[Target], Weighting | None],
) -> None:
    """Warn of layers in which scales of integers are too small or too large for the dtype of the scales.

    Args:
        targets: the dense weights.
        new: a new module of each weight, by its name.
        weighting: function that returns the weighting of the errors of a weight.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for target in targets:
        suspects = []
        for core in new[target.name].modules():
            if not isinstance(core, PackedCore) or not core.number_format.is_integer:
                continue
            sizes, limit = core.scale_values.double().abs(), core.number_format.scales.largest
            if bool(((sizes == 0) | (sizes >= limit)).any()):
                suspects.append(core.number_format)
        if not suspects:
            continue
        for number_format in dict.fromkeys(suspects):
            if (fault := scale_fault(target.matrix, number_format, weighting(target))) is not None:
                found.setdefault((number_format.name, fault), []).append(repr(target.name))
    for (name, kind), layers in found.items():
        number_format = NumberFormat.parse(name)
        scales, wide = number_format.scales, number_format.wide
        others = f" and {len(layers) - _NAMED} others" if len(layers) > _NAMED else ""
        became, bound = ("zero", "below") if kind == "underflow" else ("smaller", "above")
        number = scales.smallest if kind == "underflow" else scales.largest
        advice = (
            "Leave these layers out (exclude_modules=)"
            if wide == number_format
            else f"Use bfloat16 scales, as in formats=({wide.name!r},)"
        )
        warnings.warn(
            f"Weights of {', '.join(layers[:_NAMED])}{others} became {became}: the scales of {name!r} have "
            f"{8 * scales.dtype.itemsize} bits and {kind} {bound} {number:.1e}. {advice}.",
            stacklevel=2,
        )


@torch.no_grad()
def compress_layer(
    matrix: Tensor, layer: LayerPlan, weighting: Weighting, rounding: Rounding
) -> tuple[TensorNetworkLinear, float]:
    """Decompose one weight as planned. Arguments and result can be pickled, so any executor can do this.

    Args:
        matrix: the weight, shape `(out_features, in_features)`; its values are exact in the plan's dtype.
        layer: plan of the layer, which is not dense.
        weighting: sensitivity of the loss to errors of the matrix.
        rounding: rounding method for integer cores.

    Returns:
        A layer without a bias that contains the cores (see `with_cores`), and the relative error of the
        weight.

    Raises:
        TopologyError: the family of the planned topology makes cores of other shapes than planned.
    """
    assert layer.topology is not None
    # A walk over the blocks computes in float32. The cores must not depend on this, nor on whether they are
    # read back from a file.
    matrix = matrix.to(layer.dtype)
    family = topology_family(layer.topology.family)
    try:
        result = family.fit(matrix, layer.topology, weighting)
        if result.network.topology.core_shapes != layer.topology.core_shapes:
            raise ValueError(f"it makes cores of shapes {result.network.topology.core_shapes}")
    except NonFiniteError:
        raise
    except (ValueError, KeyError, IndexError) as error:  # the topology may come from an edited file
        raise TopologyError(
            f"Layer {layer.name!r}: {family.name!r} does not make the planned cores "
            f"{layer.topology.core_shapes} ({error}). Edit plans by plan.replace_layer(name, topology), with "
            "a topology of tensornet.topologies."
        ) from error
    network, bound = result.network.to(layer.dtype), result.error
    del result  # its cores may be as large as the weight
    made = linear_from_network(
        network,
        bias=None,
        source="linear",
        storage=layer.storage,
        weighting=weighting,
        rounding=rounding,
    )
    # The certified bound holds for the cores before they are stored. If storing rounds the cores, the error
    # is measured instead.
    exact = layer.storage.plain and result_dtype(layer.dtype) == layer.dtype
    return made, bound if exact else relative_gap(matrix, made.to_matrix())


def with_cores(target: Target, made: NetworkModule) -> list[nn.Module]:
    """Build one module for each module that uses a weight; all share the cores of `made`.

    Args:
        target: the weight.
        made: layer that contains the cores, from `compress_layer`; or an empty layer on the meta device, to
            find out what the new modules store.
    """
    replacements: dict[int, nn.Module] = {}  # a module with several names is replaced by one module
    for module, kind in zip(target.modules, target.kinds, strict=True):
        if id(module) in replacements:
            continue
        new: NetworkModule
        options: dict[str, Any] = {"storage": made.storage, "device": "meta", "dtype": made.dtype}
        if isinstance(module, nn.Embedding):
            scale = embedding_scale(module)
            new = MPOEmbedding(made.topology, padding_idx=module.padding_idx, scale=scale, **options)
        else:
            new = empty_linear(made.topology, bias=False, source=kind.name, **options)
            new.bias = layer_bias(module)  # not a copy, since another module may be tied to this parameter
        new.share_cores(made)
        replacements[id(module)] = new
    for stored in made.stored.values():
        stored.requires_grad_(target.weight.requires_grad and isinstance(stored, nn.Parameter))
    return [replacements[id(module)] for module in target.modules]

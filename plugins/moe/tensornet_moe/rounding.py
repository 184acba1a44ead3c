"""Choice of number formats for the cores of expert banks under a budget of bits, for `tensornet.compress`."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tensornet.compression.allocate import CostCurve, spend_size
from tensornet.compression.config import CompressionConfig
from tensornet.nn.extension import ModelExtension, register_extension
from tensornet.nn.storage import FLOAT, Storage
from tensornet.nn.targets import ALL, matches
from tensornet.quantization import NumberFormat
from tensornet_moe.experts import SharedCoreExperts


@torch.no_grad()
def round_banks(
    banks: Mapping[str, SharedCoreExperts],
    formats: Sequence[NumberFormat],
    *,
    bits_per_weight: float | None = None,
) -> dict[str, str]:
    """Choose a number format for each core of the banks, and store the cores in these formats, in place.

    The error of a core is the relative error of the expert matrices if only this core is rounded. The chosen
    formats minimize the sum of the squared errors of all cores within the budget. If even the smallest
    formats exceed the budget, every core gets its smallest one. In networks of several cores, integers have
    at least four bits, as in `CompressionConfig.formats`. If no format fits a core, the core stays as it is.

    Args:
        banks: the banks by name; their cores must be floats.
        formats: the formats to choose from.
        bits_per_weight: the budget: mean number of bits per value, scales included; no limit if absent.

    Returns:
        A dict from the name of each tensor that is now stored in a number format to the name of the format.
    """
    places: list[tuple[str, str]] = []
    choices: list[list[NumberFormat]] = []
    curves: list[CostCurve] = []
    numbers = 0
    for name, bank in banks.items():
        dense = len(bank.topology.cores) == 1
        allowed = [x for x in formats if (_fits(x, bank) if dense else _for_network(x))]
        for core in bank.topology.core_names if allowed else ():
            topologies = (bank.topology,) if core in bank.shared else bank.topologies
            sizes, costs = [], []
            for number_format in allowed:
                storage = Storage(core_formats={core: number_format})  # type: ignore[arg-type]
                sizes.append(sum(storage.core_size(x, core, bank.dtype)[1] for x in topologies))
                costs.append(copy.deepcopy(bank).quantize(storage) ** 2)
            places.append((name, core))
            choices.append(allowed)
            curves.append(CostCurve(torch.tensor(sizes, dtype=torch.float64), torch.tensor(costs)))
        numbers += bank.num_params
    whole = float("inf") if bits_per_weight is None else bits_per_weight * numbers / 8
    least = sum(float(curve.sizes.min()) for curve in curves)
    chosen = spend_size(curves, max(whole, least)) if curves else []
    found = {place: choices[k][index] for k, (place, index) in enumerate(zip(places, chosen, strict=True))}
    named: dict[str, str] = {}
    for name, bank in banks.items():
        own = {core: found[name, core] for core in bank.topology.core_names if (name, core) in found}
        for key in bank.stored if own else ():
            number_format = own[key.removeprefix("core_").partition("_expert_")[0]]
            if number_format != FLOAT:
                named[f"{name}.{key}"] = number_format.name
        bank.quantize(Storage(core_formats=own))  # type: ignore[arg-type]
    return named


def _fits(number_format: NumberFormat, bank: SharedCoreExperts) -> bool:
    return number_format.bits is None or number_format.fits(bank.in_features)


def _for_network(number_format: NumberFormat) -> bool:
    return number_format.for_networks and (number_format.bits is None or number_format.bits >= 4)


class BankExtension(ModelExtension):
    """Extension that rounds the cores of expert banks when `tensornet.compress` compresses a model.

    Banks are rounded if the configuration lists a single number format, or if it has `bits_per_weight`.

    User-defined banks keep their dtype. In `LowRankDeltaExperts`, only the base is rounded, not the deltas.
    """

    def round_others(self, model: nn.Module, config: CompressionConfig) -> Mapping[str, str]:
        """Round the cores of all banks that the configuration selects; see `round_banks`."""
        one = len(config.number_formats) == 1
        if config.menu is not None or not config.formats or not (one or config.bits_per_weight is not None):
            return {}

        def selected(name: str) -> bool:
            given: Any = config.target_modules
            taken = given in (None, ALL) or any(matches(name, x) for x in _listed(given))
            return taken and not any(matches(name, x) for x in _listed(config.exclude_modules))

        banks = {
            name: part
            for name, part in model.named_modules()
            if isinstance(part, SharedCoreExperts) and not part.storage.own_dtypes and selected(name)
        }
        return round_banks(banks, config.number_formats, bits_per_weight=config.bits_per_weight)


def _listed(patterns: str | Sequence[str] | None) -> Sequence[str]:
    return (patterns,) if isinstance(patterns, str) else patterns or ()


register_extension(BankExtension())

"""Expert parallelism: each process stores all shared cores, and the private cores of some of the experts.

Tokens are sent to the process that stores their expert, and the results are sent back. This takes two
all-to-all exchanges per layer. So the gradients of private cores already contain the contributions of tokens
from all processes. All other gradients, including those of shared cores, are averaged over processes, as in
data parallelism.
"""

from collections.abc import Mapping
from typing import Any

import torch

# If torch._dynamo were first imported while a process group exists, the group's threads would stay alive.
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn

from tensornet.errors import TargetError, TopologyError
from tensornet.nn.extension import structure_changed
from tensornet_moe.bank import ExpertBank
from tensornet_moe.experts import SharedCoreExperts
from tensornet_moe.ffn import ExpertFFN
from tensornet_moe.grouped_linear import Groups, group_rows
from tensornet_moe.layer import SharedCoreMoE
from tensornet_moe.mask import shared_parameters
from tensornet_moe.pool import PooledExperts


class ParallelExperts(nn.Module):
    """Experts of one layer, distributed over a process group; this module replaces their `ExpertFFN`.

    Process `r` of `R` stores experts `r * E / R` to `(r + 1) * E / R - 1`. Every process must run the layer
    the same number of times, forward and backward, even if the process has no tokens.

    Args:
        local: the experts of this process; each process has a copy of the shared cores.
        group: the processes.

    Built by `shard_experts`.
    """

    def __init__(self, local: ExpertFFN, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.local = local
        self._group = (group,)  # process groups cannot be copied, so neither can this module
        self.num_experts = local.num_experts * dist.get_world_size(group)
        self.in_features, self.out_features = local.in_features, local.out_features

    @property
    def group(self) -> dist.ProcessGroup:
        """Process group over which the experts are distributed."""
        return self._group[0]

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """Apply each expert to its rows of `x: (rows, in_features)`, and return `(rows, out_features)`.

        The rows are sorted by expert, as `groups` describes.
        """
        ranks, here = dist.get_world_size(self.group), self.local.num_experts
        # Number of rows to send to each expert, shape (processes, experts per process).
        counts = groups.counts.reshape(ranks, here)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts.contiguous(), group=self.group)
        sent, received = counts.sum(1).tolist(), arriving.sum(1).tolist()
        rows = _Exchange.apply(x, sent, received, self.group)
        expert = torch.arange(here, device=x.device).repeat(ranks).repeat_interleave(arriving.reshape(-1))
        order = expert.argsort(stable=True)  # rows arrive sorted by process first
        y = self.local(rows[order], group_rows(expert[order], here))
        return _Exchange.apply(torch.empty_like(y).index_copy(0, order, y), received, sent, self.group)

    def spec(self) -> dict[str, Any]:
        """Raise TargetError, since only gathered experts can be saved; see `gather_experts`."""
        raise TargetError(
            "These experts are spread over processes. Call gather_experts(model) on every "
            "process, then save on one: the result loads on any number of processes."
        )


def shard_experts(module: nn.Module, group: dist.ProcessGroup | None = None) -> list[str]:
    """Distribute the experts of every `SharedCoreMoE` in a module over a process group, in place.

    Every process must have the same weights before the call. Afterwards each process stores only its own
    experts. Call this before building the optimizer. Then either wrap the model with
    `DistributedDataParallel`, or call `average_gradients(model)` before each `optimizer.step()`. The
    `Trainer` of transformers refuses such a model: a single process writes its checkpoints, but no process
    has all experts.

    Args:
        module: the module that contains the mixtures.
        group: the processes; all processes if absent.

    Returns:
        Names of the parameters that differ between processes. `DistributedDataParallel` must ignore them;
        this function arranges that for `module`.

    Raises:
        TargetError: there is no process group or no mixture; or the experts are not `SharedCoreExperts`,
            belong to an `ExpertPool`, or are already distributed.
        TopologyError: the experts cannot be divided evenly over the processes, or their bonds differ.
    """
    group = group if group is not None else dist.group.WORLD
    if group is None:
        raise TargetError(
            "There is no group of processes to spread experts over. Start the script with torchrun or "
            "accelerate, and call torch.distributed.init_process_group() (or make an Accelerator) first."
        )
    found = {name: part for name, part in module.named_modules() if isinstance(part, SharedCoreMoE)}
    if not found:
        raise TargetError(f"{type(module).__name__} has no SharedCoreMoE whose experts could be spread.")
    for name, moe in found.items():
        _check(name, moe, dist.get_world_size(group))
    for moe in found.values():
        moe.experts = _shard(moe.experts, group)  # type: ignore[assignment,arg-type]  # same interface
    own = {id(p) for p in _private_parameters(module)}
    names = [name for name, p in module.named_parameters() if id(p) in own]
    # DDP must not average the gradients of private cores. The method is private, but documented for this use.
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    structure_changed(module)
    return names


@torch.no_grad()
def gather_experts(module: nn.Module) -> None:
    """Undo `shard_experts` in place: every process gets all experts again.

    The gradients of private cores and biases are dropped.

    Raises:
        TargetError: the module has no distributed experts.
    """
    found = [part for part in module.modules() if isinstance(getattr(part, "experts", None), ParallelExperts)]
    if not found:
        raise TargetError(f"{type(module).__name__} has no experts that are spread over processes.")
    for part in found:
        part.experts = _gather(part.experts)  # type: ignore[arg-type]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [])
    structure_changed(module)


@torch.no_grad()
def average_gradients(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Average gradients over the process group, except those of private cores.

    Use this in training loops without `DistributedDataParallel`, which does the same during the backward
    pass. A missing gradient on a process counts as zero.
    """
    own = {id(p) for p in _private_parameters(module)}
    replicated = [p for p in module.parameters() if id(p) not in own and p.requires_grad]
    if not replicated:
        return
    there = [p.grad is not None for p in replicated]
    # The backend of the group determines the device on which counts can be summed.
    has = torch.tensor(there, dtype=torch.int32, device=replicated[0].device)
    dist.all_reduce(has, group=group)
    for parameter, count in zip(replicated, has.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= dist.get_world_size(group)


class _Exchange(torch.autograd.Function):
    """Differentiable all-to-all exchange of rows; gradients take the reverse path."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        y = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(y, x.contiguous(), received, sent, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back = grad.new_empty(sum(ctx.sent), grad.shape[1])
        dist.all_to_all_single(back, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return back, None, None, None


def _check(name: str, moe: SharedCoreMoE, ranks: int) -> None:
    if isinstance(moe.experts, PooledExperts):
        raise TargetError(f"The experts of {name!r} belong to a pool, which is not spread over processes.")
    if not isinstance(moe.experts, ExpertFFN):
        raise TargetError(f"The experts of {name!r} are spread over processes already.")
    if moe.num_experts % ranks:
        raise TopologyError(
            f"{moe.num_experts} experts of {name!r} cannot be spread evenly over {ranks} processes; use a "
            "number of processes that divides them, or a smaller group."
        )
    for bank in map(moe.experts.bank, moe.experts.names):
        if not isinstance(bank, SharedCoreExperts):
            raise TargetError(
                f"{name!r} has experts of type {type(bank).__name__}; only SharedCoreExperts spread."
            )
        if bank.storage.own_dtypes:
            raise TargetError(
                f"The experts of {name!r} have cores in number formats, which are not spread over processes; "
                "unpack them by bank.quantize('float'), or spread them first."
            )
        if len(set(bank.topologies)) > 1:
            raise TopologyError(f"The bonds of the experts of {name!r} differ; only equal ones spread.")


def _shard(experts: ExpertFFN, group: dist.ProcessGroup) -> ParallelExperts:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    here = slice(rank * experts.num_experts // ranks, (rank + 1) * experts.num_experts // ranks)
    banks = {}
    for name in experts.names:
        bank: Any = experts.bank(name)
        cores = {core: bank.core(core)[here].clone() for core in _private(bank)}
        banks[name] = _bank_like(bank, here.stop - here.start, cores)
    biases = {name: bias if bias is None else bias[here] for name, bias in _biases(experts).items()}
    made = ParallelExperts(_ffn_like(experts, banks, biases), group)
    for parameter in _private_parameters(made):
        # This gradient is a sum over the tokens of all processes. Divide it, so that it is an average, like
        # the gradients of shared cores.
        frozen = not parameter.requires_grad
        parameter.requires_grad_(True).register_hook(lambda grad: grad / ranks)
        parameter.requires_grad_(not frozen)
    return made


def _gather(experts: ParallelExperts) -> ExpertFFN:
    group, local = experts.group, experts.local
    banks = {}
    for name in local.names:
        bank: Any = local.bank(name)
        cores = {core: _gather_rows(bank.core(core), group) for core in _private(bank)}
        banks[name] = _bank_like(bank, experts.num_experts, cores)
    biases = {name: b if b is None else _gather_rows(b, group) for name, b in _biases(local).items()}
    return _ffn_like(local, banks, biases)


def _bank_like(bank: SharedCoreExperts, count: int, cores: Mapping[str, Tensor]) -> SharedCoreExperts:
    """Build a bank with `count` experts, the shared cores of `bank` and the given private cores.

    Frozen cores stay frozen.
    """
    made = SharedCoreExperts._from_cores((bank.topology,) * count, bank.shared, cores, bank.error, bank.dtype)
    made._compute_like(bank.compute_like)
    for core in cores:
        made.get_parameter(f"core_{core}").requires_grad_(bank.get_parameter(f"core_{core}").requires_grad)
    for core, parameter in bank.shared_parameters().items():
        made.register_parameter(f"core_{core}", parameter)
    return made


def _private(bank: SharedCoreExperts) -> list[str]:
    return [core for core in bank.topology.core_names if core not in bank.shared]


def _ffn_like(
    like: ExpertFFN, banks: Mapping[str, ExpertBank], biases: Mapping[str, Tensor | None]
) -> ExpertFFN:
    has_bias = any(bias is not None for bias in biases.values())
    made = ExpertFFN(banks, activation=like.activation, bias=has_bias, dropout=like.dropout, device="meta")
    for name, bias in biases.items():
        if bias is not None:
            made.register_parameter(f"{name}_bias", nn.Parameter(bias.detach().clone()))
    return made.train(like.training)


def _gather_rows(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.detach().contiguous(), group=group)
    return torch.cat(parts)


def _biases(experts: ExpertFFN) -> dict[str, Tensor | None]:
    return {name: getattr(experts, f"{name}_bias") for name in experts.names}


def _private_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Collect the parameters that differ between processes: all parameters of experts except shared cores."""
    found = [part.local for part in module.modules() if isinstance(part, ParallelExperts)]
    shared = {id(core) for local in found for core in shared_parameters(local)}
    return [p for local in found for p in local.parameters() if id(p) not in shared]

"""Random masking of the gradients of shared cores."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet.errors import FormatError, TargetError
from tensornet_moe.bank import ExpertBank
from tensornet_moe.specialist_layers import SpecialistLinear

Granularity = Literal["core", "element"]
GRANULARITIES = ("core", "element")


class GradientMask:
    """Random gradient mask: each optimizer step skips each shared core with probability `p`.

    In one step, a shared core gets the gradients of all tokens, but a private core gets only those of its
    expert's tokens. Masking makes their updates more equal. There are two kinds of masks:

    - `granularity="core"`: for each core, `b ~ Bernoulli(1 - p)` is drawn at each step. With `b = 0`, the
      gradient of the core is set to None. Since all torch optimizers skip parameters without a gradient, the
      core does not change at all, not even by momentum or weight decay. With `b = 1`, the core gets its full
      gradient. `p=0` is exactly no mask, and `p=1` exactly freezes the cores.
    - `granularity="element"`: each element of the gradient is zeroed with probability `p`. Momentum and
      weight decay still act on the zeroed elements.

    A separate generator on the CPU draws the masks. They do not depend on other random numbers and are the
    same on every rank, if all ranks build the same model and take the same steps.

    Either call `apply()` before each `optimizer.step()`, or `attach(optimizer)` once. An attached mask draws
    when the optimizer really steps: once for all micro-batches of gradient accumulation, and not for a step
    that `GradScaler` skips. Clip gradients before masking; the norm then includes the gradients that will be
    masked. With an attached mask, a step with a closure raises an error, since a closure computes gradients
    after masking. Compile the model, not the optimizer's step: a compiled step assumes that the same
    parameters have gradients in every step. Use only one mask for each core, since two would skip it more
    often. SGD with momentum needs `fused=False`: its fused step requires the momenta of all parameters or of
    none.

    Args:
        module_or_parameters: a module, to mask the shared cores of all its banks (each once), or the
            parameters to mask.
        p: probability of skipping a core, in `[0, 1]`.
        granularity: `"core"` or `"element"`.
        seed: seed of the generator.
        schedule: maps the number of steps so far to a factor of `p`, for example `linear_fade(1000)`.
        compensate: scale the *update* of a core that is not masked by `1 / (1 - p)`, so that the mean update
            is the same as without a mask. (Scaling the gradient would have no effect with Adam.) Needs
            `attach` and granularity `"core"`.

    Raises:
        TargetError: no core is shared, or a parameter is given twice.
        ValueError: an option is out of its range.

    Reference:
        Gao et al. 2022, section 4.2, masks the gradient of the central core at random. Draws for each core
        and step, exact skipping, the elementwise variant, schedules and compensation are our additions.

    Example:
        >>> bank = tm.SharedCoreExperts.from_dense(torch.randn(16, 8), num_experts=4)
        >>> mask = tm.GradientMask(bank, p=1.0)
        >>> bank.expert_matrices().square().sum().backward()
        >>> mask.apply()
        1
        >>> [name for name, core in bank.named_parameters() if core.grad is None]
        ['core_1']
    """

    def __init__(
        self,
        module_or_parameters: nn.Module | Iterable[nn.Parameter],
        *,
        p: float,
        granularity: Granularity = "core",
        seed: int = 0,
        schedule: Callable[[int], float] | None = None,
        compensate: bool = False,
    ) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1], got {p}: it is the probability of skipping a core.")
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"Unknown granularity {granularity!r}; choose one of {', '.join(GRANULARITIES)}."
            )
        if compensate and granularity != "core":
            raise ValueError('compensate=True needs granularity="core": it scales the step of a whole core.')
        self.parameters = _targets(module_or_parameters)
        self.p, self.granularity, self.schedule, self.compensate = p, granularity, schedule, compensate
        self.steps = 0
        self._generator = torch.Generator(device="cpu").manual_seed(seed)
        self._hooks: list[Any] = []
        self._before: list[tuple[nn.Parameter, Tensor, float]] = []

    def apply(self) -> int:
        """Draw a mask and apply it to the gradients; call this right before `optimizer.step()`.

        Returns:
            Number of cores skipped in this step (0 for elementwise masks).

        Raises:
            RuntimeError: the mask is attached, or was made with `compensate=True`.
        """
        if self._hooks:
            raise RuntimeError(
                "This mask is attached to an optimizer and draws by itself: do not call apply()."
            )
        if self.compensate:
            raise RuntimeError("compensate=True has to see the update: use attach(optimizer).")
        return self._draw()

    def attach(self, optimizer: torch.optim.Optimizer) -> "GradientMask":
        """Draw and apply a mask before every `optimizer.step()`, until `detach` is called.

        Args:
            optimizer: a torch optimizer, possibly wrapped by accelerate's `prepare`.

        Raises:
            TargetError: the optimizer does not train all masked cores.
            RuntimeError: the mask is already attached.
        """
        if self._hooks:
            raise RuntimeError("This mask is attached to an optimizer already; detach() it first.")
        # Hook the wrapped optimizer: wrappers such as accelerate's call it only when they really step.
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = sum(id(p) not in trained for p in self.parameters)
        if missing:
            raise TargetError(
                f"The optimizer does not train {missing} of the {len(self.parameters)} masked cores. Attach "
                "it to the optimizer that trains them, after wrapping the model: FSDP replaces parameters."
            )
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        if self.compensate:
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._post_step()))
        return self

    def detach(self) -> None:
        """Remove the hooks from the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def current_p(self) -> float:
        """Probability of skipping a core at the next draw."""
        return self.p if self.schedule is None else min(max(self.p * self.schedule(self.steps), 0.0), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the generator state and the step count, so that a resumed run draws the same masks."""
        state = {"generator": self._generator.get_state(), "steps": self.steps, "cores": len(self.parameters)}
        return {**state, "granularity": self.granularity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the generator and step count that `state_dict` returned.

        Raises:
            FormatError: the state is not from a mask, or from one with another number of cores or another
                granularity.
        """
        if state.keys() != {"generator", "steps", "cores", "granularity"}:
            raise FormatError(f"Not the state of a GradientMask: it has the entries {sorted(state)}.")
        if state["cores"] != len(self.parameters):
            raise FormatError(
                f"The state is of a mask over {state['cores']} cores, this one has {len(self.parameters)}: "
                "draws would not line up."
            )
        if (drawn := state["granularity"]) != self.granularity:
            raise FormatError(
                f"The state is of a mask with granularity={drawn!r}, this one has {self.granularity!r}: "
                "draws would not line up. Resume with the same, or start a new mask."
            )
        self._generator.set_state(state["generator"].cpu())
        self.steps = state["steps"]

    def _draw(self) -> int:
        p = self.current_p
        self.steps += 1
        if self.granularity == "element":
            for parameter in self.parameters:
                self._mask_elements(parameter, p)
            return 0
        # Numbers drawn from [0, 1) are never below 0 and always below 1, so p=0 and p=1 are exact.
        masked = (
            torch.rand(len(self.parameters), generator=self._generator, dtype=torch.float64, device="cpu") < p
        ).tolist()
        for parameter, drop in zip(self.parameters, masked, strict=True):
            if drop:
                parameter.grad = None
        return sum(masked)

    def _mask_elements(self, parameter: nn.Parameter, p: float) -> None:
        # Draw even without a gradient, so that the random sequence does not depend on gradients.
        keep = torch.rand(parameter.shape, generator=self._generator, device="cpu") >= p
        if parameter.grad is not None:
            if type(parameter.grad) is not Tensor:
                raise TargetError(
                    f"Elementwise masks need whole gradients, got a {type(parameter.grad).__name__}; sharded "
                    'cores can be masked with granularity="core".'
                )
            parameter.grad.mul_(keep.to(parameter.grad.device))

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        closures = [x for x in (*args, kwargs.get("closure")) if x is not None and x is not optimizer]
        if closures:
            raise RuntimeError(
                "optimizer.step(closure) computes the gradients again after they were masked. Compute them "
                "before, and call optimizer.step() without a closure; LBFGS needs one and cannot be masked."
            )
        # GradScaler calls fused optimizers even in steps that it skips, and marks these steps by `found_inf`.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return
        p = self.current_p
        self._draw()
        if self.compensate and p > 0:
            moving = [x for x in self.parameters if x.grad is not None]
            self._before = [(x, x.detach().clone(), 1 / (1 - p)) for x in moving]

    @torch.no_grad()
    def _post_step(self) -> None:
        for parameter, before, scale in self._before:
            parameter.copy_(before + scale * (parameter - before))
        self._before = []


def linear_fade(steps: int) -> Callable[[int], float]:
    """Return a schedule for `GradientMask`: a factor of `p` that falls linearly from 1 to 0 in `steps` steps.

    Raises:
        ValueError: `steps` is below 1.

    Example:
        >>> fade = tm.linear_fade(100)
        >>> fade(0), fade(50), fade(200)
        (1.0, 0.5, 0.0)
    """
    if steps < 1:
        raise ValueError(f"linear_fade needs at least 1 step, got {steps}.")
    return lambda step: max(0.0, 1 - step / steps)


def shared_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Collect the cores that experts or specialists share, each once, in the order of the submodules.

    Example:
        >>> bank = tm.SharedCoreExperts.from_dense(torch.randn(16, 8), num_experts=4)
        >>> tm.shared_parameters(bank)[0] is bank.shared_parameters()["1"]
        True
    """
    found: dict[int, nn.Parameter] = {}
    for part in module.modules():
        if isinstance(part, ExpertBank | SpecialistLinear):
            found.update((id(p), p) for p in part.shared_parameters().values())
    return list(found.values())


def _targets(module_or_parameters: nn.Module | Iterable[nn.Parameter]) -> list[nn.Parameter]:
    if isinstance(module_or_parameters, nn.Module):
        if found := shared_parameters(module_or_parameters):
            return found
        raise TargetError(
            f"{type(module_or_parameters).__name__} has no core that experts share: looked for expert banks "
            "(SharedCoreExperts) and specialists with shared cores. Give the parameters themselves to mask "
            "others."
        )
    parameters = list(module_or_parameters)
    if not parameters or len({id(p) for p in parameters}) != len(parameters):
        raise TargetError(
            f"A GradientMask needs parameters, each of them once; got {len(parameters)}, of which "
            f"{len({id(p) for p in parameters})} are different."
        )
    return parameters

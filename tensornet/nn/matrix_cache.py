"""A rebuilt matrix that is kept between forward passes in eval, and the test that it is still true.

The matrix belongs to the cores it was built from: the same parameter objects, at the same addresses, at the
same version. PyTorch raises a tensor's version at every in-place change, so an optimizer step, `copy_`
and `load_state_dict` are seen; a new parameter object and an assignment to `.data` are seen by identity and
address. Writing *into* `parameter.data` or into a NumPy view raises no version and cannot be seen: call
`train()`, `eval()` or `drop_cache()` on the layer or model after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _is_any_autocast_enabled as any_autocast
from torch.autograd import forward_ad
from torch.compiler import is_compiling


@dataclass(frozen=True)
class CachedMatrix:
    """A dense matrix `(out_features, in_features)` and what it was made from.

    Args:
        matrix: without gradient, in the dtype that products are computed in.
        states: of each core the parameter, its version and its address when the matrix was built.
        aliases: tensors on the same storage, which keep its address from being used again.
        kind: device type.
        autocast: the dtype of autocast when it was built, None if that was off.
    """

    matrix: Tensor
    states: tuple[tuple[Tensor, int, int], ...]
    aliases: tuple[Tensor, ...]
    kind: str
    autocast: torch.dtype | None

    @classmethod
    def of(cls, matrix: Tensor, cores: Sequence[Tensor | None]) -> "CachedMatrix":
        """Bind a matrix to the present state of the cores."""
        assert all(core is not None for core in cores)
        known = tuple(core for core in cores if core is not None)
        aliases = tuple(core.detach() for core in known)
        kind = matrix.device.type
        states = tuple((core, core._version, core.data_ptr()) for core in known)
        return cls(matrix, states, aliases, kind, autocast_dtype(kind))

    def holds_for(self, cores: Sequence[Tensor | None]) -> bool:
        """Whether rebuilding from these cores would give this matrix."""
        if autocast_dtype(self.kind) != self.autocast:
            return False
        for core, (known, version, address) in zip(cores, self.states, strict=True):
            if core is not known or known._version != version or known.data_ptr() != address:
                return False
        return True


def may_cache(cores: Sequence[Tensor | None]) -> bool:
    """Whether a matrix built from these cores may be kept, and used for this call.

    Not where gradients of the cores are recorded, not inside a `torch.func` transform or a trace (their
    tensors die with them), and only for ordinary parameters: substitutes of `functional_call`,
    parametrizations, sharded and fake tensors have no identity or version that would tell when they change.
    """
    if transforms_active() or torch.jit.is_tracing():  # a tracer crashes on tensors kept from its trace
        return False
    recording = is_grad_enabled()
    for core in cores:
        # Integers are buffers.
        if type(core) is not nn.Parameter and (type(core) is not Tensor or core.is_floating_point()):
            return False
        if core.is_inference() or core.is_meta:
            return False
        if recording and core.requires_grad:
            return False
    return True


def may_write_in_place() -> bool:
    """Whether results may be written into tensors made before: nothing differentiates or traces."""
    if is_compiling() or is_grad_enabled() or transforms_active() or any_autocast():
        return False
    return forward_ad._current_level < 0 and not torch.jit.is_tracing()


def compute_dtype(core: Tensor) -> torch.dtype:
    """The dtype in which a product with this core is computed: autocast's where that is on."""
    lowered = autocast_dtype(core.device.type)
    if lowered is None or core.dtype == torch.float64 or core.is_complex():
        return core.dtype
    return lowered


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype of autocast on a device type, None where it is off."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

"""Integer kernels that Inductor generates, and when they can be used.

Inductor calls them, or with `freezing` and `max_autotune` generates its own for the processor. Those use
units for matrices (AMX), which torch's kernels leave idle, and unpack into the cache: on such processors they
are as fast as a dense matrix for any number of tokens. But the cache of compiled graphs does not tell frozen
integers of one shape apart (torch 2.13): a second model would compute with the weights of the first.
"""

import torch


# In a trace, where settings are as good as constants: a program is compiled for them.
@torch.compiler.assume_constant_result
def kernels_are_generated() -> bool:
    """Return True if Inductor is set to generate kernels that are fast for any number of tokens.

    Example:
        >>> from tensornet.nn.generated_kernels import kernels_are_generated
        >>> kernels_are_generated()  # which takes TORCHINDUCTOR_FREEZING=1 and TORCHINDUCTOR_MAX_AUTOTUNE=1
        False
    """
    return _generates() and not _caches() and getattr(torch.cpu, "_is_amx_tile_supported", bool)()


@torch.compiler.assume_constant_result
def kernels_are_confused() -> bool:
    """Return True if Inductor is set to generate kernels, and to cache them."""
    return _generates() and _caches()


def _generates() -> bool:
    from torch._inductor import config

    tuned = config.max_autotune or config.max_autotune_gemm
    return bool(config.freezing and tuned and not torch.is_grad_enabled())  # only inference is frozen


def _caches() -> bool:
    from torch._inductor import config

    return bool((config.fx_graph_cache or config.fx_graph_remote_cache) and not config.force_disable_caches)

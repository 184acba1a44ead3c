"""Hooks and wrappers of a layer: carried to the layer that takes its place, or a reason to leave it.

Hooks of PyTorch, and those of accelerate that move inputs between devices, see calls alone, and so serve any
layer with the same inputs and outputs. A `forward` set on the module itself may do anything with the weight.
"""

from torch import nn

from tensornet.optional import import_optional

#: Dictionaries of `nn.Module` that hold the hooks of its calls and gradients.
_DICTIONARIES = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks"),
)
#: Attributes in which accelerate keeps its hook, and the `forward` that it wraps.
ACCELERATE = (HOOK, WRAPPED) = ("_hf_hook", "_old_forward")


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks of the module that it replaces.

    Both share the dictionaries, so that handles which registering returned still remove their hooks.

    >>> old, new = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    >>> handle = old.register_forward_hook(lambda module, inputs, output: 0 * output)
    >>> carry_hooks(old, new)
    >>> bool(new(torch.ones(4)).any())
    False
    >>> handle.remove()
    >>> bool(new(torch.ones(4)).any())
    True
    """
    if old is new:
        return
    for name in _DICTIONARIES:
        setattr(new, name, getattr(old, name))
    new._is_full_backward_hook = old._is_full_backward_hook
    hook = vars(old).get(HOOK)
    if hook is None or vars(new).get(HOOK) is hook:
        return
    hooks = import_optional("accelerate.hooks", extra="hf", user="A layer with a hook of accelerate")
    # An empty hook first: the real one would place the tensors anew, which are where they belong.
    hooks.add_hook_to_module(new, hooks.ModelHook())
    new._hf_hook = hook


def has_own_forward(module: nn.Module) -> bool:
    """Return True if another `forward` than that of its class is set on a module.

    >>> layer = torch.nn.Linear(4, 4)
    >>> layer.forward = lambda x: torch.zeros(4)
    >>> has_own_forward(layer), has_own_forward(torch.nn.Linear(4, 4))
    (True, False)
    """
    values = vars(module)
    forward = values.get(WRAPPED if HOOK in values else "forward")
    if forward is None:
        return False
    # Wrappers that were taken off leave the bound method of the class.
    bound_to, function = getattr(forward, "__self__", None), getattr(forward, "__func__", None)
    return bound_to is not module or function is not type(module).forward

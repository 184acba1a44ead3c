"""Fused paths of PyTorch's own modules, which read weights past the layers that hold them."""

from torch import nn

from tensornet.nn.module import NetworkModule
from tensornet.nn.structure_hooks import register_structure_hook

#: What PyTorch asks before it takes a fused path, by the class that asks.
_QUESTIONS = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
_BEFORE = "_tensornet_fused_path"


@register_structure_hook
def keep_off_fused_paths(model: nn.Module) -> bool:
    """Let PyTorch's encoders call their layers where some are made of cores, and fuse them where none are.

    In eval without gradients they would hand `linear1.weight` to one fused operation, which such a layer
    cannot answer.

    Returns:
        False: how the model is saved is for others to see to.
    """
    for module in model.modules():
        question = next((x for kind, x in _QUESTIONS.items() if isinstance(module, kind)), None)
        if question is None:
            continue
        if any(isinstance(part, NetworkModule) for part in module.modules()):
            vars(module).setdefault(_BEFORE, getattr(module, question))
            setattr(module, question, False)
        elif _BEFORE in vars(module):
            setattr(module, question, vars(module).pop(_BEFORE))
    return False

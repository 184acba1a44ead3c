"""Fused paths of PyTorch's encoders, which bypass the `forward` of their layers."""

from torch import nn

from tensornet.nn.module import NetworkModule

#: Attribute that a class checks before it takes a fused path.
_QUESTIONS = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
_BEFORE = "_tensornet_fused_path"


def keep_off_fused_paths(model: nn.Module) -> None:
    """Disable the fused paths of encoders with tensor-network layers, and restore the others.

    In eval without gradients an encoder passes `linear1.weight` to one fused operation, and a tensor-network
    layer has no such weight.
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

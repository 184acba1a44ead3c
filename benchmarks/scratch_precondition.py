"""Preconditioned gradients for chains of three cores with a shared center.

An update of one core changes the matrix by an amount that depends on the other cores. Multiplying the
gradient of a core by the inverse Gram matrices of what stands beside it removes that dependence: the step is
then the same in every gauge of the bonds, as a Riemannian one is.

Reference:
    Tong, Ma, Chi 2021, "Accelerating Ill-Conditioned Low-Rank Matrix Estimation via Scaled Gradient Descent";
    Zhang, Pilanci 2024, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models" (before AdamW).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tensornet_moe as tm


@torch.no_grad()
def precondition(model: nn.Module, damping: float) -> None:
    """Replace the gradients of every bank with one shared center between two private ends.

    A gradient keeps its norm, so that clipping does what it does without this.

    Args:
        model: after `backward`.
        damping: added to each Gram matrix, in units of its mean eigenvalue.
    """
    for bank in model.modules():
        if isinstance(bank, tm.SharedCoreExperts) and len(bank.topology.core_names) == 3 and bank.shared:
            first, center, last = bank.topology.core_names
            if bank.shared == (center,):
                cores = [bank.get_parameter(f"core_{name}") for name in (first, center, last)]
                for core, gradient in zip(cores, scaled_gradients(cores, damping), strict=True):
                    assert core.grad is not None
                    core.grad.copy_(gradient * (core.grad.norm() / gradient.norm().clamp_min(1e-30)))


def scaled_gradients(cores: list[nn.Parameter], damping: float) -> list[Tensor]:
    """Multiply the gradients of three cores by the inverse Gram matrices of their environments.

    Args:
        cores: `(E, 1, o, i, b)`, `(b, o, i, c)` and `(E, c, o, i, 1)`, with gradients.
        damping: see `precondition`.
    """
    left, right = cores[0].flatten(1, 3), cores[2].flatten(2)  # shapes: (E, p, b), (E, c, r)
    center = cores[1].flatten(1, 2)  # shape: (b, q, c)
    left_gram, right_gram = left.mT @ left, right @ right.mT
    beside_left = torch.einsum("bqc,ecd,Bqd->ebB", center, right_gram, center)
    beside_right = torch.einsum("bqc,ebB,Bqd->ecd", center, left_gram, center)

    def inverse(gram: Tensor) -> Tensor:
        size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return torch.linalg.inv(gram + (damping * size + 1e-12) * eye)

    gradients = [core.grad for core in cores]
    assert all(gradient is not None for gradient in gradients)
    g_left, g_center, g_right = (x for x in gradients if x is not None)
    return [
        torch.einsum("exoib,ebB->exoiB", g_left, inverse(beside_left)),
        torch.einsum("bB,Boic,cd->boid", inverse(left_gram.mean(0)), g_center, inverse(right_gram.mean(0))),
        torch.einsum("ecd,edoix->ecoix", inverse(beside_right), g_right),
    ]

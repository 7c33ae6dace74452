"""AdamW for pretraining."""

from __future__ import annotations

import torch

# Devices on which torch updates all parameters in one fused kernel.
_FUSED = ("cpu", "cuda")


def make_adamw(
    model: torch.nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """AdamW that decays matrices only; biases, scales and shifts are left free.

    Args:
        model: all its trainable parameters are taken.
        lr: learning rate; a schedule may change it later.
        weight_decay: decay of parameters with two or more axes.
        betas: decay rates of the two moments.

    Returns:
        The optimizer, fused where torch offers it.

    Paper: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization".
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in _FUSED for parameter in parameters)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)

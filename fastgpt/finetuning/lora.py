"""LoRA: a frozen linear layer plus a trained product of two thin matrices (appendix E).

    y = x Wᵀ + b + scale · (x A) B        A (in_dim, rank) random, B (rank, out_dim) zero, so training starts at the
                                          model as it was

    scaling         scale
    "alpha/rank"    alpha / rank          the paper, and the book's repository; the default here
    "alpha"         alpha                 the printed book, and the PyPI package llms-from-scratch 1.0.19

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastgpt.weights.files import model_tensors

SCALINGS = ("alpha/rank", "alpha")


class LoRALayer(nn.Module):
    """The two thin matrices alone: scale · (x A) B.

    Args:
        in_dim: width of the input.
        out_dim: width of the output.
        rank: columns of A and rows of B.
        alpha: how much the product counts.
        scaling: "alpha/rank" or "alpha", see the table of this module.

    Raises:
        ValueError: rank, alpha or scaling cannot be used.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float, *, scaling: str = "alpha/rank") -> None:
        super().__init__()
        check_lora(rank, alpha, scaling)
        self.A = nn.Parameter(torch.empty(in_dim, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        self.alpha = alpha
        self.rank = rank
        self.scaling = scaling

    @property
    def scale(self) -> float:
        """The factor before the product."""
        return self.alpha / self.rank if self.scaling == "alpha/rank" else self.alpha

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_dim) to (..., out_dim)."""
        return self.scale * (x @ self.A @ self.B)

    def delta(self) -> Tensor:
        """What the layer adds to a linear layer's weight, (out_dim, in_dim), at least in float32."""
        wide = torch.promote_types(self.A.dtype, torch.float32)
        return self.scale * (self.A.to(wide) @ self.B.to(wide)).T

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling!r}"


class LinearWithLoRA(nn.Module):
    """A linear layer plus its LoRA layer. The linear layer is kept as it is; freezing it is the caller's choice.

    Args:
        linear: the layer to adapt; its device and dtype are those of the LoRA layer too.
        rank, alpha, scaling: see `LoRALayer`.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, *, scaling: str = "alpha/rank") -> None:
        super().__init__()
        self.linear = linear
        lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha, scaling=scaling)
        # Drawn first and moved then, so that a seed gives the same start on every device.
        self.lora = lora.to(device=linear.weight.device, dtype=linear.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_dim) to (..., out_dim)."""
        out: Tensor = self.linear(x) + self.lora(x)
        return out

    def merged_weight(self) -> Tensor:
        """The one matrix that does the work of both, (out_dim, in_dim), in the dtype of the linear layer."""
        weight = self.linear.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(wide) + self.lora.delta()).to(weight.dtype)


class LinearWithLoRAMerged(LinearWithLoRA):
    """`LinearWithLoRA` computed as one product with W + scale · (A B)ᵀ (chapter 6's bonus, with its plain alpha).

    Args:
        linear, rank, alpha, scaling: as there.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, *, scaling: str = "alpha") -> None:
        super().__init__(linear, rank, alpha, scaling=scaling)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_dim) to (..., out_dim)."""
        return functional.linear(x, self.merged_weight(), self.linear.bias)


def replace_linear_with_lora(model: nn.Module, rank: int, alpha: float, *, scaling: str = "alpha/rank") -> None:
    """Put a `LinearWithLoRA` in the place of every `nn.Linear` below a module, `out_head` included.

    Nothing is frozen: as in the book, set requires_grad of the model's parameters to False before.

    Args:
        model: changed in place.
        rank, alpha, scaling: see `LoRALayer`.

    Raises:
        ValueError: rank, alpha or scaling cannot be used, or the model has LoRA layers already.
    """
    check_lora(rank, alpha, scaling)
    if any(isinstance(module, (LinearWithLoRA, LoRALayer)) for module in model.modules()):
        raise ValueError(
            "The model has LoRA layers already (was a notebook cell run twice?). "
            "Build the model anew, or fold them into its weights with merge_lora(model)."
        )
    for name in linear_names(model):
        wrap_linear(model, name, rank, alpha, scaling)


def linear_names(model: nn.Module) -> list[str]:
    """Names of all linear layers below a module, in the order in which the book replaces them."""
    return [name for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]


def wrap_linear(model: nn.Module, name: str, rank: int, alpha: float, scaling: str) -> None:
    """Put a `LinearWithLoRA` in the place of the linear layer `name`."""
    linear = cast(nn.Linear, model.get_submodule(name))
    _put(model, name, LinearWithLoRA(linear, rank, alpha, scaling=scaling))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LinearWithLoRA]]:
    """(name, layer) of every linear layer with LoRA."""
    for name, module in model.named_modules():
        if isinstance(module, LinearWithLoRA):
            yield name, module


@torch.no_grad()
def merge_lora(model: nn.Module) -> int:
    """Fold every LoRA layer into its linear layer, and put the plain linear layer back in its place.

    The Parameter objects of the linear layers stay the same; the sum is computed in float32 and rounded once.

    Args:
        model: changed in place.

    Returns:
        How many layers were merged; 0 when there was none.
    """
    layers = list(lora_layers(model))
    for name, layer in layers:
        if not name:
            raise ValueError("merge_lora replaces layers inside a model; this is a LinearWithLoRA itself.")
        layer.linear.weight.copy_(layer.merged_weight())
        _put(model, name, layer.linear)
    return len(layers)


@torch.no_grad()
def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that `merge_lora` would leave, by their names then; the model stays as it is."""
    tensors = model_tensors(model)
    for prefix, layer in lora_layers(model):
        dot = f"{prefix}." if prefix else ""
        for name in [name for name in tensors if name.startswith(f"{dot}linear.") or name.startswith(f"{dot}lora.")]:
            tensor = tensors.pop(name)
            leaf = name.removeprefix(f"{dot}linear.")
            if leaf == "weight":
                tensors[f"{dot}weight"] = layer.merged_weight().detach()
            elif leaf == "bias":
                tensors[f"{dot}bias"] = tensor
    return tensors


def check_lora(rank: int, alpha: float, scaling: str) -> None:
    """Raise ValueError unless a LoRA layer can be made of these."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, such as 16; got {rank!r}.")
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(float(alpha)):
        raise ValueError(f"alpha must be a number, such as 16; got {alpha!r}.")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(map(repr, SCALINGS))}; got {scaling!r}.")


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    # A new module is in training mode; where it goes, dropout may be off.
    module.train(getattr(owner, child).training)
    setattr(owner, child, module)

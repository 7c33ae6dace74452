"""The output head and the loss in one op, without the (rows, vocab) tensor of logits: the door of the room.

    loss = mean over rows r with targets[r] != ignore_index of  logsumexp(logits[r]) - logits[r, targets[r]]
    logits = x weightᵀ,    dlogits = (softmax(logits) - onehot(targets)) / count

Rows are taken in chunks whose logits exist for a moment. Their gradient is known as soon as they are, so it is written
over them, and dx and dweight come out of the forward pass; backward only scales them. Saved: x, weight, targets, and
the gradients until they are handed out (a second backward computes them anew). A backend that is not differentiated by
PyTorch offers

    forward(x, weight, targets, ignore_index, needs_dx, needs_dweight) -> (loss, dx, dweight)

for x (rows, n) and targets (rows,), with None for a gradient that is not needed; the loss is not rounded yet.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.ops import dispatch, registration

BACKENDS = ("triton", "cuda", "cpu", "torch", "reference")


class Case(NamedTuple):
    """What the choice of a backend depends on."""

    device: str
    dtype: torch.dtype
    weight_dtype: torch.dtype
    n: int


OP = dispatch.Op(__name__, BACKENDS)
EXAMPLE_CASES = tuple(Case("cpu", dtype, dtype, 768) for dtype in (torch.float32, torch.bfloat16))


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, *, backend: str | None = None
) -> Tensor:
    """Mean cross-entropy of the logits x weightᵀ, which are never stored as a whole.

    Args:
        x: (..., n), floating point: the last hidden states.
        weight: (vocab_size, n) in the dtype of `x` or float32: the output head, which has no bias.
        targets: (...), int64, from 0 to vocab_size - 1, or `ignore_index`.
        ignore_index: rows with this target count neither in the sum nor in the mean.
        backend: nearest choice of a backend; see `fastgpt.ops.use_backend`.

    Returns:
        (), in the dtype of `x`: F.cross_entropy of the logits; NaN when every target is ignored. Sums are float32
        (float64 for float64). Under torch.autocast products are in its dtype, and the loss is float32, as PyTorch's.

    Raises:
        IndexError: a target is outside the vocabulary (on the CPU; elsewhere as the backend does).
        ValueError: a shape, dtype or device does not fit.
        BackendError: the backend that was asked for cannot run this input.

    Paper: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024.
    """
    _check(x, weight, targets)
    targets = targets.reshape(-1)
    dtype, device = x.dtype, dispatch.device_type(x)
    if dtype is not torch.float64 and torch.is_autocast_enabled(device):
        x, dtype = x.to(torch.get_autocast_dtype(device)), torch.float32
        weight = weight if weight.dtype is torch.float32 else weight.to(x.dtype)
    needs_dx, needs_dweight = registration.needs_grad(x), registration.needs_grad(weight)
    if torch.compiler.is_compiling():
        call = torch.ops.fastgpt.linear_cross_entropy
        loss: Tensor = call(_rows(x), weight, targets, ignore_index, needs_dx, needs_dweight, backend)[0]
        return loss.to(dtype)
    chosen = OP.choose(_case(x, weight), backend)
    if not getattr(chosen, "CHECKS_RANGE", False):
        _check_targets(targets, weight.shape[0], ignore_index)
    try:
        if getattr(chosen, "NATIVE_AUTOGRAD", False):
            loss = chosen.apply(_rows(x), weight, targets, ignore_index)
        elif needs_dx or needs_dweight:
            loss = _LinearCrossEntropy.apply(x, weight, targets, ignore_index, chosen)
        else:
            loss = chosen.forward(_rows(x), weight, targets, ignore_index, False, False)[0]
    except IndexError:
        # It found such a target; this says where.
        _check_targets(targets, weight.shape[0], ignore_index)
        raise
    return loss.to(dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _case(x: Tensor, weight: Tensor) -> Case:
    return Case(dispatch.device_type(x), x.dtype, weight.dtype, x.shape[-1])


def _check(x: Tensor, weight: Tensor, targets: Tensor) -> None:
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1] or targets.shape != x.shape[:-1]:
        raise ValueError(
            "linear_cross_entropy: x must be (..., n), weight (vocab_size, n), targets (...); got "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}."
        )
    if weight.shape[0] == 0:
        raise ValueError("linear_cross_entropy: weight has no rows, so there is no class; the vocabulary is empty.")
    if not x.is_floating_point() or weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"linear_cross_entropy: x must be floating point and weight of its dtype or torch.float32; got {x.dtype} "
            f"and {weight.dtype}."
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: targets must be torch.int64, got {targets.dtype}; use targets.long().")
    if not x.device == weight.device == targets.device:
        raise ValueError(
            f"linear_cross_entropy: x is on {x.device}, weight on {weight.device}, targets on {targets.device}; move "
            f"all to one device."
        )


def _check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    # Elsewhere the look would wait for the device.
    if not targets.is_cpu:
        return
    wrong = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise IndexError(
            f"linear_cross_entropy: target {int(targets[place])} (number {place} of {targets.numel()}) is outside the "
            f"vocabulary, 0 to {vocab_size - 1}, and is not ignore_index, {ignore_index}; was another tokenizer used?"
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chosen: ModuleType) -> Tensor:
        loss, *ctx.grads = chosen.forward(_rows(x), weight, targets, ignore_index, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(x, weight, targets)
        ctx.settings = (ignore_index, chosen)
        return loss

    @staticmethod
    @registration.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # Handed out, not kept: the gradient of the head can then become its .grad without a copy.
        grads, ctx.grads = ctx.grads, None
        x, *saved = ctx.saved_tensors
        if grads is None:
            ignore_index, chosen = ctx.settings
            _, *grads = chosen.forward(_rows(x), *saved, ignore_index, *ctx.needs_input_grad[:2])
        dx, dweight = _scaled(grads, dloss)
        return None if dx is None else dx.view(x.shape), dweight, None, None, None


def _scaled(grads: list[Tensor | None], dloss: Tensor) -> list[Tensor | None]:
    # A loss that is differentiated itself has dloss = 1; to know that of another device would mean to wait for it.
    if dloss.is_cpu and dloss.item() == 1:
        return grads
    return [None if grad is None else grad.mul_(dloss) for grad in grads]


# The registered op: what torch.compile sees.


def _forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    needs_dx: bool,
    needs_dweight: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_targets(targets, weight.shape[0], ignore_index)
    chosen = OP.choose(_case(x, weight), backend)
    if not getattr(chosen, "NATIVE_AUTOGRAD", False):
        loss, dx, dweight = chosen.forward(x, weight, targets, ignore_index, needs_dx, needs_dweight)
    else:
        loss = chosen.apply(x, weight, targets, ignore_index)
        dx, dweight = chosen.gradients(x, weight, targets, ignore_index)
    # An op gives tensors only: an empty one stands for no gradient.
    loss = loss.to(torch.promote_types(x.dtype, torch.float32))
    return loss, dx if needs_dx else x.new_empty(0), dweight if needs_dweight else weight.new_empty(0)


def _forward_fake(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs_dx: bool, needs_dweight: bool, *unused: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if needs_dx else (0,))
    loss = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return loss, dx, weight.new_empty(weight.shape if needs_dweight else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[4:6]
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dloss: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = (grad * dloss if needed else None for grad, needed in zip(ctx.saved_tensors, ctx.needs, strict=True))
    return *grads, None, None, None, None, None


registration.register(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool needs_dx, "
    "bool needs_dweight, str? backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)

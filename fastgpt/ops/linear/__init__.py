"""Linear layers: the door of the room.

    linear:         y = x Wᵀ + b
    packed_linear:  y = [x W₀ᵀ + b₀ | x W₁ᵀ + b₁ | ...], side by side in one tensor

Backward: dx = Σ dyᵢ Wᵢ, dWᵢ = dyᵢᵀ x, dbᵢ = the sums of the columns of dyᵢ; only those that are needed are computed.
Saved for backward: x and the weights. Sums are float32 (float64 for float64), results have the dtype of x.
On the CPU products of float32 below 2^25 multiplications are left to PyTorch, so the last bits depend on the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.ops import buffers, dispatch, registration

# Fewer multiplications than these take PyTorch less time, whose autograd is in C++. Forward and backward of 256 rows on
# one and on two Zen 3 cores, PyTorch's time in ours: three packed 128 x 128 0.82 and 0.75, three 256 x 256 (2^25) 0.94
# and 0.96, one 128 x 512 0.92 and 0.84. In bfloat16 PyTorch's product is the slower one by far.
_TINY = 2**25

BACKENDS = ("cpu", "torch", "reference")


class Case(NamedTuple):
    """What the choice of a backend depends on."""

    device: str
    dtype: torch.dtype


OP = dispatch.Op(__name__, BACKENDS)
EXAMPLE_CASES = tuple(Case("cpu", dtype) for dtype in (torch.float32, torch.bfloat16))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """The linear layer `x @ weight.T + bias`, as F.linear.

    Args:
        x: (..., n_in), floating point.
        weight: (n_out, n_in), like `x`.
        bias: (n_out,), like `x`, or None.
        backend: nearest choice of a backend; see `fastgpt.ops.use_backend`.

    Returns:
        (..., n_out) in the dtype of `x`; under torch.autocast in autocast's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        BackendError: the backend that was asked for cannot run this input.
    """
    return _run("linear", x, (weight,), (bias,), backend)


def packed_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Several linear layers of one input, their results side by side: query, key and value in one tensor.

    Args:
        x: (..., n_in), floating point.
        weights: at least one, (n_out_i, n_in) each, like `x`.
        biases: one for each weight, (n_out_i,) or None; None for no bias at all.
        backend: nearest choice of a backend; see `fastgpt.ops.use_backend`.

    Returns:
        (..., sum of n_out_i) in the dtype of `x`; under torch.autocast in autocast's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        BackendError: the backend that was asked for cannot run this input.
    """
    weights = tuple(weights)
    biases = (None,) * len(weights) if biases is None else tuple(biases)
    return _run("packed_linear", x, weights, biases, backend)


def _run(
    name: str, x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], backend: str | None
) -> Tensor:
    x, weights, biases = prepare(name, x, weights, biases)
    if torch.compiler.is_compiling():
        if x.device.type != "cpu" and backend is None:
            # The compiler joins its own product with what comes after.
            return OP.module("torch").apply(x, weights, biases)
        has_bias = [bias is not None for bias in biases]
        given = [bias for bias in biases if bias is not None]
        out: Tensor = torch.ops.fastgpt.packed_linear(x, list(weights), given, has_bias, backend)
        return out
    chosen = choose(x, weights, backend)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        return chosen.apply(x, weights, biases)
    if registration.needs_grad(x, *weights, *(bias for bias in biases if bias is not None)):
        return _PackedLinear.apply(x, chosen, len(weights), *weights, *biases)
    return chosen.forward(x, weights, biases)


def prepare(
    name: str, x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """All of them in autocast's dtype where it is on, and checked. Raises ValueError with the name of the op."""
    device = dispatch.device_type(x)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, *cast = (tensor.to(dtype) if tensor.dtype is not torch.float64 else tensor for tensor in (x, *weights))
        weights = tuple(cast)
        biases = tuple(bias if bias is None or bias.dtype is torch.float64 else bias.to(dtype) for bias in biases)
    _check(name, x, weights, biases)
    return x, weights, biases


def choose(x: Tensor, weights: tuple[Tensor, ...], backend: str | None) -> ModuleType:
    """The backend of a product: PyTorch's for a small one, unless another is asked for."""
    chosen = OP.for_tiny(backend) if is_tiny(x, weights) else None
    return chosen or OP.choose(Case(dispatch.device_type(x), x.dtype), backend)


def is_tiny(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
    """True where the product is left to PyTorch, see `dispatch.Op.for_tiny`."""
    if not x.is_cpu or x.dtype is not torch.float32:
        return False
    return x.shape[:-1].numel() * sum(map(Tensor.numel, weights)) < _TINY


def _check(name: str, x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> None:
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"{name}: there must be at least one weight and as many biases (None where there is none); "
            f"got {len(weights)} weights and {len(biases)} biases."
        )
    n_in, dtype, device = x.shape[-1:], x.dtype, x.device
    for weight, bias in zip(weights, biases):  # noqa: B905 (as long as each other)
        if weight.ndim != 2 or weight.shape[1:] != n_in:
            raise ValueError(
                f"{name}: weight must be (n_out, n_in) with the n_in of x (..., n_in); "
                f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}."
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{name}: bias must have one number for each row of weight, ({weight.shape[0]},); "
                f"got {tuple(bias.shape)}."
            )
        for other in (weight, bias):
            if other is not None and (other.dtype is not dtype or other.device != device):
                raise ValueError(
                    f"{name}: x, weight and bias must have one dtype and device; got x {x.dtype} on {x.device} and "
                    f"{other.dtype} on {other.device}. Cast or move one of them with .to()."
                )
    if not x.is_floating_point():
        raise ValueError(f"{name}: x must be floating point, got {x.dtype}; cast it with x.float().")


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: ModuleType, count: int, *parameters: Tensor | None) -> Tensor:
        weights, biases = parameters[:count], parameters[count:]
        # x is read for the gradients of the weights alone, the weights for that of x.
        needs_x, needs_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3 : 3 + count])
        kept = registration.compact(x if needs_weights else None)
        ctx.save_for_backward(*kept, *(weights if needs_x else (None,) * count))
        ctx.chosen, ctx.shape, ctx.sizes = chosen, x.shape, [weight.shape[0] for weight in weights]  # type: ignore[union-attr]
        return chosen.forward(x, weights, biases)

    @staticmethod
    @registration.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        x = None if x is None else buffers.cast(x, dout.dtype)
        needs = ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]
        grads = ctx.chosen.backward(dout, x, weights, ctx.shape, ctx.sizes, needs)
        return grads[0], None, None, *grads[1:]


# The registered op: what torch.compile sees. Its lists hold tensors alone, so that autograd knows each; has_bias says
# whose the biases are.


def _forward(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], has_bias: list[bool], backend: str | None
) -> Tensor:
    chosen = OP.choose(Case(dispatch.device_type(x), x.dtype), backend)
    given = iter(biases)
    spread = tuple(next(given) if has else None for has in has_bias)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        return chosen.apply(x, weights, spread).contiguous()
    return chosen.forward(x, weights, spread)


def _forward_fake(x: Tensor, weights: list[Tensor], *unused: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(weight.shape[0] for weight in weights))


def _backward(dout: Tensor, x: Tensor, weights: list[Tensor], needs: list[bool], backend: str | None) -> list[Tensor]:
    """The gradients that `needs` asks for: of x, of each weight, of each bias, in this order."""
    chosen = OP.choose(Case(dispatch.device_type(x), x.dtype), backend)
    if not getattr(chosen, "NATIVE_AUTOGRAD", False):
        grads = chosen.backward(dout, x, weights, x.shape, [weight.shape[0] for weight in weights], needs)
        return [grad for grad in grads if grad is not None]
    count = len(weights)
    biases = [weight.new_zeros(weight.shape[0]) for weight in weights]
    grads = registration.native_backward(
        lambda x, *parameters: chosen.apply(x, parameters[:count], parameters[count:]), (x, *weights, *biases), dout
    )
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


def _backward_fake(
    dout: Tensor, x: Tensor, weights: list[Tensor], needs: list[bool], backend: str | None
) -> list[Tensor]:
    shapes = [x.shape, *(weight.shape for weight in weights), *(weight.shape[:1] for weight in weights)]
    return [x.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, _, ctx.has_bias, ctx.backend = inputs
    ctx.save_for_backward(x, *weights)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    needs_x, needs_weights, needs_biases = ctx.needs_input_grad[:3]
    given = iter(needs_biases if any(ctx.has_bias) else ())
    needs = [needs_x, *needs_weights, *(has and next(given) for has in ctx.has_bias)]
    made = iter(torch.ops.fastgpt.packed_linear_backward(dout, x, weights, needs, ctx.backend))
    dx, *grads = (next(made) if needed else None for needed in needs)
    dbiases = [grad for grad, has in zip(grads[len(weights) :], ctx.has_bias, strict=True) if has]
    return dx, grads[: len(weights)], dbiases, None, None


registration.register(
    "packed_linear(Tensor x, Tensor[] weights, Tensor[] biases, bool[] has_bias, str? backend) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
registration.register(
    "packed_linear_backward(Tensor dout, Tensor x, Tensor[] weights, bool[] needs, str? backend) -> Tensor[]",
    _backward,
    _backward_fake,
)

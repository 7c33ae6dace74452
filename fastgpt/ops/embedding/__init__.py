"""Token and position embedding with dropout: the door of the room.

    out[b, t] = dropout(weight[ids[b, t]] + position_weight[t])

Saved for backward: ids and the seed; the mask is drawn again (fastgpt.ops.philox) for row b · n_tokens + t. A backend
that is not differentiated by PyTorch offers

    forward(ids, weight, position_weight, dropout_p, seed) -> out
    backward(dout, ids, vocab_size, context_length, dropout_p, seed) -> (dweight, dposition)

whose gradients are dense, in the dtype of dout, with zeros in the rows that nothing used.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.ops import dispatch, philox, registration

# Up to here PyTorch's own ops take less time, though our kernel reads and writes less: 256 tokens by 64 numbers forward
# and backward on a Zen 3 core in 0.73 of our time, 1024 by 128 in 0.82, 1024 by 256 in 1.44.
_TINY = 2**17

BACKENDS = ("triton", "cpu", "torch", "reference")


class Case(NamedTuple):
    """What the choice of a backend depends on."""

    device: str
    dtype: torch.dtype
    ids_dtype: torch.dtype
    n: int
    dropout: bool


OP = dispatch.Op(__name__, BACKENDS)
EXAMPLE_CASES = tuple(
    Case("cpu", dtype, torch.int64, 768, dropout)
    for dtype in (torch.float32, torch.bfloat16)
    for dropout in (False, True)
)


def embedding(
    ids: Tensor, weight: Tensor, position_weight: Tensor, *, dropout_p: float = 0.0, backend: str | None = None
) -> Tensor:
    """Look up the vector of every token, add the vector of its position, drop.

    Args:
        ids: (batch, n_tokens), int64 or int32, from 0 to vocab_size - 1.
        weight: (vocab_size, n), floating point: one vector a token.
        position_weight: (context_length, n), like `weight`: one vector a position; n_tokens <= context_length.
        dropout_p: probability with which an element is set to 0 (the others are scaled up), 0 <= p <= 1. The seed
            comes from torch's default CPU generator.
        backend: nearest choice of a backend; "reference" draws dropout from torch's generator as the book does.

    Returns:
        (batch, n_tokens, n) in the dtype of `weight`.

    Raises:
        IndexError: an id is outside the vocabulary (on the CPU; elsewhere as the backend does).
        ValueError: a shape, dtype, device or probability does not fit.
        BackendError: the backend that was asked for cannot run this input.

    Source: Raschka, Build a Large Language Model (From Scratch), chapter 2.
    """
    _check(ids, weight, position_weight, dropout_p)
    if torch.compiler.is_compiling():
        drawn = torch.randint(2**63 - 1, (), device="cpu") if dropout_p else None
        out: Tensor = torch.ops.fastgpt.embedding(ids, weight, position_weight, drawn, dropout_p, backend)
        return out
    tiny = not dropout_p and ids.numel() * weight.shape[1] < _TINY and ids.is_cpu and weight.dtype is torch.float32
    chosen = OP.for_tiny(backend) if tiny else None
    chosen = chosen or OP.choose(_case(ids, weight, dropout_p), backend)
    if not getattr(chosen, "CHECKS_RANGE", False):
        _check_ids(ids, weight.shape[0])
    try:
        if getattr(chosen, "NATIVE_AUTOGRAD", False):
            return chosen.apply(ids, weight, position_weight, dropout_p)
        seed = philox.draw_seed() if dropout_p else 0
        if registration.needs_grad(weight, position_weight):
            return _Embedding.apply(ids, weight, position_weight, dropout_p, seed, chosen)
        return chosen.forward(ids, weight, position_weight, dropout_p, seed)
    except IndexError:
        # It found such an id; this says where.
        _check_ids(ids, weight.shape[0])
        raise


def _case(ids: Tensor, weight: Tensor, dropout_p: float) -> Case:
    return Case(dispatch.device_type(weight), weight.dtype, ids.dtype, weight.shape[-1], dropout_p > 0.0)


def _check(ids: Tensor, weight: Tensor, position_weight: Tensor, dropout_p: float) -> None:
    if ids.ndim != 2 or weight.ndim != 2 or position_weight.ndim != 2 or weight.shape[1] != position_weight.shape[1]:
        raise ValueError(
            "embedding: ids must be (batch, n_tokens), weight (vocab_size, n), position_weight (context_length, n); "
            f"got {tuple(ids.shape)}, {tuple(weight.shape)} and {tuple(position_weight.shape)}."
        )
    if ids.shape[1] > position_weight.shape[0]:
        raise ValueError(
            f"embedding: {ids.shape[1]} tokens, but position_weight has {position_weight.shape[0]} positions; shorten "
            f"the input."
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"embedding: ids must be torch.int64 or torch.int32, got {ids.dtype}; cast them.")
    if not weight.is_floating_point() or weight.dtype != position_weight.dtype:
        raise ValueError(
            f"embedding: weight and position_weight must have one floating-point dtype; got {weight.dtype} and "
            f"{position_weight.dtype}."
        )
    if not ids.device == weight.device == position_weight.device:
        raise ValueError(
            f"embedding: ids are on {ids.device}, weight on {weight.device}, position_weight on "
            f"{position_weight.device}; move all to one device."
        )
    philox.check_probability("embedding", dropout_p)


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    # Elsewhere the look would wait for the device.
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if low < 0 or high >= vocab_size:
        row, column = ((ids < 0) | (ids >= vocab_size)).nonzero()[0].tolist()
        raise IndexError(
            f"Token id {int(ids[row, column])} at row {row}, position {column} is outside the vocabulary, 0 to "
            f"{vocab_size - 1}; was another tokenizer used for the text, or is this a target, where -100 marks "
            f"ignored places?"
        )


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight: Tensor,
        position_weight: Tensor,
        dropout_p: float,
        seed: int,
        chosen: ModuleType,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.settings = (weight.shape[0], position_weight.shape[0], dropout_p, seed)
        ctx.chosen = chosen
        return chosen.forward(ids, weight, position_weight, dropout_p, seed)

    @staticmethod
    @registration.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dweight, dposition = ctx.chosen.backward(dout, *ctx.saved_tensors, *ctx.settings)
        return None, dweight, dposition, None, None, None


# The registered op: what torch.compile sees. The seed is a tensor there, so that drawing it does not break the graph.


def _forward(
    ids: Tensor, weight: Tensor, position_weight: Tensor, seed: Tensor | None, dropout_p: float, backend: str | None
) -> Tensor:
    _check_ids(ids, weight.shape[0])
    chosen = OP.choose(_case(ids, weight, dropout_p), backend)
    number = 0 if seed is None else int(seed)
    if getattr(chosen, "NATIVE_AUTOGRAD", False):
        return chosen.apply(ids, weight, position_weight, dropout_p, seed=number).contiguous()
    return chosen.forward(ids, weight, position_weight, dropout_p, number)


def _forward_fake(ids: Tensor, weight: Tensor, *unused: Any) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


def _backward(
    dout: Tensor,
    ids: Tensor,
    seed: Tensor | None,
    vocab_size: int,
    context_length: int,
    dropout_p: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    chosen = OP.choose(_case(ids, dout, dropout_p), backend)
    number = 0 if seed is None else int(seed)
    if not getattr(chosen, "NATIVE_AUTOGRAD", False):
        return chosen.backward(dout, ids, vocab_size, context_length, dropout_p, number)
    inputs = tuple(dout.new_zeros(length, dout.shape[2]) for length in (vocab_size, context_length))
    dweight, dposition = registration.native_backward(
        lambda *leaves: chosen.apply(ids, *leaves, dropout_p, seed=number), inputs, dout
    )
    return dweight, dposition


def _backward_fake(
    dout: Tensor, ids: Tensor, seed: Tensor | None, vocab_size: int, context_length: int, *unused: Any
) -> tuple[Tensor, Tensor]:
    n = dout.shape[2]
    return dout.new_empty(vocab_size, n), dout.new_empty(context_length, n)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, position_weight, seed, dropout_p, backend = inputs
    ctx.settings = (weight.shape[0], position_weight.shape[0], dropout_p, backend)
    ctx.save_for_backward(ids, seed)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dweight, dposition = torch.ops.fastgpt.embedding_backward(dout, *ctx.saved_tensors, *ctx.settings)
    return None, dweight, dposition, None, None, None


registration.register(
    "embedding(Tensor ids, Tensor weight, Tensor position_weight, Tensor? seed, float dropout_p, str? backend)"
    " -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
registration.register(
    "embedding_backward(Tensor dout, Tensor ids, Tensor? seed, SymInt vocab_size, SymInt context_length, "
    "float dropout_p, str? backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)

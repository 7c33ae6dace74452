"""What is timed: each case names its providers, its work and the check that must pass before anything is timed.

The strongest rival stands beside the slowest: "book" is the book's own formula, "torch" PyTorch's fused ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops.linear.products import matmul_into
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound

BACKENDS = {"book": "reference", "torch": "torch", "fastgpt": "auto"}


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        name: what is timed, with its sizes.
        providers: name -> function of no arguments.
        work: bytes, floating-point operations or tokens of one call.
        unit: "GB/s", "GFLOP/s" or "tokens/s".
        check: raises when a provider's result is outside the bound.
    """

    name: str
    providers: dict[str, Callable[[], Any]]
    work: float
    unit: str
    check: Callable[[], None]


def op_case(
    name: str, op: Callable[..., Tensor], inputs: tuple[Tensor, ...], work: float, unit: str, backward: bool
) -> Case:
    """Forward, or forward and backward, of one op on each backend."""
    dout = torch.randn_like(op(*inputs, backend="torch"))

    def run(backend: str, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_(backward) for t in inputs]
        out = op(*leaves, backend=backend)
        return (out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))) if backward else (out,)

    def check() -> None:
        naive, truth = run("reference"), run("reference", torch.float64)
        for index, got in enumerate(run("auto")):
            factor = GRADIENT_FACTOR if index else 2.0
            assert_within_bound(got, naive[index], truth[index], factor=factor)

    providers = {provider: partial(run, backend) for provider, backend in BACKENDS.items()}
    return Case(f"{name}, {'forward + backward' if backward else 'forward'}", providers, work, unit, check)


def layer_norm_cases() -> Iterator[Case]:
    """Bytes: forward one read and one write; with backward three reads and two writes."""
    for rows in (1024, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, 768, dtype=dtype)
            weight, bias = torch.randn(2, 768, dtype=dtype)
            for backward in (False, True):
                work = x.nbytes * (5 if backward else 2)
                name = f"layer_norm ({rows}, 768) {_short(dtype)}"
                yield op_case(name, ops.layer_norm, (x, weight, bias), work, "GB/s", backward)


def gelu_cases() -> Iterator[Case]:
    """Bytes: forward one read and one write; with backward three reads and two writes."""
    for rows in (1024, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, 3072, dtype=dtype)
            for backward in (False, True):
                work = x.nbytes * (5 if backward else 2)
                yield op_case(f"gelu ({rows}, 3072) {_short(dtype)}", ops.gelu, (x,), work, "GB/s", backward)


def attention_cases() -> Iterator[Case]:
    """FLOPs: two products over half a square, forward; five products with backward."""
    batch, n_heads, head_dim = 4, 12, 64
    for length in (256, 1024):
        for dtype in (torch.float32, torch.bfloat16):
            qkv = torch.randn(batch, length, 3, n_heads, head_dim, dtype=dtype)
            inputs = tuple(qkv[:, :, i].transpose(1, 2) for i in range(3))
            forward = 2 * batch * n_heads * length**2 * head_dim
            for backward in (False, True):
                work = forward * (3.5 if backward else 1)
                name = f"causal_attention ({batch}, {n_heads}, {length}, {head_dim}) {_short(dtype)}"
                case = op_case(name, ops.causal_attention, inputs, work, "GFLOP/s", backward)
                if length == 1024 and dtype is torch.bfloat16:
                    # Nine seconds a call where the processor has no bfloat16 instructions: nothing to learn from.
                    del case.providers["book"]
                yield case


def linear_cases() -> Iterator[Case]:
    """The three products of a linear layer, each by every engine that `products.py` chooses from. FLOPs: 2 m n k."""
    sizes = [(1024, 768, 768), (1024, 768, 2304), (1024, 768, 3072), (1024, 3072, 768), (1024, 768, 50257)]
    sizes += [(2048, 768, 3072), (1024, 1024, 4096), (256, 128, 128), (256, 192, 768)]
    for rows, n_in, n_out in sizes:
        x, weight, dout = torch.randn(rows, n_in), torch.randn(n_out, n_in), torch.randn(rows, n_out)
        for name, a, b in (("forward", x, weight.t()), ("dx", dout, weight), ("dW", dout.t(), x)):
            yield _product_case(f"linear ({rows}, {n_in}, {n_out}) float32, {name}", a, b)


def _product_case(name: str, a: Tensor, b: Tensor) -> Case:
    outs = {by: torch.empty(a.shape[0], b.shape[1]) for by in ("torch", "onednn", "own")}

    def check() -> None:
        truth = a.double() @ b.double()
        # Plain PyTorch is whichever engine it takes: oneDNN adds up as many products in a row as our kernel, MKL fewer,
        # with half the error (root mean square, k = 768).
        plain = [matmul_into(torch.empty_like(outs[by]), a, b, by=by) for by in ("torch", "onednn")]
        naive = max(plain, key=lambda result: (result - truth).abs().max().item())
        for by, out in outs.items():
            assert_within_bound(matmul_into(out, a, b, by=by), naive, truth, factor=GRADIENT_FACTOR)

    providers = {by: partial(matmul_into, out, a, b, by=by) for by, out in outs.items()}
    return Case(name, providers, 2.0 * a.shape[0] * a.shape[1] * b.shape[1], "GFLOP/s", check)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]


def op_cases() -> Iterator[Case]:
    """Every op, made one at a time so that only one case's tensors live."""
    yield from layer_norm_cases()
    yield from gelu_cases()
    yield from attention_cases()
    yield from linear_cases()

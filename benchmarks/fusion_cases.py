"""The ops that join neighbours: residual + dropout + norm, bias + GELU, embeddings + dropout, head + loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import BACKENDS, Case
from fastgpt import ops
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound

SHORT = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def fusion_case(
    name: str, op: Callable[..., Any], inputs: tuple[Tensor, ...], work: float, unit: str, dropout_p: float = 0.0
) -> Case:
    """Forward and backward of one op on each backend; the check is without dropout, whose masks differ."""

    def run(backend: str, dropout_p: float, dtype: torch.dtype | None = None) -> list[Tensor]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        options = {"dropout_p": dropout_p} if dropout_p else {}
        outs = _tuple(op(*leaves, backend=backend, **options))
        return [*outs, *torch.autograd.grad(outs, leaves, [d.to(o.dtype) for d, o in zip(douts, outs, strict=True)])]

    # 1 for a loss, as in training.
    outs = _tuple(op(*inputs, backend="torch"))
    douts = [torch.randn_like(out) if out.ndim else torch.ones_like(out) for out in outs]

    def check() -> None:
        naive, truth = run("reference", 0.0), run("reference", 0.0, torch.float64)
        for index, got in enumerate(run("auto", 0.0)):
            factor = GRADIENT_FACTOR if index >= len(douts) else 2.0
            assert_within_bound(got, naive[index], truth[index], factor=factor)

    providers = {provider: partial(run, backend, dropout_p) for provider, backend in BACKENDS.items()}
    return Case(f"{name}, forward + backward", providers, work, unit, check)


def _tuple(outs: Any) -> tuple[Tensor, ...]:
    return outs if isinstance(outs, tuple) else (outs,)


def residual_cases() -> Iterator[Case]:
    """Bytes: five reads and three writes of the tensor, with dropout four."""
    for rows in (1024, 4096):
        for dtype in SHORT:
            x, residual = torch.randn(2, rows, 768, dtype=dtype)
            weight, bias = torch.randn(2, 768, dtype=dtype)
            for dropout_p in (0.0, 0.1):
                name = f"dropout_add_layer_norm ({rows}, 768) {SHORT[dtype]} dropout {dropout_p:g}"
                work = x.nbytes * (9 if dropout_p else 8)
                inputs = (x, residual, weight, bias)
                yield fusion_case(name, ops.dropout_add_layer_norm, inputs, work, "GB/s", dropout_p)


def biased_gelu_cases() -> Iterator[Case]:
    """Bytes: three reads and two writes of the tensor."""
    for rows in (1024, 4096):
        for dtype in SHORT:
            x, bias = torch.randn(rows, 3072, dtype=dtype), torch.randn(3072, dtype=dtype)
            name = f"gelu with bias ({rows}, 3072) {SHORT[dtype]}"
            yield fusion_case(name, ops.gelu, (x, bias), x.nbytes * 5, "GB/s")


def embedding_cases() -> Iterator[Case]:
    """Bytes: one write of the gradient of the vocabulary, beside which the rest is small."""
    ids = torch.randint(50257, (4, 256))
    for dtype in SHORT:
        weight, position = torch.randn(50257, 768, dtype=dtype), torch.randn(1024, 768, dtype=dtype)
        for dropout_p in (0.0, 0.1):
            name = f"embedding (4, 256, 768) of 50257 {SHORT[dtype]} dropout {dropout_p:g}"
            yield fusion_case(name, partial(ops.embedding, ids), (weight, position), weight.nbytes, "GB/s", dropout_p)


def loss_cases() -> Iterator[Case]:
    """FLOPs: three products."""
    rows, n, vocab = 1024, 768, 50257
    x, weight, targets = torch.randn(rows, n), torch.randn(vocab, n) * 0.02, torch.randint(vocab, (rows,))

    def op(x: Tensor, weight: Tensor, *, backend: str) -> Tensor:
        if backend == "torch":
            # The rival is what people write: all logits at once.
            return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, weight), targets)
        return ops.linear_cross_entropy(x, weight, targets, backend=backend)

    name = f"linear_cross_entropy ({rows}, {n}, {vocab}) float32"
    yield fusion_case(name, op, (x, weight), 6.0 * rows * n * vocab, "GFLOP/s")


def fusion_cases() -> Iterator[Case]:
    """One at a time, so that only one case's tensors live."""
    yield from residual_cases()
    yield from biased_gelu_cases()
    yield from embedding_cases()
    yield from loss_cases()

"""The whole model on a GPU: training steps and generation, each against the best that PyTorch has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.torch_gpt import TorchGPT
from fastgpt.config import GPT_CONFIG_124M
from fastgpt.model import GPTModel
from fastgpt.ops import use_backend
from fastgpt.training import calc_loss_batch

TINY = {"vocab_size": 97, "context_length": 64, "emb_dim": 32, "n_heads": 2, "n_layers": 2, "qkv_bias": False}


def training(bench: Bench) -> None:
    """GPT-2 124M, bf16, context 1024: tokens a second of each at its best batch."""
    cfg = {**(TINY if bench.dry_run else GPT_CONFIG_124M), "drop_rate": 0.0}
    length = cfg["context_length"]
    makers: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
        "fastgpt auto": functools.partial(_ours, bench, cfg, "auto"),
        "triton": functools.partial(_ours, bench, cfg, "triton"),
        "book optimised": functools.partial(_rival, bench, cfg),
    }
    if bench.dry_run:
        del makers["triton"]
    for name, make in makers.items():
        bench.attempt(f"training {name}", functools.partial(_best_batch, bench, name, make, cfg["vocab_size"], length))


def _best_batch(
    bench: Bench, name: str, make: Callable[[], Callable[[Tensor, Tensor], Tensor]], vocab: int, length: int
) -> None:
    loss_of = make()
    best: tuple[float, int, list[float]] | None = None
    for batch in (2,) if bench.dry_run else (16, 32, 64):
        if bench.seconds_left < 10:
            break
        tokens = torch.randint(vocab, (batch, length + 1), device=bench.device)
        step = functools.partial(loss_of, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        samples = bench.race({name: step}, rounds=7, cold=False)[name]
        rate = batch * length / (sorted(samples)[len(samples) // 2] * 1e-3)
        print(f"{name} batch {batch}: {rate:.0f} tokens/s", flush=True)
        if best is None or rate > best[0]:
            best = rate, batch, samples
    if best is not None:
        _, batch, samples = best
        case = f"training GPT-2 124M bf16 context {length}"
        bench.rows_of(case, {name: samples}, batch * length, "tokens/s", target="500k, 1.15 x", batch=batch)


def _stepper(model: torch.nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(inputs, targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _ours(bench: Bench, cfg: dict[str, Any], backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    torch.manual_seed(0)
    model = GPTModel(cfg).to(bench.device, torch.float32 if bench.dry_run else torch.bfloat16)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with use_backend(backend):
            return calc_loss_batch(inputs, targets, model, bench.device)

    return _stepper(model, loss_of)


def _rival(bench: Bench, cfg: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The book's optimised script: SDPA, torch.compile, vocabulary padded to a multiple of 64, bf16, fused AdamW."""
    torch.manual_seed(0)
    padded = {**cfg, "vocab_size": -(-cfg["vocab_size"] // 64) * 64}
    model = TorchGPT(padded).to(bench.device, torch.float32 if bench.dry_run else torch.bfloat16)
    network = model if bench.dry_run else torch.compile(model)
    return _stepper(model, lambda x, y: F.cross_entropy(network(x).flatten(0, 1), y.flatten()))

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
from fastgpt import Generator, reference
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


def decode(bench: Bench) -> None:
    """Greedy, prompt 32: batch 1 and 64, tokens a second with the prompt's time in it."""
    cfg = {**(TINY if bench.dry_run else GPT_CONFIG_124M), "drop_rate": 0.0}
    n_new = 16 if bench.dry_run else 256
    torch.manual_seed(0)
    dtype = torch.float32 if bench.dry_run else torch.bfloat16
    model = GPTModel(cfg).eval().to(bench.device, dtype)
    plain = reference.GPTModel(cfg).eval().to(bench.device, dtype)
    plain.load_state_dict(model.state_dict())
    rival = StaticGPT(TorchGPT(cfg).eval().to(bench.device, dtype), plain.state_dict(), n_new + 32)
    generator = Generator(model)
    for batch in (1,) if bench.dry_run else (1, 64):
        prompt = torch.randint(cfg["vocab_size"], (batch, 32), device=bench.device)

        def case(prompt: Tensor = prompt, batch: int = batch) -> None:
            fewer = min(n_new, 48)
            times = bench.race(
                {"book": lambda: _book(plain, prompt, fewer, cfg["context_length"])}, rounds=3, cold=False
            )
            name = f"decode GPT-2 124M bf16 batch {batch}"
            target = {1: "5k, 3 x", 64: "150k"}[batch]
            bench.rows_of(name, times, batch * fewer, "tokens/s", target=target, new_tokens=fewer)
            rest: dict[str, Callable[[], Any]] = {
                "fastgpt Generator": lambda: generator.generate(prompt, n_new),
                "static cache + compile": lambda: rival.generate(prompt, n_new),
            }
            for provider, function in rest.items():
                bench.attempt(
                    f"{name} {provider}",
                    lambda provider=provider, function=function: bench.rows_of(  # type: ignore[misc]
                        name,
                        bench.race({provider: function}, rounds=5, cold=False),
                        batch * n_new,
                        "tokens/s",
                        target=target,
                        new_tokens=n_new,
                    ),
                )

        bench.attempt(f"decode batch {batch}", case)


def _book(model: torch.nn.Module, prompt: Tensor, n_new: int, context: int) -> Tensor:
    return reference.generate_text_simple(model, prompt, n_new, context)


class StaticGPT:
    """Decoding as gpt-fast does it: static caches, one compiled step per token, replayed as a CUDA graph.

    Args:
        model: on its device, in its dtype.
        state: a book checkpoint, whose weights it takes.
        length: room of the caches.
    """

    def __init__(self, model: TorchGPT, state: dict[str, Tensor], length: int) -> None:
        model.take_weights(state)
        self.model, self.length = model, length
        self.caches: list[tuple[Tensor, Tensor]] = []
        on_gpu = next(model.parameters()).is_cuda
        self._one = torch.compile(self._step, mode="reduce-overhead", fullgraph=True) if on_gpu else self._step

    def _step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids (B, T) at positions (T,): the likeliest next token, (B, 1)."""
        model = self.model
        x = model.tok_emb(ids) + model.pos_emb(positions)
        mask = positions[:, None] >= torch.arange(self.length, device=ids.device)
        for block, (keys, values) in zip(model.blocks, self.caches, strict=True):
            batch, n_tokens, width = x.shape
            heads = (batch, n_tokens, 3, block.n_heads, width // block.n_heads)
            q, k, v = block.qkv(block.norm1(x)).view(heads).permute(2, 0, 3, 1, 4)
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, v)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + block.proj(y.transpose(1, 2).reshape(batch, n_tokens, width))
            x = x + block.out(F.gelu(block.fc(block.norm2(x)), approximate="tanh"))
        return model.head(model.norm(x[:, -1:])).argmax(dim=-1)

    @torch.inference_mode()
    def generate(self, prompt: Tensor, n_new: int) -> Tensor:
        """Greedy tokens, (B, n_new)."""
        batch = prompt.shape[0]
        if not self.caches or self.caches[0][0].shape[0] != batch:
            self.caches = self._new_caches(batch)
        made = [self._step(prompt, torch.arange(prompt.shape[1], device=prompt.device))]
        position = torch.tensor([prompt.shape[1]], device=prompt.device)
        for _ in range(n_new - 1):
            made.append(self._one(made[-1], position).clone())
            position = position + 1
        return torch.cat(made, dim=1)

    def _new_caches(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        like = self.model.head.weight
        shape = (batch, self.model.blocks[0].n_heads, self.length, like.shape[1] // self.model.blocks[0].n_heads)
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.model.blocks]

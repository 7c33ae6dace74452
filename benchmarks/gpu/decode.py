"""Greedy decoding on a GPU: the book's loops, a loop as gpt-fast writes it, and our engines, behind one gate."""

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
from fastgpt.generation import graph_engine
from fastgpt.generation.cache import Cache
from fastgpt.generation.engine import decode_one_token
from fastgpt.generation.graph_engine import GraphDecoder
from fastgpt.generation.graph_weights import StepWeights
from fastgpt.generation.kv_model import GPTModel as CachedGPT
from fastgpt.generation.kv_model import KVCache
from fastgpt.generation.network import read_network
from fastgpt.generation.persistent_engine import PersistentDecoder
from fastgpt.model import GPTModel
from fastgpt.ops import cuda_support

TINY = {"vocab_size": 97, "context_length": 64, "emb_dim": 32, "n_heads": 2, "n_layers": 2, "qkv_bias": False}
PROMPT = 32
TARGETS = {1: "5k, 3 x", 8: None, 64: "150k"}

# Takes one row at a time.
PERSISTENT = "fastgpt persistent"

Loop = Callable[[Tensor, int], Any]


class Models:
    """One set of random weights in every provider's form."""

    def __init__(self, bench: Bench, dtype: torch.dtype) -> None:
        cfg = {**(TINY if bench.dry_run else GPT_CONFIG_124M), "drop_rate": 0.0}
        torch.manual_seed(0)
        self.cfg, self.dtype = cfg, dtype
        self.ours = GPTModel(cfg).eval().to(bench.device, dtype)
        state = self.ours.state_dict()
        self.book, self.cached = (make(cfg).eval().to(bench.device, dtype) for make in (reference.GPTModel, CachedGPT))
        for model in (self.book, self.cached):
            model.load_state_dict(state)
        self.rival = StaticGPT(
            TorchGPT(cfg).eval().to(bench.device, dtype), state, min(cfg["context_length"], PROMPT + 256)
        )
        self.plain = Generator(self.ours)
        # A dry run has it where the tests' emulator stands in for a GPU.
        missing = bench.dry_run and cuda_support.why_not(bench.device, dtype) is not None
        self.graph = None if missing else Generator(self.ours, engine="graph")
        self.persistent = None if missing else Generator(self.ours, engine="persistent")
        # Programmatic dependent launch is of compute capability 9.
        self.overlaps = not bench.dry_run and torch.cuda.get_device_capability()[0] == 9
        self.second = Generator(self.ours, engine="graph") if self.overlaps else None

    def loops(self) -> dict[str, Loop]:
        """Provider -> loop(prompt, n_new)."""
        loops: dict[str, Loop] = {
            "book": lambda prompt, n: reference.generate_text_simple(self.book, prompt, n, self.cfg["context_length"]),
            "book KV cache": functools.partial(_book_cache, self.cached, self.cfg["n_layers"]),
            "static cache + compile": self.rival.generate,
            "fastgpt Generator": self.plain.generate,
        }
        if self.graph is not None:
            loops["fastgpt graph"] = self.graph.generate
            loops[PERSISTENT] = functools.partial(_row_by_row, self.persistent)
            if self.overlaps:
                loops["fastgpt graph, overlapped"] = functools.partial(_overlapped, self.second)
        return loops


def _overlapped(generator: Any, prompt: Tensor, n_new: int) -> Any:
    # A decoder keeps the way it was made.
    before = graph_engine.OVERLAP
    graph_engine.OVERLAP = True
    try:
        return generator.generate(prompt, n_new)
    finally:
        graph_engine.OVERLAP = before


def _row_by_row(generator: Any, prompt: Tensor, n_new: int) -> Tensor:
    return torch.cat([generator.generate(row, n_new) for row in prompt.split(1)])


def _book_cache(model: torch.nn.Module, n_layers: int, prompt: Tensor, n_new: int) -> Tensor:
    """The loop of the book's bonus chapter: the caller steers the cache, the model stays eager."""
    cache, ids, made = KVCache(n_layers), prompt, [prompt]
    model.reset_kv_cache()  # type: ignore[operator]
    with torch.no_grad():
        for _ in range(n_new):
            ids = model(ids, cache=cache)[:, -1].argmax(dim=-1, keepdim=True)
            made.append(ids)
    return torch.cat(made, dim=1)


def gate_tokens(bench: Bench) -> set[str]:
    """Which loops give the book's tokens in float32, over several steps and for more than one row."""
    models = Models(bench, torch.float32)
    prompt = torch.randint(models.cfg["vocab_size"], (3, 8), device=bench.device)
    n_new = 24
    right = set()
    want = reference.generate_text_simple(models.book, prompt, n_new, models.cfg["context_length"])[:, -n_new:]
    for name, loop in models.loops().items():
        got = loop(prompt, n_new)[:, -n_new:]
        same = float((got == want).float().mean())
        bench.write(case=f"tokens equal the book's in float32: {name}", share=same)
        if same == 1.0:
            right.add(name)
        else:
            bench.failures.append(f"{name}: {same:.3f} of the tokens are the book's")
    return right


def gate_logits(bench: Bench, persistent: bool = False) -> None:
    """One bf16 step of our kernels is at most twice as far from float32 as PyTorch's own bf16 step."""
    models = Models(bench, torch.bfloat16)
    network, batch, length = read_network(models.ours), 1 if persistent else 17, 40
    weights = StepWeights(network)
    decoder = (
        PersistentDecoder(weights, 64, keep_logits=True)
        if persistent
        else GraphDecoder(weights, batch, 64, keep_logits=True)
    )
    decoder.cache.buffer.normal_()
    tokens = torch.arange(batch, device=bench.device)
    sizes = torch.full((batch,), length, device="cpu")
    before = decoder.cache.buffer.clone()
    decoder.run(tokens, sizes, 0, 1, graph_engine.Sampling(), 0)

    def logits_of(dtype: torch.dtype) -> Tensor:
        like = torch.empty(0, dtype=dtype, device=bench.device)
        cache = Cache(len(network.blocks), batch, network.n_heads, network.head_dim, 64, like=like)
        cache.reserve(64)
        cache.buffer.copy_(before)
        return decode_one_token(read_network(models.ours.to(dtype)), tokens, sizes, True, cache)

    with torch.inference_mode():
        naive, truth = logits_of(torch.bfloat16).double(), logits_of(torch.float32).double()
    error = float((decoder.logits.double() - truth).norm() / truth.norm())
    allowed = 2 * float((naive - truth).norm() / truth.norm())
    name = "persistent" if persistent else "graph"
    bench.write(case=f"bf16 logits of a {name} step", relative_error=error, allowed=allowed)
    if not error <= allowed:
        raise AssertionError(f"bf16 logits: relative error {error:.2e}, allowed {allowed:.2e}")


def decode(bench: Bench) -> None:
    """GPT-2 124M bf16, prompt 32: batch 1, 8 and 64, tokens a second with the prompt's time in it."""
    right: set[str] = set()
    bench.attempt("tokens equal the book's", lambda: right.update(gate_tokens(bench)))
    if not bench.dry_run:
        bench.attempt("bf16 logits of a graph step", lambda: gate_logits(bench))
        bench.attempt("bf16 logits of a persistent step", lambda: gate_logits(bench, persistent=True))
    models = Models(bench, torch.float32 if bench.dry_run else torch.bfloat16)
    for batch in (1, 2) if bench.dry_run else (1, 8, 64):
        prompt = torch.randint(models.cfg["vocab_size"], (batch, PROMPT), device=bench.device)
        for provider, loop in models.loops().items():
            if provider not in right or (provider == PERSISTENT and batch > 1):
                continue
            bench.attempt(
                f"decode batch {batch} {provider}", functools.partial(_time, bench, provider, loop, prompt, batch)
            )


def _time(bench: Bench, provider: str, loop: Loop, prompt: Tensor, batch: int) -> None:
    # The slow loops make fewer tokens: their rate does not depend on it much.
    n_new = 8 if bench.dry_run else 48 if provider == "book" else 256
    rounds = 5 if provider.startswith("fastgpt") or "compile" in provider else 2
    times = bench.race({provider: functools.partial(loop, prompt, n_new)}, rounds=rounds, cold=False)
    bench.rows_of(
        f"decode GPT-2 124M bf16 batch {batch}",
        times,
        batch * n_new,
        "tokens/s",
        target=TARGETS.get(batch),
        new_tokens=n_new,
    )


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
        self._one = (
            torch.compile(self._step, mode="reduce-overhead", fullgraph=True, dynamic=False) if on_gpu else self._step
        )

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

"""Steps of GPT-2 124M at a long context, with keys and values kept in each `cache_dtype`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case
from fastgpt.config import GPT_CONFIG_124M
from fastgpt.generation.native_engine import NativeDecoder
from fastgpt.generation.native_weights import NativeWeights, Packs
from fastgpt.generation.network import Network, read_network
from fastgpt.model import GPTModel

CONTEXT = 1000
BATCHES = (1, 32)
# The furthest a logit may be from that of the float32 cache, as a share of the largest.
BOUND = 0.02


def fill(decoder: NativeDecoder, rows: Tensor) -> None:
    """Keep these keys and values, (n_layers, 2, 1, n_heads, CONTEXT, head_dim), in every row."""
    decoder.cache.reserve(CONTEXT)
    buffer = decoder.cache.buffer
    if buffer.dtype == torch.int8:
        scales = rows.abs().amax(dim=-1, keepdim=True) / 127
        numbers = (rows / scales).round().to(torch.int8)
        rows = torch.cat([numbers, scales.view(torch.int8)], dim=-1)
    buffer.copy_(rows.expand_as(buffer))


def step_case(network: Network, precision: str | None, batch: int) -> Case:
    """Tokens of one step; the first provider is the default of these weights."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": "int8"}
    if precision is not None:
        kinds = {name: kinds[name] for name in ("bfloat16", "int8", "float32")}
    ids, rows = torch.arange(batch), torch.arange(batch)
    positions = torch.full((batch,), CONTEXT - 1)
    decoders: dict[str, NativeDecoder] = {}

    def run(name: str) -> Tensor | None:
        return decoders[name].step(ids, rows, positions)[0]

    def check() -> None:
        # Here, as whoever wants other cases has no use for gigabytes of caches.
        weights = NativeWeights(network, precision and Packs(precision))
        kept = torch.randn(len(network.blocks), 2, 1, network.n_heads, CONTEXT, network.head_dim)
        for name, kind in kinds.items():
            decoders[name] = NativeDecoder(weights, batch, CONTEXT, kind)
            fill(decoders[name], kept)
        logits = {name: run(name) for name in kinds}
        exact = logits["float32"]
        assert exact is not None
        for got in logits.values():
            assert got is not None and float((got - exact).abs().max()) <= BOUND * float(exact.abs().max())

    name = f"decode step GPT-2 124M at {CONTEXT} tokens, batch {batch}, {precision or 'float32'} weights, by cache"
    return Case(name, {kind: partial(run, kind) for kind in kinds}, batch, "tokens/s", check)


def cache_cases() -> Iterator[Case]:
    """One at a time, so that only one case's caches live."""
    network = read_network(GPTModel({**GPT_CONFIG_124M, "drop_rate": 0.0}).eval())
    for precision in (None, "int8"):
        for batch in BATCHES:
            yield step_case(network, precision, batch)

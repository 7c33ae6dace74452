"""The decoder for GPUs (kernels/cuda/decode_step.cuh): a token is one replay of a CUDA graph, and no word to the host.

One step reads each row's newest token, writes its keys and values, chooses the next token and leaves its embedding
where the next step reads it. All that it touches stands at fixed addresses, the lengths are read on the device, so a
step is captured once and then replayed; tokens are fetched in groups. A row that meets its end inside a group is cut
afterwards, by whoever asked. Weights are read where they are: changes in place are seen at the next token.

Prompts are read by `CachedEngine` into the same cache, which also serves rows that outgrow the context. Drawn tokens
come from Philox on the device, as `draws` says: the tokens of that seed on every engine, but not torch.multinomial's.

No GPU has run this yet, so it is taken only where `Generator(model, engine="graph")` asks for it. The emulator of the
tests runs the same kernels, without a graph.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.generation.cache import Cache
from fastgpt.generation.engine import CachedEngine
from fastgpt.generation.graph_weights import NotForGraphs, StepWeights
from fastgpt.generation.network import Network
from fastgpt.generation.rows import Rows
from fastgpt.generation.sampling import Sampling
from fastgpt.ops import cuda_support, philox
from fastgpt.ops.extension import DTYPE_CODES

# Tokens that are fetched together: fewer where a row may end, since those behind its end are made in vain.
GROUP = 128
GROUP_WITH_END = 16
# Blocks of a key's part, and of a matrix, that fill a large chip.
_ENOUGH_BLOCKS = 264
_LEAST_KEYS = 32
# Room of a cache grows in such steps, so that calls of similar length share a decoder.
_ROOM = 256
# Decoders that are kept for later calls.
_KEPT = 4
# Whether new decoders let kernels overlap (programmatic dependent launch); benchmarks try both.
OVERLAP = False
GREEDY, DRAWN, TOP_K = range(3)


class GraphDecoder:
    """A cache, the buffers of a step, and the graphs of one batch size.

    Args:
        weights: what to run.
        batch: rows.
        room: the longest row.
        overlap: let kernels begin while the one before ends; compute capability 9 only. None for `OVERLAP`.
        keep_logits: leave the logits of each step in `logits`, also where nothing but the tokens is needed.

    Attributes:
        cache: keys and values of all tokens but each row's newest; it never grows.
        group_with_end: tokens that are made together where a row may end.
    """

    group_with_end = GROUP_WITH_END

    def __init__(
        self, weights: StepWeights, batch: int, room: int, overlap: bool | None = None, keep_logits: bool = False
    ) -> None:
        network = weights.network
        self.key = (weights.key, batch)
        self.batch, self.room, self.keep_logits, self.weights = batch, room, keep_logits, weights
        self.overlap = OVERLAP if overlap is None else overlap
        self.cache = Cache(len(network.blocks), batch, network.n_heads, network.head_dim, room, like=network.tok_emb)
        with torch.inference_mode(False):
            self.cache.reserve(room)
        blocks, shared = _chip(weights.device)
        splits = max(1, min(-(-blocks // (batch * network.n_heads)), -(-room // _LEAST_KEYS)))

        @torch.inference_mode(False)
        def buffer(*shape: int, dtype: torch.dtype = weights.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=weights.device)

        heads = batch * network.n_heads
        self.state = buffer(batch, 4, dtype=torch.int64)
        self.found = buffer(batch, GROUP, dtype=torch.int64)
        self.draw = buffer(4, dtype=torch.int32)
        self.arrived = buffer(heads, dtype=torch.int32)
        self.logits = buffer(batch, weights.n_logits, dtype=torch.float32)
        self._buffers = (
            buffer(batch, weights.width, dtype=torch.float32),
            buffer(batch, weights.heads),
            buffer(batch, weights.heads),
            buffer(batch, weights.hidden),
            buffer(heads, splits, 2 + network.head_dim, dtype=torch.float32),
            self.arrived,
            buffer(batch, blocks, dtype=torch.int64),
            self.logits,
            self.state,
            self.found,
            self.draw,
        )
        self.sizes = (
            batch, weights.width, network.n_heads, network.head_dim, weights.hidden, weights.n_logits,
            network.vocab_size, network.context_length, room, *self.cache.keys[0].stride()[:3],
            splits, blocks, shared, GROUP,
        )  # fmt: skip
        self._replays: dict[int, Callable[[], None]] = {}
        self._begin = self._call(GREEDY)

    def _call(self, mode: int) -> Any:
        weights, cache = self.weights, self.cache
        layers = [
            (*addresses, keys.data_ptr(), values.data_ptr())
            for addresses, keys, values in zip(weights.layers, cache.keys, cache.values, strict=True)
        ]
        written = self.keep_logits or mode == TOP_K
        rest = (*weights.ends, *(b.data_ptr() if written or b is not self.logits else 0 for b in self._buffers))
        code = DTYPE_CODES[weights.dtype]
        return cuda_support.load().DecoderCall(layers, weights.eps, rest, self.sizes, code, mode, self.overlap)

    def run(
        self,
        tokens: Tensor,
        sizes: Tensor,
        drawn: int,
        steps: int,
        sampling: Sampling,
        seed: int,
        end: int | None = None,
    ) -> Tensor:
        """Take steps.

        Args:
            tokens: (batch,) int64, the newest token of each row.
            sizes: (batch,) int64 on the CPU: how long each row is with it, at least 1. Rows that are longer than the
                cache stay at its end, and give tokens without meaning.
            drawn: how many tokens were drawn before.
            steps: from 1 to GROUP.
            sampling, seed: how tokens are chosen; without top_p.
            end: the token that ends a row, or None; steps go on behind it here.

        Returns:
            (batch, steps) int64.
        """
        mode = GREEDY if sampling.greedy else DRAWN if sampling.top_k is None else TOP_K
        with cuda_support.device_of(self.state):
            if mode != GREEDY:
                self.draw.copy_(draw_options(sampling, seed))
            replay = self._replays.get(mode)
            if replay is None:
                replay = self._replays[mode] = self._capture(self._call(mode), tokens)
            self._start(tokens, sizes, drawn)
            for _ in range(steps):
                replay()
            return self.found[:, :steps].clone()

    def _start(self, tokens: Tensor, sizes: Tensor, drawn: int) -> None:
        self._set_state(tokens, sizes, drawn)
        self._begin.begin(cuda_support.stream())

    def _set_state(self, tokens: Tensor, sizes: Tensor, drawn: int) -> None:
        lengths = sizes.clamp(max=self.room)
        numbers = torch.stack((torch.zeros_like(lengths), lengths, torch.zeros_like(lengths)), dim=1)
        self.state[:, :3].copy_(numbers)
        self.state[:, 0].copy_(tokens)
        self.state[:, 3] = drawn

    def _capture(self, call: Any, tokens: Tensor) -> Callable[[], None]:
        """One step as a graph; where there is no GPU, the step itself. What capturing changes, `_start` sets anew."""

        def step() -> None:
            call.step(cuda_support.stream())

        if not self.state.is_cuda:
            return step
        # The trial run, which loads the kernels, writes behind the last token of a row of length 1: position 0 of the
        # cache is kept.
        kept = self.cache.buffer[:, :, :, :, :1].clone()
        side = torch.cuda.Stream(self.state.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._start(tokens, torch.ones(self.batch, dtype=torch.int64), 0)
            step()
        torch.cuda.current_stream().wait_stream(side)
        self.cache.buffer[:, :, :, :, :1].copy_(kept)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


def _chip(device: torch.device) -> tuple[int, int]:
    """Blocks that fill the chip twice, and the most shared memory of a block."""
    if device.type != "cuda":
        return _ENOUGH_BLOCKS, 99 * 1024
    properties = torch.cuda.get_device_properties(device)
    # What every chip from compute capability 8.0 on has, where PyTorch does not say more.
    return 2 * properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 99 * 1024)


def draw_options(sampling: Sampling, seed: int) -> Tensor:
    scale = torch.tensor([sampling.inverse_temperature], dtype=torch.float32).view(torch.int32)
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    rest = torch.tensor([low, high, sampling.top_k or 0], dtype=torch.int64).to(torch.int32)
    return torch.cat([scale, rest])


class Decoders:
    """Decoders, with their graphs, that are kept from call to call; each is lent to one run at a time.

    Args:
        make: from weights, rows and the longest row to a decoder.
    """

    def __init__(self, make: Callable[[StepWeights, int, int], GraphDecoder] = GraphDecoder) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._free: list[GraphDecoder] = []

    def take(self, weights: StepWeights, batch: int, room: int) -> GraphDecoder:
        """A decoder with at least this room."""
        key = (weights.key, batch)
        with self._lock:
            # Graphs of weights that have gone would read freed memory, were they ever replayed.
            self._free = [decoder for decoder in self._free if decoder.key[0] == key[0]]
            for decoder in self._free:
                if decoder.key == key and decoder.room >= room:
                    self._free.remove(decoder)
                    return decoder
        limit = weights.network.context_length
        return self._make(weights, batch, min(limit, -(-room // _ROOM) * _ROOM))

    def give_back(self, decoder: GraphDecoder) -> None:
        """The run has ended."""
        with self._lock:
            self._free = [decoder, *self._free][:_KEPT]


class GraphEngine(CachedEngine):
    """`CachedEngine` whose tokens come in groups from a `GraphDecoder`.

    Args:
        network, limit, overflow, budget, modules: see `CachedEngine`.
        decoders: keeps decoders from call to call.

    Raises:
        NotForGraphs: the kernels cannot run this network.
    """

    def __init__(
        self,
        network: Network,
        limit: int,
        overflow: str,
        budget: int,
        modules: Sequence[nn.Module] = (),
        decoders: Decoders | None = None,
    ) -> None:
        super().__init__(network, limit, overflow, budget, modules)
        self.weights = StepWeights(network)
        self.budget = budget
        self.decoders = Decoders() if decoders is None else decoders
        self.decoder: GraphDecoder | None = None
        self._widest = 1
        self._seed: int | None = None

    def next_logits(self, rows: Rows, ended: Tensor) -> Tensor:
        """See `Engine`."""
        self._widest = min(rows.longest, self.limit)
        return super().next_logits(rows, ended)

    def _new_cache(self, batch: int) -> Cache:
        room = min(self.limit, self._widest + self.budget)
        if self.decoder is None or self.decoder.batch != batch or self.decoder.room < room:
            self.decoder = self.decoders.take(self.weights, batch, room)
            weakref.finalize(self, self.decoders.give_back, self.decoder)
        return self.decoder.cache

    def next_tokens(
        self, rows: Rows, ended: Tensor, at_most: int, sampling: Sampling, eos_id: int | None, drawn: int
    ) -> Tensor | None:
        """The next tokens of every row.

        Args:
            rows, ended: as for `next_logits`.
            at_most: so many steps at most.
            sampling: how tokens are chosen.
            eos_id: the token that ends a row, or None.
            drawn: how many tokens were drawn before in each row.

        Returns:
            (batch, n) int64, n from 1 to at_most; a row that has ended holds tokens without meaning. None when
            `next_logits` must be asked, because rows are read anew or tokens are chosen in a way that is not here.
        """
        if not self.filled or self.starts is None or self.decoder is None or self.cache is not self.decoder.cache:
            return None
        if sampling.top_p is not None or (sampling.top_k or 0) > self.weights.n_logits:
            return None
        sizes = rows.lengths - self.starts
        room = min(self.limit, self.decoder.room) + 1 - int(sizes[~ended].max())
        steps = min(at_most, room, GROUP if eos_id is None else self.decoder.group_with_end)
        if steps < 1:
            return None
        if self._seed is None:
            self._seed = philox.draw_seed() if sampling.seed is None else int(sampling.seed)
        return self.decoder.run(rows.newest(), sizes, drawn, steps, sampling, self._seed, eos_id)


def graph_engine(
    network: Network,
    limit: int,
    overflow: str,
    budget: int,
    modules: Sequence[nn.Module],
    decoders: Decoders,
    name: str = "graph",
) -> GraphEngine:
    """The GPU decoder for this network.

    Raises:
        ValueError: it cannot run it; the text says why.
    """
    try:
        return GraphEngine(network, limit, overflow, budget, modules, decoders)
    except NotForGraphs as reason:
        raise ValueError(
            f'engine="{name}" is a decoder for GPUs, which cannot run here: {reason}. engine=None takes what can run.'
        ) from None

"""The native decoder (kernels/cpu/decoder.h) as an engine: one call into C++ a token, or for many tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.generation.cache import CACHE_FORMATS, Cache
from fastgpt.generation.draws import unsigned
from fastgpt.generation.engine import CachedEngine
from fastgpt.generation.fast_head import MOST_TOP, HeadCopy
from fastgpt.generation.native_weights import NativeWeights, NotNative, Packs
from fastgpt.generation.network import Network
from fastgpt.generation.prefix import PrefixStore
from fastgpt.generation.prompt_lookup import PromptLookup
from fastgpt.generation.rows import Rows
from fastgpt.generation.sampling import Sampling
from fastgpt.ops import dispatch, extension

logger = logging.getLogger("fastgpt")

GREEDY = Sampling()
# Entries of one step that verifies a guess.
MAX_ENTRIES = 64
# Entries of one step that reads a prompt: more are cut into several.
PROMPT_ENTRIES = 512
# Prompts of so many tokens in all are read by the decoder from float32 weights too, longer ones by PyTorch's products.
# Measured on 2 cores of an AMD EPYC (Zen 3), GPT-2 124M, PyTorch and decoder: 4 tokens 38.5 and 17.0 ms, 16 tokens 54.2
# and 27.7, 64 tokens 96.5 and 88.6, 96 tokens 143 and 135.
FEW_ENTRIES = 64
# So long may one call last in which Python does not look for Ctrl-C.
_CALL_SECONDS = 0.05
_MOST_STEPS = 64
# Between two looks for a guess.
_STEPS_BETWEEN_GUESSES = 2
# Below so many weights a layer, a second thread costs more in barriers than it reads.
_WEIGHTS_FOR_THREADS = 2**16


class NativeDecoder:
    """Weights and a cache: takes steps.

    Not for two threads at once: the second is refused with a RuntimeError.

    Args:
        weights: what to run.
        batch: rows of the cache.
        limit: the longest row, at most the context.
        cache_dtype: how keys and values are kept, a key of CACHE_FORMATS; None for float32 with float32 weights, and
            bfloat16 with packed ones.
    """

    def __init__(
        self, weights: NativeWeights, batch: int, limit: int, cache_dtype: torch.dtype | str | None = None
    ) -> None:
        network = weights.network
        self.weights = weights
        self.batch = batch
        self.limit = limit
        # Packed weights read half the keys and values too; float32 weights keep all of them.
        usual = torch.float32 if weights.packs is None else torch.bfloat16
        self._format = CACHE_FORMATS[usual if cache_dtype is None else cache_dtype]
        self.cache = Cache(
            len(network.blocks), batch, network.n_heads, network.head_dim + self._format.more, limit,
            like=torch.empty(0, dtype=self._format.dtype, device="cpu"),
        )  # fmt: skip

    def step(
        self,
        tokens: Tensor,
        rows: Tensor,
        positions: Tensor,
        wanted: Tensor | None = None,
        *,
        logits: bool = True,
        best: bool = False,
        top_k: int = 0,
        prompt: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Read entries: each a token at a position of a row, all of whose earlier positions were read before.

        Several entries of one row may follow each other: a piece of a prompt, or a guess to be verified. To go back, go
        on at an earlier position.

        Args:
            tokens, rows, positions: (count,) int64 on the CPU.
            wanted: (n_wanted,) int64, increasing: the entries behind which something is wanted; None for all.
            logits: give the logits.
            best: give the likeliest tokens, the first among equals.
            top_k: how many of the largest logits are wanted: the others may be -inf; 0 for all of them.
            prompt: the entries are pieces of prompts. Faster for many of a row, the wanted ones being few; sums of
                attention are in another order than token by token.

        Returns:
            (n_wanted, n_logits) float32 or None, and (n_wanted,) int64 or None.

        Raises:
            ValueError: an entry is outside the vocabulary, the batch or the context.
            RuntimeError: another thread is in this decoder.
        """
        entries = torch.stack((tokens, rows, positions)).contiguous()
        count = entries.shape[1]
        wanted = torch.arange(count, device="cpu") if wanted is None else wanted.contiguous()
        if count:
            self.cache.reserve(min(self.limit, int(positions.max()) + 1))
        # Plain tensors, not inference tensors: the caller may do with them what it likes.
        shape = (len(wanted), self.weights.n_logits)
        got_logits = torch.empty(shape, dtype=torch.float32, device="cpu") if logits else None
        got_best = torch.empty(len(wanted), dtype=torch.int64, device="cpu") if best else None
        self.weights.decoder.step(
            *self._cache_place(), self.batch, self.cache.capacity, entries.data_ptr(), count,
            wanted.data_ptr(), len(wanted),
            0 if got_logits is None else got_logits.data_ptr(), 0 if got_best is None else got_best.data_ptr(),
            self.threads(), top_k, prompt,
        )  # fmt: skip
        return got_logits, got_best

    def generate(
        self,
        tokens: Tensor,
        rows: Tensor,
        positions: Tensor,
        steps: int,
        eos_id: int | None = None,
        sampling: Sampling = GREEDY,
        drawn: int = 0,
    ) -> Tensor:
        """The tokens behind these, step after step in one call. The cache must have the room.

        Args:
            tokens, rows, positions: (count,) int64 on the CPU: the newest token of each row.
            steps: how many tokens at most.
            eos_id: the token that ends a row, or None.
            sampling: how they are chosen: greedy, or drawn from a seed.
            drawn: how many tokens were drawn before in each row.

        Returns:
            (count, n) int64, n = steps, or fewer when all rows have ended; a row that has ended holds eos_id.

        Raises:
            As `step`.
        """
        entries = torch.stack((tokens, rows, positions)).contiguous()
        count = entries.shape[1]
        out = torch.empty(steps, count, dtype=torch.int64, device="cpu")
        done = self.weights.decoder.generate(
            *self._cache_place(), self.batch, self.cache.capacity, entries.data_ptr(), count, steps,
            -1 if eos_id is None else eos_id, out.data_ptr(), self.threads(),
            sampling.inverse_temperature, int(sampling.top_k or 0), float(sampling.top_p or 1.0),
            unsigned(int(sampling.seed or 0)), drawn,
        )  # fmt: skip
        return out[:done].t()

    def _cache_place(self) -> tuple[int, int]:
        return self.cache.buffer.data_ptr(), self._format.code

    def threads(self) -> int:
        """Threads for one step."""
        weights = self.weights
        return extension.num_threads() if weights.emb_dim * weights.hidden_dim >= _WEIGHTS_FOR_THREADS else 1


class NativeEngine(CachedEngine):
    """`CachedEngine` whose tokens the native decoder reads.

    Prompts are read by the decoder, in pieces of PROMPT_ENTRIES, so that every token sees keys and values as the cache
    holds them. Long ones on float32 weights with a float32 cache are read by PyTorch into that cache.

    Args:
        weights: of the network that the other arguments are for, see `CachedEngine`.
        cache_dtype: see `NativeDecoder`.
    """

    def __init__(
        self,
        weights: NativeWeights,
        limit: int,
        overflow: str,
        budget: int,
        modules: Sequence[nn.Module] = (),
        cache_dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(weights.network, limit, overflow, budget, modules)
        self.weights = weights
        self.cache_dtype = cache_dtype
        self._decoder: NativeDecoder | None = None
        self._seconds_a_step: float | None = None
        self._head_copy: HeadCopy | None = None
        self._kept_copy: object = None
        self._lookup: PromptLookup | None = None
        self._foreseen: list[int] = []
        self._top_k = 0
        self._prefixes: PrefixStore | None = None
        self._state: list[Any] | None = None

    def take_shortcuts(self, head_copy: HeadCopy, sampling: Sampling, n_tokens: int) -> None:
        """Do less work for the same tokens, where that pays.

        Args:
            head_copy: keeps the copy of the head from call to call.
            sampling: how the tokens will be chosen.
            n_tokens: how many will be asked for at most.
        """
        top_k = 1 if sampling.greedy else int(sampling.top_k or 0)
        weight = self.weights.screenable_head()
        if weight is not None and 1 <= top_k <= MOST_TOP and head_copy.ready(weight, n_tokens):
            self._head_copy, self._top_k = head_copy, top_k
        self._lookup = PromptLookup() if sampling.greedy else None

    def use_prefixes(self, prefixes: PrefixStore) -> None:
        """Go on with the cache that is kept there, where the prompt begins with what it holds."""
        self._prefixes = prefixes

    def keep_prefix(self, rows: Rows) -> None:
        """Keep the cache of a single row for the next prompt. To be called between two steps."""
        if self._prefixes is None or self.cache is None or not self.filled or self.starts is None:
            return
        unchanged = self._state is not None and self._state == self.weights.state()
        if unchanged and len(self.starts) == 1 and not int(self.starts):
            # The newest token has not been read.
            self._prefixes.put(self.cache, rows.ids[0, : rows.longest - 1].tolist(), self._state, self.weights)

    def _read_rest(self, prefixes: PrefixStore, ids: Tensor) -> Tensor | None:
        """Logits behind a single prompt whose beginning is kept, or None when it is not."""
        self._state = self.weights.state()
        found = None if self._state is None else prefixes.take(ids.tolist(), self._state)
        if found is None or self._decoder is None:
            return None
        cache, shared = found
        cache.reserve(len(ids), self.spare)
        self.cache = self._decoder.cache = cache
        left = ids[shared:]
        last = torch.tensor([len(left) - 1], device="cpu")
        return self._read(left, torch.zeros_like(left), torch.arange(shared, len(ids), device="cpu"), last)

    def _new_cache(self, batch: int) -> Cache:
        self._decoder = NativeDecoder(self.weights, batch, self.limit, self.cache_dtype)
        weight = self.weights.screenable_head()
        if self._head_copy is not None and weight is not None:
            self._kept_copy = self._head_copy.attach(self.weights.decoder, weight)
        return self._decoder.cache

    def _prefill(self, rows: Rows, sizes: Tensor) -> Tensor:
        assert self.starts is not None
        prefixes = self._prefixes if self._state is None else None
        if prefixes is not None and len(sizes) == 1 and not int(self.starts):
            logits = self._read_rest(prefixes, rows.ids[0, : rows.longest])
            if logits is not None:
                return logits
        exact = self.weights.packs is None and self.cache_dtype in (None, torch.float32)
        if exact and int(sizes.sum()) > FEW_ENTRIES:
            return super()._prefill(rows, sizes)
        ids = rows.from_positions(self.starts)
        if self._decoder is None:
            self._new_cache(len(sizes))
        assert self._decoder is not None
        counts = sizes.tolist()
        self._decoder.cache.reserve(max(counts))
        tokens = torch.cat([ids[row, :count] for row, count in enumerate(counts)])
        places = torch.cat([torch.full((count,), row, device="cpu") for row, count in enumerate(counts)])
        positions = torch.cat([torch.arange(count, device="cpu") for count in counts])
        return self._read(tokens, places, positions, sizes.cumsum(0) - 1)

    def _read(self, tokens: Tensor, places: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        """Logits behind the entries `last`; all are read, in pieces."""
        assert self._decoder is not None
        found = []
        for begin in range(0, len(tokens), PROMPT_ENTRIES):
            part = slice(begin, begin + PROMPT_ENTRIES)
            wanted = last[(last >= begin) & (last < begin + PROMPT_ENTRIES)] - begin
            logits, _ = self._decoder.step(tokens[part], places[part], positions[part], wanted, prompt=True)
            assert logits is not None
            found.append(logits)
        return torch.cat(found)

    def _decode(self, rows: Rows, sizes: Tensor, ended: Tensor, cache: Cache) -> Tensor:
        assert self._decoder is not None
        active = (~ended).nonzero().flatten()
        logits, _ = self._decoder.step(rows.newest()[active], active, sizes[active] - 1, top_k=self._top_k)
        assert logits is not None
        if len(active) == len(ended):
            return logits
        everyone = logits.new_zeros(len(ended), logits.shape[1])
        everyone[active] = logits
        return everyone

    def next_tokens(
        self, rows: Rows, ended: Tensor, at_most: int, sampling: Sampling, eos_id: int | None, drawn: int
    ) -> Tensor | None:
        """The tokens of the next steps.

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
        if not self.filled or self._decoder is None or self.starts is None:
            return None
        here = sampling.greedy or sampling.seed is not None
        if not here or (sampling.top_k or 0) > self.weights.n_logits:
            return None
        if self._foreseen:
            known, self._foreseen = self._foreseen[:at_most], self._foreseen[at_most:]
            return torch.tensor([known], device="cpu")
        active = (~ended).nonzero().flatten()
        sizes = (rows.lengths - self.starts)[active]
        room = self.limit + 1 - int(sizes.max())
        steps = min(at_most, room, self._steps_a_call())
        if steps < 1 or not self._heads_fit():
            return None
        if self._lookup is not None and len(ended) == 1:
            guess = self._guess(self._lookup, rows, room - 1)
            if guess:
                self._foreseen = self._verify(self._lookup, int(rows.newest()), guess, int(sizes) - 1)
                return self.next_tokens(rows, ended, at_most, sampling, eos_id, drawn)
            steps = steps if self._lookup.resting else min(steps, _STEPS_BETWEEN_GUESSES)
        self._decoder.cache.reserve(int(sizes.max()) + steps - 1, self.spare)
        started = time.perf_counter()
        tokens = self._decoder.generate(rows.newest()[active], active, sizes - 1, steps, eos_id, sampling, drawn)
        self._seconds_a_step = (time.perf_counter() - started) / tokens.shape[1]
        if len(active) == len(ended):
            return tokens
        everyone = tokens.new_zeros(len(ended), tokens.shape[1])
        everyone[active] = tokens
        return everyone

    def _guess(self, lookup: PromptLookup, rows: Rows, room: int) -> list[int]:
        lookup.extend(rows.ids[0, len(lookup) : rows.longest].tolist())
        # A guess needs a place in the cache, and there must be entries for it.
        return lookup.guess(min(room, MAX_ENTRIES - 1))

    def _verify(self, lookup: PromptLookup, newest: int, guess: list[int], position: int) -> list[int]:
        """The tokens behind `newest`: those of the guess that the model takes too, and one more."""
        assert self._decoder is not None
        entries = torch.tensor([newest, *guess], device="cpu")
        positions = torch.arange(position, position + len(entries), device="cpu")
        self._decoder.cache.reserve(position + len(entries), self.spare)
        started = time.perf_counter()
        _, best = self._decoder.step(entries, torch.zeros_like(entries), positions, logits=False, best=True)
        assert best is not None
        taken = best.tolist()
        good = next((i for i, token in enumerate(guess) if token != taken[i]), len(guess))
        lookup.learn(len(guess), good, time.perf_counter() - started, self._seconds_a_step)
        return taken[: good + 1]

    def _heads_fit(self) -> bool:
        """Every token that the head can give can be read."""
        return self.weights.n_logits <= self.network.vocab_size

    def _steps_a_call(self) -> int:
        if self._seconds_a_step is None:
            return 1
        return max(1, min(_MOST_STEPS, int(_CALL_SECONDS / max(self._seconds_a_step, 1e-9))))


def make_engine(
    network: Network, limit: int, overflow: str, budget: int, modules: Sequence[nn.Module] = ()
) -> CachedEngine:
    """The fastest engine that reads the network's own weights; see `CachedEngine` for the arguments."""
    try:
        return native_engine(network, None, limit, overflow, budget)
    except NotNative as reason:
        logger.info("generation runs without the native decoder: %s", reason)
        return CachedEngine(network, limit, overflow, budget, modules)


def native_engine(
    network: Network,
    packs: Packs | None,
    limit: int,
    overflow: str,
    budget: int,
    cache_dtype: torch.dtype | str | None = None,
) -> NativeEngine:
    """The native engine on the network's weights, or on packed copies of them; see `NativeDecoder` for `cache_dtype`.

    Raises:
        NotNative: it cannot run this network, or another backend is asked for.
    """
    if dispatch.requested() not in ("auto", "cpu"):
        raise NotNative(f"the backend {dispatch.requested()} is asked for")
    return NativeEngine(NativeWeights(network, packs), limit, overflow, budget, cache_dtype=cache_dtype)

"""`Generator`: tokens from a model, fast, exact, for batches and for prompts of different lengths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.generation.cache import CACHE_FORMATS
from fastgpt.generation.engine import Engine, PlainEngine, eval_mode, prefill
from fastgpt.generation.fast_head import HeadCopy
from fastgpt.generation.graph_engine import Decoders, graph_engine
from fastgpt.generation.native_engine import NativeEngine, make_engine, native_engine
from fastgpt.generation.native_weights import NotNative, Packs
from fastgpt.generation.network import Copies, Network, NotRecognised, read_network, unwrap
from fastgpt.generation.persistent_engine import make_decoder
from fastgpt.generation.prefix import PrefixStore
from fastgpt.generation.rows import Prompts, read_prompts
from fastgpt.generation.sampling import Sampling
from fastgpt.generation.session import Session

logger = logging.getLogger("fastgpt")

OVERFLOWS = ("exact", "stop", "slide")
ENGINES = ("graph", "persistent")
# What the native decoder has packed weights for.
PRECISIONS = (torch.bfloat16, "int8", "int4")
_PROBE_TOKENS = 4
# Largest difference of logits, relative to the largest of them, that another order of the same additions explains.
_PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


class Generator:
    """Generates tokens with a key-value cache.

    Weights are read where they are at every call, so a Generator made before training generates with what was learned.
    The model is in evaluation mode while it runs; afterwards every module is in the mode that it was in.

    Args:
        model: a GPT of the book's structure, fastgpt's or the reader's own. Any other callable from token ids (batch,
            n_tokens) to logits (batch, n_tokens, vocab_size) works too, without a cache; `why_plain` then says why.
        dtype: None uses the model's own weights. torch.bfloat16, "int8" and "int4" use packed copies of the matrices
            (8 and 4 bits with a scale for every 32 weights; with "int4" the head has 8 bits) and keep keys and values
            in bfloat16, everything else stays float32. Where the native decoder cannot run the model, torch.bfloat16,
            as every other floating-point dtype, uses a converted copy. Changed weights are converted again at the next
            call, except for edits through `.data`, after which `refresh()` is needed.
        shortcuts: do less work for the same tokens, where that pays: multiply only the part of a float32 head that an
            8-bit copy of it leaves open (a quarter more memory for the head), read what the text so far suggests
            several tokens at a time, and keep the cache of the last single prompt for the next one, so that only what
            it says anew is read. False reads all weights for each token.
        engine: None takes the fastest that is proven. "graph" is the decoder for GPUs, one CUDA graph a token, for
            float32 and bfloat16 models; "persistent" makes many tokens of a single row in one launch, and takes several
            rows as "graph" does. No GPU has run them yet. Without a seed they draw others than torch.multinomial.
        cache_dtype: how keys and values are kept. None keeps them in the dtype of the weights, and in bfloat16 beside
            packed copies. torch.float32, torch.bfloat16 and "int8" (8 bits, with a float32 scale for the keys and one
            for the values of each token and head) are for the native decoder alone. They are rounded once, when they
            are written, and every token, of the prompt too, sees what was kept. "int8" takes little more than a quarter
            of the memory of float32, and long contexts of many rows are read faster. Prompts are then read by the
            decoder, beside float32 weights too.

    Raises:
        TypeError, ValueError: the model is not callable, or the dtype, the engine or the cache_dtype is not available.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        dtype: torch.dtype | str | None = None,
        *,
        shortcuts: bool = True,
        engine: str | None = None,
        cache_dtype: torch.dtype | str | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"A Generator needs a model, something to call with token ids; got {type(model).__name__}.")
        _check_dtype(dtype)
        if engine is not None and engine not in ENGINES:
            raise ValueError(f"engine={engine!r} is not known; use None or one of: {', '.join(ENGINES)}.")
        _check_cache_dtype(cache_dtype, engine)
        self.model = model
        self.engine = engine
        self._decoders = Decoders(make_decoder) if engine == "persistent" else Decoders()
        self.dtype = dtype
        self.cache_dtype = cache_dtype
        self._copies = Copies(dtype) if isinstance(dtype, torch.dtype) else None
        self._packs = Packs(dtype) if dtype in PRECISIONS else None
        self._head_copy = HeadCopy() if shortcuts else None
        self._prefixes = PrefixStore() if shortcuts else None
        self._verified: list[type] | None = None
        self._logged: str | None = None

    def __repr__(self) -> str:
        kept = "" if self.cache_dtype is None else f", cache_dtype={self.cache_dtype}"
        return f"Generator({type(self.model).__name__}, dtype={self.dtype}{kept})"

    @property
    def why_plain(self) -> str | None:
        """Why the model runs without a cache, or None when it runs with one."""
        network = self._network()
        return network if isinstance(network, str) else None

    def refresh(self) -> None:
        """Copy weights again at the next call. Only needed after edits through `.data`, with a dtype or shortcuts."""
        for copies in (self._copies, self._packs, self._head_copy, self._prefixes):
            if copies is not None:
                copies.clear()
        self._verified = None

    def forget(self) -> None:
        """Give back the memory of the cache that is kept for the next prompt."""
        if self._prefixes is not None:
            self._prefixes.clear()

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | None = None,
        seed: int | None = None,
        overflow: str = "exact",
    ) -> Tensor | list[Tensor]:
        """Append up to `max_new_tokens` tokens to each prompt.

        Args:
            prompts: (batch, n_tokens) int64, or a list of prompts of different lengths, each a list of ids or a
                (n_tokens,) tensor. Every row gets what it would get alone at its place (drawn without a seed, tokens
                depend on the batch).
            max_new_tokens: how many tokens to append at most; 0 gives the prompts back.
            temperature: 0 takes the likeliest token, above 0 draws.
            top_k: draw from the k likeliest tokens only; ties with the last of them stay.
            top_p: draw from the smallest set of likeliest tokens whose probabilities reach top_p.
            eos_id: the token that ends a row. It is not appended.
            seed: for drawing so that calls repeat, the same tokens on every engine, and on a CPU without Python in
                between; None draws from torch's global generator, as the book does.
            overflow: what happens to a row that outgrows the context: "exact" reads its last tokens anew for each new
                one, as the book does (slow); "slide" reads the last half anew and goes on (fast, other tokens); "stop"
                ends it when the context is full.

        Returns:
            For a tensor: (batch, n_tokens + new) int64; rows that ended earlier than others are filled with `eos_id`.
            For a list: a list of (n_tokens + new,) tensors, each as long as its row.
            On the model's device.

        Raises:
            TypeError, ValueError, IndexError: a prompt or an option is not usable; the text says what is wanted.
        """
        session = self._session(prompts, max_new_tokens, Sampling(temperature, top_k, top_p, seed), eos_id, overflow)
        if session is None:
            return prompts.new_zeros(0, prompts.shape[1] + max_new_tokens) if isinstance(prompts, Tensor) else []
        session.ahead = True
        steps = list(session)
        if isinstance(session.prompts, Tensor):
            return torch.cat([session.prompts, *steps], dim=1)
        counts = session.counts.tolist()
        new = torch.cat(steps, dim=1) if steps else session.rows.ids[:, :0]
        return [
            torch.cat([prompt, new[i, :count]])
            for i, (prompt, count) in enumerate(zip(session.prompts, counts, strict=True))
        ]

    def stream(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | None = None,
        seed: int | None = None,
        overflow: str = "exact",
    ) -> Iterator[Tensor]:
        """Like `generate`, but gives the new tokens step by step.

        Args:
            prompts, max_new_tokens, temperature, top_k, top_p, eos_id, seed, overflow: as for `generate`; they are
                checked at once, the model runs when tokens are asked for.

        Returns:
            An iterator of (batch, 1) int64 tensors, until every row has ended. Rows that ended earlier hold `eos_id`,
            or -1 where there is none.

        Raises:
            As `generate`.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        session = self._session(prompts, max_new_tokens, sampling, eos_id, overflow)
        return iter(()) if session is None else iter(session)

    def _session(
        self, prompts: Prompts, max_new_tokens: int, sampling: Sampling, eos_id: int | None, overflow: str
    ) -> Session | None:
        """Everything checked and ready to run; None when there is no prompt."""
        _check_count("max_new_tokens", max_new_tokens)
        if eos_id is not None:
            _check_count("eos_id", eos_id)
        if overflow not in OVERFLOWS:
            raise ValueError(f"overflow={overflow!r} is not known; use one of: {', '.join(OVERFLOWS)}.")
        network = self._network()
        engine: Engine
        if isinstance(network, str):
            limit = _known_context(self.model)
            checked = read_prompts(prompts, _device(self.model), None, limit)
            engine = PlainEngine(self.model, limit, modules_of(self.model))
        else:
            limit = network.context_length
            checked = read_prompts(prompts, network.tok_emb.device, network.vocab_size, limit)
            engine = self._engine(network, overflow, max_new_tokens)
        if len(checked) == 0:
            return None
        stop_at = limit if overflow == "stop" else None
        if isinstance(engine, NativeEngine) and self._prefixes is not None:
            engine.use_prefixes(self._prefixes)
        return Session(engine, checked, max_new_tokens, sampling, eos_id, stop_at, self._head_copy)

    def _engine(self, network: Network, overflow: str, budget: int) -> Engine:
        limit = network.context_length
        if self.engine is not None:
            converted = network if self._copies is None else read_network(self.model, self._copies)
            return graph_engine(converted, limit, overflow, budget, [], self._decoders, self.engine)
        if self._packs is not None:
            try:
                return native_engine(network, self._packs, limit, overflow, budget, self.cache_dtype)
            except NotNative as reason:
                if self._copies is None or self.cache_dtype is not None:
                    raise self._refusal(reason) from None
        if self._copies is not None:
            network = read_network(self.model, self._copies)
        if self.cache_dtype is not None:
            try:
                return native_engine(network, None, limit, overflow, budget, self.cache_dtype)
            except NotNative as reason:
                raise self._refusal(reason) from None
        modules = [module for part in network.opaque for module in part.modules()]
        return make_engine(network, limit, overflow, budget, modules)

    def _refusal(self, reason: NotNative) -> ValueError:
        asked, instead = f"dtype={self.dtype!r}", "dtype=None uses the model's own weights"
        if self.cache_dtype is not None:
            asked = f"cache_dtype={self.cache_dtype!r}"
            instead = "cache_dtype=None keeps keys and values in the dtype of the weights"
        return ValueError(f"Generator({asked}) needs the native decoder, which cannot run here: {reason}. {instead}.")

    def _network(self) -> Network | str:
        """The model as a network on its own weights, or why it is none."""
        try:
            network = read_network(self.model)
            if network.foreign:
                self._verify(network)
        except NotRecognised as reason:
            if self.dtype is not None:
                raise ValueError(
                    f"Generator(dtype={self.dtype}) converts the weights of the book's GPT, but this model is another: "
                    f"{reason}. Convert the model itself, with .to(), and leave dtype out."
                ) from None
            if self.cache_dtype is not None:
                raise ValueError(
                    f"Generator(cache_dtype={self.cache_dtype}) keeps keys and values of the book's GPT, but this "
                    f"model is another: {reason}. Without cache_dtype it runs without a cache."
                ) from None
            if str(reason) != self._logged:
                self._logged = str(reason)
                logger.info("Generator runs without a cache: %s", reason)
            return str(reason)
        return network

    def _verify(self, network: Network) -> None:
        types = [type(module) for module in unwrap(self.model).modules()]
        if types != self._verified:
            with all_in_eval_mode(self.model):
                verify(network, self.model)
            self._verified = types


def verify(network: Network, model: Callable[[Tensor], Tensor]) -> None:
    """Compare the network's logits with the model's on a few tokens, in the model's present mode.

    Raises:
        NotRecognised: they differ, or one of the two fails.
    """
    count = min(_PROBE_TOKENS, network.context_length)
    device = network.tok_emb.device
    ids = torch.linspace(0, network.vocab_size - 1, count, device=device).long()[None]
    # The model may draw random numbers; the user's sequence of them is not to change.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
        try:
            # One position in the middle, so that a model which sees the future is found out, and the last.
            last = torch.tensor([(count - 1) // 2, count - 1], device=device)
            got = prefill(network, ids.expand(2, -1), last)
            want = model(ids)[0, last]
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise NotRecognised(f"a trial run failed: {error}") from error
        if got.shape != want.shape:
            raise NotRecognised(f"its logits have shape {tuple(want.shape)}, not {tuple(got.shape)}")
        bound = _PROBE_TOLERANCE.get(want.dtype, 0.05) * max(1.0, float(want.abs().max()))
        difference = float((got - want).abs().max())
    if not difference <= bound:
        raise NotRecognised(f"it computes something else than the book's GPT: logits differ by {difference:.1e}")


def modules_of(model: Any) -> list[nn.Module]:
    """All modules of a model, none for another callable."""
    return list(model.modules()) if isinstance(model, nn.Module) else []


def all_in_eval_mode(model: Any) -> Any:
    """A context in which every module of the model is in evaluation mode."""
    return eval_mode(modules_of(model))


def _device(model: Any) -> torch.device | None:
    tensors = (t for module in modules_of(model)[:1] for t in (*module.parameters(), *module.buffers()))
    return next((t.device for t in tensors), None)


def _known_context(model: Any) -> int | None:
    """The longest input of a model that is not of the book's structure, where it tells."""
    weight = getattr(getattr(unwrap(model), "pos_emb", None), "weight", None)
    if isinstance(weight, Tensor):
        return weight.shape[0]
    cfg = getattr(unwrap(model), "cfg", None)
    length = cfg.get("context_length") if isinstance(cfg, dict) else None
    return length if isinstance(length, int) else None


def context_length_of(model: Any) -> int:
    """The longest input of a model, from its position embeddings or its `cfg`.

    Raises:
        ValueError: it tells neither.
    """
    length = _known_context(model)
    if length is None:
        raise ValueError(
            f"{type(model).__name__} has neither pos_emb nor cfg['context_length'], so its context is not known; "
            "pass context_size."
        )
    return length


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number; got {value!r}.")
    if value < 0:
        raise ValueError(f"{name} must be 0 or more; got {value}.")


def _check_cache_dtype(cache_dtype: object, engine: str | None) -> None:
    if cache_dtype is None:
        return
    if cache_dtype not in tuple(CACHE_FORMATS):
        raise ValueError(
            "cache_dtype must be None (that of the weights), torch.float32, torch.bfloat16 or "
            f'"int8"; got {cache_dtype!r}.'
        )
    if engine is not None:
        raise ValueError(
            f"engine={engine!r} keeps keys and values in the dtype of the weights; leave cache_dtype={cache_dtype!r} "
            "out."
        )


def _check_dtype(dtype: object) -> None:
    if dtype is None or dtype in PRECISIONS or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    raise ValueError(
        "dtype must be None (the model's own weights), a floating-point dtype such as torch.bfloat16, "
        f'"int8" or "int4"; got {dtype!r}.'
    )

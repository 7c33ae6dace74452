"""One run of an engine over some prompts: which tokens are asked for, chosen and given, and which rows have ended."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgpt.generation.engine import Engine
from fastgpt.generation.fast_head import HeadCopy
from fastgpt.generation.graph_engine import GraphEngine
from fastgpt.generation.native_engine import NativeEngine
from fastgpt.generation.rows import Rows
from fastgpt.generation.sampling import Sampling


class Session:
    """One run of the engine over some prompts. Iterating runs it, once; `counts` then tells the new tokens per row.

    Attributes:
        ahead: several steps may be computed before the first of them is given.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Tensor | list[Tensor],
        max_new_tokens: int,
        sampling: Sampling,
        eos_id: int | None = None,
        stop_at: int | None = None,
        head_copy: HeadCopy | None = None,
    ) -> None:
        if head_copy is not None and isinstance(engine, NativeEngine):
            engine.take_shortcuts(head_copy, sampling, max_new_tokens)
        self.engine = engine
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.eos_id = eos_id
        self.stop_at = stop_at
        self.ahead = False
        self.rows = Rows(prompts)
        self.counts = torch.zeros_like(self.rows.lengths)

    def __iter__(self) -> Iterator[Tensor]:
        try:
            yield from self._steps()
        except GeneratorExit:
            self._keep_prefix()
            raise
        self._keep_prefix()

    def _keep_prefix(self) -> None:
        if isinstance(self.engine, NativeEngine):
            self.engine.keep_prefix(self.rows)

    def _steps(self) -> Iterator[Tensor]:
        rows = self.rows
        ended = torch.zeros(len(rows.lengths), dtype=torch.bool, device="cpu")
        filler = -1 if self.eos_id is None else self.eos_id
        may_end = self.eos_id is not None or self.stop_at is not None
        left = self.max_new_tokens
        while left > 0:
            if self.stop_at is not None:
                ended = ended | (rows.lengths >= self.stop_at)
                if bool(ended.all()):
                    return
            found = self._next(ended, left)
            if found.shape[1] > 1 and self.ahead and not may_end:
                rows.extend(found)
                self.counts += found.shape[1]
                left -= found.shape[1]
                yield found
                continue
            # One wait for the device, for all of them.
            ends = None if self.eos_id is None else (found == self.eos_id).cpu()
            for number, tokens in enumerate(found.unbind(1)):
                if ends is not None:
                    ended = ended | ends[:, number]
                    if bool(ended.all()):
                        return
                self.counts += ~ended
                rows.append(tokens)
                if may_end:
                    tokens = tokens.masked_fill(ended.to(tokens.device), filler)
                left -= 1
                yield tokens[:, None]

    def _next(self, ended: Tensor, left: int) -> Tensor:
        """The tokens of the next step, or of several, (batch, n)."""
        rows = self.rows
        engine, at_most = self.engine, left if self.ahead else 1
        if self.stop_at is not None:
            at_most = min(at_most, self.stop_at - int(rows.lengths[~ended].max()))
        drawn = self.max_new_tokens - left
        if isinstance(engine, GraphEngine | NativeEngine):
            tokens = engine.next_tokens(rows, ended, at_most, self.sampling, self.eos_id, drawn)
            if tokens is not None:
                return tokens
        return self.sampling.choose(self.engine.next_logits(rows, ended), drawn)[:, None]

"""A long run of generation in mixed batches, whose memory must not grow: `python tests/soak.py 200000`, or `make soak`.

Each call draws anew: 1 to 16 rows of different lengths, greedy or sampled, with or without an end token, within the
context or past it in each of the three ways, in one of four weight formats or with a rounded cache, whole or as a
stream that may be left in the middle. Now and then an optimiser step changes the weights, so that every copy of them is
made again. Greedy float32 rows are compared with the book's loop every twentieth call.

The resident memory is read after each call. What the process has when a tenth of the tokens is done is its warm state;
from then on it may grow by at most `LIMIT` MiB in all, however long the run: a leak of one cache of this model every
hundred calls would be seen.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastgpt
from fastgpt import reference
from fastgpt.generation import Generator

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "int8 cache": {"cache_dtype": "int8"},
}
OVERFLOWS = ("exact", "slide", "stop")
CFG = {
    "vocab_size": 601,
    "context_length": 48,
    "emb_dim": 64,
    "n_heads": 4,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": True,
}
# MiB. A run without a leak moves by the allocator's fragments alone, 1 to 3 MiB here.
LIMIT = 8.0
CALLS_BETWEEN_STEPS = 25


@dataclass
class Result:
    """Tokens, calls by kind, and the resident memory in MiB: when warm, at most, and at the end."""

    tokens: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    warm: float = 0.0
    most: float = 0.0
    end: float = 0.0


def resident() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Soak:
    """A model, its Generators and an optimiser.

    Args:
        seed: of everything that is drawn.
    """

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.model = fastgpt.GPTModel(CFG).eval()
        self.generators = {name: Generator(self.model, **options) for name, options in FORMATS.items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def learn(self) -> None:
        """One optimiser step on random tokens."""
        ids = torch.randint(CFG["vocab_size"], (2, 17))
        self.model.train()
        self.optimizer.zero_grad()
        logits = self.model(ids[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.model.eval()

    def prompts(self) -> list[Tensor]:
        """1 to 16 prompts of 1 to 40 tokens."""
        count = self.random.randint(1, 16)
        return [torch.randint(CFG["vocab_size"], (self.random.randint(1, 40),)) for _ in range(count)]

    def call(self, checked: bool) -> tuple[int, str]:
        """One call of a Generator: how many tokens came, and its kind."""
        chosen = "float32" if checked else self.random.choice(list(FORMATS))
        generator, prompts = self.generators[chosen], self.prompts()
        overflow = "exact" if checked else self.random.choice(OVERFLOWS)
        # "exact" reads the whole context for each token past it.
        count = self.random.randint(1, 20 if overflow == "exact" else 90)
        options: dict[str, object] = {"overflow": overflow}
        if self.random.random() < 0.3:
            options["eos_id"] = self.random.randrange(CFG["vocab_size"])
        sampled = not checked and self.random.random() < 0.5
        if sampled:
            options |= {"temperature": 1.0, "top_k": self.random.choice((None, 1, 20)), "top_p": 0.9}
            options |= {"seed": self.random.randrange(1000)}
        kind = f"{chosen} {'sampled' if sampled else 'greedy'} {overflow}"
        if not checked and self.random.random() < 0.2:
            return self.stream(generator, prompts, count, options), f"{kind} stream"
        rows = generator.generate(prompts, count, **options)
        if checked:
            self.compare(prompts, rows, count, options.get("eos_id"))
        return sum(len(row) - len(prompt) for row, prompt in zip(rows, prompts, strict=True)), kind

    def stream(self, generator: Generator, prompts: list[Tensor], count: int, options: dict[str, object]) -> int:
        """As many steps as it gives, or only some of them."""
        leave = self.random.randint(1, 2 * count)
        tokens = 0
        for number, step in enumerate(generator.stream(prompts, count, **options)):
            tokens += len(step)
            if number == leave:
                break
        return tokens

    def compare(self, prompts: list[Tensor], rows: list[Tensor], count: int, eos_id: object) -> None:
        """With the book's loop, which reads everything anew for each token.

        Raises:
            AssertionError: a row differs where the loop itself is not within rounding of both tokens.
        """
        for prompt, row in zip(prompts, rows, strict=True):
            want = reference.generate(self.model, prompt[None], count, CFG["context_length"], eos_id=eos_id)[0]
            if torch.equal(row, want):
                continue
            length = min(len(row), len(want))
            place = int((row[:length] != want[:length]).nonzero()[:1].sum()) or length
            with torch.no_grad():
                logits = self.model(want[None, max(0, place - CFG["context_length"]) : place])[0, -1]
            top = logits.topk(2).values
            assert top[0] - top[1] < 1e-4 * top.abs().max(), f"{row.tolist()}, wanted {want.tolist()}"


def soak(tokens: int, seed: int = 0, report: bool = False) -> Result:
    """Generate so many tokens.

    Raises:
        AssertionError: tokens differ from the book's loop.
    """
    work, result, calls = Soak(seed), Result(), 0
    started, next_report = time.perf_counter(), tokens // 10
    while result.tokens < tokens:
        if calls % CALLS_BETWEEN_STEPS == 0:
            work.learn()
        got, kind = work.call(checked=calls % 20 == 0)
        calls += 1
        result.tokens += got
        result.kinds[kind] += 1
        now = resident()
        if result.tokens <= tokens // 10:
            result.warm = max(result.warm, now)
        result.most = max(result.most, now)
        if report and result.tokens >= next_report:
            seconds = time.perf_counter() - started
            print(f"{result.tokens} tokens, {calls} calls, {seconds:.0f} s, {now:.1f} MiB", flush=True)
            next_report += tokens // 10
    gc.collect()
    result.end = resident()
    return result


def main() -> int:
    """Run, report, and tell whether memory grew."""
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    torch.set_num_threads(1)
    result = soak(tokens, report=True)
    for kind, number in sorted(result.kinds.items()):
        print(f"  {number:>5} {kind}")
    grown = result.most - result.warm
    print(f"resident: {result.warm:.1f} MiB when warm, {result.most:.1f} at most, {result.end:.1f} at the end")
    print(f"grown by {grown:.1f} MiB of {LIMIT:.0f} allowed")
    return 1 if grown > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())

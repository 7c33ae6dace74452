"""GPT-2 124M as a whole: training steps and generation against plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.cases import Case
from fastgpt.comparison import generation_providers, training_providers, twins
from fastgpt.config import GPT_CONFIG_124M

PROVIDERS = ("book", "torch", "fastgpt")


def training_case(batch: int, length: int, drop_rate: float) -> Case:
    """Tokens of one step: forward, cross-entropy, backward, AdamW."""
    ours, plain = twins({**GPT_CONFIG_124M, "drop_rate": drop_rate})
    tokens = torch.randint(50257, (batch, length + 1))
    providers = training_providers(ours, plain, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), PROVIDERS)

    def check() -> None:
        losses = {name: step() for name, step in providers.items()}
        # With dropout each provider draws its own mask; the losses of a fresh model still agree to a percent.
        bound = 0.15 if drop_rate else 2e-5
        assert max(losses.values()) - min(losses.values()) <= bound, losses

    name = f"training step GPT-2 124M float32 {batch}x{length} dropout {drop_rate:g}"
    return Case(name, dict(providers), batch * length, "tokens/s", check)


def generation_case(prompt_length: int, n_new: int) -> Case:
    """New tokens of one greedy run, batch 1; the time includes the prompt."""
    ours, plain = twins({**GPT_CONFIG_124M, "drop_rate": 0.0})
    prompt = torch.randint(50257, (1, prompt_length))
    providers = generation_providers(ours, plain, prompt, dict.fromkeys(PROVIDERS, n_new))

    def check() -> None:
        book, *others = (provider() for provider in providers.values())
        assert all(torch.equal(book, other) for other in others)

    name = f"generation GPT-2 124M float32 prompt {prompt_length} new {n_new}"
    return Case(name, dict(providers), n_new, "tokens/s", check)


def model_cases() -> Iterator[Case]:
    """One at a time, so that only one case's weights live."""
    yield generation_case(32, 32)
    yield training_case(4, 256, 0.0)
    yield training_case(4, 256, 0.1)

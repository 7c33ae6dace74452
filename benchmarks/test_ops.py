"""pytest-benchmark tables of every op: `make bench`. Each group compares the providers on the same tensors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import pytest

from benchmarks import cases, fusion_cases
from fastgpt.memory import kept_memory

PROVIDERS = tuple(cases.BACKENDS)

# Maker of cases: how many it makes. Counted here, as making one takes memory and time.
MAKERS = {
    cases.layer_norm_cases: 8,
    cases.gelu_cases: 8,
    cases.attention_cases: 8,
    fusion_cases.residual_cases: 8,
    fusion_cases.biased_gelu_cases: 4,
    fusion_cases.embedding_cases: 4,
    fusion_cases.loss_cases: 1,
}


@functools.lru_cache(maxsize=1)
def checked(maker: Callable[[], Iterator[cases.Case]], index: int) -> cases.Case:
    """The case, after its check: nothing is timed before it is right."""
    case = next(itertools.islice(maker(), index, None))
    case.check()
    return case


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("maker", "index"),
    [(maker, i) for maker, count in MAKERS.items() for i in range(count)],
)
def test_op(benchmark, maker, index, provider):
    case = checked(maker, index)
    if provider not in case.providers:
        pytest.skip(f"{provider} is left out of {case.name}: too slow to learn from")
    benchmark.group = f"{case.name}"
    benchmark.name = provider
    benchmark.extra_info |= {"work": case.work, "unit": case.unit}
    # What every training loop of fastgpt does, for each provider alike.
    with kept_memory():
        benchmark.pedantic(case.providers[provider], warmup_rounds=2, rounds=9)

"""pytest-benchmark tables of the whole model: `make bench`."""

from __future__ import annotations

import functools

import pytest

from benchmarks import model_cases
from benchmarks.cases import Case

MAKERS = {
    "generation": lambda: model_cases.generation_case(32, 16),
    "training": lambda: model_cases.training_case(2, 128, 0.0),
}


@functools.lru_cache(maxsize=1)
def checked(maker: str) -> Case:
    """The case, after its check: nothing is timed before it is right."""
    case = MAKERS[maker]()
    case.check()
    return case


@pytest.mark.parametrize("provider", model_cases.PROVIDERS)
@pytest.mark.parametrize("maker", MAKERS)
def test_model(benchmark, maker, provider):
    case = checked(maker)
    benchmark.group = case.name
    benchmark.name = provider
    benchmark.extra_info |= {"work": case.work, "unit": case.unit}
    benchmark.pedantic(case.providers[provider], warmup_rounds=1, rounds=3)

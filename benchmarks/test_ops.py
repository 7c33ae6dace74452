"""pytest-benchmark tables of every op: `make bench`. Each group compares the providers on the same tensors."""

from __future__ import annotations

import functools

import pytest

from benchmarks import cases

PROVIDERS = tuple(cases.BACKENDS)


@functools.lru_cache(maxsize=1)
def checked(maker: str, index: int) -> cases.Case:
    """The case, after its check: nothing is timed before it is right."""
    case = list(getattr(cases, maker)())[index]
    case.check()
    return case


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("maker", "index"),
    [(maker, i) for maker in ("layer_norm_cases", "gelu_cases", "attention_cases") for i in range(8)],
)
def test_op(benchmark, maker, index, provider):
    case = checked(maker, index)
    if provider not in case.providers:
        pytest.skip(f"{provider} is left out of {case.name}: too slow to learn from")
    benchmark.group = f"{case.name}"
    benchmark.name = provider
    benchmark.extra_info |= {"work": case.work, "unit": case.unit}
    benchmark.pedantic(case.providers[provider], warmup_rounds=2, rounds=9)

"""A sample of the random cases of equality.py; `make soak` runs 2,000."""

from __future__ import annotations

import pytest
from equality import check


@pytest.mark.parametrize("group", range(6))
def test_generation_gives_the_tokens_of_the_plain_loop(group):
    results = [outcome.result for seed in range(5000 + 10 * group, 5010 + 10 * group) for outcome in check(seed)]
    assert results.count("tie") <= 1

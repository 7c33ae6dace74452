"""The race against other engines: its arithmetic and its turns; the engines themselves are not started."""

from __future__ import annotations

from benchmarks.generate import CASES, FEWER, prompts_of
from benchmarks.generate_engines import EXACT, NAMES
from benchmarks.generate_race import Samples, take_turns
from benchmarks.generate_table import TARGETS, lines_of


def row(case, engine, rate, **more):
    return {"case": case, "engine": engine, "rate": rate, "ms": 1000 / rate, "new": 128, **more}


class Stand:
    """A worker that answers at once."""

    def __init__(self, name, log, fails_at=None):
        self.name, self.log, self.fails_at, self.count = name, log, fails_at, 0

    def ask(self, command):
        self.log.append(self.name)
        self.count += 1
        return {"error": "broken"} if self.count == self.fails_at else {"seconds": float(self.count)}


def test_engines_take_turns():
    log = []
    workers = [Stand(name, log) for name in "abc"]
    samples = take_turns(workers, dict.fromkeys("abc", {}), rounds=2, probe=None)
    assert log == list("abc") * 3
    assert samples["a"].seconds == [2.0, 3.0]


def test_an_engine_that_fails_is_left_out_and_the_others_go_on():
    log = []
    samples = take_turns([Stand("a", log, fails_at=2), Stand("b", log)], {"a": {}, "b": {}}, rounds=3, probe=None)
    assert list(samples) == ["b"]
    assert log == ["a", "b", "a", "b", "b", "b"]


def test_the_share_of_the_limit_is_the_median_over_samples():
    samples = Samples([1.0, 2.0, 1.0], [10.0, 10.0, 20.0])
    assert samples.limit_share(5e9) == 0.25


def test_the_table_compares_with_the_best_rival_and_names_the_missing():
    rows = [
        row("batch 1", "fastgpt-plain", 130.0, read_limit_share=0.9),
        row("batch 1", "llama.cpp", 90.0),
        row("batch 1", "ctranslate2", 100.0),
    ]
    what, rival, ours, ratio, share, _, reached = lines_of(rows)[0]
    assert (what, rival, ours, ratio, share, reached) == (
        "float32, batch 1", "ctranslate2 100", "130", "1.30 x", "90%", "yes",
    )  # fmt: skip
    assert "without ctranslate2" in lines_of(rows[:2])[0][1]
    assert lines_of([rows[0]]) == []


def test_prompts_are_compared_by_their_milliseconds():
    # One token a call: the rate has one figure.
    rows = [
        row("prefill 512", "fastgpt", 1.7, ms=586.0, new=1),
        row("prefill 512", "ctranslate2", 1.7, ms=600.0, new=1),
    ]
    assert lines_of(rows)[0][1:4] == ["ctranslate2 600 ms (without llama.cpp, transformers-onednn)", "586 ms", "1.02 x"]


def test_a_target_is_missed_when_the_share_of_the_limit_is():
    rows = [row("batch 1", "fastgpt-plain", 130.0, read_limit_share=0.7), row("batch 1", "ctranslate2", 100.0)]
    assert lines_of(rows)[0][-1] == "no"


def test_every_name_in_the_table_is_an_engine_and_a_case():
    cases = {case.name for case in CASES} | {"sample in training"}
    for target in TARGETS:
        assert {target.ours, *target.rivals} <= set(NAMES)
        assert target.case in cases
    assert set(EXACT) <= set(NAMES) and {name for name, _ in FEWER} <= set(NAMES)


def test_all_engines_get_the_same_prompts():
    for case in CASES:
        prompts = prompts_of(case, "fastgpt")
        assert prompts == prompts_of(case, "llama.cpp")
        assert {len(row) for row in prompts} == {case.prompt} and len(prompts) == case.batch

"""benchmarks.gpu: the harness that a GPU will meet, run dry on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.gpu.__main__ import run_section
from benchmarks.gpu.bench import Bench, gate
from benchmarks.gpu.sections import RUNNERS
from benchmarks.gpu.table import summary


@pytest.fixture
def bench(tmp_path):
    with Bench(tmp_path / "rows.jsonl", "test", 60.0, dry_run=True) as bench:
        yield bench


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("section", ["fused", "loss", "attention"])
def test_a_section_passes_its_gates_and_writes_a_row_for_ours_and_for_pytorch(section, bench, tmp_path, one_thread):
    RUNNERS[section](bench)
    assert not bench.failures
    cases = {}
    for row in rows(tmp_path):
        cases.setdefault(row["case"], set()).add(row["provider"])
    assert cases and all("fastgpt cpu" in providers and len(providers) >= 2 for providers in cases.values())


def test_a_case_that_fails_is_written_down_and_the_next_goes_on(bench, tmp_path):
    def fails():
        raise ValueError("no such kernel")

    bench.attempt("first", fails)
    bench.attempt("second", lambda: bench.write(case="second", provider="triton", ms=1.0, rate=2.0, unit="GB/s"))
    first, second = rows(tmp_path)
    assert "no such kernel" in first["error"] and second["case"] == "second"
    assert bench.failures == ["first"]


def test_a_cuda_error_ends_the_section(bench):
    def fails():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench.attempt("first", fails)


def test_a_section_that_hangs_is_stopped_at_its_limit(tmp_path):
    line = run_section("decode", tmp_path, 0.5, dry_run=True)
    assert "STOPPED" in line


def test_a_section_that_crashes_shows_the_end_of_its_log(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    line = run_section("limits", tmp_path, 60.0, dry_run=True)
    assert "FAILED" in line and "rows.jsonl" in line


def test_the_gate_takes_twice_the_naive_error_and_refuses_nan_and_more():
    truth = torch.randn(100, dtype=torch.float64)
    naive = truth + 0.01
    gate("ok", truth + 0.015, naive, truth)
    with pytest.raises(AssertionError, match="relative error"):
        gate("wrong", truth + 0.1, naive, truth)
    with pytest.raises(AssertionError):
        gate("nan", truth * float("nan"), naive, truth)


def test_the_table_compares_our_best_with_the_best_rival():
    made = [
        {"case": "gelu", "provider": "eager", "ms": 4.0, "rate": 1.0},
        {"case": "gelu", "provider": "compile", "ms": 3.0, "rate": 1.3, "target": "90 % of copy"},
        {"case": "gelu", "provider": "triton", "ms": 2.0, "rate": 2.0, "percent_of_limit": 87.0},
        {"case": "gelu", "provider": "cuda", "ms": 2.5, "rate": 1.6},
        {"case": "loss", "error": "OutOfMemoryError: too large"},
    ]
    lines = summary(made).splitlines()
    assert lines[1].split() == ["gelu", "triton", "2", "compile", "1.3", "1.50", "87%", "90", "%", "of", "copy"]
    assert "too large" in lines[-1]

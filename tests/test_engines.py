"""engines: who computes large products, by the table, by what was asked, by what is remembered, by a race."""

from __future__ import annotations

import json

import pytest
import torch

from fastgpt import timing
from fastgpt.ops import extension
from fastgpt.ops.linear import engines
from fastgpt.ops.linear.products import matmul_into

pytestmark = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))


@pytest.fixture
def file(monkeypatch, tmp_path):
    """An empty cache, and a processor that nobody has measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTGPT_PRODUCTS", raising=False)
    monkeypatch.setattr(engines, "MEASURED", {})
    return tmp_path / "fastgpt" / "products.json"


@pytest.fixture
def races(monkeypatch):
    """The dtypes that were raced; "own" always wins."""
    seen = []
    monkeypatch.setattr(engines, "_race", lambda dtype, product: seen.append(dtype) or "own")
    return seen


def choose(dtype=torch.float32, isa="avx512"):
    return engines.choose(isa, dtype, matmul_into)


def test_a_measured_processor_is_not_raced(monkeypatch, races):
    row = {torch.float32: "torch", torch.bfloat16: "own"}
    monkeypatch.setattr(engines, "MEASURED", {("avx512", extension.load("cpu").cpu_vendor()): row})
    assert choose() == "torch" and choose(torch.bfloat16) == "own"
    assert races == []


def test_what_is_asked_for_is_taken(monkeypatch, file, races):
    monkeypatch.setenv("FASTGPT_PRODUCTS", "own")
    assert choose() == "own" and choose(torch.bfloat16) == "own"
    assert races == [] and not file.exists()
    monkeypatch.setenv("FASTGPT_PRODUCTS", "blas")
    with pytest.raises(ValueError, match="auto, own, torch, onednn"):
        choose()


def test_an_engine_that_cannot_run_gives_way_to_pytorch(monkeypatch, file, races):
    monkeypatch.setenv("FASTGPT_PRODUCTS", "onednn")
    assert choose(torch.bfloat16) == "torch"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose() == "torch" and races == []


def test_a_race_is_run_once_for_each_dtype_and_instruction_set(file, races):
    assert [choose(), choose(), choose(torch.bfloat16), choose(isa="avx2"), choose()] == ["own"] * 5
    assert races == [torch.float32, torch.bfloat16, torch.float32]
    assert len(json.loads(file.read_text())) == 3


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\xff", '{"a": 3}'])
def test_a_damaged_file_is_mended_by_a_race(file, races, content):
    file.parent.mkdir()
    file.write_bytes(content.encode("latin-1"))
    assert choose() == "own" and races == [torch.float32]
    assert choose() == "own" and races == [torch.float32]


def test_an_engine_that_is_none_here_is_not_taken_from_the_file(file, races):
    choose()
    file.write_text(file.read_text().replace('"own"', '"abacus"'))
    assert choose() == "own" and len(races) == 2


def test_a_cache_that_cannot_be_written_does_no_harm(file, races):
    file.parent.parent.joinpath("fastgpt").write_text("a file where the folder should be")
    assert choose() == "own" and choose() == "own"
    assert len(races) == 2


def test_another_engine_must_be_clearly_faster_than_torch():
    assert engines._winner({"torch": 1.0, "own": 0.99, "onednn": 1.2}) == "torch"
    assert engines._winner({"torch": 1.0, "own": 0.9, "onednn": 0.8}) == "onednn"
    assert engines._winner({"own": 0.9}) == "own"


def test_the_fastest_wins_the_race_and_the_slowest_run_one_round(monkeypatch):
    clock, turns = [0.0], {"torch": 0, "own": 0, "onednn": 0}
    seconds = {"torch": 2.0, "own": 1.5, "onednn": 50.0}

    def product(out, a, b, *, by, **epilogue):
        turns[by] += 1
        clock[0] += seconds[by]
        return out

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(engines, "_candidates", lambda dtype: ("torch", "own", "onednn"))
    assert engines._race(torch.float32, product) == "own"
    assert turns["onednn"] == 2 * 3 and turns["own"] == turns["torch"] > 5 * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_race_leaves_the_generator_and_the_mode_alone(monkeypatch, dtype):
    monkeypatch.setattr(engines, "_SIZES", (64, 48, 32))
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert engines._race(dtype, matmul_into) in ("torch", "own", "onednn")
        assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)

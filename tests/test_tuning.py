"""Tiles found by timing: the search, with a clock that is made up, the file, and what the kernels take from it."""

from __future__ import annotations

import json

import pytest

from fastgpt import cli, tuning

TILES = [(m, n, 4, stages) for m in (32, 64, 128) for n in (32, 64) for stages in (1, 2)]
KEY = ("forward", "sm_90", 16, 64, False)


def clock(tile, rounds):
    return abs(tile[0] - 64) + tile[1] + tile[3] + 1 / rounds


def test_the_search_finds_the_fastest():
    assert tuning.search(TILES, clock) == ((64, 32, 4, 1), pytest.approx(33 + 1 / 81))


def test_the_search_times_fewer_candidates_longer():
    seen = []
    tuning.search(TILES, lambda tile, rounds: seen.append(rounds) or clock(tile, rounds))
    assert [seen.count(rounds) for rounds in (3, 9, 27, 81)] == [12, 4, 2, 1]


def test_a_lucky_first_pass_does_not_win():
    lucky = (128, 64, 4, 2)
    best, _ = tuning.search(TILES, lambda tile, rounds: 0 if tile == lucky and rounds == 3 else clock(tile, rounds))
    assert best == (64, 32, 4, 1)


def test_candidates_that_do_not_fit_are_left_out():
    def fits(tile, rounds):
        if tile[0] == 64:
            raise MemoryError
        return clock(tile, rounds)

    assert tuning.search(TILES, fits, unusable=(MemoryError,))[0] == (32, 32, 4, 1)
    with pytest.raises(ValueError, match="no candidate runs on this device"):
        tuning.search([(64, 32, 4, 1)], fits, unusable=(MemoryError,))


def test_another_error_of_a_candidate_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        tuning.search(TILES, lambda tile, rounds: 1 / 0, unusable=(MemoryError,))


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv("FASTGPT_TILES", str(path))
    tuning._tiles.cache_clear()
    yield path
    tuning._tiles.cache_clear()


def test_what_is_written_is_taken_and_the_rest_stays(file):
    assert tuning.lookup(*KEY) is None
    tuning.write(file, {tuning.key(*KEY): (32, 32, 4, 2)})
    tuning.write(file, {"another sm_90 16 64 plain": (16, 16, 4, 1)})
    assert tuning.lookup(*KEY) == (32, 32, 4, 2) and len(tuning.read(file)) == 2


def test_the_attention_kernels_take_the_tile_that_was_found(file):
    tables = pytest.importorskip("fastgpt.kernels.triton.attention_tables", exc_type=ImportError)
    before = tables.choose(tables.FORWARD, *KEY[1:])
    tuning.write(file, {tuning.key(*KEY): (32, 32, 4, 2)})
    assert tables.choose(tables.FORWARD, *KEY[1:]) == (32, 32, 4, 2) != before
    assert tables.choose(tables.BACKWARD_DQ, *KEY[1:]) == tables.BACKWARD_DQ["any", 16, 64]


def test_a_forced_tile_goes_before_the_file_for_its_kernel_alone(file):
    tuning.write(file, {tuning.key(*KEY): (32, 32, 4, 2)})
    with tuning.force("forward", (128, 128, 8, 1)):
        assert tuning.lookup(*KEY) == (128, 128, 8, 1)
        assert tuning.lookup("backward_dq", *KEY[1:]) is None
    assert tuning.lookup(*KEY) == (32, 32, 4, 2)


def test_a_file_of_another_version_of_triton_counts_for_nothing(file):
    tuning.write(file, {tuning.key(*KEY): (32, 32, 4, 2)})
    file.write_text(file.read_text().replace(f'"{tuning.triton_version()}"', '"0.1"'))
    assert tuning.read(file) == {}


@pytest.mark.parametrize("content", ["[]", "{", '{"triton": "1"}', *(
    json.dumps({"triton": "1", "tiles": {"a": tile}})
    for tile in ([1, 2], [24, 32, 4, 1], [32, 32, 4, 99], [8, 32, 4, 1], [512, 32, 4, 1], ["32", 32, 4, 1], 7)
)])  # fmt: skip
def test_a_file_that_is_no_table_is_refused_with_what_to_do(file, content):
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(ValueError, match=r"is no table of tiles .*; delete it, or write it anew"):
        tuning.read(file)


def test_without_a_gpu_tuning_says_so_in_one_sentence(file, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["bench", "--tune"]) == 1
    assert capsys.readouterr().out == "Nothing to tune: torch sees no CUDA device here.\n"


def test_the_bench_times_every_op_on_each_backend_that_runs(monkeypatch, capsys):
    from fastgpt import timing

    ran = []
    monkeypatch.setattr(
        timing,
        "race",
        lambda providers, **k: ran.append(set(providers)) or {n: timing.Timing(1, 1, 1, 1) for n in providers},
    )
    assert cli.main(["bench", "--device", "cpu"]) == 0
    assert len(ran) == 6 and all("torch" in names for names in ran)
    assert "linear_cross_entropy (512, 50257)" in capsys.readouterr().out

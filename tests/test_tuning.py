"""Tiles found by timing: the search, with a clock that is made up, the file, and what the kernels take from it."""

from __future__ import annotations

import json

import pytest

from fastgpt import cli, tuning
from fastgpt.tuning import AttentionTile, RowTile

TILES = [AttentionTile(m, n, 4, stages) for m in (32, 64, 128) for n in (32, 64) for stages in (1, 2)]
KEY = ("attention_forward", "sm_90", 16, 64, False)
FOUND = AttentionTile(32, 32, 4, 2)


def clock(tile, rounds):
    return abs(tile[0] - 64) + tile[1] + tile[3] + 1 / rounds


def test_the_search_finds_the_fastest():
    assert tuning.search(TILES, clock) == (AttentionTile(64, 32, 4, 1), pytest.approx(33 + 1 / 81))


def test_the_search_times_fewer_candidates_longer():
    seen = []
    tuning.search(TILES, lambda tile, rounds: seen.append(rounds) or clock(tile, rounds))
    assert [seen.count(rounds) for rounds in (3, 9, 27, 81)] == [12, 4, 2, 1]


def test_a_lucky_first_pass_does_not_win():
    lucky = AttentionTile(128, 64, 4, 2)
    best, _ = tuning.search(TILES, lambda tile, rounds: 0 if tile == lucky and rounds == 3 else clock(tile, rounds))
    assert best == AttentionTile(64, 32, 4, 1)


def test_candidates_that_do_not_fit_are_left_out():
    def fits(tile, rounds):
        if tile[0] == 64:
            raise MemoryError
        return clock(tile, rounds)

    assert tuning.search(TILES, fits, unusable=(MemoryError,))[0] == AttentionTile(32, 32, 4, 1)
    with pytest.raises(ValueError, match="no candidate runs on this device"):
        tuning.search([AttentionTile(64, 32, 4, 1)], fits, unusable=(MemoryError,))


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


def choose(kernel=KEY[0], dropout=False):
    tables = pytest.importorskip("fastgpt.kernels.triton.attention_tables", exc_type=ImportError)
    return tables.choose(kernel, *KEY[1:4], dropout)


def test_what_is_written_is_taken_and_the_rest_stays(file):
    before, norm = choose(), "layer_norm_forward sm_90 16 1024 plain"
    tuning.write(file, {tuning.key(*KEY): FOUND})
    tuning.write(file, {norm: RowTile(2, 0, 8)})
    assert choose() == FOUND != before and choose(dropout=True) != FOUND
    assert tuning.read(file) == {tuning.key(*KEY): FOUND, norm: RowTile(2, 0, 8)}


def test_a_forced_tile_goes_before_the_file_for_its_kernel_alone(file):
    tuning.write(file, {tuning.key(*KEY): FOUND})
    other = choose("attention_backward_dq")
    with tuning.force("attention_forward", AttentionTile(128, 128, 8, 1)):
        assert choose() == AttentionTile(128, 128, 8, 1)
        assert choose("attention_backward_dq") == other
    assert choose() == FOUND


def test_the_nearest_row_is_of_this_chip_and_triton_then_of_this_chip_then_of_any(monkeypatch):
    monkeypatch.setattr(tuning, "triton_version", lambda: "3.9.1")
    rows = [("sm_90@3.9", 16, 64), ("sm_90", 16, 64, "dropout"), ("sm_90", 0, 64), ("any", 16, 0), ("any", 0, 0)]
    table = {row: RowTile(1 << place, 0, 4) for place, row in enumerate(rows)}

    def place(*case):
        return tuning.nearest(table, *case).rows.bit_length() - 1

    assert place("sm_90", 16, 64, True) == 0
    monkeypatch.setattr(tuning, "triton_version", lambda: "3.6.0")
    assert place("sm_90", 16, 64, True) == 1 and place("sm_90", 16, 64, False) == 2
    assert place("sm_90", 16, 32, False) == 3 and place("sm_80", 32, 64, True) == 4


def test_every_kernel_has_a_tile_for_every_width_that_it_takes(file):
    pytest.importorskip("triton")
    from fastgpt.kernels.triton import attention_tables, row_tables

    names, kinds = attention_tables.TABLES | row_tables.TABLES, set()
    assert set(names) == set(tuning.KERNELS)
    for kernel, table in names.items():
        attention = kernel in attention_tables.TABLES
        for width in (16, 32, 64, 128, 256) if attention else (16, 64, 1024, 2048, 16384):
            for chip, bits, dropout in (("sm_80", 16, False), ("sm_90", 32, True), ("interpreter", 32, False)):
                tile = tuning.choose(kernel, table, chip, bits, width, dropout)
                # What the tables say must be what a file may say.
                assert tuning.checked(tuning.key(kernel, chip, bits, width, dropout), tile) == tile
                kinds.add(type(tile))
    assert kinds == {AttentionTile, RowTile}


def test_no_table_reads_by_tma_before_a_gpu_has_timed_it():
    tables = pytest.importorskip("fastgpt.kernels.triton.attention_tables", exc_type=ImportError)
    assert not any(tile.tma for table in tables.TABLES.values() for tile in table.values())


def test_a_file_of_another_version_of_triton_counts_for_nothing(file):
    tuning.write(file, {tuning.key(*KEY): FOUND})
    file.write_text(file.read_text().replace(f'"{tuning.triton_version()}"', '"0.1"'))
    assert tuning.read(file) == {}


NAME = tuning.key(*KEY)
GOOD = [32, 32, 4, 1, 0]


@pytest.mark.parametrize(
    ("tiles", "text"),
    [
        ({NAME: [1, 2]}, "has 2 values, wanted block_m"),
        ({NAME: [24, 32, 4, 1, 0]}, "block_m of .* is 24, wanted one of 16, 32"),
        ({NAME: [32, 8, 4, 1, 0]}, "block_n"),
        ({NAME: [32, 512, 4, 1, 0]}, "block_n"),
        ({NAME: [32, 32, 64, 1, 0]}, "num_warps"),
        ({NAME: [32, 32, 4, 99, 0]}, "num_stages"),
        ({NAME: [32, 32, 4, 1, 2]}, "tma"),
        ({NAME: ["32", 32, 4, 1, 0]}, "is '32'"),
        ({NAME: [True, 32, 4, 1, 0]}, "is True"),
        ({NAME: 7}, "not iterable"),
        ({"another sm_90 16 64 plain": GOOD}, "names no kernel"),
        ({"attention_forward sm_90 16 plain": GOOD}, "names no kernel"),
        ({"attention_forward sm_90 16 64 wet": GOOD}, "plain or dropout"),
        ({"gelu_forward sm_90 16 16 plain": [1, 1000, 4, 0]}, "columns of"),
        ([], "items"),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_is_refused_with_what_to_do(file, tiles, text):
    file.parent.mkdir()
    file.write_text(json.dumps({"triton": tuning.triton_version(), "tiles": tiles}))
    with pytest.raises(ValueError, match=rf"is no table of tiles \(.*{text}.*\); delete it, or write it anew"):
        tuning.read(file)


@pytest.mark.parametrize("content", ["[]", "{", '{"triton": "1"}', '{"tiles": {}}'])
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

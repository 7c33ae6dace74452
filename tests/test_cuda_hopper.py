"""The arithmetic of the sm_90a kernels, and what the emulator of TMA, mbarrier and wgmma catches."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_emulation import HOST, compiled

EXCHANGES, READ_BEFORE, WRITTEN_BEFORE, ORDERED_BACKWARDS = range(4)
LEFTS, LEFT_CHANGED, BYTES_NOT_THERE, BYTES_MISALIGNED, NO_BEGIN, NO_COMMIT = range(6)
NONE, NOT_THERE, OVERWRITTEN, READ_EARLY, TOO_MANY_BYTES, TOO_MANY_ARRIVALS, NO_INIT, UNEVEN_TURN = range(8)


@pytest.fixture(scope="module")
def library():
    library = ctypes.CDLL(str(compiled([HOST / "hopper_faults.cu", HOST / "controls.cpp"])))
    library.run_product.restype = library.run_exchange.restype = library.run_left.restype = ctypes.c_char_p
    library.run_rows_descriptor.restype = library.run_columns_descriptor.restype = ctypes.c_uint64
    library.run_tile_of_round.restype = library.run_swizzled.restype = ctypes.c_uint32
    return library


@pytest.fixture
def product(library):
    def run(fault, seed=0):
        library.fastgpt_emulator_seed(ctypes.c_uint64(seed))
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(n, 64, generator=generator).half() for n in (64, 128))
        out = torch.zeros(64, 128)
        error = library.run_product(*(ctypes.c_void_p(x.data_ptr()) for x in (out, a, b)), fault)
        return out, a.float() @ b.float().T, error.decode() if error else None

    return run


def test_a_correct_product_is_the_product(product):
    for seed in range(8):
        out, want, error = product(NONE, seed)
        assert error is None
        torch.testing.assert_close(out, want)


def test_accumulators_read_before_the_wait_are_nan(product):
    assert product(READ_EARLY)[0].isnan().any()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (NOT_THERE, "changed while the product was under way"),
        (OVERWRITTEN, "changed while the product was under way"),
        (TOO_MANY_BYTES, "wait for each other for ever"),
        (TOO_MANY_ARRIVALS, "more threads arrive"),
        (NO_INIT, "was not initialised"),
        (UNEVEN_TURN, "half full"),
    ],
)
def test_a_fault_is_named(product, fault, message):
    # In some orders a copy has ended by chance before it is read.
    errors = [product(fault, seed)[2] for seed in range(8)]
    assert any(error is not None and message in error for error in errors)


def exchange(library, fault, seed):
    library.fastgpt_emulator_seed(ctypes.c_uint64(seed))
    out = torch.zeros(128, dtype=torch.int32)
    error = library.run_exchange(ctypes.c_void_p(out.data_ptr()), fault)
    return out, error.decode() if error else None


def test_words_handed_over_between_barriers_arrive(library):
    t = torch.arange(128, dtype=torch.int32)
    want = 2 * ((t + 40) % 128) + 1 + 1000 * (t < 32)
    for seed in range(4):
        out, error = exchange(library, EXCHANGES, seed)
        assert error is None
        torch.testing.assert_close(out, want.int())


@pytest.mark.parametrize("fault", [READ_BEFORE, WRITTEN_BEFORE, ORDERED_BACKWARDS])
def test_words_handed_over_without_a_barrier_are_a_race_in_every_order(library, fault):
    for seed in range(8):
        error = exchange(library, fault, seed)[1]
        # Where the reader happens to come first, its second round finds the race.
        assert error is not None and "without a barrier between" in error


@pytest.fixture
def left(library):
    def run(fault, seed=0):
        library.fastgpt_emulator_seed(ctypes.c_uint64(seed))
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(64, n, generator=generator).half() for n in (16, 64))
        shift, out = torch.randn(68, generator=generator), torch.zeros(64, 64)
        error = library.run_left(*(ctypes.c_void_p(x.data_ptr()) for x in (out, a, b, shift)), fault)
        return out, a.float() @ b[:, :16].float().T + shift[:64], error.decode() if error else None

    return run


def test_a_product_from_registers_and_copied_bytes_are_right(left):
    for seed in range(4):
        out, want, error = left(LEFTS, seed)
        assert error is None
        torch.testing.assert_close(out, want)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (LEFT_CHANGED, "changed while the product was under way"),
        (BYTES_MISALIGNED, "not aligned to 16"),
        (NO_BEGIN, "without products_begin"),
        (NO_COMMIT, "products that it did not wait for"),
    ],
)
def test_a_fault_around_a_product_from_registers_is_named(left, fault, message):
    assert message in left(fault)[2]


def test_bytes_read_before_they_are_there_are_nan(left):
    assert any(left(BYTES_NOT_THERE, seed)[0].isnan().any() for seed in range(8))


def test_the_swizzle_puts_eight_rows_in_eight_groups_of_banks(library):
    for chunk in range(8):
        assert {library.run_swizzled(row * 128 + chunk * 16) % 128 for row in range(8)} == set(range(0, 128, 16))


def test_descriptors_hold_address_offsets_and_swizzle(library):
    # Columns 80 .. 95 of a tile of 192 rows: in the second panel, the second step of 32 bytes.
    word = library.run_rows_descriptor(0x8400, 192, 5)
    assert (word & 0x3FFF) * 16 == 0x8400 + 192 * 128 + 32
    assert (word >> 32 & 0x3FFF) * 16 == 1024 and word >> 62 == 1
    # Rows 48 .. 63 of a tile of 128 rows, all columns: panels lie 128 rows apart.
    word = library.run_columns_descriptor(0x8400, 128, 3)
    assert (word & 0x3FFF) * 16 == 0x8400 + 48 * 128
    assert (word >> 16 & 0x3FFF) * 16 == 128 * 128 and (word >> 32 & 0x3FFF) * 16 == 1024 and word >> 62 == 1


@pytest.mark.parametrize(("tiles", "blocks"), [(1, 1), (5, 3), (132, 132), (1000, 132), (7, 4)])
def test_every_tile_is_taken_once(library, tiles, blocks):
    taken = []
    for block in range(blocks):
        round_ = 0
        while (tile := library.run_tile_of_round(round_, block, blocks)) < tiles:
            taken.append(tile)
            round_ += 1
    assert sorted(taken) == list(range(tiles))


def test_to_and_fro_balances_the_blocks(library):
    # 12 heads of 86 tiles, tile i of which sees i + 1 blocks, on 132 blocks.
    heads, rows, blocks = 12 * 8, 86, 132
    loads = []
    for block in range(blocks):
        load, round_ = 0, 0
        while (tile := library.run_tile_of_round(round_, block, blocks)) < heads * rows:
            load += rows - tile // heads
            round_ += 1
        loads.append(load)
    assert max(loads) <= 1.02 * sum(loads) / blocks


def test_blocks_of_keys_are_split_where_the_diagonal_begins_and_ends(library):
    out = (ctypes.c_int * 2)()
    for q_len, k_len in [(1, 1), (200, 200), (65, 300), (128, 128)]:
        for first in range(0, 256, 64):
            library.run_key_blocks(out, first, 64, 128, q_len, k_len)
            rows = range(first, min(first + 64, q_len))
            seen = [row + k_len - q_len + 1 for row in rows]
            assert out[1] == (-(-max(seen) // 128) if seen else 0)
            assert out[0] == (min(seen) // 128 if seen else 0)


def test_blocks_of_queries_are_split_where_the_diagonal_begins_and_ends(library):
    out = (ctypes.c_int * 3)()
    for q_len, k_len in [(1, 1), (200, 200), (65, 300), (128, 128), (3, 200), (64, 130)]:
        blocks = [range(i, min(i + 64, q_len)) for i in range(0, q_len, 64)]
        for first in range(0, 320, 64):
            library.run_query_blocks(out, first, 64, 64, q_len, k_len)
            begin, split, end = out
            assert end == len(blocks)
            if first >= k_len:
                assert begin == split == end
                continue
            sees = [[i + k_len - q_len - key for i in block for key in (first, first + 63)] for block in blocks]
            assert begin == next(i for i, block in enumerate(sees) if max(block) >= 0)
            assert split == next((i for i, block in enumerate(sees) if min(block) >= 0), end)


def test_a_ring_flips_its_phase_each_time_round(library):
    out = (ctypes.c_int * 2)()
    for uses in range(10):
        library.run_pipeline(out, uses)
        assert tuple(out) == (uses % 3, uses // 3 % 2)

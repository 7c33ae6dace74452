"""The dropout mask: Philox against its published answers, and the way its bits are dealt to the elements."""

from __future__ import annotations

import pytest
import torch

from fastgpt.ops import philox


def words(counter, key):
    drawn = philox.philox(tuple(torch.tensor([c]) for c in counter), key[1] << 32 | key[0])
    return tuple(int(word) for word in drawn)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert words(counter, key) == answer


@pytest.mark.parametrize(("b", "h", "i", "j"), [(0, 0, 0, 0), (1, 2, 7, 63), (0, 1, 69, 64), (1, 0, 5, 150)])
def test_every_element_has_its_own_sixteen_bits(b, h, i, j):
    seed, n_heads, dropout_p = 0x123456789ABCDEF, 3, 0.4
    block, slot, column = j // 64, j % 64 // 8, j % 8
    drawn = words((block * 8 + column, i, b * n_heads + h, 0), (seed & 0xFFFFFFFF, seed >> 32))
    number = drawn[slot // 2] >> 16 * (slot % 2) & 0xFFFF
    keep = philox.keep_mask(2, n_heads, 70, 160, dropout_p, seed)
    assert bool(keep[b, h, i, j]) == (number >= philox.threshold(dropout_p))


def test_the_mask_of_an_element_depends_on_no_length():
    small = philox.keep_mask(2, 3, 10, 70, 0.5, seed=9)
    large = philox.keep_mask(2, 3, 20, 200, 0.5, seed=9)
    assert torch.equal(small, large[:, :, :10, :70])


def test_rows_past_32_bits_count_on_in_the_third_word():
    seed, row = 0x123456789ABCDEF, (5 << 32) + 7
    keep = philox.keep_rows(2, 70, 0.4, seed, first_row=row)
    drawn = words((8 + 66 % 8, 8, 5, 0), (seed & 0xFFFFFFFF, seed >> 32))
    assert bool(keep[1, 66]) == (drawn[0] & 0xFFFF >= philox.threshold(0.4))


def test_rows_take_the_numbers_of_the_first_head():
    assert torch.equal(philox.keep_rows(10, 70, 0.5, seed=9), philox.keep_mask(1, 1, 10, 70, 0.5, seed=9)[0, 0])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_mask_drops_the_fraction_it_is_asked_for(dropout_p):
    keep = philox.keep_mask(2, 4, 128, 256, dropout_p, seed=3).double()
    # Five standard deviations of the mean of so many draws.
    spread = 5 * (dropout_p * (1 - dropout_p) / keep.numel()) ** 0.5
    assert abs(1 - keep.mean().item() - dropout_p) <= spread


def test_rows_columns_and_heads_are_not_correlated():
    keep = philox.keep_mask(2, 2, 128, 128, 0.5, seed=4).double() - 0.5
    for axis, size in ((0, 2), (1, 2), (2, 128), (3, 128)):
        for step in {1, size // 2}:
            product = (keep * keep.roll(step, axis)).mean().item() * 4
            assert abs(product) < 5 / keep.numel() ** 0.5, (axis, step, product)


def test_scale_makes_up_for_what_is_dropped():
    for dropout_p in (0.0, 0.1, 0.5, 0.999):
        kept = 1 - philox.threshold(dropout_p) / 65536
        assert philox.scale(dropout_p) == pytest.approx(1 / kept, rel=1e-12)
    assert philox.scale(1.0) == 0.0


def test_seeds_follow_torch_manual_seed():
    torch.manual_seed(5)
    first, second = philox.draw_seed(), philox.draw_seed()
    torch.manual_seed(5)
    assert philox.draw_seed() == first != second
    assert 0 <= first < 2**63


def test_seeds_and_masks_stay_on_the_cpu_whatever_the_default_device():
    torch.manual_seed(5)
    seed, mask = philox.draw_seed(), philox.keep_mask(1, 2, 5, 7, 0.5, seed=3)
    torch.manual_seed(5)
    with torch.device("meta"):
        assert philox.draw_seed() == seed
        assert torch.equal(philox.keep_mask(1, 2, 5, 7, 0.5, seed=3), mask)
        assert torch.equal(philox.keep_rows(5, 7, 0.5, seed=3), mask[0, 0])

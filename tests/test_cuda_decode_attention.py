"""Attention over a cache in CUDA C++, in the emulator of a thread block: ragged rows, parts of the length, dtypes."""

from __future__ import annotations

import importlib

import pytest
import torch
from cuda_emulation import as_cuda_backend, emulate

from fastgpt import ops
from fastgpt.testing import assert_within_bound

ROOM = importlib.import_module("fastgpt.ops.decode_attention")


@pytest.fixture(scope="module")
def emulated():
    emulated = emulate()
    with as_cuda_backend(emulated, ROOM.OP):
        yield emulated


def draw(lengths, n_heads, max_len, head_dim, dtype):
    """q, keys and values; NaN behind each row's length."""
    generator = torch.Generator().manual_seed(max_len)
    q = torch.randn(len(lengths), n_heads, head_dim, generator=generator).to(dtype)
    caches = torch.randn(2, len(lengths), n_heads, max_len, head_dim, generator=generator).to(dtype)
    for row, length in enumerate(lengths):
        caches[:, row, :, length:] = torch.nan
    return q, *caches, torch.tensor(lengths, dtype=torch.int64)


def check(q, k, v, lengths, scale=None):
    got = ops.decode_attention(q, k, v, lengths, softmax_scale=scale, backend="cuda")
    naive = ops.decode_attention(q, k, v, lengths, softmax_scale=scale, backend="reference")
    truth = ops.decode_attention(q.double(), k.double(), v.double(), lengths, softmax_scale=scale, backend="reference")
    assert_within_bound(got, naive, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 256])
def test_ragged_rows_are_within_the_bound(emulated, head_dim, dtype):
    emulated.order(head_dim)
    check(*draw([1, 2, 63, 64, 65, 200], 2, 200, head_dim, dtype))


@pytest.mark.parametrize("length", [1, 31, 129, 700])
def test_one_row_is_cut_into_parts(emulated, length):
    check(*draw([length], 1, 700, 64, torch.bfloat16))


def test_any_scale_and_extreme_scores_are_within_the_bound(emulated):
    q, k, v, lengths = draw([40, 7], 2, 64, 64, torch.float32)
    check(q, k, v, lengths, scale=0.7)
    check(q * 1e3, k, v, lengths)


def test_a_cache_that_is_a_view_is_read_in_place(emulated):
    backend = ROOM.OP.module("cuda")
    q, k, v, lengths = draw([9, 30], 2, 40, 64, torch.bfloat16)
    packed = torch.stack((k, v), dim=3)
    views = packed[..., 0, :], packed[..., 1, :]
    assert all(backend._pieces(x) is x for x in views)
    check(q, *views, lengths)


def test_no_rows_give_no_rows(emulated):
    q, k, v, lengths = draw([], 2, 8, 64, torch.bfloat16)
    assert ops.decode_attention(q, k, v, lengths, backend="cuda").shape == (0, 2, 64)


@pytest.mark.parametrize(("heads", "max_len", "parts"), [(12, 1024, 16), (768, 1024, 1), (1, 10, 1), (12, 0, 1)])
def test_few_heads_are_cut_into_more_parts(heads, max_len, parts):
    assert ROOM.OP.module("cuda").split_count(heads, max_len) == parts

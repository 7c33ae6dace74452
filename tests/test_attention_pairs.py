"""causal_attention on pairs of bfloat16, as the CPU kernel runs where the processor has vdpbf16ps.

tests/test_attention.py runs it there. Here two multiply-adds stand in for the instruction, so that everything around it
is tested on any processor: packing, tiles of 64 queries, odd lengths, dropout, threads.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p

import pytest
import torch
from cuda_emulation import ROOT, compiled
from test_attention import check, cpu_only, inputs, on_threads, run

from fastgpt import ops
from fastgpt.ops import extension
from fastgpt.ops.attention import backend_cpu

pytestmark = cpu_only
FLAGS = ["-fopenmp", "-ffp-contract=fast", "-DFASTGPT_ISA=pairs", "-DFASTGPT_PAIRS", "-DFASTGPT_LANES=16"]
SOURCE = ROOT / "tests" / "cpu_host" / "attention_pairs.cpp"


# As kernels/cpu/table.h has them.
class Heads(Structure):
    _fields_ = [("data", c_void_p), ("strides", c_int64 * 3)]


OPTIONS = [("sizes", c_int64 * 5), ("softmax_scale", c_float), ("seed", c_uint64), ("dropout_threshold", c_int32),
           ("dtype", c_int), ("num_threads", c_int), ("workspace", POINTER(c_float))]  # fmt: skip


class Forward(Structure):
    _fields_ = [("out", Heads), ("lse", c_void_p), *((name, Heads) for name in "qkv"), *OPTIONS]


class Backward(Structure):
    _fields_ = [
        *((name, Heads) for name in ("dq", "dk", "dv", "dout", "q", "k", "v", "out")),
        ("lse", c_void_p),
        *OPTIONS,
    ]


class Pairs:
    """Stands in for fastgpt._cpu: the same functions, for bfloat16 alone."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.calls = 0

    def attention_forward(self, *args):
        self._run("forward", Forward, args)

    def attention_backward(self, *args):
        self._run("backward", Backward, args)

    def _run(self, name, structure, args):
        *tensors, sizes, scale, seed, threshold, dtype, threads = args
        packed = structure(
            sizes=sizes, softmax_scale=scale, seed=seed, dropout_threshold=threshold, num_threads=threads
        )
        assert dtype == extension.DTYPE_CODES[torch.bfloat16]
        values = iter(tensors)
        for field, kind in structure._fields_[: -len(OPTIONS)]:
            address = next(values)
            setattr(packed, field, Heads(address, next(values)[:3]) if kind is Heads else address)
        count = getattr(self._library, f"{name}_floats")
        count.restype = c_int64
        workspace = torch.full((count(byref(packed)) + 16,), torch.nan)
        packed.workspace = ctypes.cast(-(-workspace.data_ptr() // 64) * 64, POINTER(c_float))
        getattr(self._library, name)(byref(packed))
        self.calls += 1


@pytest.fixture(scope="module")
def library():
    instructions = ["-mavx2", "-mfma"] if "avx2" in extension.load("cpu").available_isas() else []
    return ctypes.CDLL(str(compiled([SOURCE], [*FLAGS, *instructions], kernels="cpu")))


@pytest.fixture(autouse=True)
def pairs(library, monkeypatch):
    kernels = Pairs(library)
    monkeypatch.setattr(backend_cpu, "load", lambda name: kernels)
    yield
    assert kernels.calls > 0


def made(batch, n_heads, q_len, k_len, head_dim):
    return inputs(batch, n_heads, q_len, k_len, head_dim, torch.bfloat16)


@pytest.mark.parametrize("length", [1, 2, 3, 15, 63, 64, 65, 97, 129])
def test_every_length_is_within_the_bound(length):
    check(made(2, 3, length, length, 64), "cpu")


@pytest.mark.parametrize("head_dim", [1, 2, 3, 8, 17, 31, 33, 65, 80, 128, 255, 256])
def test_every_head_dim_is_within_the_bound(head_dim):
    check(made(1, 2, 67, 67, head_dim), "cpu")


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 2), (1, 65), (3, 130), (49, 50), (64, 127), (70, 201), (127, 128)])
def test_fewer_queries_than_keys_see_all_earlier_keys(q_len, k_len):
    check(made(2, 2, q_len, k_len, 24), "cpu")


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.99])
def test_dropout_gives_output_and_gradients_of_the_same_mask(dropout_p):
    check(made(2, 3, 150, 151, 64), "cpu", dropout_p)


def test_equal_scores_give_the_mean_of_the_values_seen_rounded_once():
    """Weights of 1 lose nothing as bfloat16, so that the output alone is rounded."""
    q, k, v = made(1, 2, 130, 130, 32)
    out = ops.causal_attention(torch.zeros_like(q), k, v, backend="cpu")
    mean = v.double().cumsum(2) / torch.arange(1, 131)[:, None]
    torch.testing.assert_close(out.double(), mean, rtol=2**-8, atol=1e-6)


def test_nan_stays_in_the_rows_that_see_it():
    q, k, v = made(1, 2, 130, 130, 64)
    q[0, 0, 40, 3] = torch.nan
    k[0, 1, 77, 5] = torch.nan
    nan = ops.causal_attention(q, k, v, backend="cpu").isnan()
    want = torch.zeros(2, 130, dtype=torch.bool)
    want[0, 40] = want[1, 77:] = True
    assert torch.equal(nan[0], want[:, :, None].expand(2, 130, 64))


def test_later_keys_and_values_change_nothing():
    q, k, v = made(1, 2, 130, 130, 64)
    out = ops.causal_attention(q, k, v, backend="cpu")
    k[:, :, 77:], v[:, :, 77:] = 1e4, -1e4
    assert torch.equal(out[:, :, :77], ops.causal_attention(q, k, v, backend="cpu")[:, :, :77])


def test_views_of_a_packed_projection_are_read_in_place():
    qkv = torch.randn(2, 70, 3, 4, 20).bfloat16()
    views = [qkv[:, :, i].transpose(1, 2) for i in range(3)]
    dout = torch.randn(2, 70, 4, 20).bfloat16().transpose(1, 2)
    for got, want in zip(
        run(views, dout, "cpu"), run([t.contiguous() for t in views], dout.contiguous(), "cpu"), strict=True
    ):
        assert torch.equal(got, want)


def test_two_threads_that_share_a_head_repeat_their_bits():
    tensors = made(1, 1, 300, 310, 64)
    dout = torch.randn_like(tensors[0])
    first, second = (on_threads(2, tensors, dout, "cpu", 0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_number_of_threads_changes_no_bit_where_each_has_whole_heads():
    tensors = made(2, 4, 130, 130, 64)
    dout = torch.randn_like(tensors[0])
    for one, two in zip(*(on_threads(n, tensors, dout, "cpu", 0.1) for n in (1, 2)), strict=True):
        assert torch.equal(one, two)

"""buffers: what the CPU backends write lies in blocks whose holes can be used again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastgpt import memory, ops
from fastgpt.ops import buffers, extension

needs_cpu = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))
BIG = (3, 1 << 18)  # 3 MB of float32


@needs_cpu
@pytest.mark.skipif(memory._glibc() is None, reason="the allocator is not glibc's")
def test_a_hole_serves_the_next_tensor_of_its_size():
    # In a process of its own, whose heap nothing else has filled with holes. torch.empty finds 0 of 20 again.
    code = """
from fastgpt import memory
from fastgpt.ops import buffers
import torch
with memory.kept_memory():
    made = [buffers.empty((1 << 20,), torch.float32) for _ in range(40)]
    holes = {tensor.data_ptr() for tensor in made[::2]}
    made = made[1::2]
    again = [buffers.empty((1 << 20,), torch.float32) for _ in range(20)]
    found = sum(tensor.data_ptr() in holes for tensor in again)
    assert found >= 15, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_a_plain_tensor(dtype):
    with memory.kept_memory():
        tensor = buffers.empty(BIG, dtype)
    assert tensor.shape == BIG and tensor.dtype is dtype and tensor.device.type == "cpu"
    assert tensor.is_contiguous() and not tensor._is_view() and not tensor.requires_grad
    assert tensor.data_ptr() % 64 == 0
    assert tensor.untyped_storage().nbytes() == tensor.numel() * dtype.itemsize


@needs_cpu
def test_a_block_outlives_the_kept_memory():
    with memory.kept_memory():
        blocks = [buffers.empty(BIG, torch.float32).fill_(i) for i in range(8)]
        del blocks[::2]
    others = [torch.full(BIG, -1.0) for _ in range(8)]
    assert [block.unique().tolist() for block in blocks] == [[1.0], [3.0], [5.0], [7.0]]
    assert all((other == -1.0).all() for other in others)


@needs_cpu
def test_views_keep_a_block_alive():
    with memory.kept_memory():
        row = buffers.empty(BIG, torch.float32).fill_(7.0)[1]
        others = [buffers.empty(BIG, torch.float32).fill_(0.0) for _ in range(4)]
    assert (row == 7.0).all() and len(others) == 4


@needs_cpu
def test_only_big_tensors_of_kept_memory_are_blocks():
    def is_block(tensor):
        return not tensor.untyped_storage().resizable()

    with memory.kept_memory():
        assert is_block(buffers.empty(BIG, torch.float32)) == memory.is_kept()
        assert not is_block(buffers.empty((3, 5), torch.float32))
    assert not is_block(buffers.empty(BIG, torch.float32))


@needs_cpu
def test_the_gradient_of_a_weight_is_the_block_itself(monkeypatch):
    places = []

    def empty(*arguments, empty=buffers.empty):
        # Its place alone: whoever held the tensor would keep autograd from taking it over.
        tensor = empty(*arguments)
        places.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(buffers, "empty", empty)
    weight = torch.randn(512, 1024, requires_grad=True)
    with memory.kept_memory():
        ops.linear(torch.randn(64, 1024), weight).sum().backward()
    assert weight.grad.data_ptr() in places


@needs_cpu
def test_sizes_that_no_memory_has_are_refused():
    block = extension.load("cpu").Block
    with pytest.raises(ValueError, match="too large"):
        block(-1)
    with pytest.raises(ValueError, match="too large"):
        block(2**62)
    with pytest.raises(MemoryError):
        block(2**59)


def test_cast_is_to():
    x = torch.randn(300, 2000, requires_grad=True)
    for kept in (x, x.detach(), x.detach()[:, ::2], x.detach().bfloat16(), x.detach()[0, 0]):
        with memory.kept_memory(), torch.no_grad():
            assert torch.equal(buffers.cast(kept, torch.bfloat16), kept.to(torch.bfloat16))
            assert buffers.cast(kept, kept.dtype) is kept

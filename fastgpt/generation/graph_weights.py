"""The weights of a network as the GPU decoder reads them: addresses of live tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.generation.layers import Linear, Norm
from fastgpt.generation.network import Block, FeedForward, Joined, Network, Split
from fastgpt.ops import cuda_support


class NotForGraphs(Exception):
    """The GPU decoder cannot run this network; the text says why."""


class StepWeights:
    """The addresses of a network's weights, in the order of csrc/cuda_decoder.cpp.

    Args:
        network: all of its parts must be plain layers of one dtype on one device.

    Raises:
        NotForGraphs: a part is none that the kernels know.
    """

    def __init__(self, network: Network) -> None:
        dtype, device = network.tok_emb.dtype, network.tok_emb.device
        if dtype not in (torch.float32, torch.bfloat16):
            raise NotForGraphs(f"the kernels take float32 and bfloat16 weights, not {dtype}")
        reason = cuda_support.why_not(device.type, dtype)
        if reason is not None:
            raise NotForGraphs(reason)
        self.network, self.dtype, self.device = network, dtype, device
        self.piece = 16 // dtype.itemsize
        self.width = network.tok_emb.shape[1]
        self.heads = network.n_heads * network.head_dim
        head = _linear(network.head, "the head")
        self.n_logits = head.weight.shape[0]
        if self.n_logits > network.vocab_size:
            raise NotForGraphs("the head can choose tokens that have no embedding")
        self.hidden = _feed_forward(network.blocks[0])[0].weight.shape[0]
        for name, size in (("emb_dim", self.width), ("hidden_dim", self.hidden), ("head_dim", network.head_dim)):
            if size % self.piece:
                raise NotForGraphs(f"{name} must be a multiple of {self.piece}, for loads of 16 bytes; it is {size}")
        self.eps: list[float] = []
        self.layers = [self._layer(block) for block in network.blocks]
        self.ends = (
            *self._norm(network.final_norm),
            *self._matrix(head.weight, head.bias, self.n_logits, self.width),
            self._address(network.tok_emb, network.vocab_size, self.width),
            self._address(network.pos_emb, network.context_length, self.width),
        )

    def _layer(self, block: Block) -> tuple[int, ...]:
        widen, narrow = _feed_forward(block)
        project = _linear(block.project, "the output projection")
        norm1 = self._norm(block.norm1)
        split = [
            a for part in _split(block, self.heads) for a in self._matrix(part[0], part[1], self.heads, self.width)
        ]
        return (
            *norm1,
            *split,
            *self._matrix(project.weight, project.bias, self.width, self.heads),
            *self._norm(block.norm2),
            *self._matrix(widen.weight, widen.bias, self.hidden, self.width),
            *self._matrix(narrow.weight, narrow.bias, self.width, self.hidden),
        )

    def _norm(self, norm: Any) -> tuple[int, int]:
        if not isinstance(norm, Norm):
            raise NotForGraphs("a norm is none that is known")
        self.eps.append(norm.eps)
        return self._address(norm.weight, self.width), self._address(norm.bias, self.width)

    def _matrix(self, weight: Tensor, bias: Tensor | None, n_out: int, n_in: int) -> tuple[int, int]:
        return self._address(weight, n_out, n_in), 0 if bias is None else self._address(bias, n_out)

    def _address(self, tensor: Tensor, *shape: int) -> int:
        if tensor.shape != shape or tensor.dtype != self.dtype or tensor.device != self.device:
            raise NotForGraphs(
                f"a weight is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; wanted is {self.dtype} {shape} "
                f"on {self.device}"
            )
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise NotForGraphs("a weight is not contiguous, or not aligned to 16 bytes")
        return tensor.data_ptr()

    @property
    def key(self) -> tuple[Any, ...]:
        """What a captured graph depends on."""
        return (*self.layers, self.ends, tuple(self.eps), self.dtype, self.device)


def _linear(function: Any, what: str) -> Linear:
    if not isinstance(function, Linear):
        raise NotForGraphs(f"{what} is a {type(function).__name__}, not a plain linear layer")
    return function


def _feed_forward(block: Block) -> tuple[Linear, Linear]:
    part = block.feed_forward
    if not isinstance(part, FeedForward) or part.activate is not ops.gelu:
        raise NotForGraphs("a feed-forward part is none that is known, or its activation is not the book's GELU")
    return _linear(part.widen, "a feed-forward layer"), _linear(part.narrow, "a feed-forward layer")


def _split(block: Block, heads: int) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of query, key and value."""
    split = block.split
    if isinstance(split, Split):
        parts = [_linear(part, "a projection") for part in (split.query, split.key, split.value)]
        return [(part.weight, part.bias) for part in parts]
    assert isinstance(split, Joined)
    joined = _linear(split.layer, "the qkv projection")
    if joined.weight.shape[0] != 3 * heads:
        raise NotForGraphs(f"the qkv projection gives {joined.weight.shape[0]} numbers, not 3 × {heads}")
    biases = [None] * 3 if joined.bias is None else joined.bias.chunk(3)
    return list(zip(joined.weight.chunk(3), biases, strict=True))

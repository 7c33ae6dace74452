"""The weights of a network as the native decoder reads them: addresses of live tensors, or of packed copies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.generation.layers import Linear, Norm
from fastgpt.generation.network import Block, FeedForward, Joined, Network, Split
from fastgpt.ops import extension


class NotNative(Exception):
    """The native decoder cannot run this network; the text says why."""


FORMATS = {torch.float32: 0, torch.bfloat16: 1, "int8": 2, "int4": 3}


@dataclass(frozen=True)
class Packed:
    """A matrix as the decoder reads it: the code of its format, its bytes, and the scales of int8 and int4."""

    format: int
    data: Tensor
    scales: Tensor | None


class Packs:
    """Packed copies of weights; each is made again when its original has changed.

    Changes are seen by address and version counter; edits through `.data` are not, see `clear`.

    Args:
        precision: torch.bfloat16, "int8" or "int4". With "int4" the head, from which the tokens are chosen, has 8 bits.
    """

    def __init__(self, precision: torch.dtype | str) -> None:
        self.precision = precision
        self.lock = threading.Lock()
        self._entries: dict[tuple[Any, ...], tuple[Tensor, int, Any]] = {}
        self._used: set[tuple[Any, ...]] = set()

    def matrix(self, source: Tensor, is_head: bool) -> Packed:
        """`source` (n_out, n_in), packed."""
        precision = "int8" if is_head and self.precision == "int4" else self.precision
        return self._get(source, precision, lambda: _pack(source, FORMATS[precision]))

    def floats(self, source: Tensor) -> Tensor:
        """`source` in float32: itself, or a copy."""
        if source.dtype == torch.float32:
            return source
        return self._get(source, torch.float32, lambda: source.float().contiguous())

    def _get(self, source: Tensor, precision: Any, make: Callable[[], Any]) -> Any:
        key = (source.data_ptr(), source.shape, source.stride(), source.dtype, precision)
        version = 0 if source.is_inference() else source._version
        entry = self._entries.get(key)
        if entry is None or entry[1] != version:
            # The source is kept, so that no other tensor can come to its address.
            entry = (source, version, make())
            self._entries[key] = entry
        self._used.add(key)
        return entry[2]

    def drop_unused(self) -> None:
        """Forget what was not asked for since the last time."""
        self._entries = {key: entry for key, entry in self._entries.items() if key in self._used}
        self._used.clear()

    def clear(self) -> None:
        """Forget all copies, so that they are made again."""
        self._entries.clear()


def _pack(source: Tensor, code: int) -> Packed:
    module = extension.load("cpu")
    weight = source.detach().float().contiguous()
    n_bytes, n_scales = module.decoder_packed_size(*weight.shape, code)
    data = torch.empty(n_bytes, dtype=torch.uint8, device="cpu")
    scales = torch.empty(n_scales, dtype=torch.int16, device="cpu")
    module.decoder_pack(
        data.data_ptr(), scales.data_ptr(), weight.data_ptr(), *weight.shape, code, extension.num_threads()
    )
    return Packed(code, data, scales)


class NativeWeights:
    """A decoder with the weights of a network.

    float32 weights are read where they are, so changes in place are seen at the next token.

    Args:
        network: as read from the model; it is kept, and with it the tensors.
        packs: where given, the matrices are read from packed copies.

    Raises:
        NotNative: a part of the network is none that the decoder knows, or there is no extension.
    """

    def __init__(self, network: Network, packs: Packs | None = None) -> None:
        reason = extension.why_not("cpu")
        if reason is not None:
            raise NotNative(reason)
        self.network = network
        self.packs = packs
        self._kept: list[Any] = []
        head = _linear(network.head, "the head")
        self.n_logits = head.weight.shape[0]
        widths = {_feed_forward(block).widen.weight.shape[0] for block in network.blocks}
        if len(widths) != 1:
            raise NotNative(f"the feed-forward layers have different widths: {sorted(widths)}")
        self.emb_dim = network.tok_emb.shape[1]
        self.hidden_dim = widths.pop()
        self.decoder = extension.load("cpu").Decoder(
            len(network.blocks), self.emb_dim, network.n_heads, network.head_dim, self.hidden_dim,
            network.vocab_size, network.context_length, self.n_logits,
        )  # fmt: skip
        if packs is None:
            self._fill()
        else:
            with packs.lock:
                self._fill()
                packs.drop_unused()

    def screenable_head(self) -> Tensor | None:
        """The head's weight, when the screened head (fast_head) can stand for it: float32, without a bias."""
        head = _linear(self.network.head, "the head")
        return head.weight if self.packs is None and head.bias is None else None

    def state(self) -> list[Any] | None:
        """What differs once a weight has changed; None when changes cannot be seen."""
        parts: list[Any] = [self.network.n_heads]
        for part in self._kept:
            if isinstance(part, Packed):
                parts.append(id(part))
            elif part.is_inference():
                return None
            else:
                parts.append((part.data_ptr(), part.shape, part._version))
        return parts

    def _fill(self) -> None:
        network = self.network
        heads = network.n_heads * network.head_dim
        self.decoder.set_embeddings(
            self._address(network.tok_emb, network.vocab_size, self.emb_dim),
            self._address(network.pos_emb, network.context_length, self.emb_dim),
        )
        for number, block in enumerate(network.blocks):
            self._set_norm(2 * number, block.norm1)
            self._set_norm(2 * number + 1, block.norm2)
            for i, (weight, bias) in enumerate(_split(block, heads)):
                self._set_matrix(6 * number + i, weight, bias, heads, self.emb_dim)
            feed_forward, project = _feed_forward(block), _linear(block.project, "the output projection")
            for i, part, n_out, n_in in (
                (3, project, self.emb_dim, heads),
                (4, feed_forward.widen, self.hidden_dim, self.emb_dim),
                (5, feed_forward.narrow, self.emb_dim, self.hidden_dim),
            ):
                self._set_matrix(6 * number + i, part.weight, part.bias, n_out, n_in)
        self._set_norm(2 * len(network.blocks), network.final_norm)
        head = _linear(network.head, "the head")
        self._set_matrix(6 * len(network.blocks), head.weight, head.bias, self.n_logits, self.emb_dim)

    def _set_norm(self, index: int, norm: Any) -> None:
        if not isinstance(norm, Norm):
            raise NotNative("a norm is none that is known")
        weight, bias = self._address(norm.weight, self.emb_dim), self._address(norm.bias, self.emb_dim)
        self.decoder.set_norm(index, weight, bias, norm.eps)

    def _set_matrix(self, index: int, weight: Tensor, bias: Tensor | None, n_out: int, n_in: int) -> None:
        bias_address = 0 if bias is None else self._address(bias, n_out)
        if self.packs is None:
            self.decoder.set_matrix(index, 0, self._address(weight, n_out, n_in), 0, bias_address)
            return
        _check(weight, n_out, n_in)
        packed = self.packs.matrix(weight, index == 6 * len(self.network.blocks))
        self._kept.append(packed)
        scales = 0 if packed.scales is None else packed.scales.data_ptr()
        self.decoder.set_matrix(index, packed.format, packed.data.data_ptr(), scales, bias_address)

    def _address(self, tensor: Tensor, *shape: int) -> int:
        """The address of a tensor that the decoder may read; it is kept alive."""
        _check(tensor, *shape)
        if self.packs is not None:
            tensor = self.packs.floats(tensor)
        if tensor.dtype != torch.float32:
            raise NotNative(f"the weights are {tensor.dtype}, not torch.float32")
        if not tensor.is_contiguous():
            raise NotNative("a weight is not contiguous")
        self._kept.append(tensor)
        return tensor.data_ptr()


def _check(tensor: Tensor, *shape: int) -> None:
    if tensor.device.type != "cpu":
        raise NotNative(f"the weights are on {tensor.device.type}, not on a CPU")
    if tensor.shape != shape:
        raise NotNative(f"a weight has shape {tuple(tensor.shape)}, not {shape}")


def _linear(function: Any, what: str) -> Linear:
    if not isinstance(function, Linear):
        raise NotNative(f"{what} is a {type(function).__name__}, not a plain linear layer")
    return function


def _split(block: Block, heads: int) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of query, key and value."""
    split = block.split
    if isinstance(split, Split):
        parts = [_linear(f, "a projection") for f in (split.query, split.key, split.value)]
        return [(part.weight, part.bias) for part in parts]
    assert isinstance(split, Joined)
    joined = _linear(split.layer, "the qkv projection")
    if joined.weight.shape[0] != 3 * heads:
        raise NotNative(f"the qkv projection gives {joined.weight.shape[0]} numbers, not 3 × {heads}")
    biases = [None] * 3 if joined.bias is None else joined.bias.chunk(3)
    return list(zip(joined.weight.chunk(3), biases, strict=True))


class _KnownFeedForward:
    def __init__(self, widen: Linear, narrow: Linear) -> None:
        self.widen = widen
        self.narrow = narrow


def _feed_forward(block: Block) -> _KnownFeedForward:
    part = block.feed_forward
    if not isinstance(part, FeedForward) or part.activate is not ops.gelu:
        raise NotNative("a feed-forward part is none that is known, or its activation is not the book's GELU")
    return _KnownFeedForward(_linear(part.widen, "a feed-forward layer"), _linear(part.narrow, "a feed-forward layer"))

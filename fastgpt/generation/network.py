"""A model of the book's structure, read as plain functions: the form in which the engine runs it.

Recognised by structure, not by class, so that readers' own modules work:

    tok_emb, pos_emb            nn.Embedding
    trf_blocks[i]               norm1, att, norm2, ff
      .att                      W_query, W_key, W_value, out_proj   or   qkv, proj;   num_heads
      .ff                       layers[0], layers[1], layers[2], or anything that works row by row
    final_norm, out_head

Linear layers, norms and GELU of known kinds become direct calls on the live weights; any other module (LoRA, another
head) is called as it is. Classes that are not fastgpt's are tried on a few tokens and must give the model's own logits.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.fusion import is_linear
from fastgpt.generation.layers import Function, Norm, linear

# Classes of these modules are known to compute what their structure says.
_OWN = ("fastgpt.model", "fastgpt.reference", "fastgpt.generation.", "torch.nn.")
_MAX_HEAD_DIM = 256


class NotRecognised(Exception):
    """The model is not of the book's structure; the text says where it differs."""


@dataclass(frozen=True)
class Split:
    """x ↦ queries, keys and values, each (..., n_heads · head_dim), by three layers."""

    query: Function
    key: Function
    value: Function

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.query(x), self.key(x), self.value(x)


@dataclass(frozen=True)
class Joined:
    """x ↦ queries, keys and values by one layer, which gives them side by side."""

    layer: Function

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layer(x).chunk(3, dim=-1)


@dataclass(frozen=True)
class FeedForward:
    """x ↦ narrow(activate(widen(x)))."""

    widen: Function
    activate: Function
    narrow: Function

    def __call__(self, x: Tensor) -> Tensor:
        return self.narrow(self.activate(self.widen(x)))


@dataclass(frozen=True)
class Block:
    """One transformer block."""

    norm1: Function
    split: Split | Joined
    project: Function
    norm2: Function
    feed_forward: Function


@dataclass(frozen=True)
class Network:
    """The model's functions and tensors at this moment.

    Attributes:
        tok_emb, pos_emb: (vocab_size, emb_dim), (context_length, emb_dim).
        blocks, final_norm, head: from embeddings to logits.
        n_heads, head_dim: of every block.
        opaque: modules that are called as they are; they obey their `training` flags.
        foreign: True when a class is neither fastgpt's nor torch.nn's, so that the result must be verified.
    """

    tok_emb: Tensor
    pos_emb: Tensor
    blocks: tuple[Block, ...]
    final_norm: Function
    head: Function
    n_heads: int
    head_dim: int
    opaque: tuple[nn.Module, ...]
    foreign: bool

    @property
    def context_length(self) -> int:
        """The longest input."""
        return self.pos_emb.shape[0]

    @property
    def vocab_size(self) -> int:
        """Number of tokens that can be read."""
        return self.tok_emb.shape[0]


@dataclass
class Copies:
    """Weights converted to another dtype; each again when its original has changed.

    Changes are seen by identity, address and version counter; edits through `.data` are not, see `clear`.
    """

    dtype: torch.dtype
    _entries: dict[int, tuple[weakref.ref[Tensor], tuple[int, int], Tensor]] = field(default_factory=dict)
    _modules: dict[int, tuple[weakref.ref[nn.Module], list[tuple[int, int]], nn.Module]] = field(default_factory=dict)

    def tensor(self, source: Tensor) -> Tensor:
        """`source` in `dtype`."""
        entry = self._entries.get(id(source))
        state = _state(source)
        if entry is None or entry[0]() is not source or entry[1] != state:
            entry = (weakref.ref(source), state, source.detach().to(self.dtype))
            self._entries[id(source)] = entry
        return entry[2]

    def module(self, source: nn.Module) -> nn.Module:
        """A copy of `source` with its floating-point weights in `dtype`."""
        entry = self._modules.get(id(source))
        state = [_state(t) for t in (*source.parameters(), *source.buffers())]
        if entry is None or entry[0]() is not source or entry[1] != state:
            entry = (weakref.ref(source), state, copy.deepcopy(source).to(self.dtype).eval())
            self._modules[id(source)] = entry
        return entry[2]

    def drop_dead(self) -> None:
        """Forget the copies of weights that no longer exist."""
        self._entries = {key: entry for key, entry in self._entries.items() if entry[0]() is not None}
        self._modules = {key: entry for key, entry in self._modules.items() if entry[0]() is not None}

    def clear(self) -> None:
        """Forget all copies, so that they are made again."""
        self._entries.clear()
        self._modules.clear()


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def unwrap(model: Any) -> Any:
    """The model inside torch.compile and DistributedDataParallel."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def read_network(model: Any, copies: Copies | None = None) -> Network:
    """Read a model of the book's structure.

    Args:
        model: the model; its weights are used where they are.
        copies: where given, converted copies of the weights are used instead.

    Returns:
        Network: valid until a module or a Parameter of the model is replaced; changes in place are seen.

    Raises:
        NotRecognised: the structure differs from the book's.
    """
    model = unwrap(model)
    if not isinstance(model, nn.Module):
        raise NotRecognised(f"{type(model).__name__} is no torch.nn.Module")
    _refuse_hooks(model)
    if copies is not None:
        copies.drop_dead()
    return _Reader(copies).network(model)


class _Reader:
    """Turns modules into functions, and notes those that stay modules."""

    def __init__(self, copies: Copies | None) -> None:
        self.copies = copies
        self.opaque: list[nn.Module] = []

    def network(self, model: nn.Module) -> Network:
        _refuse_missing(model, "model", ("tok_emb", "pos_emb", "trf_blocks", "final_norm", "out_head"))
        _refuse_other_dropout(model, "drop_emb")
        blocks = cast("list[nn.Module]", list(cast("nn.Sequential", model.trf_blocks)))
        if not blocks:
            raise NotRecognised("it has no blocks")
        heads = {_heads(block) for block in blocks}
        if len(heads) != 1:
            raise NotRecognised(f"its blocks differ in (n_heads, head_dim): {sorted(heads)}")
        n_heads, head_dim = heads.pop()
        return Network(
            tok_emb=self.table(model, "tok_emb"),
            pos_emb=self.table(model, "pos_emb"),
            blocks=tuple(self.block(block) for block in blocks),
            final_norm=self.norm(cast(nn.Module, model.final_norm)),
            head=self.function(cast(nn.Module, model.out_head)),
            n_heads=n_heads,
            head_dim=head_dim,
            opaque=tuple(self.opaque),
            foreign=any(not type(m).__module__.startswith(_OWN) for m in model.modules()),
        )

    def table(self, model: nn.Module, name: str) -> Tensor:
        table = getattr(model, name)
        if type(table) is not nn.Embedding or table.max_norm is not None:
            raise NotRecognised(f"{name} is no plain nn.Embedding")
        return self.tensor(table.weight)

    def tensor(self, source: Any) -> Tensor:
        return source.detach() if self.copies is None else self.copies.tensor(source)

    def function(self, module: nn.Module) -> Function:
        if not isinstance(module, nn.Module):
            raise NotRecognised(f"a {type(module).__name__} stands where a module is wanted")
        if is_linear(module):
            bias = None if module.bias is None else self.tensor(module.bias)
            return linear(self.tensor(module.weight), bias)
        if type(module) is nn.Identity:
            return module
        if self.copies is not None:
            module = self.copies.module(module)
        self.opaque.append(module)
        return module

    def norm(self, module: nn.Module) -> Function:
        names = ("scale", "shift") if hasattr(module, "scale") else ("weight", "bias")
        weight, bias = (getattr(module, name, None) for name in names)
        eps = getattr(module, "eps", None)
        known = isinstance(module, nn.LayerNorm) or names[0] == "scale"
        if not (known and isinstance(weight, Tensor) and isinstance(bias, Tensor) and isinstance(eps, float)):
            return self.function(module)
        if weight.ndim != 1 or weight.shape != bias.shape:
            return self.function(module)
        return Norm(self.tensor(weight), self.tensor(bias), eps)

    def activation(self, module: nn.Module) -> Function:
        own = type(module).__name__ == "GELU" and type(module).__module__.startswith("fastgpt.")
        if own or (type(module) is nn.GELU and module.approximate == "tanh"):
            return ops.gelu
        return self.function(module)

    def block(self, block: nn.Module) -> Block:
        _refuse_other_dropout(block, "drop_shortcut", "drop_resid")
        att = cast(nn.Module, block.att)
        return Block(
            norm1=self.norm(cast(nn.Module, block.norm1)),
            split=self.split(att),
            project=self.function(cast(nn.Module, att.out_proj if hasattr(att, "W_query") else att.proj)),
            norm2=self.norm(cast(nn.Module, block.norm2)),
            feed_forward=self.feed_forward(cast(nn.Module, block.ff)),
        )

    def split(self, att: nn.Module) -> Split | Joined:
        if not hasattr(att, "W_query"):
            return Joined(self.function(cast(nn.Module, att.qkv)))
        return Split(*(self.function(cast(nn.Module, m)) for m in (att.W_query, att.W_key, att.W_value)))

    def feed_forward(self, ff: nn.Module) -> Function:
        layers = getattr(ff, "layers", None)
        if not isinstance(layers, nn.Sequential) or len(layers) != 3:
            return self.function(ff)
        return FeedForward(self.function(layers[0]), self.activation(layers[1]), self.function(layers[2]))


def _heads(block: nn.Module) -> tuple[int, int]:
    """(n_heads, head_dim) of a block; refuses what is not the book's attention."""
    _refuse_missing(block, "a block", ("att", "ff", "norm1", "norm2"))
    att = cast(nn.Module, block.att)
    own_names = ("W_query", "W_key", "W_value", "out_proj") if hasattr(att, "W_query") else ("qkv", "proj")
    _refuse_missing(att, "its attention", (*own_names, "num_heads", "d_out"))
    _refuse_other_dropout(att, "dropout")
    mask = att._buffers.get("mask")
    if mask is not None and not (bool(mask[0, 1:].bool().all()) and not bool(mask[-1].any())):
        raise NotRecognised("an attention mask is not the causal one")
    n_heads, d_out = int(cast(int, att.num_heads)), int(cast(int, att.d_out))
    if n_heads < 1 or d_out % n_heads or not 1 <= d_out // n_heads <= _MAX_HEAD_DIM:
        raise NotRecognised(f"{n_heads} heads over {d_out} do not give a head_dim from 1 to {_MAX_HEAD_DIM}")
    return n_heads, d_out // n_heads


def _refuse_missing(module: nn.Module, what: str, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise NotRecognised(f"{what} ({type(module).__name__}) has no {', '.join(missing)}")


def _refuse_other_dropout(module: nn.Module, *names: str) -> None:
    """The engine leaves dropout out, so nothing else may stand in its place."""
    for name in names:
        part = getattr(module, name, None)
        if part is not None and not isinstance(part, float | nn.Dropout | nn.Identity):
            raise NotRecognised(f"{name} is a {type(part).__name__}, not a dropout")


def _refuse_hooks(model: nn.Module) -> None:
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotRecognised(f"a {type(module).__name__} has forward hooks, which only a plain call runs")
        if "forward" in module.__dict__:
            raise NotRecognised(f"the forward of a {type(module).__name__} was replaced")

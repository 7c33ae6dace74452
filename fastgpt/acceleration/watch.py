"""What a forward does besides its numbers: which dropout it applies, and what it writes."""

from __future__ import annotations

import dis
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class DropoutWatch(TorchFunctionMode):
    """Inside this context every dropout drops what `keep` says, and is noted.

    Args:
        x: the input of the attention, (batch, n_tokens, d_in).
        num_heads: how many heads it has.

    Attributes:
        keep: (batch, num_heads, n_tokens, n_tokens), 1 where a weight is kept.
        shares: the p of every dropout of attention weights.
        elsewhere: a dropout of anything else was seen.
        random: something else drew random numbers.
    """

    def __init__(self, x: Tensor, num_heads: int) -> None:
        super().__init__()
        batch, n_tokens, _ = x.shape
        generator = torch.Generator("cpu").manual_seed(22)
        drawn = torch.rand(batch, num_heads, n_tokens, n_tokens, generator=generator, device="cpu")
        self.keep = (drawn > 0.4).to(x)
        self.shares: list[float] = []
        self.elsewhere = False
        self.random = False
        self._device = x.device

    def __enter__(self) -> DropoutWatch:
        super().__enter__()
        self._state = self._random_state()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.random = not torch.equal(self._state, self._random_state())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func in (torch.dropout, torch.dropout_):
            return self._dropout(*args, **{"training" if name == "train" else name: kwargs[name] for name in kwargs})
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        return func(*args, **kwargs)

    def _random_state(self) -> Tensor:
        if self._device.type == "cuda":
            return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(self._device)])
        return torch.get_rng_state()

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training:
            return input
        if input.numel() != self.keep.numel() or input.shape[-1] != self.keep.shape[-1]:
            self.elsewhere = True
            return input
        self.shares.append(p)
        if p == 0.0:
            return input
        return input * self.keep.reshape(input.shape) / (1.0 - p)

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        call = F.scaled_dot_product_attention
        grouped = {"enable_gqa": True} if enable_gqa else {}
        if dropout_p == 0.0:
            return call(query, key, value, attn_mask, 0.0, is_causal, scale=scale, **grouped)
        # SDPA of the identity matrix gives the weights themselves.
        identity = torch.eye(key.shape[-2], dtype=value.dtype, device=value.device).expand(*key.shape[:-1], -1)
        weights = call(query, key, identity, attn_mask, 0.0, is_causal, scale=scale, **grouped)
        return self._dropout(weights, dropout_p) @ value


def snapshot(module: nn.Module) -> dict[str, Any]:
    """What a forward could have written into a module: plain attributes by value, tensors by identity and version."""
    seen: dict[str, Any] = {}
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        plain = {name: value for name, value in vars(part).items() if name[0] != "_" and name != "training"}
        for name, value in {**plain, **part._buffers, **part._parameters}.items():
            seen[dot + name] = _fingerprint(value)
    return seen


def _fingerprint(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, list | tuple | dict | set):
        return type(value), len(value)
    return value if isinstance(value, bool | int | float | str | None) else id(value)


def written_names(cls: type) -> set[str]:
    """Names of the attributes that `forward`, or a method it may call, stores, read from the bytecode."""
    stores = ("STORE_ATTR", "DELETE_ATTR")
    return {ins.argval for code in _codes(cls) for ins in dis.get_instructions(code) if ins.opname in stores}


def names_used(cls: type) -> set[str]:
    """Names of the functions and attributes in `forward` and in the methods it may call, read from the bytecode."""
    return {name for code in _codes(cls) for name in code.co_names}


def _codes(cls: type) -> set[types.CodeType]:
    seen: set[types.CodeType] = set()
    waiting = _methods(cls, "forward")
    while waiting:
        code = waiting.pop()
        if code not in seen:
            seen.add(code)
            waiting += [method for name in code.co_names for method in _methods(cls, name)]
            waiting += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return seen


def _methods(cls: type, name: str) -> list[types.CodeType]:
    """The code of a method in a class and in those above it up to nn.Module, which `super()` may call."""
    readers = cls.__mro__[: cls.__mro__.index(nn.Module)]
    found = (vars(level)[name] for level in readers if name in vars(level))
    codes = (getattr(getattr(method, "__wrapped__", method), "__code__", None) for method in found)
    return [code for code in codes if code is not None]

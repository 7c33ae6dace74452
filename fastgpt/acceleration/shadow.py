"""The stand-in that is probed instead of the reader's module.

It has the same classes and plain attributes, but its own random weights (zeros and ones would hide what a forward does
with them), its own buffers, and no hooks. So a probe calls none of the reader's hooks, writes nothing into the reader's
module and never touches its training flags.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

_NOT_COPIED = {"_parameters", "_buffers", "_modules", "training"}


def make_shadow(
    module: nn.Module,
    dtype: torch.dtype,
    generator: torch.Generator,
    parts: Mapping[nn.Module, nn.Module] | None = None,
) -> nn.Module:
    """A stand-in for `module` and everything below it.

    Args:
        module: the reader's; it is only read.
        dtype: of the floating-point weights and buffers of the stand-in.
        generator: on the CPU; the weights are drawn from it.
        parts: modules inside it, each with what takes its place.

    Returns:
        A module in eval mode, on the device of `module`.
    """
    return _copy(module, dtype, generator, {id(part): other for part, other in (parts or {}).items()})


def _copy(module: nn.Module, dtype: torch.dtype, generator: torch.Generator, seen: dict[int, Any]) -> nn.Module:
    if id(module) in seen:
        known: nn.Module = seen[id(module)]
        return known
    clone = seen[id(module)] = module.__class__.__new__(module.__class__)
    nn.Module.__init__(clone)
    own = clone.__dict__
    bookkeeping = set(own)
    for name, value in module.__dict__.items():
        if name not in bookkeeping and name not in _NOT_COPIED:
            own[name] = copy.copy(value) if isinstance(value, list | dict | set) else _cast(value, dtype)
    own["training"] = False
    own["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    for name, parameter in module._parameters.items():
        own["_parameters"][name] = _randomised(parameter, dtype, generator, seen)
    for name, buffer in module._buffers.items():
        own["_buffers"][name] = _cast(buffer, dtype)
    for name, child in module._modules.items():
        own["_modules"][name] = None if child is None else _copy(child, dtype, generator, seen)
    return clone


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    fresh = value.detach().clone()
    return fresh.to(dtype) if fresh.is_floating_point() else fresh


def _randomised(parameter: Any, dtype: torch.dtype, generator: torch.Generator, seen: dict[int, Any]) -> Any:
    if parameter is None:
        return None
    if id(parameter) not in seen:
        fresh = parameter.detach()
        if fresh.is_floating_point():
            # Matrices keep the size of what they multiply, so that scores stay near 1.
            size = max(fresh.shape) ** -0.5 if fresh.ndim > 1 else 0.5
            drawn = torch.randn(fresh.shape, generator=generator, device="cpu", dtype=torch.float32) * size
            fresh = drawn.to(device=fresh.device, dtype=dtype)
        seen[id(parameter)] = nn.Parameter(fresh, requires_grad=False)
    return seen[id(parameter)]


@contextmanager
def quiet(device: torch.device) -> Iterator[StringIO]:
    """A probe's surroundings: no gradients, autocast or warnings; the random state as before; prints are kept."""
    devices = [device] if device.type == "cuda" else []
    printed = StringIO()
    with (
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        redirect_stdout(printed),
        warnings.catch_warnings(),
    ):
        # A probe's odd input may earn warnings that the reader's own would not.
        warnings.simplefilter("ignore")
        yield printed

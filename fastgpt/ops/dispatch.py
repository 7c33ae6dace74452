"""Which backend runs an op. Decided once per kind of input (a small hashable case), then remembered.

Nearest wins: the argument `backend=`, then `with use_backend(...)`, then FASTGPT_BACKEND, then "auto". "auto" takes the
first backend of the room that says nothing against the case; an explicit name that cannot run raises with every
backend's reason. A name for many ops at once (`use_backend`, FASTGPT_BACKEND) leaves rooms without such a backend on
"auto": "triton" for a model says nothing of its matrix products. A backend is a module of the room:

    backend_<name>.py   why_not(case) -> str | None, forward(...), backward(...)
    reference.py        the op in plain PyTorch; it can always run

A backend that sets NATIVE_AUTOGRAD = True is differentiated by PyTorch itself and offers `apply(...)` instead of
`forward` and `backward`. One that sets AUTOMATIC to a sentence is never taken by "auto", for that reason.

On the CPU rooms leave tiny inputs to the torch backend (`Op.for_tiny`): our autograd Function takes longer in Python
than such an op in C++. Each room says up to what size, and what it measured.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Final

from torch import Tensor

from fastgpt import env

logger = logging.getLogger("fastgpt")

_override: ContextVar[str | None] = ContextVar("fastgpt_backend", default=None)

# Read once: looking the variable up costs more than the rest of the decision.
_from_environment = functools.cache(env.backend)


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this input. The text holds every backend's reason."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` block on one backend.

    Args:
        name: "auto", "cuda", "triton", "cpu", "torch" or "reference".

    Raises:
        ValueError: the name is not a backend's.
    """
    token = _override.set(_known(name))
    try:
        yield
    finally:
        _override.reset(token)


def requested(backend: str | None = None) -> str:
    """The backend that is asked for here: argument, context, environment, "auto"."""
    if backend is not None:
        return _known(backend)
    return _override.get() or _from_environment()


def _known(name: str) -> str:
    if name not in env.BACKENDS:
        raise ValueError(f"backend {name!r} is not known; use one of: {', '.join(env.BACKENDS)}.")
    return name


def device_type(x: Tensor) -> str:
    """`x.device.type`, which costs 5 us where it is not in the cache."""
    return "cpu" if x.is_cpu else x.device.type


class Op:
    """One room: its name, its backends in order of preference, and what was chosen for each case."""

    def __init__(self, package: str, backends: tuple[str, ...]) -> None:
        self.package: Final = package
        self.name: Final = package.rpartition(".")[2]
        self.backends: Final = backends
        self._chosen: dict[tuple[Any, str], ModuleType] = {}
        self._modules: dict[str, ModuleType] = {}

    def module(self, backend: str) -> ModuleType:
        """The module of one backend, imported when first needed."""
        module = self._modules.get(backend)
        if module is None:
            stem = "reference" if backend == "reference" else f"backend_{backend}"
            module = self._modules[backend] = importlib.import_module(f"{self.package}.{stem}")
        return module

    def why_not(self, backend: str, case: Any) -> str | None:
        """Why this backend cannot run this case, or None when it can."""
        if backend not in self.backends:
            return f"{self.name} has no {backend} backend"
        reason: str | None = self.module(backend).why_not(case)
        return reason

    def choose(self, case: Any, backend: str | None = None) -> ModuleType:
        """The backend module for this case. Raises BackendError when the one asked for cannot run it."""
        name = requested(backend)
        if backend is None and name not in self.backends:
            name = "auto"
        key = (case, name)
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._chosen[key] = self._decide(case, name)
        return chosen

    def for_tiny(self, backend: str | None = None) -> ModuleType | None:
        """The torch backend for an input on the CPU that is too small for ours; None where a backend is asked for."""
        return self.module("torch") if requested(backend) == "auto" else None

    def _decide(self, case: Any, name: str) -> ModuleType:
        if name != "auto":
            reason = self.why_not(name, case)
            if reason is None:
                return self.module(name)
            raise BackendError(f"{self.name}: backend {name!r} cannot run this input: {reason}.\n{self.report(case)}")
        refused: list[str] = []
        for backend in self.backends:
            reason = self.why_not(backend, case) or getattr(self.module(backend), "AUTOMATIC", None)
            if reason is None:
                if refused:
                    logger.info("%s runs on %s for %s; %s", self.name, backend, case, "; ".join(refused))
                return self.module(backend)
            refused.append(f"not {backend}: {reason}")
        raise BackendError(f"{self.name}: no backend can run {case}.\n{self.report(case)}")

    def report(self, case: Any) -> str:
        """One line per backend: ready, or why not."""
        reasons = ((backend, self.why_not(backend, case)) for backend in self.backends)
        return "\n".join(f"  {backend}: {reason or 'ready'}" for backend, reason in reasons)

"""Fixtures: the backend under test, the third-party data, and one thread count for all."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import env
from fastgpt.ops import extension


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of third-party test data; skips where it is absent."""
    folder = env.test_data() or Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"third-party test data is not at {folder}; FASTGPT_TEST_DATA can name its folder")
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models of a few thousand parameters gain nothing from a second thread, and lose much when the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class OpBackend:
    """The backend that a test runs on, and the device where its tensors live."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = "cuda" if name == "cuda" or name == "triton" and torch.cuda.is_available() else "cpu"

    def __call__(self, op: str, case: Any) -> str:
        """The name, to be passed as `backend=`; skips with the backend's own reason where it cannot run the case."""
        room = importlib.import_module(f"fastgpt.ops.{op}")
        reason = room.OP.why_not(self.name, case._replace(device=self.device))
        if reason is not None:
            if self.name in env.require() and self.name in room.BACKENDS:
                pytest.fail(f"FASTGPT_REQUIRE names {self.name}, but {reason}")
            pytest.skip(f"{op} on {self.name}: {reason}")
        return self.name


def _on_its_device(name: str) -> Iterator[OpBackend]:
    backend = OpBackend(name)
    if backend.device == "cuda" and not torch.cuda.is_available():
        if backend.name in env.require():
            pytest.fail(f"FASTGPT_REQUIRE names {backend.name}, but torch sees no CUDA device")
        pytest.skip(f"{backend.name}: torch sees no CUDA device")
    with torch.device(backend.device):
        yield backend


@pytest.fixture(params=["cpu", "triton", "cuda"])
def op_backend(request: pytest.FixtureRequest) -> Iterator[OpBackend]:
    """Each backend of ours in turn. Tensors that the test makes without a device land on the backend's."""
    yield from _on_its_device(request.param)


@pytest.fixture(params=["torch", "cpu", "triton", "cuda"])
def any_backend(request: pytest.FixtureRequest) -> Iterator[OpBackend]:
    """As op_backend, and PyTorch's own ops, for rooms where their use needs a proof."""
    yield from _on_its_device(request.param)


@pytest.fixture(params=["avx512_bf16", "avx512_vnni", "avx512", "avx2", "baseline"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor has, in turn."""
    reason = extension.why_not("cpu")
    if reason is not None:
        pytest.skip(reason)
    module = extension.load("cpu")
    before = module.isa()
    if request.param not in module.available_isas():
        pytest.skip(f"this processor and build have no {request.param}")
    module.select_isa(request.param)
    yield request.param
    module.select_isa(before)

"""What runs where on this machine: `fastgpt.info()` and `fastgpt info`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

import torch

from fastgpt._version import __version__
from fastgpt.ops import dispatch, extension

ROOMS = (
    "attention",
    "decode_attention",
    "layer_norm",
    "dropout_add_layer_norm",
    "gelu",
    "embedding",
    "linear",
    "linear_cross_entropy",
)


@dataclass(frozen=True)
class Row:
    """One op on one kind of input: the backend that runs it, and what each other backend says.

    Attributes:
        op, device, dtype: what was asked.
        active: name of the backend that the dispatcher takes now.
        reasons: per backend, "active", "available", or the sentence why not.
    """

    op: str
    device: str
    dtype: str
    active: str
    reasons: dict[str, str]


@dataclass(frozen=True)
class Info:
    """The report of `fastgpt.info()`; print it.

    Attributes:
        facts: version, processor, threads, CUDA, Triton: name and value.
        rows: op × kind of input.
    """

    facts: dict[str, str]
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        lines = [f"{name:<12}{value}" for name, value in self.facts.items()]
        lines += ["", f"{'op':<24}{'device':<8}{'dtype':<10}{'runs on':<11}others"]
        notes: dict[str, int] = {}
        for row in self.rows:
            others = []
            for backend, reason in row.reasons.items():
                if reason == "available":
                    others.append(backend)
                elif reason != "active":
                    others.append(f"{backend}[{notes.setdefault(reason, len(notes) + 1)}]")
            lines.append(f"{row.op:<24}{row.device:<8}{row.dtype:<10}{row.active:<11}{' '.join(others)}")
        lines += ["", *(f"[{number}] {reason}" for reason, number in notes.items())] if notes else []
        return "\n".join(lines)

    __repr__ = __str__


def info() -> Info:
    """What fastgpt runs on here: versions, instruction set, threads, GPU, and the backend of every op.

    Returns:
        Info: `print(fastgpt.info())` shows it; its fields hold the same for programs.
    """
    return Info(facts=_facts(), rows=tuple(_rows()))


def _facts() -> dict[str, str]:
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return {
        "fastgpt": f"{__version__}, torch {torch.__version__}, {python}",
        "CPU": _cpu(),
        "CUDA": _cuda(),
        "Triton": _triton(),
        "asked for": dispatch.requested(),
    }


def _cpu() -> str:
    threads = f"{extension.num_threads()} threads"
    if (reason := extension.why_not("cpu")) is not None:
        return f"{threads}; {reason}"
    module = extension.load("cpu")
    pool = "in torch's OpenMP pool" if module.openmp else "but built without OpenMP, so the kernels use one"
    return f"{module.isa()} (this build and processor have {', '.join(module.available_isas())}), {threads} {pool}"


def _cuda() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "torch sees no CUDA device"
    return f"{device}; {extension.why_not('cuda') or 'the C++ kernels are built'}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    return importlib.metadata.version("triton")


def _rows() -> list[Row]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for name in ROOMS:
        room = importlib.import_module(f"fastgpt.ops.{name}")
        seen = set()
        for device in devices:
            for example in room.EXAMPLE_CASES:
                case = example._replace(device=device)
                key = (device, case.dtype)
                if key not in seen:
                    seen.add(key)
                    rows.append(_row(name, room.OP, case))
    return rows


def _row(name: str, op: dispatch.Op, case: tuple) -> Row:
    try:
        active = op.choose(case).__name__.rpartition(".")[2].removeprefix("backend_")
    except dispatch.BackendError:
        active = "none"
    reasons = {}
    for backend in op.backends:
        automatic = getattr(op.module(backend), "AUTOMATIC", None)
        reason = op.why_not(backend, case) or (f"available by name only: {automatic}" if automatic else None)
        reasons[backend] = "active" if backend == active else reason or "available"
    dtype = str(case.dtype).removeprefix("torch.")  # type: ignore[attr-defined]
    return Row(name, case.device, dtype, active, reasons)  # type: ignore[attr-defined]

"""Who computes large products on this processor: by a table where it was measured, else by a race, once.

own      kernels/cpu/gemm.h: bias, sums of rows and accumulation in the same pass, any strides
torch    torch.mm: MKL on x86-64, which takes its AVX2 path on AMD whatever the processor has
onednn   oneDNN by the op that torch.compile uses, without torch's global switch (set_float32_matmul_precision)

On a processor without a row the engines take turns at the products of a layer when the first large product comes, for
0.3 s on two Zen 3 cores. Engines round differently, so the winner is written to the user's cache: the same machine
gives the same bits tomorrow. FASTGPT_PRODUCTS names an engine instead.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastgpt import env, timing
from fastgpt._version import __version__
from fastgpt.ops.extension import load, num_threads

logger = logging.getLogger("fastgpt")

# (instruction set in use, maker of the processor): engine of float32 products and of those with a bfloat16 operand.
MEASURED = {
    # Zen 3, two cores, GFLOP/s of a peak of 204, own / MKL / oneDNN. 1024 x 768 x 3072: forward 180 / 171 / 150, dx
    # 174 / 179 / 116, dW 187 / 179 / 115; 1024 x 3072 x 768: 184 / 178 / 144, 183 / 177 / 95, 171 / 166 / 80; 1024 x
    # 768 x 768: 179 / 177 / 156, 180 / 179 / 137, 174 / 178 / 111. Before the own kernel fetched panels ahead, and
    # without what it does on the way: bias, dbias, packed results.
    ("avx2", "amd"): {torch.float32: "own", torch.bfloat16: "own"},
}
# What another engine must be faster by than PyTorch's own.
_MARGIN = 1.02
# Rows, n_in and n_out of the products in the race.
_SIZES = 512, 768, 768

Product = Callable[..., Tensor]


def choose(isa: str, dtype: torch.dtype, product: Product) -> str:
    """The engine of large products of this dtype: asked for, measured, remembered or raced.

    Args:
        isa: the instruction set in use.
        dtype: float32, or bfloat16 where an operand has it.
        product: `matmul_into`.
    """
    asked = env.products()
    if asked != "auto":
        return asked if asked in _candidates(dtype) else "torch"
    row = MEASURED.get((isa, load("cpu").cpu_vendor()))
    if row is not None:
        return row[dtype]
    path, key = env.products_file(), _key(isa, dtype)
    known = _read(path).get(key)
    if known is not None and known in _candidates(dtype):
        return known
    name = _race(dtype, product)
    _write(path, key, name)
    return name


def _candidates(dtype: torch.dtype) -> tuple[str, ...]:
    # In bfloat16 torch.mm is oneDNN already.
    onednn = dtype is torch.float32 and torch.backends.mkldnn.is_available()
    return ("torch", "own", "onednn") if onednn else ("torch", "own")


def _race(dtype: torch.dtype, product: Product) -> str:
    rows, n_in, n_out = _SIZES
    # No random numbers: they would move the user's generator on.
    x, weight, dout = (
        torch.full(s, 0.5, dtype=dtype, device="cpu") for s in ((rows, n_in), (n_out, n_in), (rows, n_out))
    )
    out, dx, dweight = torch.empty_like(dout), torch.empty_like(x), torch.empty_like(weight)
    bias, dbias = (
        torch.full((n_out,), 0.5, dtype=dtype, device="cpu"),
        torch.empty(n_out, dtype=torch.float32, device="cpu"),
    )

    def layer(name: str) -> None:
        product(out, x, weight.t(), bias=bias, by=name)
        product(dx, dout, weight, by=name)
        product(dweight, dout.t(), x, row_sums=dbias, by=name)

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        turns = {name: functools.partial(layer, name) for name in _candidates(dtype)}
        seconds = {name: result.median for name, result in timing.race(turns, rounds=1, warmup=1).items()}
        # Some are a hundred times slower, and one round of them is enough.
        turns = {name: turn for name, turn in turns.items() if seconds[name] < 2 * min(seconds.values())}
        if len(turns) > 1:
            seconds = {name: result.median for name, result in timing.race(turns, rounds=5, warmup=1).items()}
    return _winner(seconds)


def _winner(seconds: Mapping[str, float]) -> str:
    best = min(seconds, key=lambda name: seconds[name])
    winner = "torch" if seconds.get("torch", float("inf")) < _MARGIN * seconds[best] else best
    flops = 6 * _SIZES[0] * _SIZES[1] * _SIZES[2]
    rates = ", ".join(f"{name} {flops / spent / 1e9:.0f}" for name, spent in seconds.items())
    logger.info("large products run on %s; GFLOP/s: %s", winner, rates)
    return winner


def _key(isa: str, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{processor()}, {isa}, {name}, {num_threads()} threads, torch {torch.__version__}, fastgpt {__version__}"


@functools.cache
def processor() -> str:
    """The processor's name as the system gives it, with its family where the name alone says little."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    return f"{fields.get('model name', platform.machine())} family {fields.get('cpu family', '?')}"


def _read(path: Path) -> dict[str, str]:
    """What is remembered; nothing where the file is damaged, as a race mends it."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text("utf-8"))
        if isinstance(content, dict):
            return {key: value for key, value in content.items() if isinstance(value, str)}
    return {}


def _write(path: Path, key: str, name: str) -> None:
    """Remember one more; a cache that cannot be written costs a race in the next process."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps({**_read(path), key: name}, indent=1) + "\n", "utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        logger.info("the engine of large products is not remembered: %s", error)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)

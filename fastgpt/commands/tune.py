"""`fastgpt bench --tune`: time the tiles of every Triton kernel on the GPU that is here, and remember the fastest.

A candidate must first give what the tile in use gives; one that does not is named and left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt.tuning import AttentionTile, RowTile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DROPOUT_P = 0.1
# How far a candidate's result may be from that of the tile in use, in units of its largest element.
TOLERANCE = {4: 1e-4, 2: 2e-2}
# Elements of a tensor that a program on whole rows may hold.
WHOLE_ROWS = range(512, 32769)


class WrongResult(Exception):
    """A candidate gave other numbers than the tile in use."""


@dataclass(frozen=True)
class Job:
    """One kernel to tune.

    Attributes:
        kernel: a name in tuning.KERNELS.
        width: as the kernel's backend looks it up.
        dropout: whether the kernel draws a mask.
        candidates: tiles to try.
        call: runs the kernel and gives its results.
    """

    kernel: str
    width: int
    dropout: bool
    candidates: list[Any]
    call: Callable[[], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `--tune` takes beside itself."""
    parser.add_argument("--head-dim", type=int, default=64, help="with --tune (default 64)")
    parser.add_argument("--emb-dim", type=int, default=768, help="with --tune (default 768)")
    parser.add_argument("--vocab-size", type=int, default=50257, help="with --tune (default 50257)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="with --tune")
    parser.add_argument("--tokens", type=int, default=2048, help="with --tune: length of the sequences (default 2048)")
    parser.add_argument("--rows", type=int, default=16384, help="with --tune: tokens of a batch (default 16384)")
    parser.add_argument("--kernels", default="", help="with --tune: only those whose name contains this")
    parser.add_argument("--out", metavar="FILE", help="with --tune: where the tiles go, instead of the usual file")


def run(args: argparse.Namespace) -> int:
    """Tune, and write what was found."""
    import torch

    from fastgpt import env, tuning
    from fastgpt.ops import triton_support

    device = "cpu" if triton_support.interpreting() else "cuda"
    reason = None if device == "cpu" or torch.cuda.is_available() else "torch sees no CUDA device here"
    reason = reason or triton_support.why_not(device)
    if reason is not None:
        print(f"Nothing to tune: {reason}.")
        return 1
    path = Path(args.out) if args.out else env.tiles_file()
    dtype = getattr(torch, args.dtype)
    with torch.device(device):
        chip = triton_support.chip(torch.empty(0))
        for job in jobs(args, dtype):
            name = tuning.key(job.kernel, chip, 8 * dtype.itemsize, job.width, job.dropout)
            tile, seconds = tune(job, device)
            # At once, so that what was found stays when the rest is broken off.
            tuning.write(path, {name: tile})
            values = ", ".join(f"{field} {value}" for field, value in tile._asdict().items())
            print(f"{name:<56}{1e3 * seconds:8.3f} ms   {values}", flush=True)
    print(f"\nWritten to {path}. The kernels take them from now on; delete the file to undo it.")
    return 0


def tune(job: Job, device: str) -> tuple[Any, float]:
    """The fastest tile for one kernel, and the seconds of a call with it."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    from fastgpt import timing, tuning

    want, right = listed(job.call()), set()

    def seconds(tile: Any, rounds: int) -> float:
        def call() -> Any:
            with tuning.force(job.kernel, tile):
                return job.call()

        if tile not in right:
            if not all(map(close, listed(call()), want)):
                print(f"{job.kernel}: {tile} gives other numbers and is left out", flush=True)
                raise WrongResult
            right.add(tile)
        return timing.race({"tile": call}, rounds=rounds, min_time=0.005, device=device)["tile"].median

    return tuning.search(job.candidates, seconds, unusable=(OutOfResources, CompilationError, WrongResult))


def listed(results: Any) -> list[Tensor]:
    """The tensors among what a call gave, copied: a later call may write over them."""
    results = results if isinstance(results, tuple) else (results,)
    return [result.clone() for result in results if result is not None]


def close(got: Tensor, want: Tensor) -> bool:
    """True when no element is further off than TOLERANCE allows; nan never is."""
    limit = TOLERANCE[want.itemsize] * want.float().abs().max()
    return bool(((got.float() - want.float()).abs() <= limit).all())


def jobs(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[Job]:
    """Every kernel with what it runs on, those alone that `--kernels` names; tensors are made as they are needed."""
    groups: list[tuple[str, Callable[..., Iterator[Job]]]] = [
        ("attention_forward attention_backward_dq attention_backward_dkdv", attention_jobs),
        ("layer_norm_forward layer_norm_backward", layer_norm_jobs),
        ("dropout_add_layer_norm_forward dropout_add_layer_norm_backward", residual_jobs),
        ("gelu_forward gelu_backward gelu_bias_forward gelu_bias_backward", gelu_jobs),
        ("embedding_forward embedding_backward", embedding_jobs),
        ("cross_entropy", loss_jobs),
    ]
    for names, make in groups:
        if args.kernels in names:
            yield from (job for job in make(args, dtype) if args.kernels in job.kernel)


def attention_jobs(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[Job]:
    """The three attention kernels, without dropout and with."""
    import torch

    from fastgpt.ops import triton_support
    from fastgpt.ops.attention import backend_triton as room
    from fastgpt.ops.attention import tma

    shape = (max(1, args.rows // args.tokens), args.tokens, max(1, args.emb_dim // args.head_dim), args.head_dim)
    q, k, v, dout = (torch.randn(shape, dtype=dtype).transpose(1, 2) for _ in range(4))
    tiles = attention_tiles(tma.why_not(q, k, v, dout) is None)
    width = max(room.MIN_BLOCK_D, triton_support.next_power_of_2(args.head_dim))
    for p in (0.0, DROPOUT_P):
        settings = (args.head_dim**-0.5, p, 5)
        out, lse = room.forward(q, k, v, *settings)

        def forward(settings: Any = settings) -> Any:
            return room.forward(q, k, v, *settings)

        def backward(settings: Any = settings, out: Tensor = out, lse: Tensor = lse) -> Any:
            return room.backward(dout, q, k, v, out, lse, *settings)

        yield Job("attention_forward", width, p > 0, tiles, forward)
        yield Job("attention_backward_dq", width, p > 0, tiles, backward)
        yield Job("attention_backward_dkdv", width, p > 0, tiles, backward)


def attention_tiles(tma: bool) -> list[AttentionTile]:
    """Tiles to try; by descriptors those alone that leave a pipeline something to do."""
    plain = [AttentionTile(*sides) for sides in product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))]
    return plain + [tile._replace(tma=1) for tile in plain if tma and tile.block_m >= 64 and tile.num_stages > 1]


def layer_norm_jobs(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[Job]:
    """layer_norm, forward and backward."""
    import torch

    from fastgpt.ops.layer_norm import backend_triton as room

    x, dout = (torch.randn(args.rows, args.emb_dim, dtype=dtype) for _ in range(2))
    weight, bias = (torch.randn(args.emb_dim, dtype=dtype) for _ in range(2))
    _, mean, rstd = room.forward(x, weight, bias, 1e-5)
    width = room.block(args.emb_dim)
    yield Job("layer_norm_forward", width, False, whole_rows(width), lambda: room.forward(x, weight, bias, 1e-5))
    call = lambda: room.backward(dout, x, weight, mean, rstd)  # noqa: E731
    yield Job("layer_norm_backward", width, False, whole_rows(width, (2, 4, 8)), call)


def residual_jobs(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[Job]:
    """dropout_add_layer_norm, forward and backward, without dropout and with."""
    import torch

    from fastgpt.ops.dropout_add_layer_norm import backend_triton as room
    from fastgpt.ops.layer_norm.backend_triton import block

    x, residual, dtotal, dnormed = (torch.randn(args.rows, args.emb_dim, dtype=dtype) for _ in range(4))
    weight, bias = (torch.randn(args.emb_dim, dtype=dtype) for _ in range(2))
    width = block(args.emb_dim)
    for p in (0.0, DROPOUT_P):
        total, _, mean, rstd = room.forward(x, residual, weight, bias, 1e-5, p, 5)

        def forward(p: float = p) -> Any:
            return room.forward(x, residual, weight, bias, 1e-5, p, 5)

        def backward(p: float = p, total: Tensor = total, mean: Tensor = mean, rstd: Tensor = rstd) -> Any:
            return room.backward(dtotal, dnormed, total, weight, mean, rstd, p, 5)

        yield Job("dropout_add_layer_norm_forward", width, p > 0, whole_rows(width), forward)
        yield Job("dropout_add_layer_norm_backward", width, p > 0, whole_rows(width, (2, 4, 8)), backward)


def whole_rows(width: int, programs: tuple[int, ...] = (0,)) -> list[RowTile]:
    """Tiles of whole rows to try."""
    sides = product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16), programs)
    tiles = [RowTile(rows, 0, warps, count) for rows, warps, count in sides]
    return [tile for tile in tiles if tile.rows * width in WHOLE_ROWS] or [RowTile(1, 0, 4, programs[0])]


def gelu_jobs(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[Job]:
    """gelu without a bias and with, forward and backward."""
    import torch

    from fastgpt.ops.gelu import backend_triton as room
    from fastgpt.ops.layer_norm.backend_triton import block

    x, dout = (torch.randn(args.rows, 4 * args.emb_dim, dtype=dtype) for _ in range(2))
    bias = torch.randn(4 * args.emb_dim, dtype=dtype)
    flat = [RowTile(1, columns, warps) for columns, warps in product((512, 1024, 2048, 4096), (2, 4, 8))]
    sides = list(product((1, 2, 4), (256, 512, 1024, 2048), (2, 4, 8)))
    strides = [RowTile(*side, programs) for side in sides for programs in (4, 8, 16)]
    width = block(4 * args.emb_dim)
    # Without a bias there are no rows, and the backend looks for the smallest width.
    yield Job("gelu_forward", block(1), False, flat, lambda: room.forward(x, None))
    yield Job("gelu_backward", block(1), False, flat, lambda: room.backward(dout, x, None))
    yield Job("gelu_bias_forward", width, False, [RowTile(*side) for side in sides], lambda: room.forward(x, bias))
    yield Job("gelu_bias_backward", width, False, strides, lambda: room.backward(dout, x, bias))


def embedding_jobs(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[Job]:
    """The embeddings, forward and backward, without dropout and with."""
    import torch

    from fastgpt.ops.embedding import backend_triton as room
    from fastgpt.ops.layer_norm.backend_triton import block

    length = min(args.tokens, args.rows)
    ids = torch.randint(args.vocab_size, (max(1, args.rows // length), length))
    weight, positions = (torch.randn(size, args.emb_dim, dtype=dtype) for size in (args.vocab_size, length))
    dout = torch.randn(*ids.shape, args.emb_dim, dtype=dtype)
    runs = [RowTile(*sides) for sides in product((2, 4, 8), (128, 256, 512, 1024), (2, 4, 8))]
    width = block(args.emb_dim)
    for p in (0.0, DROPOUT_P):

        def forward(p: float = p) -> Any:
            return room.forward(ids, weight, positions, p, 5)

        def backward(p: float = p) -> Any:
            return room.backward(dout, ids, args.vocab_size, length, p, 5)

        yield Job("embedding_forward", width, p > 0, whole_rows(width), forward)
        yield Job("embedding_backward", width, p > 0, runs, backward)


def loss_jobs(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[Job]:
    """The cross-entropy of one chunk of rows, with its gradient."""
    import torch

    from fastgpt.ops.layer_norm.backend_triton import block
    from fastgpt.ops.linear_cross_entropy import backend_triton as room
    from fastgpt.ops.linear_cross_entropy.gpu_chunks import ALIGNMENT, CHUNK_ROWS

    rows, padded = min(args.rows, CHUNK_ROWS), -(-args.vocab_size // ALIGNMENT) * ALIGNMENT
    logits, targets = torch.randn(rows, padded, dtype=dtype), torch.randint(args.vocab_size, (rows,))
    work, losses, count = torch.empty_like(logits), torch.empty(rows), torch.tensor(rows)

    def call() -> Any:
        # The gradient overwrites the logits; the copy costs every candidate the same.
        room.cross_entropy(losses, work.copy_(logits), targets, count, args.vocab_size, -100, gradient=True)
        return losses, work

    tiles = [RowTile(1, columns, warps) for columns, warps in product((1024, 2048, 4096, 8192), (4, 8, 16))]
    yield Job("cross_entropy", block(padded), False, tiles, call)

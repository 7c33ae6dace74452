"""The dropout mask in plain PyTorch: Philox4x32-10, the same bits as every kernel draws.

A counter-based generator has no state: the mask of element (b, h, i, j) is a function of the seed and of where the
element stands, so that backward draws it again instead of reading it, and tiles may come in any order. One draw gives
four 32-bit words, hence eight 16-bit numbers, and serves eight columns of one row:

    key      seed, low and high 32 bits
    counter  c0 = (j // 64) · 8 + j % 8,  c1 = i,  c2 = b · n_heads + h,  c3 = offset
    column   j = 64 · (j // 64) + 8 · s + j % 8 takes slot s: word s // 2, its low 16 bits when s is even, else the high
    keep     number >= threshold, threshold = round(p · 65536); kept weights are scaled by 65536 / (65536 - threshold)

Tensors of rows (the residual stream, the embeddings) take the same numbers: element (r, j) of (rows, n) is element
(b, h, i, j) with c1 = r mod 2^32 and c2 = r / 2^32.

Eight columns that lie 8 apart are what one thread holds of a 64-wide tile in the accumulators of mma and wgmma, and a
slot over eight draws is one 8-lane vector on a CPU. So no backend draws a number that it does not use.

Paper: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def draw_seed() -> int:
    """A seed from torch's default CPU generator, so that torch.manual_seed reproduces a run. 0 <= seed < 2**63 - 1."""
    # Wherever new tensors go by default: a draw on a GPU would stop the host until the GPU is done.
    return int(torch.randint(2**63 - 1, (), device="cpu").item())


def threshold(dropout_p: float) -> int:
    """The 16-bit number below which an element is dropped."""
    return round(dropout_p * 65536)


def scale(dropout_p: float) -> float:
    """What kept elements are multiplied by, for the probability that 16 bits can hold. 0 when all are dropped."""
    kept = 65536 - threshold(dropout_p)
    return 65536 / kept if kept else 0.0


def check_probability(op: str, dropout_p: float) -> None:
    """Raise ValueError unless 0 <= dropout_p <= 1."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; it is a probability, from 0 to 1.")


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Four words for each counter. Counters and words are int64 tensors that hold unsigned 32-bit numbers."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        high0, low0 = _multiply(c0, _M0)
        high1, low1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # Two 32-bit factors overflow int64, so b goes in halves.
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def keep_mask(batch: int, n_heads: int, q_len: int, k_len: int, dropout_p: float, seed: int, offset: int = 0) -> Tensor:
    """The elements of the attention weights that dropout keeps: (batch, n_heads, q_len, k_len), bool, on the CPU."""
    c1 = torch.arange(q_len, device="cpu")[:, None]
    c2 = torch.arange(batch * n_heads, device="cpu")[:, None, None]
    return _keep(c1, c2, k_len, dropout_p, seed, offset).view(batch, n_heads, q_len, k_len)


def keep_rows(rows: int, n: int, dropout_p: float, seed: int, first_row: int = 0) -> Tensor:
    """The elements of a tensor of rows that dropout keeps: (rows, n), bool, on the CPU."""
    row = torch.arange(first_row, first_row + rows, device="cpu")[:, None]
    return _keep(row & _LOW, row >> 32, n, dropout_p, seed)


def drop_rows(x: Tensor, dropout_p: float, seed: int) -> Tensor:
    """Dropout of x (..., n) as the kernels draw it for this seed: dropped elements times 0, kept ones scaled up."""
    keep = keep_rows(x.shape[:-1].numel(), x.shape[-1], dropout_p, seed).view(x.shape).to(x.device)
    return x * keep * scale(dropout_p)


def _keep(c1: Tensor, c2: Tensor, n: int, dropout_p: float, seed: int, offset: int = 0) -> Tensor:
    column = torch.arange(n, device="cpu")
    c0 = column // 64 * 8 + column % 8
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    words = torch.stack(philox((c0, c1, c2, torch.full_like(c0, offset)), seed))
    slot = (column % 64 // 8).expand(c0.shape)
    word = words.gather(0, (slot // 2)[None])[0]
    number = torch.where(slot % 2 == 0, word & 0xFFFF, word >> 16)
    return number >= threshold(dropout_p)

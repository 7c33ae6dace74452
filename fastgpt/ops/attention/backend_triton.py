"""Causal attention in Triton: kernels/triton/attention.py and attention_backward.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgpt.ops import philox, triton_support
from fastgpt.ops.attention import tma
from fastgpt.ops.triton_support import next_power_of_2

if TYPE_CHECKING:
    from fastgpt.ops.attention import Case
    from fastgpt.tuning import AttentionTile

AUTOMATIC = triton_support.UNPROVEN

MAX_HEAD_DIM = 256
# The smallest side of a product on the tensor cores.
MIN_BLOCK_D = 16


def why_not(case: Case) -> str | None:
    """float32, bfloat16 and float16 on the GPU, head_dim up to 256; what the interpreter can do on the CPU."""
    if case.head_dim > MAX_HEAD_DIM:
        return f"the kernels take head_dim up to {MAX_HEAD_DIM}, not {case.head_dim}"
    if case.dtype == torch.bfloat16 and triton_support.interpreting():
        return "Triton's interpreter multiplies bfloat16 matrices wrongly"
    return triton_support.why_not(case.device, case.dtype)


def forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns out, laid out as (batch, q_len, n_heads, head_dim), and lse (batch, n_heads, q_len), float32."""
    from fastgpt.kernels.triton.attention import causal_attention_forward_kernel as kernel
    from fastgpt.kernels.triton.attention_tables import choose

    if softmax_scale < 0.0:
        # The running maximum is taken before the scale.
        q, softmax_scale = -q, -softmax_scale
    q, k, v = map(_last_axis_contiguous, (q, k, v))
    out = _like_out(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    with triton_support.device_of(q):
        tile = choose("attention_forward", *_tuning(q, dropout_p))
        (q_tiles, k_tiles, v_tiles), strides, unit = _read_by(tile, "mnn", q, k, v)
        kernel[_grid(q, q.shape[2], tile.block_m)](
            out, lse, q_tiles, k_tiles, v_tiles, *_sizes(q, k), *strides, softmax_scale, *_dropout(dropout_p, seed),
            **_constants(q, tile, dropout_p, unit),
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    dropout_p: float,
    seed: int,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv, laid out as (batch, length, n_heads, head_dim).

    `grads` are the parts of one (batch, length, 3, n_heads, head_dim) tensor to write them into instead.
    """
    from fastgpt.kernels.triton import attention_backward as kernels
    from fastgpt.kernels.triton.attention_tables import choose

    dout, q, k, v = map(_last_axis_contiguous, (dout, q, k, v))
    # The kernel reads the layout that forward wrote, and torch.compile may hand over another.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    dq, dk, dv = grads or tuple(map(_like_out, (q, k, v)))
    pack = {"PACK": 3 if grads else 1}
    delta = torch.empty_like(lse)
    if k.numel() == 0:
        return dq, dk, dv
    with triton_support.device_of(q):
        tuning, sizes = _tuning(q, dropout_p), _sizes(q, k)
        settings = softmax_scale, *_dropout(dropout_p, seed)
        if q.shape[2]:
            tile = choose("attention_backward_dq", *tuning)
            tiles, strides, unit = _read_by(tile, "mmnn", dout, q, k, v)
            kernels.causal_attention_backward_dq_kernel[_grid(q, q.shape[2], tile.block_m)](
                dq, delta, *tiles, out, lse, *sizes, *strides, *settings,
                **_constants(q, tile, dropout_p, unit), **pack,
            )  # fmt: skip
        tile = choose("attention_backward_dkdv", *tuning)
        tiles, strides, unit = _read_by(tile, "mmnn", dout, q, k, v)
        kernels.causal_attention_backward_dkdv_kernel[_grid(q, k.shape[2], tile.block_n)](
            dk, dv, *tiles, lse, delta, *sizes, *strides, *settings,
            **_constants(q, tile, dropout_p, unit), **pack,
        )  # fmt: skip
    return dq, dk, dv


def _last_axis_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _like_out(x: Tensor) -> Tensor:
    batch, n_heads, length, head_dim = x.shape
    return torch.empty(batch, length, n_heads, head_dim, dtype=x.dtype, device=x.device).transpose(1, 2)


def _block_d(q: Tensor) -> int:
    return max(MIN_BLOCK_D, next_power_of_2(q.shape[3]))


def _tuning(q: Tensor, dropout_p: float) -> tuple[str, int, int, bool]:
    return triton_support.chip(q), 8 * q.dtype.itemsize, _block_d(q), dropout_p > 0.0


def _grid(q: Tensor, length: int, block: int) -> tuple[int]:
    return (-(-length // block) * q.shape[0] * q.shape[1],)


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    return q.shape[0] * q.shape[1], q.shape[1], q.shape[2], k.shape[2]


def _read_by(tile: AttentionTile, sides: str, *tensors: Tensor) -> tuple[list[Any], list[int], int]:
    """What the kernel gets for each tensor, the strides and their unit: descriptors where the tile says so and they
    can be, else the tensors. `sides` says which side of the tile each tensor's rows make, m or n."""
    if tile.tma and tma.why_not(*tensors) is None:
        rows = {"m": tile.block_m, "n": tile.block_n}
        block_d = _block_d(tensors[0])
        described = [tma.descriptor(x, rows[side], block_d) for x, side in zip(tensors, sides, strict=True)]
        return described, [0] * 3 * len(tensors), 0
    return [*tensors], *_strides(*tensors)


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """The first three strides of each tensor in units of 8 elements where all allow it, and that unit."""
    strides = [
        # An axis of one element is never stepped along, and its stride may be anything.
        0 if size == 1 else stride
        for tensor in tensors
        for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    ]
    if any(stride % 8 for stride in strides):
        return strides, 1
    return [stride // 8 for stride in strides], 8


def _dropout(dropout_p: float, seed: int) -> tuple[int, int, float]:
    return seed, philox.threshold(dropout_p), philox.scale(dropout_p)


def _constants(q: Tensor, tile: AttentionTile, dropout_p: float, unit: int) -> dict[str, Any]:
    tf32 = q.dtype == torch.float32 and triton_support.tf32_allowed()
    return {
        "HEAD_DIM": q.shape[3],
        "BLOCK_D": _block_d(q),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "DROPOUT": dropout_p > 0.0,
        "PRECISION": "tf32" if tf32 else "ieee",
        "UNIT": unit,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **triton_support.OPTIONS,
    }

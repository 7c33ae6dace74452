"""Chapter 3's attention classes, and its bonus: the same attention in nine other ways.

    SelfAttention_v1 → SelfAttention_v2 → CausalAttention → MultiHeadAttentionWrapper

Plain PyTorch, to be read and timed: softmax(q kᵀ / √head_dim) v, from CausalAttention on without
the future. The end of the road, MultiHeadAttention, stands in `fastgpt.model`.

Source: Raschka, Build a Large Language Model (From Scratch), chapter 3 and its bonus material.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import reference
from fastgpt.config import check_heads
from fastgpt.model import check_length


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: nn.Module | None = None) -> Tensor:
    """softmax(q kᵀ / √head_dim) v over the last two axes; `mask` is not 0 where a key is hidden."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(_cut(mask, q.shape[-2]), -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    return (weights if dropout is None else dropout(weights)) @ v


def _cut(mask: Tensor, n_tokens: int) -> Tensor:
    check_length(n_tokens, mask.shape[0])
    return mask[:n_tokens, :n_tokens].bool()


def _future(context_length: int) -> Tensor:
    return torch.triu(torch.ones(context_length, context_length), diagonal=1)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    batch, n_tokens, width = x.shape
    return x.view(batch, n_tokens, num_heads, width // num_heads).transpose(1, 2)  # (B, H, T, D)


def _join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, T, H * D)


class SelfAttention_v1(nn.Module):
    """Self-attention from three bare matrices; no mask.

    Args:
        d_in: width of the input.
        d_out: width of the output.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.W_query = nn.Parameter(torch.rand(d_in, d_out))
        self.W_key = nn.Parameter(torch.rand(d_in, d_out))
        self.W_value = nn.Parameter(torch.rand(d_in, d_out))

    def forward(self, x: Tensor) -> Tensor:
        """x (n_tokens, d_in) to (n_tokens, d_out)."""
        return _attend(x @ self.W_query, x @ self.W_key, x @ self.W_value)


class SelfAttention_v2(nn.Module):
    """The same from linear layers, whose start values train better.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        qkv_bias: give the projections a bias.
    """

    def __init__(self, d_in: int, d_out: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (n_tokens, d_in) to (n_tokens, d_out)."""
        return _attend(self.W_query(x), self.W_key(x), self.W_value(x))


class CausalAttention(nn.Module):
    """One head that sees no future, with dropout, over a batch.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        context_length: the longest input.
        dropout: share of attention weights that training drops.
        qkv_bias: give the projections a bias.
    """

    mask: Tensor

    def __init__(self, d_in: int, d_out: int, context_length: int, dropout: float, qkv_bias: bool = False) -> None:
        super().__init__()
        self.d_out = d_out
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", _future(context_length))

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, n_tokens, d_in) to (batch, n_tokens, d_out)."""
        q, k, v = self.W_query(x), self.W_key(x), self.W_value(x)
        return _attend(q, k, v, self.mask, self.dropout)


class MultiHeadAttentionWrapper(nn.Module):
    """Several `CausalAttention` heads side by side; the output is num_heads · d_out wide.

    Args:
        d_in, d_out, context_length, dropout, qkv_bias: of each head.
        num_heads: how many heads.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            CausalAttention(d_in, d_out, context_length, dropout, qkv_bias) for _ in range(num_heads)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, n_tokens, d_in) to (batch, n_tokens, num_heads * d_out)."""
        return torch.cat([head(x) for head in self.heads], dim=-1)


class Ch03_MHA_Wrapper(MultiHeadAttentionWrapper):
    """`MultiHeadAttentionWrapper` with an output projection; `d_out` is the width of one head."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__(d_in, d_out, context_length, dropout, num_heads, qkv_bias)
        self.out_proj = nn.Linear(d_out * num_heads, d_out * num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, n_tokens, d_in) to (batch, n_tokens, num_heads * d_out)."""
        out: Tensor = self.out_proj(super().forward(x))
        return out


class Ch03_MHA(reference.MultiHeadAttention):
    """Chapter 3's MultiHeadAttention in plain PyTorch."""


class MHAEinsum(nn.Module):
    """Every product written as an Einstein sum; W_query, W_key, W_value are (d_in, d_out)."""

    mask: Tensor
    bias_q: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        check_heads(d_out, num_heads, ("d_out", "num_heads"))
        self.d_out = d_out
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.W_query = nn.Parameter(torch.randn(d_in, d_out))
        self.W_key = nn.Parameter(torch.randn(d_in, d_out))
        self.W_value = nn.Parameter(torch.randn(d_in, d_out))
        for name in ("bias_q", "bias_k", "bias_v"):
            self.register_parameter(name, nn.Parameter(torch.zeros(d_out)) if qkv_bias else None)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", _future(context_length))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections anew, uniform within ±1/√d_out as the bonus material does."""
        bound = 1.0 / math.sqrt(self.d_out)
        projections = (self.W_query, self.W_key, self.W_value)
        for parameter in (*projections, self.bias_q, self.bias_k, self.bias_v):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, n_tokens, d_in) to (batch, n_tokens, d_out)."""
        q = self._project(x, self.W_query, self.bias_q)
        k = self._project(x, self.W_key, self.bias_k)
        v = self._project(x, self.W_value, self.bias_v)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(_cut(self.mask, x.shape[1]), -torch.inf)
        weights = self.dropout(torch.softmax(scores, dim=-1))
        out: Tensor = self.out_proj(_join_heads(torch.einsum("bhij,bhjd->bhid", weights, v)))
        return out

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        projected = torch.einsum("bti,io->bto", x, weight)
        return _split_heads(projected if bias is None else projected + bias, self.num_heads)


class _JointProjection(nn.Module):
    """Queries, keys and values from one linear layer; what attends is left to the subclass."""

    def __init__(self, d_in: int, d_out: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        check_heads(d_out, num_heads, ("d_out", "num_heads"))
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.d_out = d_out
        self.qkv = nn.Linear(d_in, 3 * d_out, bias=qkv_bias)
        self.proj = nn.Linear(d_out, d_out)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, n_tokens, d_in) to (batch, n_tokens, d_out)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 × (B, H, T, D)
        out: Tensor = self.proj(_join_heads(self._attention(q, k, v)))
        return out

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class MultiHeadAttentionCombinedQKV(_JointProjection):
    """One joint projection, the attention itself written out."""

    mask: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        num_heads: int,
        context_length: int,
        dropout: float = 0.0,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__(d_in, d_out, num_heads, qkv_bias)
        self.context_length = context_length
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", _future(context_length))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, self.mask, self.dropout)


class PyTorchMultiHeadAttention(_JointProjection):
    """One joint projection, then PyTorch's scaled_dot_product_attention.

    Args:
        d_in: width of the input.
        d_out: width of the output, all heads together.
        num_heads: heads; they share `d_out` evenly.
        dropout: share of attention weights that training drops, a number.
        qkv_bias: give the joint projection a bias.
    """

    def __init__(self, d_in: int, d_out: int, num_heads: int, dropout: float = 0.0, qkv_bias: bool = False) -> None:
        super().__init__(d_in, d_out, num_heads, qkv_bias)
        self.dropout = dropout

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)


class MHAPyTorchScaledDotProduct(PyTorchMultiHeadAttention):
    """`PyTorchMultiHeadAttention` with the bonus material's arguments."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        num_heads: int,
        context_length: int,
        dropout: float = 0.0,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__(d_in, d_out, num_heads, dropout, qkv_bias)
        self.context_length = context_length


class MHAPyTorchSDPAWithoutFlash(MHAPyTorchScaledDotProduct):
    """scaled_dot_product_attention with an explicit mask, which keeps PyTorch from flash kernels."""

    mask: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        num_heads: int,
        context_length: int,
        dropout: float = 0.0,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__(d_in, d_out, num_heads, context_length, dropout, qkv_bias)
        self.register_buffer("mask", _future(context_length).bool())

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        # True is a key that is seen: the opposite of the book's mask.
        seen = ~_cut(self.mask, q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout_p)


class MHAPyTorchFlexAttention(MHAPyTorchScaledDotProduct):
    """PyTorch's flex_attention with a causal block mask. It has no dropout.

    Raises:
        ImportError: this PyTorch has no flex_attention (looked for when it is first needed).
        ValueError: in training with a dropout above 0.
    """

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        try:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        except ImportError as error:
            raise ImportError(
                f"This PyTorch, {torch.__version__}, has no usable flex_attention ({error}); "
                f"take MHAPyTorchScaledDotProduct instead."
            ) from error
        if self.training and self.dropout > 0.0:
            raise ValueError(
                f"flex_attention cannot drop attention weights; got dropout={self.dropout} in training. "
                f"Build MHAPyTorchFlexAttention with dropout=0.0, or call .eval()."
            )
        n_tokens = q.shape[2]
        check_length(n_tokens, self.context_length)
        causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, n_tokens, n_tokens, device=str(q.device))
        out: Tensor = flex_attention(q, k, v, block_mask=causal)
        return out


class MHAPyTorchClass(nn.Module):
    """PyTorch's nn.MultiheadAttention, followed by one more projection, as in the bonus material.

    The input must be as wide as the output. With `qkv_bias` every projection has a bias; unlike the
    bonus material, no extra learned key is added, so that the attention stays the book's.
    """

    mask: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        num_heads: int,
        context_length: int,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        need_weights: bool = True,
    ) -> None:
        super().__init__()
        check_heads(d_out, num_heads, ("d_out", "num_heads"))
        if d_in != d_out:
            raise ValueError(
                f"nn.MultiheadAttention needs d_in equal to d_out; got d_in={d_in}, d_out={d_out}. "
                f"Take MultiHeadAttention, which allows both."
            )
        self.context_length = context_length
        self.need_weights = need_weights
        self.multihead_attn = nn.MultiheadAttention(d_out, num_heads, dropout=dropout, bias=qkv_bias, batch_first=True)
        self.proj = nn.Linear(d_out, d_out)
        self.register_buffer("mask", _future(context_length).bool())

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, n_tokens, d_in) to (batch, n_tokens, d_out)."""
        mask = _cut(self.mask, x.shape[1])
        context, _ = self.multihead_attn(x, x, x, attn_mask=mask, need_weights=self.need_weights)
        out: Tensor = self.proj(context)
        return out

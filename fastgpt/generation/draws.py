"""Drawing tokens from a seed: the same tokens on every engine, whatever the other rows and the number of steps a call.

    token = the first of the largest  logit / temperature + G,   G = -log E,  E = -log(1 - U)
    U       (word + 1/2) / 2^32, word the first of Philox4x32-10
    key     seed, low and high 32 bits
    counter token, number of tokens drawn before in this row, row, 1

The maximum of numbers with Gumbel noise G falls on each token with its softmax probability, and the noise of a token is
a function of where it stands. `top_k` leaves out what is below the k-th largest logit; of the others, `top_p` leaves
out those above which the probabilities together reach it. What ties with the last that stays, stays.

`draw_reference` says it in plain PyTorch; kernels/cpu/draw.h and kernels/cuda/decode_choose.cuh draw the same, up to
roundings of logarithm and exponential: another token only where two are within about 1e-6 of each other, or a sum of
probabilities and top_p.

Papers: Gumbel, "Statistical theory of extreme values", 1954; Salmon et al., "Parallel Random Numbers: As Easy as 1, 2,
3", 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops import dispatch, extension, philox


def draw(
    logits: Tensor, inverse_temperature: float, top_k: int | None, seed: int, drawn: int, top_p: float | None = None
) -> Tensor:
    """The next token of each row.

    Args:
        logits: (batch, n_logits); floating point, computed with as float32.
        inverse_temperature: finite, above 0.
        top_k: from 1 to n_logits, or None for no limit.
        seed: any whole number; its lowest 64 bits count.
        drawn: how many tokens were drawn before in each row.
        top_p: above 0 and at most 1; None, as 1, for no limit.

    Returns:
        (batch,) int64, on the device of the logits.
    """
    native = logits.device.type == "cpu" and dispatch.requested() in ("auto", "cpu")
    if not native or extension.why_not("cpu") is not None:
        return draw_reference(logits, inverse_temperature, top_k, seed, drawn, top_p)
    logits = logits.to(torch.float32).contiguous()
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device="cpu")
    extension.load("cpu").draw_tokens(
        tokens.data_ptr(), logits.data_ptr(), *logits.shape, inverse_temperature, top_k or 0,
        1.0 if top_p is None else top_p, unsigned(seed), drawn, extension.num_threads(),
    )  # fmt: skip
    return tokens


def draw_reference(
    logits: Tensor, inverse_temperature: float, top_k: int | None, seed: int, drawn: int, top_p: float | None = None
) -> Tensor:
    """`draw` in plain PyTorch, on any device."""
    logits = logits.float()
    least = -torch.inf if top_k is None else logits.topk(top_k).values[:, -1:]
    kept = ~(logits < least)
    if top_p is not None and top_p < 1:
        kept = kept & ~(logits < _last_needed(logits.masked_fill(~kept, -torch.inf), inverse_temperature, top_p))
    row, token = kept.nonzero(as_tuple=True)
    perturbed = torch.full_like(logits, -torch.inf)
    perturbed[row, token] = logits[row, token] * inverse_temperature + noise(token, row, drawn, seed)
    return perturbed.argmax(dim=1)


def _last_needed(logits: Tensor, inverse_temperature: float, top_p: float) -> Tensor:
    """The least logit above which the probabilities have not reached top_p, (batch, 1)."""
    ordered = logits.sort(dim=1, descending=True).values
    probabilities = torch.softmax((ordered - ordered[:, :1]) * inverse_temperature, dim=1)
    above = probabilities.cumsum(dim=1, dtype=torch.float64) - probabilities
    # The largest is needed in any case, also where it is infinite or NaN and the others become NaN.
    return ordered.gather(1, (above < top_p).sum(dim=1, keepdim=True).clamp(min=1) - 1)


def noise(token: Tensor, row: Tensor, drawn: int, seed: int) -> Tensor:
    """Gumbel noise of tokens, float32.

    Args:
        token, row: int64, of one shape.
        drawn, seed: see `draw`.
    """
    counter = (token, torch.full_like(token, drawn), row, torch.ones_like(token))
    word = philox.philox(counter, unsigned(seed))[0]
    uniform = (word.float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def unsigned(seed: int) -> int:
    """The lowest 64 bits of a seed."""
    return seed & 0xFFFFFFFFFFFFFFFF

"""Chapter 5: cross-entropy of next-token predictions, over one batch and over a loader."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from fastgpt import fusion
from fastgpt.acceleration.joined import FusedModel, is_swapped
from fastgpt.model import GPTModel
from fastgpt.model_fast import GPTModelFast

_OWN = (GPTModel, GPTModelFast)


def calc_loss_batch(
    input_batch: Tensor,
    target_batch: Tensor,
    model: Callable[[Tensor], Tensor],
    device: torch.device | str | int,
) -> Tensor:
    """Mean cross-entropy over all positions of a batch.

    The head and the loss of fastgpt's own models, and of accelerated ones, are one op, so that the logits of a batch
    never stand in memory.

    Args:
        input_batch: token ids, (batch, n_tokens), int64.
        target_batch: the ids to predict, of the same shape; positions with -100 do not count.
        model: token ids to logits, (batch, n_tokens, vocab_size).
        device: where the model is.

    Returns:
        A scalar with a graph; nan when no position counts.
    """
    inputs, targets = input_batch.to(device), target_batch.to(device)
    if isinstance(model, _OWN) and any(fusion.is_plain(model, own) for own in _OWN):
        return fusion.loss(model.hidden_states(inputs), model.out_head, targets)
    if is_swapped(model, FusedModel):
        hidden = cast(FusedModel, model).hidden_or_none(inputs)
        if hidden is not None:
            return fusion.loss(hidden, cast(FusedModel, model).output_head, targets)
    logits = model(inputs)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def calc_loss_loader(
    data_loader: Any,
    model: Callable[[Tensor], Tensor],
    device: torch.device | str | int,
    num_batches: int | None = None,
) -> float:
    """Mean of the batch means over (the first batches of) a loader.

    The model's mode is left as it is, and gradients are recorded unless the caller forbids it, as in the book. The
    device is waited for once, at the end.

    Args:
        data_loader: gives (input_batch, target_batch), see `calc_loss_batch`; has a length.
        model: token ids to logits.
        device: where the model is.
        num_batches: how many batches to read, at most those there are; None for all.

    Returns:
        A float; nan for an empty loader.
    """
    count = len(data_loader) if num_batches is None else min(num_batches, len(data_loader))
    if count == 0:
        return float("nan")
    losses = [
        calc_loss_batch(inputs, targets, model, device).detach()
        for inputs, targets in itertools.islice(data_loader, count)
    ]
    # Added up as Python floats, one after the other, so that the mean is the book's to the last bit.
    return sum(torch.stack(losses).tolist()) / count

"""Chapter 5: how well the model predicts, and what it writes, while it is being trained."""

from __future__ import annotations

from typing import Any

import torch

from fastgpt.generation import generate_text_simple
from fastgpt.tokenizer import text_to_token_ids, token_ids_to_text
from fastgpt.training.loss import calc_loss_loader

_SAMPLE_TOKENS = 50


def evaluate_model(
    model: torch.nn.Module,
    train_loader: Any,
    val_loader: Any,
    device: torch.device | str | int,
    eval_iter: int | None,
) -> tuple[float, float]:
    """Losses on both loaders, without dropout and without gradients; leaves the model in training mode.

    Args:
        model: token ids to logits.
        train_loader, val_loader: see `calc_loss_loader`.
        device: where the model is.
        eval_iter: batches to read of each loader; None for all.

    Returns:
        (training loss, validation loss), floats.
    """
    model.eval()
    try:
        with torch.no_grad():
            train_loss = calc_loss_loader(train_loader, model, device, num_batches=eval_iter)
            val_loss = calc_loss_loader(val_loader, model, device, num_batches=eval_iter)
    finally:
        model.train()
    return train_loss, val_loss


def generate_and_print_sample(
    model: torch.nn.Module, tokenizer: Any, device: torch.device | str | int, start_context: str
) -> None:
    """Print a text and the 50 likeliest tokens after it, on one line; leaves the model in training mode.

    A fastgpt model writes with the key-value cache on its own live weights, any other model with the plain loop; the
    tokens are the same.

    Args:
        model: has `pos_emb`, whose rows are the longest context.
        tokenizer: see `fastgpt.get_tokenizer`.
        device: where the model is.
        start_context: the text to go on from.
    """
    context_size: int = model.pos_emb.weight.shape[0]  # type: ignore[assignment, union-attr, index]
    prompt = text_to_token_ids(start_context, tokenizer).to(device)
    model.eval()
    try:
        token_ids = generate_text_simple(model, prompt, max_new_tokens=_SAMPLE_TOKENS, context_size=context_size)
    finally:
        model.train()
    print(token_ids_to_text(token_ids, tokenizer).replace("\n", " "))

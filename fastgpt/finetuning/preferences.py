"""Preference tuning with DPO (chapter 7's bonus): the chosen answer likelier, the rejected one less likely.

    loss = -log σ(β · [(log π(chosen) - log π(rejected)) - (log π_ref(chosen) - log π_ref(rejected))])

where log π is the mean over the tokens of an answer, and π_ref is the model before the tuning.

Paper: Rafailov et al. 2023, "Direct Preference Optimization".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from fastgpt.finetuning.instructions import format_input, format_prompt
from fastgpt.training import generate_and_print_sample

Model = Callable[[Tensor], Tensor]

# Newlines between the prompt and the heading of the answer. They never differ, so they are masked with the prompt.
_SEPARATOR_TOKENS = 2


class PreferenceDataset(Dataset[dict[str, list[int]]]):
    """Entries with two answers, as token ids.

    Args:
        data: entries with "instruction", "input", "chosen" and "rejected".
        tokenizer: see `fastgpt.get_tokenizer`.

    Attributes:
        data: the entries.
        encoded_texts: a dict for each: "prompt", and "chosen" and "rejected" with the prompt before them.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], tokenizer: Any) -> None:
        self.data = data
        self.encoded_texts: list[dict[str, list[int]]] = [
            {
                "prompt": tokenizer.encode(format_input(entry)),
                "chosen": tokenizer.encode(f"{format_prompt(entry)}{entry['chosen']}"),
                "rejected": tokenizer.encode(f"{format_prompt(entry)}{entry['rejected']}"),
            }
            for entry in data
        ]

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """The ids of entry `index`."""
        return self.encoded_texts[index]

    def __len__(self) -> int:
        return len(self.encoded_texts)


def custom_collate_fn(
    batch: Sequence[Mapping[str, Sequence[int]]],
    pad_token_id: int = 50256,
    allowed_max_length: int | None = None,
    mask_prompt_tokens: bool = True,
    device: torch.device | str | int = "cpu",
) -> dict[str, Any]:
    """Both answers of each entry as rows of one length, with masks of the tokens that count.

    Args:
        batch: items of `PreferenceDataset`.
        pad_token_id: what fills the rows; all are at least one longer than the longest answer.
        allowed_max_length: cut rows to this length.
        mask_prompt_tokens: leave the prompt, and the newlines after it, out of the masks.
        device: where the tensors go.

    Returns:
        "prompt": a list of (prompt_len,) int64 on the CPU; "chosen", "rejected": (batch, longest + 1) int64;
        "chosen_mask", "rejected_mask": the same shape, bool.
    """
    collated: dict[str, Any] = {"prompt": [torch.tensor(item["prompt"]) for item in batch]}
    width = max((len(item[key]) for item in batch for key in ("chosen", "rejected")), default=0) + 1
    for key in ("chosen", "rejected"):
        rows = [[*item[key], *[pad_token_id] * (width - len(item[key]))] for item in batch]
        first = [len(item["prompt"]) + _SEPARATOR_TOKENS if mask_prompt_tokens else 0 for item in batch]
        columns = torch.arange(width)
        lengths = torch.tensor([len(item[key]) for item in batch])
        mask = (columns >= torch.tensor(first)[:, None]) & (columns < lengths[:, None])
        collated[key] = torch.tensor(rows, dtype=torch.int64)[:, :allowed_max_length].to(device)
        collated[f"{key}_mask"] = mask[:, :allowed_max_length].to(device)
    return collated


def compute_logprobs(logits: Tensor, labels: Tensor, selection_mask: Tensor | None = None) -> Tensor:
    """Mean log-probability of the tokens of each row.

    Args:
        logits: (batch, n_tokens, vocab_size).
        labels: the token ids that were the input, (batch, n_tokens); each is predicted from the one before it.
        selection_mask: which of the labels count, (batch, n_tokens) bool; None for all.

    Returns:
        (batch,); nan for a row in which nothing counts.
    """
    targets = labels[:, 1:]
    # cross_entropy is -log_softmax at the target, without the (B, T, V) log-probabilities in memory twice.
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
    logprobs = -losses.view(targets.shape)
    if selection_mask is None:
        return logprobs.mean(dim=-1)
    mask = selection_mask[:, 1:]
    return (logprobs * mask).sum(dim=-1) / mask.sum(dim=-1)


def compute_dpo_loss(
    model_chosen_logprobs: Tensor,
    model_rejected_logprobs: Tensor,
    reference_chosen_logprobs: Tensor,
    reference_rejected_logprobs: Tensor,
    beta: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The DPO loss of a batch, and how far the model has moved from the reference.

    Args:
        model_chosen_logprobs, model_rejected_logprobs: of the model that is trained, (batch,).
        reference_chosen_logprobs, reference_rejected_logprobs: of the model before, (batch,).
        beta: how strongly the model is held to the reference; the book takes 0.1 to 0.5.

    Returns:
        (loss, reward of the chosen answers, reward of the rejected ones), scalars; rewards are log-probabilities
        relative to the reference, without a graph.
    """
    margin = (model_chosen_logprobs - model_rejected_logprobs) - (
        reference_chosen_logprobs - reference_rejected_logprobs
    )
    chosen_rewards = (model_chosen_logprobs - reference_chosen_logprobs).detach()
    rejected_rewards = (model_rejected_logprobs - reference_rejected_logprobs).detach()
    return -functional.logsigmoid(beta * margin).mean(), chosen_rewards.mean(), rejected_rewards.mean()


def compute_dpo_loss_batch(
    batch: Mapping[str, Any], policy_model: Model, reference_model: Model, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`compute_dpo_loss` of a batch of `custom_collate_fn`.

    Args:
        batch: on the models' device.
        policy_model: the model that is trained.
        reference_model: the model before; runs without a graph.
        beta: see `compute_dpo_loss`.

    Returns:
        As `compute_dpo_loss`.
    """
    chosen = _answer_logprobs(batch, "chosen", policy_model)
    rejected = _answer_logprobs(batch, "rejected", policy_model)
    with torch.no_grad():
        reference_chosen = _answer_logprobs(batch, "chosen", reference_model)
        reference_rejected = _answer_logprobs(batch, "rejected", reference_model)
    return compute_dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta)


def compute_dpo_loss_loader(
    data_loader: Any, policy_model: Model, reference_model: Model, beta: float, num_batches: int | None = None
) -> tuple[float, float, float]:
    """Means of loss and rewards over (the first batches of) a loader.

    Args:
        data_loader: gives batches of `custom_collate_fn`; has a length.
        policy_model, reference_model, beta: as for `compute_dpo_loss_batch`.
        num_batches: how many batches to read, at most those there are; None for all.

    Returns:
        (loss, reward of the chosen answers, reward of the rejected ones), floats; nan for an empty loader.
    """
    count = len(data_loader) if num_batches is None else min(num_batches, len(data_loader))
    if count <= 0:
        return float("nan"), float("nan"), float("nan")
    rows = [
        torch.stack([value.detach() for value in compute_dpo_loss_batch(batch, policy_model, reference_model, beta)])
        for batch in itertools.islice(data_loader, count)
    ]
    loss, chosen, rejected = torch.stack(rows).double().mean(dim=0).tolist()
    return loss, chosen, rejected


def evaluate_dpo_loss_loader(
    policy_model: nn.Module,
    reference_model: Model,
    train_loader: Any,
    val_loader: Any,
    beta: float,
    eval_iter: int | None,
) -> dict[str, float]:
    """Loss and rewards on both loaders, without dropout and gradients; leaves the policy model in training mode.

    Args:
        policy_model, reference_model, train_loader, val_loader, beta: see `compute_dpo_loss_loader`.
        eval_iter: batches to read of each loader; None for all.

    Returns:
        "train_loss", "train_chosen_reward", "train_rejected_reward", and the same with "val_".
    """
    measured: dict[str, float] = {}
    policy_model.eval()
    try:
        with torch.no_grad():
            for part, loader in (("train", train_loader), ("val", val_loader)):
                values = compute_dpo_loss_loader(loader, policy_model, reference_model, beta, num_batches=eval_iter)
                names = ("loss", "chosen_reward", "rejected_reward")
                measured |= {f"{part}_{name}": value for name, value in zip(names, values, strict=True)}
    finally:
        policy_model.train()
    return measured


def train_model_dpo_simple(
    policy_model: nn.Module,
    reference_model: Model,
    train_loader: Any,
    val_loader: Any,
    optimizer: torch.optim.Optimizer,
    num_epochs: int,
    beta: float,
    eval_freq: int,
    eval_iter: int | None,
    start_context: str,
    tokenizer: Any,
) -> dict[str, list[float]]:
    """Train with DPO, evaluate every `eval_freq` steps from step 0, print a sample after each epoch.

    Args:
        policy_model: the model that is trained; has `pos_emb`.
        reference_model: the model before, in evaluation mode.
        train_loader, val_loader: give batches of `custom_collate_fn` on the models' device.
        optimizer: holds the policy model's parameters.
        num_epochs: passes over `train_loader`.
        beta: see `compute_dpo_loss`.
        eval_freq: steps from one evaluation to the next.
        eval_iter: batches that an evaluation reads of each loader.
        start_context: the text that samples go on from.
        tokenizer: see `fastgpt.get_tokenizer`.

    Returns:
        Lists with one entry an evaluation: "train_losses", "train_chosen_rewards", "train_rejected_rewards", the same
        with "val_", and "tokens_seen".
    """
    device = next(policy_model.parameters()).device
    singular = [f"{part}_{name}" for part in ("train", "val") for name in ("loss", "chosen_reward", "rejected_reward")]
    plural = {name: f"{name}es" if name.endswith("loss") else f"{name}s" for name in singular}
    tracking: dict[str, list[float]] = {name: [] for name in (*plural.values(), "tokens_seen")}
    tokens_seen, step = 0, 0
    for epoch in range(1, num_epochs + 1):
        policy_model.train()
        for batch in train_loader:
            optimizer.zero_grad()
            compute_dpo_loss_batch(batch, policy_model, reference_model, beta)[0].backward()
            optimizer.step()
            tokens_seen += batch["chosen"].numel()
            if step % eval_freq == 0:
                row = evaluate_dpo_loss_loader(policy_model, reference_model, train_loader, val_loader, beta, eval_iter)
                for name in singular:
                    tracking[plural[name]].append(row[name])
                tracking["tokens_seen"].append(tokens_seen)
                print(_line(epoch, step, row))
            step += 1
        generate_and_print_sample(policy_model, tokenizer, device, start_context)
    return tracking


def _answer_logprobs(batch: Mapping[str, Any], key: str, model: Model) -> Tensor:
    return compute_logprobs(model(batch[key]), batch[key], batch[f"{key}_mask"])


def _line(epoch: int, step: int, row: Mapping[str, float]) -> str:
    margins = [row[f"{part}_chosen_reward"] - row[f"{part}_rejected_reward"] for part in ("train", "val")]
    return (
        f"Ep {epoch} (Step {step:06d}): Train loss {row['train_loss']:.3f}, Val loss {row['val_loss']:.3f}, "
        f"Train reward margins {margins[0]:.3f}, Val reward margins {margins[1]:.3f}"
    )

"""Chapter 7's bonus, preference tuning with DPO, under the names of its notebook."""

from fastgpt.finetuning.instructions import format_input
from fastgpt.finetuning.preferences import (
    PreferenceDataset,
    compute_dpo_loss,
    compute_dpo_loss_batch,
    compute_dpo_loss_loader,
    compute_logprobs,
    custom_collate_fn,
    evaluate_dpo_loss_loader,
    train_model_dpo_simple,
)

__all__ = [
    "PreferenceDataset",
    "compute_dpo_loss",
    "compute_dpo_loss_batch",
    "compute_dpo_loss_loader",
    "compute_logprobs",
    "custom_collate_fn",
    "evaluate_dpo_loss_loader",
    "format_input",
    "train_model_dpo_simple",
]

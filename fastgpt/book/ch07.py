"""Chapter 7, instructions: prompts, batches, the judge behind Ollama, and (bonus) preference tuning with DPO.

The bonus has a `custom_collate_fn` of its own for pairs of answers: `fastgpt.book.ch07_dpo`. Training is chapter 5's.
"""

from fastgpt.finetuning.downloads import download_and_load_file
from fastgpt.finetuning.instructions import (
    InstructionDataset,
    custom_collate_draft_1,
    custom_collate_draft_2,
    custom_collate_fn,
    format_input,
)
from fastgpt.finetuning.preferences import (
    PreferenceDataset,
    compute_dpo_loss,
    compute_dpo_loss_batch,
    compute_dpo_loss_loader,
    compute_logprobs,
    evaluate_dpo_loss_loader,
    train_model_dpo_simple,
)
from fastgpt.finetuning.scoring import check_if_running, generate_model_scores, query_model

__all__ = [
    "InstructionDataset",
    "PreferenceDataset",
    "check_if_running",
    "compute_dpo_loss",
    "compute_dpo_loss_batch",
    "compute_dpo_loss_loader",
    "compute_logprobs",
    "custom_collate_draft_1",
    "custom_collate_draft_2",
    "custom_collate_fn",
    "download_and_load_file",
    "evaluate_dpo_loss_loader",
    "format_input",
    "generate_model_scores",
    "query_model",
    "train_model_dpo_simple",
]

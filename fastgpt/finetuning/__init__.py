"""Fine-tuning: chapter 6's classifier, chapter 7's assistant, DPO, and appendix E's LoRA.

classification, instructions, preferences, scoring, downloads   the book's functions by their names
lora, adapters                                                  LoRA layers; their files
datasets                                                        messages and instructions from files, or embedded
classifier, assistant                                           whole runs: `fastgpt finetune`
settings, base_model, loop                                      what these runs are made of
"""

from fastgpt.finetuning.adapters import load_adapter, save_adapter
from fastgpt.finetuning.assistant import InstructionResult, answer, finetune_instructions
from fastgpt.finetuning.classification import last_logits
from fastgpt.finetuning.classifier import Classifier, ClassifierResult, finetune_classifier, load_classifier
from fastgpt.finetuning.datasets import load_instructions, load_messages, read_instructions, read_messages
from fastgpt.finetuning.instructions import format_input, format_prompt
from fastgpt.finetuning.lora import LinearWithLoRA, LoRALayer, merge_lora, replace_linear_with_lora
from fastgpt.finetuning.resuming import resume_finetuning
from fastgpt.finetuning.settings import ClassifierSettings, InstructionSettings

__all__ = [
    "Classifier",
    "ClassifierResult",
    "ClassifierSettings",
    "InstructionResult",
    "InstructionSettings",
    "LinearWithLoRA",
    "LoRALayer",
    "answer",
    "finetune_classifier",
    "finetune_instructions",
    "format_input",
    "format_prompt",
    "last_logits",
    "load_adapter",
    "load_classifier",
    "load_instructions",
    "load_messages",
    "merge_lora",
    "read_instructions",
    "read_messages",
    "replace_linear_with_lora",
    "resume_finetuning",
    "save_adapter",
]

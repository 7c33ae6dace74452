"""Chapter 7: instructions as text, as a dataset, and as padded batches. Training itself is chapter 5's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

_PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
RESPONSE = "### Response:"


def format_input(entry: Mapping[str, Any]) -> str:
    """The prompt of an entry in Alpaca's form: preamble, instruction, and the input if there is one.

    Args:
        entry: "instruction" and "input"; the input may be "".

    Returns:
        The text, without a newline at its end and without the response.
    """
    prompt = f"{_PREAMBLE}\n\n### Instruction:\n{entry['instruction']}"
    return f"{prompt}\n\n### Input:\n{entry['input']}" if entry["input"] else prompt


def format_prompt(entry: Mapping[str, Any]) -> str:
    """`format_input` and the heading after which the model is to answer."""
    return f"{format_input(entry)}\n\n{RESPONSE}\n"


def extract_response(generated_text: str, input_text: str) -> str:
    """The answer in a generated text: what stands after the prompt, without the heading (chapter 7's rule).

    Args:
        generated_text: prompt and answer.
        input_text: `format_input` of the entry.
    """
    return generated_text[len(input_text) :].replace(RESPONSE, "").strip()


class InstructionDataset(Dataset[list[int]]):
    """Prompts with their answers, as lists of token ids.

    Args:
        data: entries with "instruction", "input" and "output".
        tokenizer: see `fastgpt.get_tokenizer`.

    Attributes:
        data: the entries.
        encoded_texts: a list of token ids for each.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], tokenizer: Any) -> None:
        self.data = data
        self.encoded_texts: list[list[int]] = [
            tokenizer.encode(f"{format_prompt(entry)}{entry['output']}") for entry in data
        ]

    def __getitem__(self, index: int) -> list[int]:
        """The ids of entry `index`."""
        return self.encoded_texts[index]

    def __len__(self) -> int:
        return len(self.encoded_texts)


def custom_collate_draft_1(
    batch: Sequence[Sequence[int]], pad_token_id: int = 50256, device: torch.device | str | int = "cpu"
) -> Tensor:
    """Inputs of one length: each row padded to the longest.

    Args:
        batch: token ids of each row.
        pad_token_id: what fills the rows.
        device: where the result goes.

    Returns:
        (batch, longest), int64.
    """
    return _padded(batch, pad_token_id)[:, :-1].to(device)


def custom_collate_draft_2(
    batch: Sequence[Sequence[int]], pad_token_id: int = 50256, device: torch.device | str | int = "cpu"
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, which are the inputs one token later.

    Args:
        batch, pad_token_id, device: as for `custom_collate_draft_1`.

    Returns:
        (inputs, targets), both (batch, longest), int64.
    """
    padded = _padded(batch, pad_token_id)
    return padded[:, :-1].to(device), padded[:, 1:].to(device)


def custom_collate_fn(
    batch: Sequence[Sequence[int]],
    pad_token_id: int = 50256,
    ignore_index: int = -100,
    allowed_max_length: int | None = None,
    device: torch.device | str | int = "cpu",
) -> tuple[Tensor, Tensor]:
    """Inputs and targets; of the padding, only the first one counts in the loss, as the end of the text.

        ids        5 6              pad 0, longest row 5
        inputs     5 6 0 0 0
        targets    6 0 -100 -100 -100

    Args:
        batch, pad_token_id, device: as for `custom_collate_draft_1`.
        ignore_index: what stands in targets that do not count.
        allowed_max_length: cut rows to this length.

    Returns:
        (inputs, targets), both (batch, longest or allowed_max_length), int64.
    """
    padded = _padded(batch, pad_token_id)
    inputs, targets = padded[:, :-1], padded[:, 1:].clone()
    padding = targets == pad_token_id
    targets[padding & (padding.cumsum(dim=1) > 1)] = ignore_index
    return inputs[:, :allowed_max_length].to(device), targets[:, :allowed_max_length].to(device)


def _padded(batch: Sequence[Sequence[int]], pad_token_id: int) -> Tensor:
    """Rows with at least one padding token each, (batch, longest + 1)."""
    width = max(map(len, batch)) + 1
    return torch.tensor([[*ids, *[pad_token_id] * (width - len(ids))] for ids in batch], dtype=torch.int64)

"""A GPT learns to follow instructions: `finetune_instructions`, and the answers of the result (chapter 7).

result = finetune_instructions(InstructionSettings(base="gpt2", out_dir="runs/assistant"))
answer(result.model, result.tokenizer, [{"instruction": "Name a color.", "input": ""}])
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.finetuning.base_model import OrdinaryTokenizer, begin_with, choose_trainable
from fastgpt.finetuning.datasets import Entry, load_instructions, read_instructions, split_instructions
from fastgpt.finetuning.instructions import InstructionDataset, custom_collate_fn, format_prompt
from fastgpt.finetuning.loop import FinetuneEvaluation, Loop, Task, own_random_numbers
from fastgpt.finetuning.settings import InstructionSettings, resolve
from fastgpt.generation import Generator
from fastgpt.model import GPTModel
from fastgpt.training import Reporter, calc_loss_batch
from fastgpt.weights.files import write_text

ANSWERS = "answers.json"
_ROWS_AT_ONCE = 8
_IGNORED = -100


@dataclasses.dataclass(frozen=True)
class InstructionResult:
    """What a run has come to.

    Attributes:
        model: with the best weights, in evaluation mode; after an interruption, with the newest.
        tokenizer: of the model.
        settings: with everything filled in.
        n_train, n_validation, n_test: entries of each part.
        losses: training loss of each step.
        evaluations: the history.
        test_loss: on the test part; nan after an interruption.
        answers: entries of the test part with the model's answer as "model_response", as chapter 7 keeps them.
        interrupted: Ctrl-C ended it early.
        seconds: training alone, without evaluations, in this process.
    """

    model: GPTModel
    tokenizer: OrdinaryTokenizer
    settings: InstructionSettings
    n_train: int
    n_validation: int
    n_test: int
    losses: tuple[float, ...]
    evaluations: tuple[FinetuneEvaluation, ...]
    test_loss: float
    answers: tuple[Entry, ...]
    interrupted: bool
    seconds: float


def finetune_instructions(
    settings: InstructionSettings, *, reporter: Reporter | None = None, resume: bool = False
) -> InstructionResult:
    """Train a model to follow instructions, and let it answer its test part.

    torch's random generators are seeded for the run, and afterwards as they were before. best.safetensors in the folder
    of the run opens with `fastgpt.weights.load_model`; answers.json holds the answers.

    Args:
        settings: see `InstructionSettings`.
        reporter: hears what happens; silent when None. `fastgpt.training.terminal_reporter()` shows it.
        resume: go on with the run in `out_dir`, which has these settings.

    Returns:
        The model, its answers and its history.

    Raises:
        FileExistsError: `out_dir` holds a run already, and `resume` is False.
        FileNotFoundError, ValueError: the data, the base model or a setting cannot be used.
        DivergedError: the loss has become nan or infinite.
    """
    reporter = reporter or Reporter()
    settings = resolve(settings, trainable_with_base="all")
    entries = load_instructions() if settings.data is None else read_instructions(settings.data)
    parts = split_instructions(entries, settings.train_frac, settings.test_frac)
    if not all(parts):
        sizes = ", ".join(map(str, map(len, parts)))
        raise ValueError(f"One part is empty (training, validation, test: {sizes} entries); give more or other shares.")
    with own_random_numbers(settings.seed, settings.device):
        model, config, tokenizer = begin_with(settings)
        choose_trainable(model, settings)
        model.to(settings.device)
        batches = _Batches(model, tokenizer, settings, config["context_length"])
        train, validation, test = (InstructionDataset(part, tokenizer) for part in parts)
        task = Task(
            n_rows=len(train),
            tokens_per_row=round(sum(map(len, train.encoded_texts)) / len(train)),
            loss=lambda rows: batches.loss([train[i] for i in rows]),
            measure=lambda: (batches.mean_loss(validation), None),
            info={
                "task": settings.task,
                "config": config,
                "tokenizer": tokenizer.name,
                "data_crc32": zlib.crc32(json.dumps(entries).encode()),
            },
        )
        loop = Loop(settings, model, task, reporter)
        interrupted = loop.run(resume=resume)
        test_loss = math.nan
        answers: tuple[Entry, ...] = ()
        if not interrupted:
            test_loss = batches.mean_loss(test)
            answers = _answer_part(model, tokenizer, settings, parts[2], reporter)
    return InstructionResult(
        model=model,
        tokenizer=tokenizer,
        settings=settings,
        n_train=len(train),
        n_validation=len(validation),
        n_test=len(test),
        losses=tuple(loop.losses()),
        evaluations=tuple(loop.evaluations),
        test_loss=test_loss,
        answers=answers,
        interrupted=interrupted,
        seconds=loop.seconds,
    )


def answer(
    model: Any,
    tokenizer: Any,
    entries: Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
) -> list[str]:
    """Let a model answer instructions, several at once, prompts of different lengths together.

    Args:
        model: a GPT; its mode stays as it is.
        tokenizer: has `encode`, `decode` and `eot_token`, the token that ends an answer.
        entries: "instruction" and "input".
        max_new_tokens: the longest answer; one also ends where the model's context is full.
        temperature, top_k, seed: see `fastgpt.Generator.generate`.

    Returns:
        The answers; "" for a prompt that is longer than the model's context.
    """
    generator, context = Generator(model), int(model.pos_emb.weight.shape[0])
    prompts = [tokenizer.encode(format_prompt(entry)) for entry in entries]
    answers = [""] * len(prompts)
    # Neighbours in length share a batch, so that few positions are padding.
    order = sorted((i for i, ids in enumerate(prompts) if len(ids) <= context), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), _ROWS_AT_ONCE):
        rows = order[first : first + _ROWS_AT_ONCE]
        finished = generator.generate(
            [prompts[i] for i in rows],
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            eos_id=tokenizer.eot_token,
            seed=seed,
            overflow="stop",
        )
        for i, ids in zip(rows, finished, strict=True):
            answers[i] = tokenizer.decode(ids[len(prompts[i]) :].tolist()).strip()
    return answers


class _Batches:
    """Entries as padded batches, and their loss."""

    def __init__(
        self, model: GPTModel, tokenizer: OrdinaryTokenizer, settings: InstructionSettings, context: int
    ) -> None:
        self.model, self.device, self.batch_size = model, settings.device, settings.batch_size
        self.pad_token_id = tokenizer.eot_token
        if settings.max_length is not None and settings.max_length > context:
            raise ValueError(f"max_length is {settings.max_length}, but the model's context_length is {context}.")
        self.max_length = settings.max_length or context

    def loss(self, rows: Sequence[list[int]]) -> Tensor:
        """Chapter 5's loss of rows; padding does not count."""
        return calc_loss_batch(*self._collate(rows), self.model, self.device)

    @torch.no_grad()
    def mean_loss(self, part: InstructionDataset) -> float:
        """Mean over all tokens that count."""
        total, count = 0.0, 0
        for first in range(0, len(part), self.batch_size):
            inputs, targets = self._collate(part.encoded_texts[first : first + self.batch_size])
            counted = int((targets != _IGNORED).sum())
            total += calc_loss_batch(inputs, targets, self.model, self.device).item() * counted
            count += counted
        return total / count

    def _collate(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        return custom_collate_fn(
            rows, self.pad_token_id, allowed_max_length=self.max_length, ignore_index=_IGNORED, device=self.device
        )


def _answer_part(
    model: GPTModel,
    tokenizer: OrdinaryTokenizer,
    settings: InstructionSettings,
    part: Sequence[Entry],
    reporter: Reporter,
) -> tuple[Entry, ...]:
    asked = part if settings.answers is None else part[: settings.answers]
    if asked:
        reporter.message(f"Answering {len(asked)} entries of the test part ...")
    texts = answer(model, tokenizer, asked, max_new_tokens=settings.answer_tokens)
    answers = tuple({**entry, "model_response": text} for entry, text in zip(asked, texts, strict=True))
    if settings.out_dir is not None:
        write_text(Path(settings.out_dir) / ANSWERS, json.dumps(answers, indent=2, ensure_ascii=False) + "\n")
    return answers

"""Going on with an interrupted fine-tuning run of either kind."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from fastgpt.finetuning.assistant import InstructionResult, finetune_instructions
from fastgpt.finetuning.classifier import ClassifierResult, finetune_classifier
from fastgpt.finetuning.loop import LAST
from fastgpt.finetuning.settings import ClassifierSettings, FinetuneSettings, InstructionSettings
from fastgpt.training import Reporter
from fastgpt.training.checkpoint import read_info
from fastgpt.weights.files import CheckpointError

_KINDS: dict[str, type[FinetuneSettings]] = {kind.task: kind for kind in (ClassifierSettings, InstructionSettings)}


def resume_finetuning(
    out_dir: str | os.PathLike[str], *, reporter: Reporter | None = None, device: str | None = None
) -> ClassifierResult | InstructionResult:
    """Go on with an interrupted run from its newest checkpoint, with its own settings and data.

    Args:
        out_dir: the folder of the run; it may have been moved. Data and base model must be where they were.
        reporter: as for `finetune_classifier`.
        device: another device than before.

    Returns:
        As the run itself; the history begins with its first step. A finished run is evaluated again.

    Raises:
        FileNotFoundError: there is no checkpoint, or no data any more.
        CheckpointError: the checkpoint is damaged, or data or model are not those that the run began with.
    """
    path = Path(out_dir) / LAST
    info = read_info(path)
    kind = _KINDS.get(str(info.get("task")))
    if kind is None or not isinstance(info.get("settings"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of a fine-tuning run.")
    unknown = sorted(set(info["settings"]) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise CheckpointError(f"{path} has settings unknown here: {', '.join(unknown)}. Is it of a newer fastgpt?")
    values: dict[str, Any] = {**info["settings"], "out_dir": str(out_dir)}
    settings = kind(**values | ({} if device is None else {"device": device}))
    if isinstance(settings, ClassifierSettings):
        return finetune_classifier(settings, reporter=reporter, resume=True)
    assert isinstance(settings, InstructionSettings)
    return finetune_instructions(settings, reporter=reporter, resume=True)

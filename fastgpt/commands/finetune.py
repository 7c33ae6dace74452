"""`fastgpt finetune classify` and `fastgpt finetune instruct`: chapters 6 and 7."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgpt.finetuning import ClassifierResult, InstructionResult
    from fastgpt.training import Reporter

EXAMPLES = """\
examples:
  fastgpt finetune classify                                  on the small spam/ham set inside, from random weights
  fastgpt finetune classify --data SMSSpamCollection --base gpt2-folder --out runs/spam
  fastgpt finetune instruct --data instruction-data.json --base gpt2-folder --lora --out runs/assistant
  fastgpt finetune --resume runs/spam

then:  fastgpt classify --model runs/spam "You have won!"      fastgpt chat --model runs/assistant
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that both tasks share."""
    parser.add_argument("task", nargs="?", choices=("classify", "instruct"), help="what the model is to learn")
    parser.add_argument("--data", metavar="FILE", help="classify: label<TAB>text lines, or .csv; instruct: .json")
    parser.add_argument("--base", metavar="PATH", help="a trained model: run, file, Hugging Face or OpenAI folder")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default runs/classify or runs/instruct)")
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, with its own settings")
    parser.add_argument("--tokenizer", default="auto", help="of a model with random weights: gpt2, story, byte or auto")
    parser.add_argument("--lora", action="store_true", help="train LoRA layers only (appendix E)")
    parser.add_argument("--epochs", type=int, help="passes over the training part (default 5, instruct 2)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step (default 8)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default 5e-5 with --base, else 5e-4)")
    parser.add_argument("--max-length", type=int, help="tokens a row at most")
    parser.add_argument("--seed", type=int, default=123, help="of weights, batches and dropout (default 123)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")


def run(args: argparse.Namespace) -> int:
    """Train, and say how good it has become."""
    from fastgpt.finetuning import resume_finetuning
    from fastgpt.training import terminal_reporter

    reporter = terminal_reporter()
    if args.resume:
        device = None if args.device == "auto" else args.device
        result = resume_finetuning(args.resume, reporter=reporter, device=device)
    elif args.task is None:
        raise ValueError("say what the model is to learn: fastgpt finetune classify, or fastgpt finetune instruct.")
    else:
        result = _train(args, reporter)
    if result.interrupted:
        return 130
    print(summary(result))
    return 0


def _train(args: argparse.Namespace, reporter: Reporter) -> ClassifierResult | InstructionResult:
    from fastgpt.finetuning import ClassifierSettings, InstructionSettings, finetune_classifier, finetune_instructions

    shared = dict(
        data=args.data,
        base=args.base,
        tokenizer=args.tokenizer,
        out_dir=args.out or str(Path("runs") / args.task),
        batch_size=args.batch_size,
        lr=args.lr,
        max_length=args.max_length,
        seed=args.seed,
        device=args.device,
        **({"trainable": "lora"} if args.lora else {}),
        **({"epochs": args.epochs} if args.epochs is not None else {}),
    )
    if args.task == "classify":
        return finetune_classifier(ClassifierSettings(**shared), reporter=reporter)
    return finetune_instructions(InstructionSettings(**shared), reporter=reporter)


def summary(result: ClassifierResult | InstructionResult) -> str:
    """What came out, and what to do next."""
    from fastgpt.finetuning import ClassifierResult

    folder = result.settings.out_dir
    parts = f"{result.n_train} for training, {result.n_validation} for validation, {result.n_test} for the test"
    if isinstance(result, ClassifierResult):
        return (
            f"{parts}.\nAccuracy: training {result.train_accuracy:.1%}, validation {result.validation_accuracy:.1%}, "
            f"test {result.test_accuracy:.1%} (always the commonest class: {result.majority_share:.1%}).\n"
            f'Next: fastgpt classify --model {folder} "a message"'
        )
    lines = [f"{parts}.", f"Test loss {result.test_loss:.3f}."]
    for entry in result.answers[:3]:
        lines += [f"  {entry['instruction']}", f"    -> {entry['model_response']}"]
    return "\n".join([*lines, f"All answers: {folder}/answers.json. Next: fastgpt chat --model {folder}"])

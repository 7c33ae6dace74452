"""`fastgpt classify`."""

from __future__ import annotations

import argparse
import sys

EXAMPLES = """\
examples:
  fastgpt classify --model runs/classify "You have won a prize, call now" "See you at eight?"
  fastgpt classify --model runs/classify < messages.txt        one message a line
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The classifier and the messages."""
    parser.add_argument("--model", required=True, metavar="PATH", help="folder of fastgpt finetune classify")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="messages; without them one a line on standard input")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")


def run(args: argparse.Namespace) -> int:
    """One line a message: class, probability, message."""
    from fastgpt.finetuning import load_classifier

    classifier = load_classifier(args.model, device=args.device)
    texts = args.texts or [line for line in sys.stdin.read().splitlines() if line.strip()]
    for text, row in zip(texts, classifier.probabilities(texts).tolist(), strict=True):
        best = max(range(len(row)), key=row.__getitem__)
        print(f"{classifier.classes[best]}\t{row[best]:.3f}\t{text}")
    return 0

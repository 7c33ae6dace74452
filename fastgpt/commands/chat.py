"""`fastgpt chat`: ask an instruction-tuned model in the terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastgpt.commands.generate import add_engine_arguments, make_generator, open_model, write_pieces

EXAMPLES = """\
examples:
  fastgpt chat --model runs/instruct
  echo "Name three colors." | fastgpt chat --model runs/instruct

Each question stands alone, as the book's instructions do. Inside: /help.
"""

HELP = """\
/input TEXT      material for the next question (the book's "### Input")
/temperature T   0 always takes the likeliest token; higher is livelier
/quit            leave (so does Ctrl-D); Ctrl-C ends an answer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and how it answers."""
    parser.add_argument("--model", required=True, metavar="PATH", help="folder of fastgpt finetune instruct")
    parser.add_argument("--tokens", type=int, default=256, help="the longest answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read questions until the end of input."""
    model, tokenizer = open_model(Path(args.model))
    generator = make_generator(model, args)
    person = sys.stdin.isatty()
    if person:
        _make_line_editing_work()
        print("Ask something. /help shows what else there is; Ctrl-D leaves.")
    material = ""
    while True:
        try:
            line = input("\n> " if person else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            continue
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return 0
        if command == "/input":
            material = rest
        elif command == "/temperature":
            _set_temperature(args, rest)
        elif command.startswith("/"):
            print(HELP)
        elif line:
            reply(generator, tokenizer, {"instruction": line, "input": material}, args)
            material = ""


def reply(generator: Any, tokenizer: Any, entry: dict[str, str], args: argparse.Namespace) -> None:
    """Write one answer, piece by piece; Ctrl-C ends it."""
    import torch

    from fastgpt.finetuning import format_prompt
    from fastgpt.tokenizer import encode_text

    ids = list(encode_text(tokenizer, format_prompt(entry)))
    context = generator.model.pos_emb.weight.shape[0]
    if len(ids) >= context:
        print(f"That is {len(ids)} tokens with its frame, but the model reads {context}; ask something shorter.")
        return
    tokens = generator.stream(
        torch.tensor([ids]),
        args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        eos_id=tokenizer.eot_token,
        overflow="stop",
    )
    try:
        write_pieces(tokenizer, (int(token) for token in tokens))
    except KeyboardInterrupt:
        sys.stdout.write(" ...")
    print(flush=True)


def _set_temperature(args: argparse.Namespace, text: str) -> None:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 <= value < float("inf"):
        args.temperature = value
    else:
        print(f"A temperature is a number of at least 0; got {text!r}.")


def _make_line_editing_work() -> None:
    try:
        # Importing it is enough: input() then has arrows and history.
        import readline  # noqa: F401
    except ImportError:
        return

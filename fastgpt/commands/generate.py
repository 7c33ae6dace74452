"""`fastgpt generate`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

EXAMPLES = """\
examples:
  fastgpt generate --model runs/story --prompt "The machine stood"
  fastgpt generate --model runs/story/best.safetensors --prompt "The" --tokens 200 --temperature 0 --seed 1
  echo "Once upon a time" | fastgpt generate --model runs/story --prompt -
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to continue, and how to choose tokens."""
    parser.add_argument("--model", required=True, metavar="PATH", help="folder of fastgpt train, or .safetensors file")
    parser.add_argument("--prompt", required=True, help="text to continue; - reads standard input")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens (default 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that make up this probability")
    parser.add_argument("--seed", type=int, help="same seed, same text")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--stats", action="store_true", help="tokens and tokens/s to standard error")


def find_weights(path: Path) -> Path:
    """The weights that a path means: the file, or the best (else the last) of a run's folder."""
    if not path.is_dir():
        return path
    for name in ("best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path} has neither best.safetensors nor last.safetensors; is it of fastgpt train?")


def run(args: argparse.Namespace) -> int:
    """Write the prompt and what the model makes of it, token by token."""
    import torch

    from fastgpt.generation import Generator
    from fastgpt.tokenizer import encode_text, get_tokenizer
    from fastgpt.weights import load_model

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    model, info = load_model(find_weights(Path(args.model)))
    tokenizer = get_tokenizer(info["tokenizer"])
    ids = list(encode_text(tokenizer, prompt))
    if not ids:
        raise ValueError("the prompt is empty; give at least one character.")
    generator = Generator(model.to(torch.device(args.device)))
    sys.stdout.write(prompt)
    start, shown, count = time.perf_counter(), tokenizer.decode(ids), 0
    for step in generator.stream(
        torch.tensor([ids]),
        args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        eos_id=tokenizer.eot_token,
    ):
        ids.append(int(step))
        count += 1
        text = tokenizer.decode(ids)
        # A character can be cut between two tokens; it is shown when it is whole.
        if not text.endswith("\ufffd"):
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    sys.stdout.write("\n")
    if args.stats:
        seconds = time.perf_counter() - start
        print(f"{count} tokens, {count / seconds:,.1f} tokens/s", file=sys.stderr)
    return 0

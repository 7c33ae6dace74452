"""`fastgpt generate`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  fastgpt generate --model runs/story --prompt "The machine stood"
  fastgpt generate --model runs/story/best.safetensors --prompt "The" --tokens 200 --temperature 0 --seed 1
  fastgpt generate --model gpt2 --prompt "The sea" --dtype int8 --stats
  echo "Once upon a time" | fastgpt generate --model runs/story --prompt -
"""
DTYPES = ("float32", "bfloat16", "int8", "int4")
CACHE_DTYPES = ("float32", "bfloat16", "int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to continue, and how to choose tokens."""
    parser.add_argument("--model", required=True, metavar="PATH", help="a run, a file, a Hugging Face or OpenAI folder")
    parser.add_argument("--prompt", required=True, help="text to continue; - reads standard input")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens (default 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that make up this probability")
    parser.add_argument("--seed", type=int, help="same seed, same text")
    add_engine_arguments(parser)
    parser.add_argument("--stats", action="store_true", help="tokens and tokens/s to standard error")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the model runs, and with which weights; `chat` has the same."""
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the weights: float32 (default) is exact; the others round them once, and are read faster",
    )
    parser.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        help="of keys and values: int8 reads long contexts faster, in little more than a quarter of the memory of "
        "float32 (default: float32, or bfloat16 beside other weights)",
    )


def make_generator(model: Any, args: argparse.Namespace) -> Any:
    """A Generator as the arguments say."""
    import torch

    from fastgpt.generation import Generator

    dtype = {"float32": None, "bfloat16": torch.bfloat16}.get(args.dtype, args.dtype)
    kept = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(args.cache_dtype, args.cache_dtype)
    return Generator(model.to(torch.device(args.device)), dtype=dtype, cache_dtype=kept)


def open_model(path: Path) -> tuple[Any, Any]:
    """A model and its tokenizer, whatever kind of file or folder the path is."""
    from fastgpt.finetuning.base_model import load_base
    from fastgpt.tokenizer import get_tokenizer

    model, name = load_base(path, "auto")
    return model, get_tokenizer(name)


def write_pieces(tokenizer: Any, tokens: Iterable[int]) -> int:
    """Write tokens to standard output as they come; gives their number.

    A character can be cut between two tokens; it is shown when it is whole. Only the tokens since the last whole
    character are decoded again, so that a long text does not get slower.
    """
    pending: list[int] = []
    count = 0
    for token in tokens:
        count += 1
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\ufffd") or len(pending) > 8:
            sys.stdout.write(text)
            sys.stdout.flush()
            pending.clear()
    sys.stdout.write(tokenizer.decode(pending) if pending else "")
    return count


def run(args: argparse.Namespace) -> int:
    """Write the prompt and what the model makes of it, token by token."""
    import torch

    from fastgpt.tokenizer import encode_text

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character.")
    model, tokenizer = open_model(Path(args.model))
    ids = torch.tensor([list(encode_text(tokenizer, prompt))])
    generator = make_generator(model, args)
    start = time.perf_counter()
    tokens = generator.stream(
        ids,
        args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        eos_id=tokenizer.eot_token,
    )
    sys.stdout.write(prompt)
    count = write_pieces(tokenizer, (int(token) for token in tokens))
    sys.stdout.write("\n")
    if args.stats:
        seconds = time.perf_counter() - start
        print(f"{count} tokens, {count / seconds:,.1f} tokens/s", file=sys.stderr)
    return 0

"""`fastgpt export`."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """\
examples:
  fastgpt export --model runs/story --to hf --out story-hf           for transformers' GPT2LMHeadModel
  fastgpt export --model gpt2-folder --to book --out gpt2.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, to what."""
    parser.add_argument("--model", required=True, metavar="PATH", help="a run, a file, a Hugging Face or OpenAI folder")
    parser.add_argument("--to", choices=("hf", "book"), default="hf", help="hf: a folder; book: one safetensors file")
    parser.add_argument("--out", required=True, metavar="PATH", help="the folder or file to write")


def run(args: argparse.Namespace) -> int:
    """Read any kind of weights, write the kind that was asked for."""
    from fastgpt.finetuning.base_model import load_base
    from fastgpt.weights import model_config, save_huggingface, save_weights

    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; choose another name.")
    model, tokenizer = load_base(Path(args.model), "auto")
    if args.to == "hf":
        save_huggingface(model, out)
    else:
        save_weights(out, model, {"config": model_config(model), "tokenizer": tokenizer})
    print(f"{sum(p.numel() for p in model.parameters()):,} weights written to {out}")
    return 0

"""`fastgpt train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.training import PretrainResult, PretrainSettings

EXAMPLES = """\
examples:
  fastgpt train --text story.txt --out runs/story
  fastgpt train --text story.txt --out runs/story --size small --steps 2000 --prompt "The sea"
  fastgpt train --resume runs/story             after Ctrl-C, or after the machine went down

The folder holds last.safetensors (to go on), best.safetensors (to generate from), loss.png and settings.json.
"""

# emb_dim, n_heads, n_layers, context_length; "small" trains on 20 kB of text in a minute on two cores.
SIZES = {
    "tiny": (64, 2, 2, 64),
    "small": (128, 4, 4, 128),
    "medium": (384, 6, 6, 256),
    "gpt2": (768, 12, 12, 1024),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run."""
    source = parser.add_argument_group("what to train on")
    source.add_argument("--text", metavar="FILE", help="UTF-8 text, or a token file; without it the story inside")
    source.add_argument("--tokenizer", default="auto", help="gpt2, story, byte or auto (default): gpt2 if at hand")
    source.add_argument("--out", metavar="DIR", help="folder of the run (default runs/<name of the text>)")
    source.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, with its own settings")
    model = parser.add_argument_group("the model")
    sizes = ", ".join(f"{name} ({e}x{n})" for name, (e, _, n, _) in SIZES.items())
    model.add_argument("--size", choices=SIZES, default="small", help=f"width x layers: {sizes} (default small)")
    model.add_argument("--context", type=int, help="tokens a row, and the model's context_length (default by size)")
    model.add_argument("--dropout", type=float, default=0.1, help="drop_rate of the book (default 0.1)")
    run = parser.add_argument_group("the run")
    run.add_argument("--steps", type=int, help="optimiser steps (default: 20 epochs, from 200 to 5,000 steps)")
    run.add_argument("--batch-size", type=int, default=8, help="rows a step (default 8)")
    run.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    run.add_argument("--eval-every", type=int, default=50, help="steps between checkpoints (default 50)")
    run.add_argument("--prompt", help="text to go on from at each evaluation")
    run.add_argument("--seed", type=int, default=123, help="of weights, batches, dropout, samples (default 123)")
    run.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    run.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: mixed precision")
    run.add_argument(
        "--activations", choices=("float32", "bfloat16"), default="float32", help="bfloat16: kept in half the memory"
    )


def settings_from(args: argparse.Namespace) -> PretrainSettings:
    """The run that the arguments describe."""
    from fastgpt.training import PretrainSettings

    emb_dim, n_heads, n_layers, context_length = SIZES[args.size]
    model: dict[str, Any] = {
        "context_length": args.context or context_length,
        "emb_dim": emb_dim,
        "n_heads": n_heads,
        "n_layers": n_layers,
        "drop_rate": args.dropout,
        "qkv_bias": False,
    }
    return PretrainSettings(
        model=model,
        data=args.text,
        tokenizer=args.tokenizer,
        out_dir=args.out or str(Path("runs") / (Path(args.text).stem if args.text else "story")),
        batch_size=args.batch_size,
        steps=args.steps or default_steps(args, model["context_length"]),
        lr=args.lr,
        min_lr=args.lr / 10,
        eval_every=args.eval_every,
        sample_prompt=args.prompt,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        activations=args.activations,
    )


def default_steps(args: argparse.Namespace, context: int) -> int:
    """About 20 epochs, counting 4 bytes a token, within bounds that end the same day."""
    size = Path(args.text).stat().st_size if args.text else 20_000
    return min(5000, max(200, 20 * (size // 4) // (args.batch_size * context)))


def run(args: argparse.Namespace) -> int:
    """Train or resume; show the curve when it is done."""
    from fastgpt.training import pretrain, resume, terminal_reporter

    reporter = terminal_reporter()
    if args.resume:
        if args.text or args.out:
            raise ValueError("--resume takes text and folder from the run; leave --text and --out out.")
        result = resume(args.resume, reporter=reporter, device=None if args.device == "auto" else args.device)
    else:
        result = pretrain(settings_from(args), reporter=reporter)
    if result.interrupted:
        return 130
    print(summary(result))
    return 0


def summary(result: PretrainResult) -> str:
    """The curve, where the files are, and what to do next."""
    from fastgpt.training import terminal_plot

    train = [(i + 1, loss) for i, loss in enumerate(result.losses)]
    val = [(row.step, row.val_loss) for row in result.evaluations]
    folder = result.settings.out_dir
    rate = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
    return (
        f"{terminal_plot(train, val)}\n"
        f"{result.step} steps, lowest validation loss {result.best_val_loss:.3f}{rate}.\n"
        f'Checkpoints and loss.png are in {folder}. Next: fastgpt generate --model {folder} --prompt "..."'
    )

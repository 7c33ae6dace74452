"""`fastgpt demo`: the main job on data that fastgpt brings along, then its speed against plain PyTorch."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.training import PretrainResult

PROMPT = "The machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the results go, and a short form."""
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder of the run (default runs/demo)")
    parser.add_argument("--quick", action="store_true", help="a few seconds: tiny models, no figures worth quoting")


def run(args: argparse.Namespace) -> int:
    """Train, draw, generate, compare."""
    from fastgpt.about import info

    heading("1. What runs here")
    print(info())
    heading("2. Train a small GPT on the story that fastgpt brings along")
    result = train(Path(args.out), args.quick)
    heading("3. Generate from it with the KV cache")
    write_text(result, 40 if args.quick else 150)
    heading("4. GPT-2 124M against plain PyTorch" if not args.quick else "4. A tiny GPT against plain PyTorch")
    compare(args.quick)
    print(f"\nYour run is in {args.out}: loss.png, settings.json, last.safetensors. Next:")
    print(f'  fastgpt generate --model {args.out} --prompt "The tide"')
    print("  fastgpt train --text FILE --out runs/mine")
    return 0


def heading(text: str) -> None:
    """A section of the demo's output."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def train(out: Path, quick: bool) -> PretrainResult:
    """About a minute on two cores. The folder's older demo is replaced."""
    from fastgpt.commands.train import SIZES
    from fastgpt.training import PretrainSettings, pretrain, terminal_plot, terminal_reporter

    emb_dim, n_heads, n_layers, context = SIZES["tiny" if quick else "small"]
    clear(out)
    result = pretrain(
        PretrainSettings(
            model=dict(context_length=context, emb_dim=emb_dim, n_heads=n_heads, n_layers=n_layers, drop_rate=0.1,
                       qkv_bias=False),
            tokenizer="story",
            out_dir=str(out),
            batch_size=8,
            steps=20 if quick else 300,
            eval_every=10 if quick else 50,
            sample_prompt=None if quick else PROMPT,
            sample_tokens=25,
            lr=2e-3,
            min_lr=2e-4,
        ),
        reporter=terminal_reporter(),
    )  # fmt: skip
    if result.interrupted:
        raise KeyboardInterrupt
    print(terminal_plot(
        [(i + 1, loss) for i, loss in enumerate(result.losses)],
        [(row.step, row.val_loss) for row in result.evaluations],
    ))  # fmt: skip
    # The book's chapter 5 sees the same on its own short story.
    print("So short a text is soon known by heart: the training loss goes on falling, the validation loss turns.")
    print(f"{result.tokens_per_second:,.0f} tokens/s; the curve as a picture: {out / 'loss.png'}")
    return result


def clear(out: Path) -> None:
    """Remove the files of an older demo, and nothing else."""
    if not out.exists():
        return
    if any(out.iterdir()) and not (out / "settings.json").is_file():
        raise FileExistsError(f"{out} holds other files; give the demo another folder: fastgpt demo --out DIR")
    for name in ("last.safetensors", "best.safetensors", "settings.json", "tokens.bin", "loss.png"):
        (out / name).unlink(missing_ok=True)


def write_text(result: PretrainResult, n_tokens: int) -> None:
    """Stream a text from the trained model."""
    from fastgpt.generation import Generator
    from fastgpt.tokenizer import get_tokenizer, text_to_token_ids

    tokenizer: Any = get_tokenizer(result.settings.tokenizer)
    prompt = text_to_token_ids(PROMPT, tokenizer)
    sys.stdout.write(PROMPT)
    start = time.perf_counter()
    for step in Generator(result.model).stream(prompt, n_tokens, temperature=0.7, top_k=40, seed=7):
        sys.stdout.write(tokenizer.decode([int(step)]))
        sys.stdout.flush()
    print(f"\n[{n_tokens / (time.perf_counter() - start):,.0f} tokens/s]")


def compare(quick: bool) -> None:
    """One set of weights, the providers in turns: generation and training steps."""
    import torch

    from fastgpt.comparison import generation_providers, training_providers, twins
    from fastgpt.config import GPT_CONFIG_124M

    cfg: dict[str, Any] = dict(GPT_CONFIG_124M)
    if quick:
        cfg |= dict(vocab_size=500, context_length=64, emb_dim=32, n_heads=2, n_layers=2)
    ours, plain = twins(cfg)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(cfg["vocab_size"], (1, 32), generator=generator)
    counts = {"book": 8, "torch": 32, "fastgpt": 32}
    makers = generation_providers(ours, plain, prompt, counts)
    book, *others = (provider() for provider in makers.values())
    if not all(torch.equal(book, other[:, : book.shape[1]]) for other in others):
        raise RuntimeError("generation with the cache gave other tokens than the plain loop; please report this")
    table("generation, batch 1, prompt 32", "tokens/s", makers, counts, rounds=2 if quick else 3)

    length = 32 if quick else 256
    tokens = torch.randint(cfg["vocab_size"], (2, length + 1), generator=generator)
    batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    steps = training_providers(ours, plain, batch, tuple(counts))
    work = dict.fromkeys(counts, 2 * length)
    table(f"training step, 2 x {length}, dropout 0.1", "tokens/s", steps, work, rounds=2 if quick else 3)
    print("book: the plain modules and loops. torch: PyTorch's fused ops (SDPA ...) and the same KV cache.")


def table(
    title: str, unit: str, providers: Mapping[str, Callable[[], Any]], work: Mapping[str, int], rounds: int
) -> None:
    """Race the providers and print rates and ratios to the first."""
    from fastgpt.timing import race

    times = race(providers, rounds=rounds, warmup=1, after_round=_dot)
    if sys.stderr.isatty():
        print(f"\r{' ' * rounds}\r", end="", file=sys.stderr)
    rates = {name: work[name] / timing.median for name, timing in times.items()}
    first = next(iter(rates.values()))
    print(title)
    for name, rate in rates.items():
        print(f"  {name:<10}{rate:>10,.1f} {unit}{rate / first:>9.1f} x")


def _dot() -> None:
    if sys.stderr.isatty():
        print(".", end="", file=sys.stderr, flush=True)

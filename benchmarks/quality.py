"""What lower precision costs, on real text: `python -m benchmarks.quality`, some minutes.

A small GPT of bytes is trained here and now on the docstrings of Python's standard library and on the story that ships
with fastgpt. On docstrings that it has not seen, each precision of `Generator`, of weights and cache, is held against
float32:

    perplexity        of a byte, and how much it grows
    divergence        mean Kullback-Leibler divergence of the next byte from float32, in nats
    same best         share of places where the likeliest byte is that of float32
    same text         greedy bytes before the first that float32 would not have written, of so many

Rows go to results/quality-<instruction set>.jsonl. The model is small and undertrained; larger ones lose less to
rounding, so read the figures as an order of magnitude.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows import RESULTS, circumstances
from fastgpt.generation import Generator
from fastgpt.generation.native_engine import MAX_ENTRIES, NativeDecoder
from fastgpt.generation.native_weights import NativeWeights, Packs
from fastgpt.generation.network import read_network
from fastgpt.model import GPTModel
from fastgpt.text import load_story

CFG = {
    "vocab_size": 256,
    "context_length": 128,
    "emb_dim": 192,
    "n_heads": 6,
    "n_layers": 4,
    "drop_rate": 0.0,
    "qkv_bias": True,
}
Precision = tuple[torch.dtype | str | None, torch.dtype | str | None]
# Of the weights, and of keys and values: `dtype` and `cache_dtype`.
PRECISIONS: tuple[Precision, ...] = (
    (None, None),
    (torch.bfloat16, None),
    ("int8", None),
    ("int4", None),
    (None, torch.bfloat16),
    (None, "int8"),
    ("int8", "int8"),
)
BATCH = 8
SEED = 123
# Of the docstrings, one in so many is held out.
HELD_OUT = 20
NEW = 64


def docstrings() -> list[str]:
    """Docstrings of the standard library, in the order of files and places."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 80:
                    found.append(text)
    return found


def texts() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and bytes held out; (n,) int64 each."""
    parts = docstrings()
    held_out = "\n\n".join(parts[::HELD_OUT])
    rest = "\n\n".join(part for i, part in enumerate(parts) if i % HELD_OUT) + "\n\n" + load_story()
    return tuple(torch.tensor(list(text.encode())) for text in (rest, held_out))  # type: ignore[return-value]


def train(text: Tensor, steps: int) -> GPTModel:
    """A model of `text`, trained with AdamW under a cosine schedule."""
    torch.manual_seed(SEED)
    model = GPTModel(CFG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    length = CFG["context_length"]
    begun = time.perf_counter()
    for step in range(steps):
        begins = torch.randint(len(text) - length - 1, (BATCH,))
        batch = torch.stack([text[begin : begin + length + 1] for begin in begins.tolist()])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step + 1 == steps:
            print(f"  step {step}: {loss.item():.3f} nats, {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return model.eval()


def logits_of(model: GPTModel, precision: Precision, windows: Tensor) -> Tensor:
    """Logits behind every byte, (n_windows, length, 256), by the decoder that `Generator` uses."""
    dtype, cache_dtype = precision
    weights = NativeWeights(read_network(model), dtype and Packs(dtype))
    decoder = NativeDecoder(weights, 1, windows.shape[1], cache_dtype)
    rows = []
    for window in windows:
        pieces = []
        for begin in range(0, len(window), MAX_ENTRIES):
            tokens = window[begin : begin + MAX_ENTRIES].contiguous()
            places = torch.arange(begin, begin + len(tokens))
            pieces.append(decoder.step(tokens, torch.zeros_like(places), places)[0])
        rows.append(torch.cat([piece for piece in pieces if piece is not None]))
    return torch.stack(rows)


def same_text(model: GPTModel, precision: Precision, prompts: Tensor) -> float:
    """Mean number of greedy bytes before the first difference from float32."""
    want, got = (
        Generator(model, dtype, cache_dtype=cache_dtype).generate(prompts, NEW)
        for dtype, cache_dtype in (PRECISIONS[0], precision)
    )
    assert isinstance(want, Tensor) and isinstance(got, Tensor)
    same = (want == got)[:, prompts.shape[1] :].int().cumprod(dim=1)
    return same.sum(dim=1).float().mean().item()


def measure(model: GPTModel, held_out: Tensor, n_windows: int) -> list[dict[str, Any]]:
    """One row a precision."""
    length = CFG["context_length"]
    windows = held_out[: n_windows * (length + 1)].view(n_windows, length + 1)
    targets = windows[:, 1:]
    exact = logits_of(model, PRECISIONS[0], windows[:, :-1])
    rows = []
    for precision in PRECISIONS:
        logits = logits_of(model, precision, windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        rows.append(
            {
                "precision": _name(precision[0], "float32"),
                "cache": _name(precision[1], "float32" if precision[0] is None else "bfloat16"),
                "perplexity": round(loss.exp().item(), 4),
                "divergence": round(_divergence(exact, logits), 6),
                "same_best": round((logits.argmax(-1) == exact.argmax(-1)).float().mean().item(), 4),
                "same_text": round(same_text(model, precision, windows[:, :32]), 1),
                "of": NEW,
                "bytes": targets.numel(),
            }
        )
    for row in rows:
        row["perplexity_growth"] = round(row["perplexity"] / rows[0]["perplexity"] - 1, 5)
    return rows


def _name(dtype: torch.dtype | str | None, usual: str) -> str:
    return usual if dtype is None else str(dtype).removeprefix("torch.")


def _divergence(exact: Tensor, logits: Tensor) -> float:
    wanted, got = exact.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (wanted.exp() * (wanted - got)).sum(-1).mean().item()


def main() -> None:
    """Train, measure, append the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600, help="training steps (default 1600)")
    parser.add_argument("--windows", type=int, default=96, help="held-out texts of 128 bytes (default 96)")
    parser.add_argument("--out", type=Path, help="file of JSON lines to append to; '-' only prints")
    args = parser.parse_args()
    text, held_out = texts()
    print(f"{len(text)} bytes to train on, {len(held_out)} held out", file=sys.stderr)
    rows = measure(train(text, args.steps), held_out, min(args.windows, len(held_out) // (CFG["context_length"] + 1)))
    about = circumstances()
    lines = [json.dumps({**row, "steps": args.steps, **about}) for row in rows]
    out = args.out or RESULTS / f"quality-{about['isa']}.jsonl"
    if str(out) != "-":
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    print("| weights | cache | perplexity | growth | divergence | same best | same text |\n" + "|---" * 7 + "|")
    for row in rows:
        print(
            f"| {row['precision']} | {row['cache']} | {row['perplexity']} | {row['perplexity_growth']:.2%} | "
            f"{row['divergence']} | {row['same_best']:.1%} | {row['same_text']} of {NEW} |"
        )


if __name__ == "__main__":
    main()

"""Training GPT-2 124M on a CPU against every way that PyTorch has: `python -m benchmarks.train`, `make bench-train`.

Each pair (fastgpt, one rival) runs in two processes that take turns, step by step, so that both see the same machine
and each has its own memory peak. A step is forward, cross-entropy, backward and AdamW. Gate: on the same weights and
batch, both report the same first loss (with dropout: within 0.15).

    book              the book's modules and AdamW as the book calls it
    torch             packed projection, SDPA, fused layer norm, GELU and AdamW (benchmarks/torch_gpt.py)
    +onednn           with set_float32_matmul_precision("medium"), which sends float32 products to oneDNN
    +malloc           with glibc told to keep big blocks (no page faults)
    +autocast         bfloat16 autocast, float32 masters; "mixed" pairs race fastgpt in it
    +bf16             bfloat16 weights and moments
    accelerated       fastgpt.accelerate on the book's own modules
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.rows import RESULTS, circumstances
from benchmarks.torch_gpt import TorchGPT
from benchmarks.turns import Worker, WorkerError, serve, take_turns
from fastgpt import accelerate, reference
from fastgpt.config import GPT_CONFIG_124M
from fastgpt.memory import kept_memory
from fastgpt.model import GPTModel
from fastgpt.training import calc_loss_batch
from fastgpt.training.optimizer import make_adamw

KEEP = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"

# (ours, batch, length, dropout): rivals.
CASES = {
    ("fastgpt", 4, 256, 0.0): ("book", "torch", "torch+malloc", "torch+onednn+malloc", "accelerated"),
    ("fastgpt", 4, 256, 0.1): ("book", "torch+malloc", "torch+onednn+malloc", "accelerated"),
    ("fastgpt", 2, 1024, 0.1): ("book", "torch+malloc"),
    ("fastgpt", 2, 1024, 0.0): ("book", "torch+malloc"),
    ("fastgpt+autocast", 4, 256, 0.0): ("book", "torch+autocast+malloc", "torch+bf16+malloc"),
}


def allowed_difference(drop_rate: float, providers: Sequence[str]) -> float:
    """How far two first losses may lie apart: float32's rounding, bfloat16's, or other dropout masks."""
    if drop_rate > 0.0:
        return 0.15
    return 0.02 if any(needs_bfloat16(name) for name in providers) else 5e-5


def needs_bfloat16(provider: str) -> bool:
    """True where products are in bfloat16."""
    return "autocast" in provider or "bf16" in provider


def make_step(provider: str, batch: int, length: int, drop_rate: float) -> Callable[[], float]:
    """One training step of a provider, as a function that returns the loss before its update."""
    base, *flags = provider.split("+")
    cfg = {**GPT_CONFIG_124M, "drop_rate": drop_rate}
    torch.manual_seed(123)
    tokens = torch.randint(cfg["vocab_size"], (batch, length + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model = make_model(base, cfg)
    if "onednn" in flags:
        torch.set_float32_matmul_precision("medium")
    if "bf16" in flags:
        model.bfloat16()
    # The learning rate is 0: the work of an update, and every step sees the same weights.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0) if base == "book" else make_adamw(model, 0.0, 0.1)

    def loss_of_batch() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in flags):
            if base in ("fastgpt", "accelerated"):
                return calc_loss_batch(inputs, targets, model, "cpu")
            return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of_batch()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def make_model(base: str, cfg: dict[str, Any]) -> nn.Module:
    """The same weights in every provider's model."""
    torch.manual_seed(123)
    if base == "fastgpt":
        return GPTModel(cfg).train()
    plain = reference.GPTModel(cfg).train()
    if base == "accelerated":
        accelerate(plain)
    if base != "torch":
        return plain
    model = TorchGPT(cfg).train()
    model.take_weights(plain.state_dict())
    return model


def label_of(case: tuple[str, int, int, float]) -> str:
    """How a case stands in tables."""
    ours, batch, length, drop_rate = case
    return f"{'mixed' if 'autocast' in ours else 'float32'} {batch}x{length} dropout {drop_rate:g}"


def race(case: tuple[str, int, int, float], rival: str, rounds: int) -> Iterator[dict[str, Any]]:
    """One row a provider of a pair."""
    ours, batch, length, drop_rate = case
    pair = (ours, rival)
    workers: list[Worker] = []
    try:
        for name in pair:
            environment = {"GLIBC_TUNABLES": KEEP} if "malloc" in name else {}
            arguments = (name, str(batch), str(length), str(drop_rate))
            workers.append(Worker.start(name, "benchmarks.train", arguments, environment))
        take_turns(workers, rounds)
    finally:
        for worker in workers:
            worker.stop()
    first = [worker.results[0] for worker in workers]
    # NaN must fail too.
    if not abs(first[0] - first[1]) <= allowed_difference(drop_rate, pair):
        raise WorkerError(f"the losses differ: {dict(zip(pair, first, strict=True))}")
    medians = [statistics.median(worker.seconds) for worker in workers]
    for worker, median in zip(workers, medians, strict=True):
        quartiles = statistics.quantiles(worker.seconds, n=4, method="inclusive")
        yield {
            "case": f"training step GPT-2 124M {label_of(case)}, pair with {rival}",
            "provider": worker.name,
            "rate": round(batch * length / median, 1),
            "unit": "tokens/s",
            "ms": round(median * 1e3, 1),
            "ms_quartiles": [round(quartiles[0] * 1e3, 1), round(quartiles[2] * 1e3, 1)],
            "rounds": rounds,
            "peak_mb": round(max(worker.peaks)),
            "fastgpt_is_faster": round(median / medians[0], 2),
        }


def main() -> None:
    """Race the chosen pairs; or be one provider's process."""
    if sys.argv[1:2] == ["worker"]:
        name, batch, length, drop_rate = sys.argv[2:]
        step = make_step(name, int(batch), int(length), float(drop_rate))
        # What every training loop of fastgpt does; where malloc is tuned by environment it does nothing.
        with kept_memory() if name.startswith(("fastgpt", "accelerated")) else nullcontext():
            serve(step)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each process (default 5)")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="pairs whose name contains this, such as 4x256 or book"
    )
    parser.add_argument("--out", type=Path, help="file of JSON lines to append to; '-' only prints")
    args = parser.parse_args()
    about = circumstances()
    out = args.out or RESULTS / f"train-{about['isa']}.jsonl"
    print(f"{'case':<28}{'provider':<22}{'tokens/s':>9}{'fastgpt is':>12}{'peak MB':>9}")
    for case, rivals in CASES.items():
        for rival in rivals:
            if args.only not in f"{label_of(case)} {rival}":
                continue
            if needs_bfloat16(rival) and not str(about["isa"]).startswith("avx512"):
                print(f"{label_of(case):<28}{rival:<22}left out: minutes a step without AVX-512, see README.md")
                continue
            rows = list(race(case, rival, args.rounds))
            for row in rows:
                faster = f"{row['fastgpt_is_faster']:.2f} x"
                print(
                    f"{label_of(case):<28}{row['provider']:<22}{row['rate']:>9}{faster:>12}{row['peak_mb']:>9}",
                    flush=True,
                )
            if str(out) != "-":
                out.parent.mkdir(parents=True, exist_ok=True)
                with out.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({**row, **about}) + "\n" for row in rows)


if __name__ == "__main__":
    main()

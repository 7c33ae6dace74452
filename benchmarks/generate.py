"""Generation against other engines, in one interleaved race: `python -m benchmarks.generate`, or `make bench-generate`.

GPT-2 124M with random weights that are the same for all (generate_models.py); every engine in a process of its own
(generate_worker.py), one at work at a time. First the gate: the engines in float32 must give the tokens of the book's
plain loop; for the others the agreement is stated. Then rounds, with the memory's read bandwidth beside each sample.
Rows go to results/generate-<instruction set>.jsonl, and a table of targets is printed.

Rivals are optional: pip install transformers ctranslate2 gguf llama-cpp-python. The last one is to be built for this
machine, as by --no-binary llama-cpp-python; any that is missing is named and left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import generate_models
from benchmarks.generate_engines import EXACT, NAMES
from benchmarks.generate_race import Probe, Samples, Worker, take_turns
from benchmarks.generate_table import print_table
from benchmarks.rows import RESULTS, circumstances

FOLDER = Path("build/generate-models")
GATE_TOKENS = 16
# An engine that takes longer for the tokens of the gate would hold up the race (bfloat16 in PyTorch on a processor that
# lacks it, for one).
PATIENCE_SECONDS = 6.0
CIRCLE = "repeat"


@dataclass(frozen=True)
class Case:
    """What every engine does once a round.

    Attributes:
        name: of the case, as in the rows.
        batch, prompt, new: rows, tokens of each prompt, tokens generated; the time includes the prompts.
        skip: engines that would take too long, or for which the case is none.
        share: of --rounds.
    """

    name: str
    batch: int
    prompt: int
    new: int
    skip: tuple[str, ...] = ()
    share: float = 1.0


_SLOW = ("book", "book-cache", "transformers", "fastgpt-plain")
CASES = (
    Case("batch 1", 1, 32, 128),
    Case("batch 8", 8, 32, 32, ("book", "transformers", "fastgpt-plain"), 0.6),
    Case("batch 32", 32, 32, 24, _SLOW, 0.6),
    Case("prefill 512", 1, 512, 1, ("book-cache", "fastgpt-plain"), 0.6),
)
SAMPLE = "sample in training"
# The book's plain loop is so slow that fewer tokens must do.
FEWER = {("book", "batch 1"): 6}


def prompts_of(case: Case, name: str) -> list[list[int]]:
    """The same prompts for all engines; in a circle for those that repeat."""
    if CIRCLE in name:
        return [[token % 20 for token in range(case.prompt)]] * case.batch
    draw = torch.Generator().manual_seed(1)
    size = generate_models.CFG["vocab_size"] - 1
    return torch.randint(size, (case.batch, case.prompt), generator=draw).tolist()


def command_of(case: Case, name: str) -> dict[str, Any]:
    """What a worker is sent."""
    return {"what": "generate", "prompts": prompts_of(case, name), "n": FEWER.get((name, case.name), case.new)}


def start(stack: ExitStack, names: list[str], folder: Path, threads: int) -> dict[str, Worker]:
    """The engines that can be made, all started at once; says which ones cannot, and why."""
    begun = time.perf_counter()
    started = [stack.enter_context(Worker(name, folder, threads)) for name in names]
    workers = {}
    for worker in started:
        worker.wait()
        if "error" in worker.about:
            print(f"  {worker.name} is left out: {worker.about['error']}", file=sys.stderr)
            print(f"    pip install {NAMES[worker.name]}", file=sys.stderr)
        else:
            workers[worker.name] = worker
    print(f"{len(workers)} engines are ready after {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return workers


def gate(workers: dict[str, Worker]) -> dict[str, float]:
    """How many of the first tokens agree with the book's, as a share; an exact engine must reach 1.

    Engines that are far too slow are taken out of `workers`.

    Raises:
        RuntimeError: an engine in float32 gives another token.
    """
    case = CASES[0]
    want = workers["fastgpt-plain" if "book" not in workers else "book"].ask(
        {**command_of(case, ""), "n": GATE_TOKENS}
    )["tokens"][0]
    agreement, slow = {}, []
    for name, worker in workers.items():
        if CIRCLE in name:
            continue
        answer = worker.ask({**command_of(case, ""), "n": GATE_TOKENS})
        got = answer.get("tokens", [[]])[0]
        same = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
        agreement[name] = same / GATE_TOKENS
        print(
            f"  {name:<22} the first {same} of {GATE_TOKENS} tokens are the book's, {answer.get('seconds', 0.0):.2f} s",
            file=sys.stderr,
        )
        if name in EXACT and same < GATE_TOKENS:
            raise RuntimeError(f"{name} is to be exact, but gives {got} where the book gives {want}: {answer}")
        if answer["seconds"] > PATIENCE_SECONDS:
            print(f"  {name} is left out: too slow on this machine", file=sys.stderr)
            slow.append(name)
    for name in slow:
        del workers[name]
    circles = [workers[name].ask(command_of(case, name))["tokens"] for name in workers if CIRCLE in name]
    if any(circle != circles[0] for circle in circles):
        raise RuntimeError("the shortcuts give other tokens on repetitive text")
    return agreement


def row_of(case: Case, worker: Worker, samples: Samples, agreement: float | None) -> dict[str, Any]:
    """One row without the circumstances."""
    new = FEWER.get((worker.name, case.name), case.new)
    lower, median, upper = samples.quartiles()
    row: dict[str, Any] = {
        "case": case.name,
        "engine": worker.name,
        "version": worker.about["version"],
        "batch": case.batch,
        "prompt": case.prompt,
        "new": new,
        "rate": round(case.batch * new / median, 1),
        "unit": "tokens/s",
        "ms": round(median * 1e3, 2),
        "ms_quartiles": [round(lower * 1e3, 2), round(upper * 1e3, 2)],
        "rounds": len(samples.seconds),
        "read_gbs": round(sum(samples.read_gbs) / len(samples.read_gbs), 1),
        "agreement": agreement,
    }
    if case.batch == 1 and new > 1 and worker.about["bytes"]:
        row["read_limit_share"] = round(samples.limit_share(worker.about["bytes"] * new), 3)
    return row


def sample_rows(folder: Path, threads: int, rounds: int, probe: Probe | None) -> list[dict[str, Any]]:
    """generate_and_print_sample: 50 tokens, a model in training with a context of 256."""
    case = Case(SAMPLE, 1, 4, 50)
    rows = []
    with ExitStack() as stack:
        workers = start(stack, ["book-sample", "fastgpt-sample"], folder, threads)
        commands = {name: {"what": "sample"} for name in workers}
        for name, samples in take_turns(list(workers.values()), commands, rounds, probe).items():
            rows.append(row_of(case, workers[name], samples, None))
    return rows


def race(args: argparse.Namespace, threads: int) -> Iterator[list[dict[str, Any]]]:
    """Everything; the rows of each case, without the circumstances."""
    probe = None if args.no_probe else Probe(threads)
    names = [name for name in NAMES if "sample" not in name and (not args.engines or name in args.engines)]
    with ExitStack() as stack:
        workers = start(stack, names, args.models, threads)
        agreement = gate(workers)
        for case in CASES:
            if args.only and not any(part in case.name for part in args.only):
                continue
            begun = time.perf_counter()
            rounds = max(1, round(args.rounds * case.share))
            rows = []
            taking_part = [w for name, w in workers.items() if _takes_part(name, case)]
            commands = {worker.name: command_of(case, worker.name) for worker in taking_part}
            for name, samples in take_turns(taking_part, commands, rounds, probe).items():
                row = row_of(case, workers[name], samples, agreement.get(name))
                rows.append(row)
                print(f"  {case.name:<12} {name:<22} {row['rate']:>9} tokens/s {row['ms']:>10} ms", file=sys.stderr)
            print(f"{case.name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
            yield rows
    if not args.only or any(part in SAMPLE for part in args.only):
        yield sample_rows(args.models, threads, max(1, round(args.rounds * 0.6)), probe)
    if probe is not None:
        probe.close()


def _takes_part(name: str, case: Case) -> bool:
    # What repeats is a case of batch 1.
    return name not in case.skip and (CIRCLE not in name or case is CASES[0])


def main() -> None:
    """Prepare, race, append the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="CASE", help="parts of case names; all without")
    parser.add_argument("--engines", nargs="*", metavar="ENGINE", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each engine in batch 1 (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", type=Path, default=FOLDER, help=f"where the weights lie (default {FOLDER}, 2 GB)")
    parser.add_argument("--no-probe", action="store_true", help="do not measure the memory (without g++)")
    parser.add_argument("--out", type=Path, help="file of JSON lines to append to; '-' only prints")
    args = parser.parse_args()
    for name, reason in generate_models.prepare(args.models).items():
        print(f"  no weights for {name}: {reason}", file=sys.stderr)
    about = circumstances() | {"threads": args.threads}
    out = args.out or RESULTS / f"generate-{about['isa']}.jsonl"
    everything = []
    for rows in race(args, args.threads):
        everything += rows
        if str(out) != "-":
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({**row, **about}) + "\n" for row in rows)
    print_table(everything)


if __name__ == "__main__":
    main()

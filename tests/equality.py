"""Random cases of generation against the plain loop: `python tests/equality.py 2000`, or `make soak`.

A case is a model (fastgpt's, a reader's accelerated one, the book's fast variant; new, or after training steps) with
prompts and options, asked in every way (Generator with and without shortcuts, `generate`, a stream, a ragged list). The
judge is the book's loop on the model itself, without a cache.

Two sums in another order may differ in the last bits. Where the plain loop itself is that undecided at the first token
that differs, the case counts as a tie, not as a failure; there is at most one tie in 200 cases, or the tool fails.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from generation_cases import Case, random_case, random_model
from handwritten import ACCEPTED, BOOK, GPT
from torch import Tensor

import fastgpt
from fastgpt import reference
from fastgpt.generation import Generator, fast_head

WAYS = ("generator", "plain generator", "generate", "stream", "ragged")
READERS = ("drop_shortcut", "drop_resid", "module_list", "torch_norm_and_gelu", "packed_sdpa")
TIE = 1e-4


@dataclass
class Outcome:
    """What came of one case: "equal", or "tie"; `kind` names the case."""

    kind: str
    result: str


def case_of(seed: int) -> tuple[Case, str]:
    """A float32 case, its model perhaps accelerated, perhaps trained on."""
    case = random_case(seed)
    case.model.float()
    kinds = [type(case.model).__module__.removeprefix("fastgpt.")]
    if seed % 3 == 1:
        name = READERS[seed // 3 % len(READERS)]
        case.model = reader(case.model, name, seed)
        fastgpt.accelerate(case.model)
        kinds = [f"accelerated {name}"]
    if seed % 5 == 0:
        train(case, seed)
        kinds.append("trained")
    return case, " ".join(kinds)


def reader(model: Any, name: str, seed: int) -> Any:
    """A reader's own model of the sizes of `model`."""
    cfg = {
        "vocab_size": model.tok_emb.num_embeddings,
        "context_length": model.pos_emb.num_embeddings,
        "emb_dim": model.tok_emb.embedding_dim,
        "n_heads": model.trf_blocks[0].att.num_heads,
        "n_layers": len(model.trf_blocks),
        "drop_rate": 0.1,
        "qkv_bias": model.trf_blocks[0].att.W_query.bias is not None,
    }
    return random_model(lambda cfg: GPT(cfg, BOOK | ACCEPTED[name]), cfg, seed)


def train(case: Case, seed: int) -> None:
    """Two steps, with a Generator that has seen the weights of before."""
    Generator(case.model).generate(case.prompts[:1], 2)
    torch.manual_seed(seed)
    case.model.train()
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        case.model(case.prompts).logsumexp(dim=-1).mean().backward()
        optimizer.step()
    case.model.eval()


def ask(way: str, case: Case, generator: Generator, seed: int) -> list[Tensor]:
    """The rows that this way gives."""
    torch.manual_seed(seed)
    args = (case.prompts, case.max_new_tokens)
    if way == "generate":
        return list(fastgpt.generate(case.model, *args, case.context_length, **case.options))
    if way == "stream":
        steps = list(generator.stream(*args, **case.options))
        return list(torch.cat([case.prompts, *steps], dim=1))
    if way == "ragged":
        return list(generator.generate(case.ragged, case.max_new_tokens, eos_id=case.options["eos_id"]))
    return list(generator.generate(*args, **case.options))


def wanted(way: str, case: Case, seed: int) -> list[Tensor]:
    """The rows of the book's loop."""
    torch.manual_seed(seed)
    rest: tuple[Any, ...] = (case.max_new_tokens, case.context_length)
    if way != "ragged":
        return list(reference.generate(case.model, case.prompts, *rest, **case.options))
    eos_id = case.options["eos_id"]
    return [reference.generate(case.model, ids[None], *rest, eos_id=eos_id)[0] for ids in case.ragged]


def undecided(case: Case, got: Tensor, want: Tensor, drawn: bool) -> bool:
    """Whether the plain loop is within rounding of another choice at the first difference."""
    length = min(len(got), len(want))
    differs = (got[:length] != want[:length]).nonzero()
    place = int(differs[0]) if len(differs) else length
    with torch.no_grad():
        logits = case.model(want[None, max(0, place - case.context_length) : place])[0, -1]
    top = logits.topk(min(2, len(logits))).values
    # A draw may fall on any border between two tokens, so nothing tells there.
    return not drawn and bool(top[0] - top[-1] <= TIE * top.abs().max())


def check(seed: int) -> list[Outcome]:
    """All ways of one case.

    Raises:
        AssertionError: a way gives other tokens than the plain loop.
    """
    case, kind = case_of(seed)
    outcomes = []
    # The head's copy is for large heads; here every second case has one all the same.
    smallest = 0 if seed % 2 else fast_head._SMALLEST
    with mock.patch.multiple(fast_head, _SMALLEST=smallest, _WORTH_TOKENS=smallest):
        generators = {way: Generator(case.model, shortcuts=way != "plain generator") for way in WAYS}
        for way in WAYS:
            want, got = wanted(way, case, seed), ask(way, case, generators[way], seed)
            result = "equal"
            for row, (a, b) in enumerate(zip(got, want, strict=True)):
                if torch.equal(a, b):
                    continue
                drawn = way != "ragged" and "temperature" in case.options
                assert undecided(case, a, b, drawn), f"case {seed}, {way}, row {row}: {a.tolist()}, wanted {b.tolist()}"
                result = "tie"
            outcomes.append(Outcome(f"{kind}, {way}", result))
    return outcomes


def main() -> int:
    """Check so many cases, and count them."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    torch.set_num_threads(1)
    kinds: Counter[str] = Counter()
    results: Counter[str] = Counter()
    for seed in range(count):
        for outcome in check(seed):
            kinds[outcome.kind] += 1
            results[outcome.result] += 1
        if seed % 200 == 199:
            print(f"{seed + 1} cases: {dict(results)}", flush=True)
    for kind, number in sorted(kinds.items()):
        print(f"  {number:>5} {kind}")
    return 1 if results["tie"] > max(1, sum(results.values()) // 200) else 0


if __name__ == "__main__":
    sys.exit(main())

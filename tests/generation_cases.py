"""Random small models and prompts for the tests of generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgpt import reference
from fastgpt.model import GPTModel
from fastgpt.model_fast import GPTModelFast

SMALL = {
    "vocab_size": 67,
    "context_length": 12,
    "emb_dim": 24,
    "n_heads": 4,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": False,
}


def random_model(cls: type[nn.Module], cfg: dict, seed: int = 0) -> nn.Module:
    """Weights large enough that the likeliest tokens vary and are far from ties; evaluation mode."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = cls(cfg)
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.4 if parameter.ndim > 1 else 0.2)
    return model.eval()


def small_model(cls: type[nn.Module] = GPTModel, seed: int = 0, **changes) -> nn.Module:
    return random_model(cls, SMALL | changes, seed)


@dataclass
class Case:
    """One random model with prompts and options."""

    model: nn.Module
    context_length: int
    prompts: Tensor
    ragged: list[Tensor]
    max_new_tokens: int
    options: dict


def random_case(seed: int) -> Case:
    draw = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    n_heads, head_dim, context, vocab = pick(1, 4), pick(1, 9), pick(1, 14), pick(5, 70)
    cls = (GPTModel, reference.GPTModel, GPTModelFast)[seed % 3]
    cfg = {
        "vocab_size": vocab,
        "context_length": context,
        "emb_dim": n_heads * head_dim,
        "n_heads": n_heads,
        "n_layers": pick(1, 3),
        "drop_rate": 0.1,
        "qkv_bias": bool(pick(0, 1)),
    }
    model = random_model(cls, cfg, seed).to((torch.float32, torch.float64)[seed % 2])
    lengths = [pick(1, context) for _ in range(pick(1, 4))]
    options: dict = {"eos_id": pick(0, vocab - 1) if pick(0, 1) else None}
    if pick(0, 1):
        options |= {"temperature": pick(3, 30) / 10, "top_k": pick(1, vocab) if pick(0, 1) else None}
    return Case(
        model=model,
        context_length=context,
        prompts=torch.randint(vocab, (pick(1, 4), pick(1, context)), generator=draw),
        ragged=[torch.randint(vocab, (length,), generator=draw) for length in lengths],
        max_new_tokens=pick(0, 20),
        options=options,
    )

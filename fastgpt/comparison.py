"""The whole model against plain PyTorch on one set of weights: what the demo and the benchmarks time.

| provider | model                                         | generation            | optimiser              |
|----------|-----------------------------------------------|-----------------------|------------------------|
| book     | `fastgpt.reference`, the book's plain modules | no cache, as chapter 4 | AdamW as the book      |
| torch    | `fastgpt.model` on PyTorch's fused ops (SDPA) | `Generator`           | AdamW(fused=True)      |
| fastgpt  | `fastgpt.model` on our kernels                | `Generator`           | AdamW(fused=True)      |

"torch" is what a skilled user of PyTorch would write. The providers share their Parameters, so that the memory of
GPT-2 124M is taken once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import reference
from fastgpt.generation import Generator
from fastgpt.model import GPTModel
from fastgpt.ops import use_backend


def twins(cfg: Mapping[str, Any], seed: int = 123) -> tuple[GPTModel, reference.GPTModel]:
    """Our model and the book's plain one on the very same Parameter objects."""
    torch.manual_seed(seed)
    ours = GPTModel(cfg)
    with torch.device("meta"):
        plain = reference.GPTModel(cfg)
    plain.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    return ours, plain


def generation_providers(
    ours: GPTModel, plain: reference.GPTModel, prompt: Tensor, n_tokens: Mapping[str, int]
) -> dict[str, Callable[[], Any]]:
    """Greedy generation, one function a provider.

    Args:
        ours, plain: from `twins`.
        prompt: (batch, length) int64.
        n_tokens: provider -> new tokens; the slow one may be asked for fewer.
    """
    context = ours.pos_emb.num_embeddings
    generator = Generator(ours)

    def by_torch() -> Any:
        with use_backend("torch"):
            return generator.generate(prompt, n_tokens["torch"])

    def by_book() -> Tensor:
        plain.eval()
        return reference.generate_text_simple(plain, prompt, n_tokens["book"], context)

    providers: dict[str, Callable[[], Any]] = {
        "book": by_book,
        "torch": by_torch,
        "fastgpt": lambda: generator.generate(prompt, n_tokens["fastgpt"]),
    }
    return {name: providers[name] for name in n_tokens}


def training_providers(
    ours: GPTModel, plain: reference.GPTModel, batch: tuple[Tensor, Tensor], names: tuple[str, ...], lr: float = 0.0
) -> dict[str, Callable[[], float]]:
    """One training step (loss, gradients, AdamW), one function a provider; each returns the loss before its update.

    Args:
        ours, plain: from `twins`.
        batch: inputs and targets, (batch, length) int64 each.
        names: which of "book", "torch" and "fastgpt".
        lr: 0 does the work of an update, and every provider keeps seeing the same weights.
    """

    def stepper(model: nn.Module, backend: str, **options: Any) -> Callable[[], float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, **options)

        def step() -> float:
            model.train()
            optimizer.zero_grad()
            with use_backend(backend):
                logits = model(batch[0])
                loss = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
                loss.backward()
            optimizer.step()
            return loss.item()

        return step

    makers: dict[str, Callable[[], Callable[[], float]]] = {
        "book": lambda: stepper(plain, "auto"),
        "torch": lambda: stepper(ours, "torch", fused=True),
        "fastgpt": lambda: stepper(ours, "auto", fused=True),
    }
    return {name: makers[name]() for name in names}

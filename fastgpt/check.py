"""The equivalence battery of `fastgpt check`: what runs on this machine against plain PyTorch, on this machine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastgpt import ops, reference
from fastgpt.comparison import training_providers, twins
from fastgpt.generation import Generator
from fastgpt.testing import GRADIENT_FACTOR, assert_within_bound

CONFIG = dict(
    vocab_size=257, context_length=64, emb_dim=64, n_heads=4, n_layers=2, drop_rate=0.0, qkv_bias=False
)  # fmt: skip


Example = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class CheckResult:
    """One line of the battery."""

    name: str
    passed: bool
    detail: str


def run_checks(device: str = "auto") -> Iterator[CheckResult]:
    """Ops on every backend that can run, then the model: logits, gradients, generated tokens, training losses.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU if there is one.

    Yields:
        One result a check, as it is done.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        for name, make_inputs in OPS.items():
            room = importlib.import_module(f"fastgpt.ops.{name}")
            for example in room.EXAMPLE_CASES:
                case = example._replace(device=device)
                if getattr(case, "dropout", False) or getattr(case, "bias_dtype", True) is None:
                    continue  # one case of a dtype is enough
                for backend in room.BACKENDS:
                    if backend != "reference" and room.OP.why_not(backend, case) is None:
                        label = f"{name} {str(case.dtype).removeprefix('torch.')} on {backend}, value and gradients"
                        yield _checked(label, partial(_op_error, backend, *make_inputs(case.dtype)))
        yield _checked("model: logits and gradients", _model_error)
        yield _checked("model: 40 tokens with the cache, past the context", _generation)
        yield _checked("model: losses of 10 training steps", _training)


def _attention(dtype: torch.dtype) -> Example:
    return ops.causal_attention, tuple(torch.randn(2, 3, 65, 64, dtype=dtype) for _ in range(3))


def _layer_norm(dtype: torch.dtype) -> Example:
    return ops.layer_norm, (torch.randn(33, 768, dtype=dtype), *torch.randn(2, 768, dtype=dtype))


def _packed_attention(dtype: torch.dtype) -> Example:
    return ops.packed_causal_attention, (torch.randn(2, 65, 3, 3, 64, dtype=dtype),)


def _residual(dtype: torch.dtype) -> Example:
    def op(*tensors: Tensor) -> Tensor:
        return torch.stack(ops.dropout_add_layer_norm(*tensors))

    return op, (*torch.randn(2, 33, 768, dtype=dtype), *torch.randn(2, 768, dtype=dtype))


def _gelu(dtype: torch.dtype) -> Example:
    return ops.gelu, (torch.randn(33, 257, dtype=dtype) * 3, torch.randn(257, dtype=dtype))


def _linear(dtype: torch.dtype) -> Example:
    return ops.linear, tuple(torch.randn(shape).to(dtype) for shape in ((33, 65), (129, 65), (129,)))


def _embedding(dtype: torch.dtype) -> Example:
    return partial(ops.embedding, torch.randint(257, (2, 33))), tuple(torch.randn(2, 257, 64).to(dtype))


def _head_and_loss(dtype: torch.dtype) -> Example:
    targets = torch.randint(257, (33,))
    return lambda x, weight: ops.linear_cross_entropy(x, weight, targets), (
        torch.randn(33, 64).to(dtype),
        torch.randn(257, 64).to(dtype),
    )


OPS = {
    "attention": _attention,
    "packed_causal_attention": _packed_attention,
    "layer_norm": _layer_norm,
    "dropout_add_layer_norm": _residual,
    "gelu": _gelu,
    "linear": _linear,
    "embedding": _embedding,
    "linear_cross_entropy": _head_and_loss,
}


def _checked(name: str, check: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(name, True, check())
    except Exception as error:  # whatever it raises, the check of it is red and the others go on
        return CheckResult(name, False, (str(error) or type(error).__name__).splitlines()[0])


def _op_error(backend: str, op: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> str:
    dout = torch.randn_like(op(*inputs))

    def run(backend: str, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        with ops.use_backend(backend):
            out = op(*leaves)
            return (out, *torch.autograd.grad(out, leaves, dout.to(out.dtype)))

    naive, truth = run("reference"), run("reference", torch.float64)
    worst = 0.0
    for index, got in enumerate(run(backend)):
        # PyTorch's own ops round in other places than the formula does; ours keep to the strict bound.
        factor = (GRADIENT_FACTOR if index else 2.0) * (2.0 if backend == "torch" else 1.0)
        assert_within_bound(got, naive[index], truth[index], factor=factor)
        worst = max(worst, (got.double() - truth[index]).abs().max().item())
    return f"largest error {worst:.1e}"


def _model_error() -> str:
    ours, plain = twins(CONFIG)
    tokens = torch.randint(257, (2, 33))
    results = []
    for model in (ours, plain):
        model.train()
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        results.append([logits.detach(), *torch.autograd.grad(loss, list(ours.parameters()))])
    worst = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
    assert worst < 2e-5, f"difference {worst:.1e}, wanted below 2e-05"
    return f"largest difference {worst:.1e}"


def _generation() -> str:
    ours, plain = twins(CONFIG)
    prompt = torch.randint(257, (2, 40))
    want = reference.generate_text_simple(plain.eval(), prompt, 40, 64)
    got = Generator(ours).generate(prompt, 40)
    assert torch.equal(torch.as_tensor(got), want), "other tokens than the plain loop"
    return "equal"


def _training() -> str:
    ours, plain = twins(CONFIG)
    tokens = torch.randint(257, (2, 33))
    batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    losses = {}
    for name in ("book", "fastgpt"):
        ours.load_state_dict(state)
        step = training_providers(ours, plain, batch, (name,), lr=1e-3)[name]
        losses[name] = [step() for _ in range(10)]
    worst = max(abs(a - b) / a for a, b in zip(losses["book"], losses["fastgpt"], strict=True))
    assert worst < 1e-4, f"relative difference {worst:.1e}, wanted below 1e-04"
    return f"largest relative difference {worst:.1e}; the loss fell to {losses['fastgpt'][-1]:.3f}"

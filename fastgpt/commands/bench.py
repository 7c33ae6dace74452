"""`fastgpt bench`: the speed of every op here, backend by backend; with --tune, the tiles of the GPU kernels."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastgpt.commands import tune

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = """\
examples:
  fastgpt bench                        forward and backward of every op, in milliseconds, on each backend that runs here
  fastgpt bench --tune                 on a GPU: time the tiles of every Triton kernel, and remember the fastest
  fastgpt bench --tune --kernels attention --head-dim 128 --dtype float16

Backends take turns, so that a noisy machine is noisy for all alike. What --tune finds is used from then on; it lies in
~/.cache/fastgpt/tiles.json, or where FASTGPT_TILES says, and deleting that file undoes it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to time."""
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each backend (default 7)")
    parser.add_argument("--tune", action="store_true", help="find the tiles of the Triton kernels on this GPU")
    tune.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table, or write the tiles."""
    import torch

    if args.tune:
        return tune.run(args)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    print(f"forward and backward, milliseconds, median of {args.rounds} rounds, on {device}\n")
    for name, times in op_times(device, args.rounds):
        print(f"{name:<34}{'   '.join(f'{backend} {1e3 * time:.2f}' for backend, time in times.items())}", flush=True)
    return 0


def op_times(device: str, rounds: int) -> Any:
    """(op and shape, backend -> seconds) for each op, on the backends that can run it."""
    import torch

    from fastgpt.ops import BackendError, use_backend
    from fastgpt.timing import race

    def stepper(step: Callable[[], Any], backend: str) -> Callable[[], Any]:
        def function() -> Any:
            with use_backend(backend):
                return step()

        return function

    with torch.device(device):
        for name, step in steps(torch):
            providers = {}
            for backend in ("triton", "cuda", "cpu", "torch"):
                function = stepper(step, backend)
                try:
                    function()
                except BackendError:
                    continue
                providers[backend] = function
            yield name, {b: t.median for b, t in race(providers, rounds=rounds, min_time=0.01, device=device).items()}


def steps(torch: Any) -> Any:
    """(op and shape, function of one forward and backward) for each op."""
    from fastgpt import ops

    def leaf(*shape: int) -> Tensor:
        tensor: Tensor = torch.randn(*shape).mul_(0.1).requires_grad_()
        return tensor

    def step(function: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], Any]:
        dout = torch.randn_like(function(*leaves))
        return lambda: torch.autograd.grad(function(*leaves), leaves, dout)

    x, residual, wide, weight, bias = leaf(512, 768), leaf(512, 768), leaf(512, 3072), leaf(768), leaf(768)
    yield "layer_norm (512, 768)", step(ops.layer_norm, x, weight, bias)
    fused = lambda *a: ops.dropout_add_layer_norm(*a, dropout_p=0.1)[1]  # noqa: E731
    yield "dropout_add_layer_norm (512, 768)", step(fused, x, residual, weight, bias)
    yield "gelu + bias (512, 3072)", step(ops.gelu, wide, leaf(3072))
    ids, targets = torch.randint(50257, (1, 512)), torch.randint(50257, (512,))
    tokens, positions = leaf(50257, 768), leaf(512, 768)
    yield "embedding (512, 768)", step(lambda *a: ops.embedding(ids, *a), tokens, positions)
    loss = lambda x, weight: ops.linear_cross_entropy(x, weight, targets)  # noqa: E731
    yield "linear_cross_entropy (512, 50257)", step(loss, x, tokens)
    heads = [leaf(1, 12, 512, 64) for _ in range(3)]
    yield "causal_attention (12, 512, 64)", step(ops.causal_attention, *heads)

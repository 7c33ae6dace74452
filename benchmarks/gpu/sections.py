"""What is timed on a GPU: the ceilings, then each op against the best that PyTorch has."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt
from benchmarks.gpu.bench import Bench, gate
from benchmarks.gpu.decode import decode
from benchmarks.gpu.whole import training
from fastgpt import ops
from fastgpt.ops.attention.backend_cuda import cuda_path
from fastgpt.ops.dispatch import Op

KERNELS = ("triton", "cuda")
SM80 = "cuda sm_80"


def environment(bench: Bench) -> None:
    """What is installed, and what each op can run on."""
    print(platform.platform(), platform.python_version(), torch.__version__, flush=True)
    print(fastgpt.info())


@functools.cache
def copy_gbs(bench: Bench) -> float:
    """Device-to-device copy, reads and writes counted."""
    source = torch.empty((1 if bench.dry_run else 2048) * 2**20, dtype=torch.int8, device=bench.device).random_()
    target = torch.empty_like(source)
    (samples,) = bench.race({"copy": lambda: target.copy_(source)}, rounds=7, cold=False).values()
    return 2 * source.nbytes / (sorted(samples)[len(samples) // 2] * 1e-3) / 1e9


def limits(bench: Bench) -> None:
    """Copy bandwidth and the rate of a large bf16 matrix product on random data."""
    bench.write(case="copy", limit=round(copy_gbs(bench), 1), unit="GB/s")
    n = 64 if bench.dry_run else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    times = bench.race({"torch.mm": lambda: a @ b}, rounds=9, cold=False)
    bench.rows_of(f"bf16 matrix product {n}", times, 2.0 * n**3, "TFLOP/s")


def backends_of(op: Op, *case: Any) -> list[str]:
    """The GPU backends of a room that can run a case (on the CPU, in a dry run: its CPU backend)."""
    found = []
    for name in (*KERNELS, "cpu"):
        reason = op.why_not(name, case[0]) if name in op.backends else "the room has none"
        if reason is None:
            found.append(name)
        elif name != "cpu":
            print(f"{op.name} on {name}: {reason}", flush=True)
    return found


def label(backend: str) -> str:
    """The provider's name in rows."""
    return "fastgpt cpu" if backend == "cpu" else backend


def attention(bench: Bench) -> None:
    """Causal, head_dim 64, bf16, 16k tokens in all, 32 heads: forward, backward, and with dropout 0.1."""
    from fastgpt.ops.attention import OP, Case

    tokens, n_heads, head_dim = (64, 2, 64) if bench.dry_run else (16384, 32, 64)
    dtype = torch.float32 if bench.dry_run else torch.bfloat16
    # The class of FlashAttention-3, whose paper gives these on an H100.
    forward_target, backward_target = {1024: 320, 16384: 460}, {1024: 300, 16384: 430}
    for p in (0.0, 0.1):
        for length in (32, 64) if bench.dry_run else (1024, 2048, 4096, 8192, 16384):
            backends = backends_of(OP, Case(bench.device, dtype, head_dim, True, p > 0.0, True))

            def case(p: float = p, length: int = length, backends: list[str] = backends) -> None:
                batch = tokens // length
                qkv = torch.randn(batch, length, 3, n_heads, head_dim, device=bench.device, dtype=dtype)
                q, k, v = (qkv[:, :, i].transpose(1, 2).requires_grad_() for i in range(3))
                forwards: dict[str, Callable[[], Tensor]] = {
                    name: functools.partial(_sdpa, kind, q, k, v, p) for name, kind in _sdpa_kinds(bench, q, k, v, p)
                }
                for backend in backends:
                    forwards[label(backend)] = functools.partial(
                        ops.causal_attention, q, k, v, dropout_p=p, backend=backend
                    )
                if "cuda" in backends:
                    # The kernels of any GPU, where "cuda" alone may run those of Hopper.
                    forwards[SM80] = functools.partial(_on_path, SM80, forwards["cuda"])
                dout = torch.randn_like(q)
                if p == 0.0:
                    _gate_attention(forwards, (q, k, v), dout)
                flops = 2.0 * batch * n_heads * length**2 * head_dim
                name = f"attention bf16 D64 {length} dropout {p:g}"
                with torch.no_grad():
                    times = bench.race(forwards)
                target = f"{forward_target[length]} TFLOP/s (cuda)" if p == 0.0 and length in forward_target else None
                bench.rows_of(f"{name} forward", times, flops, "TFLOP/s", target=target or "1.3 x" * (p > 0))
                outs = {name: forward() for name, forward in forwards.items()}
                backwards = {
                    name: functools.partial(
                        _on_path, name, torch.autograd.grad, out, (q, k, v), dout, retain_graph=True
                    )
                    for name, out in outs.items()
                }
                target = f"{backward_target[length]} TFLOP/s (cuda)" if p == 0.0 and length in backward_target else None
                times = bench.race(backwards)
                bench.rows_of(f"{name} backward", times, 2.5 * flops, "TFLOP/s", target=target or "0.9 x")

            bench.attempt(f"attention {length} dropout {p:g}", case)


def _on_path(provider: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """function(...), with the CUDA kernels that this provider stands for."""
    with cuda_path("sm_80") if provider == SM80 else nullcontext():
        return function(*arguments, **options)


def _sdpa(kind: SDPBackend, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    with sdpa_kernel(kind):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)


def _sdpa_kinds(bench: Bench, q: Tensor, k: Tensor, v: Tensor, p: float) -> list[tuple[str, SDPBackend]]:
    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    kinds["efficient"] = SDPBackend.EFFICIENT_ATTENTION
    if bench.dry_run:
        kinds = {"math": SDPBackend.MATH}
    usable = []
    for name, kind in kinds.items():
        try:
            _sdpa(kind, q, k, v, p)
            usable.append((name, kind))
        except RuntimeError as error:
            print(f"SDPA {name}: {str(error).splitlines()[0]}", flush=True)
    return usable


def _gate_attention(forwards: Mapping[str, Callable[[], Tensor]], inputs: tuple[Tensor, ...], dout: Tensor) -> None:
    wide = [t.detach().float().requires_grad_() for t in inputs]
    out = F.scaled_dot_product_attention(*wide, is_causal=True)
    truth = (out, *torch.autograd.grad(out, wide, dout.float()))
    naive: tuple[Tensor, ...] | None = None
    for name, forward in forwards.items():
        made = forward()
        got = (made, *_on_path(name, torch.autograd.grad, made, inputs, dout))
        naive = got if naive is None else naive
        for part, a, b, c in zip(("out", "dq", "dk", "dv"), got, naive, truth, strict=True):
            gate(f"{name} {part}", a, b, c, factor=2.0 if part == "out" else 3.0)


def fused(bench: Bench) -> None:
    """The passes that only move bytes, at 16k rows: against eager PyTorch and torch.compile, as a share of the copy."""
    rows = 64 if bench.dry_run else 16384
    dtype = torch.float32 if bench.dry_run else torch.bfloat16
    make = functools.partial(torch.randn, device=bench.device, dtype=dtype)
    x, residual, wide = make(rows, 768), make(rows, 768), make(rows, 3072)
    weight, bias, wide_bias = make(768), make(768), make(3072)

    def add_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor, p: float = 0.0) -> tuple[Tensor, Tensor]:
        total = r + F.dropout(x, p)
        return total, F.layer_norm(total, w.shape, w, b)

    one = x.nbytes
    table: list[tuple[str, Callable[..., Any], Callable[..., Any], tuple[Tensor, ...], float, float]] = [
        ("layer_norm 16k x 768", lambda *a: F.layer_norm(a[0], (768,), *a[1:]), ops.layer_norm, (x, weight, bias),
         2 * one, 3 * one),
        ("gelu 16k x 3072", lambda a: F.gelu(a, approximate="tanh"), ops.gelu, (wide,), 8 * one, 12 * one),
        ("gelu + bias 16k x 3072", lambda a, b: F.gelu(a + b, approximate="tanh"), ops.gelu, (wide, wide_bias),
         8 * one, 12 * one),
        ("add + layer_norm 16k x 768", add_norm, ops.dropout_add_layer_norm, (x, residual, weight, bias),
         4 * one, 4 * one),
        ("dropout 0.1 + add + layer_norm 16k x 768", functools.partial(add_norm, p=0.1),
         functools.partial(ops.dropout_add_layer_norm, dropout_p=0.1), (x, residual, weight, bias), 4 * one, 5 * one),
    ]  # fmt: skip
    for name, plain, ours, inputs, forward_bytes, backward_bytes in table:
        bench.attempt(
            name, functools.partial(_fused_case, bench, name, plain, ours, inputs, forward_bytes, backward_bytes)
        )


def _fused_case(
    bench: Bench,
    name: str,
    plain: Callable[..., Any],
    ours: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    forward_bytes: float,
    backward_bytes: float,
) -> None:
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    forwards: dict[str, Callable[[], Any]] = {"eager": functools.partial(plain, *leaves)}
    if not bench.dry_run:
        forwards["compile"] = functools.partial(torch.compile(plain, dynamic=False), *leaves)
    for backend in (*KERNELS, "cpu"):
        try:
            ours(*leaves, backend=backend)
            forwards[label(backend)] = functools.partial(ours, *leaves, backend=backend)
        except ops.BackendError as error:
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
    outs = {provider: _tensors(forward()) for provider, forward in forwards.items()}
    douts = tuple(torch.randn_like(out) for out in outs["eager"])
    if "dropout" not in name:
        wide = [t.detach().float().requires_grad_() for t in inputs]
        made = _tensors(plain(*wide))
        truth = (*made, *torch.autograd.grad(made, wide, [d.float() for d in douts]))
        naive = (*outs["eager"], *torch.autograd.grad(outs["eager"], leaves, douts, retain_graph=True))
        for provider, out in outs.items():
            got = (*out, *torch.autograd.grad(out, leaves, douts, retain_graph=True))
            for a, b, c in zip(got, naive, truth, strict=True):
                gate(f"{name} {provider}", a, b, c, factor=3.0)
    limit = copy_gbs(bench)
    with torch.no_grad():
        times = bench.race(forwards)
    bench.rows_of(f"{name} forward", times, forward_bytes, "GB/s", limit=limit, target="90 % of copy")
    backwards = {
        provider: functools.partial(torch.autograd.grad, out, leaves, douts, retain_graph=True)
        for provider, out in outs.items()
    }
    bench.rows_of(f"{name} backward", bench.race(backwards), backward_bytes, "GB/s", limit=limit, target="90 % of copy")


def _tensors(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def loss(bench: Bench) -> None:
    """Head and loss, forward and backward, at (16k, 768, 50257): time, and the memory above the inputs."""
    rows, n, vocab = (32, 16, 101) if bench.dry_run else (16384, 768, 50257)
    dtype = torch.float32 if bench.dry_run else torch.bfloat16
    x = torch.randn(rows, n, device=bench.device, dtype=dtype, requires_grad=True)
    weight = (0.02 * torch.randn(vocab, n, device=bench.device, dtype=dtype)).requires_grad_()
    targets = torch.randint(vocab, (rows,), device=bench.device)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.T).float(), targets)

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        made = function(x, weight)
        return made, *torch.autograd.grad(made, (x, weight))

    providers: dict[str, Callable[[], tuple[Tensor, ...]]] = {"eager": functools.partial(run, plain)}
    if not bench.dry_run:
        providers["compile"] = functools.partial(run, torch.compile(plain, dynamic=False))
    for backend in (*KERNELS, "cpu"):
        own = functools.partial(_own_loss, targets, backend)
        try:
            run(own)
            providers[label(backend)] = functools.partial(run, own)
        except ops.BackendError as error:
            print(f"linear_cross_entropy: {str(error).splitlines()[0]}", flush=True)

    def case() -> None:
        made = plain(wide_x := x.detach().float().requires_grad_(), wide_w := weight.detach().float().requires_grad_())
        truth = (made, *torch.autograd.grad(made, (wide_x, wide_w)))
        naive = run(plain)
        memory = {}
        for provider, step in providers.items():
            for a, b, c in zip(step(), naive, truth, strict=True):
                gate(f"linear_cross_entropy {provider}", a, b, c, factor=3.0)
            memory[provider] = _peak_mb(bench, step)
        times = bench.race(providers, rounds=9)
        name = f"linear_cross_entropy ({rows}, {n}, {vocab})"
        for provider in providers:
            bench.rows_of(
                name, {provider: times[provider]}, 6.0 * rows * n * vocab, "TFLOP/s",
                target="1.2 x, a fifth of the memory", peak_mb=memory[provider],
            )  # fmt: skip

    bench.attempt("linear_cross_entropy", case)


def _own_loss(targets: Tensor, backend: str, x: Tensor, weight: Tensor) -> Tensor:
    return ops.linear_cross_entropy(x, weight, targets, backend=backend)


def _peak_mb(bench: Bench, step: Callable[[], Any]) -> float:
    if bench.dry_run:
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


RUNNERS: dict[str, Callable[[Bench], None]] = {
    "environment": environment,
    "limits": limits,
    "attention": attention,
    "fused": fused,
    "loss": loss,
    "decode": decode,
    "training": training,
}

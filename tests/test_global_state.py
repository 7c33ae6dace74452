"""What the process has set: fastgpt works under it, and leaves it as it is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from generation_cases import small_model

from fastgpt import ops, reference
from fastgpt.generation import Generator
from fastgpt.ops import extension

needs_extension = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))

# Everything of torch and Python that a library could change for its user without a word.
STATE = """
import os, random, signal, sys, warnings, torch
def state():
    flags = {}
    for name in ("cudnn", "mkldnn", "mkl", "openmp", "cuda", "cuda.matmul"):
        module = torch.backends
        for part in name.split("."):
            module = getattr(module, part)
        for flag in ("enabled", "benchmark", "deterministic", "allow_tf32", "benchmark_limit",
                     "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"):
            value = getattr(module, flag, None)
            if not callable(value):
                flags[name, flag] = str(value)
    return {
        "threads": torch.get_num_threads(), "interop": torch.get_num_interop_threads(),
        "dtype": torch.get_default_dtype(), "device": str(torch.get_default_device()),
        "matmul": torch.get_float32_matmul_precision(), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(), "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(), "anomaly": torch.is_anomaly_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")), "flags": flags,
        "sdpa": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "flush": torch.tensor(1e-40).mul(1.0).item(), "print": repr(torch.tensor(1 / 3)),
        "filters": list(warnings.filters), "environment": dict(os.environ), "hook": sys.excepthook,
        "sigint": signal.getsignal(signal.SIGINT), "recursion": sys.getrecursionlimit(),
    }
torch.manual_seed(5)
random.seed(5)
# PyTorch's own optimisers import its compiler at their first step, which sets a variable and a warnings filter.
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
def draws():
    return torch.initial_seed(), torch.get_rng_state().tolist(), random.getstate()
def compare(before, after):
    assert before == after, {key: (before[key], after[key]) for key in before if before[key] != after[key]}
before, drawn = state(), draws()
"""
USE = """
import io, contextlib, fastgpt
from fastgpt import training
cfg = dict(vocab_size=67, context_length=12, emb_dim=24, n_heads=4, n_layers=2, drop_rate=0.1, qkv_bias=False)
torch.manual_seed(1)
model = fastgpt.GPTModel(cfg)
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.randint(67, (2, 12))
batches = [(ids[:, :-1], ids[:, 1:])] * 4
for inputs, targets in batches:
    training.calc_loss_batch(inputs, targets, model, "cpu").backward()
    optimizer.step()
model.eval()
for dtype in (None, torch.bfloat16, "int8", "int4"):
    fastgpt.Generator(model, dtype=dtype).generate(ids[:, :3], 12, temperature=1.0, top_k=5, seed=3)
fastgpt.generate(model, ids[:, :3], 5, 12)
with fastgpt.use_backend("reference") if hasattr(fastgpt, "use_backend") else contextlib.nullcontext():
    model(ids)
with fastgpt.memory.kept_memory():
    model(ids)
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", STATE + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_fastgpt_changes_nothing_of_the_process():
    run("""
import fastgpt, fastgpt.cli, fastgpt.book.ch07, fastgpt.finetuning, fastgpt.training, fastgpt.generation
compare(before, state())
assert draws() == drawn
""")


def test_using_fastgpt_changes_nothing_of_the_process():
    run(f"{USE}\ncompare(before, state())")


def test_greedy_generation_draws_nothing():
    run("""
import fastgpt
model = fastgpt.GPTModel(dict(vocab_size=67, context_length=12, emb_dim=24, n_heads=4, n_layers=2, drop_rate=0.1,
                              qkv_bias=False)).eval()
drawn = draws()
generator = fastgpt.Generator(model)
generator.generate([[1, 2]], 20)
generator.generate([[1, 2]], 20, temperature=1.0, seed=1)
assert draws() == drawn
""")


def losses_and_tokens():
    """One training step and generation of a small model, on the CPU whatever the default device is."""
    with torch.device("cpu"):
        torch.manual_seed(0)
        model = small_model(qkv_bias=True)
        ids = torch.randint(67, (2, 12))
    hidden = model.tok_emb.weight[ids].detach().requires_grad_()
    x = ops.layer_norm(ops.gelu(hidden, model.pos_emb.weight[0]), *(p for p in model.final_norm.parameters()), eps=1e-5)
    loss = ops.linear_cross_entropy(ops.linear(x, model.out_head.weight[:24]), model.out_head.weight, ids)
    total, _ = ops.dropout_add_layer_norm(x, x, model.final_norm.scale, model.final_norm.shift)
    (loss + total.mean() + ops.embedding(ids, model.tok_emb.weight, model.pos_emb.weight).mean()).backward()
    grads = [hidden.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    with torch.no_grad():
        logits = model(ids)
    tokens = [Generator(model, dtype=dtype).generate([[1, 2, 3], [4]], 15) for dtype in (None, torch.bfloat16, "int4")]
    return [loss.detach(), *grads, logits, *(row for rows in tokens for row in rows)]


@needs_extension
def test_the_ops_and_the_decoder_work_under_a_default_device_that_is_another():
    want = losses_and_tokens()
    torch.set_default_device("meta")
    try:
        got = losses_and_tokens()
    finally:
        torch.set_default_device(None)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_default_dtype_of_another_size_gives_the_kernels_no_smaller_buffers(dtype):
    model, ids = small_model(qkv_bias=True), torch.tensor([[1, 2, 3]])
    weight, bias = model.trf_blocks[0].ff.layers[0].weight, model.trf_blocks[0].ff.layers[0].bias
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    generator = Generator(model)
    want = generator.generate(ids, 15)
    want_grads = torch.autograd.grad(ops.linear(x, weight, bias).sum(), (x, weight, bias))
    torch.set_default_dtype(dtype)
    try:
        got = Generator(model).generate(ids, 15)
        got_grads = torch.autograd.grad(ops.linear(x, weight, bias).sum(), (x, weight, bias))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)
    assert torch.equal(want, reference.generate_text_simple(model, ids, 15, 12))
    for a, b in zip(got_grads, want_grads, strict=True):
        assert torch.equal(a, b)


def test_a_variable_of_the_environment_is_read_and_never_written():
    before = dict(os.environ)
    small = Generator(small_model())
    small.generate([[1]], 3)
    assert dict(os.environ) == before

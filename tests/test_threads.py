"""Threads, signals and forks around the kernels and the Generator."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from generation_cases import small_model

from fastgpt import ops
from fastgpt.generation import Generator
from fastgpt.model import GPTModel
from fastgpt.ops import extension
from fastgpt.training import calc_loss_batch

pytestmark = pytest.mark.skipif(extension.why_not("cpu") is not None, reason=str(extension.why_not("cpu")))

CFG = {
    "vocab_size": 211, "context_length": 64, "emb_dim": 128, "n_heads": 4, "n_layers": 2, "drop_rate": 0.0,
    "qkv_bias": False,
}  # fmt: skip


def together(*work):
    """What each function gives, all run at once, each in a thread of its own."""
    results: list = [None] * len(work)

    def run(number):
        results[number] = work[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def model_of(seed: int) -> GPTModel:
    torch.manual_seed(seed)
    return GPTModel(CFG)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "int8", "int4"])
def test_two_generators_in_two_threads_give_what_each_gives_alone(dtype):
    prompts = [[1, 2, 3], [4, 5]]

    def work(seed):
        generator = Generator(small_model(seed=seed), dtype=dtype)
        return lambda: [generator.generate(prompts, 30) for _ in range(5)]

    works = [work(seed) for seed in range(3)]
    alone = [one() for one in works]
    for got, want in zip(together(*works), alone, strict=True):
        assert all(torch.equal(a, b) for g, w in zip(got, want, strict=True) for a, b in zip(g, w, strict=True))


def test_two_models_trained_in_two_threads_have_the_losses_they_have_alone():
    def train(seed):
        model = model_of(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids = torch.randint(211, (4, 33), generator=torch.Generator().manual_seed(seed))

        def steps() -> list[float]:
            losses = []
            for _ in range(15):
                optimizer.zero_grad()
                loss = calc_loss_batch(ids[:, :-1], ids[:, 1:], model, "cpu")
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses

        return steps

    alone = [train(seed)() for seed in range(2)]
    assert together(train(0), train(1)) == alone


def test_python_runs_while_a_kernel_does():
    q = torch.randn(1, 8, 2048, 64, generator=torch.Generator().manual_seed(0))
    ended = threading.Event()

    def kernel() -> None:
        for _ in range(3):
            ops.causal_attention(q, q, q, backend="cpu")
        ended.set()

    thread = threading.Thread(target=kernel)
    thread.start()
    turns = 0
    while not ended.is_set():
        turns += 1
        time.sleep(1e-4)
    thread.join()
    # Three calls would give this thread three turns if they kept the interpreter.
    assert turns > 20


INTERRUPT = """
import signal, torch, fastgpt
# A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
cfg = dict(vocab_size=211, context_length=1024, emb_dim=256, n_heads=4, n_layers=4, drop_rate=0.0, qkv_bias=False)
model = fastgpt.GPTModel(cfg).eval()
generator = fastgpt.Generator(model)
want = generator.generate([[1, 2, 3]], 20)
print("ready", flush=True)
try:
    while True:
        generator.generate([[1, 2, 3]], 1000)
except KeyboardInterrupt:
    assert torch.equal(generator.generate([[1, 2, 3]], 20)[0], want[0])
    print("interrupted", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_ends_generation_between_tokens_and_the_generator_goes_on():
    process = subprocess.Popen([sys.executable, "-c", INTERRUPT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    started = time.perf_counter()
    process.send_signal(signal.SIGINT)
    try:
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert rest == "interrupted\n" and process.returncode == 0
    assert time.perf_counter() - started < 20


FORK = """
import os, sys, numpy, torch, fastgpt
from fastgpt import ops
torch.set_num_threads(2)
torch.manual_seed(0)
x, weight, bias = torch.randn(512, 256), torch.randn(256), torch.randn(256)
q = torch.randn(2, 4, 128, 64)
def work():
    return [
        ops.layer_norm(x, weight, bias, backend="cpu"), ops.gelu(x, backend="cpu"),
        ops.causal_attention(q, q, q, backend="cpu"),
    ]
want = work()
child = os.fork()
if child == 0:
    # NumPy compares: PyTorch's own parallel ops are what would hang here.
    os._exit(0 if all(numpy.allclose(a.numpy(), b.numpy(), atol=1e-5) for a, b in zip(work(), want)) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_runs_the_kernels_on_one_thread():
    done = subprocess.run([sys.executable, "-c", FORK], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LEAK = """
import os, torch, fastgpt
from fastgpt.training import calc_loss_batch
torch.set_num_threads(1)
torch.manual_seed(0)
cfg = dict(vocab_size=503, context_length=32, emb_dim=48, n_heads=4, n_layers=2, drop_rate=0.1, qkv_bias=False)
model = fastgpt.GPTModel(cfg)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.randint(503, (4, 33))
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
def steps(n):
    for i in range(n):
        length = 33 - i % 16
        optimizer.zero_grad()
        calc_loss_batch(ids[:, :length - 1], ids[:, 1:length], model, "cpu").backward()
        optimizer.step()
    return resident()
with fastgpt.memory.kept_memory():
    sizes = [steps(200)] + [steps(400) for _ in range(3)]
growth = [after - before for before, after in zip(sizes, sizes[1:])]
# One leaked row of logits a step would be 0.8 MiB in each part; a huge page that the system gives is 2 MiB in one.
assert min(growth) < 0.5, sizes
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the resident memory on Linux alone")
def test_a_thousand_training_steps_do_not_make_the_process_grow():
    done = subprocess.run([sys.executable, "-c", LEAK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

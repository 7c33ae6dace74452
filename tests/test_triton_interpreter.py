"""Every Triton kernel on a machine without a GPU: the tests of the ops, run in Triton's interpreter.

The interpreter replaces `triton.jit` when a kernel is decorated, so it has a process of its own.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt import env
from fastgpt.ops import triton_support
from fastgpt.ops.attention import OP as ATTENTION
from fastgpt.ops.attention import Case, backend_triton
from fastgpt.ops.dropout_add_layer_norm import OP as DROPOUT_ADD_LAYER_NORM
from fastgpt.ops.embedding import OP as EMBEDDING
from fastgpt.ops.gelu import OP as GELU
from fastgpt.ops.layer_norm import OP as LAYER_NORM
from fastgpt.ops.linear_cross_entropy import OP as LINEAR_CROSS_ENTROPY
from fastgpt.ops.packed_causal_attention import OP as PACKED_CAUSAL_ATTENTION

TESTS = Path(__file__).resolve().parent
TRITON = importlib.util.find_spec("triton") is not None
# Thousands of rows take a GPU a moment and the interpreter 20 s; test_triton_rows.py has programs that loop with fewer.
# Of the embedding's widths one in bfloat16 is enough here.
SLOW = (
    "thousands_of_rows or many_rows or many_chunks or threads_share or thousand_times"
    " or (test_embedding and within_the_bound and dtype1 and not 17)"
)


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
@pytest.mark.parametrize(
    "files",
    [
        ("test_layer_norm.py", "test_gelu.py", "test_triton_rounding.py"),
        ("test_dropout_add_layer_norm.py", "test_embedding.py"),
        ("test_linear_cross_entropy.py", "test_triton_rows.py", "test_triton_tuning.py"),
        ("test_triton_attention.py", "test_packed_causal_attention.py"),
    ],
    ids=["norm-gelu", "residual-embedding", "loss-tuning", "attention"],
)
def test_the_kernels_pass_their_tests_in_the_interpreter(files):
    # Without a GPU: a visible one would be used beside the interpreter, and slowly.
    variables = {"TRITON_INTERPRET": "1", "FASTGPT_REQUIRE": "triton", "CUDA_VISIBLE_DEVICES": ""}
    options = ["-p", "no:cacheprovider", "-k", f"triton and not ({SLOW})"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(TESTS / file) for file in files)],
        env=os.environ | variables | {"OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    # Seen with Triton 3.6 and NumPy 2.4, which constraints.txt rules out; 3.6 with 2.3 and 3.9 with 2.4 pass.
    broken = "only 0-dimensional arrays can be converted to Python scalars" in done.stdout
    if broken and "triton" not in env.require():
        pytest.skip("the interpreter of this Triton does not work with this NumPy")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout, done.stdout[-500:]


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_tensors_on_the_cpu_are_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in triton_support.why_not("cpu", torch.float32)


def test_bfloat16_attention_is_refused_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "bfloat16" in ATTENTION.module("triton").why_not(Case("cpu", torch.bfloat16, 64, True, False, False))


OPS = [
    ATTENTION, PACKED_CAUSAL_ATTENTION, LAYER_NORM, GELU, DROPOUT_ADD_LAYER_NORM, EMBEDDING, LINEAR_CROSS_ENTROPY,
]  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_triton_is_never_chosen_automatically_before_a_gpu_has_run_it(op):
    assert op.module("triton").AUTOMATIC == triton_support.UNPROVEN


def test_an_axis_of_one_element_does_not_cost_the_16_byte_accesses():
    view = torch.zeros(3, 1, 40, 16).as_strided((3, 1, 40, 16), (640, 7, 16, 1))
    assert backend_triton._strides(view) == ([80, 0, 2], 8)
    assert backend_triton._strides(view[..., 1:], view[:, :, ::3])[1] == 8
    assert backend_triton._strides(torch.zeros(3, 2, 5, 17))[1] == 1


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("pass", False),
        ("torch.set_float32_matmul_precision('high')", True),
        ("torch.backends.cuda.matmul.allow_tf32 = True", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", False),
    ],
)
def test_tf32_is_allowed_where_pytorch_allows_it(setting, allowed):
    # In a process of its own: PyTorch refuses one way of setting it after the other.
    if "fp32_precision" in setting and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this PyTorch has no fp32_precision")
    code = f"import torch; from fastgpt.ops import triton_support; {setting}; print(triton_support.tf32_allowed())"
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(allowed)

"""The Triton kernels on rows compiled for GPUs that need not be there: they fit, and spill nothing.

`pytest -s` prints registers, stack and shared memory of each; they are recorded as properties of the tests as well.
"""

from __future__ import annotations

import importlib
import importlib.util

import pytest

from fastgpt.ops import triton_support

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if triton_support.interpreting():
    pytest.skip("TRITON_INTERPRET leaves nothing to compile", allow_module_level=True)

from ahead_of_time import SHARED_LIMIT, SIXTEEN_BYTES, compiled, usage

from fastgpt.ops.embedding import backend_triton as embedding
from fastgpt.ops.gelu import backend_triton as gelu
from fastgpt.ops.layer_norm import backend_triton as layer_norm
from fastgpt.ops.linear_cross_entropy import backend_triton as cross_entropy

# Pointers that are float32 (or an integer) whatever the dtype of the tensors.
FIXED = {
    "mean_ptr": "fp32", "rstd_ptr": "fp32", "partial_ptr": "fp32", "losses_ptr": "fp32",
    "ids_ptr": "i64", "order_ptr": "i64", "begins_ptr": "i64", "targets_ptr": "i64", "count_ptr": "i64",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def rows(n, share, **constants):
    height, block, num_warps = layer_norm.tile(n, share)
    return {"N": n, "ROWS": height, "BLOCK": block, **constants}, num_warps


def gelu_rows(n):
    height, block = gelu.tile(n)
    return {"N": n, "ROWS": height, "BLOCK": block}, gelu.NUM_WARPS


def runs(n, dropout):
    return {"N": n, "ROWS": embedding.RUN_ROWS, "BLOCK": embedding.RUN_COLUMNS, "DROPOUT": dropout}, 4


def loss(gradient):
    return {"PADDED": 50304, "BLOCK": cross_entropy.BLOCK, "GRADIENT": gradient}, cross_entropy.NUM_WARPS


NORM, TOKENS = "dropout_add_layer_norm", "embedding"
# file, kernel, constants and warps
KERNELS = {
    "norm": (NORM, "dropout_add_layer_norm_forward", rows(768, 2, DROPOUT=False)),
    "norm-dropout": (NORM, "dropout_add_layer_norm_forward", rows(768, 2, DROPOUT=True)),
    "norm-1600-dropout": (NORM, "dropout_add_layer_norm_forward", rows(1600, 2, DROPOUT=True)),
    "norm-backward": (NORM, "dropout_add_layer_norm_backward", rows(768, 4, DROPOUT=False, HAS_DTOTAL=True)),
    "norm-backward-dropout": (NORM, "dropout_add_layer_norm_backward", rows(768, 4, DROPOUT=True, HAS_DTOTAL=True)),
    "norm-backward-1600": (NORM, "dropout_add_layer_norm_backward", rows(1600, 4, DROPOUT=True, HAS_DTOTAL=True)),
    "gelu-bias": ("gelu", "gelu_bias_forward", gelu_rows(3072)),
    "gelu-bias-backward": ("gelu", "gelu_bias_backward", gelu_rows(3072)),
    "gelu-bias-backward-6400": ("gelu", "gelu_bias_backward", gelu_rows(6400)),
    "embedding-dropout": (TOKENS, "embedding_forward", rows(768, 2, DROPOUT=True)),
    "embedding-weight": (TOKENS, "embedding_backward_weight", runs(768, True)),
    "embedding-position": (TOKENS, "embedding_backward_position", runs(768, True)),
    "loss": ("cross_entropy", "cross_entropy", loss(False)),
    "loss-gradient": ("cross_entropy", "cross_entropy", loss(True)),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_on_rows_fits_and_spills_nothing(name, capability, record_property, tmp_path):
    file, kernel, (constants, num_warps) = KERNELS[name]
    function = getattr(importlib.import_module(f"fastgpt.kernels.triton.{file}"), f"{kernel}_kernel")
    pointers = {p.name: FIXED.get(p.name, "bf16") for p in function.params}
    built = compiled(function, capability, pointers, constants, num_warps)
    shared, _, stack = usage(built, record_property, tmp_path)
    assert shared <= SHARED_LIMIT[capability]
    assert not stack, f"{stack} bytes of spills"
    if not name.startswith("embedding-"):
        assert SIXTEEN_BYTES.search(built.asm["ptx"])

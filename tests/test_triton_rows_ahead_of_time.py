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

from fastgpt.kernels.triton import row_tables
from fastgpt.ops.gelu import backend_triton as gelu
from fastgpt.ops.layer_norm import backend_triton as layer_norm

NORM, TOKENS = "dropout_add_layer_norm", "embedding"
# Pointers that are float32 (or an integer) whatever the dtype of the tensors.
FIXED = {
    "mean_ptr": "fp32", "rstd_ptr": "fp32", "partial_ptr": "fp32", "losses_ptr": "fp32",
    "ids_ptr": "i64", "order_ptr": "i64", "begins_ptr": "i64", "targets_ptr": "i64", "count_ptr": "i64",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def rows(kernel, n, dropout=False, **constants):
    tile = row_tables.choose(kernel, "sm_90", 16, layer_norm.block(n), dropout)
    return {"N": n, "ROWS": tile.rows, "BLOCK": layer_norm.block(n), **constants}, tile.num_warps


def norm(kernel, n, dropout, **constants):
    return rows(f"{NORM}_{kernel}", n, dropout, DROPOUT=dropout, **constants)


def gelu_rows(kernel, n):
    tile = row_tables.choose(kernel, "sm_90", 16, layer_norm.block(n))
    height, block = gelu.sides(n, tile)
    return {"N": n, "ROWS": height, "BLOCK": block}, tile.num_warps


def runs(n, dropout):
    tile = row_tables.choose("embedding_backward", "sm_90", 16, layer_norm.block(n), dropout)
    return {"N": n, "ROWS": tile.rows, "BLOCK": tile.columns, "DROPOUT": dropout}, tile.num_warps


def loss(gradient):
    tile = row_tables.choose("cross_entropy", "sm_90", 16, 65536)
    return {"PADDED": 50304, "BLOCK": tile.columns, "GRADIENT": gradient}, tile.num_warps


# file, kernel, constants and warps
KERNELS = {
    "norm": (NORM, f"{NORM}_forward", norm("forward", 768, False)),
    "norm-dropout": (NORM, f"{NORM}_forward", norm("forward", 768, True)),
    "norm-1600-dropout": (NORM, f"{NORM}_forward", norm("forward", 1600, True)),
    "norm-backward": (NORM, f"{NORM}_backward", norm("backward", 768, False, HAS_DTOTAL=True)),
    "norm-backward-dropout": (NORM, f"{NORM}_backward", norm("backward", 768, True, HAS_DTOTAL=True)),
    "norm-backward-1600": (NORM, f"{NORM}_backward", norm("backward", 1600, True, HAS_DTOTAL=True)),
    "gelu-bias": ("gelu", "gelu_bias_forward", gelu_rows("gelu_bias_forward", 3072)),
    "gelu-bias-backward": ("gelu", "gelu_bias_backward", gelu_rows("gelu_bias_backward", 3072)),
    "gelu-bias-backward-6400": ("gelu", "gelu_bias_backward", gelu_rows("gelu_bias_backward", 6400)),
    "embedding-dropout": (TOKENS, "embedding_forward", rows("embedding_forward", 768, True, DROPOUT=True)),
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

"""Every Triton kernel compiled for a GPU that need not be there: it compiles, fits, and takes the path that is meant.

Registers, stack (what spills lie in) and shared memory of each kernel are recorded as properties of its test
(pytest -o junit_family=xunit1 --junit-xml=FILE).
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from ahead_of_time import SHARED_LIMIT, SIXTEEN_BYTES, compiled, usage

from fastgpt import tuning
from fastgpt.ops import triton_support
from fastgpt.ops.attention import backend_triton as attention_backend
from fastgpt.ops.gelu import backend_triton as gelu_backend
from fastgpt.ops.layer_norm import backend_triton as layer_norm
from fastgpt.tuning import AttentionTile, triton_version

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if triton_support.interpreting():
    pytest.skip("TRITON_INTERPRET leaves nothing to compile", allow_module_level=True)

# Bytes of the stack that an attention kernel may spill to beside 255 registers: none under Triton 3.9, for which the
# tiles were chosen, up to 96 under 3.6.
STACK_LIMIT = 0 if triton_version().startswith("3.9.") else 128
# No tile of 16 found mends these 280 to 360 bytes: the compiler keeps whole rows of q and dout in registers over the
# loop, as the scalar units want them. Only tl.range(disable_licm=True), not in Triton before 3.4, brings them to 32.
KNOWN = {("backward_dq", "fp32", 256): 384}
BITS = {"fp32": 32, "bf16": 16, "fp16": 16}
FORWARD, DQ, DKDV = "forward", "backward_dq", "backward_dkdv"

# capability, dtype, head_dim, dropout: the common cases, and padding.
COMMON = [
    (80, "bf16", 64, True),
    (90, "bf16", 64, False),
    (90, "bf16", 64, True),
    (90, "bf16", 128, True),
    (90, "fp16", 80, False),
]
CASES = [
    *((kind, *case) for kind in (FORWARD, DQ, DKDV) for case in COMMON),
    # Kernels that once spilled: the largest head on the smallest chip, true float32, operands in registers.
    (FORWARD, 86, "bf16", 256, True),
    (DKDV, 86, "bf16", 256, True),
    (DQ, 80, "bf16", 128, True),
    (FORWARD, 80, "fp32", 64, True),
    (DKDV, 80, "fp32", 64, True),
    (DQ, 90, "fp32", 256, True),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def attention(kind, capability, dtype, head_dim, dropout, tma=False):
    """One attention kernel with the tile that its table gives, reading by pointers or by descriptors."""
    from fastgpt.kernels.triton import attention as forward
    from fastgpt.kernels.triton import attention_backward as backward
    from fastgpt.kernels.triton import attention_tables as tables

    kernel = {
        FORWARD: forward.causal_attention_forward_kernel,
        DQ: backward.causal_attention_backward_dq_kernel,
        DKDV: backward.causal_attention_backward_dkdv_kernel,
    }[kind]
    block_d = triton_support.next_power_of_2(head_dim)
    tile = tables.choose(f"attention_{kind}", f"sm_{capability}", BITS[dtype], block_d, dropout)
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "DROPOUT": dropout, "PRECISION": "ieee", "UNIT": 0 if tma else 8,
    }  # fmt: skip
    if kind != FORWARD:
        constants["PACK"] = 1
    pointers = {f"{name}_ptr": dtype for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")}
    if tma:
        sides = {"q": tile.block_m, "dout": tile.block_m, "k": tile.block_n, "v": tile.block_n}
        pointers |= {f"{name}_ptr": f"tensordesc<{dtype}[1,1,{side},{block_d}]>" for name, side in sides.items()}
    return compiled(kernel, capability, pointers, constants, tile.num_warps, tile.num_stages)


@pytest.mark.parametrize(("kind", "capability", "dtype", "head_dim", "dropout"), CASES)
def test_attention_compiles_fits_and_takes_the_right_units(
    kind, capability, dtype, head_dim, dropout, record_property, tmp_path
):
    kernel = attention(kind, capability, dtype, head_dim, dropout)
    shared, _, stack = usage(kernel, record_property, tmp_path)
    assert shared <= SHARED_LIMIT[capability]
    assert (stack or 0) <= KNOWN.get((kind, dtype, head_dim), STACK_LIMIT), f"{stack} bytes of spills"
    ptx = kernel.asm["ptx"]
    assert "tf32" not in ptx
    if dtype == "fp32":
        assert "mma" not in ptx
    else:
        assert ("wgmma.mma_async" if capability == 90 and head_dim == 64 else "mma") in ptx
        # Keys and values arrive by 16-byte copies that overlap the products.
        assert head_dim > 128 or "cp.async.cg.shared.global" in ptx


@pytest.mark.parametrize(("head_dim", "dropout"), [(64, False), (80, True)])
@pytest.mark.parametrize("kind", [FORWARD, DQ, DKDV])
def test_attention_by_tma_descriptors_needs_fewer_registers(kind, head_dim, dropout, record_property, tmp_path):
    if not tuning.triton_version().startswith("3.9."):
        pytest.skip(f"Triton {tuning.triton_version()} is not the one that the tiles were chosen with")
    kernel = attention(kind, 90, "bf16", head_dim, dropout, tma=True)
    shared, registers, stack = usage(kernel, record_property, tmp_path)
    assert shared <= SHARED_LIMIT[90] and (stack or 0) <= STACK_LIMIT and (registers or 0) <= 240
    ptx = kernel.asm["ptx"]
    # Tiles go from memory to where the products read them; no thread copies.
    assert "cp.async.bulk.tensor.4d" in ptx and "wgmma.mma_async" in ptx and "cp.async.cg" not in ptx


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["gelu_forward", "gelu_backward"])
def test_gelu_compiles_without_spills(name, capability, record_property, tmp_path):
    from fastgpt.kernels.triton import gelu

    pointers = dict.fromkeys(("out_ptr", "x_ptr", "dx_ptr", "dout_ptr"), "bf16")
    kernel = compiled(getattr(gelu, f"{name}_kernel"), capability, pointers, {"BLOCK": 1024}, 4)
    assert not usage(kernel, record_property, tmp_path)[2]
    assert SIXTEEN_BYTES.search(kernel.asm["ptx"])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "n"), [("forward", 768), ("forward", 1600), ("backward", 768), ("backward", 1600), ("backward_sum", 768)]
)
def test_layer_norm_compiles_without_spills(name, n, capability, record_property, tmp_path):
    from fastgpt.kernels.triton import layer_norm as kernels
    from fastgpt.kernels.triton.row_tables import choose

    block = layer_norm.block(n)
    tile = choose("layer_norm_forward" if name == "forward" else "layer_norm_backward", "sm_90", 16, block)
    constants = {"N": n, "ROWS": tile.rows, "BLOCK": block}
    if name == "backward_sum":
        constants = {"N": n, "PARTS": layer_norm.SUM_PARTS, "BLOCK": layer_norm.SUM_BLOCK}
    pointers = dict.fromkeys(("out_ptr", "x_ptr", "weight_ptr", "bias_ptr", "dx_ptr", "dout_ptr"), "bf16")
    kernel = compiled(getattr(kernels, f"layer_norm_{name}_kernel"), capability, pointers, constants, tile.num_warps)
    shared, _, stack = usage(kernel, record_property, tmp_path)
    assert shared <= SHARED_LIMIT[capability] and not stack
    assert SIXTEEN_BYTES.search(kernel.asm["ptx"])


@pytest.fixture
def launches(monkeypatch):
    """Lets the backends compile what they would launch, for sm_90, with their own arguments; gives the kernels."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        # No real device, whose compiled kernels would be mixed with these.
        get_current_device = staticmethod(lambda: -1)
        get_current_stream = staticmethod(lambda device: 0)

    kernels, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        assert all(0 < size < 2**31 for size in grid)
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton_support, "chip", lambda x: "sm_90")
    monkeypatch.setattr(driver, "_active", Driver())
    return kernels


def test_one_attention_kernel_serves_all_lengths_and_seeds(launches):
    for length, n_heads, seed in ((16, 2, 1), (37, 3, 2**62 + 1)):
        packed = torch.zeros(1, length, 3, n_heads, 16, dtype=torch.bfloat16)
        q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
        out, lse = attention_backend.forward(q, k, v, 0.25, 0.1, seed)
        attention_backend.backward(out, q, k, v, out, lse, 0.25, 0.1, seed)
    assert len(launches) == 6 and launches[:3] == launches[3:]


def test_one_attention_kernel_by_descriptors_serves_all_lengths(launches):
    if not tuning.triton_version().startswith("3.9."):
        pytest.skip(f"Triton {tuning.triton_version()} is not the one that the tiles were chosen with")
    tile = AttentionTile(64, 64, 4, 2, tma=1)
    for length, n_heads in ((16, 2), (37, 3)):
        packed = torch.zeros(1, length, 3, n_heads, 16, dtype=torch.bfloat16)
        q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
        with tuning.force("attention_forward", tile):
            out, lse = attention_backend.forward(q, k, v, 0.25, 0.1, 5)
        for kernel in (DQ, DKDV):
            with tuning.force(f"attention_{kernel}", tile):
                attention_backend.backward(out, q, k, v, out, lse, 0.25, 0.1, 5)
    # Each backward ran once with each kernel by descriptors: forward, dq and dkdv, dq and dkdv.
    assert len(launches) == 10 and launches[:5] == launches[5:]
    assert ["cp.async.bulk.tensor" in kernel.asm["ptx"] for kernel in launches[:5]] == [True, True, False, False, True]


@pytest.mark.parametrize("n", [1, 7, 768])
def test_what_the_row_backends_launch_compiles(launches, n):
    x, weight = torch.zeros(5, n), torch.zeros(n)
    out, mean, rstd = layer_norm.forward(x, weight, weight, 1e-5)
    layer_norm.backward(out, x, weight, mean, rstd)
    gelu_backend.backward(gelu_backend.forward(x[0], None), x[0], None)
    assert len(launches) == 5 and all(kernel.asm["cubin"] for kernel in launches)

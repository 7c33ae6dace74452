"""The engine's linear layers and norms: whatever call is taken, the numbers of F.linear and F.layer_norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastgpt.generation import layers
from fastgpt.testing import assert_within_bound

# One matrix on each side of the size from which another call is taken.
SMALL, LARGE = (64, 96), (1024, 512)


def tensors(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    return weight.to(dtype), torch.randn(shape[0], generator=generator).to(dtype)


@pytest.mark.parametrize("rows", [(0,), (1,), (2,), (3,), (4,), (5,), (20,), (40,), (2, 7), (2, 33), (1, 1)], ids=str)
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_is_within_the_bound(rows, shape, dtype, has_bias):
    weight, bias = tensors(shape, dtype)
    bias = bias if has_bias else None
    x = torch.randn(*rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        got = layers.linear(weight, bias)(x)
        truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert_within_bound(got, F.linear(x, weight, bias), truth)
    assert got.is_contiguous()


def test_linear_sees_weights_that_change_in_place():
    weight, bias = tensors(LARGE, torch.float32)
    apply, x = layers.linear(weight, bias), torch.randn(1, LARGE[1])
    with torch.no_grad():
        apply(x)
        weight.neg_()
        torch.testing.assert_close(apply(x), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_linear_reads_a_transposed_weight():
    weight = tensors((512, 1024), torch.float32)[0].t()
    x = torch.randn(3, 512)
    with torch.no_grad():
        torch.testing.assert_close(layers.linear(weight, None)(x), x @ weight.t(), rtol=1e-4, atol=1e-4)


def test_linear_works_without_onednn(monkeypatch):
    monkeypatch.setattr(layers, "_has_onednn", lambda: False)
    weight, bias = tensors(LARGE, torch.float32)
    with torch.no_grad():
        x = torch.randn(1, LARGE[1])
        assert torch.equal(layers.linear(weight, bias)(x), F.linear(x, weight, bias))


@pytest.mark.parametrize("rows", [1, 3, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_is_within_the_bound(rows, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((rows, 96), (96,), (96,)))
    with torch.no_grad():
        naive = F.layer_norm(x, (96,), weight, bias, 1e-5)
        truth = F.layer_norm(x.double(), (96,), weight.double(), bias.double(), 1e-5)
        assert_within_bound(layers.Norm(weight, bias, 1e-5)(x), naive, truth)

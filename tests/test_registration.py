"""What every op's autograd Function shares."""

from __future__ import annotations

import pytest
import torch

from fastgpt import ops


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gradient_of_a_gradient_is_refused_and_a_gradient_alone_is_not(create_graph):
    x, bias = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    # The square makes the gradient of the output depend on x.
    (dx,) = torch.autograd.grad(ops.gelu(x, bias, backend="cpu").square().sum(), x, create_graph=create_graph)
    if create_graph:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()
    else:
        assert not dx.requires_grad

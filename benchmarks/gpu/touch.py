"""Each attention kernel once, at sizes that leave every tile ragged: what a memory checker watches."""

from __future__ import annotations

import argparse

import torch

from fastgpt import ops
from fastgpt.ops.attention import OP, Case


def touch(device: str) -> list[str]:
    """Run every backend that can. Returns the names of those that ran."""
    ran = []
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for backend in ("triton", "cuda") if device == "cuda" else ("cpu",):
        for head_dim, length, p in ((64, 129, 0.0), (64, 193, 0.1), (80, 65, 0.0), (128, 257, 0.0)):
            reason = OP.why_not(backend, Case(device, dtype, head_dim, True, p > 0.0, True))
            if reason is not None:
                print(f"{backend} at head_dim {head_dim}: {reason}")
                continue
            q, k, v = (
                torch.randn(2, 3, length, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in "qkv"
            )
            ops.causal_attention(q, k, v, dropout_p=p, backend=backend).float().square().sum().backward()
            ran.append(f"{backend} {head_dim} {p}")
    if device == "cuda":
        torch.cuda.synchronize()
    return ran


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    print("ran:", ", ".join(touch(parser.parse_args().device)))

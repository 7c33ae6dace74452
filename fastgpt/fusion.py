"""How neighbouring modules of a model become one op: which modules may be joined, and the joined forwards.

A module is joined with its neighbours only while it is plain: of exactly the class whose forward is known here, without
hooks and without a forward of its own. Anything else (LoRA, a reader's layer, a hooked module) is called as it is, and
only the modules around it are joined. So one block in training is

    packed_linear → packed_causal_attention → linear → dropout_add_layer_norm
                  → linear → gelu with bias and linear → dropout_add_layer_norm of the next block

and nothing is read twice. Everything is looked up at every call, so replacing a module later is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops


class BlockParts(NamedTuple):
    """The modules of a block x + drop_att(att(norm1(x))), then x + drop_ff(ff(norm2(x))); no dropout is None."""

    att: nn.Module
    ff: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    drop_att: nn.Module | None
    drop_ff: nn.Module | None


# (weight, bias, eps) of a norm that may be joined with what comes before it, None for any other module.
NormParts = Callable[[nn.Module], "tuple[Tensor, Tensor, float] | None"]


def is_plain(module: Any, cls: type) -> bool:
    """True when calling this module does what `cls.forward` says, and nothing else."""
    if type(module) is not cls:
        return False
    module = cast(nn.Module, module)
    # module.compile() puts its own call in place of forward.
    return not ("forward" in module.__dict__ or is_hooked(module) or module._compiled_call_impl)


def is_linear(module: Any) -> bool:
    """True for a plain nn.Linear, and for one that `fastgpt.accelerate` swapped."""
    cls = type(module)
    if cls is nn.Linear:
        return is_plain(module, cls)
    return bool(getattr(cls, "IS_LINEAR", False)) and is_plain(module, cls)


def is_hooked(module: nn.Module) -> bool:
    """True when something wants to see what goes into this module, or comes out."""
    # Past nn.Module.__getattr__, for this is asked about every module of a model at every step.
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def dropout_p(module: Any) -> float | None:
    """The share that a dropout drops at this moment; None when it is something else, to be called as it is."""
    if module is None:
        return 0.0
    if is_plain(module, nn.Dropout):
        return float(module.p) if module.training else 0.0
    return 0.0 if is_plain(module, nn.Identity) else None


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, by `ops.linear` where it is a plain nn.Linear."""
    if is_linear(module):
        plain = cast(nn.Linear, module)
        return ops.linear(x, plain.weight, plain.bias)
    out: Tensor = module(x)
    return out


def project_qkv(query: nn.Module, key: nn.Module, value: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The three input projections: packed in one tensor (..., 3 · d_out) where they are plain and alike, else three.

    Args:
        query, key, value: modules, called in this order where they are not joined.
        x: (..., d_in).
    """
    layers = (query, key, value)
    if all(map(is_linear, layers)):
        plain = cast("tuple[nn.Linear, ...]", layers)
        weights, biases = [m.weight for m in plain], [m.bias for m in plain]
        (w0, w1, w2), (b0, b1, b2) = weights, biases
        if w0.shape == w1.shape == w2.shape and (b0 is None) == (b1 is None) == (b2 is None):
            return (ops.packed_linear(x, weights, biases),)
    return tuple(layer(x) for layer in layers)


def attend(made: tuple[Tensor, ...], num_heads: int, p: float) -> Tensor:
    """Causal attention between what the input projections made and the output projection.

    Args:
        made: one tensor, queries, keys and values side by side, (batch, n_tokens, 3 · d_out), or three
            of (batch, n_tokens, d_out).
        num_heads: heads; they share `d_out` evenly.
        p: share of attention weights to drop.

    Returns:
        (batch, n_tokens, d_out).
    """
    batch, n_tokens, width = made[0].shape
    if len(made) == 1:
        qkv = made[0].view(batch, n_tokens, 3, num_heads, width // (3 * num_heads))
        return ops.packed_causal_attention(qkv, dropout_p=p).flatten(2)
    q, k, v = (part.view(batch, n_tokens, num_heads, -1).transpose(1, 2) for part in made)  # (B, H, T, D)
    return ops.causal_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)


def feed_forward(widen: nn.Module, narrow: nn.Module, x: Tensor) -> Tensor:
    """narrow(gelu(widen(x))), the first bias added inside the GELU, whose output is not kept for backward."""
    bias: Tensor | None = None
    if is_linear(widen):
        first = cast(nn.Linear, widen)
        x, bias = ops.linear(x, first.weight), first.bias
    else:
        x = widen(x)
    if not is_linear(narrow):
        out: Tensor = narrow(ops.gelu(x, bias))
        return out
    second = cast(nn.Linear, narrow)
    return ops.gelu_linear(x, bias, second.weight, second.bias)


def block_parts(block: nn.Module, block_class: type) -> BlockParts | None:
    """The modules of one of fastgpt's own blocks that may be joined; None for any other."""
    if not is_plain(block, block_class):
        return None
    own = cast(Any, block)
    return BlockParts(own.att, own.ff, own.norm1, own.norm2, own.drop_shortcut, own.drop_shortcut)


def run_blocks(
    blocks: Iterable[nn.Module],
    final_norm: nn.Module,
    x: Tensor,
    parts: Callable[[nn.Module], BlockParts | None],
    norm: NormParts,
) -> Tensor:
    """All blocks and the final norm; each shortcut is added in the pass that normalises the sum for the next layer.

    Args:
        blocks: the model's blocks.
        final_norm: the norm behind the last block.
        x: (batch, n_tokens, emb_dim), the embeddings.
        parts: gives the modules of a block that may be joined, None for one that is called as it is.
        norm: see `NormParts`.

    Returns:
        (batch, n_tokens, emb_dim): what goes into the output head.
    """
    listed = [(block, parts(block)) for block in blocks]
    followers = [None if part is None else part.norm1 for _, part in listed[1:]]
    normed: Tensor | None = None
    for (block, part), follower in zip(listed, [*followers, final_norm], strict=True):
        if part is None:
            x, normed = block(x), None
            continue
        if normed is None:
            normed = cast(Tensor, part.norm1(x))
        x, normed = add_and_norm(attention(part, normed), x, part.drop_att, part.norm2, norm)
        x, normed = add_and_norm(part.ff(normed), x, part.drop_ff, follower, norm)
    return cast(Tensor, final_norm(x)) if normed is None else normed


def run_block(part: BlockParts, x: Tensor, norm: NormParts) -> Tensor:
    """One block alone, (batch, n_tokens, emb_dim) to the same shape; `norm` as for `run_blocks`."""
    total, normed = add_and_norm(attention(part, cast(Tensor, part.norm1(x))), x, part.drop_att, part.norm2, norm)
    # With dropout by the op that all blocks together run, for its speed and its draws; what it normalises is not used.
    follower = part.norm2 if dropout_p(part.drop_ff) and norm(part.norm2) is not None else None
    return add_and_norm(part.ff(normed), total, part.drop_ff, follower, norm)[0]


def attention(part: BlockParts, normed: Tensor) -> Tensor:
    """What a block's attention makes of its input; readers' may return an unused cache after it."""
    out = part.att(normed)
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


def add_and_norm(
    branch: Tensor, x: Tensor, drop: nn.Module | None, follower: nn.Module | None, norm: NormParts
) -> tuple[Tensor, Any]:
    """x + drop(branch), and `follower` of it; the second is None without a follower.

    Args:
        branch, x: (batch, n_tokens, emb_dim).
        drop: the block's dropout.
        follower: the norm that reads the sum next.
        norm: see `NormParts`.
    """
    p, parts = dropout_p(drop), None if follower is None else norm(follower)
    # Under autocast the branch is bfloat16 and the sum float32, as PyTorch promotes them.
    alike = branch.dtype is x.dtype
    joined = (alike or torch.promote_types(branch.dtype, x.dtype) == x.dtype) and type(branch) is Tensor
    if p is None or parts is None or not joined:
        total = x + (branch if drop is None else drop(branch))
        return total, None if follower is None else follower(total)
    weight, bias, eps = parts
    branch = branch if alike else branch.to(x.dtype)
    return ops.dropout_add_layer_norm(branch, x, weight, bias, dropout_p=p, eps=eps)


def embed(tok_emb: nn.Module, pos_emb: nn.Module, in_idx: Tensor, p: float) -> Tensor | None:
    """Dropped sum of both embeddings by one op; None where a table is more than a table."""
    if not (is_table(tok_emb) and is_table(pos_emb)):
        return None
    tokens, positions = cast(nn.Embedding, tok_emb), cast(nn.Embedding, pos_emb)
    if tokens.weight.dtype != positions.weight.dtype:
        return None
    return ops.embedding(in_idx, tokens.weight, positions.weight, dropout_p=p)


def is_table(module: nn.Module) -> bool:
    """True for a plain nn.Embedding that does nothing but look up."""
    if not is_plain(module, nn.Embedding):
        return False
    table = cast(nn.Embedding, module)
    return table.max_norm is None and table.padding_idx is None and not (table.sparse or table.scale_grad_by_freq)


def loss(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Mean cross-entropy of a model's head; without a tensor of all logits where the head is a plain nn.Linear.

    Args:
        hidden: (batch, n_tokens, emb_dim), behind the final norm.
        head: the output head.
        targets: (batch, n_tokens) int64; -100 does not count.
    """
    if is_linear(head) and cast(nn.Linear, head).bias is None and not _scales_losses(hidden.device.type):
        return ops.linear_cross_entropy(hidden, cast(nn.Linear, head).weight, targets)
    logits: Tensor = linear(head, hidden)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _scales_losses(device: str) -> bool:
    """True under float16 autocast, where small gradients are lost unless the loss is scaled before they are made."""
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16

"""GPTs as readers write them, for the tests of `accelerate`: no class here is known to fastgpt.

`build(name)` makes one; a name is the book's model with one thing changed. `ACCEPTED` and `REFUSED` list them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastgpt import attention_variants

CFG = {"vocab_size": 61, "context_length": 24, "emb_dim": 24, "n_heads": 3, "n_layers": 2}


class LayerNorm(nn.Module):
    def __init__(self, emb_dim):
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.scale * centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + self.eps) + self.shift


class UnbiasedLayerNorm(LayerNorm):
    def forward(self, x):
        return self.scale * (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + self.eps) + self.shift


class RMSNorm(nn.Module):
    def __init__(self, emb_dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))

    def forward(self, x):
        return self.scale * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)


class GELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class MultiHeadAttention(nn.Module):
    """Readers' hands, the book's names. `scores` is where variants interfere."""

    def __init__(self, d, context_length, dropout, num_heads, bias):
        super().__init__()
        self.d_out, self.num_heads, self.head_dim = d, num_heads, d // num_heads
        self.W_query = nn.Linear(d, d, bias=bias)
        self.W_key = nn.Linear(d, d, bias=bias)
        self.W_value = nn.Linear(d, d, bias=bias)
        self.out_proj = nn.Linear(d, d)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", torch.triu(torch.ones(context_length, context_length), diagonal=1))

    def heads(self, x):
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def scores(self, q, k):
        return (q @ k.transpose(2, 3)).masked_fill(self.mask.bool()[: q.shape[2], : k.shape[2]], -torch.inf)

    def forward(self, x):
        k, q, v = self.heads(self.W_key(x)), self.heads(self.W_query(x)), self.heads(self.W_value(x))
        weights = self.dropout(torch.softmax(self.scores(q, k) / k.shape[-1] ** 0.5, dim=-1))
        return self.out_proj((weights @ v).transpose(1, 2).contiguous().view(*x.shape[:2], self.d_out))


class CachedAttention(MultiHeadAttention):
    """With a key-value cache kept inside, as in the book's bonus material."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("cache_k", None, persistent=False)
        self.register_buffer("cache_v", None, persistent=False)
        self.position = 0

    def reset_cache(self):
        self.cache_k, self.cache_v, self.position = None, None, 0

    def forward(self, x, use_cache=False):
        k, v, q = self.heads(self.W_key(x)), self.heads(self.W_value(x)), self.heads(self.W_query(x))
        start = 0
        if use_cache:
            start = self.position
            if self.cache_k is not None:
                k, v = torch.cat([self.cache_k, k], 2), torch.cat([self.cache_v, v], 2)
            self.cache_k, self.cache_v, self.position = k, v, start + x.shape[1]
        hidden = self.mask.bool()[start : start + x.shape[1], : k.shape[2]]
        scores = (q @ k.transpose(2, 3)).masked_fill(hidden, -torch.inf)
        weights = self.dropout(torch.softmax(scores / self.head_dim**0.5, dim=-1))
        return self.out_proj((weights @ v).transpose(1, 2).reshape(*x.shape[:2], self.d_out))


class TupleAttention(MultiHeadAttention):
    """Given its cache, and giving it back."""

    def forward(self, x, use_cache=False, cache=None):
        if not use_cache:
            return super().forward(x), None
        raise NotImplementedError


class SDPAttention(nn.Module):
    def __init__(self, d, context_length, dropout, num_heads, bias):
        super().__init__()
        self.num_heads, self.d_out, self.dropout = num_heads, d, dropout
        self.qkv = nn.Linear(d, 3 * d, bias=bias)
        self.proj = nn.Linear(d, d)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        return self.proj(out.transpose(1, 2).contiguous().view(b, t, self.d_out))


class InterleavedAttention(SDPAttention):
    """q, k and v of one head beside each other: the same names, another order of rows."""

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], self.num_heads, 3, -1).permute(3, 0, 2, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(out.transpose(1, 2).flatten(2))


class WindowAttention(MultiHeadAttention):
    """Sees 16 tokens back: more than a short probe has."""

    def scores(self, q, k):
        age = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])[None, :]
        return super().scores(q, k).masked_fill(age >= 16, -torch.inf)


class UnscaledAttention(MultiHeadAttention):
    """The book's forward overridden: scores are not divided by the root of head_dim."""

    def scores(self, q, k):
        return super().scores(q, k) * self.head_dim**0.5


class GroupedAttention(MultiHeadAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.W_key = nn.Linear(self.d_out, self.head_dim)
        self.W_value = nn.Linear(self.d_out, self.head_dim)


class KeepsWeights(MultiHeadAttention):
    """Keeps its attention weights for a picture."""

    attn_weights = None

    def scores(self, q, k):
        self.attn_weights = super().scores(q, k).softmax(-1).detach()
        return super().scores(q, k)


class DropsOutput(MultiHeadAttention):
    """One dropout used twice, the second time on the output."""

    def forward(self, x):
        return self.dropout(super().forward(x))


class DropsScores(MultiHeadAttention):
    """Drops before the softmax instead of after it."""

    def forward(self, x):
        k, q, v = self.heads(self.W_key(x)), self.heads(self.W_query(x)), self.heads(self.W_value(x))
        weights = torch.softmax(self.dropout(self.scores(q, k) / self.head_dim**0.5), dim=-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


class PrintingAttention(MultiHeadAttention):
    def forward(self, x):
        print(x.shape)
        return super().forward(x)


class LinearWithLoRA(nn.Module):
    def __init__(self, linear, rank=4, alpha=8):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.randn(linear.in_features, rank) / 4)
        self.B = nn.Parameter(torch.randn(rank, linear.out_features) / 4)
        self.scaling = alpha / rank

    def forward(self, x):
        return self.linear(x) + self.scaling * (x @ self.A @ self.B)


def wrap_with_lora(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(module, LinearWithLoRA):
                setattr(module, name, LinearWithLoRA(child))
    return model


class Block(nn.Module):
    def __init__(self, cfg, make):
        super().__init__()
        d = cfg["emb_dim"]
        self.att = make["att"](d, cfg["context_length"], cfg["drop_rate"], cfg["n_heads"], cfg["qkv_bias"])
        self.ff = nn.Sequential(nn.Linear(d, 4 * d), make["gelu"](), nn.Linear(4 * d, d))
        self.norm1, self.norm2 = make["norm"](d), make["norm"](d)
        setattr(self, make["drop"], nn.Dropout(cfg["drop_rate"]))
        self.drop = make["drop"]

    def forward(self, x, **kwargs):
        drop, out = getattr(self, self.drop), self.att(self.norm1(x), **kwargs)
        x = x + drop(out[0] if isinstance(out, tuple) else out)
        return x + drop(self.ff(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self, cfg, make):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = make["blocks"](Block(cfg, make) for _ in range(cfg["n_layers"]))
        self.final_norm = make["norm"](cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, in_idx, **kwargs):
        start = self.trf_blocks[0].att.position if kwargs.get("use_cache") else 0
        positions = torch.arange(start, start + in_idx.shape[1], device=in_idx.device)
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(positions))
        for block in self.trf_blocks:
            x = block(x, **kwargs)
        return self.out_head(self.final_norm(x))


BOOK = {
    "att": MultiHeadAttention,
    "gelu": GELU,
    "norm": LayerNorm,
    "drop": "drop_shortcut",
    "blocks": lambda made: nn.Sequential(*made),
}

ACCEPTED = {
    "drop_shortcut": {},
    "drop_resid": {"drop": "drop_resid"},
    "module_list": {"blocks": nn.ModuleList},
    "torch_norm_and_gelu": {"norm": nn.LayerNorm, "gelu": lambda: nn.GELU(approximate="tanh")},
    "packed_sdpa": {"att": SDPAttention},
    "packed_plain": {
        "att": lambda d, context, p, heads, bias: attention_variants.MultiHeadAttentionCombinedQKV(
            d, d, heads, context, p, bias
        )
    },
    "lora": {},
    "cache_inside": {"att": CachedAttention, "blocks": nn.ModuleList},
    "cache_outside": {"att": TupleAttention},
}

# In the two blocks: attention, GELU and two norms each, and the final norm.
HOT = 2 * 4 + 1

# Name: (what is changed, kind of the refused modules, words of the reason).
REFUSED = {
    "exact_gelu": ({"gelu": nn.GELU}, "GELU", "exact (erf)"),
    "unbiased_norm": ({"norm": UnbiasedLayerNorm}, "layer norm", "biased variance"),
    "rms_norm": ({"norm": RMSNorm}, "layer norm", "lacks a scale or a shift"),
    "window": ({"att": WindowAttention}, "attention", "from token 16 on"),
    "overridden": ({"att": UnscaledAttention}, "attention", "not plain causal attention"),
    "grouped": ({"att": GroupedAttention}, "attention", "grouped-query"),
    "interleaved": ({"att": InterleavedAttention}, "attention", "not plain causal attention"),
    "keeps_weights": ({"att": KeepsWeights}, "attention", "writes attn_weights"),
    "drops_output": ({"att": DropsOutput}, "attention", "drops something other"),
    "drops_scores": ({"att": DropsScores}, "attention", "after the softmax"),
    "prints": ({"att": PrintingAttention}, "attention", "prints"),
}


def build(name="drop_shortcut", *, drop_rate=0.0, seed=7, **cfg):
    """A hand-written GPT with weights that are nowhere 0 or 1, in eval mode."""
    change = ACCEPTED[name] if name in ACCEPTED else REFUSED[name][0]
    torch.manual_seed(seed)
    model = GPT(CFG | {"drop_rate": drop_rate, "qkv_bias": True} | cfg, BOOK | change)
    if name == "lora":
        wrap_with_lora(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# How the tests look at them.


def tokens(batch=2, length=11):
    return torch.randint(CFG["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(3))


def gradients(model, idx, seed=5):
    """Logits and the gradients of the book's loss, by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    logits = model(idx[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_close(got, want, bound=2e-5):
    assert (got - want).abs().max() <= bound * max(1.0, want.abs().max())


def is_swapped(module):
    return hasattr(module, "_fastgpt_plan")

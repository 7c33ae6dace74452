"""One GPT-2, three sets of names: the book's, the book's fast layout, and Hugging Face's.

    book                                fast                Hugging Face, with or without "transformer." before it
    tok_emb.weight                      tok_emb.weight      wte.weight
    pos_emb.weight                      pos_emb.weight      wpe.weight
    trf_blocks.0.norm1.scale            norm1.weight        h.0.ln_1.weight
    trf_blocks.0.att.W_query.weight     att.qkv.weight      h.0.attn.c_attn.weight, (in, out): query, key, value columns
    trf_blocks.0.att.out_proj.weight    att.proj.weight     h.0.attn.c_proj.weight, (in, out)
    trf_blocks.0.ff.layers.0.weight     the same            h.0.mlp.c_fc.weight, (in, out)
    trf_blocks.0.ff.layers.2.weight     the same            h.0.mlp.c_proj.weight, (in, out)
    final_norm.scale                    final_norm.weight   ln_f.weight
    out_head.weight                     out_head.weight     lm_head.weight; absent when tied to wte

Translation to the book's names makes views and copies nothing, so it works on mapped files and on a model's own
parameters alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.config import model_configs
from fastgpt.weights.errors import WeightsError

_QKV = ("W_query", "W_key", "W_value")
_PARTS = {
    "ln_1": "norm1",
    "attn.c_proj": "att.out_proj",
    "ln_2": "norm2",
    "mlp.c_fc": "ff.layers.0",
    "mlp.c_proj": "ff.layers.2",
}
_NORM_LEAVES = {"weight": "scale", "bias": "shift"}
_TOP = {
    "wte.weight": "tok_emb.weight",
    "wpe.weight": "pos_emb.weight",
    "ln_f.weight": "final_norm.scale",
    "ln_f.bias": "final_norm.shift",
    "lm_head.weight": "out_head.weight",
}
_EMBEDDINGS: tuple[str, ...] = ("tok_emb.weight", "pos_emb.weight")
_AROUND = (*_EMBEDDINGS, "final_norm.scale", "final_norm.shift", "out_head.weight")
_LINEARS = (*(f"att.{head}" for head in _QKV), "att.out_proj", "ff.layers.0", "ff.layers.2")
_IN_BLOCK = (
    *(f"{linear}.{leaf}" for linear in _LINEARS for leaf in ("weight", "bias")),
    *(f"{norm}.{leaf}" for norm in ("norm1", "norm2") for leaf in ("scale", "shift")),
)
_BLOCK = re.compile(r"trf_blocks\.(\d{1,9})\.(.*)")
_HF_BLOCK = re.compile(r"h\.(0|[1-9]\d{0,8})\.(.+)\.(weight|bias)")
# Causal masks that older versions of transformers stored.
_HF_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_FAST = re.compile(r"(trf_blocks\.\d+\.att\.(?:qkv|proj)|trf_blocks\.\d+\.norm[12]|final_norm)\.(weight|bias)")
_SHOWN = 4


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what torch.compile ("_orig_mod.", anywhere) and DDP ("module.", in front) put into them.

    Raises:
        WeightsError: two names become one.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.replace("_orig_mod.", "")
        while short.startswith("module."):
            short = short.removeprefix("module.")
        if short in plain:
            raise WeightsError(f"{short!r} is there twice, with and without a wrapper's prefix.")
        plain[short] = tensor
    return plain


def to_book(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate any of the three layouts to the book's names, without masks.

    Args:
        tensors: a checkpoint, perhaps with the prefixes of torch.compile and DDP.

    Returns:
        The book's names; the tensors are views of the given ones. A Hugging Face checkpoint without lm_head is tied:
        its out_head.weight is the very tensor of tok_emb.weight.

    Raises:
        WeightsError: this is no GPT-2, or a mask is not the causal one, or a joined projection cannot be split.
    """
    tensors = plain_names(tensors)
    if "tok_emb.weight" in tensors:
        book = {new: tensor for name in tensors for new, tensor in _from_fast(name, tensors[name])}
        return _in_book_order(_without_masks(book))
    if "wte.weight" in tensors or "transformer.wte.weight" in tensors:
        return _in_book_order(_from_huggingface(tensors))
    names = ", ".join(repr(name[:60]) for name in list(tensors)[:_SHOWN]) or "nothing"
    raise WeightsError(f"this is no GPT-2: neither tok_emb.weight nor wte.weight is there, but {names}.")


def _in_book_order(book: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def place(name: str) -> tuple[int, int, int]:
        block = _BLOCK.match(name)
        order, part = (_IN_BLOCK, block[2]) if block else (_AROUND, name)
        found = order.index(part) if part in order else len(order)
        return (1, int(block[1]), found) if block else (0 if found < len(_EMBEDDINGS) else 2, 0, found)

    return {name: book[name] for name in sorted(book, key=place)}


def _from_fast(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    match = _FAST.fullmatch(name)
    if match is None:
        yield name, tensor
        return
    part, leaf = match[1], match[2]
    if part.endswith(".qkv"):
        for head, piece in zip(_QKV, _thirds(name, tensor, axis=0), strict=True):
            yield f"{part.removesuffix('qkv')}{head}.{leaf}", piece
    elif part.endswith(".proj"):
        yield f"{part.removesuffix('proj')}out_proj.{leaf}", tensor
    else:
        yield f"{part}.{_NORM_LEAVES[leaf]}", tensor


def _thirds(name: str, tensor: Tensor, axis: int) -> tuple[Tensor, ...]:
    if tensor.ndim <= axis or tensor.shape[axis] % 3 or not tensor.shape[axis]:
        raise WeightsError(f"{name} of shape {tuple(tensor.shape)} does not split into query, key and value.")
    return tensor.chunk(3, dim=axis)


def _without_masks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    length = tensors["pos_emb.weight"].shape[:1] if "pos_emb.weight" in tensors else ()
    future: Tensor | None = None
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith(".att.mask"):
            kept[name] = tensor
            continue
        # The shape comes first: a comparison takes as much memory as the mask that it makes.
        fits = tuple(tensor.shape) == (*length, *length) and tensor.ndim == 2
        if fits and not tensor.is_meta:
            if future is None:
                future = torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device).triu_(1)
            fits = torch.equal(tensor.bool(), future)
        if not fits:
            raise WeightsError(f"{name} is not the causal mask of this context length; only causal models are read.")
    return kept


def _from_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {name.removeprefix("transformer."): name for name in tensors}
    if len(plain) != len(tensors):
        raise WeightsError("names are there twice, with and without 'transformer.' before them.")
    layers: dict[int, dict[str, Tensor]] = {}
    top: dict[str, Tensor] = {}
    for name, original in plain.items():
        tensor = tensors[original]
        block = _HF_BLOCK.fullmatch(name)
        if _HF_BUFFER.fullmatch(name):
            continue
        if name in _TOP:
            top[_TOP[name]] = tensor
        elif block is not None and (block[2] in _PARTS or block[2] == "attn.c_attn"):
            layers.setdefault(int(block[1]), {}).update(_block_from_huggingface(block[2], block[3], tensor, name))
        else:
            raise WeightsError(f"{original[:100]!r} is no tensor of GPT2LMHeadModel.")
    top.setdefault("out_head.weight", top["tok_emb.weight"])
    for number, layer in layers.items():
        top |= {f"trf_blocks.{number}.{name}": tensor for name, tensor in layer.items()}
    return top


def _block_from_huggingface(part: str, leaf: str, tensor: Tensor, name: str) -> dict[str, Tensor]:
    if part.startswith("ln_"):
        return {f"{_PARTS[part]}.{_NORM_LEAVES[leaf]}": tensor}
    # Conv1D, the module of these matrices, stores them (in, out).
    if tensor.ndim != (2 if leaf == "weight" else 1):
        raise WeightsError(f"{name} has the impossible shape {tuple(tensor.shape)}.")
    if part == "attn.c_attn":
        thirds = _thirds(name, tensor, axis=tensor.ndim - 1)
        return {f"att.{head}.{leaf}": piece.t() for head, piece in zip(_QKV, thirds, strict=True)}
    return {f"{_PARTS[part]}.{leaf}": tensor.t()}


def to_huggingface(book: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """Translate the book's names to those of transformers' GPT2LMHeadModel.

    Args:
        book: complete weights under the book's names, without masks, as `to_book` gives them.
        tied: leave the head out, because it is the token embedding.

    Returns:
        "transformer.wte.weight", ... in the order of that model; the matrices are contiguous copies, (in, out). Query,
        key and value get biases of 0 where the book's model has none: GPT-2 always has them, and 0 changes nothing.

    Raises:
        WeightsError: a name is missing, or is none of `GPTModel`'s.
    """
    left = dict(book)
    out: dict[str, Tensor] = {}
    for name in ("wte.weight", "wpe.weight"):
        out[f"transformer.{name}"] = _take(left, _TOP[name])
    layer = 0
    while any(f"trf_blocks.{layer}.{part}" in left for part in ("norm1.scale", "att.W_query.weight")):
        _block_to_huggingface(left, f"trf_blocks.{layer}.", f"transformer.h.{layer}.", out)
        layer += 1
    for name in ("ln_f.weight", "ln_f.bias"):
        out[f"transformer.{name}"] = _take(left, _TOP[name])
    head = _take(left, "out_head.weight")
    if not tied:
        out["lm_head.weight"] = head
    if left:
        raise WeightsError(f"GPT2LMHeadModel has no place for {', '.join(list(left)[:_SHOWN])}.")
    return out


def _block_to_huggingface(left: dict[str, Tensor], source: str, target: str, out: dict[str, Tensor]) -> None:
    weights = [_take(left, f"{source}att.{head}.weight") for head in _QKV]
    biases = [left.pop(f"{source}att.{head}.bias", None) for head in _QKV]
    joined = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    for part, name in _PARTS.items():
        if part.startswith("ln_"):
            out[f"{target}{part}.weight"] = _take(left, f"{source}{name}.scale")
            out[f"{target}{part}.bias"] = _take(left, f"{source}{name}.shift")
        else:
            out[f"{target}{part}.weight"] = _take(left, f"{source}{name}.weight").t().contiguous()
            out[f"{target}{part}.bias"] = _take(left, f"{source}{name}.bias")
        if part == "ln_1":
            out[f"{target}attn.c_attn.weight"] = torch.cat([w.t() for w in weights], dim=1)
            out[f"{target}attn.c_attn.bias"] = torch.cat(joined)


def _take(left: dict[str, Tensor], name: str) -> Tensor:
    if name not in left:
        raise WeightsError(f"{name} is missing; the weights of a GPTModel have it.")
    return left.pop(name)


def infer_config(tensors: Mapping[str, Tensor], n_heads: int | None = None) -> dict[str, Any]:
    """The configuration that weights belong to, read from their shapes.

    The number of heads leaves no trace in the shapes. For the widths of the four GPT-2 models (768, 1024, 1280, 1600)
    it is emb_dim / 64, since all four have heads of 64; for any other width it must be given. The drop rate leaves none
    either and is 0.0, as in the book's configuration for released weights.

    Args:
        tensors: weights in any layout that `to_book` reads.
        n_heads: heads of a block, where it is known.

    Returns:
        A new configuration with the book's keys.

    Raises:
        WeightsError: the shapes are not those of a GPT-2, or the number of heads is not known.
    """
    book = to_book(tensors)
    for name in _EMBEDDINGS:
        if name not in book or book[name].ndim != 2 or 0 in book[name].shape:
            raise WeightsError(f"{name} is missing or no matrix; a GPT-2 has it.")
    vocab_size, emb_dim = book["tok_emb.weight"].shape
    if n_heads is None:
        widths = {row["emb_dim"] for row in model_configs.values()}
        if emb_dim not in widths:
            raise WeightsError(
                f"Shapes do not tell the number of heads, and emb_dim {emb_dim} is not that of a GPT-2 model "
                f"({', '.join(map(str, sorted(widths)))}), whose heads are 64 wide; pass n_heads."
            )
        n_heads = emb_dim // 64
    if n_heads < 1 or emb_dim % n_heads:
        raise WeightsError(f"emb_dim {emb_dim} does not split into {n_heads} heads.")
    numbers = {int(match[1]) for name in book if (match := _BLOCK.match(name))}
    if numbers != set(range(len(numbers))):
        raise WeightsError(f"blocks are missing: there are {len(numbers)}, the last one is {max(numbers)}.")
    return {
        "vocab_size": vocab_size,
        "context_length": book["pos_emb.weight"].shape[0],
        "emb_dim": emb_dim,
        "n_heads": n_heads,
        "n_layers": len(numbers),
        "drop_rate": 0.0,
        "qkv_bias": any(name.endswith(".att.W_query.bias") for name in book),
    }

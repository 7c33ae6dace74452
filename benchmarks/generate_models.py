"""One random GPT-2 124M in the formats of all engines: nothing is downloaded.

    weights.pt               the book's state_dict                              fastgpt, the book
    hf/                      safetensors with a stand-in tokenizer              transformers
    ct2/                     converted from hf/                                 CTranslate2
    f32.gguf and others      written by `gguf`, quantised by llama.cpp          llama.cpp

The head is not tied to the embedding, or the likeliest token of random weights would be the one just read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgpt.config import GPT_CONFIG_124M
from fastgpt.model import GPTModel
from fastgpt.weights import save_huggingface

CFG = {**GPT_CONFIG_124M, "drop_rate": 0.0, "qkv_bias": True}
SEED = 123
# The names of llama.cpp's types, and of its files.
GGUF = ("bf16", "q8_0", "q4_0")

# Parts of a block: Hugging Face's name, GGUF's name.
_PARTS = (
    ("ln_1", "attn_norm"),
    ("attn.c_attn", "attn_qkv"),
    ("attn.c_proj", "attn_output"),
    ("ln_2", "ffn_norm"),
    ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"),
)


def make_model() -> GPTModel:
    """The model, the same at every call."""
    torch.manual_seed(SEED)
    return GPTModel(CFG).eval()


def load_model(folder: Path, model_class: Any = GPTModel) -> Any:
    """The model's weights in a class of the book's names, memory-mapped from `folder`."""
    with torch.device("meta"):
        model = model_class(CFG)
    state = torch.load(folder / "weights.pt", mmap=True, weights_only=True)
    state = {name: tensor for name, tensor in state.items() if name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    # Memory-mapped pages are small ones; each engine has its weights in ordinary memory.
    return model.apply(_own_memory).eval()


def _own_memory(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.clone()


def prepare(folder: Path) -> dict[str, str]:
    """Write what is not there yet; tells for each format that could not be made why."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "weights.pt").exists():
        torch.save(make_model().state_dict(), folder / "weights.pt")
    problems = {}
    steps: tuple[tuple[str, str, Callable[[Path], None]], ...] = (
        ("hf", "hf/tokenizer.json", _write_huggingface),
        ("ct2", "ct2/model.bin", _write_ctranslate2),
        ("gguf", "q4_0.gguf", _write_gguf),
    )
    for name, result, write in steps:
        if (folder / result).exists():
            continue
        try:
            write(folder)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            problems[name] = f"{type(error).__name__}: {error}"
    return problems


def _write_huggingface(folder: Path) -> None:
    save_huggingface(load_model(folder), folder / "hf")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    last = "<|endoftext|>"
    vocab = {f"t{i}": i for i in range(CFG["vocab_size"] - 1)} | {last: CFG["vocab_size"] - 1}
    words = Tokenizer(WordLevel(vocab, unk_token=last))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token=last, eos_token=last, unk_token=last).save_pretrained(
        folder / "hf"
    )


def _write_ctranslate2(folder: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"), force=True)


def _write_gguf(folder: Path) -> None:
    import gguf
    from safetensors.torch import load_file

    state = {
        name.removeprefix("transformer."): tensor.float()
        for name, tensor in load_file(folder / "hf" / "model.safetensors").items()
    }
    file = gguf.GGUFWriter(str(folder / "f32.gguf"), "gpt2")
    file.add_context_length(CFG["context_length"])
    file.add_embedding_length(CFG["emb_dim"])
    file.add_block_count(CFG["n_layers"])
    file.add_head_count(CFG["n_heads"])
    file.add_feed_forward_length(4 * CFG["emb_dim"])
    file.add_layer_norm_eps(1e-5)
    file.add_file_type(0)
    size = CFG["vocab_size"]
    file.add_vocab_size(size)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list([f"t{i}" for i in range(size - 1)] + ["<|endoftext|>"])
    file.add_token_types([gguf.TokenType.NORMAL] * (size - 1) + [gguf.TokenType.CONTROL])
    file.add_token_merges(["t 0"])
    file.add_bos_token_id(size - 1)
    file.add_eos_token_id(size - 1)

    def add(target: str, source: str, transposed: bool = False) -> None:
        tensor = state[source].t().contiguous() if transposed else state[source]
        file.add_tensor(target, tensor.numpy())

    add("token_embd.weight", "wte.weight")
    add("position_embd.weight", "wpe.weight")
    add("output_norm.weight", "ln_f.weight")
    add("output_norm.bias", "ln_f.bias")
    file.add_tensor("output.weight", state["lm_head.weight"].numpy())
    for block in range(CFG["n_layers"]):
        for source, target in _PARTS:
            names = f"blk.{block}.{target}", f"h.{block}.{source}"
            # Hugging Face keeps linear layers (n_in, n_out).
            add(names[0] + ".weight", names[1] + ".weight", transposed=not source.startswith("ln"))
            add(names[0] + ".bias", names[1] + ".bias")
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    _quantise(folder)


def _quantise(folder: Path) -> None:
    import llama_cpp

    llama_cpp.llama_backend_init()
    for name in GGUF:
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name.upper()}")
        options.nthread = 2
        source, target = str(folder / "f32.gguf").encode(), str(folder / f"{name}.gguf").encode()
        if llama_cpp.llama_model_quantize(source, target, options) != 0:
            raise RuntimeError(f"llama.cpp could not write {target.decode()}")


if __name__ == "__main__":
    import sys

    print(json.dumps(prepare(Path(sys.argv[1]))))

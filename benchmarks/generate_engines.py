"""The engines of the race, each made in a process of its own (generate_worker.py).

An engine is `generate(prompts, n) -> new tokens`, greedy, over prompts of one length; a few do more.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.generate_models import CFG, SEED, load_model

Prompts = list[list[int]]
# Weights that one token of one row reads: everything but the embeddings.
MATRICES = 12 * 12 * 768 * 768 + 768 * 50257
HEAD = 768 * 50257


@dataclass
class Engine:
    """One contestant.

    Attributes:
        generate: (prompts, n) -> n new tokens of each prompt, greedily.
        version: of the library.
        bytes_a_token: what a token of batch 1 must read; None where that is not the limit.
        sample: one call of generate_and_print_sample, where the engine has it.
    """

    generate: Callable[[Prompts, int], Prompts]
    version: str
    bytes_a_token: float | None = None
    sample: Callable[[], None] | None = None


# name -> the package that it needs
NAMES = {
    "book": "fastgpt",
    "book-cache": "fastgpt",
    "transformers": "transformers",
    "transformers-onednn": "transformers",
    "transformers-bf16": "transformers",
    "ctranslate2": "ctranslate2",
    "ctranslate2-int8": "ctranslate2",
    "llama.cpp": "llama-cpp-python",
    "llama.cpp-bf16": "llama-cpp-python",
    "llama.cpp-q8_0": "llama-cpp-python",
    "llama.cpp-q4_0": "llama-cpp-python",
    "fastgpt-plain": "fastgpt",
    "fastgpt": "fastgpt",
    "fastgpt-bf16": "fastgpt",
    "fastgpt-int8": "fastgpt",
    "fastgpt-int4": "fastgpt",
    "fastgpt-plain-repeat": "fastgpt",
    "fastgpt-repeat": "fastgpt",
    "book-sample": "fastgpt",
    "fastgpt-sample": "fastgpt",
}
# Must give the tokens of the book's plain loop; the others are lower precisions, and their agreement is stated.
EXACT = (
    "book",
    "book-cache",
    "transformers",
    "transformers-onednn",
    "ctranslate2",
    "llama.cpp",
    "fastgpt-plain",
    "fastgpt",
)


def make(name: str, folder: Path, threads: int) -> Engine:
    """The engine of this name.

    Raises:
        ImportError: its package is missing.
    """
    kind, _, variant = name.partition("-")
    if variant == "sample":
        return _sample_engine(kind == "book")
    makers = {
        "book": _book,
        "transformers": _transformers,
        "ctranslate2": _ctranslate2,
        "llama.cpp": _llama,
        "fastgpt": _fastgpt,
    }
    return makers[kind](variant, folder, threads)


def _new(results: Any, prompts: Prompts) -> Prompts:
    return [row[len(prompts[0]) :] for row in results.tolist()]


class _Numbers:
    """A tokenizer for the sample: what it is called for takes no time."""

    def encode(self, text: str, allowed_special: object = None) -> list[int]:
        return [6109, 3626, 6100, 345]  # "Every effort moves you"

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def _sample_engine(book: bool) -> Engine:
    """A model as in training: dropout on, a context of 256, its weights changed before each sample."""
    import torch

    import fastgpt
    from fastgpt import reference
    from fastgpt.model import GPTModel
    from fastgpt.training import generate_and_print_sample

    torch.manual_seed(SEED)
    model: Any = (reference.GPTModel if book else GPTModel)({**CFG, "context_length": 256, "drop_rate": 0.1})

    def sample() -> None:
        with torch.no_grad():
            model.out_head.weight += 0.0
        model.train()
        if book:
            model.eval()
            ids = torch.tensor([_Numbers().encode("")])
            with torch.no_grad():
                reference.generate_text_simple(model, ids, 50, 256)
            model.train()
            return
        with contextlib.redirect_stdout(io.StringIO()):
            generate_and_print_sample(model, _Numbers(), "cpu", "Every effort moves you")

    return Engine(lambda prompts, n: [], fastgpt.__version__, sample=sample)


def _book(variant: str, folder: Path, threads: int) -> Engine:
    import torch

    import fastgpt
    from fastgpt import reference
    from fastgpt.generation.kv_model import GPTModel, KVCache

    if not variant:
        model = load_model(folder, reference.GPTModel)

        def plainly(prompts: Prompts, n: int) -> Prompts:
            return _new(reference.generate_text_simple(model, torch.tensor(prompts), n, 1024), prompts)

        return Engine(plainly, "chapter 4", 4 * MATRICES)
    model = load_model(folder, GPTModel)

    @torch.no_grad()
    def cached(prompts: Prompts, n: int) -> Prompts:
        cache = KVCache(CFG["n_layers"])
        model.reset_kv_cache()
        tokens = torch.tensor(prompts)
        steps = []
        with fastgpt.use_backend("reference"):
            for _ in range(n):
                tokens = model(tokens, use_cache=True, cache=cache)[:, -1].argmax(dim=-1, keepdim=True)
                steps.append(tokens)
        return torch.cat(steps, dim=1).tolist()

    return Engine(cached, "chapter 4, KV cache", 4 * MATRICES)


def _transformers(variant: str, folder: Path, threads: int) -> Engine:
    import torch
    import transformers

    if variant == "onednn":
        torch.set_float32_matmul_precision("medium")
    dtype = torch.bfloat16 if variant == "bf16" else torch.float32
    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "hf", dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: Prompts, n: int) -> Prompts:
        ids = torch.tensor(prompts)
        return _new(
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False), prompts
        )

    return Engine(generate, transformers.__version__, (2 if variant == "bf16" else 4) * MATRICES)


def _ctranslate2(variant: str, folder: Path, threads: int) -> Engine:
    import ctranslate2

    kind = variant or "float32"
    model = ctranslate2.Generator(
        str(folder / "ct2"), device="cpu", compute_type=kind, intra_threads=threads, inter_threads=1
    )

    def generate(prompts: Prompts, n: int) -> Prompts:
        words = [[f"t{token}" for token in row] for row in prompts]
        results = model.generate_batch(
            words, max_length=n, min_length=n, sampling_topk=1, include_prompt_in_result=False, end_token=[]
        )
        return [result.sequences_ids[0] for result in results]

    return Engine(generate, ctranslate2.__version__, (1 if kind == "int8" else 4) * MATRICES)


def _llama(variant: str, folder: Path, threads: int) -> Engine:
    import llama_cpp as llama
    import numpy as np

    kind = variant or "f32"
    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    options = llama.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(folder / f"{kind}.gguf").encode(), options)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {kind}.gguf")
    state: dict[str, Any] = {"rows": 0, "context": None, "silent": silent}
    batch = llama.llama_batch_init(2048, 0, 64)

    def context_for(rows: int, length: int) -> Any:
        if state["rows"] != rows or state["length"] < length:
            if state["context"] is not None:
                llama.llama_free(state["context"])
            params = llama.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_ubatch = max(512, length * rows), 2048, 512
            params.n_threads = params.n_threads_batch = threads
            params.n_seq_max = rows
            if kind == "f32":
                # Its default cache is float16, which would not give the tokens of float32.
                params.type_k = params.type_v = llama.GGML_TYPE_F32
            state.update(rows=rows, length=length, context=llama.llama_init_from_model(model, params))
        llama.llama_memory_clear(llama.llama_get_memory(state["context"]), True)
        return state["context"]

    def read(context: Any, entries: list[tuple[int, int, int, bool]]) -> None:
        for begin in range(0, len(entries), 2048):
            part = entries[begin : begin + 2048]
            batch.n_tokens = len(part)
            for i, (token, position, row, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
                batch.seq_id[i][0] = row
            if llama.llama_decode(context, batch) != 0:
                raise RuntimeError("llama_decode failed")

    def generate(prompts: Prompts, n: int) -> Prompts:
        length, rows = len(prompts[0]), len(prompts)
        context = context_for(rows, length + n)
        last = length - 1
        read(context, [(token, i, row, i == last) for row, ids in enumerate(prompts) for i, token in enumerate(ids)])
        places = [row * length + last for row in range(rows)]
        out: Prompts = [[] for _ in prompts]
        for step in range(n):
            for row, place in enumerate(places):
                logits = llama.llama_get_logits_ith(context, place)
                out[row].append(int(np.ctypeslib.as_array(logits, (CFG["vocab_size"],)).argmax()))
            if step + 1 < n:
                read(context, [(ids[-1], length + step, row, True) for row, ids in enumerate(out)])
                places = list(range(rows))
        return out

    size = {"f32": 4 * MATRICES, "bf16": 2 * MATRICES, "q8_0": MATRICES * 8.5 / 8}
    # Q4_0 has its head in Q6_K: 6.5625 bits a weight.
    q4 = (MATRICES - HEAD) * 4.5 / 8 + HEAD * 6.5625 / 8
    return Engine(generate, llama.__version__, size.get(kind, q4))


def _fastgpt(variant: str, folder: Path, threads: int) -> Engine:
    import torch

    import fastgpt
    from fastgpt.generation import Generator

    model = load_model(folder)
    plain = variant.startswith("plain")
    if variant.endswith("repeat"):
        _make_repetitive(model)
    dtypes: dict[str, Any] = {"bf16": torch.bfloat16, "int8": "int8", "int4": "int4"}
    generator = Generator(model, dtypes.get(variant), shortcuts=not plain)

    def generate(prompts: Prompts, n: int) -> Prompts:
        # Every round has the same prompt, which is to be read anew.
        generator.forget()
        results = generator.generate(torch.tensor(prompts), n)
        assert isinstance(results, torch.Tensor)
        return _new(results, prompts)

    size = {"plain": 4 * MATRICES, "bf16": 2 * MATRICES, "int8": MATRICES * 8.5 / 8}
    size["int4"] = (MATRICES - HEAD) * 4.5 / 8 + HEAD * 8.5 / 8
    return Engine(generate, fastgpt.__version__, size.get(variant))


def _make_repetitive(model: Any) -> None:
    """Let token t be followed by t + 1 in a circle of 20, as far as the work goes an ordinary model."""
    import torch

    with torch.no_grad():
        model.tok_emb.weight.mul_(20.0)
        model.out_head.weight.mul_(0.01)
        follows = (torch.arange(20) + 1) % 20
        model.out_head.weight[follows] = model.tok_emb.weight[:20] * 0.05

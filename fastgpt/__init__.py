"""fastgpt: the GPT of "Build a Large Language Model (From Scratch)", on fused kernels.

The book's names, weights and results; the hot paths are our own C++, CUDA and Triton. Start with `fastgpt.info()`.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastgpt._version import __version__

# Public name -> the module that holds it. Loaded on first use, so that `import fastgpt` costs no more than it must.
_EXPORTS = {
    "GPTModel": "fastgpt.model",
    "GPT_CONFIG_124M": "fastgpt.config",
    "GPT_CONFIG_355M": "fastgpt.config",
    "GPT_CONFIG_774M": "fastgpt.config",
    "GPT_CONFIG_1558M": "fastgpt.config",
    "Generator": "fastgpt.generation",
    "generate": "fastgpt.generation",
    "generate_text_simple": "fastgpt.generation",
    "accelerate": "fastgpt.acceleration",
    "restore": "fastgpt.acceleration",
    "Report": "fastgpt.acceleration",
    "get_tokenizer": "fastgpt.tokenizer",
    "text_to_token_ids": "fastgpt.tokenizer",
    "token_ids_to_text": "fastgpt.tokenizer",
    "load_story": "fastgpt.text",
    "info": "fastgpt.about",
    "use_backend": "fastgpt.ops",
    "BackendError": "fastgpt.ops",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

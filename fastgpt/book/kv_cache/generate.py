"""`llms_from_scratch.kv_cache.generate`, and the name that the chapter's own script gives to its function."""

from fastgpt.generation.kv_model import KVCache
from fastgpt.generation.kv_text import (
    generate_text_simple,
    generate_text_simple_cached,
    generate_text_simple_stream,
    trim_input_tensor,
)

__all__ = [
    "KVCache",
    "generate_text_simple",
    "generate_text_simple_cached",
    "generate_text_simple_stream",
    "trim_input_tensor",
]

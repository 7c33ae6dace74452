"""`llms_from_scratch.kv_cache.utils`."""

from fastgpt.generation.kv_model import KVCache

__all__ = ["KVCache"]

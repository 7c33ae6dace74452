"""`llms_from_scratch.kv_cache.gpt2`."""

from fastgpt.generation.kv_model import GPTModel, KVCache, MultiHeadAttention
from fastgpt.model import GELU, FeedForward, LayerNorm, TransformerBlock

__all__ = ["GELU", "FeedForward", "GPTModel", "KVCache", "LayerNorm", "MultiHeadAttention", "TransformerBlock"]

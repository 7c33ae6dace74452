"""Generation: `Generator` with its key-value cache, and the book's functions on top of it.

rows        prompts, checked; rows that grow
network     a model of the book's structure, read as functions on the live weights
layers      linear layers and norms: the fastest call for one row
cache       keys and values, preallocated
engine      prefill and decode_one_token; logits for the next token
sampling    from logits to a token
generator   Generator: generate, stream
text        the book's generate_text_simple and generate
kv_model, kv_text   the book's own KV-cache classes and functions
"""

from fastgpt.generation.errors import OutOfRangeError, PromptError
from fastgpt.generation.generator import Generator
from fastgpt.generation.text import generate, generate_text_simple

__all__ = ["Generator", "OutOfRangeError", "PromptError", "generate", "generate_text_simple"]

"""`llms_from_scratch.generate`: a helper of the bonus chapters."""

from fastgpt.generation.kv_text import trim_input_tensor

__all__ = ["trim_input_tensor"]

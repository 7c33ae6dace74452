"""Chapter 2, text data: tokenizers, the dataset of sliding windows, its loader, and the bonus encoders."""

from fastgpt.data import GPTDatasetV1, create_dataloader_v1
from fastgpt.teaching_tokenizers import (
    BPETokenizerSimple,
    Encoder,
    SimpleTokenizerV1,
    SimpleTokenizerV2,
    get_encoder,
)

__all__ = [
    "BPETokenizerSimple",
    "Encoder",
    "GPTDatasetV1",
    "SimpleTokenizerV1",
    "SimpleTokenizerV2",
    "create_dataloader_v1",
    "get_encoder",
]

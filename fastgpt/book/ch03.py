"""Chapter 3, attention: self-attention step by step, multi-head attention, and the bonus variants."""

from fastgpt.attention_variants import (
    CausalAttention,
    Ch03_MHA,
    Ch03_MHA_Wrapper,
    MHAEinsum,
    MHAPyTorchClass,
    MHAPyTorchFlexAttention,
    MHAPyTorchScaledDotProduct,
    MHAPyTorchSDPAWithoutFlash,
    MultiHeadAttentionCombinedQKV,
    MultiHeadAttentionWrapper,
    PyTorchMultiHeadAttention,
    SelfAttention_v1,
    SelfAttention_v2,
)
from fastgpt.model import MultiHeadAttention

__all__ = [
    "CausalAttention",
    "Ch03_MHA",
    "Ch03_MHA_Wrapper",
    "MHAEinsum",
    "MHAPyTorchClass",
    "MHAPyTorchFlexAttention",
    "MHAPyTorchSDPAWithoutFlash",
    "MHAPyTorchScaledDotProduct",
    "MultiHeadAttention",
    "MultiHeadAttentionCombinedQKV",
    "MultiHeadAttentionWrapper",
    "PyTorchMultiHeadAttention",
    "SelfAttention_v1",
    "SelfAttention_v2",
]

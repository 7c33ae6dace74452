"""Chapter 4, the GPT model: its parts, its fast layout, the stand-ins, and greedy generation."""

from fastgpt.attention_variants import PyTorchMultiHeadAttention
from fastgpt.config import GPT_CONFIG_124M
from fastgpt.generation import generate_text_simple
from fastgpt.model import GELU, FeedForward, GPTModel, LayerNorm, MultiHeadAttention, TransformerBlock
from fastgpt.model_fast import FeedForwardFast, GPTModelFast, TransformerBlockFast
from fastgpt.stubs import DummyGPTModel, DummyLayerNorm, DummyTransformerBlock, ExampleDeepNeuralNetwork

__all__ = [
    "GELU",
    "GPT_CONFIG_124M",
    "DummyGPTModel",
    "DummyLayerNorm",
    "DummyTransformerBlock",
    "ExampleDeepNeuralNetwork",
    "FeedForward",
    "FeedForwardFast",
    "GPTModel",
    "GPTModelFast",
    "LayerNorm",
    "MultiHeadAttention",
    "PyTorchMultiHeadAttention",
    "TransformerBlock",
    "TransformerBlockFast",
    "generate_text_simple",
]

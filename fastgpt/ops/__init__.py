"""The ops: each is a room with one door, a plain PyTorch reference and backends. `dispatch` says who runs what."""

from fastgpt.ops.attention import causal_attention
from fastgpt.ops.decode_attention import decode_attention
from fastgpt.ops.dispatch import BackendError, use_backend
from fastgpt.ops.dropout_add_layer_norm import dropout_add_layer_norm
from fastgpt.ops.embedding import embedding
from fastgpt.ops.gelu import gelu
from fastgpt.ops.layer_norm import layer_norm
from fastgpt.ops.linear import linear, packed_linear
from fastgpt.ops.linear.after_gelu import gelu_linear
from fastgpt.ops.linear_cross_entropy import linear_cross_entropy
from fastgpt.ops.packed_causal_attention import packed_causal_attention

__all__ = [
    "BackendError",
    "causal_attention",
    "decode_attention",
    "dropout_add_layer_norm",
    "embedding",
    "gelu",
    "gelu_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "packed_causal_attention",
    "packed_linear",
    "use_backend",
]

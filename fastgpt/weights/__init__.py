"""Weights on disk: our own files, Hugging Face's, the book's `.pth` files, and OpenAI's checkpoints without TensorFlow.

`load_gpt(path)` opens any of them. Chapter 5's bonus functions for models of transformers, which partly have the names
of other functions, are in `fastgpt.weights.huggingface`.
"""

from fastgpt.weights.any_model import load_gpt
from fastgpt.weights.book import assign, load_weights_into_gpt
from fastgpt.weights.checkpoint_files import load_pth, load_weights_file, read_weights, save_weights_file
from fastgpt.weights.errors import WeightsError
from fastgpt.weights.files import CheckpointError, load_model, load_weights, save_weights
from fastgpt.weights.huggingface import load_huggingface, save_huggingface
from fastgpt.weights.layouts import infer_config
from fastgpt.weights.models import model_config
from fastgpt.weights.openai import download_and_load_gpt2, download_file, load_gpt2_params_from_tf_ckpt
from fastgpt.weights.tensor_bundle import BundleError, TensorBundle

__all__ = [
    "BundleError",
    "CheckpointError",
    "TensorBundle",
    "WeightsError",
    "assign",
    "download_and_load_gpt2",
    "download_file",
    "infer_config",
    "load_gpt",
    "load_gpt2_params_from_tf_ckpt",
    "load_huggingface",
    "load_model",
    "load_pth",
    "load_weights",
    "load_weights_file",
    "load_weights_into_gpt",
    "model_config",
    "read_weights",
    "save_huggingface",
    "save_weights",
    "save_weights_file",
]

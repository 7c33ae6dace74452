"""Weights on disk: our own safetensors files, and OpenAI's GPT-2 checkpoints, read without TensorFlow."""

from fastgpt.weights.book import assign, load_weights_into_gpt
from fastgpt.weights.errors import WeightsError
from fastgpt.weights.files import CheckpointError, load_model, load_weights, save_weights
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
    "load_gpt2_params_from_tf_ckpt",
    "load_model",
    "load_weights",
    "load_weights_into_gpt",
    "save_weights",
]

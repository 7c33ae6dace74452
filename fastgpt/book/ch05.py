"""Chapter 5, pretraining: losses, the training loop, sampling, and OpenAI's weights."""

from fastgpt.generation import generate, generate_text_simple
from fastgpt.tokenizer import text_to_token_ids, token_ids_to_text
from fastgpt.training import (
    calc_loss_batch,
    calc_loss_loader,
    evaluate_model,
    generate_and_print_sample,
    plot_losses,
    print_sampled_tokens,
    softmax_with_temperature,
    train_model_simple,
)
from fastgpt.weights import (
    assign,
    download_and_load_gpt2,
    download_file,
    load_gpt2_params_from_tf_ckpt,
    load_weights_into_gpt,
)

__all__ = [
    "assign",
    "calc_loss_batch",
    "calc_loss_loader",
    "download_and_load_gpt2",
    "download_file",
    "evaluate_model",
    "generate",
    "generate_and_print_sample",
    "generate_text_simple",
    "load_gpt2_params_from_tf_ckpt",
    "load_weights_into_gpt",
    "plot_losses",
    "print_sampled_tokens",
    "softmax_with_temperature",
    "text_to_token_ids",
    "token_ids_to_text",
    "train_model_simple",
]

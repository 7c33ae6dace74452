"""Appendix D: the training loop with learning-rate warmup, cosine decay and gradient clipping."""

from fastgpt.training import find_highest_gradient, train_model

__all__ = ["find_highest_gradient", "train_model"]

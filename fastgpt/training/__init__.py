"""Training: the book's loops by their names, and `pretrain` for longer runs."""

from fastgpt.training.checkpoint import load_checkpoint, save_checkpoint
from fastgpt.training.evaluation import evaluate_model, generate_and_print_sample
from fastgpt.training.lessons import print_sampled_tokens, softmax_with_temperature
from fastgpt.training.loops import find_highest_gradient, train_model, train_model_simple
from fastgpt.training.loss import calc_loss_batch, calc_loss_loader
from fastgpt.training.optimizer import make_adamw
from fastgpt.training.plots import plot_losses, save_loss_plot, terminal_plot
from fastgpt.training.pretrain import PretrainResult, pretrain, resume
from fastgpt.training.progress import BarReporter, Evaluation, LineReporter, Reporter, terminal_reporter
from fastgpt.training.run import DivergedError
from fastgpt.training.schedules import WarmupCosine
from fastgpt.training.settings import PretrainSettings

__all__ = [
    "BarReporter",
    "DivergedError",
    "Evaluation",
    "LineReporter",
    "PretrainResult",
    "PretrainSettings",
    "Reporter",
    "WarmupCosine",
    "calc_loss_batch",
    "calc_loss_loader",
    "evaluate_model",
    "find_highest_gradient",
    "generate_and_print_sample",
    "load_checkpoint",
    "make_adamw",
    "plot_losses",
    "pretrain",
    "print_sampled_tokens",
    "resume",
    "save_checkpoint",
    "save_loss_plot",
    "softmax_with_temperature",
    "terminal_plot",
    "terminal_reporter",
    "train_model",
    "train_model_simple",
]

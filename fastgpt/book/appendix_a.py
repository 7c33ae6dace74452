"""Appendix A, PyTorch: the first network, its data, its accuracy, and training on several processes."""

from fastgpt.training.distributed import ddp_setup, main, prepare_dataset
from fastgpt.training.first_network import NeuralNetwork, ToyDataset, compute_accuracy

__all__ = ["NeuralNetwork", "ToyDataset", "compute_accuracy", "ddp_setup", "main", "prepare_dataset"]

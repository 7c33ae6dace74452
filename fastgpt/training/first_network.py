"""Appendix A's first network: two hidden layers, a data set of seven points, and the accuracy over a loader."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class NeuralNetwork(nn.Module):
    """A perceptron with hidden layers of 30 and 20 ReLU units.

    Args:
        num_inputs: width of the input.
        num_outputs: number of classes.
    """

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_inputs, 30),
            nn.ReLU(),
            nn.Linear(30, 20),
            nn.ReLU(),
            nn.Linear(20, num_outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, num_inputs) to logits (batch, num_outputs)."""
        logits: Tensor = self.layers(x)
        return logits


class ToyDataset(Dataset[tuple[Tensor, Tensor]]):
    """Rows of features with a label each.

    Args:
        X: features, (n_rows, n_features).
        y: labels, (n_rows,).

    Attributes:
        features, labels: the two.
    """

    def __init__(self, X: Tensor, y: Tensor) -> None:
        self.features = X
        self.labels = y

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Row `index` and its label."""
        return self.features[index], self.labels[index]

    def __len__(self) -> int:
        return self.labels.shape[0]


def toy_datasets() -> tuple[ToyDataset, ToyDataset]:
    """The appendix's five training points and two test points, of two classes."""
    train = [[-1.2, 3.1], [-0.9, 2.9], [-0.5, 2.6], [2.3, -1.1], [2.7, -1.5]]
    test = [[-0.8, 2.8], [2.6, -1.6]]
    return (
        ToyDataset(torch.tensor(train), torch.tensor([0, 0, 0, 1, 1])),
        ToyDataset(torch.tensor(test), torch.tensor([0, 1])),
    )


@torch.no_grad()
def compute_accuracy(model: nn.Module, dataloader: Any, device: torch.device | str | int | None = None) -> float:
    """Share of rows whose label is the likeliest class. Leaves the model in evaluation mode, as the book does.

    Args:
        model: features to logits.
        dataloader: gives (features, labels).
        device: where the model is; None leaves the batches where they are.

    Returns:
        A float from 0 to 1.

    Raises:
        ZeroDivisionError: the loader is empty, as a process of a distributed run can find it.
    """
    model.eval()
    correct, total = 0, 0
    for features, labels in dataloader:
        if device is not None:
            features, labels = features.to(device), labels.to(device)
        correct += int((model(features).argmax(dim=1) == labels).sum())
        total += len(labels)
    return correct / total

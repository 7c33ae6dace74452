"""Appendix A's training on several processes with DistributedDataParallel: one process a GPU, or a CPU without GPUs.

    world_size = torch.cuda.device_count() or 2
    torch.multiprocessing.spawn(main, args=(world_size, num_epochs), nprocs=world_size)

or, started by torchrun, which tells each process its rank: main(rank, world_size, num_epochs).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import distributed
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from fastgpt.training.first_network import NeuralNetwork, compute_accuracy, toy_datasets

Loader = DataLoader[tuple[torch.Tensor, torch.Tensor]]

PORT = 12345


def ddp_setup(rank: int, world_size: int, *, port: int = PORT) -> None:
    """Join the group of processes.

    With GPUs the processes talk through NCCL and each takes the GPU of its rank; without, and on Windows, through Gloo.

    Args:
        rank: number of this process, from 0.
        world_size: number of processes.
        port: where they meet on this machine. Under torchrun its own meeting point is used.
    """
    on_gpu = torch.cuda.is_available()
    backend = "nccl" if on_gpu and sys.platform != "win32" else "gloo"
    meet = "env://" if distributed.is_torchelastic_launched() else f"tcp://127.0.0.1:{port}"
    distributed.init_process_group(backend, init_method=meet, rank=rank, world_size=world_size)
    if on_gpu:
        torch.cuda.set_device(rank)


def prepare_dataset() -> tuple[Loader, Loader]:
    """Loaders of the toy data; the one for training gives each process its own share. Needs `ddp_setup` before it.

    Returns:
        (training, test) loaders.
    """
    train, test = toy_datasets()
    pinned = torch.cuda.is_available()
    sampler: DistributedSampler[Any] = DistributedSampler(train)
    # The sampler shuffles, so the loader must not.
    train_loader = DataLoader(train, batch_size=2, shuffle=False, pin_memory=pinned, drop_last=True, sampler=sampler)
    return train_loader, DataLoader(test, batch_size=2, shuffle=False)


def main(rank: int, world_size: int, num_epochs: int, *, port: int = PORT) -> None:
    """One process of the training: joins, trains the first network, prints its losses and accuracies, leaves.

    Args:
        rank, world_size, port: see `ddp_setup`.
        num_epochs: passes over the data.
    """
    ddp_setup(rank, world_size, port=port)
    try:
        train_loader, test_loader = prepare_dataset()
        device: torch.device | int = rank if torch.cuda.is_available() else torch.device("cpu")
        network = NeuralNetwork(num_inputs=2, num_outputs=2).to(device)
        model = DistributedDataParallel(network, device_ids=[rank] if torch.cuda.is_available() else None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for epoch in range(num_epochs):
            _train_epoch(
                model, train_loader, optimizer, device, f"[GPU{rank}] Epoch: {epoch + 1:03d}/{num_epochs:03d}", epoch
            )
        for name, loader in (("Training", train_loader), ("Test", test_loader)):
            try:
                accuracy = compute_accuracy(model, loader, device=device)
                # One string: the processes write to one terminal, and pieces of lines would mix.
                print(f"[GPU{rank}] {name} accuracy {accuracy}")
            except ZeroDivisionError:
                print(f"[GPU{rank}] {name} accuracy unknown: with {world_size} processes this one got no full batch")
    finally:
        distributed.destroy_process_group()


def _train_epoch(
    model: torch.nn.Module,
    loader: Loader,
    optimizer: torch.optim.Optimizer,
    device: torch.device | int,
    heading: str,
    epoch: int,
) -> None:
    assert isinstance(loader.sampler, DistributedSampler)
    # Without it every epoch has the same order.
    loader.sampler.set_epoch(epoch)
    model.train()
    for features, labels in loader:
        features, labels = features.to(device), labels.to(device)
        loss = functional.cross_entropy(model(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"{heading} | Batchsize {labels.shape[0]:03d} | Train/Val Loss: {loss:.2f}")

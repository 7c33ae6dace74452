"""Appendix A: the first network, its data and accuracy, and training on two processes."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from fastgpt.book import appendix_a
from fastgpt.training.first_network import toy_datasets


def test_the_network_has_the_books_layers_and_parameters():
    model = appendix_a.NeuralNetwork(50, 3)
    widths = [(layer.in_features, layer.out_features) for layer in model.layers if isinstance(layer, torch.nn.Linear)]
    assert widths == [(50, 30), (30, 20), (20, 3)]
    assert sum(p.numel() for p in model.parameters()) == 2213


def test_the_network_computes_two_relu_layers():
    torch.manual_seed(123)
    model = appendix_a.NeuralNetwork(4, 2)
    x = torch.randn(3, 4)
    (w1, b1), (w2, b2), (w3, b3) = [(model.layers[i].weight, model.layers[i].bias) for i in (0, 2, 4)]
    wanted = ((x @ w1.T + b1).relu() @ w2.T + b2).relu() @ w3.T + b3
    torch.testing.assert_close(model(x), wanted)


def test_the_dataset_gives_rows_with_labels():
    features, labels = torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 1])
    data = appendix_a.ToyDataset(features, labels)
    assert len(data) == 3 and data.features is features and data.labels is labels
    assert torch.equal(data[1][0], features[1]) and data[1][1] == 1


def test_the_book_trains_the_network_to_full_accuracy():
    torch.manual_seed(123)
    train, test = toy_datasets()
    loader = DataLoader(train, batch_size=2, shuffle=True, drop_last=True)
    model = appendix_a.NeuralNetwork(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        for features, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(features), labels).backward()
            optimizer.step()
    assert appendix_a.compute_accuracy(model, DataLoader(train, batch_size=2)) == 1.0
    assert appendix_a.compute_accuracy(model, DataLoader(test, batch_size=2), "cpu") == 1.0


def test_accuracy_counts_rows_and_leaves_evaluation_mode():
    class Sign(torch.nn.Module):
        def forward(self, x):
            return torch.cat([-x, x], dim=1)

    data = appendix_a.ToyDataset(torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([1, 1, 1]))
    model = Sign().train()
    assert appendix_a.compute_accuracy(model, DataLoader(data, batch_size=2)) == 2 / 3
    assert not model.training


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_train_together():
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without Gloo")
    if torch.cuda.is_available():
        pytest.skip("this test is for processes without a GPU each")
    # Processes of their own, as torchrun starts them: about one in forty pairs of forked ones never ended.
    code = "import sys, torch; torch.set_num_threads(1); from fastgpt.book.appendix_a import main; "
    code += f"main(int(sys.argv[1]), 2, 3, port={free_port()})"
    started = [
        subprocess.Popen([sys.executable, "-c", code, rank], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        printed = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, process, (out, error) in zip((0, 1), started, printed, strict=True):
        assert process.returncode == 0, error
        assert out.count(f"[GPU{rank}] Epoch: ") == 3
        assert f"[GPU{rank}] Epoch: 003/003 | Batchsize 002 | Train/Val Loss: " in out
        assert f"[GPU{rank}] Training accuracy " in out and f"[GPU{rank}] Test accuracy " in out


def test_the_script_can_be_spawned():
    assert pickle.loads(pickle.dumps(appendix_a.main)) is appendix_a.main


def test_the_loaders_share_the_training_rows_out():
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        train_loader, test_loader = appendix_a.prepare_dataset()
        assert isinstance(train_loader.sampler, torch.utils.data.DistributedSampler)
        assert len(train_loader) == 2 and len(test_loader) == 1
    finally:
        torch.distributed.destroy_process_group()


def test_a_gpt_survives_distributed_data_parallel_and_spawn():
    from fastgpt.model import GPTModel

    cfg = {"vocab_size": 11, "context_length": 4, "emb_dim": 8, "n_heads": 2, "n_layers": 1}
    model = GPTModel(cfg | {"drop_rate": 0.0, "qkv_bias": False})
    tokens = torch.tensor([[1, 2, 3]])
    names = [name for name, _ in model.named_parameters()]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        parallel(tokens).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        assert parallel.module is model and [n for n, _ in parallel.module.named_parameters()] == names
    finally:
        torch.distributed.destroy_process_group()
    model.zero_grad()
    model(tokens).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(copy(tokens), model(tokens))

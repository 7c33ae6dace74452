"""Safetensors files and training checkpoints: what goes in comes out, and what is damaged changes nothing."""

from __future__ import annotations

import copy
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import reference
from fastgpt.model import GPTModel
from fastgpt.training import load_checkpoint, make_adamw, save_checkpoint
from fastgpt.training.checkpoint import read_info
from fastgpt.weights import CheckpointError, load_model, load_weights, save_weights
from fastgpt.weights.files import read_tensors, write_tensors, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

CFG = {
    "vocab_size": 31,
    "context_length": 6,
    "emb_dim": 8,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": True,
}


def make_model(seed: int = 1, kind: type = GPTModel, **changes: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return kind(CFG | changes)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Steps on random batches with dropout, so that they depend on weights, moments and random state."""
    losses = []
    for _ in range(steps):
        ids = torch.randint(31, (2, 7))
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(seed: int = 1) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = make_model(seed)
    optimizer = make_adamw(model, lr=0.01, weight_decay=0.1)
    train(model, optimizer, 3)
    return model, optimizer


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


# ------------------------------------------------------------------------------------------------ weights alone


def test_weights_come_back_bit_for_bit(tmp_path: Path):
    model, twin = make_model(1), make_model(2)
    save_weights(tmp_path / "w.safetensors", model, {"note": "ü", "numbers": [1, 2.5]})
    assert load_weights(tmp_path / "w.safetensors", twin) == {"note": "ü", "numbers": [1, 2.5]}
    assert same(model.state_dict(), twin.state_dict())


def test_the_file_holds_the_books_names_without_masks(tmp_path: Path):
    model = make_model()
    save_weights(tmp_path / "w.safetensors", model)
    wanted = {name for name in reference.GPTModel(CFG).state_dict() if not name.endswith(".mask")}
    assert set(load_file(tmp_path / "w.safetensors")) == wanted


@pytest.mark.parametrize("kind", [GPTModel, reference.GPTModel])
def test_a_plain_safetensors_file_with_masks_loads_too(kind: type, tmp_path: Path):
    source, model = make_model(3, reference.GPTModel), make_model(4, kind)
    save_file(source.state_dict(), tmp_path / "plain.safetensors")
    assert load_weights(tmp_path / "plain.safetensors", model) == {}
    assert same(source.state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_model_builds_the_model_again(dtype: torch.dtype, tmp_path: Path):
    model = make_model().to(dtype).eval()
    save_weights(tmp_path / "w.safetensors", model, {"config": CFG})
    state = torch.get_rng_state()
    again, info = load_model(tmp_path / "w.safetensors")
    assert info["config"] == CFG and not again.training
    assert same(model.state_dict(), again.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    ids = torch.arange(6).unsqueeze(0)
    assert torch.equal(model(ids), again(ids))


def test_load_model_without_a_configuration_says_what_to_do(tmp_path: Path):
    save_weights(tmp_path / "w.safetensors", make_model())
    with pytest.raises(CheckpointError, match="Build the model yourself"):
        load_model(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"emb_dim": 4}, r"tok_emb.weight is float32 \(31, 8\), wanted float32 \(31, 4\)"),
        ({"n_layers": 3}, "trf_blocks.2.att.W_query.weight is missing"),
        ({"n_layers": 1}, "trf_blocks.1.att.W_query.weight is not part of it"),
        ({"qkv_bias": False}, "W_query.bias is not part of it"),
        ({"context_length": 5}, r"pos_emb.weight is float32 \(6, 8\), wanted float32 \(5, 8\)"),
    ],
)
def test_another_models_weights_are_refused_and_nothing_changes(change: dict, text: str, tmp_path: Path):
    save_weights(tmp_path / "w.safetensors", make_model())
    model = make_model(2, **change)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=text):
        load_weights(tmp_path / "w.safetensors", model)
    assert same(before, model.state_dict())


def test_another_dtype_is_refused(tmp_path: Path):
    save_weights(tmp_path / "w.safetensors", make_model().to(torch.bfloat16))
    with pytest.raises(CheckpointError, match="is bfloat16 .*, wanted float32"):
        load_weights(tmp_path / "w.safetensors", make_model())


def test_all_kinds_of_tensors_survive(tmp_path: Path):
    tensors = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "half": torch.arange(5, dtype=torch.bfloat16),
        "ids": torch.arange(6).reshape(2, 3),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "flags": torch.tensor([True, False]),
    }
    write_tensors(tmp_path / "t.safetensors", tensors, {})
    got, _ = read_tensors(tmp_path / "t.safetensors")
    assert same(tensors, {name: got[name] for name in tensors})


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    save_weights(path, make_model(1), {"turn": 1})
    before = path.read_bytes()

    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("safetensors.torch.save_file", fail)
        save_weights(path, make_model(2), {"turn": 2})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_files_get_the_users_usual_permissions(tmp_path: Path):
    (tmp_path / "usual").touch()
    save_weights(tmp_path / "w", make_model())
    write_text(tmp_path / "t", "ü")
    assert len({(tmp_path / name).stat().st_mode for name in ("usual", "w", "t")}) == 1


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_brings_back_weights_moments_settings_and_random_numbers(tmp_path: Path):
    model, optimizer = trained()
    optimizer.param_groups[0]["lr"] = 0.0123
    save_checkpoint(tmp_path / "c", model, optimizer, info={"step": 3}, extra={"losses": torch.ones(3)})
    want = snapshot(model, optimizer)
    twin, other = trained(seed=2)
    info, extra = load_checkpoint(tmp_path / "c", twin, other)
    assert info == {"step": 3} and same(extra, {"losses": torch.ones(3)})
    assert same(want, snapshot(twin, other))


def test_training_goes_on_exactly_after_a_checkpoint(tmp_path: Path):
    model, optimizer = trained()
    save_checkpoint(tmp_path / "c", model, optimizer)
    want = train(model, optimizer, 4)
    twin, other = make_model(2), None
    other = make_adamw(twin, lr=0.5, weight_decay=0.0)
    load_checkpoint(tmp_path / "c", twin, other)
    assert train(twin, other, 4) == want


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
        lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, centered=True),
    ],
)
def test_other_optimizers_go_on_exactly_too(make, tmp_path: Path):
    model, twin = make_model(1), make_model(2)
    optimizer, other = make(model.parameters()), make(twin.parameters())
    train(model, optimizer, 2)
    save_checkpoint(tmp_path / "c", model, optimizer)
    want = train(model, optimizer, 3)
    load_checkpoint(tmp_path / "c", twin, other)
    assert train(twin, other, 3) == want


def test_a_loaded_run_does_not_hang_on_the_file(tmp_path: Path):
    model, optimizer = trained()
    save_checkpoint(tmp_path / "c", model, optimizer)
    load_checkpoint(tmp_path / "c", model, optimizer)
    want = snapshot(model, optimizer)
    with (tmp_path / "c").open("r+b") as file:
        file.write(bytes((tmp_path / "c").stat().st_size))
    assert same(want, snapshot(model, optimizer))


def test_a_checkpoint_serves_as_weights_too(tmp_path: Path):
    model, optimizer = trained()
    save_checkpoint(tmp_path / "c", model, optimizer, info={"config": CFG})
    assert same(load_model(tmp_path / "c")[0].state_dict(), model.state_dict())


def test_weights_alone_are_no_checkpoint(tmp_path: Path):
    model, optimizer = trained()
    save_weights(tmp_path / "w", model)
    with pytest.raises(CheckpointError, match="holds no training state"):
        load_checkpoint(tmp_path / "w", model, optimizer)


def test_an_optimizer_with_other_groups_is_refused_and_nothing_changes(tmp_path: Path):
    model, optimizer = trained()
    save_checkpoint(tmp_path / "c", model, optimizer)
    twin = make_model(2)
    other = torch.optim.AdamW(twin.parameters())
    before = snapshot(twin, other)
    with pytest.raises(CheckpointError, match="other parameter groups"):
        load_checkpoint(tmp_path / "c", twin, other)
    assert same(before, snapshot(twin, other))


def test_a_missing_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint .*gone"):
        read_info(tmp_path / "gone")


def test_a_newer_version_is_refused(tmp_path: Path):
    text = json.dumps({"version": 2, "info": {}, "crc32": {}})
    metadata = {"fastgpt": text, "fastgpt_crc32": f"{zlib.crc32(text.encode()):08x}"}
    save_file({"a": torch.ones(1)}, tmp_path / "c", metadata)
    with pytest.raises(CheckpointError, match="has version 2; this fastgpt reads version 1"):
        read_info(tmp_path / "c")


# ---------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "c"
    save_checkpoint(path, *trained(), info={"step": 3})
    return path.read_bytes()


def damaged(good: bytes, kind: str, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    data = bytearray(good)
    header = 8 + struct.unpack_from("<Q", good)[0]
    if kind == "truncated":
        return good[: int(rng.integers(len(good)))]
    if kind == "longer":
        return good + rng.bytes(int(rng.integers(1, 100)))
    first, last = {"flipped length": (0, 8), "flipped header": (8, header), "flipped data": (header, len(data))}.get(
        kind, (0, len(data))
    )
    if kind == "zeroed":
        begin = int(rng.integers(len(data) - 64))
        data[begin : begin + 64] = bytes(64)
    elif kind == "swapped":
        a, b = (int(i) * 16 for i in rng.integers(len(data) // 16 - 4, size=2))
        data[a : a + 64], data[b : b + 64] = data[b : b + 64], data[a : a + 64]
    else:
        data[int(rng.integers(first, last))] ^= 1 << int(rng.integers(8))
    return bytes(data)


KINDS = ("truncated", "longer", "flipped length", "flipped header", "flipped data", "zeroed", "swapped", "empty")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_one_clear_error_and_changes_nothing(kind: str, good: bytes, tmp_path: Path):
    model, optimizer = trained(seed=2)
    before = snapshot(model, optimizer)
    for seed in range(16):
        data = b"" if kind == "empty" else damaged(good, kind, seed)
        (tmp_path / "c").write_bytes(data)
        # Padding and JSON's blanks may be hit without harm; then everything must be as it was saved.
        try:
            load_checkpoint(tmp_path / "c", model, optimizer)
        except CheckpointError as error:
            assert str(tmp_path / "c") in str(error)
            assert same(before, snapshot(model, optimizer)), f"{kind}, seed {seed}: half loaded"
        else:
            assert data == good, f"{kind}, seed {seed}: the damage went unnoticed"
            torch.set_rng_state(before[2])
            model.load_state_dict(before[0])
            optimizer.load_state_dict(copy.deepcopy(before[1]))


def test_a_pickle_is_refused_unread(tmp_path: Path):
    torch.save({"a": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        read_tensors(tmp_path / "c")

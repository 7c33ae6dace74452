"""Weight files of every kind into every model, and damaged, lying and malicious ones into none."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_writer import write_bundle
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgpt import reference
from fastgpt.model import GPTModel
from fastgpt.model_fast import GPTModelFast, convert_state_dict
from fastgpt.weights.any_model import load_gpt
from fastgpt.weights.checkpoint_files import load_pth, load_weights_file, read_weights, save_weights_file
from fastgpt.weights.errors import WeightsError
from fastgpt.weights.files import load_weights, save_weights
from fastgpt.weights.huggingface import load_huggingface, save_huggingface
from fastgpt.weights.layouts import infer_config, to_book, to_huggingface

CFG = {
    "vocab_size": 11,
    "context_length": 4,
    "emb_dim": 8,
    "n_heads": 2,
    "n_layers": 1,
    "drop_rate": 0.0,
    "qkv_bias": True,
}


def random_model(kind: type[nn.Module] = GPTModel, cfg: dict[str, Any] = CFG, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    model = kind(cfg).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def without_masks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return OrderedDict((name, tensor) for name, tensor in state.items() if not name.endswith("mask"))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(torch.arange(8).view(2, 4))
    return out


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


# What a file may hold, from the state dict of the plain reference model, which has masks.
CONTENTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "masks": lambda state: state,
    "no masks": without_masks,
    "fast": lambda state: convert_state_dict(state, "fast"),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "ddp": lambda state: prefixed(state, "module."),
    "compiled ddp": lambda state: prefixed(state, "module._orig_mod."),
    "ddp compiled": lambda state: prefixed(state, "_orig_mod.module."),
    "compiled fast": lambda state: prefixed(convert_state_dict(state, "fast"), "_orig_mod."),
    "chapter 5": lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": []}},
    "lightning": lambda state: {"state_dict": state, "epoch": 3},
    "parameters": lambda state: OrderedDict((n, nn.Parameter(t)) for n, t in without_masks(state).items()),
}


@pytest.mark.parametrize("kind", [GPTModel, GPTModelFast, reference.GPTModel])
@pytest.mark.parametrize("content", CONTENTS)
def test_a_pth_file_loads_into_each_model(tmp_path, content, kind):
    source = random_model(reference.GPTModel)
    torch.save(CONTENTS[content](source.state_dict()), tmp_path / "model.pth")
    model = random_model(kind, seed=4)
    load_pth(tmp_path / "model.pth", model)
    torch.testing.assert_close(logits(model), logits(source), rtol=0, atol=1e-6)


@pytest.mark.parametrize("content", CONTENTS)
def test_the_file_format_before_pytorch_1_6_loads_too(tmp_path, content):
    source = random_model(reference.GPTModel)
    torch.save(CONTENTS[content](source.state_dict()), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = random_model(seed=4)
    load_pth(tmp_path / "old.pth", model)
    assert equal(model, source)


def test_names_agree_with_the_conversion_of_state_dicts():
    state = random_model(reference.GPTModel).state_dict()
    got = to_book(convert_state_dict(state, "fast"))
    want = without_masks(state)
    assert list(got) == list(want)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_our_own_files_are_recognised_with_and_without_the_state_of_a_run(tmp_path):
    source = random_model()
    save_weights(tmp_path / "model.safetensors", source, {"config": CFG})
    plain = {name: tensor.clone() for name, tensor in without_masks(source.state_dict()).items()}
    save_file(plain | {"optimizer/exp_avg": torch.zeros(2)}, tmp_path / "run.safetensors")
    for name in ("model.safetensors", "run.safetensors"):
        model = random_model(seed=4)
        load_weights_file(tmp_path / name, model)
        assert equal(model, source)


def test_the_name_of_a_file_does_not_matter(tmp_path):
    source = random_model()
    torch.save(source.state_dict(), tmp_path / "model.safetensors")
    save_file(without_masks(source.state_dict()), tmp_path / "model.pth")
    for name in ("model.safetensors", "model.pth"):
        model = random_model(seed=4)
        load_weights_file(tmp_path / name, model)
        assert equal(model, source)


def test_a_file_without_checksums_of_its_own_loads(tmp_path):
    source = random_model()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(source.state_dict(), tmp_path / "model.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    model = random_model(seed=4)
    load_pth(tmp_path / "model.pth", model)
    assert equal(model, source)


def test_the_optimizer_of_chapter_5_comes_along(tmp_path):
    model, again = random_model(), random_model(seed=4)
    optimizer, optimizer_again = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, again))

    def step(m: nn.Module, o: torch.optim.Optimizer) -> None:
        o.zero_grad()
        m(torch.arange(8).view(2, 4)).square().mean().backward()
        o.step()

    step(model, optimizer)
    content = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    torch.save(content, tmp_path / "model_and_optimizer.pth")
    load_pth(tmp_path / "model_and_optimizer.pth", again, optimizer_again)
    step(model, optimizer)
    step(again, optimizer_again)
    assert equal(model, again)


def test_an_optimizer_of_another_model_changes_neither(tmp_path):
    other = random_model(cfg=CFG | {"emb_dim": 16})
    other(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    wide = torch.optim.AdamW(other.parameters())
    wide.step()
    torch.save(
        {"model_state_dict": random_model().state_dict(), "optimizer_state_dict": wide.state_dict()}, tmp_path / "a.pth"
    )
    model = random_model(seed=4)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(WeightsError, match="another optimizer"):
        load_pth(tmp_path / "a.pth", model, optimizer)
    assert equal(model, random_model(seed=4)) and not optimizer.state


@pytest.mark.parametrize(
    "change",
    [
        {"param_groups": None},
        {"param_groups": [{"lr": 0.1, "params": "all"}]},
        {"param_groups": [{"lr": 0.1, "params": [0]}]},
        {"param_groups": [{"lr": 0.1, "params": [0] * 21}]},
        {"param_groups": [{"lr": 0.1, "params": [[]] * 21}]},
        {"param_groups": [{"params": list(range(21))}]},
        {"state": [1]},
        {"state": {99: {}}},
        {"state": {0: 3}},
        {"state": {0: {"exp_avg": torch.zeros(3)}}},
    ],
)
def test_a_damaged_optimizer_state_changes_neither(tmp_path, change):
    model = random_model()
    optimizer = torch.optim.AdamW(model.parameters())
    state = optimizer.state_dict()
    assert state["param_groups"][0]["params"] == list(range(21))
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": state | change}, tmp_path / "a.pth")
    again = random_model(seed=4)
    with pytest.raises(WeightsError, match=r"a\.pth"):
        load_pth(tmp_path / "a.pth", again, torch.optim.AdamW(again.parameters()))
    assert equal(again, random_model(seed=4))


def test_values_are_rounded_to_the_dtype_of_the_model(tmp_path):
    source = random_model()
    torch.save(source.state_dict(), tmp_path / "model.pth")
    model = random_model(seed=4).to(torch.bfloat16)
    load_pth(tmp_path / "model.pth", model)
    assert equal(model, source.to(torch.bfloat16))


def test_frozen_and_replaced_parts_keep_their_identity(tmp_path):
    torch.save(random_model().state_dict(), tmp_path / "model.pth")
    model = random_model(seed=4)
    model.tok_emb.requires_grad_(False)
    before = dict(model.named_parameters())
    load_pth(tmp_path / "model.pth", model)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not model.tok_emb.weight.requires_grad


def test_a_model_without_memory_is_refused_with_the_way_out(tmp_path):
    torch.save(random_model().state_dict(), tmp_path / "model.pth")
    with torch.device("meta"):
        model = GPTModel(CFG)
    with pytest.raises(WeightsError, match="to_empty"):
        load_pth(tmp_path / "model.pth", model)


def test_the_configuration_is_read_from_the_shapes():
    for qkv_bias in (True, False):
        cfg = CFG | {"qkv_bias": qkv_bias}
        for kind in (GPTModel, GPTModelFast, reference.GPTModel):
            assert infer_config(random_model(kind, cfg).state_dict(), n_heads=2) == cfg


def test_heads_are_known_for_the_released_widths_only():
    with torch.device("meta"):
        model = GPTModel(CFG | {"emb_dim": 768, "n_heads": 12})
    assert infer_config(dict(model.named_parameters()))["n_heads"] == 12
    with pytest.raises(WeightsError, match="pass n_heads"):
        infer_config(random_model().state_dict())


def test_a_missing_file_is_a_file_not_found(tmp_path):
    for read in (read_weights, load_huggingface, lambda path: load_pth(path, random_model())):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", [GPTModel, GPTModelFast, reference.GPTModel])
def test_every_model_is_saved_under_the_names_of_the_book(tmp_path, kind):
    source = random_model(kind)
    save_weights_file(tmp_path / "model.safetensors", torch.compile(source))  # type: ignore[arg-type]
    model = random_model(seed=4)
    load_weights(tmp_path / "model.safetensors", model)
    torch.testing.assert_close(logits(model), logits(source), rtol=0, atol=1e-6)


def test_a_tied_head_is_saved_as_a_tensor_of_its_own(tmp_path):
    source = random_model()
    source.out_head.weight = source.tok_emb.weight
    save_weights_file(tmp_path / "model.safetensors", source)
    assert torch.equal(logits(load_gpt(tmp_path / "model.safetensors")), logits(source))


# One door: a path in, a model out.


SETTINGS = {"n_vocab": 11, "n_ctx": 4, "n_embd": 8, "n_head": 2, "n_layer": 1}


def write_openai(folder: Path, model: nn.Module) -> None:
    """What the book's download leaves of a model whose head is tied."""
    leaves = {"c_": {"weight": "w", "bias": "b"}, "ln": {"weight": "g", "bias": "b"}}
    arrays = {}
    for name, tensor in to_huggingface(dict(model.named_parameters()), tied=True).items():
        *path, module, leaf = name.removeprefix("transformer.").replace("h.", "h").split(".")
        parts = [*path, module, leaves[module[:2]][leaf]] if module[:2] in leaves else [module]
        array = tensor.detach().numpy()
        # Its matrices are kernels of a convolution of width 1.
        arrays["/".join(["model", *parts])] = array[None] if parts[-1] == "w" else array
    folder.mkdir()
    write_bundle(folder / "model.ckpt", arrays)
    (folder / "hparams.json").write_text(json.dumps(SETTINGS), "utf-8")


def test_load_gpt_opens_every_kind(tmp_path):
    source = random_model()
    source.out_head.weight = nn.Parameter(source.tok_emb.weight.detach().clone())
    save_huggingface(source, tmp_path / "hf")
    (tmp_path / "files").mkdir()
    save_weights(tmp_path / "files" / "ours.safetensors", source, {"config": CFG})
    save_weights_file(tmp_path / "files" / "exported.safetensors", source)
    torch.save(source.state_dict(), tmp_path / "files" / "model.pth")
    write_openai(tmp_path / "124M", source)
    for path in ("hf", "hf/model.safetensors", "files/ours.safetensors", "files/exported.safetensors", "124M"):
        assert equal(load_gpt(tmp_path / path), source), path
        torch.testing.assert_close(logits(load_gpt(tmp_path / path)), logits(source), rtol=0, atol=1e-6)
    assert equal(load_gpt(tmp_path / "files" / "model.pth", n_heads=2), source)
    with pytest.raises(WeightsError, match="pass n_heads"):
        load_gpt(tmp_path / "files" / "model.pth")


@pytest.mark.parametrize(
    ("key", "value"), [("n_layer", 10**12), ("n_layer", 2), ("n_vocab", 12), ("n_head", "2"), ("n_ctx", 0)]
)
def test_openai_settings_that_lie_are_refused(tmp_path, key, value):
    write_openai(tmp_path / "124M", random_model())
    (tmp_path / "124M" / "hparams.json").write_text(json.dumps(SETTINGS | {key: value}), "utf-8")
    with pytest.raises(WeightsError):
        load_gpt(tmp_path / "124M")


@pytest.mark.parametrize("name", ["hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_mutated_files_of_openai_end_in_one_error_or_load_completely(tmp_path, name):
    source = random_model()
    source.out_head.weight = nn.Parameter(source.tok_emb.weight.detach().clone())
    write_openai(tmp_path / "124M", source)
    path = tmp_path / "124M" / name
    good = path.read_bytes()
    rng = random.Random(2)
    errors = 0
    for _ in range(60):
        path.write_bytes(mutate(good, rng))
        try:
            model = load_gpt(tmp_path / "124M")
        except WeightsError:
            errors += 1
        else:
            assert equal(model, source)
    assert errors > 20


@pytest.mark.parametrize(
    "change", [{"n_layers": 10**12}, {"emb_dim": 10**9, "n_heads": 1}, {"n_heads": 3}, {"n_heads": "2"}]
)
def test_a_file_with_an_absurd_configuration_is_refused_before_a_model_is_built(tmp_path, change):
    save_weights(tmp_path / "ours.safetensors", random_model(), {"config": CFG | change})
    with pytest.raises(WeightsError, match=r"ours\.safetensors"):
        load_gpt(tmp_path / "ours.safetensors")


# Wrong contents of a well-formed file.


def wrong_contents() -> Iterator[tuple[str, Any]]:
    state = without_masks(random_model().state_dict())
    yield "a missing tensor", {name: t for name, t in state.items() if name != "final_norm.shift"}
    yield "an unknown tensor", state | {"extra.weight": torch.zeros(2)}
    yield "another shape", state | {"pos_emb.weight": torch.zeros(5, 8)}
    yield "transposed", state | {"tok_emb.weight": torch.zeros(8, 11)}
    yield "integers", state | {"tok_emb.weight": torch.zeros(11, 8, dtype=torch.int64)}
    yield "one name twice", state | {"module.tok_emb.weight": torch.zeros(11, 8)}
    yield "a mask that is not causal", state | {"trf_blocks.0.att.mask": torch.zeros(4, 4)}
    yield "a mask of another size", state | {"trf_blocks.0.att.mask": torch.ones(5, 5).triu(1)}
    yield "another block", state | {"trf_blocks.1.norm1.scale": torch.zeros(8)}
    yield (
        "qkv of 25 rows",
        {n: t for n, t in state.items() if "W_" not in n} | {"trf_blocks.0.att.qkv.weight": torch.zeros(25, 8)},
    )
    yield "a classifier", state | {"out_head.weight": torch.zeros(2, 8), "out_head.bias": torch.zeros(2)}
    yield "no GPT", {"fc.weight": torch.zeros(3, 3)}
    yield "nothing", {}
    yield "a list", list(state.values())
    yield "a number", 3
    yield "a tensor", torch.zeros(3)
    yield "text for a tensor", state | {"final_norm.shift": "zeros"}
    yield "numbers for names", dict(enumerate(state.values()))
    yield "an empty name", state | {"": torch.zeros(1)}
    yield "sparse", state | {"tok_emb.weight": torch.zeros(11, 8).to_sparse()}
    yield "expanded", state | {"tok_emb.weight": torch.zeros(1).expand(11, 8)}
    wte = torch.zeros(11, 8)
    yield "hugging face with a far block", {"wte.weight": wte, "h.99999999999.ln_1.weight": torch.zeros(8)}
    yield "hugging face twice", {"wte.weight": wte, "transformer.wte.weight": wte}
    yield "hugging face's classifier", {"wte.weight": wte, "score.weight": torch.zeros(2, 8)}


@pytest.mark.parametrize(("name", "content"), list(wrong_contents()), ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_contents_leave_the_model_as_it_was(tmp_path, name, content):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    model = random_model(seed=4)
    with pytest.raises(WeightsError, match=r"model\.pth"):
        load_pth(path, model)
    assert equal(model, random_model(seed=4))


# Malicious files.

Sizes = tuple[int, ...]


class Runs:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def torch_zip(path: Path, data: bytes, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)


def malicious(marker: Path) -> Iterator[tuple[str, Any]]:
    state = without_masks(random_model().state_dict())
    touch = f"touch {marker}"
    yield "system", Runs(os.system, touch)
    yield "beside weights", state | {"zzz": Runs(os.system, touch)}
    yield "as the optimizer", {"model_state_dict": state, "optimizer_state_dict": Runs(os.system, touch)}
    yield "deep inside", {"model_state_dict": state, "x": [({"a": [Runs(os.system, touch)]},)]}
    yield "eval", Runs(eval, f"open({str(marker)!r}, 'w')")
    yield "open", Runs(open, str(marker), "w")
    yield "getattr", Runs(getattr, "x", "upper")
    yield "torch.load", Runs(torch.load, str(marker))
    yield "memory", Runs(bytearray, 1 << 40)
    yield "a whole model", random_model()
    yield "a module", nn.Linear(2, 2)
    yield "code in a name", {"__class__": Runs(exec, "pass")}


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_never_run(tmp_path, zipped):
    marker = tmp_path / "ran"
    for name, content in malicious(marker):
        path = tmp_path / "evil.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        model = random_model(seed=4)
        for load in (load_pth, load_weights_file):
            with pytest.raises(WeightsError, match=r"evil\.pth is refused: it asks for"):
                load(path, model)
            assert not marker.exists(), name
            assert equal(model, random_model(seed=4)), name


def hostile_pickles() -> Iterator[tuple[str, bytes]]:
    """Programs that ask for nothing but time, memory or confusion."""
    nested = b"\x80\x02)" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(60))
    yield "a key that takes for ever to hash", nested + b"q\x640}h\x64K\x01s."
    yield "in a list of pairs", nested.replace(b"\x80\x02", b"\x80\x02ccollections\nCounter\n(", 1) + b"tR."
    yield "a huge place in the memo", b"\x80\x02]r\xff\xff\xff\x7f."
    yield "a long text", b"\x80\x02X\xff\xff\xff\x7fabc."
    yield "a long number", b"\x80\x02\x8b\xff\xff\xff\x7f1."
    yield "a deep list", b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."
    yield "no end", b"\x80\x02}"
    yield "an empty stack", b"\x80\x02."
    yield "marks only", b"\x80\x02((((."
    yield "an unknown opcode", b"\x80\x02\xff."
    yield "an instance of a class", b"(S'echo'\nios\nsystem\n."
    yield "a newer protocol", pickle.dumps({"a": {1, 2}}, protocol=5)
    yield "an extension", b"\x80\x02\x82\x01."
    yield "not a pickle", b"weights"
    yield "empty", b""


@pytest.mark.parametrize(("name", "data"), list(hostile_pickles()), ids=lambda x: x if isinstance(x, str) else "")
def test_hostile_pickles_end_in_one_error(tmp_path, name, data):
    torch_zip(tmp_path / "evil.pth", data)
    with pytest.raises(WeightsError, match=r"evil\.pth"):
        read_weights(tmp_path / "evil.pth")


def lying_pickle(n_elements: int, size: Sizes, stride: Sizes, offset: int = 0, key: str = "0") -> bytes:
    """A dict with one tensor, in the opcodes of torch.save."""

    def number(n: int) -> bytes:
        raw = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    def text(word: str) -> bytes:
        return b"X" + struct.pack("<I", len(word)) + word.encode()

    pid = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(n_elements) + b"tQ"
    sizes = b"(" + b"".join(map(number, size)) + b"t" + b"(" + b"".join(map(number, stride)) + b"t"
    arguments = pid + number(offset) + sizes + b"\x89ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
    return b"\x80\x02}" + text("tok_emb.weight") + tensor + b"s."


@pytest.mark.parametrize(
    ("n_elements", "size", "stride", "offset", "key"),
    [
        (1 << 50, (1 << 50,), (1,), 0, "0"),
        (1 << 62, (1 << 62,), (1,), 0, "0"),
        (1 << 80, (1 << 80,), (1,), 0, "0"),
        (-4, (4,), (1,), 0, "0"),
        (4, (-4,), (1,), 0, "0"),
        (4, (4,), (1,), -1, "0"),
        (4, (4,), (1,), 1, "0"),
        (4, (5,), (1,), 0, "0"),
        (4, (2, 3), (3, 1), 0, "0"),
        (4, (1 << 20, 1 << 20), (0, 0), 0, "0"),
        (4, (4,), (1 << 40,), 0, "0"),
        (4, (4,), (1, 1), 0, "0"),
        (4, (1,) * 100, (1,) * 100, 0, "0"),
        (4, (4,), (1,), 0, "1"),
        (4, (4,), (1,), 0, "../version"),
        (5, (5,), (1,), 0, "0"),
    ],
)
def test_sizes_that_lie_are_found_before_memory_is_taken(tmp_path, n_elements, size, stride, offset, key):
    torch_zip(tmp_path / "lie.pth", lying_pickle(n_elements, size, stride, offset, key), **{"data/0": bytes(16)})
    with pytest.raises(WeightsError, match=r"lie\.pth"):
        read_weights(tmp_path / "lie.pth")


def test_the_lying_pickles_are_well_formed_otherwise(tmp_path):
    torch_zip(tmp_path / "true.pth", lying_pickle(4, (2, 2), (2, 1)), **{"data/0": struct.pack("<4f", 1, 2, 3, 4)})
    assert read_weights(tmp_path / "true.pth")["tok_emb.weight"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("trick", ["compressed", "twice", "two pickles", "no pickle", "a program", "empty"])
def test_unusual_zip_archives_are_refused(tmp_path, trick):
    torch.save(random_model().state_dict(), tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as good:
        members = [(member.filename, good.read(member)) for member in good.infolist()]
    changed = {
        "twice": [*members, members[-1]],
        "two pickles": [*members, ("other/data.pkl", members[0][1])],
        "no pickle": members[1:],
        "a program": [*members, ("good/constants.pkl", b"")],
        "empty": [],
    }.get(trick, members)
    kind = zipfile.ZIP_DEFLATED if trick == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "odd.pth", "w", kind) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for name, content in changed:
            archive.writestr(name, content)
    with pytest.raises(WeightsError, match=r"odd\.pth"):
        read_weights(tmp_path / "odd.pth")


# safetensors headers and the JSON of folders.


def safetensors_bytes(header: Any, data: bytes = bytes(352), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (11, 8), offsets: Any = (0, 352), **more: Any) -> dict[str, Any]:
    return {"tok_emb.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


def lying_headers() -> Iterator[bytes]:
    for dtype in ("F64", "F16", "I32x", "", None, 3, ["F32"], "F8_E4M3", "C64"):
        yield safetensors_bytes(entry(dtype=dtype))
    for shape in ((1 << 62, 1 << 62), (-11, -8), (11, 9), (11, 8.0), (True, 88), "11x8", None, (88, 1, 0), [[11, 8]]):
        yield safetensors_bytes(entry(shape=shape))
    for offsets in ((0, 353), (352, 0), (-352, 0), (1, 353), (0, 1 << 63), (0,), (0, 352, 0), None, "0", (0.0, 352.0)):
        yield safetensors_bytes(entry(offsets=offsets))
    yield safetensors_bytes(entry(more=1))
    yield safetensors_bytes(entry() | {"other": entry()["tok_emb.weight"]})
    yield safetensors_bytes(entry(shape=(11, 4), offsets=(0, 176)))
    yield safetensors_bytes(json.dumps(entry()).encode()[:-1] + b"," + json.dumps(entry()).encode()[1:])
    for header in ([], {}, 3, None, "x", {"tok_emb.weight": []}, entry() | {"__metadata__": 3}):
        yield safetensors_bytes(header)
    yield safetensors_bytes(entry() | {"__metadata__": {"fastgpt": "{}"}})
    yield safetensors_bytes(entry() | {"__metadata__": {"fastgpt": "3", "fastgpt_crc32": "6dd28e9b"}})
    yield safetensors_bytes(entry() | {"__metadata__": {"a": 1}})
    yield from map(safetensors_bytes, (b"", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000))
    yield from map(safetensors_bytes, (b"\xff\xfe", b"{}\x00\x00", b'{"a": 1e999}'))
    for length in (0, 1, 1 << 40, (1 << 64) - 1, 10_000, 99_999_999, 100_000_001):
        yield safetensors_bytes(entry(), length=length)
    for size in (0, 1, 7, 8, 9):
        yield safetensors_bytes(entry())[:size]
    yield safetensors_bytes(entry(), bytes(351))
    yield safetensors_bytes(entry(), bytes(353))


def test_headers_that_lie_end_in_one_error(tmp_path):
    path = tmp_path / "lie.safetensors"
    for number, content in enumerate(lying_headers()):
        path.write_bytes(content)
        model = random_model(seed=4)
        with pytest.raises(WeightsError, match=r"lie\.safetensors"):
            load_weights_file(path, model)
            pytest.fail(f"header {number} was accepted")
        assert equal(model, random_model(seed=4))


def test_garbage_beside_the_weights_of_a_folder_ends_in_one_error(tmp_path):
    save_huggingface(random_model(), tmp_path)
    good = (tmp_path / "config.json").read_bytes()
    twice = b'{"n_embd": 8, "n_embd": 8}'
    for text in (b"", b"{", b"[]", b"3", b"null", b"\xff", b"[" * 100_000, twice, b"{}", good[:-9]):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(WeightsError, match=r"config\.json|its configuration has"):
            load_huggingface(tmp_path)


@pytest.mark.parametrize(
    "places",
    [
        None,
        [],
        3,
        {"wte.weight": 3},
        {"wte.weight": "../model.safetensors"},
        {"wte.weight": "/etc/passwd"},
        {"wte.weight": ""},
        {"wte.weight": "."},
        {"wte.weight": ".."},
        {"wte.weight": "..\\model.safetensors"},
        {"wte.weight": "model.safetensors.index.json"},
        {"wte.weight": "missing.safetensors"},
        {"wte.weight": "part.safetensors"},
        {"wte.weight\x00": "part\x00.safetensors"},
        {},
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, places):
    save_huggingface(random_model(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), "utf-8")
    with pytest.raises(WeightsError, match="index.json"):
        read_weights(tmp_path)


# Mutations of good files.


def write_zip(path: Path) -> None:
    torch.save(random_model().state_dict(), path)


def write_legacy(path: Path) -> None:
    torch.save(random_model().state_dict(), path, _use_new_zipfile_serialization=False)


def write_ours(path: Path) -> None:
    save_weights(path, random_model(), {"config": CFG})


def write_plain(path: Path) -> None:
    save_file(without_masks(random_model().state_dict()), path)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, overwrite, insert, remove or exchange."""
    at, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 64))
    kind = rng.randrange(7)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + rng.choice((b"\xff", b"\x00", b"9")) * length + data[at + length :]
    if kind == 3:
        return data[:at] + rng.randbytes(length) + data[at:]
    if kind == 4:
        return data[:at] + data[at + length :]
    if kind == 5:
        other = rng.randrange(len(data))
        return data[:at] + data[other : other + length] + data[at + length :]
    return rng.randbytes(length) + data[length:]


# Formats with checksums give the saved values or an error. The other two cannot know of a changed number; they give an
# error or load what the file now says, completely.
@pytest.mark.parametrize(
    ("write", "checksums"), [(write_zip, True), (write_ours, True), (write_legacy, False), (write_plain, False)]
)
def test_mutated_files_end_in_one_error_or_load_completely(tmp_path, write, checksums):
    good = tmp_path / "good"
    write(good)
    data = good.read_bytes()
    # Half of the mutations go to where the structure is, most of the bytes being numbers.
    head = data[: 2500 if write is not write_zip else 3500]
    source, untouched = random_model(), random_model(seed=4)
    rng = random.Random(0)
    path = tmp_path / "mutated"
    errors = 0
    for _ in range(150):
        path.write_bytes(mutate(data, rng) if rng.random() < 0.5 else mutate(head, rng) + data[len(head) :])
        model = random_model(seed=4)
        try:
            load_weights_file(path, model)
        except WeightsError as error:
            errors += 1
            assert "mutated" in str(error)
            assert equal(model, untouched)
        else:
            assert not checksums or equal(model, source)
            assert not equal(model, untouched)
            assert torch.isfinite(logits(model)).all() or not checksums
    assert errors > 50


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_mutated_json_of_a_folder_ends_in_one_error_or_loads_completely(tmp_path, name):
    source = random_model()
    save_huggingface(source, tmp_path)
    places = dict.fromkeys(to_huggingface(dict(source.named_parameters()), tied=False), "part.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), "utf-8")
    good = (tmp_path / name).read_bytes()
    rng = random.Random(1)
    errors = 0
    for _ in range(100):
        (tmp_path / name).write_bytes(mutate(good, rng))
        try:
            model = load_huggingface(tmp_path)
        except WeightsError:
            errors += 1
        else:
            assert equal(model, source)
    assert errors > 30

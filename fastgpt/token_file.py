"""Token files: a text encoded once, kept on disk as 2 or 4 bytes a token, mapped into memory and read at random.

Layout, little-endian: a header of 64 bytes, then the tokens.

| bytes | what                                       | bytes | what                                       |
|-------|--------------------------------------------|-------|--------------------------------------------|
| 0-7   | "fgtokens"                                 | 24-31 | vocabulary size                            |
| 8-11  | version of this layout, 1                  | 32-35 | CRC-32 of the tokens                       |
| 12-15 | bytes a token: 2 (uint16) or 4 (uint32)    | 36-59 | name of the tokenizer, filled up with zeros |
| 16-23 | number of tokens                           | 60-63 | CRC-32 of bytes 0-59                       |
"""

from __future__ import annotations

import os
import re
import struct
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.tokenizer import encode_text

MAGIC = b"fgtokens"
VERSION = 1
HEADER_BYTES = 64
_FIELDS = struct.Struct("<8sIIQQI24s")

# Up to here the checksum is verified at every opening; reading this much takes well under a tenth of a second.
VERIFY_BYTES = 64 << 20

# One step of encoding: large enough for the tokenizer's full speed, small enough for a lively progress bar.
CHUNK_CHARACTERS = 1 << 18

# A space or line feed after a visible character always begins a new word for GPT-2's pattern, so cutting there leaves
# every token as it is.
_CUT = re.compile(r"(?<=\S)[ \n]")

Progress = Callable[[int, int], None]


class TokenFileError(ValueError):
    """A file is not a token file, or is damaged."""


class TokenFile:
    """A memory-mapped token file; behaves as a one-dimensional sequence of token ids.

    Opening costs no memory: pages are read when tokens are. It pickles as its path, so DataLoader workers share it.

    Args:
        path: a file that `TokenFile.write` made.
        verify: check the checksum of all tokens; None checks it in files up to 64 MB. The header and the length are
            always checked.

    Attributes:
        array: the tokens, read-only uint16 or uint32.
        vocab_size, tokenizer_name: of the tokenizer that made the file.

    Raises:
        FileNotFoundError: there is no such file.
        TokenFileError: it is not a token file, or truncated or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no token file {self.path}; TokenFile.write makes one from a text.")
        with self.path.open("rb") as file:
            header = _read_header(self.path, file.read(HEADER_BYTES))
        dtype, count, self.vocab_size, checksum, self.tokenizer_name = header
        wanted, got = HEADER_BYTES + count * dtype.itemsize, self.path.stat().st_size
        if got != wanted:
            state = "truncated" if got < wanted else "longer than its header says"
            raise TokenFileError(
                f"{self.path} is {state}: {got:,} bytes, wanted {wanted:,} for {count:,} tokens. {_REMEDY}"
            )
        self._map = np.memmap(self.path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))
        # A plain view: slicing np.memmap itself builds a subclass each time, several times slower.
        self.array = self._map.view(np.ndarray)
        if verify or (verify is None and self.array.nbytes <= VERIFY_BYTES):
            found = zlib.crc32(self.array.data)
            if found != checksum:
                raise TokenFileError(
                    f"{self.path} is damaged: CRC-32 of its tokens is {found:08x}, wanted {checksum:08x}. {_REMEDY}"
                )

    @classmethod
    def write(
        cls,
        path: str | os.PathLike[str],
        text: str | Iterable[str],
        tokenizer: Any,
        *,
        progress: Progress | None = None,
        chunk_characters: int = CHUNK_CHARACTERS,
    ) -> TokenFile:
        """Encode a text into a token file, and open it.

        The file appears whole or not at all: it is written beside its place and moved there at the end. A long text is
        encoded in pieces that are cut where GPT-2's pattern cuts anyway, so the tokens are those of one `encode`.

        Args:
            path: where; a file there is replaced.
            text: one text, or several documents, between which <|endoftext|> is put.
            tokenizer: from `get_tokenizer`; needs `n_vocab`, and `eot_token` for several documents.
            progress: called as progress(characters done, characters in all) after each piece; for an iterable that is
                not a list or tuple, "in all" is what has been seen so far.
            chunk_characters: length of a piece.

        Returns:
            The open file.

        Raises:
            ValueError: there are no tokens, or an id is outside the vocabulary.
        """
        path = Path(path)
        pieces = _pieces(text, progress, chunk_characters)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            with unfinished.open("xb") as file:
                file.write(bytes(HEADER_BYTES))
                header = _write_tokens(file, pieces, tokenizer)
                file.seek(0)
                file.write(header)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        return cls(path, verify=False)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int | slice) -> torch.Tensor:
        """Tokens as int64, copied out of the file."""
        return torch.from_numpy(np.asarray(self.array[index], dtype=np.int64))

    def __repr__(self) -> str:
        return f"TokenFile({str(self.path)!r}: {len(self):,} tokens of {self.tokenizer_name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path.absolute(),)


class RandomBatches:
    """Endless random training batches from a long run of tokens.

    Batch number n depends on (seed, n) alone, through the counter-based generator Philox: saving the state is saving
    two numbers, and a resumed run draws exactly the batches that the interrupted one would have drawn.

    Args:
        tokens: a `TokenFile`, or a one-dimensional tensor or array of ids.
        batch_size: rows a batch.
        context_length: tokens a row.
        seed: one seed, one sequence of batches; give each process of a distributed run its own.
        start, stop: the part of `tokens` to draw from, as in a slice; windows stay inside.

    Raises:
        ValueError: a size is below 1, or that part is too short for one row and its last target.
    """

    def __init__(
        self,
        tokens: TokenFile | torch.Tensor | np.ndarray,
        batch_size: int,
        context_length: int,
        *,
        seed: int = 0,
        start: int | None = None,
        stop: int | None = None,
    ) -> None:
        if batch_size < 1 or context_length < 1:
            raise ValueError(f"batch_size and context_length must be at least 1; got {batch_size}, {context_length}.")
        array = tokens.array if isinstance(tokens, TokenFile) else np.asarray(tokens)
        if array.ndim != 1:
            raise ValueError(f"tokens must be one run of ids, shape (n_tokens,); got shape {array.shape}.")
        self._tokens = array[start:stop]
        if len(self._tokens) <= context_length:
            raise ValueError(
                f"Too few tokens for one training row: got {len(self._tokens):,}, wanted at least context_length + 1 = "
                f"{context_length + 1:,}. Use a longer text or a smaller context_length."
            )
        self.batch_size, self.context_length = batch_size, context_length
        self.seed, self.drawn = seed, 0

    def __iter__(self) -> RandomBatches:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch: input_ids and target_ids, each (batch_size, context_length) int64, targets shifted by 1."""
        length = self.context_length
        inputs = np.empty((self.batch_size, length), dtype=np.int64)
        targets = np.empty_like(inputs)
        for row, start in enumerate(self._starts()):
            inputs[row] = self._tokens[start : start + length]
            targets[row] = self._tokens[start + 1 : start + length + 1]
        self.drawn += 1
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on: the seed and the number of batches drawn."""
        return {"seed": self.seed, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batch at which `state_dict` was taken."""
        self.seed, self.drawn = int(state["seed"]), int(state["drawn"])

    def _starts(self) -> list[int]:
        # Raw Philox output never changes between NumPy versions, as Generator methods may. The modulo favours small
        # starts by less than n_starts / 2**64.
        philox = np.random.Philox(key=self.seed, counter=[0, 0, self.drawn, 0])
        n_starts = len(self._tokens) - self.context_length
        starts: list[int] = (philox.random_raw(self.batch_size) % np.uint64(n_starts)).tolist()
        return starts


_REMEDY = "Delete it and encode the text again."


def _reopen(path: Path) -> TokenFile:
    return TokenFile(path, verify=False)


def _pieces(text: str | Iterable[str], progress: Progress | None, chunk_characters: int) -> Iterator[tuple[str, bool]]:
    """(piece, whether <|endoftext|> goes before it); reports a piece as done when the next one is asked for."""
    documents = [text] if isinstance(text, str) else text
    total = sum(map(len, documents)) if isinstance(documents, (list, tuple)) else 0
    done = 0
    for number, document in enumerate(documents):
        for begin, end in _cuts(document, chunk_characters):
            yield document[begin:end], number > 0 and begin == 0
            done += end - begin
            if progress is not None:
                progress(done, max(done, total))


def _cuts(text: str, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of pieces of at least `size` characters, the last one excepted; one piece for an empty text."""
    begin = 0
    while (cut := _CUT.search(text, begin + size)) is not None:
        yield begin, cut.start()
        begin = cut.start()
    yield begin, len(text)


def _write_tokens(file: Any, pieces: Iterable[tuple[str, bool]], tokenizer: Any) -> bytes:
    """Write the tokens of all pieces; return the header that belongs to them."""
    n_vocab = int(tokenizer.n_vocab)
    dtype = np.dtype("<u2") if n_vocab <= 1 << 16 else np.dtype("<u4")
    count = checksum = 0
    for piece, begins_document in pieces:
        ids = encode_text(tokenizer, piece)
        tokens = np.array([tokenizer.eot_token, *ids] if begins_document else ids, dtype=np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < n_vocab:
            raise ValueError(
                f"The tokenizer gave ids from {tokens.min()} to {tokens.max()}, outside its vocabulary of {n_vocab:,}."
            )
        data = tokens.astype(dtype).tobytes()
        file.write(data)
        checksum = zlib.crc32(data, checksum)
        count += len(tokens)
    if count == 0:
        raise ValueError("There is nothing to write: the text has no tokens. Is the file empty?")
    name = str(getattr(tokenizer, "name", type(tokenizer).__name__)).encode()[:24]
    header = _FIELDS.pack(MAGIC, VERSION, dtype.itemsize, count, n_vocab, checksum, name)
    return header + struct.pack("<I", zlib.crc32(header))


def _read_header(path: Path, header: bytes) -> tuple[np.dtype, int, int, int, str]:
    if header[: len(MAGIC)] != MAGIC:
        raise TokenFileError(f"{path} is not a token file: it begins with {header[:8]!r}, wanted {MAGIC!r}.")
    if len(header) < HEADER_BYTES:
        raise TokenFileError(
            f"{path} is truncated: {len(header)} bytes, fewer than its header of {HEADER_BYTES}. {_REMEDY}"
        )
    (checksum,) = struct.unpack_from("<I", header, HEADER_BYTES - 4)
    if zlib.crc32(header[:-4]) != checksum:
        raise TokenFileError(f"{path} is damaged: its header does not match its own checksum. {_REMEDY}")
    _, version, itemsize, count, n_vocab, data_checksum, name = _FIELDS.unpack_from(header)
    if version != VERSION or itemsize not in (2, 4):
        raise TokenFileError(
            f"{path} has layout version {version} with {itemsize} bytes a token; this fastgpt reads version {VERSION} "
            f"with 2 or 4. {_REMEDY}"
        )
    return np.dtype(f"<u{itemsize}"), count, n_vocab, data_checksum, name.rstrip(b"\0").decode("utf-8", "replace")

"""Reads TensorFlow checkpoints (tensor bundles, format V2) without TensorFlow.

A bundle with the prefix `model.ckpt` is two kinds of files:

    model.ckpt.index                  a sorted table: "" -> BundleHeaderProto, then tensor name -> BundleEntryProto
    model.ckpt.data-00000-of-00001    the tensors' bytes, one after the other

The table is LevelDB's. Its last 48 bytes, the footer, hold two block handles (offset and size, as varints; the second
one is that of the index block), padding, and a magic number. A block is a run of entries

    shared: varint | unshared: varint | value size: varint | unshared bytes of the key | value

(`shared` bytes of the key are those of the key before), then restart offsets that we do not need, their number, and a
trailer: one byte for the compression and a masked CRC-32C. The values of the index block are handles of data blocks.

Nothing is trusted: each length is compared with what is there before a byte is read or memory is taken.

Source: the table format of LevelDB (table_format.md) and TensorFlow's tensor_bundle.proto.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgpt.weights.crc32c import crc32c, mask
from fastgpt.weights.errors import WeightsError

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5
_MAX_INDEX_BYTES = 256 << 20
_SUPPORTED_VERSION = 1

_UNCOMPRESSED, _SNAPPY = 0, 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# TensorFlow's DataType numbers of the dtypes that lie in the file as plain numbers.
_DTYPES = {
    1: "<f4",
    2: "<f8",
    3: "<i4",
    4: "u1",
    5: "<i2",
    6: "i1",
    9: "<i8",
    10: "?",
    17: "<u2",
    19: "<f2",
    22: "<u4",
    23: "<u8",
}
_BFLOAT16 = 14


class BundleError(WeightsError):
    """A file is not a readable tensor bundle: damaged, truncated, or of a kind that is not supported."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        dtype: TensorFlow's number of the dtype.
        shape: its sizes.
        shard, offset, size: the data file, and its bytes there.
        checksum: masked CRC-32C of these bytes.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int


class TensorBundle:
    """A checkpoint's tensors by name. Opening reads the index and compares it with the sizes of the data files.

    Args:
        prefix: the path without `.index`, such as "gpt2/124M/model.ckpt".

    Attributes:
        entries: name -> `Entry`, sorted by name.

    Raises:
        FileNotFoundError: a file of the bundle is missing.
        BundleError: a file is damaged, truncated or not supported.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = Path(prefix)
        index = self.prefix.with_name(self.prefix.name + ".index")
        if not index.is_file():
            raise FileNotFoundError(
                f"There is no {index}. The prefix of a checkpoint is the path of its index file without '.index'."
            )
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise BundleError(
                f"{index} is {index.stat().st_size:,} bytes; the index of a checkpoint is never that long."
            )
        try:
            table = _read_table(index.read_bytes())
            self._n_shards = _parse_header(table.pop(b"", None))
            self.entries = {_name(key): _parse_entry(value, self._n_shards) for key, value in table.items()}
        except BundleError as error:
            raise BundleError(f"{index} is not a usable checkpoint index: {error} Download it again.") from None
        self._check_data_files()

    def __repr__(self) -> str:
        return f"TensorBundle({str(self.prefix)!r}: {len(self.entries)} tensors)"

    def read(self, name: str, *, verify: bool = True) -> np.ndarray:
        """Read one tensor.

        Args:
            name: one of `entries`.
            verify: compare its checksum.

        Returns:
            A new array of the stored shape and dtype; bfloat16 becomes float32.

        Raises:
            KeyError: there is no such tensor.
            BundleError: its bytes are damaged, or it does not hold numbers.
        """
        entry = self.entries[name]
        path = self._data_file(entry.shard)
        if entry.dtype not in _DTYPES and entry.dtype != _BFLOAT16:
            raise BundleError(
                f"{name!r} in {self.prefix} has TensorFlow's dtype {entry.dtype}, which holds no plain numbers."
            )
        raw = np.fromfile(path, dtype=np.uint8, count=entry.size, offset=entry.offset)
        if len(raw) != entry.size:
            raise BundleError(f"{path} became shorter while it was read.")
        if verify and mask(crc32c(raw)) != entry.checksum:
            raise BundleError(f"{path} is damaged: {name!r} does not match its checksum. Download it again.")
        if entry.dtype == _BFLOAT16:
            return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(entry.shape)
        array = raw.view(_DTYPES[entry.dtype])
        return array.astype(array.dtype.newbyteorder("="), copy=False).reshape(entry.shape)

    def _data_file(self, shard: int) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.data-{shard:05d}-of-{self._n_shards:05d}")

    def _check_data_files(self) -> None:
        needed: dict[int, int] = {}
        for entry in self.entries.values():
            needed[entry.shard] = max(needed.get(entry.shard, 0), entry.offset + entry.size)
        for shard, wanted in needed.items():
            path = self._data_file(shard)
            if not path.is_file():
                raise FileNotFoundError(f"There is no {path}, which the checkpoint's index names. Download it again.")
            got = path.stat().st_size
            if got < wanted:
                raise BundleError(f"{path} is truncated: {got:,} bytes, wanted {wanted:,}. Download it again.")


def _read_table(data: bytes) -> dict[bytes, bytes]:
    if len(data) < _FOOTER_BYTES:
        raise BundleError(f"it has {len(data)} bytes, fewer than its footer of {_FOOTER_BYTES}.")
    footer = data[-_FOOTER_BYTES:]
    (magic,) = struct.unpack_from("<Q", footer, 40)
    if magic != _MAGIC:
        raise BundleError("its last 8 bytes are not those of a table (truncated?).")
    position = 0
    handle = []
    for _ in range(4):
        number, position = _varint(footer, position, 40)
        handle.append(number)
    table: dict[bytes, bytes] = {}
    for _, value in _block_entries(_block(data, handle[2], handle[3])):
        offset, position = _varint(value, 0, len(value))
        size, _ = _varint(value, position, len(value))
        for key, entry in _block_entries(_block(data, offset, size)):
            if key in table:
                raise BundleError(f"the key {key!r} stands there twice.")
            table[key] = entry
    return table


def _block(data: bytes, offset: int, size: int) -> bytes:
    end = offset + size
    if end + _TRAILER_BYTES > len(data) - _FOOTER_BYTES:
        raise BundleError(f"a block reaches to byte {end + _TRAILER_BYTES:,}, past the end.")
    (stored,) = struct.unpack_from("<I", data, end + 1)
    if mask(crc32c(data[offset : end + 1])) != stored:
        raise BundleError(f"the block at byte {offset:,} does not match its checksum.")
    if data[end] == _SNAPPY:
        raise BundleError(
            "its blocks are compressed with Snappy, which TensorFlow's own checkpoints are not; "
            "write it again without compression."
        )
    if data[end] != _UNCOMPRESSED:
        raise BundleError(f"the block at byte {offset:,} is compressed in the unknown way {data[end]}.")
    return data[offset:end]


def _block_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(block) < 4:
        raise BundleError("a block is too short for the number of its restarts.")
    (n_restarts,) = struct.unpack_from("<I", block, len(block) - 4)
    end = len(block) - 4 - 4 * n_restarts
    if end < 0:
        raise BundleError(f"a block of {len(block)} bytes claims {n_restarts} restarts.")
    key, position = b"", 0
    while position < end:
        shared, position = _varint(block, position, end)
        unshared, position = _varint(block, position, end)
        size, position = _varint(block, position, end)
        if shared > len(key) or unshared + size > end - position:
            raise BundleError("an entry reaches past its block.")
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + size]
        position += size


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """The unsigned 64-bit number at `position` (7 bits a byte, low ones first) and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFFFFFFFFFFFFFF, position
    raise BundleError("a number is cut off or has more than 64 bits.")


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: bytes for length-delimited fields, else the unsigned number."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position, end)
        kind = tag & 7
        if kind == _VARINT:
            number, position = _varint(message, position, end)
            yield tag >> 3, number
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(kind)
        if kind == _BYTES:
            size, position = _varint(message, position, end)
        if size is None or size > end - position:
            raise BundleError("an entry is not a valid protobuf message.")
        value = message[position : position + size]
        position += size
        yield tag >> 3, value if kind == _BYTES else int.from_bytes(value, "little")


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise BundleError("an entry has text where a number belongs.")
    return value - (1 << 64) if value >> 63 else value


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise BundleError("an entry has a number where a message belongs.")
    return value


def _name(key: bytes) -> str:
    try:
        return key.decode("utf-8")
    except UnicodeDecodeError:
        raise BundleError(f"the name {key!r} is not UTF-8.") from None


def _parse_header(message: bytes | None) -> int:
    """The number of data files."""
    if message is None:
        raise BundleError("it has no header entry.")
    n_shards = endianness = min_consumer = 0
    for field, value in _fields(message):
        if field == 1:
            n_shards = _number(value)
        elif field == 2:
            endianness = _number(value)
        elif field == 3:
            min_consumer = next((_number(v) for f, v in _fields(_message(value)) if f == 2), 0)
    if endianness != 0:
        raise BundleError("it was written on a big-endian machine, which is not supported.")
    if min_consumer > _SUPPORTED_VERSION:
        raise BundleError(f"it wants a reader of version {min_consumer}; this one is {_SUPPORTED_VERSION}.")
    if not 1 <= n_shards < 100_000:
        raise BundleError(f"it claims {n_shards} data files.")
    return n_shards


def _parse_entry(message: bytes, n_shards: int) -> Entry:
    numbers = dict.fromkeys((1, 3, 4, 5, 6), 0)
    shape: tuple[int, ...] = ()
    for field, value in _fields(message):
        if field in numbers:
            numbers[field] = _number(value)
        elif field == 2:
            shape = _parse_shape(_message(value))
        elif field == 7:
            raise BundleError("a tensor is stored in slices, which is not supported.")
    entry = Entry(numbers[1], shape, numbers[3], numbers[4], numbers[5], numbers[6])
    if not 0 <= entry.shard < n_shards or entry.offset < 0 or entry.size < 0:
        raise BundleError(f"a tensor lies at an impossible place: {entry}.")
    itemsize = 2 if entry.dtype == _BFLOAT16 else np.dtype(_DTYPES.get(entry.dtype, "V0")).itemsize
    if itemsize and entry.size != math.prod(shape) * itemsize:
        raise BundleError(f"a tensor of shape {shape} and {itemsize} bytes an element claims {entry.size:,} bytes.")
    return entry


def _parse_shape(message: bytes) -> tuple[int, ...]:
    sizes = []
    for field, value in _fields(message):
        if field == 2:
            sizes.append(next((_number(v) for f, v in _fields(_message(value)) if f == 1), 0))
        elif field == 3 and _number(value):
            raise BundleError("a tensor has no known shape.")
    if any(size < 0 for size in sizes) or len(sizes) > 32:
        raise BundleError(f"a tensor has the impossible shape {tuple(sizes)}.")
    return tuple(sizes)

"""Writes tensor bundles from the description of their format, sharing no code with the reader that it tests."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def slow_crc32c(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def slow_mask(crc: int) -> int:
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def varint(number: int) -> bytes:
    out = bytearray()
    number &= (1 << 64) - 1
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def block(entries: list[tuple[bytes, bytes]], restart_interval: int = 4) -> bytes:
    out, restarts, previous = b"", [0], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % restart_interval:
            while shared < min(len(key), len(previous)) and key[shared] == previous[shared]:
                shared += 1
        elif i:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    return out + b"".join(struct.pack("<I", r) for r in [*restarts, len(restarts)])


def table(entries: list[tuple[bytes, bytes]], per_block: int = 5, compression: int = 0) -> bytes:
    out, index = b"", []

    def add(content: bytes) -> bytes:
        nonlocal out
        handle = varint(len(out)) + varint(len(content))
        content += bytes([compression])
        out += content + struct.pack("<I", slow_mask(slow_crc32c(content)))
        return handle

    for i in range(0, len(entries), per_block):
        part = entries[i : i + per_block]
        index.append((part[-1][0], add(block(part))))
    meta = add(block([]))
    footer = meta + add(block(index))
    return out + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


DTYPES = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int64": 9, "bool": 10, "float16": 19}


def header_proto(n_shards: int = 1, endianness: int = 0, min_consumer: int = 0) -> bytes:
    version = field(1, 1) + (field(2, min_consumer) if min_consumer else b"")
    return field(1, n_shards) + (field(2, endianness) if endianness else b"") + field(3, version)


def entry_proto(array: np.ndarray, offset: int, shard: int = 0) -> bytes:
    data = array.tobytes()
    shape = b"".join(field(2, field(1, size)) for size in array.shape)
    out = field(1, DTYPES[array.dtype.name]) + field(2, shape)
    out += field(3, shard) if shard else b""
    out += field(4, offset) if offset else b""
    checksum = slow_mask(slow_crc32c(data))
    return out + field(5, len(data)) + varint(6 << 3 | 5) + struct.pack("<I", checksum)


def write_bundle(prefix: Path, arrays: dict[str, np.ndarray], n_shards: int = 1, **options) -> None:
    entries, data = [(b"", header_proto(n_shards))], [bytearray() for _ in range(n_shards)]
    for i, name in enumerate(sorted(arrays)):
        shard = i % n_shards
        entries.append((name.encode(), entry_proto(arrays[name], len(data[shard]), shard)))
        data[shard] += arrays[name].tobytes()
    Path(f"{prefix}.index").write_bytes(table(entries, **options))
    for shard, content in enumerate(data):
        Path(f"{prefix}.data-{shard:05d}-of-{n_shards:05d}").write_bytes(content)

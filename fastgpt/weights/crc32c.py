"""CRC-32C, the checksum inside TensorFlow's files, in NumPy.

Byte after byte is slow in Python, so a long input is cut into lanes of equal length that advance side by side, two
bytes a step. CRC is linear over bits: the registers of two neighbours become that of both with

    register(left + right) = register(left + zeros) ^ register(right)

where "+ zeros" is one 32 × 32 bit matrix for a given number of bytes.

Source: RFC 3720, appendix B.4 (polynomial 0x1EDC6F41, here with its bits reversed); the masked form is that of
LevelDB's table format.
"""

from __future__ import annotations

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78
_ALL_ONES = 0xFFFFFFFF
_MASK_DELTA = 0xA282EAD8

# A lane shorter than this costs more in merging than it gains; more lanes than this no longer fit the cache.
_BYTES_PER_LANE = 512
_MAX_LANES = 1 << 15


def crc32c(data: bytes | bytearray | memoryview | np.ndarray) -> int:
    """CRC-32C of the bytes of `data` (a contiguous buffer), from 0 to 2**32 - 1."""
    octets = np.frombuffer(data, dtype=np.uint8)
    register = _ALL_ONES
    lanes = min(_MAX_LANES, 1 << max(0, (len(octets) // _BYTES_PER_LANE).bit_length() - 1))
    done = 0
    if lanes > 1:
        length = len(octets) // lanes & ~1
        done = lanes * length
        register = _in_lanes(octets[:done].view("<u2").reshape(lanes, length // 2), register)
    table = _byte_table().tolist()
    for octet in octets[done:].tolist():
        register = table[(register ^ octet) & 0xFF] ^ (register >> 8)
    return register ^ _ALL_ONES


def mask(crc: int) -> int:
    """The form in which a checksum is stored beside its own data: rotated by 15 bits, plus a constant."""
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & _ALL_ONES


def _in_lanes(words: np.ndarray, register: int) -> int:
    """The register after all words, (lanes, words a lane), row after row; lanes is a power of two."""
    table = _word_table()
    registers = np.zeros(len(words), dtype=np.uint32)
    registers[0] = register
    for column in words.T:
        registers = table[(registers ^ column) & 0xFFFF] ^ (registers >> np.uint32(16))
    skip = _zeros_matrix(2 * words.shape[1])
    while len(registers) > 1:
        registers = _times(skip, registers[0::2]) ^ registers[1::2]
        skip = _times(skip, skip)
    return int(registers[0])


@functools.cache
def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ (table & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    return table


@functools.cache
def _word_table() -> np.ndarray:
    table = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(2):
        table = _byte_table()[table & np.uint32(0xFF)] ^ (table >> np.uint32(8))
    return table


def _zeros_matrix(n_bytes: int) -> np.ndarray:
    """What `n_bytes` zero bytes do to a register: (32,) uint32, the image of each bit."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    power = _byte_table()[bits & np.uint32(0xFF)] ^ (bits >> np.uint32(8))
    result = bits
    while n_bytes:
        if n_bytes & 1:
            result = _times(power, result)
        power = _times(power, power)
        n_bytes >>= 1
    return result


def _times(matrix: np.ndarray, registers: np.ndarray) -> np.ndarray:
    out = np.zeros_like(registers)
    for bit in range(32):
        out ^= (registers >> np.uint32(bit) & np.uint32(1)) * matrix[bit]
    return out

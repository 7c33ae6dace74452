"""The reader of TensorFlow's tensor bundles against a writer of its own, and against damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_writer import DTYPES, entry_proto, field, header_proto, slow_crc32c, slow_mask, table, write_bundle

from fastgpt.weights import BundleError, TensorBundle
from fastgpt.weights.crc32c import crc32c, mask

# -------------------------------------------------------------------------------------------------------- checksum


def test_crc32c_of_known_texts():
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


@pytest.mark.parametrize("size", [1, 2, 511, 1023, 1024, 1025, 4096, 5001, 70_001])
def test_crc32c_in_lanes_equals_the_one_bit_at_a_time(size: int):
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == slow_crc32c(data)
    assert mask(crc32c(data)) == slow_mask(slow_crc32c(data))


# ---------------------------------------------------------------------------------------------------------- bundle


@pytest.mark.parametrize("per_block", [1, 3, 100])
@pytest.mark.parametrize("n_shards", [1, 3])
def test_a_bundle_gives_back_what_was_written(per_block: int, n_shards: int, tmp_path: Path):
    rng = np.random.default_rng(0)
    arrays = {
        f"a/{name}/{i}": (rng.standard_normal(shape) * 100).astype(name)
        for i, shape in enumerate([(), (0, 3), (7,), (2, 3, 4), (1, 600)])
        for name in DTYPES
    }
    write_bundle(tmp_path / "b.ckpt", arrays, n_shards, per_block=per_block)
    bundle = TensorBundle(tmp_path / "b.ckpt")
    assert list(bundle.entries) == sorted(arrays)
    for name, want in arrays.items():
        got = bundle.read(name)
        assert got.dtype == want.dtype and got.shape == want.shape and np.array_equal(got, want)
        assert got.flags.writeable


def test_bfloat16_becomes_float32(tmp_path: Path):
    values = torch.tensor([1.5, -2.0, 3.140625, float("inf")])
    raw = values.bfloat16().view(torch.int16).numpy()
    proto = entry_proto(raw.view(np.uint8), 0)
    proto = proto.replace(field(1, 4), field(1, 14), 1).replace(
        field(2, field(2, field(1, 8))), field(2, field(2, field(1, 4)))
    )
    (tmp_path / "b.index").write_bytes(table([(b"", header_proto()), (b"x", proto)]))
    (tmp_path / "b.data-00000-of-00001").write_bytes(raw.tobytes())
    assert TensorBundle(tmp_path / "b").read("x").tolist() == values.tolist()


def index_of(*entries: tuple[bytes, bytes], **options) -> bytes:
    return table(list(entries), **options)


ONE = np.ones(3, dtype=np.float32)
HEADER = (b"", header_proto())


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (b"", "it has 0 bytes, fewer than its footer"),
        (b"x" * 100, "its last 8 bytes are not those of a table"),
        (index_of(HEADER, compression=1), "compressed with Snappy"),
        (index_of(HEADER, compression=7), "compressed in the unknown way 7"),
        (index_of((b"a", entry_proto(ONE, 0))), "it has no header entry"),
        (index_of((b"", header_proto(endianness=1))), "big-endian"),
        (index_of((b"", header_proto(min_consumer=9))), "wants a reader of version 9; this one is 1"),
        (index_of((b"", header_proto(n_shards=0))), "claims 0 data files"),
        (index_of(HEADER, (b"a", entry_proto(ONE, 0, shard=1))), "impossible place"),
        (index_of(HEADER, (b"a", entry_proto(ONE, -4))), "impossible place"),
        (index_of(HEADER, (b"a", entry_proto(ONE, 0)), (b"a", entry_proto(ONE, 0))), "stands there twice"),
        (index_of(HEADER, (b"a", entry_proto(ONE, 0) + field(7, b""))), "stored in slices"),
        (index_of(HEADER, (b"a", entry_proto(ONE, 0) + field(5, 8))), r"shape \(3,\) and 4 bytes an element claims 8"),
        (index_of(HEADER, (b"a", entry_proto(ONE, 0) + field(2, field(2, field(1, -3))))), "impossible shape"),
        (index_of(HEADER, (b"a", entry_proto(ONE, 0) + field(2, field(3, 1)))), "no known shape"),
        (index_of(HEADER, (b"a", entry_proto(ONE, 0) + field(1, b"x"))), "text where a number belongs"),
        (index_of(HEADER, (b"a", entry_proto(ONE, 0) + field(2, 3))), "number where a message belongs"),
        (index_of(HEADER, (b"a", entry_proto(ONE, 0)[:-1])), "not a valid protobuf message"),
        (index_of(HEADER, (b"a", entry_proto(ONE, 0) + b"\xff" * 11)), "has more than 64 bits"),
        (index_of(HEADER, (b"\xff", entry_proto(ONE, 0))), "is not UTF-8"),
    ],
)
def test_an_index_that_cannot_be_used_says_why(index: bytes, error: str, tmp_path: Path):
    (tmp_path / "b.index").write_bytes(index)
    (tmp_path / "b.data-00000-of-00001").write_bytes(ONE.tobytes())
    with pytest.raises(BundleError, match=f"b.index is not a usable checkpoint index: .*{error}"):
        TensorBundle(tmp_path / "b")


def test_a_huge_claimed_tensor_takes_no_memory(tmp_path: Path):
    proto = field(1, 1) + field(2, field(2, field(1, 1 << 40))) + field(5, 1 << 42)
    (tmp_path / "b.index").write_bytes(table([HEADER, (b"a", proto)]))
    (tmp_path / "b.data-00000-of-00001").write_bytes(ONE.tobytes())
    with pytest.raises(BundleError, match="is truncated: 12 bytes, wanted 4,398,046,511,104"):
        TensorBundle(tmp_path / "b")


def test_a_tensor_of_text_is_listed_but_not_read(tmp_path: Path):
    (tmp_path / "b.index").write_bytes(table([HEADER, (b"a", field(1, 7) + field(2, b"") + field(5, 3))]))
    (tmp_path / "b.data-00000-of-00001").write_bytes(b"abc")
    with pytest.raises(BundleError, match="'a' .* has TensorFlow's dtype 7"):
        TensorBundle(tmp_path / "b").read("a")


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="There is no .*b.index"):
        TensorBundle(tmp_path / "b")
    write_bundle(tmp_path / "b", {"a": ONE})
    (tmp_path / "b.data-00000-of-00001").unlink()
    with pytest.raises(FileNotFoundError, match="There is no .*b.data-00000-of-00001"):
        TensorBundle(tmp_path / "b")

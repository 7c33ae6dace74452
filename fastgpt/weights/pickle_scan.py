"""Reads what a PyTorch checkpoint claims to hold, before anything is allocated and without running any of it.

A `.pth` file is a pickle: a program for a small stack machine. `torch.load(weights_only=True)` runs that program with a
short list of functions. Here it runs first with none at all: every function is a stand-in that writes down what it was
asked for, so that names, dtypes and sizes can be compared with the file, and a program that asks for anything else is
refused by the name of what it asks for.

Source: PEP 3154 and Lib/pickletools.py for the opcodes; PyTorch's notes on serialization semantics for the rest.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar

import torch

# What a stand-in program can raise on a damaged pickle.
PICKLE_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

# The opcodes that PyTorch's own reader of weights knows.
_OPCODES = (
    *(pickle.APPEND, pickle.APPENDS, pickle.BINFLOAT, pickle.BINGET, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.BINPERSID, pickle.BINPUT, pickle.BINUNICODE, pickle.BUILD, pickle.EMPTY_DICT, pickle.EMPTY_LIST),
    *(pickle.EMPTY_TUPLE, pickle.GLOBAL, pickle.LONG1, pickle.LONG_BINGET, pickle.LONG_BINPUT, pickle.MARK),
    *(pickle.NEWFALSE, pickle.NEWTRUE, pickle.NONE, pickle.PROTO, pickle.REDUCE, pickle.STOP),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.SETITEM, pickle.SETITEMS),
)


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file.

    Attributes:
        key: its name there.
        dtype: of each number.
        n_bytes: its claimed size.
    """

    key: str
    dtype: torch.dtype
    n_bytes: int


@dataclass
class Scan:
    """What a pickle asks for.

    Attributes:
        content: the object, with None in the place of each tensor.
        storages: by key.
    """

    content: Any = None
    storages: dict[str, Storage] = field(default_factory=dict)


def scan(file: BinaryIO) -> Scan:
    """Run the pickle at the file's position with stand-ins; leaves the position behind it.

    Raises:
        pickle.UnpicklingError or another of PICKLE_ERRORS: it is damaged, or asks for what weights do not need.
    """
    unpickler = _Unpickler(file)
    try:
        content = unpickler.load()
    except KeyError as error:
        raise pickle.UnpicklingError(f"it has an instruction or a place that weights do not have: {error}") from None
    return Scan(content, unpickler.storages)


class _Mapping(dict[Any, Any]):
    """Stands for OrderedDict and its kin, whose state and arguments are of no interest."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass


def _whole(*numbers: Any) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in numbers)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> None:
    if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise pickle.UnpicklingError("it builds a tensor from something else than numbers in the file")
    if not _whole(offset, *size, *stride) or len(size) != len(stride) or len(size) > 64:
        raise pickle.UnpicklingError("a tensor has an impossible shape")
    n_elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if n_elements else 0
    # A tensor that reads one number many times would become large only when it is copied.
    if n_elements and max(last + 1, n_elements) * storage.dtype.itemsize > storage.n_bytes:
        raise pickle.UnpicklingError(f"a tensor of shape {size} claims more than its {storage.n_bytes:,} bytes")


def _nothing(*_: Any) -> None:
    pass


_STAND_INS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Mapping,
    ("collections", "defaultdict"): _Mapping,
    ("collections", "Counter"): _Mapping,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _nothing,
    ("torch", "Size"): _nothing,
    ("torch", "device"): _nothing,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{("torch", str(dtype).removeprefix("torch.")): None for dtype in _DTYPES.values()},
}


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler, whose memory grows with what it has read, not with what a file claims."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}"[:200]) from None

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, n_elements, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or any(view):
            raise pickle.UnpicklingError("it names a storage of an unknown kind")
        if not _whole(n_elements):
            raise pickle.UnpicklingError("a storage has an impossible size")
        storage = Storage(key, dtype, n_elements * dtype.itemsize)
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError(f"the storage {key!r} has two sizes")
        return storage

    def _set_items(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        self._put(items[::2], items[1::2])

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self._put([key], [value])

    def _put(self, keys: list[Any], values: list[Any]) -> None:
        target = self.stack[-1]  # type: ignore[attr-defined]
        # Hashing nested tuples can take for ever, so only plain keys are hashed.
        if type(target) not in (dict, _Mapping) or not all(isinstance(key, str | int) for key in keys):
            raise pickle.UnpicklingError("it fills something else than a dict with plain keys")
        target.update(zip(keys, values, strict=True))

    dispatch: ClassVar[dict[int, Callable[..., Any]]] = {
        **{opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _OPCODES},
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
    }

"""What training does with memory: big blocks kept from one step to the next, activations kept in half of it.

glibc gives every block above 32 MB back to the system when it is freed, and the system hands out the next one page by
page, each cleared at its first touch: a page fault for every 4 kB of every big tensor of every step. Inside
`kept_memory()` such blocks come from the heap, stay there when they are freed, and lie in huge pages (2 MB) where the
system offers them (transparent_hugepage "madvise" or "always").

Where glibc is not the allocator (macOS, musl, Windows), or the user has tuned it by environment, nothing happens.

Source: mallopt(3), malloc_trim(3), madvise(2).
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from fastgpt import env

# mallopt's numbers, and what its own adaptation comes to in a process that has freed big blocks. (Any call of mallopt
# ends that adaptation, so there is no way back to its start.)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
# Never shorten the heap, and no block outside of it.
_KEEPING = {_TRIM_THRESHOLD: -1, _MMAP_MAX: 0}
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2 << 20

_bfloat16 = ContextVar("fastgpt_bfloat16_activations", default=False)

_lock = threading.Lock()
_depth = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed blocks for the next ones inside the `with` block; give them back to the system at its end.

    Also a decorator: `@kept_memory()`. Nested and concurrent use counts: the first to come in changes the allocator,
    the last to leave restores it. The process holds at most what it had in use at its peak inside, and fragments.

    What it changes is the allocator of the whole process, other threads and libraries included, and nothing of PyTorch:
    mallopt's M_MMAP_MAX becomes 0 and M_TRIM_THRESHOLD infinite, and half of the machine's memory is reserved as
    addresses of the heap (it takes no memory, but shows as virtual size). At the end M_MMAP_MAX, M_MMAP_THRESHOLD and
    M_TRIM_THRESHOLD are set to what glibc's own adaptation comes to, 65536, 32 MiB and 64 MiB, and malloc_trim gives
    free memory back. The adaptation itself stays off, as after any mallopt; addresses of the heap above a block that is
    still in use stay reserved.
    """
    libc = _glibc()
    if libc is None or env.malloc_is_tuned():
        yield
        return
    _enter(libc)
    try:
        yield
    finally:
        _leave(libc)


@contextmanager
def bfloat16_activations() -> Iterator[None]:
    """Inside the `with` block, ops keep in bfloat16 what their backward reads of float32 activations: half the memory.

    The forward is the same to the last bit, and so are its losses. Gradients are computed in float32 from activations
    rounded to 8 bits, about 0.4 % off. Statistics and parameters are kept as they are; so are activations that PyTorch
    itself keeps (for products, norms and embeddings of tiny models), and those of code under torch.compile.

    Only the forward must run inside; gradients may be computed outside.
    """
    token = _bfloat16.set(True)
    try:
        yield
    finally:
        _bfloat16.reset(token)


def keeps_bfloat16() -> bool:
    """True inside `bfloat16_activations()`."""
    return _bfloat16.get()


def is_kept() -> bool:
    """True while some `kept_memory()` of this process is open."""
    return _depth > 0


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "malloc_trim"):
        return None
    libc.mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    libc.malloc.argtypes, libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = (ctypes.c_void_p,), None
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.malloc_trim.argtypes = (ctypes.c_size_t,)
    return libc


def _enter(libc: ctypes.CDLL) -> None:
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            for option, value in _KEEPING.items():
                libc.mallopt(option, value)
            _ask_for_huge_pages(libc)


def _leave(libc: ctypes.CDLL) -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0:
            for option, value in _USUAL.items():
                libc.mallopt(option, value)
            libc.malloc_trim(0)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Lengthen the heap by addresses alone, and ask for huge pages there: memory comes when they are touched."""
    size = _reservation()
    if size == 0 or not (address := libc.malloc(size)):
        return
    begin = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    end = (address + size) // _HUGE_PAGE * _HUGE_PAGE
    if begin < end:
        libc.madvise(begin, end - begin, _MADV_HUGEPAGE)
    # Not trimmed now, so what is allocated next comes from here.
    libc.free(address)


def _reservation() -> int:
    """Half of the machine's memory in bytes; 0 where the system would count addresses as memory."""
    try:
        counted = Path("/proc/sys/vm/overcommit_memory").read_text("ascii").strip() == "2"
    except OSError:
        return 0
    return 0 if counted else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

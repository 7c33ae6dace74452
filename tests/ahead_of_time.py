"""Triton kernels compiled for a GPU that need not be there, and what they use of it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgpt.ops import triton_support

# Bytes of shared memory that one program may take.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
# A load of four words by one thread.
SIXTEEN_BYTES = re.compile(r"ld\.global(\.[\w:]+)*\.v4\.b32")
FLOATS = ("softmax_scale", "drop_scale", "eps")


def compiled(
    kernel: Any,
    capability: int,
    pointers: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int = 3,
) -> Any:
    """The kernel as it is launched: `pointers` gives the dtype of those that are not float32, or a descriptor."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif pointers.get(name, "").startswith("tensordesc"):
            signature[name] = pointers[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, "fp32")
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = parameter.annotation_type or "i32"
            if name.endswith("_stride") or name == "n":
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, **triton_support.OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(
    kernel: Any, record_property: Callable[[str, object], None], folder: Path
) -> tuple[int, int | None, int | None]:
    """Shared memory, registers and stack in bytes; the last two are None where cuobjdump does not come with Triton."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    registers = stack = None
    if tool.exists():
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    for name, value in (("registers", registers), ("stack", stack), ("shared", kernel.metadata.shared)):
        record_property(name, value)
    print(f"{kernel.metadata.name}: {registers} registers, {stack} B of stack, {kernel.metadata.shared} B shared")
    return kernel.metadata.shared, registers, stack

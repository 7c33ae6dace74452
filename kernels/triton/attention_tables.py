"""Tile sizes of the attention kernels: data, with the reason of each choice.

They come from compiling ahead of time (Triton 3.9: registers, spills, shared memory) and from counting traffic; no GPU
has timed them yet. `fastgpt bench --tune` does, and what it finds goes before them (fastgpt/tuning.py). "any" must fit
into 99 KB of shared memory, the least of the chips from sm_80 on, and is where every lookup ends. BLOCK_N is 16, 32 or
a multiple of 64, see dropout.py.
"""

from typing import NamedTuple

from fastgpt import tuning


class Tile(NamedTuple):
    """Queries and keys of a tile, warps of a program, depth of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (chip, bits of the dtype, head_dim rounded up to a power of two), and "dropout" behind them where it has its own row.
Key = tuple[str, int, int] | tuple[str, int, int, str]

FORWARD: dict[Key, Tile] = {
    ("any", 16, 16): Tile(128, 64, 4, 3),
    ("any", 16, 32): Tile(128, 64, 4, 3),
    ("any", 16, 64): Tile(128, 64, 8, 3),
    ("any", 16, 128): Tile(64, 64, 4, 2),
    ("any", 16, 256): Tile(64, 32, 8, 2),
    # Two programs of one warpgroup each drift apart, so that one's softmax overlaps the other's products.
    ("sm_90", 16, 64): Tile(128, 64, 4, 3),
    # The draws need the registers of a second warpgroup.
    ("sm_90", 16, 64, "dropout"): Tile(128, 64, 8, 3),
    ("sm_90", 16, 128): Tile(128, 64, 8, 3),
    ("sm_90", 16, 256): Tile(128, 64, 8, 2),
    ("sm_90", 16, 256, "dropout"): Tile(64, 32, 8, 2),
    # Float32 runs on the scalar units, whose operands all lie in registers: small tiles, or they spill.
    ("any", 32, 16): Tile(64, 32, 4, 1),
    ("any", 32, 32): Tile(64, 32, 4, 1),
    ("any", 32, 64): Tile(64, 32, 8, 1),
    ("any", 32, 128): Tile(32, 32, 8, 1),
    ("any", 32, 256): Tile(16, 32, 8, 1),
}

BACKWARD_DQ: dict[Key, Tile] = {
    ("any", 16, 16): Tile(128, 64, 8, 3),
    ("any", 16, 32): Tile(128, 64, 8, 3),
    ("any", 16, 64): Tile(128, 64, 8, 3),
    ("any", 16, 128): Tile(64, 64, 4, 2),
    ("any", 16, 256): Tile(32, 32, 8, 2),
    ("sm_90", 16, 128): Tile(128, 64, 8, 2),
    # 32 rows stay below wgmma's 64: with it the operands spill.
    ("sm_90", 16, 256): Tile(32, 64, 8, 2),
    ("any", 32, 16): Tile(32, 32, 4, 1),
    ("any", 32, 32): Tile(32, 32, 4, 1),
    ("any", 32, 64): Tile(32, 32, 8, 1),
    ("any", 32, 128): Tile(16, 16, 8, 1),
    ("any", 32, 256): Tile(16, 16, 8, 1),
}

BACKWARD_DKDV: dict[Key, Tile] = {
    # 32 queries at a time: 64 spill without wgmma, whose operands lie in shared memory.
    ("any", 16, 16): Tile(32, 64, 4, 3),
    ("any", 16, 32): Tile(32, 64, 4, 3),
    ("any", 16, 64): Tile(32, 64, 4, 3),
    ("any", 16, 128): Tile(32, 64, 8, 2),
    ("any", 16, 256): Tile(32, 32, 8, 1),
    # 128 keys halve how often queries and their gradients are read.
    ("sm_90", 16, 16): Tile(64, 128, 8, 2),
    ("sm_90", 16, 32): Tile(64, 128, 8, 2),
    ("sm_90", 16, 64): Tile(64, 128, 8, 2),
    ("any", 32, 16): Tile(32, 32, 4, 1),
    ("any", 32, 32): Tile(32, 32, 4, 1),
    ("any", 32, 64): Tile(32, 32, 8, 1),
    ("any", 32, 128): Tile(16, 16, 8, 1),
    ("any", 32, 256): Tile(16, 16, 8, 1),
}

NAMES = {"forward": FORWARD, "backward_dq": BACKWARD_DQ, "backward_dkdv": BACKWARD_DKDV}

# Small, so that small tests have several blocks.
INTERPRETER = Tile(32, 64, 4, 1)


def choose(table: dict[Key, Tile], chip: str, bits: int, block_d: int, dropout: bool) -> Tile:
    """The nearest row of a table: found by timing here, of this chip with dropout, of this chip, of any chip."""
    if chip == "interpreter":
        return INTERPRETER
    name = next(name for name, known in NAMES.items() if known is table)
    found = tuning.lookup(name, chip, bits, block_d, dropout)
    if found is not None:
        return Tile(*found)
    own = table.get((chip, bits, block_d, "dropout")) if dropout else None
    return own or table.get((chip, bits, block_d)) or table["any", bits, block_d]

"""Tile sizes of the attention kernels: data, with the reason of each choice.

They come from compiling ahead of time (Triton 3.9: registers, spills, shared memory) and from counting traffic; no GPU
has timed them yet. `fastgpt bench --tune` does, and what it finds goes before them (fastgpt/tuning.py). "any" must fit
into 99 KB of shared memory, the least of the chips from sm_80 on, and is where every lookup ends. BLOCK_N is 16, 32 or
a multiple of 64, see dropout.py.
"""

from fastgpt import tuning
from fastgpt.tuning import AttentionTile as Tile
from fastgpt.tuning import Key

FORWARD: dict[Key, Tile] = {
    ("any", 16, 16): Tile(128, 64, 8, 3),
    ("any", 16, 32): Tile(128, 64, 4, 3),
    ("any", 16, 64): Tile(128, 64, 8, 3),
    ("any", 16, 128): Tile(128, 32, 8, 2),
    ("any", 16, 256): Tile(64, 32, 8, 2),
    # Two programs of one warpgroup each drift apart, so that one's softmax overlaps the other's products.
    ("sm_90", 16, 64): Tile(128, 64, 4, 3),
    # The draws need the registers of a second warpgroup.
    ("sm_90", 16, 64, "dropout"): Tile(128, 64, 8, 3),
    ("sm_90", 16, 128): Tile(128, 64, 8, 3),
    ("sm_90", 16, 256): Tile(128, 32, 8, 2),
    ("sm_90", 16, 256, "dropout"): Tile(64, 32, 8, 2),
    # Float32 runs on the scalar units, whose operands all lie in registers: small tiles, or they spill.
    ("any", 32, 16): Tile(64, 32, 4, 1),
    ("any", 32, 32): Tile(64, 32, 4, 1),
    ("any", 32, 64): Tile(32, 32, 8, 1),
    ("any", 32, 128): Tile(32, 16, 8, 1),
    ("any", 32, 256): Tile(16, 16, 8, 1),
}

BACKWARD_DQ: dict[Key, Tile] = {
    ("any", 16, 16): Tile(128, 64, 8, 3),
    ("any", 16, 32): Tile(128, 64, 8, 3),
    ("any", 16, 64): Tile(128, 64, 8, 3),
    ("any", 16, 128): Tile(64, 32, 8, 2),
    ("any", 16, 256): Tile(32, 32, 8, 2),
    ("sm_90", 16, 128): Tile(128, 64, 8, 2),
    ("sm_90", 16, 128, "dropout"): Tile(64, 64, 8, 2),
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
    ("any", 16, 256): Tile(16, 32, 8, 1),
    # 128 keys halve how often queries and their gradients are read.
    ("sm_90", 16, 16): Tile(64, 128, 8, 2),
    ("sm_90", 16, 32): Tile(64, 128, 8, 2),
    ("sm_90", 16, 64): Tile(64, 128, 8, 2),
    ("sm_90", 16, 128): Tile(32, 64, 8, 3),
    ("any", 32, 16): Tile(32, 32, 4, 1),
    ("any", 32, 32): Tile(32, 16, 4, 1),
    ("any", 32, 64): Tile(16, 32, 8, 1),
    ("any", 32, 128): Tile(16, 16, 8, 1),
    ("any", 32, 256): Tile(16, 16, 8, 1),
    ("any", 32, 256, "dropout"): Tile(16, 16, 16, 1),
}

# Small, so that small tests have several blocks.
_INTERPRETER: dict[Key, Tile] = {("interpreter", 0, 0): Tile(32, 64, 4, 1)}

TABLES: dict[str, dict[Key, Tile]] = {
    "attention_forward": FORWARD | _INTERPRETER,
    "attention_backward_dq": BACKWARD_DQ | _INTERPRETER,
    "attention_backward_dkdv": BACKWARD_DKDV | _INTERPRETER,
}


def choose(kernel: str, chip: str, bits: int, block_d: int, dropout: bool) -> Tile:
    """The row of `kernel` for this case."""
    return tuning.choose(kernel, TABLES[kernel], chip, bits, block_d, dropout)

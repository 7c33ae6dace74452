"""Tiles of the kernels on rows (layer_norm, dropout_add_layer_norm, gelu, embedding, cross_entropy): data, with the
reason of each choice.

They come from counting registers and bytes; no GPU has timed them yet. `fastgpt bench --tune` does, and what it finds
goes before them (fastgpt/tuning.py). Width is the length of a row, rounded up to a power of two.
"""

from fastgpt import tuning
from fastgpt.tuning import Key, RowTile

MAX_WIDTH = 16384


def _whole_rows(elements: int, programs: int = 0) -> dict[Key, RowTile]:
    """A program holds `elements` at once where rows are short, else one row; 1024 columns or more a warp from 4 on."""
    widths = (1 << exponent for exponent in range(4, MAX_WIDTH.bit_length()))
    return {
        ("any", 0, width): RowTile(
            max(1, min(16, elements // width)), 0, max(4, min(16, width // 1024)), programs
        )
        for width in widths
    }  # fmt: skip


TABLES: dict[str, dict[Key, RowTile]] = {
    # 4096 elements: 32 of one tensor for each of 128 threads; as many fewer as a kernel holds tensors.
    "layer_norm_forward": _whole_rows(4096),
    # Four programs hide the latency of memory, and leave few shares of the weights' gradients to add.
    "layer_norm_backward": _whole_rows(2048, programs=4),
    "dropout_add_layer_norm_forward": _whole_rows(2048),
    "dropout_add_layer_norm_backward": _whole_rows(1024, programs=4),
    "embedding_forward": _whole_rows(2048),
    # Eight elements a thread: one 16-byte access in 16 bits, two in float32.
    "gelu_forward": {("any", 0, 0): RowTile(1, 1024, 4)},
    "gelu_backward": {("any", 0, 0): RowTile(1, 1024, 4)},
    "gelu_bias_forward": {("any", 0, 0): RowTile(2, 1024, 4)},
    "gelu_bias_backward": {("any", 0, 0): RowTile(2, 1024, 4, 8)},
    # Runs of most tokens are short, and columns side by side spread the long ones.
    "embedding_backward": {("any", 0, 0): RowTile(4, 256, 4)},
    # 16 elements a thread.
    "cross_entropy": {("any", 0, 0): RowTile(1, 4096, 8)},
}


def choose(kernel: str, chip: str, bits: int, width: int, dropout: bool = False) -> RowTile:
    """The row of `kernel` for this case."""
    return tuning.choose(kernel, TABLES[kernel], chip, bits, width, dropout)

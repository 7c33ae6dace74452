"""The decoder for GPUs that stays on the chip (kernels/cuda/decode_persistent.cuh): many tokens of a row in one launch.

Buffers, cache and everything that is read anew are those of `GraphDecoder`, which also takes batches of several rows.
A row that meets its end stops there, so tokens are made in full groups.

No GPU has run this yet, so it is taken only where `Generator(model, engine="persistent")` asks for it. The emulator of
the tests runs the same kernel, all of its blocks in turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.generation.graph_engine import DRAWN, GREEDY, GROUP, TOP_K, GraphDecoder, draw_options
from fastgpt.generation.graph_weights import StepWeights
from fastgpt.generation.sampling import Sampling
from fastgpt.ops import cuda_support

# Bytes of a layer in the table that the kernel reads; csrc checks that the table has room.
_LAYER_WORDS = 19


class PersistentDecoder(GraphDecoder):
    """A cache and the buffers of one row, and the plan of the launch.

    Args:
        weights, room, keep_logits: see `GraphDecoder`.

    Raises:
        ValueError: the chip or the network does not fit the kernel; the text says why.
    """

    group_with_end = GROUP

    def __init__(self, weights: StepWeights, room: int, keep_logits: bool = False) -> None:
        super().__init__(weights, 1, room, False, keep_logits)
        words = max(1, len(weights.layers)) * _LAYER_WORDS
        with torch.inference_mode(False):
            self._table = torch.zeros(words, dtype=torch.int64, device=weights.device)
        with cuda_support.device_of(self.state):
            self.calls = {mode: self._call(mode) for mode in (GREEDY, DRAWN, TOP_K)}
            self.plan: tuple[int, int] = tuple(self.calls[GREEDY].persistent_plan())
            address, size = self._table.data_ptr(), self._table.nbytes
            self.calls[GREEDY].persistent_upload(address, size, cuda_support.stream())

    def run(
        self,
        tokens: Tensor,
        sizes: Tensor,
        drawn: int,
        steps: int,
        sampling: Sampling,
        seed: int,
        end: int | None = None,
    ) -> Tensor:
        """See `GraphDecoder`; behind the token `end` the result has no meaning."""
        mode = GREEDY if sampling.greedy else DRAWN if sampling.top_k is None else TOP_K
        with cuda_support.device_of(self.state):
            if mode != GREEDY:
                self.draw.copy_(draw_options(sampling, seed))
            self._set_state(tokens, sizes, drawn)
            self.arrived.zero_()
            # What is behind the end must still be tokens.
            self.found.zero_()
            self.calls[mode].persistent_steps(
                self.plan, self._table.data_ptr(), steps, -1 if end is None else end, cuda_support.stream()
            )
            return self.found[:, :steps].clone()


def make_decoder(weights: StepWeights, batch: int, room: int) -> GraphDecoder:
    """The persistent decoder for one row, the graph's for several."""
    return PersistentDecoder(weights, room) if batch == 1 else GraphDecoder(weights, batch, room)

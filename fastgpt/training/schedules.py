"""Learning rates: a straight rise, then half a cosine down (appendix D)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    """The learning rate of each step.

        lr
        peak      /‾‾\\_            step < warmup:  initial + step · (peak - initial) / warmup
                 /     \\           else:           min + (peak - min) · (1 + cos(π · progress)) / 2
        initial /        \\_ min                    progress = (step - warmup) / (total - warmup)
                0  warmup   total

    Attributes:
        peak_lr: the highest rate, reached at step `warmup_steps`.
        min_lr: what the rate falls to; step `total_steps` itself would have it.
        warmup_steps: steps of the rise; 0 begins at the peak.
        total_steps: steps in all.
        initial_lr: the rate of step 0, when there is a rise.

    Source: Raschka, Build a Large Language Model (From Scratch), appendix D; Loshchilov & Hutter 2017 (SGDR).
    """

    peak_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int
    initial_lr: float = 0.0

    def at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.initial_lr + step * ((self.peak_lr - self.initial_lr) / self.warmup_steps)
        if self.total_steps <= self.warmup_steps:
            return self.min_lr
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

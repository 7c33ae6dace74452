"""A reader's own hand-written model, made fast in place and made plain again.

import fastgpt
print(fastgpt.accelerate(model))     # which modules now run on fastgpt's kernels, and why others do not
fastgpt.restore(model)               # the reader's own forwards again

recognise.py    candidates by attribute names and shapes, what speaks against them, and their plan
probe.py        a candidate's own forward against the plan, on random weights, without side effects
shadow.py       the stand-in that is probed instead of the reader's module
fused.py        what a swapped module runs, and how it is copied and pickled
neighbours.py   feed-forwards, blocks and models whose parts were swapped: which are joined, judged by numbers
joined.py       what a joined module runs
walk.py         accelerate and restore
report.py       the table
"""

from fastgpt.acceleration.report import Report, Row
from fastgpt.acceleration.walk import accelerate, restore

__all__ = ["Report", "Row", "accelerate", "restore"]

"""Loss curves: the book's figure, a PNG beside a checkpoint, and a small one for terminals."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

Curve = Sequence[tuple[float, float]]

INSTALL = 'pip install "fastgpt[book]"'


def plot_losses(
    epochs_seen: Sequence[float],
    tokens_seen: Sequence[float],
    train_losses: Sequence[float],
    val_losses: Sequence[float],
) -> None:
    """Chapter 5's figure: both losses over epochs, with tokens on a second axis. Saves loss-plot.pdf and shows it.

    Args:
        epochs_seen, tokens_seen: where each loss was measured.
        train_losses, val_losses: the losses.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(f"plot_losses draws with matplotlib, which is not installed: {INSTALL}") from error

    figure, by_epoch = plt.subplots(figsize=(5, 3))
    by_epoch.plot(epochs_seen, train_losses, label="Training loss")
    by_epoch.plot(epochs_seen, val_losses, linestyle="-.", label="Validation loss")
    by_epoch.set_xlabel("Epochs")
    by_epoch.set_ylabel("Loss")
    by_epoch.legend(loc="upper right")
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_tokens = by_epoch.twiny()
    # Invisible: it only gives the second axis its range.
    by_tokens.plot(tokens_seen, train_losses, alpha=0)
    by_tokens.set_xlabel("Tokens seen")
    figure.tight_layout()
    plt.savefig("loss-plot.pdf")
    plt.show()


def save_loss_plot(path: str | os.PathLike[str], train: Curve, val: Curve) -> Path | None:
    """Write both curves as a picture; touches neither pyplot's state nor a screen.

    Args:
        path: where; the ending chooses the format, .png for one.
        train, val: (step, loss) points.

    Returns:
        The path, or None where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*_columns(train), alpha=0.35, linewidth=1, label="training, each step")
    axes.plot(*_columns(val), marker="o", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel="cross-entropy loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return Path(path)


def terminal_plot(train: Curve, val: Curve, *, width: int = 60, height: int = 12, ascii_only: bool = False) -> str:
    """Draw both curves in text.

        10.91 ┤··
              │  ●···
              │      ●····●
         3.20 ┤           ····●
              └─────────────────
               1             200   · training  ● validation

    Args:
        train, val: (step, loss) points; training points that share a column are averaged.
        width, height: characters inside the axes.
        ascii_only: for terminals that are not UTF-8.

    Returns:
        The lines, joined; "" without finite points.
    """
    marks = {"train": ".", "val": "o"} if ascii_only else {"train": "·", "val": "●"}
    tee, bar, corner, dash = ("|", "|", "+", "-") if ascii_only else ("┤", "│", "└", "─")
    curves = {name: [p for p in points if math.isfinite(p[1])] for name, points in (("train", train), ("val", val))}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    columns = {name: _columns_of(curve, first, last, width) for name, curve in curves.items()}
    losses = [loss for column in columns.values() for loss in column.values()]
    low, high = min(losses), max(losses)
    grid = [[" "] * width for _ in range(height)]
    for name, column in columns.items():
        for x, loss in column.items():
            row = round((high - loss) / (high - low or 1.0) * (height - 1))
            grid[row][x] = marks[name]
    labels = [f"{high:.2f}", *[""] * (height - 2), f"{low:.2f}"]
    margin = max(map(len, labels))
    lines = [
        f"{label:>{margin}} {tee if label else bar}{''.join(row).rstrip()}"
        for label, row in zip(labels, grid, strict=True)
    ]
    lines.append(f"{'':>{margin}} {corner}{dash * width}")
    ends = f"{first:g}{f'{last:g}':>{max(1, width - len(f'{first:g}'))}}"
    lines.append(f"{'':>{margin}}  {ends}  {marks['train']} training  {marks['val']} validation")
    return "\n".join(lines)


def _columns(curve: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


def _columns_of(curve: Curve, first: float, last: float, width: int) -> dict[int, float]:
    """Mean loss per character column."""
    sums: dict[int, tuple[float, int]] = {}
    for x, loss in curve:
        column = round((x - first) / (last - first or 1.0) * (width - 1))
        total, count = sums.get(column, (0.0, 0))
        sums[column] = total + loss, count + 1
    return {column: total / count for column, (total, count) in sums.items()}

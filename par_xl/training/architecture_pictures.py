"""How a search went: the probabilities of each block's choices, as a picture and as a film."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHOICES = ("attention", "dense", "identity")
Snapshot = tuple[int, Sequence[Sequence[float]]]  # a step, and its probabilities: blocks x choices


def plot_architecture(history: Sequence[Snapshot], path: str | Path) -> None:
    """Draw a PNG: over the training steps a heat map for each block, and at the end all blocks side by side.

    The most likely choice at the end and its probability are written beside each block's map and into the last one.

    Args:
        history: what was seen at some steps, in order; not empty.
    """
    import numpy as np
    from matplotlib.figure import Figure  # not pyplot: no display and no global state

    values = np.asarray([probabilities for _, probabilities in history])  # (S, blocks, choices)
    blocks = values.shape[1]
    figure = Figure(figsize=(10, 2.6 + 0.55 * blocks), layout="constrained")
    *strips, last = figure.subplots(blocks + 1, 1, height_ratios=[1.0] * blocks + [3.2])
    edges = _edges([step for step, _ in history])
    for block, axes in enumerate(strips):
        axes.pcolormesh(edges, range(len(CHOICES) + 1), values[:, block].T, **_COLOURS)
        axes.set_ylim(len(CHOICES), 0)
        axes.set_yticks([0.5, 1.5, 2.5], CHOICES, fontsize=6)
        axes.set_ylabel(f"{block + 1}", rotation=0, labelpad=8, va="center")
        axes.tick_params(labelbottom=block == blocks - 1)
        choice = int(values[-1, block].argmax())
        text = f"{CHOICES[choice]} {values[-1, block, choice]:.2f}"
        axes.text(1.01, 0.5, text, transform=axes.transAxes, va="center")
    strips[-1].set_xlabel("training step")
    strips[0].set_title("probability of each block's choices", fontsize=10)
    image = _blocks(last, values[-1], f"step {history[-1][0]:,}")
    figure.colorbar(image, ax=last)
    figure.savefig(path, dpi=120)


def animate_architecture(history: Sequence[Snapshot], path: str | Path, frames: int = 60) -> int:
    """Draw an animated GIF: all blocks side by side as training goes on.

    At most ``frames`` of ``history`` are shown, spread evenly.

    Returns:
        The number of frames.
    """
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure

    n = min(frames, len(history))
    chosen = [history[round(i * (len(history) - 1) / max(1, n - 1))] for i in range(n)]
    figure = Figure(figsize=(2 + 0.9 * len(history[0][1]), 3), layout="constrained")
    axes = figure.subplots()
    image = _blocks(axes, chosen[0][1], "step")
    figure.colorbar(image, ax=axes)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # everything is in its place now: a frame costs its drawing only
    writer = PillowWriter(fps=10)
    with writer.saving(figure, str(path), dpi=80):
        for step, probabilities in chosen:
            while axes.texts:
                axes.texts[0].remove()
            image.set_data(_write(axes, probabilities))
            axes.set_title(f"step {step:,}")
            writer.grab_frame()
    return n


_COLOURS: dict[str, Any] = {"cmap": "viridis", "vmin": 0.0, "vmax": 1.0}


def _blocks(axes: Any, probabilities: Sequence[Sequence[float]], title: str) -> Any:
    """A heat map, choices x blocks, with what :func:`_write` writes."""
    image = axes.imshow(_write(axes, probabilities), aspect="auto", **_COLOURS)
    axes.set_xticks(range(len(probabilities)), [str(block + 1) for block in range(len(probabilities))])
    axes.set_yticks(range(len(CHOICES)), CHOICES)
    axes.set(xlabel="block", title=title)
    return image


def _write(axes: Any, probabilities: Sequence[Sequence[float]]) -> Any:
    """Write each block's most likely choice and its probability into the map, of which this returns the values."""
    import numpy as np

    values = np.asarray(probabilities).T
    for block, choice in enumerate(values.argmax(0)):
        value = values[choice, block]
        text = f"{CHOICES[choice]}\n{value:.2f}"
        axes.text(block, choice, text, ha="center", va="center", fontsize=8, color="black" if value > 0.6 else "white")
    return values


def _edges(steps: Sequence[int]) -> list[float]:
    """The borders between the columns of a heat map: half way between the steps."""
    middles = [(a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)]
    first = middles[0] - steps[0] if middles else 0.5
    last = steps[-1] - middles[-1] if middles else 0.5
    return [steps[0] - first, *middles, steps[-1] + last]

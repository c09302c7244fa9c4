"""What a run measured of itself, and its loss curve."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L


class History(L.Callback):
    """Losses by step, tokens and seconds of training; part of the checkpoint, so that a resumed run has all of it.

    Attributes:
        train: ``(step, loss)`` at every ``log_every_n_steps``-th step.
        valid: a dict for every validation: ``step``, ``val_loss``, ``val_perplexity``, ``val_accuracy``.
        tokens: tokens trained on, on all ranks.
        seconds: wall time of the training steps alone, without validations and checkpoints.
    """

    FIELDS = ("train", "valid", "tokens", "seconds")

    def __init__(self) -> None:
        self.train: list[tuple[int, float]] = []
        self.valid: list[dict[str, float]] = []
        self.tokens = 0
        self.seconds = 0.0
        self._started = 0.0

    @property
    def tokens_per_second(self) -> int:
        return round(self.tokens / self.seconds)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Only these steps wait for the GPU; the sum over the others is right in between.
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.train.append((trainer.global_step, float(outputs["loss"])))
        self.seconds += time.perf_counter() - self._started
        self.tokens += batch[0].numel() * trainer.world_size

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
            self.valid.append({"step": trainer.global_step, **metrics})

    def state_dict(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self.FIELDS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


def plot_losses(histories: Mapping[str, History], path: str | Path) -> None:
    """Draw the training and validation losses of one or more runs into one PNG."""
    from matplotlib.figure import Figure  # not pyplot: no display and no global state

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (label, history) in enumerate(histories.items()):
        # A later run is drawn thinner and dashed on top, so that curves which coincide both stay visible.
        style: dict[str, Any] = {"color": f"C{i}", "linewidth": 3 / (i + 1), "linestyle": "--" if i else "-"}
        axes.plot(*_columns(history.train), label=f"{label}: training", alpha=0.7, **style)
        valid = [(v["step"], v["val_loss"]) for v in history.valid]
        axes.plot(*_columns(valid), label=f"{label}: validation", marker="x" if i else "o", **style)
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]

"""What a search records, and when it has found what it looks for."""

import json
from pathlib import Path
from typing import Any

import lightning as L

from par_xl.training.architecture_pictures import CHOICES, animate_architecture, plot_architecture

SNAPSHOTS = 200  # about so many over a search


class ArchitectureHistory(L.Callback):
    """The probabilities of ``pl_module.model`` over the steps; part of the checkpoint.

    At the end, ``architecture.json``, ``architecture.png`` and ``architecture.gif`` are in ``folder``.

    Attributes:
        snapshots: ``(step, probabilities)``, the latter blocks x (attention, dense, identity).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.snapshots: list[tuple[int, list[list[float]]]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.every = max(1, pl_module.total_steps() // SNAPSHOTS)  # type: ignore[operator]
        if not self.snapshots:
            self._take(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self._take(trainer, pl_module)

    def _take(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        probabilities = pl_module.model.probabilities()  # type: ignore[union-attr, operator]
        self.snapshots.append((trainer.global_step, probabilities.tolist()))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if self.snapshots[-1][0] != trainer.global_step:
            self._take(trainer, pl_module)
        steps, probabilities = zip(*self.snapshots, strict=True)
        record = {"choices": CHOICES, "steps": steps, "probabilities": probabilities}
        (self.folder / "architecture.json").write_text(json.dumps(record) + "\n")
        plot_architecture(self.snapshots, self.folder / "architecture.png")
        animate_architecture(self.snapshots, self.folder / "architecture.gif")

    def state_dict(self) -> dict[str, Any]:
        return {"snapshots": self.snapshots}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.snapshots = state_dict["snapshots"]


class StopWhenStable(L.Callback):
    """Stops the search after ``patience`` validations in a row with the same derived pattern as the one before.

    Args:
        patience: positive.
        freeze: validations up to this step, while the architecture cannot change, do not count.
    """

    def __init__(self, patience: int, freeze: int = 0):
        self.patience, self.freeze = patience, freeze
        self.pattern, self.unchanged = "", 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step <= self.freeze:
            return
        pattern = pl_module.model.derive()  # type: ignore[union-attr, operator]
        self.unchanged = self.unchanged + 1 if pattern == self.pattern else 0
        self.pattern = pattern
        trainer.should_stop = trainer.should_stop or self.unchanged >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"pattern": self.pattern, "unchanged": self.unchanged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

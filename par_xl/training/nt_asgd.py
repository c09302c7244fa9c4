"""Non-monotonically triggered averaged SGD (Merity et al. 2017, section 3)."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging


class NTASGD(WeightAveraging):
    """Averages the weights of every step after the first validation that is worse than the best before the last few.

    With ``losses`` those of the validations so far, averaging starts after a validation whose loss is above
    ``min(losses[:-nonmono])``. From then on validations, checkpoints and the finished model have the plain mean of the
    weights since; training goes on with its own. awd-lstm-lm changes from SGD to ``torch.optim.ASGD(t0=0, lambd=0)``
    instead, which leaves the first step out of the mean and takes, at each step, the learning rate of the one before.

    Args:
        nonmono: how many of the last validations do not count; awd-lstm-lm has 5.
        monitor: the validation loss.
    """

    def __init__(self, nonmono: int = 5, monitor: str = "val_loss"):
        super().__init__(use_buffers=False)
        self.nonmono, self.monitor = nonmono, monitor
        self.losses: list[float] = []
        self.triggered = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        loss = float(trainer.callback_metrics[self.monitor])
        before = self.losses[: -self.nonmono] if self.nonmono else self.losses
        self.triggered = self.triggered or bool(before) and loss > min(before)
        self.losses.append(loss)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return self.triggered and step_idx is not None

    @property
    def _has_average(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged)

    # Lightning's callback would hand out its copy of the initial weights before there is an average.

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        if self._has_average:
            super()._swap_models(pl_module)

    def _copy_average_to_current(self, pl_module: L.LightningModule) -> None:
        if self._has_average:
            super()._copy_average_to_current(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._has_average:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if "averaging_state" in checkpoint:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "losses": list(self.losses), "triggered": self.triggered}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.losses, self.triggered = list(state_dict["losses"]), state_dict["triggered"]

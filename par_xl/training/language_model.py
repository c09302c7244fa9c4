"""The LightningModule of every language model in this package."""

from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from par_xl.models.output import ModelOutput
from par_xl.training.checkpoint import from_all_ranks, of_this_rank

Batch = tuple[Tensor, Tensor]


class LanguageModel(L.LightningModule):
    """Trains any model with the call ``model(tokens, targets, memory) -> ModelOutput`` on contiguous streams.

    The memory of a batch goes to the next one, and starts empty at the begin of an epoch. Training and evaluation have
    a memory each, so a validation in the middle of an epoch leaves training's alone. Checkpoints hold every rank's.

    Logs ``train_loss`` at each step and, over all tokens of the split, ``{val,test}_loss`` (the mean negative
    log-likelihood), ``_perplexity`` (its exponential), ``_word_perplexity`` (the same by word: see
    :meth:`par_xl.data.Corpus.tokens_per_word`) and ``_accuracy`` (of the most probable token).

    Args:
        model: with ``forward`` as above and ``predict(hidden)``.
        optimizer: "adamw" (betas 0.9 and 0.99, fastai's) or "sgd".
        lr: learning rate; the peak of a one-cycle schedule.
        weight_decay: decoupled for "adamw".
        schedule: "constant", or "one-cycle" over the data module's total number of steps with the first quarter rising
            (fastai's ``fit_one_cycle``).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: Literal["constant", "one-cycle"] = "constant",
    ):
        super().__init__()
        if optimizer not in ("adamw", "sgd"):
            raise ValueError(f'optimizer must be "adamw" or "sgd", not {optimizer!r}')
        if schedule not in ("constant", "one-cycle"):
            raise ValueError(f'schedule must be "constant" or "one-cycle", not {schedule!r}')
        self.model = model
        self.optimizer, self.lr, self.weight_decay, self.schedule = optimizer, lr, weight_decay, schedule
        self.nll, self.accuracy = MeanMetric(), MeanMetric()
        self._memory: dict[bool, Any] = {}  # by self.training

    def reset(self) -> None:
        """Empty the memory: training's in training mode, evaluation's in evaluation mode."""
        self._memory[self.training] = None

    def on_train_epoch_start(self) -> None:
        self.reset()

    def on_validation_epoch_start(self) -> None:
        self.reset()

    def on_test_epoch_start(self) -> None:
        self.reset()

    def _output(self, batch: Batch) -> ModelOutput:
        tokens, targets = batch
        output = self.model(tokens, targets, self._memory.get(self.training))
        self._memory[self.training] = output.memory
        return output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._output(batch).loss
        assert loss is not None
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        output = self._output(batch)
        assert output.nll is not None
        self.nll.update(output.nll)
        self.accuracy.update((self.model.predict(output.hidden) == batch[1]).float())  # type: ignore[operator]

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val", "valid")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test", "test")

    def _log_evaluation(self, stage: str, split: str) -> None:
        nll, accuracy = self.nll.compute(), self.accuracy.compute()
        self.log_dict({f"{stage}_loss": nll, f"{stage}_perplexity": nll.exp()}, prog_bar=True)
        tokens_per_word = self.trainer.datamodule.corpus.tokens_per_word(split)  # type: ignore[attr-defined]
        self.log(f"{stage}_word_perplexity", (nll * tokens_per_word).exp())
        self.log(f"{stage}_accuracy", accuracy, prog_bar=True)
        self.nll.reset()
        self.accuracy.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), self.lr, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), self.lr, betas=(0.9, 0.99), weight_decay=self.weight_decay)
        if self.schedule == "constant":
            return optimizer
        steps = self.trainer.datamodule.total_steps(self.trainer.max_epochs)  # type: ignore[attr-defined]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=steps, pct_start=0.25, cycle_momentum=self.optimizer == "adamw"
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["memory"] = from_all_ranks(move_data_to_device(self._memory.get(True), "cpu"))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._memory[True] = of_this_rank(checkpoint["memory"], self.trainer)

    def on_train_start(self) -> None:
        self._memory[True] = move_data_to_device(self._memory.get(True), self.device)

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
from par_xl.training.schedules import RateSchedule, one_of, rate_schedule

Batch = tuple[Tensor, Tensor]
OptimizerName = Literal["adamw", "sgd"]


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
        lr: learning rate; the peak of a schedule.
        weight_decay: decoupled for "adamw".
        schedule: "constant", "one-cycle" or "cosine" over :meth:`total_steps`; see :func:`rate_schedule`.
        warmup: steps of a linear rise before "constant" and "cosine".
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerName = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: RateSchedule = "constant",
        warmup: int = 0,
    ):
        super().__init__()
        one_of("optimizer", optimizer, OptimizerName)
        one_of("schedule", schedule, RateSchedule)
        self.model = model
        self.optimizer, self.lr, self.weight_decay = optimizer, lr, weight_decay
        self.schedule: RateSchedule = schedule
        self.warmup = warmup
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

    def _call(self, tokens: Tensor, targets: Tensor, memory: Any) -> ModelOutput:
        return self.model(tokens, targets, memory)

    def _output(self, batch: Batch) -> ModelOutput:
        output = self._call(*batch, self._memory.get(self.training))
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

    def total_steps(self) -> int:
        """How many optimiser steps the training has, unless something stops it."""
        steps = self.trainer.datamodule.total_steps(self.trainer.max_epochs)  # type: ignore[attr-defined]
        return steps if self.trainer.max_steps < 0 else min(steps, self.trainer.max_steps)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser is given."""
        return [{"params": list(self.parameters())}]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer: torch.optim.Optimizer
        groups = self.parameter_groups()
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, self.lr, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.AdamW(groups, self.lr, betas=(0.9, 0.99), weight_decay=self.weight_decay)
        if self.schedule == "constant" and not self.warmup:
            return optimizer
        scheduler = rate_schedule(optimizer, self.schedule, self.total_steps(), self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["memory"] = from_all_ranks(move_data_to_device(self._memory.get(True), "cpu"))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._memory[True] = of_this_rank(checkpoint["memory"], self.trainer)

    def on_train_start(self) -> None:
        self._memory[True] = move_data_to_device(self._memory.get(True), self.device)

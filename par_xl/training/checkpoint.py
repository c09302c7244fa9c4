"""Checkpoints from which a run goes on as if it had never stopped, with the weights in safetensors beside them."""

import random
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import save_file


def from_all_ranks(state: Any) -> list[Any]:
    """``state`` of every rank, for a checkpoint, which rank 0 writes alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


def of_this_rank(states: list[Any], trainer: L.Trainer) -> Any:
    """This rank's entry of what :func:`from_all_ranks` gave; None in a run on another number of devices."""
    if len(states) != trainer.world_size:
        rank_zero_warn(f"the checkpoint is of {len(states)} ranks, not {trainer.world_size}: a memory starts empty")
        return None
    return states[trainer.global_rank]


class RandomState(L.Callback):
    """Keeps every rank's random state (Python's, numpy's, torch's and the GPUs') in checkpoints."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        kind, keys, *rest = np.random.get_state(legacy=True)
        state = {
            "python": random.getstate(),
            "numpy": (kind, keys.tolist(), *rest),  # type: ignore[union-attr]  # torch.load refuses arrays
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        checkpoint["random_state"] = from_all_ranks(state)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = of_this_rank(checkpoint["random_state"], trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Only here, so that nothing between loading and training draws from it."""
        if self._restored is None:
            return
        random.setstate(self._restored["python"])
        np.random.set_state(self._restored["numpy"])
        torch.set_rng_state(self._restored["torch"])
        if torch.cuda.is_available() and "cuda" in self._restored:
            torch.cuda.set_rng_state_all(self._restored["cuda"])
        self._restored = None


class SafetensorsCheckpointIO(TorchCheckpointIO):
    """Writes ``NAME.safetensors`` beside every ``NAME.ckpt``: the weights of ``pl_module.model`` under its own names.

    Tied weights are stored once, as ``safetensors.torch.load_model(model, path)`` expects.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        weights, seen = {}, set()
        for name, weight in checkpoint["state_dict"].items():
            address = (weight.data_ptr(), weight.shape)
            if name.startswith("model.") and address not in seen:
                weights[name.removeprefix("model.")] = weight.detach().contiguous()
                seen.add(address)
        save_file(weights, Path(path).with_suffix(".safetensors"))

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        Path(path).with_suffix(".safetensors").unlink(missing_ok=True)


class SaveOnInterrupt(Checkpoint):
    """At Ctrl-C, finish the training step, write a checkpoint and stop; a second Ctrl-C stops at once.

    Between two steps the state is whole, so a run resumed from the checkpoint gives the numbers of one that was never
    interrupted. (``OnExceptionCheckpoint`` saves in the middle of a step.) Where a validation is due it is written
    after that, and after an epoch's last step at the end of the epoch: Lightning would not resume with what is due.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = str(path)
        self.interrupted = False
        self._handler_before: Any = signal.default_int_handler

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.interrupted = False
        self._handler_before = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._handler_before)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The ranks must agree: a checkpoint is a collective operation.
        if trainer.world_size > 1:
            self.interrupted = trainer.strategy.reduce_boolean_decision(self.interrupted, all=False)
        if self.interrupted and not trainer.is_last_batch and not _validation_is_due(trainer):
            self._save_and_stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.interrupted and not trainer.is_last_batch:
            self._save_and_stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.interrupted:
            self._save_and_stop(trainer)

    def _save_and_stop(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        trainer.print(f"Interrupted. The run can go on from {self.path}")
        # Not should_stop: that ends the epoch early with a validation and a checkpoint as if it were whole.
        raise KeyboardInterrupt

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signal.signal(signal.SIGINT, self._handler_before)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        signal.signal(signal.SIGINT, self._handler_before)  # Lightning has it ignored by now


def _validation_is_due(trainer: L.Trainer) -> bool:
    """After this step, which is not the last one of an epoch."""
    every = trainer.val_check_batch if trainer.check_val_every_n_epoch is None else None
    return trainer.should_stop or (every is not None and trainer.global_step % every == 0)

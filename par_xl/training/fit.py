"""One training run of a language model: everything between a model and its files on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_model
from torch import nn

from par_xl.data import Corpus
from par_xl.ops import use_backend
from par_xl.training.checkpoint import RandomState, SafetensorsCheckpointIO, SaveOnInterrupt
from par_xl.training.data_module import LanguageModelData
from par_xl.training.history import History, plot_losses
from par_xl.training.language_model import LanguageModel, OptimizerName
from par_xl.training.nt_asgd import NTASGD
from par_xl.training.schedules import RateSchedule


@dataclass
class Recipe:
    """How to train a model.

    Attributes:
        epochs: passes over the train split.
        max_steps: end before the last epoch, after so many optimiser steps; 0 does not.
        eval_every: validate after every so many steps, and after the last; 0: at the end of each epoch.
        batch_size: streams on each device.
        bptt: length of a window.
        random_length: windows of random length (awd-lstm-lm).
        optimizer, lr, weight_decay, schedule, warmup: as in :class:`LanguageModel`.
        clip: largest norm of the gradient; 0 does not clip.
        nonmono: start averaging the weights by :class:`NTASGD`'s rule; 0 never does.
        seed: of the initial weights, the dropout masks and the window lengths.
        model: the model's options, fields of ``config_class``.
    """

    config_class: ClassVar[type]

    epochs: int
    batch_size: int
    bptt: int
    random_length: bool = False
    max_steps: int = 0
    eval_every: int = 0
    optimizer: OptimizerName = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: RateSchedule = "constant"
    warmup: int = 0
    clip: float = 0.0
    nonmono: int = 0
    seed: int = 0
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_steps", "eval_every", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")

    def optimization(self) -> dict[str, Any]:
        """The options of :class:`LanguageModel`."""
        return {name: getattr(self, name) for name in ("optimizer", "lr", "weight_decay", "schedule", "warmup")}


def fit(
    model: nn.Module,
    corpus: Corpus,
    recipe: Recipe,
    out: str | Path,
    *,
    module: LanguageModel | None = None,
    callbacks: Sequence[L.Callback] = (),
    backend: str = "auto",
    precision: Any = "32-true",
    devices: int | str = "auto",
    strategy: str = "auto",
    compile: bool = False,
    start: str | Path | None = None,
    resume: str | Path | None = None,
) -> History:
    """Train ``model`` in place and leave ``best`` and ``last`` (``.ckpt`` and ``.safetensors``: at the validation with
    the least loss, and at the last one), ``losses.png``, ``vocabulary.txt`` and TensorBoard's events in ``out``; after
    Ctrl-C also ``interrupted.ckpt``.

    Args:
        model: as :class:`LanguageModel` wants it.
        module: what trains ``model``; default: :class:`LanguageModel`.
        callbacks: the model's own, :class:`RNNTrainer` for instance.
        backend: of the ops; see :func:`par_xl.use_backend`.
        precision, devices, strategy: as in ``lightning.Trainer``.
        compile: ``torch.compile`` the model.
        start: folder of a finished run of the same model, whose best weights to begin with.
        resume: a ``.ckpt`` of a run with the same arguments; the numbers are those of a run without the stop.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    corpus.vocabulary.save(out)
    if start is not None:
        load_model(model, Path(start) / "best.safetensors")
    if compile:
        model.compile()
    history = History()
    trainer = L.Trainer(
        max_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        val_check_interval=recipe.eval_every or None,
        check_val_every_n_epoch=None if recipe.eval_every else 1,
        gradient_clip_val=recipe.clip or None,
        precision=precision,
        devices=devices,
        strategy=strategy,
        logger=TensorBoardLogger(out, name="tensorboard", version=""),
        plugins=[SafetensorsCheckpointIO()],
        callbacks=[
            *([NTASGD(recipe.nonmono)] if recipe.nonmono else []),
            *callbacks,
            history,
            *([ValidateLast()] if recipe.max_steps or recipe.eval_every else []),
            LearningRateMonitor("step"),
            RandomState(),
            ModelCheckpoint(out, "best", monitor="val_loss", enable_version_counter=False),
            # Not save_last, which is the last that was also the best
            ModelCheckpoint(out, "last", enable_version_counter=False),
            SaveOnInterrupt(out / "interrupted.ckpt"),
            RichProgressBar(refresh_rate=10),
        ],
        enable_model_summary=False,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
    )
    data = LanguageModelData(
        corpus, recipe.batch_size, recipe.bptt, random_length=recipe.random_length, seed=recipe.seed
    )
    with use_backend(backend):
        trainer.fit(module or LanguageModel(model, **recipe.optimization()), data, ckpt_path=resume)
    if trainer.is_global_zero:
        plot_losses({type(model).__name__: history}, out / "losses.png")
    return history


def strategy_for_unused(devices: int | str) -> str:
    """``strategy`` for a model of whose parameters some have no gradient in some steps, which plain DDP refuses.

    A search detaches its architecture, and hard samples skip branches; compressors wait for something to compress.
    """
    several = devices != 1 and (devices != "auto" or torch.cuda.device_count() > 1)
    return "ddp_find_unused_parameters_true" if several else "auto"


class ValidateLast(L.Callback):
    """A validation, and with it the checkpoints, after the last step too, wherever it lies between two others."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = pl_module.total_steps()  # type: ignore[operator]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.last:
            trainer.should_stop = True  # after the validation that this asks for

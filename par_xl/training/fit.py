"""One training run of a language model: everything between a model and its files on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from par_xl.data import Corpus
from par_xl.ops import use_backend
from par_xl.training.checkpoint import RandomState, SafetensorsCheckpointIO, SaveOnInterrupt
from par_xl.training.data_module import LanguageModelData
from par_xl.training.history import History, plot_losses
from par_xl.training.language_model import LanguageModel
from par_xl.training.nt_asgd import NTASGD


@dataclass
class Recipe:
    """How to train a model.

    Attributes:
        epochs: passes over the train split.
        batch_size: streams on each device.
        bptt: length of a window.
        random_length: windows of random length (awd-lstm-lm).
        optimizer, lr, weight_decay, schedule: as in :class:`LanguageModel`.
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
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: Literal["constant", "one-cycle"] = "constant"
    clip: float = 0.0
    nonmono: int = 0
    seed: int = 0
    model: dict[str, Any] = field(default_factory=dict)


def fit(
    model: nn.Module,
    corpus: Corpus,
    recipe: Recipe,
    out: str | Path,
    *,
    callbacks: Sequence[L.Callback] = (),
    backend: str = "auto",
    precision: Any = "32-true",
    devices: int | str = "auto",
    compile: bool = False,
    resume: str | Path | None = None,
) -> History:
    """Train ``model`` in place and leave ``best`` and ``last`` (``.ckpt`` and ``.safetensors``), ``losses.png``,
    ``vocabulary.txt`` and TensorBoard's events in ``out``; after Ctrl-C also ``interrupted.ckpt``.

    Args:
        model: as :class:`LanguageModel` wants it.
        callbacks: the model's own, :class:`RNNTrainer` for instance.
        backend: of the ops; see :func:`par_xl.use_backend`.
        precision, devices: as in ``lightning.Trainer``.
        compile: ``torch.compile`` the model.
        resume: a ``.ckpt`` of a run with the same arguments; the numbers are those of a run without the stop.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    corpus.vocabulary.save(out)
    if compile:
        model.compile()
    history = History()
    trainer = L.Trainer(
        max_epochs=recipe.epochs,
        gradient_clip_val=recipe.clip or None,
        precision=precision,
        devices=devices,
        logger=TensorBoardLogger(out, name="tensorboard", version=""),
        plugins=[SafetensorsCheckpointIO()],
        callbacks=[
            *([NTASGD(recipe.nonmono)] if recipe.nonmono else []),
            *callbacks,
            history,
            RandomState(),
            ModelCheckpoint(out, "best", monitor="val_loss", save_last=True, enable_version_counter=False),
            SaveOnInterrupt(out / "interrupted.ckpt"),
            RichProgressBar(refresh_rate=10),
        ],
        enable_model_summary=False,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
    )
    module = LanguageModel(
        model,
        optimizer=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        schedule=recipe.schedule,
    )
    data = LanguageModelData(
        corpus, recipe.batch_size, recipe.bptt, random_length=recipe.random_length, seed=recipe.seed
    )
    with use_backend(backend):
        trainer.fit(module, data, ckpt_path=resume)
    if trainer.is_global_zero:
        plot_losses({type(model).__name__: history}, out / "losses.png")
    return history

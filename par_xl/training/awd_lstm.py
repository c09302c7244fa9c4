"""Recipes for AWD-LSTM, and a run by one of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import lightning as L

from par_xl.data import Corpus
from par_xl.models import AWDLSTM, AWDLSTMConfig
from par_xl.training.fit import Recipe, fit
from par_xl.training.history import History
from par_xl.training.rnn_trainer import RNNTrainer


@dataclass
class AWDLSTMRecipe(Recipe):
    """A recipe, the weights of AR and TAR, and the model's options (fields of :class:`AWDLSTMConfig`)."""

    config_class: ClassVar[type] = AWDLSTMConfig
    alpha: float = 2.0
    beta: float = 1.0


_NO_DROPOUT = dict(dropout_hidden=0.0, dropout_input=0.0, dropout_embedding=0.0, weight_drop=0.0)
_FASTBOOK = AWDLSTMRecipe(epochs=15, batch_size=64, bptt=16, lr=1e-2, weight_decay=0.1, schedule="one-cycle")

RECIPES = {
    # LMModel7 of fastbook, chapter 12: TextLearner(..., wd=0.1).fit_one_cycle(15, 1e-2)
    "fastbook": replace(_FASTBOOK, model=dict(d_model=64, d_hidden=64, n_layers=2, dropout=0.4, **_NO_DROPOUT)),
    # The same, wider and with the other dropouts of AWD-LSTM
    "human-numbers": replace(
        _FASTBOOK,
        epochs=20,
        model=dict(
            d_model=128,
            d_hidden=128,
            n_layers=2,
            dropout=0.4,
            dropout_hidden=0.2,
            dropout_input=0.0,
            dropout_embedding=0.0,
            weight_drop=0.2,
        ),
    ),
    # awd-lstm-lm: main.py --epochs 750 --data data/wikitext-2 --dropouth 0.2
    "wikitext-2": AWDLSTMRecipe(
        epochs=750,
        batch_size=80,
        bptt=70,
        random_length=True,
        optimizer="sgd",
        lr=30.0,
        weight_decay=1.2e-6,
        clip=0.25,
        nonmono=5,
        model=dict(dropout_hidden=0.2),
    ),
}


def train_awd_lstm(corpus: Corpus, recipe: AWDLSTMRecipe, out: str | Path, **options: Any) -> tuple[AWDLSTM, History]:
    """Seed, build and train; ``options`` are those of :func:`fit`."""
    L.seed_everything(recipe.seed, verbose=False)
    model = AWDLSTM(AWDLSTMConfig(vocab_size=len(corpus.vocabulary), **recipe.model))
    callbacks = [RNNTrainer(recipe.bptt, recipe.alpha, recipe.beta)]
    return model, fit(model, corpus, recipe, out, callbacks=callbacks, **options)

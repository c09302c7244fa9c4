"""Training with Lightning: modules, callbacks and recipes. Needs the extra ``par_xl[train]``."""

from par_xl.training.awd_lstm import RECIPES, AWDLSTMRecipe, override, train_awd_lstm
from par_xl.training.checkpoint import RandomState, SafetensorsCheckpointIO, SaveOnInterrupt
from par_xl.training.data_module import LanguageModelData
from par_xl.training.fit import Recipe, fit
from par_xl.training.history import History, plot_losses
from par_xl.training.language_model import LanguageModel
from par_xl.training.nt_asgd import NTASGD
from par_xl.training.rnn_trainer import RNNTrainer

__all__ = [
    "RECIPES",
    "AWDLSTMRecipe",
    "History",
    "LanguageModel",
    "LanguageModelData",
    "NTASGD",
    "RNNTrainer",
    "RandomState",
    "Recipe",
    "SafetensorsCheckpointIO",
    "SaveOnInterrupt",
    "fit",
    "override",
    "plot_losses",
    "train_awd_lstm",
]

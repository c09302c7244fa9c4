"""Training with Lightning: modules, callbacks and recipes. Needs the extra ``par_xl[train]``."""

from collections.abc import Callable
from typing import Any

from par_xl.training.awd_lstm import RECIPES, AWDLSTMRecipe, train_awd_lstm
from par_xl.training.checkpoint import RandomState, SafetensorsCheckpointIO, SaveOnInterrupt
from par_xl.training.compressive import COMPRESSIVE_RECIPES, CompressiveRecipe, train_compressive
from par_xl.training.data_module import LanguageModelData
from par_xl.training.fit import Recipe, fit
from par_xl.training.history import History, plot_losses
from par_xl.training.language_model import LanguageModel
from par_xl.training.nt_asgd import NTASGD
from par_xl.training.options import override, read_option
from par_xl.training.rnn_trainer import RNNTrainer
from par_xl.training.saved import evaluate, load_run
from par_xl.training.transformer_xl import TRANSFORMER_XL_RECIPES, TransformerXLRecipe, train_transformer_xl

# What `par-xl train NAME` knows: the recipes, and the function that runs one.
TRAININGS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "awd-lstm": (RECIPES, train_awd_lstm),
    "compressive": (COMPRESSIVE_RECIPES, train_compressive),
    "transformer-xl": (TRANSFORMER_XL_RECIPES, train_transformer_xl),
}

__all__ = [
    "COMPRESSIVE_RECIPES",
    "NTASGD",
    "RECIPES",
    "TRAININGS",
    "TRANSFORMER_XL_RECIPES",
    "AWDLSTMRecipe",
    "CompressiveRecipe",
    "History",
    "LanguageModel",
    "LanguageModelData",
    "RNNTrainer",
    "RandomState",
    "Recipe",
    "SafetensorsCheckpointIO",
    "SaveOnInterrupt",
    "TransformerXLRecipe",
    "evaluate",
    "fit",
    "load_run",
    "override",
    "plot_losses",
    "read_option",
    "train_awd_lstm",
    "train_compressive",
    "train_transformer_xl",
]

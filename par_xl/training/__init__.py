"""Training with Lightning: modules, callbacks and recipes. Needs the extra ``par_xl[train]``."""

from collections.abc import Callable
from typing import Any

from par_xl.training.architecture_history import ArchitectureHistory, StopWhenStable
from par_xl.training.architecture_pictures import animate_architecture, plot_architecture
from par_xl.training.awd_lstm import RECIPES, AWDLSTMRecipe, train_awd_lstm
from par_xl.training.checkpoint import RandomState, SafetensorsCheckpointIO, SaveOnInterrupt
from par_xl.training.clip_apart import ClipApart
from par_xl.training.compressive import COMPRESSIVE_RECIPES, CompressiveRecipe, train_compressive
from par_xl.training.data_module import LanguageModelData
from par_xl.training.fit import Recipe, fit
from par_xl.training.history import History, plot_losses
from par_xl.training.language_model import LanguageModel
from par_xl.training.latency import LatencyPenalty, block_seconds, measure_blocks
from par_xl.training.nt_asgd import NTASGD
from par_xl.training.options import override, read_option
from par_xl.training.par import PAR_RECIPES, ParRecipe, train_par
from par_xl.training.rnn_trainer import RNNTrainer
from par_xl.training.saved import evaluate, load_run, save_run
from par_xl.training.schedules import rate_schedule, temperature_at
from par_xl.training.search import SEARCH_RECIPES, ArchitectureSearch, SearchRecipe, search_par
from par_xl.training.transformer_xl import TRANSFORMER_XL_RECIPES, TransformerXLRecipe, train_transformer_xl

# What `par-xl train NAME` knows: the recipes, and the function that runs one.
TRAININGS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "awd-lstm": (RECIPES, train_awd_lstm),
    "compressive": (COMPRESSIVE_RECIPES, train_compressive),
    "par": (PAR_RECIPES, train_par),
    "par-supernet": (SEARCH_RECIPES, search_par),
    "transformer-xl": (TRANSFORMER_XL_RECIPES, train_transformer_xl),
}

__all__ = [
    "AWDLSTMRecipe",
    "ArchitectureHistory",
    "ArchitectureSearch",
    "COMPRESSIVE_RECIPES",
    "ClipApart",
    "CompressiveRecipe",
    "History",
    "LanguageModel",
    "LanguageModelData",
    "LatencyPenalty",
    "NTASGD",
    "PAR_RECIPES",
    "ParRecipe",
    "RECIPES",
    "RNNTrainer",
    "RandomState",
    "Recipe",
    "SEARCH_RECIPES",
    "SafetensorsCheckpointIO",
    "SaveOnInterrupt",
    "SearchRecipe",
    "StopWhenStable",
    "TRAININGS",
    "TRANSFORMER_XL_RECIPES",
    "TransformerXLRecipe",
    "animate_architecture",
    "block_seconds",
    "evaluate",
    "fit",
    "load_run",
    "measure_blocks",
    "override",
    "plot_architecture",
    "plot_losses",
    "rate_schedule",
    "read_option",
    "save_run",
    "search_par",
    "temperature_at",
    "train_awd_lstm",
    "train_compressive",
    "train_par",
    "train_transformer_xl",
]

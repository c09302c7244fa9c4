"""Reference models built from ``par_xl.nn``, all called as ``model(tokens, targets=None, memory=None)``."""

from par_xl.models.awd_lstm import AWDLSTM, AWDLSTMConfig, AWDLSTMOutput
from par_xl.models.compressive import CompressiveOutput, CompressiveTransformer
from par_xl.models.compressive_config import CompressiveConfig
from par_xl.models.output import ModelOutput
from par_xl.models.par import ParSuperNet, ParTransformerXL
from par_xl.models.par_config import ParConfig, par_pattern
from par_xl.models.transformer_xl import TransformerXL
from par_xl.models.transformer_xl_config import TransformerXLConfig

__all__ = [
    "AWDLSTM",
    "AWDLSTMConfig",
    "AWDLSTMOutput",
    "CompressiveConfig",
    "CompressiveOutput",
    "CompressiveTransformer",
    "ModelOutput",
    "ParConfig",
    "ParSuperNet",
    "ParTransformerXL",
    "TransformerXL",
    "TransformerXLConfig",
    "par_pattern",
]

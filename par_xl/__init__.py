"""Fused Triton, CUDA and C++ kernels for long-memory language models in PyTorch.

Importing ``par_xl`` imports torch and the compiled extension, and neither triton nor the training stack;
``par_xl.models``, ``par_xl.data`` and ``par_xl.training`` are imported when they are first named.
"""

import importlib
from types import ModuleType

from par_xl import nn
from par_xl.nn import accelerate
from par_xl.ops import (
    AdaptiveNLL,
    ArTarLoss,
    Compress,
    Dropout,
    Mix,
    RelAttention,
    UpdateMemory,
    adaptive_nll,
    ar_tar_loss,
    backends,
    build_info,
    compress,
    dropout,
    mix,
    rel_attention,
    update_memory,
    use_backend,
)

__version__ = "0.1.0"
__all__ = [
    "AdaptiveNLL",
    "ArTarLoss",
    "Compress",
    "Mix",
    "Dropout",
    "RelAttention",
    "UpdateMemory",
    "accelerate",
    "adaptive_nll",
    "ar_tar_loss",
    "backends",
    "build_info",
    "compress",
    "mix",
    "dropout",
    "nn",
    "rel_attention",
    "update_memory",
    "use_backend",
]


def __getattr__(name: str) -> ModuleType:
    if name in ("models", "data", "training"):
        return importlib.import_module(f"par_xl.{name}")
    raise AttributeError(f"module 'par_xl' has no attribute {name!r}")

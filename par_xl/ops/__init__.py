"""The fused operations, one file per op.

Each file reads top to bottom: maths, reference, schema and fake, backends, autograd.Function, public function.
"""

from par_xl.ops.adaptive_softmax import AdaptiveNLL, adaptive_nll
from par_xl.ops.ar_tar import ArTarLoss, ar_tar_loss
from par_xl.ops.compressed_attention import CompressedAttention, compressed_attention
from par_xl.ops.compression import Compress, compress
from par_xl.ops.memory_update import UpdateMemory, update_memory
from par_xl.ops.mix import Mix, mix
from par_xl.ops.registry import backends, build_info, use_backend
from par_xl.ops.rel_attention import RelAttention, rel_attention

__all__ = [
    "AdaptiveNLL",
    "ArTarLoss",
    "Compress",
    "CompressedAttention",
    "Mix",
    "RelAttention",
    "UpdateMemory",
    "adaptive_nll",
    "ar_tar_loss",
    "backends",
    "build_info",
    "compress",
    "compressed_attention",
    "mix",
    "rel_attention",
    "update_memory",
    "use_backend",
]

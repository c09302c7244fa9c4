"""Drop-in modules built from the ops."""

from par_xl.nn.acceleration import accelerate
from par_xl.nn.adaptive_cutoffs import adaptive_cutoffs
from par_xl.nn.adaptive_embedding import AdaptiveEmbedding
from par_xl.nn.adaptive_softmax import AdaptiveLogSoftmaxWithLoss, ProjectedAdaptiveLogSoftmax, SplitSoftmax
from par_xl.nn.compression_losses import (
    AttentionReconstructionLoss,
    AutoEncodingLoss,
    attention_reconstruction_loss,
    auto_encoding_loss,
    reduce_layers,
)
from par_xl.nn.compressive_memory import CompressiveMemory, Compressor
from par_xl.nn.dropout import Dropout, EmbeddingDropout, LockedDropout, WeightDrop
from par_xl.nn.positions import sinusoids
from par_xl.nn.regularization import ActivationRegularization
from par_xl.nn.rel_attention import MultiHeadAttn, RelLearnableMultiHeadAttn, RelPartialLearnableMultiHeadAttn
from par_xl.nn.rel_position_attention import RelPositionMultiHeadAttention
from par_xl.nn.relaxed_one_hot import RelaxedOneHot

__all__ = [
    "ActivationRegularization",
    "AdaptiveEmbedding",
    "AdaptiveLogSoftmaxWithLoss",
    "AttentionReconstructionLoss",
    "AutoEncodingLoss",
    "CompressiveMemory",
    "Compressor",
    "Dropout",
    "EmbeddingDropout",
    "LockedDropout",
    "MultiHeadAttn",
    "ProjectedAdaptiveLogSoftmax",
    "RelLearnableMultiHeadAttn",
    "RelPartialLearnableMultiHeadAttn",
    "RelPositionMultiHeadAttention",
    "RelaxedOneHot",
    "SplitSoftmax",
    "WeightDrop",
    "accelerate",
    "adaptive_cutoffs",
    "attention_reconstruction_loss",
    "auto_encoding_loss",
    "reduce_layers",
    "sinusoids",
]

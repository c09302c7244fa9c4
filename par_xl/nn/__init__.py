"""Drop-in modules built from the ops."""

from par_xl.nn.adaptive_cutoffs import adaptive_cutoffs
from par_xl.nn.adaptive_softmax import AdaptiveLogSoftmaxWithLoss, ProjectedAdaptiveLogSoftmax
from par_xl.nn.dropout import EmbeddingDropout, LockedDropout, WeightDrop
from par_xl.nn.regularization import ActivationRegularization

__all__ = [
    "ActivationRegularization",
    "AdaptiveLogSoftmaxWithLoss",
    "EmbeddingDropout",
    "LockedDropout",
    "ProjectedAdaptiveLogSoftmax",
    "WeightDrop",
    "adaptive_cutoffs",
]

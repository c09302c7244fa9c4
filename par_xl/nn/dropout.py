"""Dropout on :func:`par_xl.dropout`, and the three of AWD-LSTM: over activations, recurrent weights and words.

Merity, Keskar, Socher: Regularizing and Optimizing LSTM Language Models (arXiv 1708.02182), section 4.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from par_xl.ops.dropout import dropout


def _check_probability(p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a probability, between 0 and 1, not {p}")
    return p


class Dropout(nn.Dropout):
    """``nn.Dropout(p)``, or with ``relu`` ``nn.Sequential(nn.ReLU(), nn.Dropout(p))``, on :func:`par_xl.dropout`."""

    def __init__(self, p: float = 0.5, *, relu: bool = False):
        super().__init__(p)
        self.relu = relu

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, relu=self.relu)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}"


class LockedDropout(nn.Module):
    """Variational dropout: one mask for each sequence and feature, the same at every time step.

    ``y[b, t, i] = x[b, t, i] * m[b, i] / (1 - p)`` with ``m ~ Bernoulli(1 - p)``; ``y = x`` in evaluation. Any floating
    dtype, kept. Equivalent to ``nn.Dropout1d(p)(x.transpose(1, 2)).transpose(1, 2)`` for ``x (B, T, d)``.

    Args:
        p: probability of dropping a feature.
        batch_first: ``x`` is ``(B, T, d)``; otherwise ``(T, B, d)``.

    Source: awd-lstm-lm locked_dropout.py; fastai's ``RNNDropout``; Gal and Ghahramani (arXiv 1512.05287).
    """

    def __init__(self, p: float = 0.5, batch_first: bool = True):
        super().__init__()
        self.p, self.batch_first = _check_probability(p), batch_first

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        batch, features = x.shape[0 if self.batch_first else 1], x.shape[2]
        shape = (batch, 1, features) if self.batch_first else (1, batch, features)
        return x * F.dropout(x.new_ones(shape), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, batch_first={self.batch_first}"


class EmbeddingDropout(nn.Embedding):
    """An embedding that drops whole words: every occurrence of a dropped word in the batch is the zero vector.

    ``y[b, t] = weight[x[b, t]] * m[x[b, t]] / (1 - p)`` with ``m (num_embeddings,) ~ Bernoulli(1 - p)``; evaluation is
    ``nn.Embedding``. Equivalent to ``F.embedding(x, weight * mask)`` without a second table.

    Args:
        num_embeddings, embedding_dim: as in ``nn.Embedding``, as are further keyword arguments and the state dict.
        p: probability of dropping a word.

    Source: awd-lstm-lm embed_regularize.py; fastai's ``EmbeddingDropout``.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, p: float = 0.1, **kwargs: Any):
        super().__init__(num_embeddings, embedding_dim, **kwargs)
        self.p = _check_probability(p)

    def forward(self, input: Tensor) -> Tensor:
        embedded = super().forward(input)
        if not self.training or self.p == 0:
            return embedded
        mask = F.dropout(self.weight.new_ones(self.num_embeddings, 1), self.p)
        return embedded * F.embedding(input, mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"


class WeightDrop(nn.Module):
    """DropConnect on the recurrent matrices of an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``: one mask for all time steps.

    The call is the wrapped module's, ``(input, hx=None)`` to ``(output, hx)``, with ``F.dropout(weight, p)`` instead of
    each weight named; evaluation uses the weights as they are. Packed sequences are not supported. The parameter
    ``module.weight_hh_l0`` becomes ``module.weight_hh_l0_raw``, as in awd-lstm-lm.

    Args:
        module: the recurrent module, which is changed in place.
        p: probability of dropping a weight.
        weights: names of the weights to drop.

    Nothing is assigned to the module at run time, so nothing is left in it for ``deepcopy``, DDP or ``functional_call``
    to trip over: the dropped weights go straight into ``torch.lstm``, which is all that ``nn.LSTM`` calls. Under
    ``torch.compile`` it is a graph break, as ``nn.LSTM`` is.

    Source: awd-lstm-lm weight_drop.py; Wan et al. 2013.
    """

    def __init__(self, module: nn.RNNBase, p: float = 0.5, weights: Sequence[str] = ("weight_hh_l0",)):
        super().__init__()
        if not isinstance(module, nn.RNNBase):
            raise TypeError(f"module must be an nn.LSTM, nn.GRU or nn.RNN, not {type(module).__name__}")
        self.module, self.p, self.weights = module, _check_probability(p), tuple(weights)
        self._names = [name for name, _ in module.named_parameters()]  # in the order in which torch.lstm takes them
        for name in self.weights:
            if name not in self._names:
                raise ValueError(f"weights: the module has no {name!r}; it has {', '.join(self._names)}")
            raw = getattr(module, name)
            delattr(module, name)
            module.register_parameter(f"{name}_raw", raw)

    def _weight(self, name: str) -> Tensor:
        if name not in self.weights:
            return getattr(self.module, name)
        return dropout(getattr(self.module, f"{name}_raw"), self.p, self.training)

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        rnn = self.module
        weights = [self._weight(name) for name in self._names]
        if input.is_cuda:
            weights = self._in_one_chunk(weights)
        if hx is None:
            hx = input.new_zeros(rnn.get_expected_hidden_size(input, None))
            if isinstance(rnn, nn.LSTM):
                hx = hx, input.new_zeros(rnn.get_expected_cell_size(input, None))
        run = getattr(torch, rnn.mode.lower())  # torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu
        flags = rnn.bias, rnn.num_layers, rnn.dropout, self.training, rnn.bidirectional, rnn.batch_first
        output, *state = run(input, hx, weights, *flags)
        return output, tuple(state) if isinstance(rnn, nn.LSTM) else state[0]

    def _in_one_chunk(self, weights: list[Tensor]) -> list[Tensor]:
        """Copy the weights into one buffer in cuDNN's layout, all matrices before all biases.

        cuDNN wants one buffer. From separate weights it makes one at every call too, but warns each time that they
        "are not part of single contiguous chunk of memory"; ``flatten_parameters`` cannot hold what changes every step.
        """
        order = sorted(range(len(weights)), key=lambda i: self._names[i].startswith("bias"))
        flat = torch.cat([weights[i].flatten() for i in order])
        views = flat.split([weights[i].numel() for i in order])
        chunk = dict(zip(order, views, strict=True))
        return [chunk[i].view_as(weight) for i, weight in enumerate(weights)]

    def extra_repr(self) -> str:
        return f"p={self.p}, weights={self.weights}"

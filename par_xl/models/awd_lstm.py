"""AWD-LSTM: Merity, Keskar, Socher: Regularizing and Optimizing LSTM Language Models (arXiv 1708.02182)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from par_xl.models.generation import continue_text
from par_xl.models.output import ModelOutput, mean_nll
from par_xl.nn.adaptive_embedding import cluster_ends
from par_xl.nn.adaptive_softmax import SplitSoftmax
from par_xl.nn.dropout import EmbeddingDropout, LockedDropout, WeightDrop

LSTMMemory = list[tuple[Tensor, Tensor]]


@dataclass
class AWDLSTMConfig:
    """Sizes and dropout probabilities; the defaults are those of awd-lstm-lm.

    Attributes:
        vocab_size: V.
        d_model: width of the embedding, and of the last layer if the weights are tied.
        d_hidden: width of the other layers.
        n_layers: number of LSTM layers.
        dropout: on the last layer's output.
        dropout_hidden: on the output of the other layers.
        dropout_input: on the embedded words.
        dropout_embedding: of whole words.
        weight_drop: of the recurrent weights.
        tie_weights: the embedding is also the output layer's weight.
        cutoffs: where the tails of an adaptive softmax start (upstream's splits); empty is a full softmax.
    """

    vocab_size: int
    d_model: int = 400
    d_hidden: int = 1150
    n_layers: int = 3
    dropout: float = 0.4
    dropout_hidden: float = 0.3
    dropout_input: float = 0.65
    dropout_embedding: float = 0.1
    weight_drop: float = 0.5
    tie_weights: bool = True
    cutoffs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.cutoffs = tuple(cluster_ends(self.cutoffs, self.vocab_size)[:-1])  # a list, where it was JSON


@dataclass(kw_only=True)
class AWDLSTMOutput(ModelOutput):
    """``memory`` is ``[(h, c)]`` by layer, each ``(1, B, width)``; ``hidden`` is ``outputs[-1]``.

    Attributes:
        raw_outputs: each layer's output before dropout, ``(B, T, width)``: TAR is on the last.
        outputs: each layer's output after dropout: AR is on the last.
    """

    memory: LSTMMemory
    raw_outputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()


# Upstream's option -> the field of AWDLSTMConfig.
_SALESFORCE_OPTIONS = {
    "emsize": "d_model",
    "nhid": "d_hidden",
    "nlayers": "n_layers",
    "dropout": "dropout",
    "dropouth": "dropout_hidden",
    "dropouti": "dropout_input",
    "dropoute": "dropout_embedding",
    "wdrop": "weight_drop",
    "tied": "tie_weights",
    "splits": "cutoffs",
}
_FASTAI_OPTIONS = {
    "emb_sz": "d_model",
    "n_hid": "d_hidden",
    "n_layers": "n_layers",
    "output_p": "dropout",
    "hidden_p": "dropout_hidden",
    "input_p": "dropout_input",
    "embed_p": "dropout_embedding",
    "weight_p": "weight_drop",
    "tie_weights": "tie_weights",
}
# fastai's awd_lstm_lm_config
_FASTAI_DEFAULTS = dict(
    emb_sz=400, n_hid=1152, n_layers=3, output_p=0.1, hidden_p=0.15, input_p=0.25, embed_p=0.02, weight_p=0.2
)


class AWDLSTM(nn.Module):
    """The AWD-LSTM language model, batch first.

        output = model(tokens, targets, memory)     # tokens, targets: int64 (B, T); memory: the last output's, or None
        output.loss.backward()
        memory = output.memory                      # already detached: truncated backpropagation through time

    embedding with word dropout -> locked dropout -> n_layers x (LSTM with weight drop -> locked dropout) -> linear.

    The parameters have the names of awd-lstm-lm: ``encoder.weight``, ``rnns.{i}.module.weight_hh_l0_raw``,
    ``rnns.{i}.module.{weight_ih_l0,bias_ih_l0,bias_hh_l0}``, ``decoder.{weight,bias}``; with cutoffs also
    its criterion's, ``decoder.{tail_vectors,tail_bias}``.

    Source: https://github.com/salesforce/awd-lstm-lm, model.py.
    """

    def __init__(self, config: AWDLSTMConfig):
        super().__init__()
        self.config = config
        last = config.d_model if config.tie_weights else config.d_hidden
        self.widths = [*[config.d_hidden] * (config.n_layers - 1), last]
        self.encoder = EmbeddingDropout(config.vocab_size, config.d_model, config.dropout_embedding)
        self.rnns = nn.ModuleList(
            WeightDrop(nn.LSTM(before, after, batch_first=True), config.weight_drop)
            for before, after in zip([config.d_model, *self.widths], self.widths, strict=False)
        )
        self.input_dropout = LockedDropout(config.dropout_input)
        self.hidden_dropout = LockedDropout(config.dropout_hidden)
        self.output_dropout = LockedDropout(config.dropout)
        self.decoder = SplitSoftmax(last, config.vocab_size, config.cutoffs)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        if config.tie_weights:
            self.decoder.weight = self.encoder.weight

    def init_memory(self, batch_size: int) -> LSTMMemory:
        """The state before the first token: zeros, ``[(h, c)]`` by layer, each ``(1, batch_size, width)``."""
        zeros = self.encoder.weight.new_zeros
        return [(zeros(1, batch_size, width), zeros(1, batch_size, width)) for width in self.widths]

    def forward(self, tokens: Tensor, targets: Tensor | None = None, memory: LSTMMemory | None = None) -> AWDLSTMOutput:
        """``tokens`` and ``targets`` int64 ``(B, T)``; see :class:`AWDLSTMOutput`. Gradients stop at ``memory``.

        Raises:
            ValueError: ``memory`` is for another batch size.
        """
        if memory is None:
            memory = self.init_memory(len(tokens))
        elif memory[0][0].shape[1] != len(tokens):
            raise ValueError(f"memory is for a batch of {memory[0][0].shape[1]}, tokens are a batch of {len(tokens)}")

        raw_outputs, outputs, after = [], [], []
        hidden = self.input_dropout(self.encoder(tokens))
        for i, (rnn, state) in enumerate(zip(self.rnns, memory, strict=True)):
            raw, (h, c) = rnn(hidden, state)
            dropout = self.output_dropout if i == len(self.rnns) - 1 else self.hidden_dropout
            hidden = dropout(raw)
            after.append((h.detach(), c.detach()))
            raw_outputs.append(raw)
            outputs.append(hidden)

        output = AWDLSTMOutput(hidden=hidden, memory=after, raw_outputs=tuple(raw_outputs), outputs=tuple(outputs))
        if targets is not None:
            output.nll = self.decoder(hidden, targets)
            output.loss = mean_nll(output.nll, targets)
        return output

    def log_prob(self, hidden: Tensor) -> Tensor:
        """The log-probabilities of the next token, ``(B, T, d)`` to ``(B, T, V)``."""
        return self.decoder.log_prob(hidden)

    def predict(self, hidden: Tensor) -> Tensor:
        """The most probable next token, int64 ``(B, T)``, from ``hidden (B, T, d)``."""
        return self.decoder.predict(hidden)

    def generate(
        self,
        prompt: Tensor,
        n_tokens: int,
        *,
        memory: LSTMMemory | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a text token by token; as :meth:`par_xl.models.TransformerXL.generate`."""
        return continue_text(self, lambda: _Decoder(self, memory), prompt, n_tokens, temperature, top_k, generator)

    @classmethod
    def from_salesforce(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Mapping[str, Any],
        criterion: Mapping[str, Tensor] | None = None,
    ) -> "AWDLSTM":
        """A model with the weights of awd-lstm-lm.

        Args:
            state_dict: that of upstream's ``RNNModel`` (its checkpoints pickle the module; take ``.state_dict()``).
            config: upstream's options (``emsize``, ``nhid``, ``nlayers``, ``dropout``, ``dropouth``, ...); those that
                are missing have upstream's defaults. ``splits`` are its criterion's cutoffs; by default upstream's
                for a vocabulary of that size: none up to 75,000 words.
            criterion: the state dict of upstream's ``SplitCrossEntropyLoss``, where there are splits.

        Raises:
            ValueError: the model is a GRU or a QRNN, or the criterion is missing.
        """
        if config.get("model", "LSTM") != "LSTM":
            raise ValueError(f"config['model'] must be 'LSTM', not {config['model']!r}")
        splits = config.get("splits", _salesforce_splits(len(state_dict["encoder.weight"])))
        if splits and criterion is None:
            raise ValueError(f"criterion must be given: the softmax is split at {splits}")
        tails = {f"decoder.{name}": weight for name, weight in (criterion or {}).items()}
        return cls._from_upstream({**state_dict, **tails}, {**config, "splits": splits}, _SALESFORCE_OPTIONS)

    @classmethod
    def from_fastai(cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> "AWDLSTM":
        """A model with the weights of fastai's language model on ``AWD_LSTM``.

        Args:
            state_dict: that of ``learn.model`` (``SequentialRNN(AWD_LSTM, LinearDecoder)``).
            config: fastai's (``emb_sz``, ``n_hid``, ``n_layers``, ``output_p``, ...); those that are missing are those
                of ``awd_lstm_lm_config``.

        Raises:
            ValueError: the model is bidirectional.
        """
        if config.get("bidir"):
            raise ValueError("config['bidir'] must be False: a language model reads in one direction")
        state_dict = {re.sub(r"^[01]\.", "", name): weight for name, weight in state_dict.items()}
        state_dict.pop("encoder_dp.emb.weight", None)  # the encoder under its second name
        return cls._from_upstream(state_dict, {**_FASTAI_DEFAULTS, **config}, _FASTAI_OPTIONS)

    @classmethod
    def _from_upstream(
        cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any], options: Mapping[str, str]
    ) -> "AWDLSTM":
        fields = {field: config[option] for option, field in options.items() if option in config}
        model = cls(AWDLSTMConfig(vocab_size=len(state_dict["encoder.weight"]), **fields))
        # The recurrent weights are on the wrapper (fastai), in the wrapped module (awd-lstm-lm), or, where they were
        # trained without weight drop, under the LSTM's own name. A plain name beside a raw one is its dropped copy.
        named = sorted(state_dict.items(), key=lambda item: item[0].endswith("_raw"))
        renamed = {
            re.sub(r"^(rnns\.\d+\.)(?:module\.)?(\w+?)(?:_raw)?$", _recurrent_name, name): weight
            for name, weight in named
        }
        model.load_state_dict(renamed)
        return model


def _recurrent_name(match: re.Match) -> str:
    layer, name = match.groups()
    return f"{layer}module.{name}" + ("_raw" if name == "weight_hh_l0" else "")


def _salesforce_splits(n_words: int) -> tuple[int, ...]:
    """Those of upstream's main.py."""
    if n_words > 500_000:
        return 4200, 35000, 180000
    return (2800, 20000, 76000) if n_words > 75_000 else ()


class _Decoder:
    """Feeds tokens to the model and keeps its state."""

    def __init__(self, model: AWDLSTM, memory: LSTMMemory | None):
        self.model, self.memory = model, memory

    def step(self, tokens: Tensor) -> Tensor:
        output = self.model(tokens, memory=self.memory)
        self.memory = output.memory
        return output.hidden

"""Transformer-XL: Dai et al.: Attentive Language Models Beyond a Fixed-Length Context (arXiv 1901.02860)."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from par_xl.models import generation
from par_xl.models import transformer_xl_loading as loading
from par_xl.models.output import ModelOutput, mean_nll
from par_xl.models.transformer_xl_config import TransformerXLConfig
from par_xl.nn.adaptive_embedding import AdaptiveEmbedding
from par_xl.nn.adaptive_softmax import ProjectedAdaptiveLogSoftmax
from par_xl.nn.dropout import Dropout
from par_xl.nn.positions import distances, sinusoids
from par_xl.nn.rel_attention import MultiHeadAttn, RelLearnableMultiHeadAttn, RelPartialLearnableMultiHeadAttn

ATTENTION = (RelPartialLearnableMultiHeadAttn, RelLearnableMultiHeadAttn, MultiHeadAttn, MultiHeadAttn)
# What is added to a layer's input and memory, if anything, and the positions and biases that its attention takes.
LayerPositions = tuple[Tensor | None, tuple[Tensor | None, ...]]


class PositionwiseFF(nn.Module):
    """``layer_norm(x + CoreNet(x))``, or ``x + CoreNet(layer_norm(x))`` with ``pre_lnorm``; CoreNet: d, d_inner, d."""

    def __init__(self, config: TransformerXLConfig):
        super().__init__()
        self.CoreNet = nn.Sequential(
            nn.Linear(config.d_model, config.d_inner),
            nn.Identity(),  # upstream's ReLU, which is in the next module
            Dropout(config.dropout, relu=True),
            nn.Linear(config.d_inner, config.d_model),
            Dropout(config.dropout),
        )
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.pre_lnorm = config.pre_lnorm
        self.join: Any = torch.add  # as in MemoryAttention

    def forward(self, x: Tensor) -> Tensor:
        joined = self.join(x, self.branch(x))
        return joined if self.pre_lnorm else self.layer_norm(joined)

    def branch(self, x: Tensor) -> Tensor:
        """What the layer adds to ``x``."""
        return self.CoreNet(self.layer_norm(x) if self.pre_lnorm else x)


class DecoderLayer(nn.Module):
    """Attention over memory and segment, then the feed-forward; ``parts`` ("s", "f") says which of them there are."""

    def __init__(self, config: TransformerXLConfig, parts: str = "sf"):
        super().__init__()
        self.dec_attn: Any = None
        self.pos_ff: Any = None
        if "s" in parts:
            options: dict[str, Any] = {"untie_r": config.untie_r} if config.attn_type == 0 else {}
            self.dec_attn = ATTENTION[config.attn_type](
                config.n_head,
                config.d_model,
                config.d_head,
                config.dropout,
                config.dropatt,
                pre_lnorm=config.pre_lnorm,
                layer_norm_epsilon=config.layer_norm_epsilon,
                **options,
            )
        if "f" in parts:
            self.pos_ff = PositionwiseFF(config)

    def forward(self, x: Tensor, *positions: Tensor | None, mems: Tensor | None = None, **options: Any) -> Tensor:
        """``x (B, T, d)``, ``mems (B, M, d)`` and the attention's positions and options to ``(B, T, d)``."""
        if self.dec_attn is not None:
            x = self.dec_attn(x, *positions, mems=mems, **options)
        return x if self.pos_ff is None else self.pos_ff(x)


class TransformerXL(nn.Module):
    """The Transformer-XL language model, batch first.

        output = model(tokens, targets, memory)     # tokens, targets: int64 (B, T); memory: the last output's, or None
        output.loss.backward()
        memory = output.memory                      # already detached

    The memory is one tensor ``(n_layer, B, M, d)``: each layer's inputs at the last ``M <= mem_len`` steps, before any
    absolute positions are added to them (upstream adds those to what it stores, once for every segment).

    The parameters have kimiyoung's names, and of the head's columns the last belongs to the first tail, as upstream.

    Source: https://github.com/kimiyoung/transformer-xl, pytorch/mem_transformer.py.
    """

    def __init__(self, config: TransformerXLConfig):
        super().__init__()
        self.config = config
        c = config
        self.word_emb = AdaptiveEmbedding(c.vocab_size, c.d_embed, c.d_model, c.cutoffs, c.div_val)
        self.drop = Dropout(c.dropout)
        self.layers: Any = nn.ModuleList(self._make_layers())
        self.n_memory_layers = sum(layer.dec_attn is not None for layer in self.layers)
        self.crit = ProjectedAdaptiveLogSoftmax(
            c.vocab_size, c.d_embed, c.d_model, c.cutoffs, c.div_val, **self._shared()
        )
        by_layer: tuple[int, ...] = () if c.attn_type == 0 else (c.n_layer,)
        self.r_w_bias: Any = None
        self.r_r_bias: Any = None
        shares_biases = c.attn_type == 0 and not c.untie_r and self.n_memory_layers > 0
        if c.attn_type == 1 or shares_biases:
            self.r_w_bias = nn.Parameter(torch.empty(*by_layer, c.n_head, c.d_head))
        if shares_biases:
            self.r_r_bias = nn.Parameter(torch.empty(c.n_head, c.d_head))
        if c.attn_type == 1:
            self.r_emb = nn.Parameter(torch.empty(c.n_layer, c.max_klen, c.n_head, c.d_head))
            self.r_bias = nn.Parameter(torch.empty(c.n_layer, c.max_klen, c.n_head))
        elif c.attn_type == 3:
            self.r_emb = nn.Parameter(torch.empty(c.n_layer, c.max_klen, c.d_model))
        self._initialise()

    def _make_layers(self) -> Iterable[DecoderLayer]:
        return (DecoderLayer(self.config) for _ in range(self.config.n_layer))

    def _initialise(self) -> None:
        """Kimiyoung's: N(0, 0.02), layer norms N(1, 0.02), projections between widths N(0, 0.01), biases zero."""
        for name, parameter in self.named_parameters():
            if "layer_norm.weight" in name:
                nn.init.normal_(parameter, 1.0, 0.02)
            elif name.endswith(".bias") or name == "crit.cluster_bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, 0.0, 0.01 if "_projs." in name else 0.02)

    def _shared(self) -> dict[str, Any]:
        """The embedding's tables and projections that the output shares."""
        c, tables, projections = self.config, self.word_emb.emb_layers, self.word_emb.emb_projs
        shared: dict[str, Any] = {"weights": [table.weight for table in tables] if c.tie_weight else None}
        if len(projections) and any(c.tie_projs):
            tied = [*c.tie_projs, *[False] * len(c.cutoffs)][: len(c.cutoffs) + 1]
            by_cluster = projections if c.div_val > 1 else [projections[0]] * len(tied)
            shared["projections"] = [p if share else None for p, share in zip(by_cluster, tied, strict=True)]
        return shared

    def reset_lengths(self, **lengths: Any) -> None:
        """Change ``mem_len``, ``ext_len``, ``clamp_len`` or ``same_length``, for a longer memory in evaluation, say.

        A memory that is longer than the new ``mem_len`` is used once more and then cut.
        """
        unknown = set(lengths) - {"mem_len", "ext_len", "clamp_len", "same_length"}
        if unknown:
            raise ValueError(f"lengths are mem_len, ext_len, clamp_len and same_length, not {', '.join(unknown)}")
        self.config = replace(self.config, **lengths)

    @property
    def _table(self) -> Tensor:
        """A weight that every model has, of its dtype and on its device."""
        return self.word_emb.emb_layers[0].weight  # type: ignore[return-value]

    def init_memory(self, batch_size: int) -> Tensor:
        """The memory before the first token, ``(n_layer, B, 0 or mem_len, d)``; see ``config.memory_start``."""
        c, like = self.config, self._table
        steps = c.mem_len if c.memory_start == "zeros" else 0
        return torch.zeros(self.n_memory_layers, batch_size, steps, c.d_model, dtype=like.dtype, device=like.device)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, memory: Tensor | None = None) -> ModelOutput:
        """The hidden states, the loss and the next memory.

        Args:
            tokens: int64 ``(B, T)``; with ``ext_len`` the first of them are those that the last segment ended with.
            targets: int64 ``(B, T')``, of the last ``T' <= T`` tokens.
            memory: ``(n_layer, B, M, d)``; None is :meth:`init_memory`. Gradients stop at it.

        Raises:
            ValueError: a shape that does not fit.
        """
        if memory is None:
            memory = self.init_memory(len(tokens))
        self._check(tokens, targets, memory)
        hidden, inputs = self._layers(tokens, memory)
        output = ModelOutput(hidden=hidden, memory=self._next_memory(inputs, memory, tokens.shape[1]))
        if targets is not None:
            output.hidden = hidden[:, tokens.shape[1] - targets.shape[1] :]
            output.nll = self.crit(output.hidden, targets)
            output.loss = mean_nll(output.nll, targets)
        return output

    def _check(self, tokens: Tensor, targets: Tensor | None, memory: Tensor) -> None:
        if tokens.dim() != 2 or not tokens.shape[1]:
            raise ValueError(f"tokens must have shape (B, T) with T > 0, not {tuple(tokens.shape)}")
        if targets is not None and (targets.shape[:1] != tokens.shape[:1] or targets.shape[1] > tokens.shape[1]):
            raise ValueError(f"targets must have shape (B, T') with T' <= T, not {tuple(targets.shape)}")
        wanted = (self.n_memory_layers, len(tokens), memory.shape[-2], self.config.d_model)
        if tuple(memory.shape) != wanted:
            raise ValueError(f"memory must have shape (n_layer, B, M, d) = {wanted}, not {tuple(memory.shape)}")

    def _layers(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output, and the input of every layer with a memory."""
        n_memory, attention = memory.shape[2], self.attention_options()
        x = self.drop(self.word_emb(tokens))
        positions = self.positions(n_memory + tokens.shape[1], x.dtype)
        memories, inputs = iter(memory.unbind(0)), []
        for layer, (absolute, relative), options in zip(self.layers, positions, self._layer_options(), strict=True):
            mems: Any = None
            if layer.dec_attn is not None:
                inputs.append(x)
                mems = next(memories)
            if absolute is not None:
                x, mems = x + absolute[n_memory:], mems + absolute[:n_memory]
            given: dict[str, Any] = {"mems": mems if n_memory else None, **attention, **options}
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, *relative, **given, use_reentrant=False)
            else:
                x = layer(x, *relative, **given)
        return self.drop(x), inputs

    def _layer_options(self) -> list[dict[str, Any]]:
        """For each layer, what else this pass gives it."""
        return [{}] * len(self.layers)

    def attention_options(self) -> dict[str, Any]:
        """What every attention of a pass is told: the window, and the clamp where positions are relative."""
        window = {"window": self.config.window}
        return window if self.config.attn_type in (2, 3) else {**window, "clamp_len": self._clamp_len()}

    def _clamp_len(self) -> int | None:
        """The distance beyond which :meth:`positions` has no rows, as attention itself counts farther ones as it."""
        c = self.config
        if c.attn_type == 1:
            return min(c.max_klen, c.clamp_len or c.max_klen) - 1
        dropped = self.drop.training and self.drop.p > 0  # each row by itself, as upstream: equal ones differ then
        return None if c.attn_type != 0 or dropped else c.clamp_len or None

    def positions(self, n_keys: int, dtype: torch.dtype) -> list[LayerPositions]:
        """For each layer, the positions of ``n_keys`` keys, of which the last is at distance 0; of relative ones those
        that :meth:`attention_options` leaves."""
        c, clamp_len = self.config, self._clamp_len()
        distance = distances(n_keys if clamp_len is None else min(n_keys, clamp_len + 1), self._table.device)
        if c.attn_type in (0, 2):
            waves = sinusoids(distance.clamp(max=c.clamp_len) if c.clamp_len else distance, c.d_model, dtype=dtype)
            waves = self.drop(waves)
            if c.attn_type == 0:
                return [(None, (waves, self.r_w_bias, self.r_r_bias))] * c.n_layer
            return [(waves, ()), *[(None, ())] * (c.n_layer - 1)]
        rows = (c.max_klen - 1 - distance).clamp(min=0)
        if c.attn_type == 3:
            return [(table[rows], ()) for table in self.r_emb]
        by_layer = zip(self.r_emb, self.r_w_bias, self.r_bias, strict=True)
        return [(None, (table[rows], bias, by_row[rows])) for table, bias, by_row in by_layer]

    @torch.no_grad()
    def _next_memory(self, inputs: list[Tensor], memory: Tensor, n_steps: int) -> Tensor:
        """The last ``mem_len`` of the steps before the segment's last ``ext_len``; of the old ones only what is short.

        Where the segment alone fills the memory (``mem_len <= T - ext_len``) the old one is not read at all.
        """
        n_layer, batch, n_memory, width = memory.shape
        end = max(0, n_steps - self.config.ext_len)
        new = min(end, self.config.mem_len)
        old = min(n_memory, self.config.mem_len - new)
        after = torch.empty(n_layer, batch, old + new, width, dtype=memory.dtype, device=memory.device)
        after[:, :, :old] = memory[:, :, n_memory - old :]
        for layer_after, x in zip(after, inputs, strict=True):
            layer_after[:, old:] = x[:, end - new : end]
        return after

    def log_prob(self, hidden: Tensor) -> Tensor:
        """The log-probabilities of the next token, ``(B, T, d)`` to ``(B, T, V)``."""
        return self.crit.log_prob(hidden)

    def predict(self, hidden: Tensor) -> Tensor:
        """The most probable next token, int64 ``(B, T)``, from ``hidden (B, T, d)``."""
        return self.crit.predict(hidden)

    generate = generation.generate

    @classmethod
    def from_kimiyoung(cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> "TransformerXL":
        """A model with the weights of kimiyoung's ``MemTransformerLM`` and the same loss for each token.

        Args:
            state_dict: that of the module (upstream pickles the module: take its ``.state_dict()`` where it lives).
            config: the arguments of upstream's train.py (``vars(args)``): sizes, lengths, ``div_val``, and ``cutoffs``
                or ``adaptive`` with ``dataset``. What is tied is read off the weights.

        Raises:
            ValueError: a sampled softmax, or cutoffs that are not given.
        """
        return cls._loaded(*loading.from_kimiyoung(state_dict, config))

    @classmethod
    def from_nvidia(cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> "TransformerXL":
        """A model with the weights of NVIDIA's ``MemTransformerLM``; see :meth:`from_kimiyoung`."""
        return cls._loaded(*loading.from_nvidia(state_dict, config))

    @classmethod
    def from_huggingface(cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> "TransformerXL":
        """A model with the weights of transformers' ``TransfoXLLMHeadModel``, whose memory starts as zeros.

        Args:
            state_dict: that of the model.
            config: ``model.config.to_dict()``, the content of ``config.json``.
        """
        return cls._loaded(*loading.from_huggingface(state_dict, config))

    @classmethod
    def _loaded(cls, config: TransformerXLConfig, state_dict: Mapping[str, Tensor]) -> "TransformerXL":
        model = cls(config)
        model.load_state_dict(state_dict)
        return model

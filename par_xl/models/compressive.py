"""The Compressive Transformer of Rae et al. (arXiv 1911.05507)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from par_xl.models import compressive_generation
from par_xl.models.compressive_config import CompressiveConfig
from par_xl.models.compressive_layers import CompressedPositions, GRUGate
from par_xl.models.output import ModelOutput, mean_nll
from par_xl.models.transformer_xl import TransformerXL
from par_xl.nn.compression_losses import AutoEncodingLoss, attention_reconstruction_loss, reduce_layers
from par_xl.nn.compressive_memory import Compressor, Evicted, MemoryState, advance
from par_xl.nn.plain_linear import plain
from par_xl.nn.rel_attention import CompressedPart, KeysValues

# (rows, how many of them are compressed, attention received or None), the fields of a MemoryState, for each layer
Memory = list[tuple[Tensor, int, Tensor | None]]


@dataclass(kw_only=True)
class CompressiveOutput(ModelOutput):
    """:class:`ModelOutput`, whose ``loss`` has the auxiliary loss in it while training, and

    Attributes:
        compression_losses: ``(layers with a memory,)``, the auxiliary loss of each, 0 where nothing was evicted, the
            mean over segments; None where there is none.
    """

    compression_losses: Tensor | None = None


class CompressiveTransformer(TransformerXL):
    """The Compressive Transformer language model, batch first: Transformer-XL whose oldest memories are compressed.

        output = model(tokens, targets, memory)     # tokens, targets: int64 (B, T); memory: the last output's, or None
        output.loss.backward()
        memory = output.memory                      # already detached

    Every layer attends to ``[compressed | memory | segment]`` with Transformer-XL's relative positions, whose distances
    count rows: a compressed step is one. What is stored is the layer's input, normalised at use with ``pre_lnorm``.
    (Sonnet scales q before the biases and stores normalised inputs.)

    The task sends no gradient into the compressors and the auxiliary loss none into the rest, so that one optimizer
    serves both; clip their norms separately (:meth:`compression_parameters`). With ``compression_loss="bptt"`` the
    task does train the compressors: within a call, through the segments that come after the one that was compressed.

    Source: the paper; sonnet v1 ``nets/transformer.py``; labml's ``transformers/compressive`` (stores as here).
    """

    config: CompressiveConfig

    def __init__(self, config: CompressiveConfig):
        super().__init__(config)
        c = config
        self.memory_layers = c.memory_layers or tuple(range(c.n_layer))
        self.compressors: Any = nn.ModuleList(
            Compressor(c.d_model, c.rate, c.compression, dilation=c.dilation or None) for _ in self.memory_layers
        )
        auto_encoding, own = c.compression_loss == "auto-encoding", c.compressed_positions == "own"
        self.decoders: Any = nn.ModuleList(
            AutoEncodingLoss(c.d_model, c.rate) for _ in self.memory_layers if auto_encoding
        )
        self.compressed_positions: Any = nn.ModuleDict(
            {str(i): CompressedPositions(c.n_head, c.d_model, c.d_head) for i in self.memory_layers if own}
        )
        if c.gated:
            for layer in self.layers:
                layer.dec_attn.join, layer.pos_ff.join = GRUGate(c.d_model), GRUGate(c.d_model)

    def compression_parameters(self) -> Iterator[nn.Parameter]:
        """What the auxiliary loss trains; everything else is the task's."""
        yield from self.compressors.parameters()
        yield from self.decoders.parameters()

    def init_memory(self, batch_size: int) -> Memory:  # type: ignore[override]
        """The memory before the first token: no rows, or zeros, which are attended to and compressed as any others."""
        c, like = self.config, self.layers[0].pos_ff.layer_norm.weight
        full = c.memory_start == "zeros"
        compressed, memory = (c.compressed_len, c.mem_len) if full else (0, 0)
        rows = like.new_zeros(batch_size, compressed + memory, c.d_model)
        usage = like.new_zeros(batch_size, memory, dtype=torch.float32) if c.compression == "most_used" else None
        return [(rows, compressed, usage) for _ in self.memory_layers]

    def reset_lengths(self, **lengths: Any) -> None:
        """Change ``mem_len``, ``compressed_len`` or ``clamp_len``, for larger memories in evaluation, say.

        Begin with a new memory then: an earlier one may be longer than what is allowed now.
        """
        unknown = set(lengths) - {"mem_len", "compressed_len", "clamp_len"}
        if unknown:
            raise ValueError(f"lengths are mem_len, compressed_len and clamp_len, not {', '.join(unknown)}")
        self.config = replace(self.config, **lengths)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, memory: Memory | None = None) -> CompressiveOutput:  # type: ignore[override]
        """The hidden states, the loss and the next memory.

        Args:
            tokens: int64 ``(B, T)``, read in segments of ``config.segment_len``, if that is given; with segments of a
                multiple of the rate no step is dropped when it leaves the memory.
            targets: int64 ``(B, T)``.
            memory: an earlier output's; None is :meth:`init_memory`.
        """
        states = [MemoryState(*state) for state in (self.init_memory(len(tokens)) if memory is None else memory)]
        self._check_states(tokens, targets, states)
        auxiliary = targets is not None and self.config.compression_loss in ("attention", "auto-encoding")
        hidden: list[Tensor] = []
        losses: list[Tensor] = []  # (layers,) of each segment
        for segment in tokens.split(self.config.segment_len or tokens.shape[1], dim=1):
            out, inputs, stored, usages = self.attend(segment, states, self.config.compression == "most_used")
            states, evicted = self._update(states, stored, usages)
            hidden.append(out)
            if auxiliary:
                pairs = enumerate(zip(inputs, evicted, strict=True))
                losses.append(torch.stack([self._compression_loss(i, *pair) for i, pair in pairs]))
        after = [(s.rows.detach(), s.compressed, s.usage) for s in states]
        output = CompressiveOutput(hidden=torch.cat(hidden, 1), memory=after)
        if targets is not None:
            output.nll = self.crit(output.hidden, targets)
            output.loss = mean_nll(output.nll, targets)
            if losses:
                by_layer = torch.stack(losses).mean(0)
                output.compression_losses = by_layer.detach()
                if self.training:
                    reduced = reduce_layers(by_layer.unbind(), self.config.compression_reduction)
                    output.loss = output.loss + self.config.compression_weight * reduced
        return output

    def _check_states(self, tokens: Tensor, targets: Tensor | None, states: list[MemoryState]) -> None:
        if tokens.dim() != 2 or not tokens.shape[1]:
            raise ValueError(f"tokens must have shape (B, T) with T > 0, not {tuple(tokens.shape)}")
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(f"targets must have the shape of tokens {tuple(tokens.shape)}, not {tuple(targets.shape)}")
        shapes, batch, width = [(*s.rows.shape, s.compressed) for s in states], len(tokens), self.config.d_model
        n_layers = len(self.memory_layers)
        if len(states) != n_layers or shapes != [(batch, shapes[0][1], width, shapes[0][-1])] * n_layers:
            raise ValueError(
                f"memory must have {n_layers} entries of batch {batch}, width {width} and the same sizes, not"
                f" (B, rows, d, compressed) {shapes}"
            )

    def attend(
        self, tokens: Tensor, states: list[MemoryState], received: bool = False
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None]]:
        """The layers, over one segment.

        Returns:
            The output; and of each layer with a memory its input, what the memory is to store, and, if wanted, the
            attention that each row of ``[compressed | memory | segment]`` received, ``(B, K)``.
        """
        x = self.drop(self.word_emb(tokens))
        by_layer = dict(zip(self.memory_layers, states, strict=True))
        first, steps = states[0], tokens.shape[1]  # all states have as many rows
        own = first.compressed if self.compressed_positions else 0

        def waves(n_keys: int) -> tuple[Tensor, ...]:  # and shared biases
            return self.positions(n_keys, x.dtype)[0][1]  # type: ignore[return-value]

        own_waves = waves(own + steps)[0][:-1] if own else None
        with_memory = waves(first.rows.shape[1] - own + steps)
        without = with_memory if len(states) == len(self.layers) else waves(steps)
        inputs, stored, usages = [], [], []
        for i in range(len(self.layers)):
            given, state = x, by_layer.get(i)
            read = (without, None) if state is None else (with_memory, own_waves)
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x, usage = checkpoint(self._layer, i, x, state, *read, received, use_reentrant=False)
            else:
                x, usage = self._layer(i, x, state, *read, received)
            if state is not None:
                inputs.append(given)
                stored.append(x if self.config.enhanced_recurrence else given)
                usages.append(usage)
        return self.drop(x), inputs, stored, usages

    def _layer(
        self,
        i: int,
        x: Tensor,
        state: MemoryState | None,
        positions: tuple[Tensor, ...],
        own_waves: Tensor | None,
        received: bool,
    ) -> tuple[Tensor, Tensor | None]:
        layer, memory, part = self.layers[i], None, None
        attention = layer.dec_attn
        if state is not None and state.rows.shape[1]:
            rows = None if own_waves is None else self.compressed_positions[str(i)](own_waves)
            memory, part = self.split_memory(i, attention.keys_values(state.rows), state.compressed, rows)
        r, content_bias, position_bias = attention.prepare(*positions)
        options = {**self.attention_options(), "return_received": received and state is not None}
        biases = content_bias, position_bias
        attended = attention.attend(x, r, *biases, memory, compressed=part, **options)
        usage = None if attended.received is None else attended.received.mean(1)
        return layer.pos_ff(attention.residual(x, attended.output)), usage

    def split_memory(
        self, i: int, keys_values: KeysValues, n_compressed: int, rows: Tensor | None
    ) -> tuple[KeysValues, CompressedPart | None]:
        """A layer's memory without its first ``n_compressed`` steps, and these with ``rows`` of their own."""
        if rows is None:
            return keys_values, None
        (old_k, old_v), (k, v) = zip(*(x.tensor_split([n_compressed], 2) for x in keys_values), strict=True)
        return (k, v), CompressedPart((old_k, old_v), rows, self.compressed_positions[str(i)].r_r_bias)

    def _clamp_len(self) -> int | None:
        # compressed_attention takes a row for every distance.
        return None if self.compressed_positions else super()._clamp_len()

    def _update(
        self, states: list[MemoryState], stored: list[Tensor], usages: list[Tensor | None]
    ) -> tuple[list[MemoryState], list[Evicted]]:
        c = self.config
        options: dict[str, Any] = dict(memory_length=c.mem_len, compressed_length=c.compressed_len)
        options["bptt"] = c.compression_loss == "bptt"
        pairs = []
        for state, x, compressor, usage in zip(states, stored, self.compressors, usages, strict=True):
            recent = None if usage is None else usage[:, state.compressed :]
            pairs.append(advance(state, x, compressor, usage=recent, **options))
        return [after for after, _ in pairs], [evicted for _, evicted in pairs]

    def _compression_loss(self, i: int, hidden: Tensor, evicted: Evicted) -> Tensor:
        """The auxiliary loss of one layer: a gradient for its compressor (and decoder) alone."""
        old, compressed = evicted.rows, evicted.compressed
        if compressed is None:
            return hidden.new_zeros(())  # a compressor without weights learns nothing
        if self.config.compression_loss == "auto-encoding":
            return self.decoders[i](old, compressed)
        attention = self.layers[self.memory_layers[i]].dec_attn
        norm = attention.layer_norm
        if attention.pre_lnorm:
            options = norm.normalized_shape, norm.weight.detach(), norm.bias.detach(), norm.eps
            hidden, old, compressed = (F.layer_norm(x, *options) for x in (hidden, old, compressed))
        query, key, value = plain("qkv_net", attention.qkv_net).weight.chunk(3)
        return attention_reconstruction_loss(hidden, old, compressed, query, key, value, attention.n_head)

    generate = compressive_generation.generate  # type: ignore[assignment]

    @classmethod
    def _loaded(cls, config: Any, state_dict: Mapping[str, Tensor]) -> "CompressiveTransformer":
        raise ValueError("no weights of a Compressive Transformer were published; load those of a TransformerXL")

"""The Compressive Transformer of Rae et al. (arXiv 1911.05507)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from par_xl.models import compressive_generation
from par_xl.models.compressive_config import CompressiveConfig
from par_xl.models.output import ModelOutput
from par_xl.models.transformer_xl import LayerPositions, TransformerXL
from par_xl.nn.attention_received import attention_received
from par_xl.nn.compression_losses import AutoEncodingLoss, attention_reconstruction_loss, reduce_layers
from par_xl.nn.compressive_memory import Compressor, Evicted, MemoryState, advance

# (rows, how many of them are compressed, attention received or None), the fields of a MemoryState, for each layer
Memory = list[tuple[Tensor, int, Tensor | None]]


@dataclass(kw_only=True)
class CompressiveOutput(ModelOutput):
    """:class:`ModelOutput`, whose ``loss`` has the auxiliary loss in it while training, and

    Attributes:
        compression_losses: ``(layers with a memory,)``, the auxiliary loss of each, 0 where nothing was evicted; None
            where there is none.
    """

    compression_losses: Tensor | None = None


class CompressiveTransformer(TransformerXL):
    """The Compressive Transformer language model, batch first: Transformer-XL whose oldest memories are compressed.

        output = model(tokens, targets, memory)     # tokens, targets: int64 (B, T); memory: the last output's, or None
        output.loss.backward()
        memory = output.memory                      # already detached

    Every layer attends to ``[compressed | memory | segment]`` with Transformer-XL's relative positions, whose distances
    count rows: a compressed step is one. What is stored is the layer's input, normalised at use with ``pre_lnorm``.
    (Sonnet scales q before the biases, has other relative keys for the compressed part and stores normalised inputs.)

    With ``compression_loss="bptt"`` the compressed rows of the memory keep their graph, so that the losses of the next
    segments train the compressors: sum those of a few segments, and :meth:`detach` the memory after their backward.
    Otherwise the task sends no gradient into the compressors, and the auxiliary loss none into the rest, so that one
    optimizer serves both; clip their norms separately (:meth:`compression_parameters`).

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
        auto_encoding = c.compression_loss == "auto-encoding"
        self.decoders: Any = nn.ModuleList(
            AutoEncodingLoss(c.d_model, c.rate) for _ in self.memory_layers if auto_encoding
        )

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

    def forward(self, tokens: Tensor, targets: Tensor | None = None, memory: Memory | None = None) -> CompressiveOutput:  # type: ignore[override]
        """The hidden states, the loss and the next memory.

        Args:
            tokens: int64 ``(B, T)``; with ``T`` a multiple of the rate no step is dropped when it leaves the memory.
            targets: int64 ``(B, T)``.
            memory: an earlier output's; None is :meth:`init_memory`.
        """
        states = [MemoryState(*state) for state in (self.init_memory(len(tokens)) if memory is None else memory)]
        self._check_states(tokens, targets, states)
        hidden, inputs, usages = self._attend(tokens, states)
        after, evicted = self._update(states, inputs, usages)
        output = CompressiveOutput(hidden=hidden, memory=[(s.rows, s.compressed, s.usage) for s in after])
        if targets is not None:
            output.nll = self.crit(hidden, targets)
            output.loss = output.nll.mean()
            if self.config.compression_loss in ("attention", "auto-encoding"):
                losses = [self._compression_loss(i, inputs[i], out) for i, out in enumerate(evicted)]
                output.compression_losses = torch.stack(losses).detach()
                if self.training:
                    auxiliary = reduce_layers(losses, self.config.compression_reduction)
                    output.loss = output.loss + self.config.compression_weight * auxiliary
        return output

    def _check_states(self, tokens: Tensor, targets: Tensor | None, states: list[MemoryState]) -> None:
        if tokens.dim() != 2 or not tokens.shape[1]:
            raise ValueError(f"tokens must have shape (B, T) with T > 0, not {tuple(tokens.shape)}")
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(f"targets must have the shape of tokens {tuple(tokens.shape)}, not {tuple(targets.shape)}")
        if len(states) != len(self.memory_layers) or any(s.rows.shape[0] != len(tokens) for s in states):
            shapes = [tuple(s.rows.shape) for s in states]
            raise ValueError(f"memory must have {len(self.memory_layers)} entries of batch {len(tokens)}, not {shapes}")

    def _attend(self, tokens: Tensor, states: list[MemoryState]) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """The output; of each layer with a memory its input, and with most_used the attention that rows received."""
        x = self.drop(self.word_emb(tokens))
        by_layer = dict(zip(self.memory_layers, states, strict=True))
        positions: dict[int, list[LayerPositions]] = {}  # by number of keys: layers without a memory have fewer
        inputs: list[Tensor] = []
        usages: list[Tensor | None] = []
        for i, layer in enumerate(self.layers):
            n_rows = by_layer[i].rows.shape[1] if i in by_layer else 0
            mems = by_layer[i].rows if n_rows else None
            n_keys = n_rows + tokens.shape[1]
            if n_keys not in positions:
                positions[n_keys] = self.positions(n_keys, x.dtype)
            relative: Any = positions[n_keys][i][1]
            if i in by_layer:
                inputs.append(x)
                counts = self.config.compression == "most_used"
                received = None
                if counts:
                    received = attention_received(layer.dec_attn, x, *relative, mems=mems)  # type: ignore[misc]
                usages.append(None if received is None else received[:, by_layer[i].compressed :])
            x = layer(x, *relative, mems=mems)
        return self.drop(x), inputs, usages

    def _update(
        self, states: list[MemoryState], inputs: list[Tensor], usages: list[Tensor | None]
    ) -> tuple[list[MemoryState], list[Evicted]]:
        c = self.config
        options: dict[str, Any] = dict(memory_length=c.mem_len, compressed_length=c.compressed_len)
        options["bptt"] = c.compression_loss == "bptt"
        by_layer = zip(states, inputs, self.compressors, usages, strict=True)
        pairs = [advance(state, x, f, usage=usage, **options) for state, x, f, usage in by_layer]
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
            hidden, old, compressed = (F.layer_norm(x, *options) for x in (hidden.detach(), old, compressed))
        query, key, value = attention.qkv_net.weight.chunk(3)
        return attention_reconstruction_loss(hidden, old, compressed, query, key, value, attention.n_head)

    @staticmethod
    def detach(memory: Memory) -> Memory:
        """The memory as constants, where back-propagation through time ends."""
        return [(rows.detach(), compressed, usage) for rows, compressed, usage in memory]

    generate = compressive_generation.generate  # type: ignore[assignment]

    @classmethod
    def _loaded(cls, config: Any, state_dict: Mapping[str, Tensor]) -> "CompressiveTransformer":
        raise ValueError("no weights of a Compressive Transformer were published; load those of a TransformerXL")

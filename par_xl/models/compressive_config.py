"""The Compressive Transformer's options, and the published configurations by name."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from par_xl.models.transformer_xl_config import TransformerXLConfig
from par_xl.ops.compression import check_options


@dataclass
class CompressiveConfig(TransformerXLConfig):
    """:class:`TransformerXLConfig` (``mem_len``: the most steps that are kept as they are), and

    Attributes:
        compressed_len: the most compressed steps.
        rate: steps that become one.
        compression: how: "mean", "max", "conv", "dilated_conv" or "most_used".
        dilation: of the layers of "dilated_conv".
        compression_loss: what trains the compressors: "attention" (reconstruction), "auto-encoding", "bptt" (the task,
            through the next segment's attention), or "none".
        compression_weight: of the auxiliary loss.
        compression_reduction: of the layers' losses: "mean" (sonnet) or "sum" (the paper, labml).
        memory_layers: the layers that have a memory, counted from 0 and ascending; none given: all of them.
        segment_len: longer inputs are read in segments of it, each with the memory that the ones before have left; 0:
            an input is one segment. At least ``rate``, or nothing would be compressed. What "bptt" trains through.
        compressed_positions: compressed steps have the "shared" relative keys, at distances that count all rows, or
            their "own" (sonnet), at distances as if they stood directly in front of the segment.
        gated: a GRU in place of each residual connection (lucidrains).
        enhanced_recurrence: the memory of a layer holds its outputs instead of its inputs (Ding et al.,
            arXiv 2012.15688). The lucidrains package gives layer i the memory of layer i + 1, which is the same, but
            the last layer that of the first, and shifts compressed steps by one more layer with every segment.
    """

    mem_len: int = 512
    compressed_len: int = 512
    rate: int = 4
    compression: Literal["mean", "max", "conv", "dilated_conv", "most_used"] = "conv"
    dilation: tuple[int, ...] = ()
    compression_loss: Literal["attention", "auto-encoding", "bptt", "none"] = "attention"
    compression_weight: float = 1.0
    compression_reduction: Literal["mean", "sum"] = "mean"
    memory_layers: tuple[int, ...] = ()
    segment_len: int = 0
    compressed_positions: Literal["shared", "own"] = "shared"
    gated: bool = False
    enhanced_recurrence: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attn_type != 0 or self.ext_len or self.same_length != "off":
            raise ValueError("the Compressive Transformer needs attn_type 0, ext_len 0 and same_length off")
        for name in ("compressed_len", "segment_len", "compression_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if bool(self.dilation) != (self.compression == "dilated_conv"):
            raise ValueError(f"dilation goes with dilated_conv, not {self.dilation} with {self.compression}")
        choices = {
            "compression": ("mean", "max", "conv", "dilated_conv", "most_used"),
            "compression_loss": ("attention", "auto-encoding", "bptt", "none"),
            "compression_reduction": ("mean", "sum"),
            "compressed_positions": ("shared", "own"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        self.memory_layers, self.dilation = tuple(self.memory_layers), tuple(self.dilation)
        check_options(self.rate, self.compression, self.dilation or None)
        if any(not 0 <= layer < self.n_layer for layer in self.memory_layers):
            raise ValueError(f"memory_layers must lie between 0 and {self.n_layer - 1}, not {self.memory_layers}")
        if list(self.memory_layers) != sorted(set(self.memory_layers)):
            raise ValueError(f"memory_layers must ascend, not {self.memory_layers}")
        if self.compressed_len and 0 < self.segment_len < self.rate:
            raise ValueError(f"segment_len must be at least rate {self.rate} to fill a group, not {self.segment_len}")
        if self.compression_loss == "bptt" and not self.segment_len:
            raise ValueError("compression_loss bptt needs segment_len: it trains through the segments of one call")

    @property
    def temporal_range(self) -> float:
        """Tokens that the output can depend on beyond the segment: ``n_layer (mem_len + rate compressed_len)``.

        With enhanced recurrence, where a layer reads its own outputs, there is no end to it.
        """
        if self.enhanced_recurrence:
            return math.inf
        return (len(self.memory_layers) or self.n_layer) * (self.mem_len + self.rate * self.compressed_len)

    @classmethod
    def named(cls, name: str, **options: Any) -> "CompressiveConfig":
        """A configuration of the paper; ``options`` override it.

        "wt103", "enwik8" or "pg19". The lengths are those of training, but for WikiText-103's 1500 compressed steps,
        which the best result was evaluated with (and a memory of 500; it was trained with 512 of either kind); enwik8
        was evaluated with 3072: :meth:`CompressiveTransformer.reset_lengths`. The paper does not give widths and heads:
        these are of Transformer-XL's large models.

        Source: arXiv 1911.05507, sections 5.1 to 5.3.
        """
        if name not in _NAMED:
            raise ValueError(f"there is no configuration {name!r}; there are {', '.join(_NAMED)}")
        base, fields = _NAMED[name]
        return cls(**{**vars(TransformerXLConfig.named(base)), **fields, **options})


_NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "wt103": ("wt103-large", {"segment_len": 512, "mem_len": 512, "compressed_len": 1500, "rate": 4}),
    "enwik8": ("enwik8-large", {"segment_len": 768, "mem_len": 768, "compressed_len": 1152, "rate": 3}),
    "pg19": (
        "wt103-large",
        {"vocab_size": 32000, "cutoffs": (), "tie_projs": (), "div_val": 1, "n_layer": 36}
        | {"segment_len": 512, "mem_len": 512, "compressed_len": 512, "rate": 2},
    ),
}

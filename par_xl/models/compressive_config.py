"""The Compressive Transformer's options, and the published configurations by name."""

from dataclasses import dataclass
from typing import Any, Literal

from par_xl.models.transformer_xl_config import TransformerXLConfig


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
        memory_layers: the layers that have a memory, counted from 0; none given: all of them.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attn_type != 0 or self.ext_len or self.same_length != "off":
            raise ValueError("the Compressive Transformer needs attn_type 0, ext_len 0 and same_length off")
        if self.compressed_len < 0 or self.rate < 1:
            raise ValueError(
                f"compressed_len must not be negative and rate positive, not {self.compressed_len}, {self.rate}"
            )
        if bool(self.dilation) != (self.compression == "dilated_conv"):
            raise ValueError(f"dilation is for compression dilated_conv, not {self.compression} with {self.dilation}")
        choices = {
            "compression": ("mean", "max", "conv", "dilated_conv", "most_used"),
            "compression_loss": ("attention", "auto-encoding", "bptt", "none"),
            "compression_reduction": ("mean", "sum"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if any(not 0 <= layer < self.n_layer for layer in self.memory_layers):
            raise ValueError(f"memory_layers must lie between 0 and {self.n_layer - 1}, not {self.memory_layers}")

    @property
    def temporal_range(self) -> int:
        """Tokens that the output can depend on beyond the segment: ``n_layer (mem_len + rate compressed_len)``."""
        return (len(self.memory_layers) or self.n_layer) * (self.mem_len + self.rate * self.compressed_len)

    @classmethod
    def named(cls, name: str, **options: Any) -> "CompressiveConfig":
        """A configuration of the paper, trained with the segments in brackets; ``options`` override it.

        "wt103" (512), "enwik8" (768), "pg19" (512); widths and heads are those of Transformer-XL's large models.

        Source: arXiv 1911.05507, section 4 and supplement.
        """
        if name not in _NAMED:
            raise ValueError(f"there is no configuration {name!r}; there are {', '.join(_NAMED)}")
        base, fields = _NAMED[name]
        return cls(**{**vars(TransformerXLConfig.named(base)), **fields, **options})


_NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "wt103": ("wt103-large", {"mem_len": 512, "compressed_len": 1500, "rate": 4}),
    "enwik8": ("enwik8-large", {"mem_len": 768, "compressed_len": 1152, "rate": 3}),
    "pg19": (
        "wt103-large",
        {"vocab_size": 32000, "cutoffs": (), "tie_projs": (), "div_val": 1, "n_layer": 36}
        | {"mem_len": 512, "compressed_len": 512, "rate": 2},
    ),
}

"""Transformer-XL's options, and the published configurations by name."""

from dataclasses import dataclass
from typing import Any, Literal

from par_xl.ops.adaptive_tables import integers

SameLength = Literal["off", "exclusive", "inclusive"]


@dataclass
class TransformerXLConfig:
    """Sizes, lengths and dropout probabilities, under kimiyoung's names.

    Attributes:
        vocab_size: V.
        n_layer, n_head, d_model, d_head, d_inner: layers, heads, widths of the layers, of a head, of the feed-forward.
        d_embed: width of the (first) embedding table; 0 is ``d_model``.
        dropout: on embeddings, positions, results of sublayers and the output.
        dropatt: on attention weights.
        attn_type: 0 relative sinusoids, 1 learned relative rows (Shaw), 2 absolute sinusoids on the embeddings,
            3 learned absolute rows on every layer's input (Al-Rfou).
        pre_lnorm: normalise before sublayers instead of after them.
        untie_r: each layer has its own biases ``r_w_bias`` and ``r_r_bias`` (Hugging Face's published model).
        mem_len: steps that the memory keeps.
        ext_len: last steps of a segment that the next one repeats and the memory therefore does not keep.
        clamp_len: distances beyond it count as it; 0 does not clamp.
        same_length: every query sees as many keys: ``d < mem_len`` with "exclusive" (kimiyoung's PyTorch code and
            Hugging Face), ``d <= mem_len`` with "inclusive" (NVIDIA, kimiyoung's TensorFlow code).
        max_klen: rows of the learned tables of types 1 and 3; farther distances use the farthest row.
        memory_start: what ``init_memory`` gives: no steps, or ``mem_len`` steps of zeros, which are attended to
            (Hugging Face, kimiyoung's TensorFlow code).
        cutoffs: where the second and later clusters of the adaptive softmax and embedding start.
        div_val: how much narrower each cluster is than the one before.
        tie_weight: embedding and output share their tables.
        tie_projs: whether they share their projections, by cluster; clusters beyond its end do not.
        layer_norm_epsilon: of every layer norm.
        activation_checkpointing: keep each layer's input only and run it again in the backward.
    """

    vocab_size: int
    n_layer: int = 12
    n_head: int = 10
    d_model: int = 500
    d_head: int = 50
    d_inner: int = 1000
    d_embed: int = 0
    dropout: float = 0.0
    dropatt: float = 0.0
    attn_type: int = 0
    pre_lnorm: bool = False
    untie_r: bool = False
    mem_len: int = 0
    ext_len: int = 0
    clamp_len: int = 0
    same_length: SameLength = "off"
    max_klen: int = 0
    memory_start: Literal["empty", "zeros"] = "empty"
    cutoffs: tuple[int, ...] = ()
    div_val: int = 1
    tie_weight: bool = True
    tie_projs: tuple[bool, ...] = ()
    layer_norm_epsilon: float = 1e-5
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        self.d_embed = self.d_embed or self.d_model
        self.cutoffs = tuple(integers("cutoffs", self.cutoffs))  # a list, where it was JSON
        self.tie_projs = tuple(self.tie_projs)
        if self.attn_type not in (0, 1, 2, 3):
            raise ValueError(f"attn_type must be 0, 1, 2 or 3, not {self.attn_type}")
        if self.attn_type in (1, 3) and self.max_klen < 1:
            raise ValueError(f"attn_type {self.attn_type} needs max_klen, the rows of its tables")
        if self.untie_r and self.attn_type != 0:
            raise ValueError(f"untie_r is for attn_type 0, not {self.attn_type}")
        if min(self.mem_len, self.ext_len, self.clamp_len) < 0:
            raise ValueError(f"{self.mem_len=}, {self.ext_len=} and {self.clamp_len=} must not be negative")
        for name, choices in (("same_length", ("off", "exclusive", "inclusive")), ("memory_start", ("empty", "zeros"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")

    @property
    def window(self) -> tuple[int, int] | None:
        """What ``same_length`` is to :func:`par_xl.rel_attention`."""
        left = {"off": None, "exclusive": self.mem_len - 1, "inclusive": self.mem_len}[self.same_length]
        return None if left is None else (left, 0)

    @classmethod
    def named(cls, name: str, **options: Any) -> "TransformerXLConfig":
        """A configuration of kimiyoung's scripts, with the lengths of training; ``options`` override it.

        "wt103-base", "wt103-large", "enwik8-base", "enwik8-large", "lm1b-base" or "lm1b-large". text8 is as enwik8 with
        ``vocab_size=27``.
        """
        if name not in _NAMED:
            raise ValueError(f"there is no configuration {name!r}; there are {', '.join(_NAMED)}")
        fields = dict(zip(_COLUMNS, _NAMED[name], strict=True))
        return cls(**{**fields, **_VOCABULARIES[name.split("-")[0]], **options})


_COLUMNS = (
    "n_layer", "d_model", "n_head", "d_head", "d_inner", "dropout", "dropatt", "mem_len", "div_val",
)  # fmt: skip
_NAMED = {
    "wt103-base": (16, 410, 10, 41, 2100, 0.1, 0.0, 150, 1),
    "wt103-large": (18, 1024, 16, 64, 4096, 0.2, 0.2, 384, 4),
    "enwik8-base": (12, 512, 8, 64, 2048, 0.1, 0.0, 512, 1),
    "enwik8-large": (24, 1024, 8, 128, 3072, 0.15, 0.15, 768, 1),
    "lm1b-base": (18, 1024, 8, 128, 4096, 0.0, 0.0, 32, 4),
    "lm1b-large": (24, 1280, 16, 80, 8192, 0.05, 0.05, 32, 4),
}
_VOCABULARIES: dict[str, dict[str, Any]] = {
    # The head's projection is the output's own; the tails share the embedding's.
    "wt103": {"vocab_size": 267735, "cutoffs": (20000, 40000, 200000), "tie_projs": (False, True, True, True)},
    "enwik8": {"vocab_size": 204},
    "lm1b": {"vocab_size": 793471, "cutoffs": (60000, 100000, 640000)},
}

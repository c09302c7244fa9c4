"""The options of the PAR Transformer-XL and of its SuperNet, published configurations and patterns by name."""

import re
from dataclasses import dataclass
from typing import Any

from par_xl.models.transformer_xl_config import TransformerXLConfig


@dataclass
class ParConfig(TransformerXLConfig):
    """:class:`TransformerXLConfig`, of whose ``n_layer`` blocks each is one of attention, dense and identity, and

    Attributes:
        n_layer: blocks; 0 is the length of the pattern, or 12.
        d_head: 0 is ``d_model // n_head``.
        untie_r: each block has biases of its own, as in the published project; False: all share one pair.
        pattern: what each block is: a string of "s" (attention), "f" (dense) and "-" (identity), or the name of a rule,
            see :func:`par_pattern`, that gives one for ``n_layer`` blocks. Empty for a SuperNet.
        straight_through: the SuperNet's samples are one-hot vectors with the gradient of relaxed ones.
        hard: the SuperNet computes the chosen branches only; see :class:`ParSuperNet`.
        seed: of the SuperNet's samples.
    """

    n_layer: int = 0
    n_head: int = 8
    d_model: int = 256
    d_head: int = 0
    d_inner: int = 1024
    dropout: float = 0.1
    mem_len: int = 32
    untie_r: bool = True
    pattern: str = ""
    straight_through: bool = False
    hard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attn_type != 0:
            raise ValueError(f"attn_type must be 0, Transformer-XL's relative attention, not {self.attn_type}")
        if not self.d_head and self.d_model % self.n_head:
            raise ValueError(f"d_model must be divisible by n_head = {self.n_head}, not {self.d_model}")
        self.d_head = self.d_head or self.d_model // self.n_head
        if self.pattern in RULES:
            self.pattern = par_pattern(self.n_layer or 12, self.pattern)
        if not re.fullmatch("[sf-]*", self.pattern):
            raise ValueError(
                f'pattern must consist of "s", "f" and "-", or be one of {", ".join(RULES)}, not {self.pattern!r}'
            )
        self.n_layer = self.n_layer or len(self.pattern) or 12
        if self.pattern and len(self.pattern) != self.n_layer:
            raise ValueError(f"pattern must have n_layer = {self.n_layer} blocks, not {len(self.pattern)}")

    @classmethod
    def named(cls, name: str, **options: Any) -> "ParConfig":
        """A configuration of the published project; ``options`` override it.

        "wikitext-2" (its defaults: 12 blocks, d 256, 8 heads, 1024, memory 32) or "wikitext-2-small" (what its
        results are of: 6 blocks, d 128, 4 heads, 512, memory 16), both for its 12,000 pieces. As a default here,
        embedding and output share one full-width table; the project's output has tables of its own, those of rare
        pieces 4 and 16 times narrower.

        Source: https://github.com/Jmkernes/PAR-Transformer-XL, train.py and base_model.sh.
        """
        if name not in _NAMED:
            raise ValueError(f"there is no configuration {name!r}; there are {', '.join(_NAMED)}")
        return cls(**{"vocab_size": 12000, **_NAMED[name], **options})


_NAMED: dict[str, dict[str, Any]] = {
    "wikitext-2": dict(n_layer=12, n_head=8, d_model=256, d_inner=1024, mem_len=32),
    "wikitext-2-small": dict(n_layer=6, n_head=4, d_model=128, d_inner=512, mem_len=16, cutoffs=(250, 2500)),
}
RULES = ("par", "interleaved")


def par_pattern(n_layer: int, rule: str = "par", *, ratio: float = 5.0) -> str:
    """The pattern of ``n_layer`` blocks by a rule of the paper.

    "par": one block in ``ratio`` is attention (rounded down, at least one), the first block and then evenly spaced
    over the first two thirds; the others are dense. The paper found 5 best: 32 blocks have 6 attentions instead
    of the 16 of "interleaved", Transformer-XL's own order: ``sfsf...``.

    Args:
        n_layer: blocks, positive.
        rule: "par" or "interleaved".
        ratio: at least 1.5, where the first two thirds are all attention; for "par".

    Returns:
        A string of ``n_layer`` characters "s" and "f".

    Source: Mandava, Migacz, Florea: Pay Attention when Required (arXiv 2009.04534).
    """
    if n_layer < 1:
        raise ValueError(f"n_layer must be positive, not {n_layer}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    if not ratio >= 1.5:
        raise ValueError(f"ratio must be at least 1.5, where the first two thirds are all attention, not {ratio}")
    if rule == "interleaved":
        return ("sf" * n_layer)[:n_layer]
    n_attention = max(1, int(n_layer / ratio))
    attention = {i * 2 * n_layer // (3 * n_attention) for i in range(n_attention)}
    return "".join("s" if i in attention else "f" for i in range(n_layer))

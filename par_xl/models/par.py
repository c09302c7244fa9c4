"""The PAR Transformer-XL: Mandava, Migacz, Florea: Pay Attention when Required (arXiv 2009.04534)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from par_xl.models.par_config import ParConfig
from par_xl.models.transformer_xl import DecoderLayer, TransformerXL
from par_xl.nn.relaxed_one_hot import RelaxedOneHot
from par_xl.ops.mix import mix
from par_xl.ops.registry import has_values

CHOICES = "sf-"  # attention, dense, identity: the order of the weights


def _refuse(cls: type, config: Any, state_dict: Mapping[str, Tensor]) -> Any:
    raise ValueError(f"these weights are a TransformerXL's, not a {cls.__name__}'s: load them with TransformerXL")


class ParTransformerXL(TransformerXL):
    """A Transformer-XL of single blocks by a pattern: attention ("s"), dense ("f") or nothing at all ("-").

        model = ParTransformerXL("sfsf-ff", vocab_size=12000, d_model=128, n_head=4)      # or ParTransformerXL(config)

    ``"sf" * n`` is the :class:`TransformerXL` with n layers. The call is that of :class:`TransformerXL`, and the memory
    ``(number of "s", B, M, d)``: only attention has one. Block i has the parameters ``layers.{i}.dec_attn`` or
    ``layers.{i}.pos_ff``.

    Args:
        config: with a ``pattern``; or the pattern itself, or the name of a rule ("par", "interleaved").
        options: the other fields of :class:`ParConfig`, when ``config`` is a pattern.
    """

    config: ParConfig

    def __init__(self, config: ParConfig | str, **options: Any):
        if isinstance(config, str):
            config = ParConfig(pattern=config, **options)
        elif options:
            raise ValueError(f"options must not be given beside a config: {', '.join(options)}")
        if not config.pattern:
            raise ValueError("pattern must not be empty; a network that is to find one is a ParSuperNet")
        super().__init__(config)

    def _make_layers(self) -> Iterable[DecoderLayer]:
        return (DecoderLayer(self.config, part) for part in self.config.pattern)

    _loaded: Any = classmethod(_refuse)


class StochasticBlock(DecoderLayer):
    """Attention and dense side by side on the same input, and their mixture with it."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *positions: Tensor | None,
        weights: Tensor,
        choice: int | None,
        mems: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """``weights[0] * attention(x) + weights[1] * dense(x) + weights[2] * x``, ``(B, T, d)``.

        Args:
            x, positions, mems, options: as for :class:`DecoderLayer`.
            weights: ``(3,)``, fp32 (fp64).
            choice: where ``weights`` is a one-hot vector, the place of its one; only that branch is computed then, and
                the gradient of the weights is that of ``x + weights[choice] * (branch - x)``.
        """
        if choice is None:
            return self._mixed(x, self.dec_attn.branch(x, *positions, mems=mems, **options), weights)
        part = CHOICES[choice]
        if part == "-":
            return x
        branch = self.dec_attn(x, *positions, mems=mems, **options) if part == "s" else self.pos_ff(x)
        if not weights.requires_grad:
            return branch
        return torch.lerp(x.to(branch.dtype), branch, weights[choice].to(branch.dtype))

    def _mixed(self, x: Tensor, attended: Tensor, weights: Tensor) -> Tensor:
        dense = self.pos_ff.branch(x)
        if self.pos_ff.pre_lnorm:
            return weights.sum() * x + weights[0] * attended + weights[1] * dense
        norms = [p for part in (self.dec_attn, self.pos_ff) for p in (part.layer_norm.weight, part.layer_norm.bias)]
        return mix(x, attended, dense, weights, *norms, eps=self.pos_ff.layer_norm.eps)


class ParSuperNet(TransformerXL):
    """A chain of stochastic blocks that learns, while it is trained, what each of them should be.

        model = ParSuperNet(ParConfig(vocab_size=12000, n_layer=6))
        model.temperature = 0.7                         # before each step, from a schedule
        model(tokens, targets, memory).loss.backward()  # as with every model
        pattern = model.derive()                        # "sfsf-f"
        plain = model.derived()                         # a ParTransformerXL with these weights

    Block l gives ``w[0] * attention(x) + w[1] * dense(x) + w[2] * x``; each branch has its own residual connection and
    norm, and ``w = w[l]`` is one sample a pass of a relaxed categorical (:class:`RelaxedOneHot`), shared by batch and
    time. In evaluation mode each block is its most likely branch and computes nothing else: the model is
    :meth:`derived`, deterministic, but keeps a memory ``(n_layer, B, M, d)`` for every block.

    With ``hard`` the samples are one-hot vectors in training too, and only the chosen branches are computed. The host
    waits for the samples then, and DDP needs ``find_unused_parameters``. The straight-through gradient of a sample
    needs the results of all branches; those that were not computed count as the identity's: with ``g`` the gradient
    of the block's result and c the choice, ``d_w[c] = sum(g * (branch_c - x))`` and 0 for the others.
    (``straight_through`` without ``hard`` computes everything and has the full gradient.)

    The samples come from ``generator``, on the CPU and seeded with ``config.seed``, so that every rank of a parallel
    training draws the same ones on any device, whatever its other random numbers are; the state dict holds its state. A
    graph of ``torch.compile`` breaks where it draws; with ``generator = None`` (torch's own of the device) it does not.

    Attributes:
        temperature: of the samples, a number; 1 at first. Not in the state dict: the schedule knows it.
        choice: the :class:`RelaxedOneHot` of all blocks; ``choice.pi (n_layer, 3)``.
        generator: see above.

    Source: the paper; https://github.com/Jmkernes/PAR-Transformer-XL.
    """

    config: ParConfig

    def __init__(self, config: ParConfig):
        if config.pattern:
            raise ValueError(f"pattern must be empty, as a SuperNet is to find one, not {config.pattern!r}")
        super().__init__(config)
        one_hot = config.straight_through or config.hard
        self.choice = RelaxedOneHot(len(CHOICES), (config.n_layer,), straight_through=one_hot)
        self._temperature = torch.ones((), dtype=torch.float64)
        self.generator: torch.Generator | None = torch.Generator().manual_seed(config.seed)

    @property
    def temperature(self) -> float:
        return float(self._temperature)

    @temperature.setter
    def temperature(self, value: float) -> None:
        # A tensor, on the CPU: each new number would be a graph of its own to torch.compile.
        self._temperature = torch.tensor(float(value), dtype=torch.float64)

    def _make_layers(self) -> Iterable[DecoderLayer]:
        return (StochasticBlock(self.config) for _ in range(self.config.n_layer))

    def _layer_options(self) -> list[dict[str, Any]]:
        """This pass's sample, drawn before any block runs: a checkpointed block must not draw again."""
        weights = self.choice(self._temperature, self.generator)
        one_branch = (self.config.hard or not self.training) and has_values(weights)  # else all, times 0 or 1
        choices = weights.argmax(-1).tolist() if one_branch else [None] * len(weights)
        return [{"weights": w, "choice": c} for w, c in zip(weights, choices, strict=True)]

    def probabilities(self) -> Tensor:
        """``(n_layer, 3)``: of attention, dense and identity, fp32 (fp64 for fp64)."""
        return self.choice.probabilities()

    def architecture_parameters(self) -> Iterator[nn.Parameter]:
        """The logits of the choices."""
        return self.choice.parameters()

    def weight_parameters(self) -> Iterator[nn.Parameter]:
        """Everything else."""
        architecture = {id(p) for p in self.architecture_parameters()}
        return (p for p in self.parameters() if id(p) not in architecture)

    def derive(self) -> str:
        """The most likely architecture, a pattern such as "sfsf-f"; of equally likely choices the first of "sf-"."""
        return "".join(CHOICES[i] for i in self.probabilities().argmax(-1).tolist())

    def derived(self) -> ParTransformerXL:
        """The plain model of :meth:`derive` with a copy of the weights; torch's random numbers stay as they are."""
        like = self._table
        with torch.random.fork_rng(devices=[]):
            model = ParTransformerXL(replace(self.config, pattern=self.derive()))
        model.to(like.device, like.dtype).train(self.training)
        kept = model.state_dict().keys()
        model.load_state_dict({name: x for name, x in self.state_dict().items() if name in kept})
        return model

    def generate(  # type: ignore[override]
        self, prompt: Tensor, n_tokens: int, *, memory: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Continue a text token by token with the :meth:`derived` model; see :meth:`TransformerXL.generate`."""
        model = self.derived()
        if memory is not None:
            memory = memory[[i for i, part in enumerate(model.config.pattern) if part == "s"]]
        return model.generate(prompt, n_tokens, memory=memory, **options)

    _loaded: Any = classmethod(_refuse)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8) if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        if self.generator is not None and len(state):
            self.generator.set_state(state.cpu())

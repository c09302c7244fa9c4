"""Samples of a relaxed categorical distribution, differentiable in its logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from par_xl.ops.registry import has_values, host_can_look


class RelaxedOneHot(nn.Module):
    """A learned choice among ``n_choices``, sampled as a relaxed one-hot vector (Gumbel softmax, concrete).

    ``softmax((pi - log E) / temperature)`` with ``E ~ Exponential(1)``: the most likely entry of a sample is choice k
    with probability ``softmax(pi)[k]`` at every temperature; at 0 the samples become one-hot vectors, at infinity
    uniform. It is the distribution of ``torch.distributions.RelaxedOneHotCategorical(temperature, logits=pi)``, which
    takes no generator and draws in the dtype of its logits. Here noise and sample are fp32 (fp64 for fp64) whatever
    the dtype of ``pi`` and the autocast, and finite at every temperature that fp32 can hold.

    In evaluation mode there is no noise: the result is the one-hot vector of the most likely choice, the first of
    several equal ones.

    Args:
        n_choices: K.
        batch_shape: of several independent choices, all sampled at once.
        straight_through: the sample's value is the one-hot vector of its largest entry, its gradient the relaxed one's.

    Parameter: ``pi (*batch_shape, K)``, logits, 0 at first (every choice equally likely).

    Source: Jang, Gu, Poole (arXiv 1611.01144); Maddison, Mnih, Teh (arXiv 1611.00712).
    """

    def __init__(self, n_choices: int, batch_shape: tuple[int, ...] = (), *, straight_through: bool = False):
        super().__init__()
        if n_choices < 1:
            raise ValueError(f"n_choices must be positive, not {n_choices}")
        self.n_choices, self.straight_through = n_choices, straight_through
        self.pi = nn.Parameter(torch.zeros(*batch_shape, n_choices))

    def logits(self) -> Tensor:
        """``pi`` in fp32 (fp64 for fp64)."""
        return self.pi.to(torch.promote_types(self.pi.dtype, torch.float32))

    def probabilities(self) -> Tensor:
        """``softmax(pi)``, fp32 (fp64 for fp64), ``(*batch_shape, K)``."""
        return self.logits().softmax(-1)

    def forward(self, temperature: float | Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One sample, ``(*batch_shape, K)``, each row summing to 1.

        Args:
            temperature: positive.
            generator: of any device; default: torch's of the device that ``pi`` is on. One on the CPU gives the same
                samples on every device.

        Raises:
            ValueError: the temperature is not positive (a tensor's value is looked at on the CPU alone).
        """
        _check_temperature(temperature)
        logits = self.logits()
        if not self.training:
            return F.one_hot(logits.argmax(-1), self.n_choices).to(logits.dtype)
        noisy = logits - _exponential(logits, generator).log()
        # The largest is 0 after the subtraction, so that no temperature, however low, makes inf - inf of the softmax.
        relaxed = ((noisy - noisy.amax(-1, keepdim=True).detach()) / temperature).softmax(-1)
        if not self.straight_through:
            return relaxed
        return F.one_hot(relaxed.argmax(-1), self.n_choices) + (relaxed - relaxed.detach())

    def extra_repr(self) -> str:
        return f"{tuple(self.pi.shape)}, straight_through={self.straight_through}"


def _exponential(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Samples of Exponential(1), shaped like ``like``. torch's are never 0, so that their logarithms are finite."""
    if generator is None or not has_values(like):  # FakeTensors take no generator
        return torch.empty_like(like).exponential_()
    return _drawn(like, generator)


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.empty(like.shape, dtype=like.dtype, device=generator.device).exponential_(generator=generator)
    return drawn.to(like.device, non_blocking=True)


# A generator is nothing that torch.compile can trace: the graph breaks here, once, and goes on. This is what
# torch.compiler.disable sets; calling it would import torch._dynamo, and with it triton, along with par_xl.
_drawn._torchdynamo_disable = True  # type: ignore[attr-defined]


def _check_temperature(temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor) and not host_can_look(temperature):
        return
    smallest = torch.finfo(torch.float32).tiny
    if not temperature >= smallest:
        raise ValueError(f"temperature must be positive (at least {smallest:.3g}), not {float(temperature)}")

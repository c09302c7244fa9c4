"""Philox, the counter-based random numbers of the fused dropouts, in plain PyTorch on any device."""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def philox(seed: Tensor, counter: Tensor, rounds: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox4x32 at a 64-bit ``counter``, in int64: ``tl.randint4x(seed, counter, rounds)``.

    Source: Salmon et al.: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011); from 7 rounds on it passes BigCrush.
    """
    c0, c1, c2, c3 = counter & _LOW, (counter >> 32) & _LOW, torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the 64-bit products; their sign bit is only one more bit
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def draw_seeds(device: torch.device, n: int = 1) -> Tensor:
    """Seeds ``(n,)`` from torch's generator of the device, which stay there: no synchronisation."""
    return torch.randint(2**63 - 1, (n,), device=device)

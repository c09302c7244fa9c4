"""Contiguous-stream batching for truncated backpropagation through time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class ContiguousStreams:
    """Batches of consecutive windows over B parallel streams of one long token sequence.

    With ``n = (N - 1) // B``, stream b reads tokens ``[b*n, (b+1)*n)`` and predicts the tokens one step later, so row b
    of a batch goes on where row b of the batch before stopped, and each of the tokens 1 .. n*B is a target exactly once
    (the last ``(N - 1) % B`` are not used). A batch is ``(tokens, targets)``, each int64 ``(B, T)``; ``targets`` is
    ``tokens`` shifted by one. The last window of an epoch may be shorter.

    With ``random_length`` the windows are those of AWD-LSTM (Merity et al. 2017, section 5): the base is ``bptt`` with
    probability 0.95 and otherwise ``bptt / 2``, and the length is drawn from N(base, 5), at least 5. The lengths depend
    on ``seed`` and the epoch alone (``set_epoch``); every rank draws the same ones.

    Args:
        tokens: the corpus, integer (N,).
        batch_size: streams on each rank.
        bptt: length of a window.
        rank, world_size: of ``world_size * batch_size`` streams, this rank reads its own ``batch_size``.

    ``state_dict`` and ``load_state_dict`` keep the position, for the next iteration to go on from there.
    """

    def __init__(
        self,
        tokens: Tensor,
        batch_size: int,
        bptt: int,
        *,
        random_length: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if tokens.dim() != 1:
            raise ValueError(f"tokens must be one-dimensional, not of shape {tuple(tokens.shape)}")
        if min(batch_size, bptt, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size, bptt and world_size must be positive and rank below world_size, not "
                f"{batch_size=}, {bptt=}, {world_size=}, {rank=}"
            )
        streams = batch_size * world_size
        steps = (len(tokens) - 1) // streams
        if steps < 1:
            raise ValueError(f"tokens: {len(tokens)} are too few for {streams} streams")
        mine = slice(rank * batch_size, (rank + 1) * batch_size)
        self.inputs = tokens[: steps * streams].view(streams, steps)[mine]
        self.targets = tokens[1 : steps * streams + 1].view(streams, steps)[mine]
        self.bptt, self.random_length, self.seed = bptt, random_length, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Start epoch ``epoch`` with its own window lengths."""
        self.epoch, self.position, self._start = epoch, 0, 0
        self.bounds = self._bounds(epoch)

    def windows(self, epoch: int) -> int:
        """The number of batches in an epoch, which random lengths make differ between epochs."""
        return len(self._bounds(epoch)) - 1

    def _bounds(self, epoch: int) -> list[int]:
        steps = self.inputs.shape[1]
        if not self.random_length:
            return [*range(0, steps, self.bptt), steps]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        bounds = [0]
        while bounds[-1] < steps:
            base = self.bptt if torch.rand((), generator=generator) < 0.95 else self.bptt / 2
            length = max(5, int(torch.normal(base, 5.0, (), generator=generator)))
            bounds.append(min(bounds[-1] + length, steps))
        return bounds

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, self._start = self._start, 0
        for i in range(start, len(self)):
            window = slice(self.bounds[i], self.bounds[i + 1])
            self.position = i + 1
            yield self.inputs[:, window].long(), self.targets[:, window].long()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.set_epoch(state["epoch"])
        self.position = self._start = state["position"]

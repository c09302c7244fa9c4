"""A corpus as Lightning's data loaders."""

import lightning as L
from torch import Tensor

from par_xl.data import ContiguousStreams, Corpus


class LanguageModelData(L.LightningDataModule):
    """Contiguous streams over a corpus's splits; each rank reads its own streams.

    The lengths of random windows depend on the epoch, so the trainer must ask for a new loader at every epoch:
    ``Trainer(reload_dataloaders_every_n_epochs=1)``, which costs nothing, since a loader is a view of the corpus.

    Args:
        corpus: what :func:`par_xl.data.load_corpus` returns.
        batch_size: streams on each rank.
        bptt: length of a window (of the base length, if random).
        random_length: AWD-LSTM's random lengths, in training only.
        seed: of the lengths.
    """

    def __init__(self, corpus: Corpus, batch_size: int, bptt: int, *, random_length: bool = False, seed: int = 0):
        super().__init__()
        self.corpus, self.batch_size, self.bptt = corpus, batch_size, bptt
        self.random_length, self.seed = random_length, seed

    def streams(self, tokens: Tensor, random_length: bool = False) -> ContiguousStreams:
        """This rank's streams over ``tokens``."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return ContiguousStreams(
            tokens,
            self.batch_size,
            self.bptt,
            random_length=random_length,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def train_dataloader(self) -> ContiguousStreams:
        streams = self.streams(self.corpus.train, self.random_length)
        streams.set_epoch(self.trainer.current_epoch if self.trainer else 0)
        return streams

    def val_dataloader(self) -> ContiguousStreams:
        return self.streams(self.corpus.valid)

    def test_dataloader(self) -> ContiguousStreams:
        return self.streams(self.corpus.split("test"))

    def total_steps(self, epochs: int) -> int:
        """The number of training batches in the first ``epochs`` epochs."""
        streams = self.streams(self.corpus.train, self.random_length)
        return sum(streams.windows(epoch) for epoch in range(epochs))

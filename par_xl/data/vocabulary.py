"""What turns a text into token ids and back: words, bytes or SentencePiece's pieces."""

import io
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

EOS, UNK = "<eos>", "<unk>"


class Vocabulary:
    """Words by falling frequency, ties in alphabetical order, so that the ids below a cutoff are the frequent words.

    Args:
        words: the words by id. A word outside them encodes to ``<unk>`` if that is one of them, and is an error if not.
    """

    def __init__(self, words: Iterable[str]):
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def from_tokens(cls, tokens: Iterable[str], *, unk: bool = True) -> "Vocabulary":
        """Count ``tokens``; with ``unk``, ``<unk>`` is one of the words even if it is not one of the tokens."""
        counts = Counter(tokens)
        if unk:
            counts[UNK] += 0
        return cls(by_frequency(counts))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, tokens: Iterable[str]) -> Tensor:
        """The ids of ``tokens``, int32 of shape (N,).

        Raises:
            ValueError: a token is unknown and there is no ``<unk>``.
        """
        ids, unk = self.ids, self.ids.get(UNK)
        try:
            if unk is None:
                return int32(ids[token] for token in tokens)
            return int32(ids.get(token, unk) for token in tokens)
        except KeyError as error:
            raise ValueError(f"the token {error} is not in the vocabulary, which has no {UNK}") from None

    def decode(self, ids: Iterable[int] | Tensor) -> list[str]:
        """The words of ``ids``, which is one-dimensional."""
        return [self.words[i] for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]

    def encode_text(self, text: str) -> Tensor:
        """The ids of what white space separates in ``text``."""
        return self.encode(text.split())

    def decode_text(self, ids: Iterable[int] | Tensor) -> str:
        """The text of ``ids``: the words with spaces between them."""
        return " ".join(self.decode(ids))

    def save(self, folder: Path) -> None:
        """Write ``vocabulary.txt``, a word to a line; :func:`load_vocabulary` reads it."""
        (folder / "vocabulary.txt").write_text("\n".join(self.words) + "\n", encoding="utf-8")


class ByteVocabulary(Vocabulary):
    """The 256 bytes; what is no visible ASCII character is the word ``<0x..>``."""

    WORDS = [chr(byte) if 32 < byte < 127 else f"<0x{byte:02X}>" for byte in range(256)]

    def __init__(self) -> None:
        super().__init__(self.WORDS)

    def encode_text(self, text: str) -> Tensor:
        return int32(iter(text.encode()))

    def decode_text(self, ids: Iterable[int] | Tensor) -> str:
        """Bytes that are not UTF-8 become U+FFFD."""
        return bytes(ids.tolist() if isinstance(ids, Tensor) else ids).decode(errors="replace")


class PieceVocabulary(Vocabulary):
    """SentencePiece's pieces (Kudo 2018) by falling frequency, and ``<eos>`` for the end of a line.

    Args:
        words: the pieces by id, all those of the model in any order.
        model: SentencePiece's serialised model.
    """

    def __init__(self, words: Iterable[str], model: bytes):
        super().__init__(words)
        self.model = model
        self._processor = sentencepiece().SentencePieceProcessor(model_proto=model)
        self._theirs = [self._processor.piece_to_id(word) for word in self.words]
        self._ours = [0] * len(self.words)
        for ours, theirs in enumerate(self._theirs):
            self._ours[theirs] = ours

    @classmethod
    def train(cls, lines: Sequence[str], size: int, *, lowercase: bool = False) -> "PieceVocabulary":
        """A unigram model of ``size`` pieces, ``<eos>`` and the 256 bytes included, and their order in ``lines``.

        A character that the model has no piece for is spelt in bytes, so every text can be encoded, and comes back
        from ``decode_text`` as it was (white space aside; as its NFKC case folding with ``lowercase``). WikiText's
        word ``<unk>`` is one piece.

        Raises:
            ValueError: ``lines`` cannot be cut into so many or so few pieces.
        """
        written = io.BytesIO()
        try:
            sentencepiece().SentencePieceTrainer.train(
                sentence_iterator=(line for line in lines if line),
                model_writer=written,
                vocab_size=size,
                normalization_rule_name="nfkc_cf" if lowercase else "identity",
                byte_fallback=True,
                user_defined_symbols=["▁" + UNK],
                max_sentence_length=2**24,
                unk_piece="[UNK]",
                eos_piece=EOS,
                unk_id=0,
                eos_id=1,
                bos_id=-1,
                num_threads=4,  # a number of its own: the sums, and with them the pieces, depend on it
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise ValueError(f"SentencePiece cannot learn {size} pieces from this text: {error}") from None
        model = written.getvalue()
        processor = sentencepiece().SentencePieceProcessor(model_proto=model)
        counts = Counter({processor.id_to_piece(i): 0 for i in range(size)})
        for pieces in processor.encode(lines, out_type=str):
            counts.update(pieces)
        counts[EOS] += len(lines)
        return cls(by_frequency(counts), model)

    def encode_lines(self, lines: Sequence[str]) -> Tensor:
        """The ids of ``lines``, each ending in ``<eos>``."""
        ours, eos = self._ours, self.ids[EOS]
        return int32(i for ids in self._processor.encode(lines) for i in (*(ours[piece] for piece in ids), eos))

    def encode_text(self, text: str) -> Tensor:
        """The ids of ``text``, with ``<eos>`` for every line feed."""
        return self.encode_lines([" ".join(line.split()) for line in text.split("\n")])[:-1]

    def decode_text(self, ids: Iterable[int] | Tensor) -> str:
        lines: list[list[int]] = [[]]
        for i in ids.tolist() if isinstance(ids, Tensor) else ids:
            if i == self.ids[EOS]:
                lines.append([])
            else:
                lines[-1].append(self._theirs[i])
        return "\n".join(self._processor.decode(lines))

    def save(self, folder: Path) -> None:
        """Write ``vocabulary.txt`` and SentencePiece's ``vocabulary.model``."""
        super().save(folder)
        (folder / "vocabulary.model").write_bytes(self.model)


def load_vocabulary(folder: Path) -> Vocabulary:
    """What :meth:`Vocabulary.save` wrote, as the class that wrote it."""
    words = (folder / "vocabulary.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if (folder / "vocabulary.model").exists():
        return PieceVocabulary(words, (folder / "vocabulary.model").read_bytes())
    return ByteVocabulary() if words == ByteVocabulary.WORDS else Vocabulary(words)


def by_frequency(counts: Counter[str]) -> list[str]:
    """Most frequent first; of the equally frequent in alphabetical order."""
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def int32(ids: Iterable[int]) -> Tensor:
    encoded = array("i", ids)
    return torch.frombuffer(encoded, dtype=torch.int32) if encoded else torch.empty(0, dtype=torch.int32)


def sentencepiece() -> ModuleType:
    """The package, which comes with the extra ``par_xl[train]``."""
    import sentencepiece

    return sentencepiece

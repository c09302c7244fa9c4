"""Corpora as one stream of token ids for each split, with a vocabulary sorted by frequency."""

import hashlib
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from par_xl.data.human_numbers import human_numbers

EOS, UNK = "<eos>", "<unk>"
SPLITS = ("train", "valid", "test")
# Part of the cache's key: raise it when the encoding below changes.
_CACHE_VERSION = 1


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
        return cls(word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])))

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
                encoded = array("i", (ids[token] for token in tokens))
            else:
                encoded = array("i", (ids.get(token, unk) for token in tokens))
        except KeyError as error:
            raise ValueError(f"the token {error} is not in the vocabulary, which has no {UNK}") from None
        return torch.frombuffer(encoded, dtype=torch.int32) if encoded else torch.empty(0, dtype=torch.int32)

    def decode(self, ids: Iterable[int] | Tensor) -> list[str]:
        """The words of ``ids``, which is one-dimensional."""
        return [self.words[i] for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]


@dataclass(frozen=True)
class Corpus:
    """A vocabulary and the encoded splits, int32 of shape (N,); ``test`` is None where there is none."""

    vocabulary: Vocabulary
    train: Tensor
    valid: Tensor
    test: Tensor | None = None


def load_corpus(source: str | os.PathLike, *, cache_dir: str | os.PathLike | None = None) -> Corpus:
    """Load ``human-numbers``, or a folder with ``wiki.{train,valid,test}.tokens`` or ``{train,valid,test}.txt``.

    A folder's files are UTF-8 with one paragraph to a line; words are what white space separates, every line ends in
    ``<eos>``, and the vocabulary is that of the train split. ``test`` may be missing. The encoded corpus is kept in
    ``cache_dir`` (default: ``$PAR_XL_CACHE``, or else ``$XDG_CACHE_HOME/par_xl`` or ``~/.cache/par_xl``) under the hash
    of the files' content. ``bytes:FOLDER`` reads the same files as bytes, the 256 words. ``human-numbers`` has no
    ``<eos>`` and no test split; its first 80 % are the train split.

    Raises:
        FileNotFoundError: the folder, or its train or valid file, is missing.
        ValueError: a split has no words.
    """
    if str(source) == "human-numbers":
        tokens = human_numbers()
        cut = int(0.8 * len(tokens))
        vocabulary = Vocabulary.from_tokens(tokens[:cut], unk=False)
        return Corpus(vocabulary, vocabulary.encode(tokens[:cut]), vocabulary.encode(tokens[cut:]))

    if str(source).startswith("bytes:"):
        return _bytes_of(_find_files(Path(str(source).removeprefix("bytes:"))))
    files = _find_files(Path(source))
    cached = _cache_path(files, Path(cache_dir) if cache_dir is not None else _default_cache_dir())
    if not cached.exists():
        _write_atomically(cached, _encode_files(files))
    loaded = torch.load(cached, weights_only=True)
    return Corpus(Vocabulary(loaded.pop("words")), **loaded)


def _find_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder} is not a folder (nor "human-numbers", the corpus that needs no files)')
    for pattern in ("wiki.{}.tokens", "{}.txt"):
        files = {split: folder / pattern.format(split) for split in SPLITS}
        if files["train"].exists():
            if not files["valid"].exists():
                raise FileNotFoundError(f"{folder} has {files['train'].name} but no {files['valid'].name}")
            return {split: file for split, file in files.items() if file.exists()}
    raise FileNotFoundError(f"{folder} has neither wiki.train.tokens nor train.txt")


def _bytes_of(files: dict[str, Path]) -> Corpus:
    """Each split as its bytes; what is no visible ASCII character is the word ``<0x..>``."""
    words = [chr(byte) if 32 < byte < 127 else f"<0x{byte:02X}>" for byte in range(256)]
    splits = {
        split: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8).int() for split, file in files.items()
    }
    return Corpus(Vocabulary(words), **splits)


def _words(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield from line.split()
            yield EOS


def _encode_files(files: dict[str, Path]) -> dict[str, list[str] | Tensor]:
    vocabulary = Vocabulary.from_tokens(_words(files["train"]))
    splits = {split: vocabulary.encode(_words(file)) for split, file in files.items()}
    for split, ids in splits.items():
        if bool((ids == vocabulary.ids.get(EOS, -1)).all()):
            raise ValueError(f"the {split} split, {files[split]}, has no words")
    return {"words": vocabulary.words, **splits}


def _default_cache_dir() -> Path:
    if chosen := os.environ.get("PAR_XL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "par_xl"


def _cache_path(files: dict[str, Path], folder: Path) -> Path:
    digest = hashlib.sha256(str(_CACHE_VERSION).encode())
    for split, file in files.items():
        digest.update(f"{split} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return folder / f"corpus-{digest.hexdigest()[:32]}.pt"


def _write_atomically(path: Path, value: dict) -> None:
    """Write beside ``path`` and rename, so that concurrent writers and an interrupt never leave half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(value, file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise

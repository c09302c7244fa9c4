"""Corpora as one stream of token ids for each split, with a vocabulary sorted by frequency."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from par_xl.data.human_numbers import human_numbers
from par_xl.data.vocabulary import EOS, ByteVocabulary, PieceVocabulary, Vocabulary

SPLITS = ("train", "valid", "test")
# Part of the cache's key: raise it when an encoding changes.
_CACHE_VERSION = 2
_PIECES = 12_000


@dataclass(frozen=True)
class Corpus:
    """A vocabulary and the encoded splits, int32 of shape (N,); ``test`` is None where there is none.

    ``words`` has, for a split whose tokens are not words, the number of words that they stand for, ends of lines
    included.
    """

    vocabulary: Vocabulary
    train: Tensor
    valid: Tensor
    test: Tensor | None = None
    words: dict[str, int] = field(default_factory=dict)

    def split(self, name: str) -> Tensor:
        """The tokens of a split by name.

        Raises:
            ValueError: there is none.
        """
        tokens = getattr(self, name) if name in SPLITS else None
        if tokens is None:
            raise ValueError(f"the corpus has no {name} split")
        return tokens

    def tokens_per_word(self, split: str) -> float:
        """How many tokens of a split stand for a word: a loss per token, times this, is the loss per word.

        Losses per word can be compared between tokenizers, as long as all of them keep the text as it is.
        """
        tokens = self.split(split)
        return len(tokens) / self.words.get(split, len(tokens))


def load_corpus(source: str | os.PathLike, *, cache_dir: str | os.PathLike | None = None) -> Corpus:
    """Load ``human-numbers``, or a folder with ``wiki.{train,valid,test}.tokens`` or ``{train,valid,test}.txt``.

    A folder's files are UTF-8 with one paragraph to a line, and ``test`` may be missing. What is read of them:

    - ``FOLDER``: words, that is what white space separates; every line ends in ``<eos>``, and the vocabulary is that of
      the train split.
    - ``bytes:FOLDER``: the 256 bytes.
    - ``pieces:FOLDER``: the 12,000 pieces of a SentencePiece model learnt from the train split; every line ends in
      ``<eos>``. ``pieces-4000:FOLDER`` has another number; ``lowercase-pieces:FOLDER`` folds case and compatible
      characters first, as the published PAR Transformer-XL does, and is a text of its own to compare with.

    The encoded corpus is kept in ``cache_dir`` (default: ``$PAR_XL_CACHE``, or else ``$XDG_CACHE_HOME/par_xl`` or
    ``~/.cache/par_xl``) under the hash of the files' content. ``human-numbers`` has no ``<eos>`` and no test split; its
    first 80 % are the train split.

    Raises:
        FileNotFoundError: the folder, or its train or valid file, is missing.
        ModuleNotFoundError: pieces without the package sentencepiece.
        ValueError: a split has no words, or there cannot be so many pieces.
    """
    if str(source) == "human-numbers":
        tokens = human_numbers()
        cut = int(0.8 * len(tokens))
        vocabulary = Vocabulary.from_tokens(tokens[:cut], unk=False)
        return Corpus(vocabulary, vocabulary.encode(tokens[:cut]), vocabulary.encode(tokens[cut:]))

    if str(source).startswith("bytes:"):
        return _bytes_of(_find_files(Path(str(source).removeprefix("bytes:"))))
    pieces = re.fullmatch(r"(lowercase-)?pieces(?:-(\d+))?:(.+)", str(source))
    files = _find_files(Path(pieces[3] if pieces else source))
    size, lowercase = (int(pieces[2] or _PIECES), bool(pieces[1])) if pieces else (0, False)
    key = f"{size} pieces, {lowercase=}" if pieces else "words"
    cached = _cache_path(files, key, Path(cache_dir) if cache_dir is not None else default_cache_dir())
    if not cached.exists():
        _write_atomically(cached, _encode_pieces(files, size, lowercase) if pieces else _encode_words(files))
    loaded = torch.load(cached, weights_only=True)
    words, model = loaded.pop("vocabulary"), loaded.pop("model", None)
    return Corpus(PieceVocabulary(words, model) if pieces else Vocabulary(words), **loaded)


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
    contents = {split: bytearray(file.read_bytes()) for split, file in files.items()}
    words = {split: len(text.split()) + text.count(b"\n") for split, text in contents.items()}
    splits = {split: torch.frombuffer(text, dtype=torch.uint8).int() for split, text in contents.items()}
    return Corpus(ByteVocabulary(), **splits, words=words)


def _lines(file: Path) -> Iterator[list[str]]:
    """The words of each line."""
    with file.open(encoding="utf-8") as lines:
        yield from map(str.split, lines)


def _words(file: Path) -> Iterator[str]:
    for line in _lines(file):
        yield from line
        yield EOS


def _encode_words(files: dict[str, Path]) -> dict[str, Any]:
    vocabulary = Vocabulary.from_tokens(_words(files["train"]))
    splits = {split: vocabulary.encode(_words(file)) for split, file in files.items()}
    for split, ids in splits.items():
        if bool((ids == vocabulary.ids.get(EOS, -1)).all()):
            raise ValueError(f"the {split} split, {files[split]}, has no words")
    return {"vocabulary": vocabulary.words, **splits}


def _encode_pieces(files: dict[str, Path], size: int, lowercase: bool) -> dict[str, Any]:
    lines = {split: list(map(" ".join, _lines(file))) for split, file in files.items()}
    for split, file in files.items():
        if not any(lines[split]):
            raise ValueError(f"the {split} split, {file}, has no words")
    vocabulary = PieceVocabulary.train(lines["train"], size, lowercase=lowercase)
    splits = {split: vocabulary.encode_lines(lines[split]) for split in files}
    words = {split: sum(1 for _ in _words(file)) for split, file in files.items()}
    return {"vocabulary": vocabulary.words, "model": vocabulary.model, "words": words, **splits}


def default_cache_dir() -> Path:
    if chosen := os.environ.get("PAR_XL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "par_xl"


def _cache_path(files: dict[str, Path], tokenizer: str, folder: Path) -> Path:
    digest = hashlib.sha256(f"{_CACHE_VERSION} {tokenizer}\n".encode())
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

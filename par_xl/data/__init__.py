"""Corpora, vocabularies and the contiguous-stream batcher."""

from par_xl.data.corpus import Corpus, load_corpus
from par_xl.data.human_numbers import human_numbers
from par_xl.data.streams import ContiguousStreams
from par_xl.data.vocabulary import ByteVocabulary, PieceVocabulary, Vocabulary, load_vocabulary

__all__ = [
    "ByteVocabulary",
    "ContiguousStreams",
    "Corpus",
    "PieceVocabulary",
    "Vocabulary",
    "human_numbers",
    "load_corpus",
    "load_vocabulary",
]

"""Corpora, vocabularies and the contiguous-stream batcher."""

from par_xl.data.corpus import Corpus, Vocabulary, load_corpus
from par_xl.data.human_numbers import human_numbers
from par_xl.data.streams import ContiguousStreams

__all__ = ["ContiguousStreams", "Corpus", "Vocabulary", "human_numbers", "load_corpus"]

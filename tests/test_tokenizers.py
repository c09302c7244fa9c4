"""Bytes and SentencePiece's pieces: every text comes back, and losses per word can be compared."""

import math
import sys

import pytest
import torch
from torch import nn
from training_helpers import IGNORED, trainer

from par_xl.data import ByteVocabulary, PieceVocabulary, human_numbers, load_corpus, load_vocabulary
from par_xl.models import ModelOutput
from par_xl.training import LanguageModel, LanguageModelData, evaluate

pytestmark = pytest.mark.filterwarnings(*IGNORED)
NUMBERS = human_numbers()
LINES = ["the cat sat on the mat", "", "  and the <unk>\tdog Ran", "whatever the weather , the ﬁsh swims"] * 10
LINES += [" ".join(NUMBERS[i : i + 40]) for i in range(0, 4000, 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for split, lines in (("train", LINES), ("valid", ["the mat ran", "", "ünseen 中文 <unk>"]), ("test", LINES[::7])):
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("PAR_XL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def as_words(lines):
    return "\n".join(" ".join(line.split()) for line in lines) + "\n"


def test_every_text_comes_back_from_its_pieces(folder):
    corpus = load_corpus(f"pieces-300:{folder}")
    assert len(corpus.vocabulary) == 300
    for split, ids in (("train", corpus.train), ("valid", corpus.valid)):
        text = (folder / f"{split}.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        assert corpus.vocabulary.decode_text(ids) == as_words(text)
    assert corpus.vocabulary.encode_text("the  cat\n").tolist() == [
        *corpus.vocabulary.encode_text("the cat").tolist(),
        corpus.vocabulary.ids["<eos>"],
    ]
    assert corpus.vocabulary.decode(corpus.vocabulary.encode_text("<unk>")) == ["▁<unk>"]


def test_lowercase_pieces_fold_case_and_compatible_characters(folder):
    corpus = load_corpus(f"lowercase-pieces-300:{folder}")
    folded = as_words(LINES).replace("R", "r").replace("ﬁ", "fi")
    assert corpus.vocabulary.decode_text(corpus.train) == folded


def test_frequent_pieces_come_first(folder):
    corpus = load_corpus(f"pieces-300:{folder}")
    counts = torch.bincount(corpus.train, minlength=300)
    assert torch.equal(counts, counts.sort(descending=True).values)
    assert counts[corpus.vocabulary.ids["<eos>"]] == len(LINES)


def test_only_the_train_split_is_learnt_from(folder, tmp_path):
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text((folder / f"{split}.txt").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "valid.txt").write_text("quite another valid split\n" * 50)
    one, other = (load_corpus(f"pieces-300:{source}") for source in (folder, tmp_path))
    assert one.vocabulary.words == other.vocabulary.words and torch.equal(one.train, other.train)


def test_each_tokenizer_is_cached_apart(folder, tmp_path, monkeypatch):
    sizes = [len(load_corpus(f"pieces-{size}:{folder}", cache_dir=tmp_path).vocabulary) for size in (290, 300)]
    assert sizes == [290, 300] and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(PieceVocabulary, "train", None)  # the second time nothing is learnt
    corpus = load_corpus(f"pieces-300:{folder}", cache_dir=tmp_path)
    assert corpus.vocabulary.decode_text(corpus.valid).startswith("the mat ran\n")


def test_words_that_the_tokens_stand_for(folder):
    words = load_corpus(folder)
    for source in (f"pieces-300:{folder}", f"bytes:{folder}"):
        corpus = load_corpus(source)
        for split in ("train", "valid", "test"):
            expected = len(corpus.split(split)) / len(words.split(split))
            assert corpus.tokens_per_word(split) == expected > 1
    assert words.tokens_per_word("valid") == 1.0
    with pytest.raises(ValueError, match="no dev split"):
        words.tokens_per_word("dev")


def test_what_cannot_be_is_said(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="learn 5 pieces"):
        load_corpus(f"pieces-5:{folder}")
    with pytest.raises(ValueError, match="learn 50000 pieces"):
        load_corpus(f"pieces-50000:{folder}")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_corpus("pieces:nowhere")
    (tmp_path / "train.txt").write_text("some text\n")
    (tmp_path / "valid.txt").write_text(" \n")
    with pytest.raises(ValueError, match="valid split"):
        load_corpus(f"pieces-300:{tmp_path}")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModuleNotFoundError, match="sentencepiece"):
        load_corpus(f"pieces-300:{folder}")


@pytest.mark.parametrize("source", ["pieces-300:{}", "bytes:{}", "{}"])
def test_a_saved_vocabulary_is_the_same(folder, tmp_path, source):
    vocabulary = load_corpus(source.format(folder)).vocabulary
    vocabulary.save(tmp_path)
    loaded = load_vocabulary(tmp_path)
    assert type(loaded) is type(vocabulary) and loaded.words == vocabulary.words
    text = "the cat sat on one"
    assert torch.equal(loaded.encode_text(text), vocabulary.encode_text(text))
    assert loaded.decode_text(loaded.encode_text(text)) == text


def test_bytes_that_are_no_text_are_replaced():
    vocabulary = ByteVocabulary()
    assert vocabulary.decode_text(vocabulary.encode_text("ü中")) == "ü中"
    assert vocabulary.decode_text([65, 0xE4]) == "A\ufffd"


class Guess(nn.Module):
    """Gives every token the same probability."""

    def __init__(self, vocab_size):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, tokens, targets, memory):
        nll = -self.logits.log_softmax(0)[targets]
        return ModelOutput(hidden=tokens, memory=None, nll=nll, loss=nll.mean())

    def predict(self, hidden):
        return hidden


@pytest.mark.parametrize("source", ["pieces-300:{}", "bytes:{}", "{}"])
def test_perplexity_by_token_and_by_word(folder, source):
    """In the logs of a validation and from ``evaluate``; for words they are one number."""
    corpus = load_corpus(source.format(folder))
    size, ratio = len(corpus.vocabulary), corpus.tokens_per_word("valid")
    (logged,) = trainer().validate(LanguageModel(Guess(size)), LanguageModelData(corpus, 1, 8), verbose=False)
    assert logged["val_perplexity"] == pytest.approx(size, rel=1e-5)
    assert logged["val_word_perplexity"] == pytest.approx(size**ratio, rel=1e-4)
    result = evaluate(Guess(size), corpus, "valid", batch_size=1, bptt=8)
    assert result["perplexity"] == pytest.approx(size, rel=1e-5)
    assert math.log(result["word_perplexity"]) == pytest.approx(ratio * math.log(size), rel=1e-5)
    if source.startswith("bytes"):
        assert result["bits_per_token"] == pytest.approx(8)
    if source == "{}":
        assert result["word_perplexity"] == result["perplexity"]

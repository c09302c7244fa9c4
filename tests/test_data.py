"""par_xl.data: the generated corpus, vocabularies, the cache, and that the batcher loses and repeats no token."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from par_xl.data import ContiguousStreams, Vocabulary, human_numbers, load_corpus


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.txt").write_text("b a a\n\nc b a ü\n", encoding="utf-8")
    (data / "valid.txt").write_text("a zebra\n")
    return data


def test_human_numbers_is_fastbooks_corpus():
    tokens = human_numbers()
    assert len(tokens) == 63_095
    assert tokens.count(".") == 9_997 and len(set(tokens)) == 30
    assert " ".join(tokens[:9]) == "one . two . three . four . five"
    text = " ".join(tokens)
    assert " . one hundred . one hundred one . " in text
    assert text.endswith(". nine thousand nine hundred ninety eight . nine thousand nine hundred ninety nine")
    assert " . forty two . " in text and " . seven thousand nineteen . " in text
    assert "seven thousand nine hundred ninety nine . eight thousand one ." in text  # fastai's files skip 8000


def test_human_numbers_splits_at_80_percent():
    corpus = load_corpus("human-numbers")
    assert len(corpus.train) == int(0.8 * 63_095) and len(corpus.train) + len(corpus.valid) == 63_095
    assert corpus.vocabulary.decode(torch.cat([corpus.train, corpus.valid])) == human_numbers()
    assert len(corpus.vocabulary) == 30 and corpus.test is None


def test_vocabulary_is_sorted_by_frequency_with_ties_in_order():
    vocabulary = Vocabulary.from_tokens(["c", "b", "a", "b", "d", "<unk>", "d", "b"])
    assert vocabulary.words == ["b", "d", "<unk>", "a", "c"]
    assert Vocabulary.from_tokens(["x", "y", "x"]).words == ["x", "y", "<unk>"]
    assert vocabulary.encode(["a", "never", "b"]).tolist() == [3, 2, 0]
    assert vocabulary.decode([3, 2, 0]) == ["a", "<unk>", "b"]
    with pytest.raises(ValueError, match="'never'"):
        Vocabulary.from_tokens(["a"], unk=False).encode(["never"])


@pytest.mark.parametrize("pattern", ["{}.txt", "wiki.{}.tokens"])
def test_folder(folder, tmp_path, pattern):
    for split in ("train", "valid"):
        (folder / f"{split}.txt").rename(folder / pattern.format(split))
    corpus = load_corpus(folder, cache_dir=tmp_path / "cache")
    words = corpus.vocabulary.words
    assert words == ["<eos>", "a", "b", "c", "ü", "<unk>"]
    assert " ".join(corpus.vocabulary.decode(corpus.train)) == "b a a <eos> <eos> c b a ü <eos>"
    assert " ".join(corpus.vocabulary.decode(corpus.valid)) == "a <unk> <eos>"
    assert corpus.test is None
    (folder / pattern.format("test")).write_text("c\n")
    test = load_corpus(folder, cache_dir=tmp_path / "cache").test
    assert test is not None and corpus.vocabulary.decode(test) == ["c", "<eos>"]


def test_cache_is_used_and_follows_the_content(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PAR_XL_CACHE", str(tmp_path / "cache"))
    first = load_corpus(folder)
    (cached,) = (tmp_path / "cache").iterdir()
    stamp = cached.stat().st_mtime_ns
    again = load_corpus(folder)
    assert cached.stat().st_mtime_ns == stamp
    assert again.vocabulary.words == first.vocabulary.words and torch.equal(again.train, first.train)

    stat = (folder / "train.txt").stat()
    (folder / "train.txt").write_text("c a a\n\nc b a ü\n", encoding="utf-8")  # as long as before
    assert (folder / "train.txt").stat().st_size == stat.st_size
    assert load_corpus(folder).vocabulary.decode(load_corpus(folder).train)[0] == "c"


def test_concurrent_writers_of_the_cache(folder, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        corpora = list(pool.map(lambda _: load_corpus(folder, cache_dir=tmp_path / "cache"), range(16)))
    assert all(torch.equal(c.train, corpora[0].train) for c in corpora)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # and no temporary file is left


def test_missing_and_empty_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_corpus(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match=r"wiki\.train\.tokens nor train\.txt"):
        load_corpus(tmp_path / "bare")
    for text in ("", "\n \n"):
        (folder / "valid.txt").write_text(text)
        with pytest.raises(ValueError, match=r"valid split.*valid\.txt"):
            load_corpus(folder, cache_dir=tmp_path / "cache")
    (folder / "valid.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"valid\.txt"):
        load_corpus(folder)


@pytest.mark.parametrize("random_length", [False, True])
@pytest.mark.parametrize(
    ("length", "batch_size", "bptt"), [(101, 4, 7), (1000, 3, 20), (17, 16, 5), (64, 1, 63), (50, 7, 1)]
)
def test_streams_lose_and_repeat_nothing(length, batch_size, bptt, random_length):
    tokens = torch.arange(length, dtype=torch.int32)
    streams = ContiguousStreams(tokens, batch_size, bptt, random_length=random_length)
    batches = list(streams)
    assert len(batches) == len(streams) == streams.windows(0)
    inputs = torch.cat([x for x, _ in batches], 1)
    targets = torch.cat([y for _, y in batches], 1)
    steps = (length - 1) // batch_size
    assert torch.equal(inputs.flatten(), torch.arange(steps * batch_size))  # row b goes on across the batches
    assert torch.equal(targets, inputs + 1)
    assert inputs.dtype == targets.dtype == torch.int64
    assert all(x.shape == y.shape and x.shape[1] >= 1 for x, y in batches)
    if not random_length:
        assert all(x.shape[1] == bptt for x, _ in batches[:-1])


def test_random_lengths_follow_the_rule_and_the_seed():
    tokens = torch.arange(70 * 4000 + 1)

    def lengths(seed, epoch):
        streams = ContiguousStreams(tokens, 1, 70, random_length=True, seed=seed)
        streams.set_epoch(epoch)
        return torch.tensor(streams.bounds).diff()[:-1]  # the last one is cut off by the end of the data

    drawn = lengths(0, 0)
    halves = (drawn < 52).double().mean()
    assert 0.035 < halves < 0.065
    assert abs(drawn[drawn > 52].double().mean() - 69.5) < 0.5 and abs(drawn[drawn > 52].double().std() - 5) < 0.3
    assert drawn.unique().numel() > 30
    assert torch.equal(drawn, lengths(0, 0))
    assert not torch.equal(drawn[:100], lengths(1, 0)[:100])
    assert not torch.equal(drawn[:100], lengths(0, 1)[:100])
    short = torch.tensor(ContiguousStreams(tokens, 1, 6, random_length=True).bounds).diff()[:-1]
    assert short.min() == 5


def test_each_rank_has_its_own_streams_and_the_same_windows():
    tokens = torch.arange(1001)
    ranks = [ContiguousStreams(tokens, 2, 9, random_length=True, seed=3, rank=r, world_size=2) for r in range(2)]
    whole = ContiguousStreams(tokens, 4, 9, random_length=True, seed=3)
    for (x0, y0), (x1, y1), (x, y) in zip(*ranks, whole, strict=True):
        assert torch.equal(torch.cat([x0, x1]), x) and torch.equal(torch.cat([y0, y1]), y)


def test_streams_resume_in_the_middle_of_an_epoch():
    streams = ContiguousStreams(torch.arange(500), 2, 10, random_length=True)
    streams.set_epoch(3)
    batches = [x for x, _ in streams]
    iterator = iter(streams)
    for _ in range(4):
        next(iterator)
    state = streams.state_dict()
    other = ContiguousStreams(torch.arange(500), 2, 10, random_length=True)
    other.load_state_dict(state)
    iter(other)  # an iterator that nobody asks for a batch uses nothing up
    rest = [x for x, _ in other]
    assert len(rest) == len(batches) - 4
    assert all(torch.equal(a, b) for a, b in zip(rest, batches[4:], strict=True))
    assert len(list(other)) == len(batches)  # the next iteration is a whole epoch


def test_streams_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="8 are too few for 8 streams"):
        ContiguousStreams(torch.arange(8), 8, 4)
    with pytest.raises(ValueError, match="one-dimensional"):
        ContiguousStreams(torch.zeros(2, 3), 1, 4)
    with pytest.raises(ValueError, match="rank"):
        ContiguousStreams(torch.arange(100), 1, 4, rank=2, world_size=2)

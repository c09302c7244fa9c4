"""par_xl.nn's dropouts: what is dropped, for how long, with which scale; and that WeightDrop leaves no trace."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import par_xl
from par_xl.nn import EmbeddingDropout, LockedDropout, WeightDrop


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("batch_first", [True, False])
def test_locked_dropout_has_one_mask_for_all_time_steps(batch_first):
    dropout = LockedDropout(0.4, batch_first=batch_first)
    time = 1 if batch_first else 0
    y = dropout(torch.ones(40, 40, 50))
    assert torch.equal(y, y.select(time, 0).unsqueeze(time).expand_as(y))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    assert not torch.equal(y.select(1 - time, 0), y.select(1 - time, 1))  # each sequence has its own mask
    assert abs(y.mean() - 1) < 0.1


def test_locked_dropout_is_dropout1d_over_features():
    x = torch.randn(3, 5, 7, requires_grad=True)
    y = LockedDropout(0.5)(x)
    torch.manual_seed(0)
    torch.randn(3, 5, 7)
    assert torch.equal(y, nn.Dropout1d(0.5)(x.transpose(1, 2)).transpose(1, 2))
    y.sum().backward()
    assert torch.equal(x.grad, (y / x).detach().round())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_locked_dropout_keeps_the_dtype_and_is_nothing_in_evaluation(dtype):
    x = torch.randn(2, 3, 4, dtype=dtype)
    assert LockedDropout(0.5)(x).dtype == dtype
    assert LockedDropout(0.5).eval()(x) is x and LockedDropout(0.0)(x) is x


def test_embedding_dropout_drops_whole_words():
    embedding = EmbeddingDropout(50, 8, 0.4)
    assert list(embedding.state_dict()) == ["weight"]
    tokens = torch.randint(50, (16, 20))
    y = embedding(tokens)
    scale = (y / embedding.weight[tokens]).detach()
    for word in tokens.unique():
        of_word = scale[tokens == word]
        assert torch.allclose(of_word, of_word[0, 0].expand_as(of_word), atol=1e-5)
        assert of_word[0, 0] == 0 or abs(of_word[0, 0] - 1 / 0.6) < 1e-5
    assert 0 < (scale == 0).double().mean() < 1
    y.sum().backward()
    counts = torch.bincount(tokens.flatten(), scale.mean(-1).flatten().double(), minlength=50)
    torch.testing.assert_close(embedding.weight.grad, counts.float()[:, None].expand(50, 8))
    assert torch.equal(embedding.eval()(tokens), embedding.weight[tokens])


def make(kind=nn.LSTM, p=0.5, **options):
    module = kind(6, 8, batch_first=True, **options)
    return copy.deepcopy(module), WeightDrop(module, p)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_weight_drop_evaluates_with_the_raw_weights(kind):
    plain, dropped = make(kind)
    x = torch.randn(3, 5, 6)
    expected, state = plain(x)
    got, got_state = dropped.eval()(x)
    assert torch.equal(got, expected)
    again = dropped(x, got_state)[0]
    assert torch.equal(again, plain(x, state)[0]) and not torch.equal(again, got)


def test_weight_drop_is_the_lstm_with_a_dropped_recurrent_matrix():
    plain, dropped = make()
    x = torch.randn(3, 5, 6)
    torch.manual_seed(7)
    got = dropped(x)[0]
    torch.manual_seed(7)
    mask = par_xl.dropout(torch.ones(32, 8), 0.5)
    raw = dropped.module.weight_hh_l0_raw
    plain.weight_hh_l0.data = raw.data * mask
    assert torch.equal(got, plain(x)[0])
    got.square().sum().backward()
    plain(x)[0].square().sum().backward()
    torch.testing.assert_close(raw.grad, plain.weight_hh_l0.grad * mask)
    torch.testing.assert_close(dropped.module.weight_ih_l0.grad, plain.weight_ih_l0.grad)
    assert not torch.equal(got, dropped(x)[0])  # a new mask at each call


def test_weight_drop_names_its_parameters_as_awd_lstm_does():
    _, dropped = make()
    names = {"weight_ih_l0", "weight_hh_l0_raw", "bias_ih_l0", "bias_hh_l0"}
    assert set(dropped.state_dict()) == {f"module.{name}" for name in names}
    assert len(list(dropped.parameters())) == 4


def test_weight_drop_survives_what_is_done_to_modules():
    _, dropped = make()
    x = torch.randn(3, 5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dropped(x)[0].sum().backward()
        for other in (copy.deepcopy(dropped), pickle.loads(pickle.dumps(dropped))):
            assert torch.equal(other.eval()(x)[0], copy.deepcopy(dropped).eval()(x)[0])
            with torch.no_grad():
                other.module.weight_hh_l0_raw.zero_()
            assert not torch.equal(other(x)[0], copy.deepcopy(dropped).eval()(x)[0])  # a copy shares nothing
        assert copy.deepcopy(dropped).double()(x.double())[0].dtype == torch.float64
        assert copy.deepcopy(dropped).bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16
        zeroed = {name: torch.zeros_like(weight) for name, weight in dropped.state_dict().items()}
        assert not torch.func.functional_call(dropped, zeroed, (x,))[0].any()
        loaded = make()[1]
        loaded.load_state_dict(dropped.state_dict())
        assert torch.equal(loaded.eval()(x)[0], dropped.eval()(x)[0])


def test_weight_drop_in_bf16_autocast():
    _, dropped = make()
    x = torch.randn(3, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = dropped(x)
        y, _ = dropped(x, state)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in dropped.parameters())


def test_one_chunk_has_cudnns_layout_and_the_gradients_of_separate_weights():
    """cuDNN checks addresses: one storage from its start, matrices in order, then biases."""
    _, dropped = make(num_layers=2)
    weights = [dropped._weight(name) for name in dropped._names]
    chunk = dropped._in_one_chunk(weights)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(weights, chunk, strict=True))
    offsets = {name: view.storage_offset() for name, view in zip(dropped._names, chunk, strict=True)}
    assert sorted(offsets, key=offsets.get) == [
        f"{kind}_l{layer}" for kinds in (("weight_ih", "weight_hh"), ("bias_ih", "bias_hh"))
        for layer in range(2) for kind in kinds
    ]  # fmt: skip
    assert min(offsets.values()) == 0 and len({view.untyped_storage().data_ptr() for view in chunk}) == 1
    gradients = torch.autograd.grad(sum(view.square().sum() for view in chunk), weights)
    assert all(torch.equal(g, 2 * w) for g, w in zip(gradients, weights, strict=True))


def test_weight_drop_under_compile():
    _, dropped = make(p=0.0)
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(torch.compile(dropped)(x)[0], dropped(x)[0])


@pytest.mark.gpu
def test_weight_drop_on_cudnn_without_warnings():
    plain, dropped = make()
    plain, dropped, x = plain.cuda(), dropped.cuda(), torch.randn(3, 5, 6, device="cuda")
    with warnings.catch_warnings(), torch.profiler.profile() as profile:
        warnings.simplefilter("error")
        dropped(x)[0].sum().backward()
    assert any("_cudnn_rnn" in event.key for event in profile.key_averages())
    torch.testing.assert_close(dropped.eval()(x)[0], plain(x)[0])


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="nn.LSTM.*Linear"):
        WeightDrop(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight_hh_l1"):
        WeightDrop(nn.LSTM(2, 2), weights=["weight_hh_l1"])
    for make_bad in (
        lambda: LockedDropout(1.5),
        lambda: EmbeddingDropout(3, 2, -0.1),
        lambda: WeightDrop(nn.LSTM(2, 2), 2),
    ):
        with pytest.raises(ValueError, match="between 0 and 1"):
            make_bad()

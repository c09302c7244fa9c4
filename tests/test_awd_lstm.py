"""par_xl.models.AWDLSTM against the upstream forward recomputed step by step, and the state it carries."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F

from par_xl.models import AWDLSTM, AWDLSTMConfig, ModelOutput

V, B, T = 23, 3, 6
NO_DROPOUT = dict(dropout=0.0, dropout_hidden=0.0, dropout_input=0.0, dropout_embedding=0.0, weight_drop=0.0)


def make(**options):
    torch.manual_seed(0)
    return AWDLSTM(AWDLSTMConfig(**{"vocab_size": V, "d_model": 10, "d_hidden": 14, **options}))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V, (B, T), generator=generator), torch.randint(V, (B, T), generator=generator)


def upstream_loss(weights, tokens, targets, prefixes):
    """The mean cross-entropy of awd-lstm-lm and of fastai's AWD_LSTM in evaluation, in time-first loops, fp64."""
    encoder, recurrent, inner, decoder = prefixes
    weight = {name: value.double() for name, value in weights.items()}
    x = weight[f"{encoder}.weight"][tokens.T]
    layer = 0
    while f"{inner.format(layer)}weight_ih_l0" in weight:
        w_ih, b_ih, b_hh = (weight[inner.format(layer) + name] for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"))
        w_hh = weight[recurrent.format(layer)]
        h = c = torch.zeros(tokens.shape[0], w_hh.shape[1], dtype=torch.float64)
        steps = []
        for x_t in x:
            i, f, g, o = (x_t @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(h)
        x, layer = torch.stack(steps), layer + 1
    logits = x @ weight[f"{decoder}.weight"].T + weight[f"{decoder}.bias"]
    return F.cross_entropy(logits.flatten(0, 1), targets.T.flatten())


def upstream_state_dict(recurrent, inner, encoder, decoder, tied, sizes=((10, 14), (14, 14), (14, 10))):
    torch.manual_seed(3)
    state = {f"{encoder}.weight": torch.randn(V, sizes[0][0])}
    for i, (before, after) in enumerate(sizes):
        state[recurrent.format(i)] = torch.randn(4 * after, after) * 0.3
        state[inner.format(i) + "weight_ih_l0"] = torch.randn(4 * after, before) * 0.3
        state[inner.format(i) + "bias_ih_l0"] = torch.randn(4 * after)
        state[inner.format(i) + "bias_hh_l0"] = torch.randn(4 * after)
    state[f"{decoder}.weight"] = state[f"{encoder}.weight"] if tied else torch.randn(V, sizes[-1][1])
    state[f"{decoder}.bias"] = torch.randn(V)
    return state


SALESFORCE = ("encoder", "rnns.{}.module.weight_hh_l0_raw", "rnns.{}.module.", "decoder")
SALESFORCE_NO_WDROP = ("encoder", "rnns.{}.weight_hh_l0", "rnns.{}.", "decoder")
FASTAI = ("0.encoder", "0.rnns.{}.weight_hh_l0_raw", "0.rnns.{}.module.", "1.decoder")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefixes", [SALESFORCE, SALESFORCE_NO_WDROP])
def test_from_salesforce_gives_upstreams_loss(batch, prefixes, tied):
    encoder, recurrent, inner, decoder = prefixes
    sizes = ((10, 14), (14, 14), (14, 10 if tied else 14))
    state = upstream_state_dict(recurrent, inner, encoder, decoder, tied, sizes)
    options = {"emsize": 10, "nhid": 14, "nlayers": 3, "dropouth": 0.2, "wdrop": 0.45, "tied": tied, "model": "LSTM"}
    model = AWDLSTM.from_salesforce(state, options).eval()
    assert model.config.dropout_hidden == 0.2 and model.config.weight_drop == 0.45
    assert model.config.dropout == 0.4 and model.config.dropout_input == 0.65  # upstream's defaults
    torch.testing.assert_close(
        model(*batch).loss.double(), upstream_loss(state, *batch, prefixes), atol=1e-6, rtol=1e-6
    )


def test_from_fastai_gives_upstreams_loss(batch):
    encoder, recurrent, inner, decoder = FASTAI
    state = upstream_state_dict(recurrent, inner, encoder, decoder, True)
    expected = upstream_loss(state, *batch, FASTAI)
    state["0.encoder_dp.emb.weight"] = state["0.encoder.weight"]
    for i in range(3):  # fastai 1 also saves the dropped weights, which are noise
        state[f"0.rnns.{i}.module.weight_hh_l0"] = torch.full_like(state[f"0.rnns.{i}.weight_hh_l0_raw"], torch.nan)
    model = AWDLSTM.from_fastai(state, {"emb_sz": 10, "n_hid": 14, "bidir": False, "pad_token": 1}).eval()
    assert model.config.dropout == 0.1 and model.config.weight_drop == 0.2  # fastai's defaults
    torch.testing.assert_close(model(*batch).loss.double(), expected, atol=1e-6, rtol=1e-6)


def test_from_salesforce_takes_the_criterions_tails(batch):
    """A word of a tail costs -log p(tail's column in the head) - log p(word in its tail); the last column is tail 1."""
    encoder, recurrent, inner, decoder = SALESFORCE
    state = upstream_state_dict(recurrent, inner, encoder, decoder, True)
    criterion = {"tail_vectors": torch.randn(2, 10), "tail_bias": torch.randn(2)}
    options = {"emsize": 10, "nhid": 14, "splits": [7, 12]}
    with pytest.raises(ValueError, match=r"criterion must be given: the softmax is split at \[7, 12\]"):
        AWDLSTM.from_salesforce(state, options)
    model = AWDLSTM.from_salesforce(state, options, criterion).eval()
    assert model.config.cutoffs == (7, 12)
    output = model(*batch)
    logits = output.hidden @ state["decoder.weight"].T + state["decoder.bias"]
    columns = output.hidden @ criterion["tail_vectors"].T + criterion["tail_bias"]
    head = torch.cat([logits[..., :7], columns], -1).log_softmax(-1)
    tails = [head[..., -i, None] + logits[..., a:b].log_softmax(-1) for i, a, b in ((1, 7, 12), (2, 12, V))]
    log_prob = torch.cat([head[..., :7], *tails], -1)
    torch.testing.assert_close(-output.nll, log_prob.gather(2, batch[1][..., None])[..., 0])
    torch.testing.assert_close(model.log_prob(output.hidden), log_prob)


@pytest.mark.parametrize(("n_words", "splits"), [(75_001, (2800, 20000, 76000)), (500_001, (4200, 35000, 180000))])
def test_large_vocabularies_are_split_as_upstream(n_words, splits):
    state = {"encoder.weight": torch.empty(n_words, 0)}
    with pytest.raises(ValueError, match=re.escape(f"criterion must be given: the softmax is split at {splits}")):
        AWDLSTM.from_salesforce(state, {})
    with pytest.raises(RuntimeError, match="Missing"):  # not split: it goes on, to weights that are not there
        AWDLSTM.from_salesforce({"encoder.weight": torch.empty(75_000, 1)}, {"emsize": 1, "nhid": 1})


def test_generates_what_it_finds_most_probable(batch):
    model = make(cutoffs=(7, 12))
    model(*batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 2.0)  # so that what is most probable depends on all that was read
    text = model.generate(batch[0], 5, temperature=0)
    assert torch.equal(text[:, :T], batch[0]) and text.shape == (B, T + 5) and model.training
    output = model.eval()(text)
    assert torch.equal(model.predict(output.hidden[:, T - 1 : -1]), text[:, T:])
    rest = model.generate(text[:, T:], 3, memory=model(text[:, :T]).memory, temperature=0)
    assert torch.equal(rest[:, :5], text[:, T:]) and torch.equal(
        rest[:, 5:], model.generate(text, 3, temperature=0)[:, -3:]
    )
    assert not torch.equal(rest, model.generate(text[:, T:], 3, temperature=0))


def test_loaders_refuse_what_is_not_an_awd_lstm(batch):
    state = make().state_dict()
    with pytest.raises(ValueError, match="QRNN"):
        AWDLSTM.from_salesforce(state, {"model": "QRNN"})
    with pytest.raises(ValueError, match="bidir"):
        AWDLSTM.from_fastai(state, {"bidir": True})
    state.pop("rnns.1.module.weight_hh_l0_raw")
    with pytest.raises(RuntimeError, match=r"rnns\.1\.module\.weight_hh_l0_raw"):
        AWDLSTM.from_salesforce(state, {"emsize": 10, "nhid": 14})


def test_the_state_dict_is_awd_lstms():
    model = make()
    round_trip = AWDLSTM.from_salesforce(model.state_dict(), {"emsize": 10, "nhid": 14})
    assert set(round_trip.state_dict()) == set(model.state_dict())
    assert round_trip.decoder.weight is round_trip.encoder.weight
    assert "rnns.0.module.weight_hh_l0_raw" in model.state_dict()


def test_output_has_the_shapes_of_the_design(batch):
    model = make()
    output = model(*batch)
    assert isinstance(output, ModelOutput)
    assert output.hidden.shape == (B, T, 10) and output.hidden is output.outputs[-1]
    assert output.nll.shape == (B, T) and output.nll.dtype == torch.float32
    assert torch.equal(output.loss, output.nll.mean())
    assert [r.shape for r in output.raw_outputs] == [r.shape for r in output.outputs] == [(B, T, 14)] * 2 + [(B, T, 10)]
    without = model(batch[0])
    assert without.nll is None and without.loss is None and without.hidden.shape == (B, T, 10)
    predicted = model.predict(output.hidden)
    assert predicted.shape == (B, T) and predicted.dtype == torch.int64
    best = model.eval()(batch[0], predicted := model.predict(model(batch[0]).hidden)).nll
    assert (best <= model(batch[0], (predicted + 1) % V).nll).all()


def test_raw_is_before_and_outputs_after_dropout(batch):
    model = make(**{**NO_DROPOUT, "dropout": 0.5, "dropout_hidden": 0.25})
    output = model(*batch)
    for raw, dropped, p in zip(output.raw_outputs, output.outputs, (0.25, 0.25, 0.5), strict=True):
        scale = dropped / raw
        assert set(scale.detach().mul(1 - p).round(decimals=4).unique().tolist()) == {0.0, 1.0}
        assert torch.equal(scale[:, :1].round(decimals=4).expand_as(scale), scale.round(decimals=4))  # locked in time
    evaluated = model.eval()(*batch)
    assert all(torch.equal(a, b) for a, b in zip(evaluated.raw_outputs, evaluated.outputs, strict=True))


def test_segments_with_memory_are_the_whole_sequence(batch):
    model = make().eval()
    whole = model(*batch)
    memory, nll = model.init_memory(B), []
    for window in (slice(0, 1), slice(1, 4), slice(4, 6)):
        output = model(batch[0][:, window], batch[1][:, window], memory)
        memory = output.memory
        nll.append(output.nll)
    torch.testing.assert_close(torch.cat(nll, 1), whole.nll)
    torch.testing.assert_close(memory, whole.memory)
    assert torch.equal(model(*batch).nll, model(*batch, model.init_memory(B)).nll)
    assert not torch.equal(model(*batch, whole.memory).nll, whole.nll)


def test_memory_is_detached(batch):
    model = make()
    output = model(*batch)
    assert all(not state.requires_grad for layer in output.memory for state in layer)
    model(*batch, output.memory).loss.backward()  # would fail if it reached the first segment's freed graph
    model(*batch, output.memory).loss.backward()


def test_memory_of_another_batch_size_is_refused(batch):
    model = make()
    with pytest.raises(ValueError, match="batch of 4.*batch of 3"):
        model(*batch, model.init_memory(4))


def test_weights_begin_within_a_tenth():
    for model in (make(), make(tie_weights=False)):
        for weight in (model.encoder.weight, model.decoder.weight):
            assert 0.08 < weight.abs().max() <= 0.1


def test_tied_weights_are_one_parameter(batch):
    model = make()
    assert model.decoder.weight is model.encoder.weight
    assert sum(p is model.encoder.weight for p in model.parameters()) == 1
    assert copy.deepcopy(model).decoder.weight is not model.encoder.weight
    other = copy.deepcopy(model)
    assert other.decoder.weight is other.encoder.weight
    untied = make(tie_weights=False)
    assert untied.decoder.weight.shape == (V, 14) and untied.encoder.weight.shape == (V, 10)
    untied(*batch).loss.backward()


def test_gradients_against_finite_differences():
    model = make(d_model=3, d_hidden=4, n_layers=2, **NO_DROPOUT).double()
    tokens, targets = torch.randint(V, (2, 3)), torch.randint(V, (2, 3))
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (tokens, targets)).loss

    assert torch.autograd.gradcheck(loss, values)


def test_bf16_autocast_and_compile(batch):
    model = make(**NO_DROPOUT)
    expected = model(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*batch, model.init_memory(B))
        output = model(*batch, output.memory)
        first = model(*batch)
    output.loss.backward()
    assert output.nll.dtype == torch.float32
    torch.testing.assert_close(first.nll, expected.nll, atol=0.03, rtol=0.03)
    compiled = torch.compile(model)
    torch.testing.assert_close(compiled(*batch).nll, expected.nll)
    shorter = batch[0][:, :4], batch[1][:, :4], expected.memory
    torch.testing.assert_close(compiled(*shorter).nll, model(*shorter).nll)

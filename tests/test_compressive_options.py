"""The Compressive Transformer's options against a plain model, written from the maths step by step."""

import math

import pytest
import torch
import torch.nn.functional as F

from par_xl.models import CompressiveConfig, CompressiveTransformer

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "none": {},
    "zero-start": dict(memory_start="zeros"),
    "own-positions": dict(compressed_positions="own"),
    "own-positions-pre-norm": dict(compressed_positions="own", pre_lnorm=True, clamp_len=5),
    "clamped": dict(clamp_len=5),
    "gated": dict(gated=True),
    "gated-pre-norm": dict(gated=True, pre_lnorm=True),
    "enhanced": dict(enhanced_recurrence=True),
    "memory-layers": dict(memory_layers=(1, 2)),
    "most-used": dict(compression="most_used"),
    "most-used-own-positions": dict(compression="most_used", compressed_positions="own"),
    "all": dict(compressed_positions="own", gated=True, enhanced_recurrence=True, memory_layers=(0, 2), untie_r=True),
}


def new_model(**options):
    sizes = dict(vocab_size=17, n_layer=3, n_head=2, d_model=8, d_head=4, d_inner=16)
    lengths = dict(mem_len=6, compressed_len=4, rate=2, compression="mean")
    model = CompressiveTransformer(CompressiveConfig(**{**sizes, **lengths, **options})).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.4)
    return model


def wave(distance, width):
    angles = [distance / 10000 ** (2 * i / width) for i in range(width // 2)]
    return torch.tensor([f(a) for f in (math.sin, math.cos) for a in angles], dtype=torch.float64)


def joined(module, x, y):
    """The residual connection, or the GRU's equations with the sublayer as input and the residual stream as state."""
    if not hasattr(module.join, "gru"):
        return x + y
    gru = module.join.gru
    from_y = (y @ gru.weight_ih.T + gru.bias_ih).chunk(3, -1)
    from_x = (x @ gru.weight_hh.T + gru.bias_hh).chunk(3, -1)
    reset, update = ((a + b).sigmoid() for a, b in zip(from_y[:2], from_x[:2], strict=True))
    new = (from_y[2] + reset * from_x[2]).tanh()
    return (1 - update) * new + update * x


def attention(model, i, x, compressed, memory):
    """Layer i's attention of ``x (B, T, d)`` over three lists of ``(B, d)``, and what each step received of it."""
    c, layer, own = model.config, model.layers[i].dec_attn, model.config.compressed_positions == "own"
    norm = layer.layer_norm if c.pre_lnorm else lambda x: x
    content_bias, position_bias = (layer.r_w_bias, layer.r_r_bias) if c.untie_r else (model.r_w_bias, model.r_r_bias)
    wq, wk, wv = layer.qkv_net.weight.chunk(3)
    steps = [*compressed, *memory, *x.unbind(1)]
    out, received = [], torch.zeros(len(x), len(steps)).double()
    for t, query in enumerate(x.unbind(1)):
        scores, values = [], []
        for j in range(len(compressed) + len(memory) + t + 1):
            old = own and j < len(compressed)
            distance = t + len(compressed) - j if old else t + len(compressed) + len(memory) - j
            encoding = wave(min(distance, c.clamp_len) if c.clamp_len else distance, c.d_model)
            table = model.compressed_positions[str(i)] if old else layer
            row = (table.r_net.weight @ encoding).view(c.n_head, c.d_head)
            bias = table.r_r_bias if old else position_bias
            q, k, v = (
                F.linear(norm(y), w).view(-1, c.n_head, c.d_head)
                for y, w in ((query, wq), (steps[j], wk), (steps[j], wv))
            )
            scores.append((((q + content_bias) * k).sum(-1) + ((q + bias) * row).sum(-1)) / math.sqrt(c.d_head))
            values.append(v)
        weights = torch.stack(scores).softmax(0)
        out.append(sum(w[..., None] * v for w, v in zip(weights, values, strict=True)).flatten(1))
        received[:, : len(weights)] += weights.mean(2).T
    result = joined(layer, x, torch.stack(out, 1) @ layer.o_net.weight.T)
    return result if c.pre_lnorm else layer.layer_norm(result), received


def feed_forward(layer, x):
    norm = layer.layer_norm
    first, second = layer.CoreNet[0], layer.CoreNet[3]
    y = norm(x) if layer.pre_lnorm else x
    result = joined(layer, x, F.linear(F.linear(y, first.weight, first.bias).relu(), second.weight, second.bias))
    return result if layer.pre_lnorm else norm(result)


def compress(c, steps, usage):
    """A list of steps ``(B, d)`` to one for each ``rate`` of them."""
    if c.compression == "mean":
        return [sum(steps[i : i + c.rate]) / c.rate for i in range(0, len(steps), c.rate)]
    kept = [sorted(row.argsort(descending=True)[: len(steps) // c.rate].tolist()) for row in usage]
    return [torch.stack([steps[i][b] for b, i in enumerate(column)]) for column in zip(*kept, strict=True)]


def plain_model(model, segments):
    """The output of each segment."""
    c = model.config
    with_memory = c.memory_layers or range(c.n_layer)
    zero = [torch.zeros(len(segments[0]), c.d_model).double()] if c.memory_start == "zeros" else []
    memory = {i: zero * c.mem_len for i in range(c.n_layer)}
    compressed = {i: zero * c.compressed_len for i in range(c.n_layer)}
    usage = {i: torch.zeros(len(segments[0]), len(memory[i])).double() for i in range(c.n_layer)}
    for tokens in segments:
        x = model.word_emb(tokens)
        for i, layer in enumerate(model.layers):
            before = x
            x, received = attention(model, i, x, compressed[i], memory[i])
            x = feed_forward(layer.pos_ff, x)
            if i in with_memory:
                usage[i] = received[:, len(compressed[i]) :] + F.pad(usage[i], (0, x.shape[1]))
                memory[i] = memory[i] + list((x if c.enhanced_recurrence else before).unbind(1))
        for i in with_memory:
            n = max(0, len(memory[i]) - c.mem_len)
            fresh = compress(c, memory[i][:n], usage[i][:, :n])
            compressed[i] = [*compressed[i], *fresh][-c.compressed_len :]
            memory[i], usage[i] = memory[i][n:], usage[i][:, n:]
        yield x


@pytest.mark.parametrize("name", OPTIONS)
def test_against_the_plain_model(name):
    """Until compressed steps have been dropped."""
    model = new_model(**OPTIONS[name]).eval()
    segments = torch.randint(17, (2, 16)).split(4, 1) + torch.randint(17, (2, 6)).split(2, 1)
    memory = None
    with torch.no_grad():
        for tokens, wanted in zip(segments, plain_model(model, segments), strict=True):
            output = model(tokens, memory=memory)
            memory = output.memory
            torch.testing.assert_close(output.hidden, wanted)
    assert memory[0][1] == model.config.compressed_len


@pytest.mark.parametrize("name", OPTIONS)
def test_generation_equals_reading_again(name):
    """Greedy decoding with caches against the model over segments, across several of them."""
    model = new_model(**OPTIONS[name], segment_len=4).eval()
    text = model.generate(torch.randint(17, (2, 6)), 11, temperature=0)
    predicted = model.predict(model(text[:, :-1]).hidden)
    assert torch.equal(predicted[:, 5:], text[:, 6:])


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_learns(name):
    model = new_model(**OPTIONS[name], segment_len=4)
    text = torch.randint(17, (2, 21))
    model(text[:, :-1], text[:, 1:]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_activation_checkpointing():
    """The same gradients, in less memory."""
    options = dict(OPTIONS["all"], dropout=0.2)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = new_model(**options, segment_len=4, activation_checkpointing=checkpointing)
        text = torch.randint(17, (2, 21))
        torch.manual_seed(1)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.nbytes) or x, lambda x: x):
            loss = model(text[:, :-1], text[:, 1:]).loss
        loss.backward()
        gradients.append((sum(saved), [p.grad for p in model.parameters()]))
    (much, wanted), (little, got) = gradients
    assert little < much / 2
    torch.testing.assert_close(got, wanted)


def test_longer_memories_in_evaluation():
    model = new_model(compressed_positions="own").eval()
    model.reset_lengths(mem_len=10, compressed_len=8)
    segments = torch.randint(17, (2, 36)).split(4, 1)
    memory = None
    with torch.no_grad():
        for tokens, wanted in zip(segments, plain_model(model, segments), strict=True):
            output = model(tokens, memory=memory)
            memory = output.memory
            torch.testing.assert_close(output.hidden, wanted)
    assert memory[0][1] == 8 and memory[0][0].shape[1] == 18
    with pytest.raises(ValueError, match="lengths are mem_len, compressed_len and clamp_len, not rate"):
        model.reset_lengths(rate=3)


def test_enhanced_recurrence_reaches_farther():
    """A layer reads what it made itself: a token is felt beyond the range of a memory of inputs."""
    text = torch.randint(16, (1, 60))
    changed = text.index_fill(1, torch.tensor([0]), 16)
    for enhanced in (False, True):
        model = new_model(enhanced_recurrence=enhanced, segment_len=4).eval()
        a, b = (model(x).hidden[:, -4:] for x in (text, changed))
        assert model.config.temporal_range == (math.inf if enhanced else 3 * (6 + 2 * 4))
        assert torch.equal(a, b) != enhanced


@pytest.mark.parametrize(("given", "message"), [(0, "must be positive, and at most"), (5, "segment_len 4, not 5")])
def test_bad_segment_length(given, message):
    with pytest.raises(ValueError, match=message):
        new_model(segment_len=4).generate(torch.zeros(1, 2).long(), 1, segment_length=given)
    with pytest.raises(ValueError, match="as config.segment_len is not given, not None"):
        new_model().generate(torch.zeros(1, 2).long(), 1)


def test_prompt_of_many_segments():
    """More than Python's stack is deep."""
    assert new_model(n_layer=1).generate(torch.randint(17, (1, 1100)), 1, segment_length=1).shape == (1, 1101)

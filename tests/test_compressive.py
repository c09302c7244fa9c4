"""The Compressive Transformer: what it attends to, which loss trains what, and that compressed memory helps.

Traps of the published implementations, and the tests that know them (here, in test_compressive_options.py: o, in
test_compressive_memory.py: m, in test_compressive_training.py: t):

    scale before the biases; own positions of the compressed part        o test_against_the_plain_model
    zeros at the start are attended to and compressed                    o the same, "zero-start"
    memories stored normalised or not                                    o the same, "pre-norm"
    enhanced recurrence wraps the last layer onto the first              o the same, "enhanced"
    reconstruction: all queries, no mask, evicted steps alone            test_compression_losses_are_the_published_ones
    reconstruction over the whole memory where it exceeds the segment    the same
    memories that carry gradients                                        m test_the_memory_is_detached
    order: compressed from the front, appended at the end                m test_fifo_order
    ``[-0:]`` of an empty part                                           m test_parts_of_length_zero
    mean, sum or norm over layers and elements                           test_reduction_over_layers, m test_*_expression
    one norm clips both losses                                           t test_gradients_are_clipped_apart
    ``detach_`` freezes the projections                                  test_the_two_losses_do_not_mix
    padding by ``len % rate`` drops the newest steps                     m test_a_segment_that_fills_no_group_...
    the task never trains the compressors                                test_bptt_trains_the_compressors_by_the_task
    short last segments, dtype of empty memories                         m test_contents_equal_..., m test_dtype_is_kept
    top_k that keeps what it should drop                                 test_top_k_keeps_the_most_probable
    evaluation: no auxiliary loss, but compression                       test_evaluation_has_no_auxiliary_loss
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from par_xl.models import CompressiveConfig, CompressiveTransformer, TransformerXL, TransformerXLConfig
from par_xl.testing import assert_capturable

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = {"mean": {}, "max": {}, "conv": {}, "dilated_conv": {"dilation": (1, 2)}, "most_used": {}}
SMALL = dict(vocab_size=17, n_layer=3, n_head=2, d_model=8, d_head=4, d_inner=16)


def new_model(compression="conv", **options):
    lengths = dict(mem_len=6, compressed_len=4, rate=2)
    config = {**SMALL, **lengths, **MODES[compression], **options}
    return CompressiveTransformer(CompressiveConfig(compression=compression, **config))


def segments(n, batch=2, steps=4):
    text = torch.randint(17, (batch, n * steps + 1))
    return list(zip(text[:, :-1].split(steps, 1), text[:, 1:].split(steps, 1), strict=True))


def read(model, n):
    """The outputs of ``n`` segments in a row."""
    memory, outputs = None, []
    for tokens, targets in segments(n):
        outputs.append(model(tokens, targets, memory))
        memory = outputs[-1].memory
    return outputs


@pytest.mark.parametrize("mode", MODES)
def test_rows_and_their_number(mode):
    """The parts grow to their lengths; nothing in the memory needs a gradient."""
    counts = [(o.memory[0][1], o.memory[0][0].shape[1]) for o in read(new_model(mode), 5)]
    assert counts == [(0, 4), (1, 7), (3, 9), (4, 10), (4, 10)]
    assert not any(rows.requires_grad for rows, _, _ in read(new_model(mode), 3)[-1].memory)


def test_without_eviction_it_is_transformer_xl():
    """A memory longer than the text: the same weights give the same output and gradients."""
    config = dict(SMALL, mem_len=100)
    xl = TransformerXL(TransformerXLConfig(**config))
    model = CompressiveTransformer(CompressiveConfig(**config))
    model.load_state_dict(xl.state_dict(), strict=False)
    state, memory = None, None
    for tokens, targets in segments(3):
        got, want = model(tokens, targets, state), xl(tokens, targets, memory)
        torch.testing.assert_close(got.nll, want.nll)
        state, memory = got.memory, want.memory


def test_layers_read_compressed_then_memory_then_segment():
    """Against TransformerXL with the very rows as its memory: oldest first, distances counted in rows."""
    model = new_model("mean").eval()
    xl = TransformerXL(TransformerXLConfig(**SMALL, mem_len=10))
    xl.load_state_dict(model.state_dict(), strict=False)
    memory = read(model, 5)[-1].memory
    (tokens, targets), *_ = segments(1)
    rows = torch.stack([rows for rows, _, _ in memory])
    torch.testing.assert_close(model(tokens, targets, memory).nll, xl(tokens, targets, rows).nll)


def parameters(model):
    own = {id(p) for p in model.compression_parameters()}
    task = [p for p in model.parameters() if id(p) not in own]
    return task, list(model.compression_parameters())


@pytest.mark.parametrize("pre_lnorm", [False, True])
@pytest.mark.parametrize("loss", ["attention", "auto-encoding"])
def test_the_two_losses_do_not_mix(loss, pre_lnorm):
    """The transformer's gradients are bit-equal whatever the auxiliary weight; the compressors' whatever the task."""
    torch.manual_seed(1)
    model = new_model(compression_loss=loss, pre_lnorm=pre_lnorm, segment_len=4)
    task, compression = parameters(model)
    (tokens, targets), *_ = segments(1, steps=20)  # through which a graph that is not cut would reach

    def gradients(weight, task_weight):
        torch.manual_seed(2)
        model.config.compression_weight = weight
        output = model(tokens, targets)
        total = output.loss + (task_weight - 1) * output.nll.mean()
        model.zero_grad()
        total.backward()
        return [p.grad for p in task], [p.grad for p in compression]

    both, off = gradients(1.0, 1.0), gradients(0.0, 1.0)
    assert all(torch.equal(x, y) for x, y in zip(both[0], off[0], strict=True))
    alone = gradients(1.0, 0.0)
    assert all(torch.equal(x, y) for x, y in zip(both[1], alone[1], strict=True))
    assert all(x.any() for x in both[1]) and not any(x.any() for x in off[1])
    assert not any(x is not None and x.any() for x in alone[0])
    assert all(p.requires_grad for p in task)  # lucidrains' detach_() freezes the key-value projection


def test_evaluation_has_no_auxiliary_loss():
    output = read(new_model().eval(), 4)[-1]
    assert torch.equal(output.loss, output.nll.mean())
    assert output.compression_losses.shape == (3,) and (output.compression_losses > 0).all()


@pytest.mark.parametrize("pre_lnorm", [False, True])
@pytest.mark.parametrize("loss", ["attention", "auto-encoding"])
def test_compression_losses_are_the_published_ones(loss, pre_lnorm):
    """From the memories before and after a segment, with a memory longer than that: 4 of 6 steps leave."""
    model = new_model(compression_loss=loss, pre_lnorm=pre_lnorm).double().eval()
    memory = [(rows.double(), n, usage) for rows, n, usage in read(model, 4)[-1].memory]
    (tokens, targets), *_ = segments(1)
    output, losses = model(tokens, targets, memory), []
    for i, ((rows, n, _), (after, _, _), layer) in enumerate(zip(memory, output.memory, model.layers, strict=True)):
        old, hidden, attention = rows[:, n : n + 4], after[:, -4:], layer.dec_attn
        weight = model.compressors[i].weights[0]
        fresh = F.conv1d(old.mT, weight, stride=2).mT
        if loss == "auto-encoding":
            decoded = F.conv_transpose1d(fresh.mT, model.decoders[i].decoder.weight, stride=2).mT
            wanted = (decoded - old).square().mean()
        else:
            norm = attention.layer_norm if pre_lnorm else lambda x: x
            query, key, value = (w.unflatten(0, (2, 4)) for w in attention.qkv_net.weight.chunk(3))
            read_steps = [
                torch.einsum(
                    "bhij,bjhd->bihd",
                    torch.einsum("bid,hcd,bje,hce->bhij", norm(hidden), query, norm(x), key).div(2).softmax(-1),
                    torch.einsum("bjd,hcd->bjhc", norm(x), value),
                )
                for x in (old, fresh)
            ]
            wanted = (read_steps[0] - read_steps[1]).square().mean()
        losses.append(wanted)
    torch.testing.assert_close(output.compression_losses, torch.stack(losses))


def test_bptt_trains_the_compressors_by_the_task():
    """Through the segments of one call; the memory it returns is a constant."""
    model = new_model(compression_loss="bptt", segment_len=4, mem_len=4)
    task, compression = parameters(model)
    memory = None
    for steps, trained in ((8, False), (4, False), (8, True)):  # the first eviction is that of the second segment
        text = torch.randint(17, (2, steps + 1))
        output = model(text[:, :-1], text[:, 1:], memory)
        memory = output.memory
        model.zero_grad()
        output.loss.backward()
        assert all(p.grad.any() for p in task)
        assert all((p.grad is not None and p.grad.any()) == trained for p in compression)
        assert not any(rows.requires_grad for rows, _, _ in memory)


@pytest.mark.parametrize("loss", ["attention", "none"])
def test_segments_of_one_call_are_those_of_several(loss):
    """Also where the last one is shorter."""
    model, cut = new_model(compression_loss=loss), new_model(compression_loss=loss, segment_len=4)
    cut.load_state_dict(model.state_dict())
    text = torch.randint(17, (2, 15))
    memory, nll, losses = None, [], []
    for tokens, targets in zip(text[:, :-1].split(4, 1), text[:, 1:].split(4, 1), strict=True):
        output = model(tokens, targets, memory)
        memory = output.memory
        nll.append(output.nll)
        losses.append(output.compression_losses)
    got = cut(text[:, :-1], text[:, 1:])
    torch.testing.assert_close(got.nll, torch.cat(nll, 1))
    for (rows, n, _), (wanted, m, _) in zip(got.memory, memory, strict=True):
        torch.testing.assert_close(rows, wanted)
        assert n == m
    if loss == "attention":
        torch.testing.assert_close(got.compression_losses, torch.stack(losses).mean(0))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction_over_layers(reduction):
    output = read(new_model(compression_reduction=reduction, compression_weight=0.5), 4)[-1]
    wanted = output.nll.mean() + 0.5 * getattr(output.compression_losses, reduction)()
    torch.testing.assert_close(output.loss, wanted)


def test_memory_in_some_layers():
    """A layer without a memory sees its segment alone."""
    model = new_model(memory_layers=(2,)).eval()
    memory = read(model, 3)[-1].memory
    assert len(memory) == 1 and len(model.compressors) == 1
    (tokens, _), *_ = segments(1)
    torch.testing.assert_close(model(tokens, memory=memory).memory[0][0][:, -4:], model(tokens).memory[0][0])


def test_zero_start():
    memory = new_model(memory_start="zeros").init_memory(2)
    assert [(rows.shape, n) for rows, n, _ in memory] == [((2, 10, 8), 4)] * 3


@pytest.mark.parametrize("mode", ["conv", "most_used"])
@pytest.mark.parametrize("prompt", [1, 4, 11])
def test_generation_equals_reading_again(mode, prompt):
    """Greedy decoding with caches against the model over segments, across several of them."""
    model = new_model(mode).eval()
    text = model.generate(torch.randint(17, (2, prompt)), 9, segment_length=4, temperature=0)
    memory = None
    for begin in range(0, text.shape[1], 4):
        piece = text[:, begin : begin + 4]
        output = model(piece, memory=memory)
        memory, predicted = output.memory, model.predict(output.hidden)
        for i in range(piece.shape[1]):
            if prompt <= begin + i + 1 < text.shape[1]:
                assert torch.equal(predicted[:, i], text[:, begin + i + 1])


def test_top_k_keeps_the_most_probable():
    """Drawn from one token it is the greedy text, drawn from all it is not."""
    model = new_model(segment_len=4)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    prompt = torch.randint(17, (2, 5))
    greedy = model.generate(prompt, 12, temperature=0)
    assert torch.equal(model.generate(prompt, 12, top_k=1), greedy)
    assert not torch.equal(model.generate(prompt, 12, generator=torch.Generator().manual_seed(0)), greedy)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_no_synchronisation_and_cuda_graph(mode):
    """A step on full memories, whose shapes stay."""
    model = new_model(mode, memory_start="zeros", cutoffs=()).cuda()
    (tokens, targets), *_ = [(x.cuda(), y.cuda()) for x, y in segments(1)]
    memory = model.init_memory(2)

    def step():
        output = model(tokens, targets, memory)
        gradients = torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
        return [output.loss.detach(), *(rows for rows, _, _ in output.memory), *(g for g in gradients if g is not None)]

    assert_capturable(step)


@pytest.mark.parametrize("loss", ["attention", "auto-encoding", "bptt"])
@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode, loss):
    """The embeddings are projected, so even the first layer's input is bf16; the memory and the gradients are fp32."""
    options = dict(cutoffs=(5, 11), div_val=2, d_embed=4)
    model = new_model(mode, compression_loss=loss, segment_len=4, **options)
    text = torch.randint(17, (2, 25))
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(text[:, :-1], text[:, 1:])
        output.loss.backward()
        results.append(output.loss.detach())
        assert {rows.dtype for rows, _, _ in output.memory} == {torch.float32}
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(results[1], results[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("own", [False, True])
def test_compiled_while_the_memory_grows(own):
    """A graph for no memory, for each way in which it can grow, and for a full one; not one for each length."""
    torch._dynamo.reset()
    options = dict(mem_len=16, compressed_len=8, n_layer=1)
    model = new_model("mean", compressed_positions="own" if own else "shared", **options)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled, memory, compiled_memory, lengths = torch.compile(model, backend=count), None, None, set()
    for tokens, targets in segments(9):
        wanted, got = model(tokens, targets, memory), compiled(tokens, targets, compiled_memory)
        torch.testing.assert_close(got.loss, wanted.loss)
        memory, compiled_memory = wanted.memory, got.memory
        lengths.add(memory[0][0].shape[1])
    assert len(lengths) == 8 and len(graphs) <= 5


@pytest.mark.parametrize("layers", [(), (0,), (1,)])
def test_temporal_range(layers):
    """``l (nm + c ncm)``: a token at that distance changes the output, one beyond it does not."""
    torch.manual_seed(3)
    model = new_model("mean", n_layer=2, mem_len=4, compressed_len=2, memory_layers=layers).double().eval()
    assert model.config.temporal_range == (1 if layers else 2) * (4 + 2 * 2)
    text = torch.randint(16, (1, 40))

    def last(text):
        memory = None
        for piece in text.split(4, 1):
            output = model(piece, memory=memory)
            memory = output.memory
        return output.hidden

    reference = last(text)
    # Whole segments, the last being 36 .. 39, whose first token has the shortest way back.
    changed = [
        not torch.equal(last(text.index_fill(1, torch.arange(begin, begin + 4), 16)), reference)
        for begin in range(0, 36, 4)
    ]
    assert changed == [begin >= 36 - model.config.temporal_range for begin in range(0, 36, 4)]


@pytest.mark.parametrize("seed", range(3))
def test_compressed_memory_copies_what_memory_alone_has_lost(seed):
    """A token must be named again three segments later, out of reach of the segment and memory."""
    losses = {}
    for compressed_len in (0, 8):
        torch.manual_seed(seed)
        lengths = dict(mem_len=4, compressed_len=compressed_len, rate=4)
        lengths |= dict(segment_len=4, memory_start="zeros")
        config = dict(vocab_size=9, n_layer=1, n_head=2, d_model=32, d_head=16, d_inner=32)
        model = CompressiveTransformer(
            CompressiveConfig(compression="mean", compression_loss="none", **config, **lengths)
        )
        optimizer = torch.optim.Adam(model.parameters(), 2e-2)
        for _ in range(60):
            keys = torch.randint(8, (32, 1)).expand(-1, 4)
            text = torch.cat([keys, torch.full((32, 12), 8)], 1)
            hidden = model(text).hidden[:, 12:]
            loss = model.crit(hidden, keys).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[compressed_len] = loss.item()
    assert losses[0] > 0.95 * math.log(8), losses
    assert losses[8] < 0.5 * math.log(8), losses


def test_named_configurations():
    names = "n_layer", "segment_len", "mem_len", "compressed_len", "rate"
    sizes = {n: [getattr(CompressiveConfig.named(n), x) for x in names] for n in ("wt103", "enwik8", "pg19")}
    assert sizes == {
        "wt103": [18, 512, 512, 1500, 4],
        "enwik8": [24, 768, 768, 1152, 3],
        "pg19": [36, 512, 512, 512, 2],
    }
    with pytest.raises(ValueError, match="there is no configuration 'lm1b'; there are wt103"):
        CompressiveConfig.named("lm1b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attn_type=1, max_klen=9), "needs attn_type 0"),
        (dict(rate=2.5), "rate must be a positive integer, not 2.5"),
        (dict(compression="dilated_conv", dilation=(0,)), "dilation must hold positive integers, not \\(0,\\)"),
        (dict(compression_weight=-1), "compression_weight must not be negative, not -1"),
        (dict(compression_loss="bptt"), "bptt needs segment_len"),
        (dict(segment_len=1), "segment_len must be at least rate 2 to fill a group, not 1"),
        (dict(memory_layers=(1, 1)), "memory_layers must ascend"),
        (dict(compressed_positions="none"), "compressed_positions must be one of shared, own"),
        (dict(compression="conv", dilation=(1,)), "dilation goes with dilated_conv, not \\(1,\\) with conv"),
        (dict(compression_loss="l2"), "compression_loss must be one of attention"),
        (dict(memory_layers=(3,)), "memory_layers must lie between 0 and 2"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        new_model(**options)


def test_bad_input():
    model = new_model()
    with pytest.raises(ValueError, match="targets must have the shape of tokens"):
        model(torch.zeros(2, 4).long(), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match="memory must have 3 entries of batch 2"):
        model(torch.zeros(2, 4).long(), memory=model.init_memory(3))
    with pytest.raises(ValueError, match="and the same sizes"):
        model(torch.zeros(2, 4).long(), memory=[*model.init_memory(2)[:2], (torch.zeros(2, 3, 8), 0, None)])
    with pytest.raises(ValueError, match="of batch 2, width 8 and"):
        model(torch.zeros(2, 4).long(), memory=[(torch.zeros(2, 3, 7), 0, None)] * 3)
    with pytest.raises(ValueError, match="no weights of a Compressive Transformer"):
        CompressiveTransformer._loaded(None, {})

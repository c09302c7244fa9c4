"""rel_attention: the shared checks, and a test for each trap of the published implementations."""

import pytest
import torch

import par_xl
from par_xl.ops.rel_attention import BACKWARD, FORWARD, dropout_keep, masked_scores
from par_xl.ops.rel_attention_inputs import UNLIMITED
from par_xl.testing import OpChecks, assert_capturable, make_inputs, peak_memory, run


def attention(batch, heads, queries, keys, memory, width, spare=0, **options):
    """A case with ``spare`` more position rows than are needed; ``memory`` None leaves the memory out."""

    def case(randn):
        look_ahead = 0 if options.get("causal", True) else (options.get("window") or (None, None))[1]
        ahead = queries - 1 if look_ahead is None else min(queries - 1, look_ahead)
        positions = min(keys + (memory or 0), options.get("clamp_len", UNLIMITED) + 1) + ahead + spare
        q, k, v = randn(batch, heads, queries, width), *(randn(batch, heads, keys, width) for _ in range(2))
        shared = dict(
            r=randn(heads, positions, width), content_bias=randn(heads, width), position_bias=randn(heads, width)
        )
        if memory is not None:
            shared["memory"] = tuple(randn(batch, heads, memory, width) for _ in range(2))
        return dict(q=q, k=k, v=v, **shared, **options)

    return case


def seeded(**arguments):
    torch.manual_seed(5)
    return par_xl.rel_attention(**arguments)


def lengths(*values):
    return torch.tensor(values)


class TestRelAttention(OpChecks):
    ops = ("rel_attention_forward", "rel_attention_backward")
    call = staticmethod(par_xl.rel_attention)
    cases = {
        "memory": attention(2, 2, 65, 65, 63, 32),
        "clamp": attention(2, 2, 40, 40, 60, 16, clamp_len=21),
        "width-41": attention(2, 3, 33, 33, 5, 41),
        "no-memory": attention(1, 2, 70, 70, None, 64),
        "empty-memory": attention(1, 2, 3, 3, 0, 16),
        "bidirectional": attention(2, 2, 37, 37, None, 16, causal=False),
        "streaming": attention(1, 2, 16, 16, 40, 24, causal=False, window=(40, None)),
        "same-length": attention(1, 2, 40, 40, 24, 16, window=(23, 0)),
        "same-length-tf": attention(1, 2, 40, 40, 24, 16, window=(24, 0)),
        "context": attention(2, 1, 90, 90, None, 8, causal=False, window=(7, 3)),
        "past-alone": attention(1, 1, 20, 20, 4, 8, causal=False, window=(-1, 5)),
        "lengths": attention(3, 2, 20, 20, 9, 16, key_lengths=lengths(20, 0, 7)),
        "lengths-no-memory": attention(3, 2, 20, 20, None, 16, causal=False, key_lengths=lengths(20, 0, 7)),
        "decoding": attention(3, 2, 1, 1, 66, 64),
        "more-queries": attention(2, 2, 50, 9, 3, 16, spare=2),
        "more-keys": attention(2, 2, 9, 50, 13, 16, scale=0.3),
        "spare-positions": attention(1, 2, 17, 17, 8, 16, spare=17),
        "width-96": attention(1, 1, 20, 20, 13, 96),
        "width-80": attention(1, 1, 20, 20, 13, 80),
        "width-128": attention(1, 1, 34, 34, 13, 128),
        "empty-batch": attention(0, 2, 4, 4, 4, 8),
        "no-query": attention(2, 2, 0, 5, 4, 8),
        "no-key": attention(2, 2, 4, 0, 0, 8),
    }
    gradcheck_cases = {
        "memory": attention(2, 2, 3, 3, 2, 3),
        "bidirectional": attention(1, 2, 4, 4, 1, 2, causal=False),
        "window-lengths": attention(2, 1, 4, 4, 2, 2, window=(2, 0), key_lengths=lengths(4, 1)),
        "past-alone": attention(1, 1, 4, 4, 1, 2, causal=False, window=(-1, 3)),
        "decoding": attention(1, 2, 1, 1, 4, 3),
        "more-queries": attention(1, 1, 5, 2, None, 2),
        "clamp": attention(1, 2, 3, 3, 3, 2, clamp_len=2),
        "clamp-bidirectional": attention(1, 1, 4, 4, 1, 2, causal=False, clamp_len=1),
    }
    bad_input = {
        "rank": (
            dict(q=torch.zeros(2, 3, 4)),
            ValueError,
            "q must have 4 dimensions, (B, H, Q, D), not shape (2, 3, 4)",
        ),
        "integers": (dict(q=torch.zeros(2, 2, 65, 32).int()), TypeError, "q must be floating point, not torch.int32"),
        "k shape": (
            dict(k=torch.zeros(2, 3, 65, 32)),
            ValueError,
            "k must have shape (2, 2, any, 32), (B, H, T, D), not",
        ),
        "v shape": (dict(v=torch.zeros(2, 2, 64, 32)), ValueError, "v must have shape (2, 2, 65, 32), that of k, not"),
        "v dtype": (dict(v=torch.zeros(2, 2, 65, 32).half()), TypeError, "v must have the dtype of q"),
        "r shape": (
            dict(r=torch.zeros(128, 32)),
            ValueError,
            "r must have shape (2, any, 32), (H, P, D), not (128, 32)",
        ),
        "positions": (
            dict(r=torch.zeros(2, 127, 32)),
            ValueError,
            "r must have at least 128 positions for 128 keys, not 127",
        ),
        "clamped positions": (
            dict(clamp_len=40, r=torch.zeros(2, 40, 32)),
            ValueError,
            "r must have at least 41 positions for 128 keys and clamp_len 40, not 40",
        ),
        "clamp": (dict(clamp_len=-1), ValueError, "clamp_len must not be negative, not -1"),
        "clamp type": (dict(clamp_len=2.5), TypeError, "clamp_len must be an int or None, not float"),
        "ahead": (dict(causal=False), ValueError, "r must have at least 192 positions for 128 keys, not 128"),
        "bias": (
            dict(content_bias=torch.zeros(32)),
            ValueError,
            "content_bias must have shape (2, 32), (H, D), not (32,)",
        ),
        "bias dtype": (
            dict(position_bias=torch.zeros(2, 32).half()),
            TypeError,
            "position_bias must have the dtype of q",
        ),
        "memory": (
            dict(memory=(torch.zeros(2, 2, 63, 8),) * 2),
            ValueError,
            "memory[0] must have shape (2, 2, any, 32)",
        ),
        "memories": (
            dict(memory=(torch.zeros(2, 2, 63, 32), torch.zeros(2, 2, 62, 32))),
            ValueError,
            "memory[1] must have shape (2, 2, 63, 32), that of memory[0], not (2, 2, 62, 32)",
        ),
        "device": (
            dict(k=torch.zeros(2, 2, 65, 32, device="meta")),
            ValueError,
            "as q is, not on meta",
        ),
        "window": (
            dict(window=(-2, 0)),
            ValueError,
            "window must be (left, right) with left >= -1 and right >= 0, not (-2, 0)",
        ),
        "causal window": (
            dict(window=(4, 4)),
            ValueError,
            "window must not look 4 steps to the right when causal is True",
        ),
        "scale": (dict(scale=-1.0), ValueError, "scale must not be negative, not -1.0"),
        "dropout": (dict(dropout_p=1.0), ValueError, "dropout_p must lie in [0, 1), not 1.0"),
        "lengths": (
            dict(key_lengths=lengths(1)),
            ValueError,
            "key_lengths must have shape (2,), one for each sequence, not (1,)",
        ),
        "lengths dtype": (
            dict(key_lengths=torch.ones(2)),
            TypeError,
            "key_lengths must be int32 or int64, not torch.float32",
        ),
        "lengths device": (
            dict(key_lengths=torch.ones(2, device="meta").long()),
            ValueError,
            "as q is, not on meta",
        ),
    }

    @pytest.mark.parametrize("values", [[1, 66], [-1, 3]])
    def test_lengths_outside_the_segment(self, values, backend, device):
        """An error on the CPU; NaN for that sequence on a GPU, where the host does not wait for the value."""
        inputs = {**self.first_case(torch.float32, device), "key_lengths": torch.tensor(values, device=device)}
        if device == "cuda":
            bad = (inputs["key_lengths"] < 0) | (inputs["key_lengths"] > 65)
            assert torch.equal(par_xl.rel_attention(**inputs, backend=backend).isnan().all(3).all(2).all(1), bad)
        else:
            with pytest.raises(ValueError, match="between 0 and 65, the keys of the segment, not (66|-1)"):
                par_xl.rel_attention(**inputs, backend=backend)

    @pytest.mark.parametrize(
        "name", ["memory", "same-length", "lengths", "bidirectional", "past-alone", "more-queries"]
    )
    def test_lse(self, name, backend, device):
        inputs = make_inputs(self.cases[name], torch.float32, device)
        k_memory, v_memory = inputs.get("memory", (None, None))
        n_memory = 0 if k_memory is None else k_memory.shape[2]
        left, right = (UNLIMITED if x is None else x for x in inputs.get("window") or (None, None))
        right = 0 if inputs.get("causal", True) else right
        tensors = [inputs[x].detach() for x in ("q", "k", "v", "r", "content_bias", "position_bias")]
        memories = [x if x is None else x.detach() for x in (k_memory, v_memory)]
        key_lengths = inputs.get("key_lengths")
        _, lse = FORWARD(*tensors, *memories, key_lengths, None, left, right, UNLIMITED, 0.25, 0.0, backend)
        q, k, _, r, *biases = tensors
        k = k if memories[0] is None else torch.cat((memories[0], k), 2)
        wanted = masked_scores(q, k, r, *biases, key_lengths, n_memory, left, right, UNLIMITED, 0.25).logsumexp(3)
        torch.testing.assert_close(lse, wanted)

    def test_nothing_visible(self, backend, device):
        """The reference's same_length with mem_len = 0 hides every key: here 0 and no gradient, not NaN."""
        inputs = {**self.first_case(torch.float32, device), "window": (-1, 0)}
        for group in run(self.on(backend), inputs):
            assert all(x.count_nonzero() == 0 for x in group)

    def test_a_single_visible_key_has_no_score_gradient(self, backend, device):
        inputs = make_inputs(attention(2, 2, 70, 70, None, 32), torch.float32, device)
        out = self.on(backend)(**inputs)
        assert torch.equal(out[:, :, 0], inputs["v"][:, :, 0])
        assert torch.autograd.grad(out.square().sum(), inputs["q"])[0][:, :, 0].count_nonzero() == 0

    def test_padding_and_unused_positions_do_not_leak(self, backend, device):
        """NaN in padded keys and values, in keys behind the window and in positions that no pair uses."""
        case = attention(2, 2, 30, 30, 40, 16, spare=9, window=(20, 0), key_lengths=lengths(30, 11))
        clean = make_inputs(case, torch.float32, device)
        dirty = {name: x.detach().clone() if isinstance(x, torch.Tensor) else x for name, x in clean.items()}
        dirty["memory"] = tuple(x.detach().clone() for x in clean["memory"])
        for name in ("k", "v"):
            dirty[name][1, :, 11:] = torch.nan
        for x in dirty["memory"]:
            x[:, :, : 40 - 20] = torch.nan  # query 0 sees 20 steps back
        dirty["r"][:, 70:] = torch.nan  # the future
        dirty["r"][:, : 70 - 1 - 20] = torch.nan
        for x in (*dirty["memory"], *(dirty[n] for n in ("q", "k", "v", "r", "content_bias", "position_bias"))):
            x.requires_grad_()
        for got, want in zip(run(self.on(backend), dirty), run(self.on(backend), clean), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))

    def test_low_scores_do_not_let_masked_keys_in(self, backend, device):
        """A mask of -1e4 instead of -inf lets padding win where every real score is lower."""
        inputs = make_inputs(attention(1, 1, 4, 4, 3, 16, key_lengths=lengths(2)), torch.float32, device)
        inputs = {**inputs, "q": torch.full_like(inputs["q"], -300.0), "scale": 10.0}
        for name in ("k", "v"):
            inputs[name] = torch.full_like(inputs[name], 5.0)
            inputs[name][:, :, 2:] = 0.0
        inputs["memory"] = tuple(torch.full_like(x, 5.0) for x in inputs["memory"])
        torch.testing.assert_close(self.on(backend)(**inputs), torch.full_like(inputs["q"], 5.0))

    def test_memory_and_segment_are_one_sequence(self, backend, device):
        inputs = self.first_case(torch.float32, device)
        joined = {name: x for name, x in inputs.items() if name != "memory"}
        joined.update({n: torch.cat((m, inputs[n]), 2) for n, m in zip(("k", "v"), inputs["memory"], strict=True)})
        torch.testing.assert_close(self.on(backend)(**joined), self.on(backend)(**inputs))

    @pytest.mark.parametrize("step", [1, 7])
    def test_streaming_equals_full_context(self, step, backend, device):
        """Segments with a growing memory; with one key at a time, decoding."""
        inputs = make_inputs(attention(2, 2, 21, 21, None, 16), torch.float32, device)
        full = self.on(backend)(**inputs)
        for start in range(0, 21, step):
            end = start + step
            now = {name: inputs[name][:, :, start:end] for name in ("q", "k", "v")}
            memory = inputs["k"][:, :, :start], inputs["v"][:, :, :start]
            biases = {name: inputs[name] for name in ("content_bias", "position_bias")}
            out = self.on(backend)(**now, r=inputs["r"][:, 21 - end :], memory=memory, **biases)
            torch.testing.assert_close(out, full[:, :, start:end])

    def test_sequence_first_layout(self, backend, device):
        """[len, batch, head, width], the layout of language models, is read where it lies."""
        inputs = self.first_case(torch.float32, device)
        names = ("q", "k", "v")
        stored = {n: inputs[n].detach().permute(2, 0, 1, 3).contiguous().requires_grad_() for n in names}
        memory = tuple(x.detach().permute(2, 0, 1, 3).contiguous() for x in inputs["memory"])
        views = {n: stored[n].permute(1, 2, 0, 3) for n in names}
        out = self.on(backend)(**{**inputs, **views, "memory": tuple(x.permute(1, 2, 0, 3) for x in memory)})
        assert torch.equal(out, self.on(backend)(**inputs))
        got = torch.autograd.grad(out.square().sum(), list(stored.values()))
        wanted = torch.autograd.grad(self.on(backend)(**inputs).square().sum(), [inputs[n] for n in names])
        assert all(torch.equal(x.permute(1, 2, 0, 3), y) for x, y in zip(got, wanted, strict=True))

    def test_fp32_biases_of_a_half_precision_call(self, backend, device):
        """Under autocast the biases are fp32 parameters; they are rounded, and get fp32 gradients."""
        inputs = self.first_case(torch.float16, device)
        wide = {name: inputs[name].detach().float().requires_grad_() for name in ("content_bias", "position_bias")}
        out = self.on(backend)(**{**inputs, **wide})
        assert torch.equal(out, self.on(backend)(**inputs))
        assert all(d.dtype == torch.float32 for d in torch.autograd.grad(out.sum(), list(wide.values())))

    def test_only_the_wanted_gradient(self, backend, device):
        inputs = self.first_case(torch.float32, device)
        full = torch.autograd.grad(self.on(backend)(**inputs).square().sum(), inputs["r"])[0]
        others = {name: x.detach() if isinstance(x, torch.Tensor) and name != "r" else x for name, x in inputs.items()}
        assert torch.equal(torch.autograd.grad(self.on(backend)(**others).square().sum(), inputs["r"])[0], full)

    def test_dropout_drops_what_the_reference_drops(self, backend, device):
        case = attention(2, 3, 70, 70, 30, 16, dropout_p=0.3, key_lengths=lengths(70, 33))
        inputs = make_inputs(case, torch.float64, device)
        got, wanted = (run(lambda b=b, **x: seeded(**x, backend=b), inputs) for b in (backend, "eager"))
        for group, other in zip(got, wanted, strict=True):
            for x, y in zip(group, other, strict=True):
                torch.testing.assert_close(x, y)

    def test_dropout_gradcheck(self, backend, device):
        inputs = make_inputs(attention(1, 1, 3, 3, 2, 2, dropout_p=0.4), torch.float64, device)
        function = lambda q, v, r: seeded(**{**inputs, "q": q, "v": v, "r": r}, backend=backend)  # noqa: E731
        assert torch.autograd.gradcheck(function, (inputs["q"], inputs["v"], inputs["r"]), nondet_tol=0.0)

    def test_dropout_follows_the_generator(self, backend, device):
        inputs = {**self.first_case(torch.float32, device), "dropout_p": 0.2}
        first, again = (seeded(**inputs, backend=backend) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(self.on(backend)(**inputs), first)

    @pytest.mark.parametrize("threads", [1, 3])
    def test_number_of_threads_does_not_change_the_bits(self, threads):
        inputs = make_inputs(attention(3, 5, 100, 100, 60, 32), torch.float32, "cpu")
        wanted, before = run(self.on("native"), inputs), torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            got = run(self.on("native"), inputs)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(x, y) for a, b in zip(got, wanted, strict=True) for x, y in zip(a, b, strict=True))

    def test_random_numbers_past_32_bits(self):
        """The offset of the last weights of 70,000 x 70,000 does not fit into 32 bits."""
        n = 70_000
        x = torch.ones(1, 1, n, 1)
        torch.manual_seed(3)
        out = par_xl.rel_attention(x, x, x, x[0], window=(0, 0), dropout_p=0.5, backend="native")
        torch.manual_seed(3)
        seed = torch.randint(2**63 - 1, (1,))
        diagonal = torch.arange(n) * (n + 1)
        assert diagonal[-1] > 2**32
        assert torch.equal(out.flatten(), dropout_keep(seed, diagonal, 0.5) * 2.0)

    def test_memory_does_not_grow_with_queries_times_keys(self):
        """Forward and backward take less than one (Q, K) matrix for each head, beyond the results."""
        inputs = make_inputs(attention(1, 8, 1024, 1024, 1024, 16), torch.float32, "cpu")
        matrices = 4 * 8 * 1024 * 2048
        assert peak_memory(lambda: run(self.on("native"), inputs), torch.device("cpu")) < matrices / 3

    @pytest.mark.gpu
    def test_no_synchronisation_and_cuda_graph(self, backend):
        inputs = make_inputs(attention(2, 4, 130, 130, 70, 64, key_lengths=lengths(130, 40)), torch.bfloat16, "cuda")
        assert_capturable(lambda: run(self.on(backend), inputs)[1])


def test_one_tensor_in_two_places_compiles():
    """autograd.Function takes no tensor twice under torch.compile."""
    q, k, bias = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8, requires_grad=True), torch.randn(2, 8)
    r, m = torch.randn(2, 7, 8), torch.randn(1, 2, 3, 8)
    call = lambda k: par_xl.rel_attention(q, k, k, r, bias, bias, memory=(m, m)).square().sum()  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(k), k)[0] for f in (compiled, call)))


def test_gradients_of_an_absent_memory_are_empty():
    inputs = make_inputs(attention(1, 1, 2, 2, None, 4), torch.float32, "cpu")
    tensors = [inputs[x].detach() for x in ("q", "k", "v", "r", "content_bias", "position_bias")]
    options = UNLIMITED, 0, UNLIMITED, 1.0, 0.0, "native"
    out, lse = FORWARD(*tensors, None, None, None, None, *options)
    gradients = BACKWARD(out, *tensors, None, None, None, None, out, lse, False, *options)
    assert [x.shape for x in gradients[6:]] == [torch.Size([0])] * 2

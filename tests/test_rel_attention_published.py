"""rel_attention against the published implementations, as they write them: the shift, the masks, the encoders."""

import pytest
import torch
import torch.nn.functional as F
from test_rel_attention import attention

import par_xl
from par_xl.testing import make_inputs


def shifted(x):
    """Transformer-XL's ``_rel_shift`` of (B, H, Q, K): pad a column, reshape, drop a row."""
    batch, heads, queries, keys = x.shape
    return F.pad(x, (1, 0)).view(batch, heads, keys + 1, queries)[:, :, 1:].reshape(x.shape)


def published(q, k, v, r, content_bias, position_bias, mask):
    """Transformer-XL's attention as published, over memory and segment in one: scores by shift, a mask to hide."""
    content = (q + content_bias[:, None]) @ k.mT
    score = (content + shifted((q + position_bias[:, None]) @ r.mT)) * q.shape[3] ** -0.5
    return score.masked_fill(mask, -torch.inf).softmax(3) @ v


def split(inputs, memory):
    """Keys and values of a case without memory, as memory and segment."""
    k, v = inputs.pop("k"), inputs.pop("v")
    return {**inputs, "k": k[:, :, memory:], "v": v[:, :, memory:], "memory": (k[:, :, :memory], v[:, :, :memory])}


@pytest.mark.parametrize("path", ["eager", "native"])
class TestPublished:
    """The shift, the masks and the encoders of the published implementations, written as they write them."""

    def test_language_model(self, path):
        inputs = make_inputs(attention(2, 3, 7, 12, None, 8), torch.float64, "cpu")
        wanted = published(**inputs, mask=torch.ones(7, 12, dtype=torch.bool).triu(1 + 5))
        torch.testing.assert_close(par_xl.rel_attention(**split(inputs, 5), backend=path), wanted)

    @pytest.mark.parametrize("memory", [0, 3, 6])
    def test_same_length_in_pytorch(self, memory, path):
        """kimiyoung/transformer-xl, pytorch/mem_transformer.py: the window is [0, mem_len)."""
        mem_len, queries = 6, 8
        inputs = make_inputs(attention(1, 2, queries, queries + memory, None, 4), torch.float64, "cpu")
        ones = torch.ones(queries, queries + memory)
        mask_len = queries + memory - mem_len
        shift = queries - mask_len if mask_len > 0 else queries
        mask = (ones.triu(1 + memory) + ones.tril(-shift)).bool()
        wanted = published(**inputs, mask=mask)
        out = par_xl.rel_attention(**split(inputs, memory), window=(mem_len - 1, 0), backend=path)
        torch.testing.assert_close(out, wanted)

    def test_same_length_in_tensorflow(self, path):
        """kimiyoung/transformer-xl, tf/model.py ``_create_mask``: mem_len + 1 keys are visible."""
        memory = queries = 6
        inputs = make_inputs(attention(1, 2, queries, queries + memory, None, 4), torch.float64, "cpu")
        ones = torch.ones(queries, queries)
        future = torch.cat((torch.zeros(queries, memory), ones.triu(1)), 1)
        mask = torch.cat((future[:, :queries] + ones.tril(-1), future[:, queries:]), 1).bool()
        wanted = published(**inputs, mask=mask)
        out = par_xl.rel_attention(**split(inputs, memory), window=(memory, 0), backend=path)
        torch.testing.assert_close(out, wanted)

    def test_conformer(self, path):
        """ESPnet's and NeMo's encoder: 2T - 1 positions, of which the shift keeps the first T."""
        time = 9
        inputs = make_inputs(attention(2, 2, time, time, None, 4, causal=False), torch.float64, "cpu")
        q, k, v, r, u, w = (inputs[n] for n in ("q", "k", "v", "r", "content_bias", "position_bias"))
        position = shifted((q + w[:, None]) @ r.mT)[..., :time]
        wanted = (((q + u[:, None]) @ k.mT + position) * 0.5).softmax(3) @ v
        torch.testing.assert_close(par_xl.rel_attention(**inputs, backend=path), wanted)

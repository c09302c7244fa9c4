"""How much attention each key receives: what the most_used compression keeps by, and what the paper plots."""

import torch
from torch import Tensor

from par_xl.nn.rel_attention import RelPartialLearnableMultiHeadAttn

QUERIES = 64  # of a block: the weights of one block of queries are in memory at a time


@torch.no_grad()
def attention_received(
    attention: RelPartialLearnableMultiHeadAttn,
    w: Tensor,
    r: Tensor,
    r_w_bias: Tensor | None = None,
    r_r_bias: Tensor | None = None,
    mems: Tensor | None = None,
) -> Tensor:
    """The attention weights of a layer's call, summed over queries and averaged over heads, ``(B, M + T)``.

    Arguments as in the layer's forward. Dropout is left out, and there is no gradient. Rows sum to T over the keys.
    """
    q, keys, _ = attention.split(attention.qkv_net(attention.normed(w)))
    if mems is not None:
        keys = torch.cat((attention.keys_values(mems)[0], keys), 2)
    rows, content_bias, position_bias = attention.prepare(r, r_w_bias, r_r_bias)
    n_queries, n_keys = q.shape[2], keys.shape[2]
    received = torch.zeros(q.shape[0], n_keys, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for begin in range(0, n_queries, QUERIES):
        block = q[:, :, begin : begin + QUERIES]
        content = (block + content_bias[:, None]) @ keys.mT  # (B, H, queries, keys)
        position = (block + position_bias[:, None]) @ rows.mT
        query = torch.arange(begin, begin + block.shape[2], device=q.device)[:, None]
        row = torch.arange(n_keys, device=q.device) - query + n_queries - 1
        shifted = position.gather(3, row.clamp(max=n_keys - 1).expand_as(content))
        scores = ((content + shifted) * attention.d_head**-0.5).to(received.dtype)
        weights = scores.masked_fill(row >= n_keys, -torch.inf).softmax(-1)
        received += weights.sum(2).mean(1)
    return received

"""The self-attention of Conformer encoders: relative positions in both directions, padding, streaming."""

from typing import Any

import torch
from torch import Tensor, nn

from par_xl.ops.registry import host_can_look
from par_xl.ops.rel_attention import rel_attention


class RelPositionMultiHeadAttention(nn.Module):
    """Multi-head self-attention with relative positions for speech encoders, batch first.

    ``score[i, j] = ((q_i + pos_bias_u) . k_j + (q_i + pos_bias_v) . p_{i-j}) / sqrt(D)`` with q, k, v, p from
    ``linear_q``, ``linear_k``, ``linear_v`` of the frames and ``linear_pos`` of the positions; then softmax, values,
    ``linear_out``. Future frames are seen unless ``context`` says otherwise.

    Parameters, as in ESPnet (``RelPositionMultiHeadedAttention``) and NeMo: ``linear_{q,k,v,out}.{weight,bias}``,
    ``linear_pos.weight``, ``pos_bias_u`` and ``pos_bias_v (H, D)``. Checkpoints of ESPnet's "legacy" attention, whose
    shift is another one, are of another model.

    Args:
        n_head: H.
        n_feat: d, a multiple of H.
        dropout_rate: of the attention weights.
        use_bias: whether the projections but ``linear_pos`` have biases.
        context: ``(left, right)``, how many frames on either side a frame sees; None is all.
        pos_bias_u, pos_bias_v: parameters of another layer to share (NeMo's ``untie_biases=False``).

    Source: Gulati et al. (arXiv 2005.08100); espnet/nets/pytorch_backend/transformer/attention.py;
    nemo/collections/asr/parts/submodules/multi_head_attention.py.
    """

    def __init__(
        self,
        n_head: int,
        n_feat: int,
        dropout_rate: float = 0.0,
        *,
        use_bias: bool = True,
        context: tuple[int | None, int | None] = (None, None),
        pos_bias_u: nn.Parameter | None = None,
        pos_bias_v: nn.Parameter | None = None,
    ):
        super().__init__()
        if n_feat % n_head:
            raise ValueError(f"n_feat must be a multiple of the {n_head} heads, not {n_feat}")
        self.n_head, self.n_feat, self.dropout_rate, self.context = n_head, n_feat, dropout_rate, context
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (
            nn.Linear(n_feat, n_feat, bias=use_bias) for _ in range(4)
        )
        self.linear_pos = nn.Linear(n_feat, n_feat, bias=False)
        shape = n_head, n_feat // n_head
        self.pos_bias_u = nn.Parameter(torch.zeros(shape)) if pos_bias_u is None else pos_bias_u
        self.pos_bias_v = nn.Parameter(torch.zeros(shape)) if pos_bias_v is None else pos_bias_v

    def forward(
        self,
        x: Tensor,
        pos_emb: Tensor,
        *,
        lengths: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention within a batch of utterances.

        Args:
            x: frames, ``(B, T, d)``.
            pos_emb: position encodings, ``(P, d)`` or ``(1, P, d)`` of distances ``T - 1`` (the past)
                to ``-(T - 1)``, as ``sinusoids(torch.arange(T - 1, -T, -1), d, interleaved=True)`` gives them.
            lengths: int ``(B,)``, real frames of each utterance.
            padding_mask: instead of ``lengths``: ``(B, T)``, True or nonzero at the padding, behind the real frames.

        Returns:
            ``(B, T, d)``; what stands at padded frames is finite and means nothing.

        Raises:
            ValueError: lengths and a mask, a mask with padding before a real frame (on a GPU: NaN for that utterance),
                or what :func:`par_xl.rel_attention` refuses.
        """
        if padding_mask is not None:
            if lengths is not None:
                raise ValueError("lengths and padding_mask must not both be given")
            lengths = _lengths(padding_mask)
        return self._attend(x, x, pos_emb, lengths)

    def stream(self, x: Tensor, pos_emb: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """The next frames of a stream; with ``context=(left, 0)`` the results are those of one pass over all frames.

        Args:
            x: the next frames, ``(B, T, d)``, all real.
            pos_emb: ``(P, d)`` or ``(1, P, d)``: distances ``C + T - 1`` to at least ``-(T - 1)``.
            cache: the frames before, ``(B, C, d)``; at first ``x.new_empty(B, 0, d)``.

        Returns:
            ``(B, T, d)``, and the next cache: the last ``left`` frames, or all of them where that is None.
        """
        frames = torch.cat((cache, x), 1)
        left = self.context[0]
        kept = frames if left is None else frames[:, max(0, frames.shape[1] - left) :]
        return self._attend(x, frames, pos_emb, None), kept.detach()

    def _attend(self, x: Tensor, frames: Tensor, pos_emb: Tensor, lengths: Tensor | None) -> Tensor:
        dropout_p = self.dropout_rate if self.training else 0.0
        heads = attention_heads(self, x, frames, frames, pos_emb, dropout_p, self.context, lengths)
        return self.linear_out(heads.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"n_head={self.n_head}, n_feat={self.n_feat}, dropout_rate={self.dropout_rate}, context={self.context}"


def attention_heads(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_emb: Tensor,
    dropout_p: float,
    window: tuple[int | None, int | None],
    key_lengths: Tensor | None,
) -> Tensor:
    """The heads ``(B, H, Q, D)`` of a ``layer`` with ESPnet's and NeMo's names, before ``linear_out``.

    ``query (B, Q, d)``, ``key``, ``value (B, K, d)``; ``pos_emb (P, d)`` or ``(1, P, d)`` from distance ``K - 1`` on.
    """
    n_head = layer.pos_bias_u.shape[0]
    inputs = layer.linear_q(query), layer.linear_k(key), layer.linear_v(value)
    q, k, v = (x.unflatten(-1, (n_head, -1)).transpose(1, 2) for x in inputs)
    r = layer.linear_pos(pos_emb.flatten(0, -2)).unflatten(-1, (n_head, -1)).transpose(0, 1)
    options: dict[str, Any] = {"causal": False, "window": window, "key_lengths": key_lengths, "dropout_p": dropout_p}
    return rel_attention(q, k, v, r, layer.pos_bias_u, layer.pos_bias_v, **options)


def _lengths(padding_mask: Tensor) -> Tensor:
    """The number of real frames; where padding stands before one, -1, for which attention gives NaN on a GPU."""
    padding_mask = padding_mask.bool()
    lengths = (~padding_mask).sum(1)
    expected = torch.arange(padding_mask.shape[1], device=padding_mask.device) >= lengths[:, None]
    at_the_end = (padding_mask == expected).all(1)
    if host_can_look(padding_mask) and not at_the_end.all():
        raise ValueError("padding_mask must be True only behind an utterance's last real frame")
    return torch.where(at_the_end, lengths, -1)

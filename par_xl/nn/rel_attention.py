"""Transformer-XL's attention layers. Memory and segment are projected apart and never concatenated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from par_xl.nn.plain_linear import is_plain
from par_xl.ops.compressed_attention import compressed_attention
from par_xl.ops.dropout import dropout
from par_xl.ops.rel_attention import rel_attention

Window = tuple[int | None, int | None]
KeysValues = tuple[Tensor, Tensor]  # each (B, H, M, D)


class Attended(NamedTuple):
    """What a layer adds to its input ``(B, T, d)``, the segment's keys and values ``(B, H, T, D)``, and, if wanted, the
    attention that each key received ``(B, H, K)``."""

    output: Tensor
    k: Tensor
    v: Tensor
    received: Tensor | None


class CompressedPart(NamedTuple):
    """Compressed steps with position rows of their own: the arguments of :func:`compressed_attention`."""

    compressed: KeysValues
    compressed_r: Tensor
    compressed_bias: Tensor


class MemoryAttention(nn.Module):
    """What Transformer-XL's attention layers share: heads, norm, dropout and the residual connection.

    The result is ``layer_norm(w + dropout(o_net(heads)))``, or ``w + dropout(o_net(heads))`` with ``pre_lnorm``, where
    the projections see ``layer_norm(w)`` instead.

    Args:
        n_head, d_model, d_head: H, d and D.
        dropout: of the result, before the residual connection.
        dropatt: of the attention weights.
        pre_lnorm: normalise before the attention instead of after it.
        layer_norm_epsilon: of ``layer_norm``.
    """

    def __init__(
        self,
        n_head: int,
        d_model: int,
        d_head: int,
        dropout: float = 0.0,
        dropatt: float = 0.0,
        *,
        pre_lnorm: bool = False,
        layer_norm_epsilon: float = 1e-5,
    ):
        super().__init__()
        self.n_head, self.d_model, self.d_head, self.pre_lnorm = n_head, d_model, d_head, pre_lnorm
        self.dropout, self.dropatt = dropout, dropatt
        self.join: Any = torch.add  # the residual connection; a GRU, if a model has gates
        self.o_net = nn.Linear(n_head * d_head, d_model, bias=False)
        self.layer_norm = nn.LayerNorm(d_model, eps=layer_norm_epsilon)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(B, T, n * H * D)`` to n views ``(B, H, T, D)``."""
        return x.unflatten(-1, (-1, self.n_head, self.d_head)).permute(2, 0, 3, 1, 4).unbind(0)

    def normed(self, x: Tensor) -> Tensor:
        return self.layer_norm(x) if self.pre_lnorm else x

    def merge(self, heads: Tensor) -> Tensor:
        """``(B, H, T, D)`` to ``(B, T, H * D)``."""
        return heads.transpose(1, 2).flatten(2)

    def output(self, heads: Tensor) -> Tensor:
        """What the layer adds to its input, ``(B, H, T, D)`` to ``(B, T, d)``."""
        return dropout(self.o_net(self.merge(heads)), self.dropout, self.training)

    def residual(self, w: Tensor, out: Tensor) -> Tensor:
        """The layer's result from its input and :meth:`output`, ``(B, T, d)``."""
        joined = self.join(w, out)
        return joined if self.pre_lnorm else self.layer_norm(joined)

    @property
    def dropout_p(self) -> float:
        return self.dropatt if self.training else 0.0

    def extra_repr(self) -> str:
        return f"n_head={self.n_head}, d_head={self.d_head}, dropatt={self.dropatt}, pre_lnorm={self.pre_lnorm}"


class _RelMultiHeadAttn(MemoryAttention):
    """Attention in which a position is a row of ``r``, so that keys and values do not depend on it and can be kept."""

    def __init__(self, n_head: int, d_model: int, d_head: int, dropout: float = 0.0, dropatt: float = 0.0, **kwargs):
        super().__init__(n_head, d_model, d_head, dropout, dropatt, **kwargs)
        self.qkv_net = nn.Linear(d_model, 3 * n_head * d_head, bias=False)

    def keys_values(self, mems: Tensor) -> KeysValues:
        """Keys and values ``(B, H, M, D)`` of the memory ``(B, M, d)``."""
        x, layer, n = self.normed(mems), self.qkv_net, self.n_head * self.d_head
        if is_plain(layer) and not layer._forward_hooks:
            both = F.linear(x, layer.weight[n:], None if layer.bias is None else layer.bias[n:])
        else:  # an adapter, say
            both = layer(x)[..., n:]
        k, v = self.split(both)
        return k, v

    def attend(
        self,
        w: Tensor,
        r: Tensor,
        content_bias: Tensor,
        position_bias: Tensor | None,
        memory: KeysValues | None,
        window: Window | None,
        compressed: CompressedPart | None = None,
        clamp_len: int | None = None,
        return_received: bool = False,
    ) -> Attended:
        """With positions ``r (H, P, D)`` and a memory of keys and values; with compressed ones before it, unclamped."""
        q, k, v = self.split(self.qkv_net(self.normed(w)))
        options: dict[str, Any] = {"memory": memory, "scale": self.d_head**-0.5, "dropout_p": self.dropout_p}
        if return_received:
            options["return_received"] = True
        if compressed is None:
            options |= {"window": window, "clamp_len": clamp_len}
            heads = self.attention(q, k, v, r, content_bias, position_bias, **options)
        else:
            heads = compressed_attention(q, k, v, r, content_bias, position_bias, **compressed._asdict(), **options)
        heads, received = heads if return_received else (heads, None)
        return Attended(self.output(heads), k, v, received)

    attention: Callable[..., Any] = staticmethod(rel_attention)


class RelPartialLearnableMultiHeadAttn(_RelMultiHeadAttn):
    """Transformer-XL's attention, causal, over memory and segment, batch first.

    ``score[i, j] = ((q_i + r_w_bias) . k_j + (q_i + r_r_bias) . (r_net r)_d) / sqrt(D)`` for a key at distance d, with
    q, k, v = ``qkv_net`` of the segment and k, v of the memory; see :func:`par_xl.rel_attention` for the rest.

    Parameters, as upstream: ``qkv_net.weight (3HD, d)``, ``r_net.weight (HD, d)``, ``o_net.weight (d, HD)``,
    ``layer_norm.{weight,bias} (d,)``; ``r_w_bias`` and ``r_r_bias (H, D)`` with ``untie_r``.

    Args:
        n_head, d_model, d_head, dropout, dropatt, pre_lnorm, layer_norm_epsilon: see :class:`MemoryAttention`.
        untie_r: the layer has biases of its own; otherwise all layers share those in the call.

    Source: arXiv 1901.02860; github.com/kimiyoung/transformer-xl; Hugging Face transformers 4.35, transfo_xl.
    """

    def __init__(
        self,
        n_head: int,
        d_model: int,
        d_head: int,
        dropout: float = 0.0,
        dropatt: float = 0.0,
        *,
        pre_lnorm: bool = False,
        untie_r: bool = False,
        layer_norm_epsilon: float = 1e-5,
    ):
        norm = {"pre_lnorm": pre_lnorm, "layer_norm_epsilon": layer_norm_epsilon}
        super().__init__(n_head, d_model, d_head, dropout, dropatt, **norm)
        self.r_net = nn.Linear(d_model, n_head * d_head, bias=False)
        self.r_w_bias = nn.Parameter(torch.zeros(n_head, d_head)) if untie_r else None
        self.r_r_bias = nn.Parameter(torch.zeros(n_head, d_head)) if untie_r else None

    def forward(
        self,
        w: Tensor,
        r: Tensor,
        r_w_bias: Tensor | None = None,
        r_r_bias: Tensor | None = None,
        mems: Tensor | None = None,
        *,
        window: Window | None = None,
        clamp_len: int | None = None,
    ) -> Tensor:
        """The layer, ``(B, T, d)`` to ``(B, T, d)``.

        Args:
            w: the segment, ``(B, T, d)``.
            r: position encodings (:func:`par_xl.nn.sinusoids`), the farthest distance first: ``(M + T, d)``, or only
                ``clamp_len + 1`` rows where that is less.
            r_w_bias, r_r_bias: ``(H, D)``, exactly if the layer has none.
            mems: inputs of the layer at earlier steps, ``(B, M, d)``; they and ``qkv_net`` get gradients.
            window: as in :func:`par_xl.rel_attention`; ``same_length`` is ``(mem_len - 1, 0)``.
            clamp_len: distances beyond it count as it.

        Raises:
            ValueError: biases are missing, or there twice; what :func:`par_xl.rel_attention` refuses.
        """
        return self.residual(w, self.branch(w, r, r_w_bias, r_r_bias, mems, window=window, clamp_len=clamp_len))

    def branch(
        self,
        w: Tensor,
        r: Tensor,
        r_w_bias: Tensor | None = None,
        r_r_bias: Tensor | None = None,
        mems: Tensor | None = None,
        *,
        window: Window | None = None,
        clamp_len: int | None = None,
    ) -> Tensor:
        """What the layer adds to ``w``, ``(B, T, d)``; arguments as for :meth:`forward`."""
        memory = None if mems is None else self.keys_values(mems)
        return self.attend(w, *self.prepare(r, r_w_bias, r_r_bias), memory, window, clamp_len=clamp_len).output

    def prepare(self, r: Tensor, r_w_bias: Tensor | None, r_r_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The projected positions ``(H, P, D)`` and the biases, for :meth:`attend`."""
        own = self.r_w_bias is not None
        if own != (r_w_bias is None) or own != (r_r_bias is None):
            state = "the layer has its own (untie_r)" if own else "the layer has none of its own"
            raise ValueError(f"r_w_bias and r_r_bias must {'not' if own else 'both'} be given: {state}")
        rows = self.r_net(r).unflatten(-1, (self.n_head, self.d_head)).transpose(0, 1)
        return (rows, self.r_w_bias, self.r_r_bias) if own else (rows, r_w_bias, r_r_bias)  # type: ignore[return-value]


class RelLearnableMultiHeadAttn(_RelMultiHeadAttn):
    """Attention with learned position rows and a bias for each head and distance (kimiyoung's ``attn_type`` 1).

    ``score[i, j] = ((q_i + r_w_bias) . k_j + q_i . r_emb_d + r_bias_d) / sqrt(D)`` for a key at distance d. Arguments
    as in :class:`MemoryAttention`; parameters ``qkv_net``, ``o_net`` and ``layer_norm`` as in
    :class:`RelPartialLearnableMultiHeadAttn`.

    Source: Shaw et al. (arXiv 1803.02155); github.com/kimiyoung/transformer-xl.
    """

    def forward(
        self,
        w: Tensor,
        r_emb: Tensor,
        r_w_bias: Tensor,
        r_bias: Tensor,
        mems: Tensor | None = None,
        *,
        window: Window | None = None,
        clamp_len: int | None = None,
    ) -> Tensor:
        """``w (B, T, d)``, ``r_emb (P, H, D)``, ``r_w_bias (H, D)``, ``r_bias (P, H)``, ``mems (B, M, d)`` to
        ``(B, T, d)``; P and the rest as in :class:`RelPartialLearnableMultiHeadAttn`."""
        memory = None if mems is None else self.keys_values(mems)
        prepared = self.prepare(r_emb, r_w_bias, r_bias)
        return self.residual(w, self.attend(w, *prepared, memory, window, clamp_len=clamp_len).output)

    def prepare(self, r_emb: Tensor, r_w_bias: Tensor, r_bias: Tensor) -> tuple[Tensor, Tensor, None]:
        """Positions ``(H, P, D + 1)`` and the content bias ``(H, D + 1)``, for :meth:`attend`."""
        return torch.cat((r_emb, r_bias[..., None]), -1).transpose(0, 1), F.pad(r_w_bias, (0, 1)), None

    @staticmethod
    def attention(q, k, v, r, content_bias, position_bias, *, memory, **options) -> Tensor:
        # The bias of a distance is one more column of r, which meets a one in the queries and a zero in the keys.
        q, k, v = F.pad(q, (0, 1), value=1.0), F.pad(k, (0, 1)), F.pad(v, (0, 1))
        if memory is not None:
            memory = F.pad(memory[0], (0, 1)), F.pad(memory[1], (0, 1))
        return rel_attention(q, k, v, r, content_bias, position_bias, memory=memory, **options)[..., :-1]


class MultiHeadAttn(MemoryAttention):
    """Attention without positions of its own: the layer's input carries them (kimiyoung's ``attn_type`` 2 and 3).

    Parameters: ``q_net.weight (HD, d)``, ``kv_net.weight (2HD, d)``, ``o_net``, ``layer_norm``. As upstream, the
    queries are of ``w`` itself even with ``pre_lnorm``.
    """

    def __init__(self, n_head: int, d_model: int, d_head: int, dropout: float = 0.0, dropatt: float = 0.0, **kwargs):
        super().__init__(n_head, d_model, d_head, dropout, dropatt, **kwargs)
        self.q_net = nn.Linear(d_model, n_head * d_head, bias=False)
        self.kv_net = nn.Linear(d_model, 2 * n_head * d_head, bias=False)

    def forward(self, w: Tensor, mems: Tensor | None = None, *, window: Window | None = None) -> Tensor:
        """``w (B, T, d)``, ``mems (B, M, d)`` to ``(B, T, d)``."""
        both = w if mems is None else torch.cat((mems, w), 1)
        (q,), (k, v) = self.split(self.q_net(w)), self.split(self.kv_net(self.normed(both)))
        visible = band(q.shape[2], k.shape[2], window, w.device)
        heads = F.scaled_dot_product_attention(q, k, v, visible, self.dropout_p, scale=self.d_head**-0.5)
        return self.residual(w, self.output(heads))


def band(n_queries: int, n_keys: int, window: Window | None, device: torch.device) -> Tensor:
    """Which of the keys each query sees, bool ``(Q, K)``: those at distances ``0 <= d <= left``."""
    visible = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)
    left = None if window is None else window[0]
    return visible if left is None else visible.triu(n_keys - n_queries - left)

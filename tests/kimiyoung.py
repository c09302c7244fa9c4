"""Transformer-XL written out pair by pair from its equations, in fp64, on state dicts with kimiyoung's names.

Nothing is shared with par_xl: no shift, no mask, no adaptive tables, and sentences are (B, T) lists of positions.
"""

import math

import torch
import torch.nn.functional as F


def wave(distance, width):
    frequencies = torch.tensor([10000 ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    return torch.cat(((distance * frequencies).sin(), (distance * frequencies).cos()))


class Reference:
    """``config`` holds kimiyoung's options; ``reach`` is the largest distance that ``same_length`` leaves, or None."""

    def __init__(self, state, config, reach=None):
        self.state = {name: x.double() for name, x in state.items()}
        self.config, self.reach = config, reach
        self.heads = config["n_head"], config["d_head"]

    def __getitem__(self, name):
        return self.state[name]

    def embed(self, tokens):
        table = torch.cat(
            [
                self[f"word_emb.emb_layers.{i}.weight"] @ projection.T if projection is not None else x
                for i, (x, projection) in enumerate(self._tables("word_emb.emb_layers.{}.weight", "word_emb.emb_projs"))
            ]
        )
        return table[tokens] * math.sqrt(self.config["d_model"])

    def _tables(self, name, projections):
        i = 0
        while name.format(i) in self.state:
            yield self[name.format(i)], self.state.get(f"{projections}.{i}")
            i += 1

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"])

    def attention(self, layer, x, mems):
        """x (B, T, d) and mems (B, M, d), with absolute positions added where there are any."""
        prefix, pre = f"layers.{layer}.dec_attn", self.config.get("pre_lnorm", False)
        both = torch.cat((mems, x), 1)
        source = self.norm(both, f"{prefix}.layer_norm") if pre else both
        n_memory, n = mems.shape[1], both.shape[1]
        if f"{prefix}.qkv_net.weight" in self.state:
            q, k, v = (source @ self[f"{prefix}.qkv_net.weight"].T).chunk(3, -1)
        else:
            q, (k, v) = (
                both @ self[f"{prefix}.q_net.weight"].T,
                (source @ self[f"{prefix}.kv_net.weight"].T).chunk(2, -1),
            )
        q, k, v = (y.unflatten(-1, self.heads) for y in (q, k, v))  # (B, n, H, D)
        out = []
        for i in range(n_memory, n):
            seen = [j for j in range(i + 1) if self.reach is None or i - j <= self.reach]
            scores = torch.stack([self.score(layer, q[:, i], k[:, j], i - j) for j in seen])
            out.append(sum(p[..., None] * v[:, j] for p, j in zip(scores.softmax(0), seen, strict=True)))
        out = torch.stack(out, 1).flatten(2) @ self[f"{prefix}.o_net.weight"].T
        return x + out if pre else self.norm(x + out, f"{prefix}.layer_norm")

    def score(self, layer, q, k, distance):
        """q, k (B, H, D) to (B, H)."""
        kind, clamp = self.config.get("attn_type", 0), self.config.get("clamp_len", -1)
        if kind == 0:
            u, v = (self.state.get(b, self.state.get(f"layers.{layer}.dec_attn.{b}")) for b in ("r_w_bias", "r_r_bias"))
            encoding = wave(min(distance, clamp) if clamp > 0 else distance, self.config["d_model"])
            row = (self[f"layers.{layer}.dec_attn.r_net.weight"] @ encoding).view(self.heads)
            total = ((q + u) * k).sum(-1) + ((q + v) * row).sum(-1)
        elif kind == 1:
            table = self["r_emb"][layer]
            row = len(table) - 1 - min(distance, (clamp if clamp > 0 else len(table)) - 1, len(table) - 1)
            total = ((q + self["r_w_bias"][layer]) * k + q * table[row]).sum(-1) + self["r_bias"][layer][row]
        else:
            total = (q * k).sum(-1)
        return total / math.sqrt(self.heads[1])

    def absolute(self, layer, n):
        """What type 2 and 3 add to the n steps up to the last."""
        if self.config.get("attn_type", 0) == 3:
            table = self["r_emb"][layer].flatten(1)
            return torch.stack([table[max(0, len(table) - 1 - d)] for d in reversed(range(n))])
        on = self.config.get("attn_type", 0) == 2 and layer == 0
        return torch.stack([wave(d, self.config["d_model"]) * on for d in reversed(range(n))])

    def feed_forward(self, layer, x):
        prefix, pre = f"layers.{layer}.pos_ff", self.config.get("pre_lnorm", False)
        inner = self.norm(x, f"{prefix}.layer_norm") if pre else x
        inner = inner @ self[f"{prefix}.CoreNet.0.weight"].T + self[f"{prefix}.CoreNet.0.bias"]
        inner = inner.relu() @ self[f"{prefix}.CoreNet.3.weight"].T + self[f"{prefix}.CoreNet.3.bias"]
        return x + inner if pre else self.norm(x + inner, f"{prefix}.layer_norm")

    def segment(self, tokens, mems):
        """tokens (B, T), mems a list of (B, M, d), to the hidden states and the inputs of every layer."""
        x, inputs = self.embed(tokens), []
        for layer in range(self.config["n_layer"]):
            inputs.append(x)
            positions = self.absolute(layer, mems[layer].shape[1] + x.shape[1])
            with_positions = torch.cat((mems[layer], x), 1) + positions
            split = mems[layer].shape[1]
            x = self.attention(layer, with_positions[:, split:], with_positions[:, :split])
            x = self.feed_forward(layer, x)
        return x, inputs

    def log_prob(self, hidden):
        """(B, T, d) to (B, T, V): the product rule over head and tails; the first tail has the head's last column."""
        tables = list(self._tables("crit.out_layers.{}.weight", "crit.out_projs"))
        if len(tables) == 1:  # one table, cut by the cutoffs; the projections are still one for each cluster
            cuts = [0, *self.config.get("cutoffs", ()), len(tables[0][0])]
            weights = [tables[0][0][a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
            biases = [self["crit.out_layers.0.bias"][a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        else:
            weights = [weight for weight, _ in tables]
            biases = [self[f"crit.out_layers.{i}.bias"] for i in range(len(tables))]
        projections = [self.state.get(f"crit.out_projs.{i}") for i in range(len(weights))]
        seen = [hidden if p is None else hidden @ p for p in projections]
        n_tails = len(weights) - 1
        head_weight, head_bias = weights[0], biases[0]
        if n_tails:
            head_weight = torch.cat((head_weight, self["crit.cluster_weight"]))
            head_bias = torch.cat((head_bias, self["crit.cluster_bias"]))
        head = (seen[0] @ head_weight.T + head_bias).log_softmax(-1)
        parts = [head[..., : len(weights[0])]]
        for i in range(1, n_tails + 1):
            parts.append(head[..., -i, None] + (seen[i] @ weights[i].T + biases[i]).log_softmax(-1))
        return torch.cat(parts, -1)

    def nll(self, segments, mem_len):
        """The losses of [(tokens, targets)] read one after the other with a memory of ``mem_len``, and the memory."""
        batch, d = len(segments[0][0]), self.config["d_model"]
        mems, losses = [torch.zeros(batch, 0, d, dtype=torch.float64)] * self.config["n_layer"], []
        for tokens, targets in segments:
            hidden, inputs = self.segment(tokens, mems)
            losses.append(-self.log_prob(hidden).gather(2, targets[..., None])[..., 0])
            both = [torch.cat(pair, 1) for pair in zip(mems, inputs, strict=True)]
            mems = [x[:, max(0, x.shape[1] - mem_len) :] for x in both]
        return torch.cat(losses, 1), torch.stack(mems)

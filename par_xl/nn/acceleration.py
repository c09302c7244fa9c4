"""Swapping the modules of a model that the user already has for their fused twins."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from par_xl.nn.adaptive_softmax import AdaptiveLogSoftmaxWithLoss
from par_xl.nn.rel_attention import RelPartialLearnableMultiHeadAttn, Window, band


def accelerate(module: nn.Module) -> dict[str, nn.Module]:
    """Swap, in place, every submodule that this library knows for its fused twin, which shares its parameters.

    Known are, by class name and parts: ``RelPartialLearnableMultiHeadAttn`` of kimiyoung/transformer-xl, of NVIDIA's
    Transformer-XL and of Hugging Face's ``transfo_xl``; and ``torch.nn.AdaptiveLogSoftmaxWithLoss``. A twin is called
    as the original is. The parameters, their names and their order stay, so that optimizers and checkpoints go on; so
    does the training mode. Forward hooks of a swapped module are lost.

        swapped = par_xl.accelerate(model)      # {"layers.0.dec_attn": ..., ...}; empty: nothing was known

    Returns:
        The twins by their qualified names.

    Raises:
        TypeError: ``module`` itself is one of those: there is no parent in which to swap it.
    """
    if _twin(module) is not None:
        raise TypeError(f"module must contain what is to be swapped, not be it, a {type(module).__name__}")
    twins: dict[int, nn.Module] = {}
    swapped = {}
    for name, child in list(module.named_modules(remove_duplicate=False)):
        twin = twins.get(id(child)) or _twin(child)
        if twin is not None:
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, twin)
            twins[id(child)] = swapped[name] = twin
    return swapped


def _twin(module: nn.Module) -> nn.Module | None:
    """The twin of a module that is known and is not one already."""
    for make in TWINS:
        twin = make(module)
        if twin is not None:
            return twin.train(module.training)
    return None


class _TimeFirst(RelPartialLearnableMultiHeadAttn):
    """The fused layer for tensors ``(T, B, d)``, causal by the mask that upstream passes."""

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (-1, self.n_head, self.d_head)).permute(2, 1, 3, 0, 4).unbind(0)

    def merge(self, heads: Tensor) -> Tensor:
        return heads.permute(2, 0, 1, 3).flatten(2)

    def run(self, w, r, r_w_bias, r_r_bias, attn_mask, mems):
        mems = mems if mems is not None and mems.numel() else None
        return super().forward(w, r.flatten(0, -2), r_w_bias, r_r_bias, mems, window=_window(attn_mask))


class KimiyoungTwin(_TimeFirst):
    """The call of kimiyoung's and NVIDIA's layer, whose biases belong to the model."""

    def forward(self, w, r, r_w_bias, r_r_bias, attn_mask=None, mems=None):  # type: ignore[override]
        return self.run(w, r, r_w_bias, r_r_bias, attn_mask, mems)


class HuggingFaceTwin(_TimeFirst):
    """The call of Hugging Face's layer."""

    def forward(self, w, r, attn_mask=None, mems=None, head_mask=None, output_attentions=False):  # type: ignore[override]
        if head_mask is not None or output_attentions:
            raise ValueError(
                "head_mask and output_attentions must not be given: a fused kernel has no attention matrix"
            )
        return [self.run(w, r, None, None, attn_mask, mems)]


def _rel_partial_learnable(module: nn.Module) -> nn.Module | None:
    parts = "qkv_net", "r_net", "o_net", "layer_norm", "drop", "dropatt"
    named = type(module).__name__ == RelPartialLearnableMultiHeadAttn.__name__
    if not named or isinstance(module, RelPartialLearnableMultiHeadAttn) or not all(hasattr(module, p) for p in parts):
        return None
    theirs: Any = module
    with_biases = "r_w_bias" in inspect.signature(module.forward).parameters
    with torch.device("meta"):
        twin = (KimiyoungTwin if with_biases else HuggingFaceTwin)(
            theirs.n_head,
            theirs.d_model,
            theirs.d_head,
            theirs.drop.p,
            theirs.dropatt.p,
            pre_lnorm=theirs.pre_lnorm,
            untie_r=not with_biases,
        )
    shared = {name: part for name, part in module.named_children() if name in twin._modules}
    for name, part in [*shared.items(), *module.named_parameters(recurse=False)]:
        delattr(twin, name)  # so that the order becomes theirs
        setattr(twin, name, part)
    return twin


def _adaptive_log_softmax(module: nn.Module) -> nn.Module | None:
    if type(module) is not nn.AdaptiveLogSoftmaxWithLoss:
        return None
    sizes = module.in_features, module.n_classes, module.cutoffs[:-1], module.div_value, module.head_bias
    with torch.device("meta"):
        twin = AdaptiveLogSoftmaxWithLoss(*sizes)
    twin.head, twin.tail = module.head, module.tail
    return twin


TWINS: list[Callable[[nn.Module], nn.Module | None]] = [_rel_partial_learnable, _adaptive_log_softmax]

# The window of a mask that was looked at, and the mask's version then.
_windows: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _window(attn_mask: Tensor | None) -> Window:
    """The window that ``attn_mask (Q, K)`` or ``(Q, K, 1)``, nonzero where a key is hidden, is.

    The host has to look at the mask, once for all layers that share it (upstream looks in every layer).
    """
    if attn_mask is None:
        raise ValueError("attn_mask must be given: the layer is causal")
    version, window = _windows.get(attn_mask, (None, None))
    if version != attn_mask._version:
        window = _read_window(attn_mask)
        _windows[attn_mask] = attn_mask._version, window
    return window


# What torch.compiler.disable sets; calling it would import torch._dynamo, and with it triton, along with par_xl.
_window._torchdynamo_disable = True  # type: ignore[attr-defined]


def _read_window(attn_mask: Tensor) -> Window:
    visible = attn_mask.reshape(attn_mask.shape[:2]) == 0
    n_queries, n_keys = visible.shape
    queries, keys = visible.nonzero(as_tuple=True)
    left = int((queries + n_keys - n_queries - keys).max()) if len(keys) else -1
    window = None if left == n_keys - 1 else left, 0
    if not torch.equal(visible, band(n_queries, n_keys, window, visible.device)):
        raise ValueError("attn_mask must hide the future, and the keys beyond one distance if any, and nothing else")
    return window

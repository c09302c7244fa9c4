"""Linear layers whose weights a fused op reads without calling them."""

from torch import nn
from torch.nn.utils import parametrize


def is_plain(layer: nn.Module) -> bool:
    """Whether a call is ``F.linear`` with the weight and the bias that stand in the layer, and nothing else.

    Not so with an adapter around it, nor where a hook makes the weight before each call, as pruning and the older
    weight norm do. Parametrizations make it whenever it is read.
    """
    if parametrize.is_parametrized(layer):
        return isinstance(layer, nn.Linear)
    return type(layer) is nn.Linear and ("weight" in layer._parameters or not layer._forward_pre_hooks)


def plain(name: str, layer: nn.Module) -> nn.Linear:
    """The layer, to read its weight.

    Raises:
        TypeError: its result is not that of the weight alone.
    """
    if not is_plain(layer):
        raise TypeError(
            f"{name} must be an nn.Linear whose weight no hook makes, not {type(layer).__name__}: a fused op reads the"
            " weight and never calls the layer"
        )
    return layer  # type: ignore[return-value]

"""Drop-in modules built from the ops."""

from par_xl.nn.regularization import ActivationRegularization

__all__ = ["ActivationRegularization"]

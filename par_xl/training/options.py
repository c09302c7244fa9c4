"""Options by name, as they come from a command line."""

from dataclasses import replace
from typing import Any, TypeVar

from par_xl.training.fit import Recipe

R = TypeVar("R", bound=Recipe)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def override(recipe: R, options: dict[str, Any]) -> R:
    """The recipe with other options: fields of it or of its model's configuration, by name.

    Raises:
        ValueError: there is no such option, or the value cannot be read as its type.
    """
    config = recipe.config_class(vocab_size=1, **recipe.model)
    ours: dict[str, Any] = {}
    models: dict[str, Any] = {}
    for name, value in options.items():
        owner, target = (recipe, ours) if hasattr(recipe, name) else (config, models)
        if name in ("model", "config_class", "vocab_size") or name not in vars(owner):
            raise ValueError(f"there is no option {name!r}")
        target[name] = read_option(name, value, getattr(owner, name))
    return replace(recipe, **ours, model={**recipe.model, **models})


def read_option(name: str, value: Any, default: Any) -> Any:
    """``value``, a string perhaps, as the type of ``default``; a tuple from ``2000,10000``, and from "" an empty one.

    Raises:
        ValueError: it cannot be.
    """
    kind = type(default)
    try:
        if kind is bool:
            return _BOOLEANS[str(value).lower()]
        if kind is tuple and isinstance(value, str):
            return tuple(int(part) for part in value.split(",") if value)
        return kind(value)
    except (KeyError, ValueError):
        raise ValueError(f"{name} must be of type {kind.__name__}, not {value!r}") from None

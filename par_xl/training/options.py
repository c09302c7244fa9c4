"""Options by name, as they come from a command line."""

from dataclasses import replace
from typing import Any, TypeVar, get_args, get_type_hints

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
        target[name] = read_option(name, value, owner)
    return replace(recipe, **ours, model={**recipe.model, **models})


def read_option(name: str, value: Any, owner: Any) -> Any:
    """``value``, a string perhaps, as the type of ``owner.name``; a tuple from ``2000,10000``, from "" an empty one.

    ``owner`` is a dataclass; the value of what is no field of it stays a string.

    Raises:
        ValueError: it cannot be.
    """
    kind = type(getattr(owner, name, ""))
    wanted = f"of type {kind.__name__}"
    try:
        if kind is not tuple:
            return _read(kind, value)
        element = get_args(get_type_hints(type(owner))[name])[0]
        wanted = f"{element.__name__} values with commas between them"
        parts = value.split(",") if isinstance(value, str) and value else value
        return tuple(_read(element, part) for part in parts)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name} must be {wanted}, not {value!r}") from None


def _read(kind: type, value: Any) -> Any:
    return _BOOLEANS[str(value).lower()] if kind is bool else kind(value)

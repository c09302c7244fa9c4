"""What the commands of ``par-xl`` share: the screen, options, records."""

import datetime
import json
import logging
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from par_xl.environment import device_name, versions

console = Console()


def parse_options(options: list[str] | None, **more: Any) -> dict[str, str]:
    """``NAME=VALUE`` by name, and those of ``more`` that are given."""
    parsed = {}
    for option in options or []:
        name, separator, value = option.partition("=")
        if not separator:
            raise ValueError(f"--set takes NAME=VALUE, not {option!r}")
        parsed[name] = value
    return parsed | {name: str(value) for name, value in more.items() if value is not None}


def read_devices(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise ValueError(f"--devices must be auto or a positive number, not {text!r}")
    return text if text == "auto" else int(text)


def check_vocabulary(vocabulary: Any, corpus: Any, data: str, run: Path) -> None:
    if corpus.vocabulary.words != vocabulary.words:
        raise ValueError(f"{data} is not what {run} was trained on: its vocabulary is another one")


def check_weights(model: Any, config: Any, run: Path) -> None:
    """That a model of ``config`` has the parameters of ``model``, which is that of ``run``."""
    import torch

    with torch.device("meta"):
        other = type(model)(config)
    shapes, others = ({name: x.shape for name, x in m.state_dict().items()} for m in (model, other))
    if others != shapes:
        options = [(name, value, getattr(config, name)) for name, value in vars(model.config).items()]
        changed = [f"{name} = {value!r}, not {given!r}" for name, value, given in options if value != given]
        raise ValueError(f"--start: the weights of {run} are for {', '.join(changed)}")


def choose(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise ValueError(f"there is no {what} {name!r}; there are {', '.join(table)}")
    return table[name]


def show(result: dict[str, float]) -> None:
    table = Table(show_header=False)
    for name, value in result.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
    console.print(table, highlight=False)


def show_architecture(model: Any) -> None:
    """A SuperNet's pattern and the probabilities behind it."""
    table = Table("block", "attention", "dense", "identity", title=model.derive())
    for i, row in enumerate(model.probabilities().tolist()):
        table.add_row(str(i + 1), *(f"[bold]{p:.3f}[/bold]" if p == max(row) else f"{p:.3f}" for p in row))
    console.print(table, highlight=False)


def write_record(path: Path, contents: dict[str, Any]) -> None:
    """A result with what is needed to get it again."""
    record = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "versions": versions(),
        **contents,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def quiet() -> None:
    """Leave the screen to the progress bar: no advertisement, no notes on Lightning's own doings."""
    import lightning.pytorch  # noqa: F401  # which sets the level at import

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")

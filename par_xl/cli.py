"""The ``par-xl`` command. A subcommand imports what it needs when it runs; ``par-xl info`` does without Lightning."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import par_xl
from par_xl.cli_common import (
    check_vocabulary,
    check_weights,
    choose,
    console,
    parse_options,
    quiet,
    read_devices,
    show,
    show_architecture,
    write_record,
)
from par_xl.environment import device_name, versions

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=par_xl.__doc__)


def main() -> None:
    """Entry point: an error that the user can mend is one line, not a traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in ("lightning", "torchmetrics", "tensorboard", "matplotlib", "sentencepiece"):
            raise
        Console(stderr=True).print(f"{package} is not installed: pip install 'par_xl\\[train]'", highlight=False)
        sys.exit(2)


@app.command()
def info() -> None:
    """Show versions, the device, what was built, and which backends are there and why others are not."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("device", device_name())
    for part, state in par_xl.build_info().items():
        table.add_row(f"built: {part}", state)
    console.print(table, highlight=False)

    backends = Table("backend", "cpu", "cuda")
    for name, states in par_xl.backends().items():
        backends.add_row(name, *(_coloured(states[device]) for device in ("cpu", "cuda")))
    console.print(backends, highlight=False)


def _coloured(state: str) -> str:
    return f"[green]{state}[/green]" if state == "available" else state


# What train and search share.
Data = Annotated[
    str, typer.Option(help="human-numbers, or a folder with wiki.*.tokens or *.txt; bytes:, pieces: before it.")
]
RecipeName = Annotated[str, typer.Option("--recipe", help="Name of a recipe; the default goes with the data.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for checkpoints, curves and records.", show_default="runs/ARCHITECTURE")
]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Another value for an option of the recipe or model."),
]
Epochs = Annotated[int | None, typer.Option(help="Short for --set epochs=N.")]
Seed = Annotated[int | None, typer.Option(help="Short for --set seed=N.")]
Backend = Annotated[str, typer.Option(help="eager, native, triton or auto.")]
Precision = Annotated[str, typer.Option(help="32-true, bf16-mixed (CPU, GPU), 16-mixed (GPU), ...: Lightning's names.")]
Devices = Annotated[str, typer.Option(help="How many, or auto.")]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile the model; of a search, without hard samples.")]
Resume = Annotated[Path | None, typer.Option(help="A .ckpt of the same run to go on from.")]
Run = Annotated[Path, typer.Argument(help="Folder of a finished run.")]


@app.command(no_args_is_help=True)
def train(
    architecture: Annotated[str, typer.Argument(help="awd-lstm, transformer-xl, compressive or par.")],
    data: Data,
    recipe: RecipeName = "",
    out: Out = None,
    options: Options = None,
    epochs: Epochs = None,
    seed: Seed = None,
    pattern: Annotated[
        str | None, typer.Option(help='Of par: "s" attention, "f" dense, "-" nothing; or the rule par or interleaved.')
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="A finished run, of derive say, with whose model and weights to begin.")
    ] = None,
    backend: Backend = "auto",
    precision: Precision = "32-true",
    devices: Devices = "1",
    compile: Compile = False,
    resume: Resume = None,
) -> None:
    """Train a model. Ctrl-C finishes the step and saves; --resume goes on as if nothing had happened."""
    chosen = parse_options(options, epochs=epochs, seed=seed, pattern=pattern)
    if pattern is not None and architecture != "par":
        raise ValueError(f"--pattern is for par, not for {architecture}")
    if pattern and set(pattern) <= set("sf-"):  # not the name of a rule
        chosen.setdefault("n_layer", str(len(pattern)))
    how = dict(backend=backend, precision=precision, devices=devices, compile=compile, resume=resume, start=start)
    _train(architecture, data, recipe, out, chosen, how)


@app.command(no_args_is_help=True)
def search(
    data: Data,
    recipe: RecipeName = "",
    out: Out = None,
    options: Options = None,
    epochs: Epochs = None,
    seed: Seed = None,
    backend: Backend = "auto",
    precision: Precision = "32-true",
    devices: Devices = "1",
    compile: Compile = False,
    resume: Resume = None,
) -> None:
    """Search the blocks of a PAR Transformer-XL: attention, dense or nothing. Ctrl-C and --resume as for train."""
    how = dict(backend=backend, precision=precision, devices=devices, compile=compile, resume=resume)
    model, out = _train("par-supernet", data, recipe, out, parse_options(options, epochs=epochs, seed=seed), how)
    show_architecture(model)
    console.print(f"architecture.png, .gif and .json are there too; par-xl derive {out} makes the plain model")


@app.command(no_args_is_help=True)
def derive(
    run: Annotated[Path, typer.Argument(help="Folder of a finished par-xl search.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the plain model.", show_default="RUN/derived")] = None,
) -> None:
    """The plain model of a search, with its weights: for eval, generate, and train par --start."""
    from par_xl.models import ParSuperNet
    from par_xl.training import load_run, save_run

    model, vocabulary = load_run(run)
    if not isinstance(model, ParSuperNet):
        raise ValueError(f"{run} holds a {type(model).__name__}; only a search has an architecture to derive")
    out = out or run / "derived"
    derived = model.derived()
    save_run(derived, vocabulary, out)
    step = json.loads((run / "result.json").read_text())["result"]["step"]
    source = {"from": str(run), "step": step}
    write_record(out / "result.json", {"architecture": "par", "model": asdict(derived.config), **source})
    show_architecture(model)
    console.print(f"the plain model is in {out}; par-xl train par --start {out} trains it on,", highlight=False)
    console.print(f"par-xl train par --pattern={model.derive()} from new weights", highlight=False)


def _train(
    architecture: str, data: str, recipe: str, out: Path | None, options: dict[str, str], how: dict[str, Any]
) -> tuple[Any, Path]:
    """What ``train`` and ``search`` do."""
    quiet()
    from par_xl.data import load_corpus
    from par_xl.training import TRAININGS, override

    how["devices"] = read_devices(how["devices"])
    recipes, run = choose(TRAININGS, architecture, "architecture")
    kind = data.split(":")[0]
    name = recipe or (kind if kind in recipes else "wikitext-2")
    settings = choose(recipes, name, "recipe")
    corpus = load_corpus(data)
    if how.get("start") is not None:
        settings = _continued(how["start"], architecture, corpus, data, settings, options)
    else:
        settings = override(settings, options)
    out = out or Path("runs") / architecture
    console.print(f"{data}: {len(corpus.train):,} tokens, {len(corpus.vocabulary):,} words; recipe {name}")
    model, history = run(corpus, settings, out, **how)
    result = {
        **history.valid[-1],
        "tokens_per_second": history.tokens_per_second,
        "seconds": round(history.seconds, 1),
    }
    used = {key: value for key, value in asdict(settings).items() if key != "model"}
    described = {"architecture": architecture, "model": asdict(model.config), "recipe": used}
    if hasattr(model, "derive"):
        described |= {"pattern": model.derive(), "probabilities": model.probabilities().tolist()}
    write_record(out / "result.json", {**described, "result": result, "validations": history.valid})
    show(result)
    console.print(f"weights, losses.png, result.json and TensorBoard's events are in {out}", highlight=False)
    return model, out


def _continued(run: Path, architecture: str, corpus: Any, data: str, settings: Any, options: dict[str, str]) -> Any:
    """``settings`` with the model of ``run``, of which ``options`` may change what its weights do not depend on."""
    from par_xl.training import load_run, override
    from par_xl.training.saved import ARCHITECTURES

    begun, vocabulary = load_run(run)
    check_vocabulary(vocabulary, corpus, data, run)
    model_class: Any = ARCHITECTURES[architecture][0]
    if type(begun) is not model_class:
        raise ValueError(f"--start: {run} holds a {type(begun).__name__}, which {architecture} is not")
    begun_with = {key: value for key, value in asdict(begun.config).items() if key != "vocab_size"}
    settings = override(replace(settings, model=begun_with), options)
    check_weights(begun, settings.config_class(vocab_size=len(corpus.vocabulary), **settings.model), run)
    return settings


@app.command(name="eval", no_args_is_help=True)
def evaluate(
    run: Run,
    data: Data,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    batch_size: Annotated[int, typer.Option(help="Streams that are read side by side.")] = 10,
    bptt: Annotated[int, typer.Option(help="Length of a window.")] = 128,
    lengths: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Transformer-XL's mem_len, clamp_len, ext_len or same_length."
        ),
    ] = None,
    backend: Backend = "auto",
) -> None:
    """The loss of a trained model on a split, with another memory length if wanted; writes eval-SPLIT.json."""
    import torch

    from par_xl.data import load_corpus
    from par_xl.training import evaluate, load_run, read_option

    model, vocabulary = load_run(run)
    corpus = load_corpus(data)
    check_vocabulary(vocabulary, corpus, data, run)
    chosen = {key: read_option(key, value, model.config) for key, value in parse_options(lengths).items()}
    if chosen and not hasattr(model, "reset_lengths"):
        raise ValueError(f"--set: a {type(model).__name__} has no lengths")
    if chosen:
        model.reset_lengths(**chosen)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with par_xl.use_backend(backend):
        result = evaluate(model, corpus, split, batch_size, bptt)
    write_record(run / f"eval-{split}.json", {"model": asdict(model.config), "result": result})
    show(result)


@app.command(no_args_is_help=True)
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="The text to begin with.")],
    tokens: Annotated[int, typer.Option(help="How many tokens to add.")] = 50,
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many most probable tokens; 0: from all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    backend: Backend = "auto",
) -> None:
    """Continue a text with a trained model."""
    import torch

    from par_xl.training import load_run

    model, vocabulary = load_run(run)
    ids = vocabulary.encode_text(prompt).long()[None]
    draws = torch.Generator().manual_seed(seed)
    with par_xl.use_backend(backend):
        text = model.generate(ids, tokens, temperature=temperature, top_k=top_k, generator=draws)
    console.print(vocabulary.decode_text(text[0]), markup=False, highlight=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures, tables and runs.")] = Path("demo-output"),
    epochs: Annotated[int, typer.Option(help="Length of each of the two searches.")] = 8,
) -> None:
    """The whole library in a few minutes: backends, accuracy of the ops, and one search on two backends."""
    quiet()
    from par_xl.training.demo import check_ops, race

    info()
    console.print(check_ops())
    console.print(race(out, epochs))
    console.print(f"both loss curves in one picture: {out / 'losses.png'}", highlight=False)
    console.print(f"the search as a picture and a film: {out / 'auto' / 'architecture'}.png and .gif", highlight=False)


@app.command()
def bench(
    only: Annotated[str, typer.Option(help="Part of a benchmark file's name: ar_tar, rel_attention, ...")] = "",
    seconds: Annotated[float, typer.Option(help="Time for each candidate of each case.")] = 1.0,
) -> None:
    """Race the ops and models against their peers on this machine; rewrite the README's tables and plots."""
    folder = Path(par_xl.__file__).parent.parent / "benchmarks"
    files = sorted(folder.glob(f"bench_*{only}*.py"))
    if not files:
        raise FileNotFoundError(f"no benchmark {only!r} in {folder}; they are in the repository, not in the package")
    options = ["-q", "-s", "-p", "no:cacheprovider", "--seconds", str(seconds), "--results", str(folder / "results")]
    status = subprocess.call([sys.executable, "-m", "pytest", *map(str, files), *options])
    subprocess.check_call([sys.executable, str(folder / "report.py")])
    raise typer.Exit(status)


if __name__ == "__main__":
    main()

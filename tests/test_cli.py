"""The ``par-xl`` command: what a user types, sees and finds on disk."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from training_helpers import IGNORED

import par_xl
from par_xl.cli import main
from par_xl.models import AWDLSTM, AWDLSTMConfig
from par_xl.testing import recorded_ops

SMALL = ("--set", "d_model=8", "--set", "d_hidden=8", "--set", "batch_size=256", "--epochs", "2")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(*IGNORED)]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``par-xl ARGUMENTS`` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["par-xl", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return call


def train(out, *more):
    return "train", "awd-lstm", "--data", "human-numbers", "--out", out, *SMALL, *more


def test_info_says_what_is_there_and_why_not(command):
    code, shown, _ = command("info")
    assert code == 0
    words = " ".join(shown.replace("│", " ").split())
    for expected in (par_xl.__version__, torch.__version__, *par_xl.build_info().values()):
        assert str(expected) in words
    for backend, states in par_xl.backends().items():
        assert backend in words
        assert all(reason.split("(")[0].strip() in words for reason in states.values())


def test_info_needs_neither_lightning_nor_triton():
    block = "import sys; sys.modules.update(dict.fromkeys(['lightning', 'triton', 'matplotlib', 'tensorboard']));"
    command = [sys.executable, "-c", block + "from par_xl.cli import main; main()"]
    assert subprocess.run([*command, "info"], capture_output=True).returncode == 0
    done = subprocess.run([*command, "train", "awd-lstm", "--data", "human-numbers"], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'par_xl[train]'" in done.stderr and "Traceback" not in done.stderr


def test_importing_models_and_data_is_light_too():
    script = "import sys, par_xl.models, par_xl.data; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"triton", "lightning", "typer", "matplotlib", "tensorboard", "par_xl.kernels"} & set(loaded)


def test_train_leaves_a_model_and_a_record(command, tmp_path):
    code, shown, errors = command(*train(tmp_path))
    assert code == 0, errors
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["recipe"]["epochs"] == 2 and record["model"]["d_model"] == 8 and record["versions"]["torch"]
    assert record["command"].startswith("par-xl train awd-lstm --data human-numbers")
    assert 0 < record["result"]["val_accuracy"] < 1 and record["result"]["tokens_per_second"] > 0
    model = AWDLSTM(AWDLSTMConfig(**record["model"]))
    safetensors.torch.load_model(model, tmp_path / "last.safetensors")
    assert (tmp_path / "losses.png").exists() and (tmp_path / "best.ckpt").exists()
    assert "val_accuracy" in shown and "litlogger" not in shown + errors


def test_every_option_of_train(command, tmp_path):
    more = ["--backend", "native", "--precision", "bf16-mixed", "--compile", "--devices", "auto", "--seed", "3"]
    code, _, errors = command(*train(tmp_path, *more, "--recipe", "fastbook", "--epochs", "1"))
    assert code == 0, errors
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["recipe"]["seed"] == 3 and record["model"]["dropout_hidden"] == 0.0


def test_ctrl_c_saves_and_resume_goes_on(command, tmp_path):
    """SIGINT from outside while steps are being made; the resumed run ends with the numbers of a whole one."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command(*train(whole))[0] == 0

    wait = (
        "import time, pathlib, par_xl.training.rnn_trainer as r\n"
        "def wait(self, trainer, *_):\n"
        "    if trainer.global_step == 5:\n"
        f"        pathlib.Path({str(tmp_path / 'step5')!r}).touch()\n"
        "        while not any(getattr(c, 'interrupted', False) for c in trainer.callbacks): time.sleep(0.02)\n"
        "r.RNNTrainer.on_train_batch_end = wait\n"
        "from par_xl.cli import main\n"
        "main()\n"
    )
    arguments = [str(argument) for argument in train(stopped)]
    process = subprocess.Popen(
        [sys.executable, "-c", wait, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (tmp_path / "step5").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "interrupted.ckpt" in "".join(shown.split()), shown

    assert command(*train(stopped, "--resume", stopped / "interrupted.ckpt"))[0] == 0
    results = [json.loads((folder / "result.json").read_text())["result"] for folder in (whole, stopped)]
    for name in ("val_loss", "val_accuracy", "step"):
        assert results[0][name] == results[1][name]


def test_two_ranks_on_a_folder_of_text(tmp_path):
    """DDP on two processes: own streams, memories and random states, one checkpoint; and it resumes."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for split, lines in (("train", 200), ("valid", 40)):
        (data / f"{split}.txt").write_text("the cat sat on the mat\nand the dog ran\n" * lines)
    arguments = ["train", "awd-lstm", "--data", str(data), "--out", str(out), "--devices", "2"]
    arguments += ["--recipe", "wikitext-2", "--epochs", "1", "--backend", "eager"]
    for option in ("batch_size=4", "bptt=16", "d_model=8", "d_hidden=8", "nonmono=1", "lr=1"):
        arguments += ["--set", option]
    environment = {"PAR_XL_CACHE": str(tmp_path / "cache")}
    script = [sys.executable, "-m", "par_xl.cli", *arguments]
    done = subprocess.run(
        script, env={**os.environ, **environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checkpoint = torch.load(out / "last.ckpt", weights_only=True)
    first, second = (memory[0][0] for memory in checkpoint["memory"])
    assert first.shape == (1, 4, 8) and not torch.equal(first, second)
    assert len(checkpoint["random_state"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere"], "/nowhere is not a folder"),
        (["--data", "human-numbers", "--recipe", "x"], "no recipe 'x'"),
        (["--data", "human-numbers", "--set", "depth=3"], "no option 'depth'"),
        (["--data", "human-numbers", "--set", "depth"], "NAME=VALUE"),
        (["--data", "human-numbers", "--backend", "cudnn"], "'cudnn'"),
        (["--data", "human-numbers", "--devices", "0"], "--devices must be auto or a positive number, not '0'"),
        (["--data", "human-numbers", "--devices", "two"], "--devices must be auto or a positive number, not 'two'"),
    ],
)
def test_mistakes_are_one_line(command, arguments, message, tmp_path):
    code, _, errors = command("train", "awd-lstm", *arguments, "--out", tmp_path)
    assert code == 2 and message in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("architecture", ["compressive", "par", "transformer-xl", None])
def test_bytes_have_recipes(command, tmp_path, architecture):
    """By default; their models have no cutoffs."""
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text("the cat sat on the mat\n" * 30)
    sizes = ("n_layer=1", "n_head=1", "d_model=8", "d_head=8", "d_inner=8", "max_steps=1", "warmup=0")
    start = ("train", architecture) if architecture else ("search", "--set", "freeze=0")
    small = [word for option in sizes for word in ("--set", option)]
    code, shown, errors = command(*start, "--data", f"bytes:{tmp_path}", "--out", tmp_path / "run", *small)
    assert code == 0 and "recipe bytes" in shown, errors


def test_demo(command, tmp_path):
    code, shown, errors = command("demo", "--out", tmp_path, "--epochs", "1")
    assert code == 0, errors
    words = " ".join(shown.replace("│", " ").split())
    assert "ar_tar eager" in words and "ar_tar native" in words and "validation accuracy" in words
    assert re.search(r"training loss \S+ \S+ 1\.000 validation loss \S+ \S+ 1\.000", words)  # eager's and auto's curve
    assert (tmp_path / "losses.png").exists()


def test_demo_checks_every_op():
    from par_xl.ops import registry
    from par_xl.training.demo import OPS

    assert {re.sub("_(forward|backward|received)$", "", name) for name in registry.OPS} == set(OPS)


def test_transformer_xl_is_trained_evaluated_and_continues_a_text(command, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for split, lines in (("train", 60), ("valid", 15), ("test", 15)):
        (data / f"{split}.txt").write_text("the cat sat on the mat\nand the dog ran\n" * lines)
    small = ("n_layer=1", "d_model=16", "d_head=8", "n_head=2", "d_inner=16", "cutoffs=3,6", "mem_len=8", "bptt=8")
    options = [word for option in (*small, "lr=1e-2", "dropout=0.0") for word in ("--set", option)]
    train = ("train", "transformer-xl", "--data", data, "--out", run, "--epochs", 8, *options)
    code, _, errors = command(*train, "--recipe", "wikitext-2")
    assert code == 0, errors
    record = json.loads((run / "result.json").read_text())
    assert record["architecture"] == "transformer-xl" and record["model"]["cutoffs"] == [3, 6]

    code, shown, errors = command("eval", run, "--data", data, "--batch-size", 2, "--set", "mem_len=32")
    assert code == 0 and "perplexity" in shown, errors
    result = json.loads((run / "eval-test.json").read_text())["result"]
    assert result["tokens"] == 178 and 1 < result["perplexity"] < 3
    code, shown, errors = command("generate", run, "--prompt", "the dog", "--tokens", 4, "--temperature", 0)
    assert code == 0 and shown.split() == ["the", "dog", "ran", "<eos>", "the", "cat"], shown + errors
    for backend, used in (("eager", False), ("native", True)):
        with recorded_ops() as ops:
            code, _, errors = command("generate", run, "--prompt", "the dog", "--tokens", 1, "--backend", backend)
        assert code == 0 and ("rel_attention_forward" in ops) is used, errors

    for arguments, complaint in [
        (("eval", run, "--data", "human-numbers"), "vocabulary"),
        (("eval", run, "--data", data, "--split", "dev"), "no dev split"),
        (("eval", run, "--data", data, "--set", "n_layer=3"), "n_layer"),
        (("eval", data, "--data", data), "result.json"),
        (("generate", run, "--prompt", "the", "--backend", "cudnn"), "'cudnn'"),
        (("train", "gpt", "--data", data), "there is no architecture 'gpt'"),
    ]:
        code, _, errors = command(*arguments)
        assert code == 2 and complaint in " ".join(errors.split()), errors


def test_search_derive_train_evaluate_and_generate(command, tmp_path):
    """On SentencePiece's pieces: a search, the plain model of it, a training from its weights and one from new ones."""
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for split, lines in (("train", 90), ("valid", 15), ("test", 15)):
        (data / f"{split}.txt").write_text("the cat sat on the mat\nand the dog ran\n" * lines)
    pieces = f"pieces-275:{data}"
    sizes = ("n_layer=3", "n_head=2", "d_model=16", "d_inner=16", "mem_len=8", "bptt=8", "batch_size=4", "cutoffs=9,20")
    steps = ("eval_every=10", "max_steps=25", "warmup=0", "lr=1e-2")
    small = [word for option in (*sizes, *steps) for word in ("--set", option)]
    code, shown, errors = command("search", "--data", pieces, "--out", run, *small, "--set", "freeze=3")
    assert code == 0, errors
    record = json.loads((run / "result.json").read_text())
    assert [v["step"] for v in record["validations"]] == [10, 20, 25]
    assert record["pattern"] in shown and "identity" in shown
    for name in ("architecture.png", "architecture.gif", "architecture.json", "vocabulary.model"):
        assert (run / name).stat().st_size > 0

    weights = safetensors.torch.load_file(run / "last.safetensors")
    weights["choice.pi"] = -weights["choice.pi"]  # the best validation was of another architecture
    safetensors.torch.save_file(weights, run / "best.safetensors")
    code, shown, errors = command("derive", run)
    assert code == 0 and record["pattern"] in shown, errors
    derived = json.loads((run / "derived" / "result.json").read_text())
    assert (derived["model"]["pattern"], derived["step"]) == (record["pattern"], 25)
    evaluated = []
    for folder in (run, run / "derived"):
        code, shown, errors = command("eval", folder, "--data", pieces, "--batch-size", 2, "--bptt", 8)
        assert code == 0 and "word_perplexity" in shown, errors
        evaluated.append(json.loads((folder / "eval-test.json").read_text())["result"])
    assert evaluated[0]["loss"] == pytest.approx(evaluated[1]["loss"], rel=1e-5)
    assert evaluated[0]["word_perplexity"] > evaluated[0]["perplexity"]
    code, shown, errors = command("generate", run / "derived", "--prompt", "the cat", "--tokens", 8)
    assert code == 0 and shown.startswith("the cat") and "▁" not in shown, errors

    train, begun = ("train", "par", "--data", pieces), ("--start", run / "derived")
    more = ("--out", tmp_path / "more", *small[-8:], "--set", "bptt=8", "--set", "batch_size=4")
    code, _, errors = command(*train, *begun, *more)
    assert code == 0, errors
    trained_on = json.loads((tmp_path / "more" / "result.json").read_text())
    assert trained_on["model"]["pattern"] == record["pattern"]
    assert trained_on["validations"][0]["val_loss"] < record["validations"][0]["val_loss"]
    for pattern, expected in (("-sf", "-sf"), ("par", "sff")):
        code, _, errors = command(*train, "--pattern", pattern, "--out", tmp_path / pattern, *small)
        assert code == 0, errors
        assert json.loads((tmp_path / pattern / "result.json").read_text())["model"]["pattern"] == expected

    for arguments, complaint in [
        (("derive", tmp_path / "par"), "only a search has"),
        ((*train, "--pattern", "sxf"), "pattern must consist of"),
        ((*train, "--start", run), "holds a ParSuperNet, which par is not"),
        ((*train, *begun, "--pattern", "ssss"), f"n_layer = 3, not 4, pattern = '{record['pattern']}', not 'ssss'"),
        ((*train, *begun, "--set", "d_model=32"), "derived are for d_model = 16, not 32"),
        ((*train, "--pattern", "sf", "--set", "n_layer=5"), "pattern must have n_layer = 5 blocks, not 2"),
        (("generate", run, "--prompt", "the cat", "--tokens", -3), "n_tokens must not be negative, not -3"),
        (("train", "transformer-xl", "--data", pieces, "--start", run), "holds a ParSuperNet"),
        (("train", "awd-lstm", "--data", pieces, "--pattern", "sf"), "--pattern is for par"),
    ]:
        code, _, errors = command(*arguments)
        assert code == 2 and complaint in " ".join(errors.split()), errors

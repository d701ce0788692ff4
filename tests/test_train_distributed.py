"""Two real processes on the CPU, started by `accelerate launch` with the files that come with the zoo."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from training import assert_same_curve, assert_same_weights, checkpoints, curve, read_log, write_recipe
from transformers import AutoModelForCausalLM

from zoo import processes
from zoo.cli import main
from zoo.layout import shelf

LAUNCH = shelf("recipes") / "launch"
ZERO3 = pytest.param("zero3.yaml", marks=pytest.mark.slow)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(
    file: str,
    recipe: Path,
    run: Path,
    *words: str,
    processes: int = 2,
    program: tuple[str, ...] = ("-m", "zoo.train"),
    launcher: tuple[str, ...] = ("accelerate.commands.launch",),
) -> subprocess.Popen:
    """Start the processes of a run, which note their output in `<run>.txt`."""
    options = ["--config_file", str(LAUNCH / file), "--num_processes", str(processes)]
    words = [*program, str(recipe), f"train.output={run}", *words]
    with run.with_suffix(".txt").open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, *options, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )


def finish(started: subprocess.Popen, run: Path) -> str:
    status, text = started.wait(timeout=300), run.with_suffix(".txt").read_text()
    assert status == 0, text
    return text


def workers(run: Path) -> list[int]:
    """The processes of a run that train, without the launcher."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended since
            continue
        if f"train.output={run}".encode() in words and b"accelerate.commands.launch" not in words:
            found.append(int(process.name))
    return found


def wait_for_step(run: Path, step: int, started: subprocess.Popen) -> None:
    log = run / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < step:
        assert started.poll() is None, run.with_suffix(".txt").read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("files", ["cpu.yaml fsdp2.yaml", ZERO3])
def test_one_process_and_two_give_the_same_model(tmp_path, files):
    """Data-parallel and sharded: losses, norms and the Hugging Face folder, with the head tied to the embedding."""
    recipe, files = write_recipe(tmp_path, "mamba-tiny"), files.split()
    words = ["train.tokens=640", "train.save_every=3", "data.micro_batch_size=1"]
    words += ["train.learning_rate=3e-4", "train.epsilon=1e-2"]  # updates not much coarser than their sums
    assert main(["train", str(recipe), f"train.output={tmp_path / 'one'}", *words]) == 0
    for file in files:
        run = tmp_path / file.removesuffix(".yaml")
        finish(launch(file, recipe, run, *words), run)
        facts = json.loads((run / "latest" / "training.json").read_text())
        assert (facts["world_size"], facts["tokens"]) == (2, 640)
        assert_same_curve(tmp_path / "one", run, 1e-5)
        assert_same_weights(tmp_path / "one", run, 1e-5)
        mine, theirs = (read_log(path)[-1]["validation"]["code"] for path in (tmp_path / "one", run))
        assert mine["tokens"] == theirs["tokens"]
        assert abs(mine["loss"] - theirs["loss"]) <= 1e-5 * mine["loss"]
        assert AutoModelForCausalLM.from_pretrained(run / "latest").config.tie_word_embeddings

    went_on = finish(launch(files[0], recipe, tmp_path / "one", *words, "train.tokens=1024"), tmp_path / "one")
    assert "it was written by 1 processes and these are 2" in went_on
    assert [row["step"] for row in read_log(tmp_path / "one")] == list(range(1, 9))
    run = tmp_path / files[0].removesuffix(".yaml")
    assert main(["train", str(recipe), f"train.output={run}", *words, "train.tokens=1024"]) == 0
    assert_same_curve(tmp_path / "one", run, 1e-4)


def test_two_processes_carry_states_as_one(tmp_path):
    recipe, words = write_recipe(tmp_path), ["train.carry_state=true", "train.tokens=640", "data.micro_batch_size=1"]
    words += ["train.learning_rate=3e-4", "train.epsilon=1e-2"]
    assert main(["train", str(recipe), f"train.output={tmp_path / 'one'}", *words]) == 0
    finish(launch("cpu.yaml", recipe, tmp_path / "two", *words), tmp_path / "two")
    assert_same_curve(tmp_path / "one", tmp_path / "two", 1e-5)
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-5)


@pytest.mark.parametrize(
    ("preset", "file", "segment"),
    [
        ("armt-tiny", "cpu.yaml", 32),
        pytest.param("lm2-tiny", "cpu.yaml", 32, marks=pytest.mark.slow),
        pytest.param("armt-tiny", "fsdp2.yaml", 7, marks=pytest.mark.slow),
        pytest.param("lm2-tiny", "fsdp2.yaml", 7, marks=pytest.mark.slow),
    ],
)
def test_processes_fill_other_segments(tmp_path, preset, file, segment):
    """Rows of 32 tokens, and documents in each that end where they like: some have no whole segment of 32."""
    recipe = write_recipe(tmp_path, preset)
    words = [f"model.overrides.segment_length={segment}", "train.tokens=640", "data.micro_batch_size=1"]
    words += ["train.gradient_checkpointing=true", "train.learning_rate=3e-4", "train.epsilon=1e-2"]
    assert main(["train", str(recipe), f"train.output={tmp_path / 'one'}", *words]) == 0
    finish(launch(file, recipe, tmp_path / "two", *words), tmp_path / "two")
    assert_same_curve(tmp_path / "one", tmp_path / "two", 1e-5)
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-5)


@pytest.mark.slow
def test_two_processes_use_muon_as_one(tmp_path):
    """Losses and norms. Weights differ: of what has hardly a gradient, rounding decides where Muon's step goes."""
    recipe, words = write_recipe(tmp_path), ["train.optimizer=muon", "train.tokens=640", "train.learning_rate=3e-4"]
    assert main(["train", str(recipe), f"train.output={tmp_path / 'one'}", *words]) == 0
    finish(launch("cpu.yaml", recipe, tmp_path / "two", *words), tmp_path / "two")
    assert_same_curve(tmp_path / "one", tmp_path / "two", 1e-3)


@pytest.mark.parametrize("file", ["cpu.yaml", pytest.param("fsdp2.yaml", marks=pytest.mark.slow), ZERO3])
def test_killed_twice_a_run_goes_on_to_the_bit(tmp_path, file):
    """With dropout, accumulation and a source that streams; all processes are killed at once."""
    recipe = write_recipe(tmp_path, "transformer-tiny")
    words = [
        "model.overrides.attention_dropout=0.1",
        "data.sources.code.streaming=true",
        "data.micro_batch_size=1",
        "train.save_every=5",
    ]
    start = partial(launch, file, recipe)
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(start(whole, *words), whole)
    for step in (7, 13):
        started = start(run, *words)
        wait_for_step(run, step, started)
        pids = workers(run)
        assert len(pids) == 2
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        started.kill()
        started.wait()
        assert 0 < len(curve(run)) < 20
        assert checkpoints(run)
    text = finish(start(run, *words), run)
    assert text.count("going on from step-") == 2
    assert curve(run) == curve(whole)
    assert (run / "latest/model.safetensors").read_bytes() == (whole / "latest/model.safetensors").read_bytes()


@pytest.mark.slow
def test_zero3_skips_the_steps_that_one_process_skips(tmp_path):
    """A loss that is not finite, and a finite one whose gradients are not."""
    recipe, script = write_recipe(tmp_path), tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from zoo.cli import main\n"
        "from zoo.train.loop import Run\n"
        "forward = Run._forward\n"
        "def spoilt(self, *args):\n"
        "    outputs = forward(self, *args)\n"
        "    if self.progress.step == 2:\n"
        "        outputs.loss = outputs.loss * float('nan')\n"
        "    elif self.progress.step == 3:\n"
        "        outputs.loss = outputs.loss + (0 * outputs.loss).sqrt()\n"
        "    return outputs\n"
        "Run._forward = spoilt\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    for name, number in (("gpu.yaml", 1), ("zero3.yaml", 2)):
        run = tmp_path / str(number)
        words = ["train.tokens=768", "train.learning_rate=3e-4", "train.epsilon=1e-2"]
        finish(launch(name, recipe, run, *words, processes=number, program=(str(script),)), run)
        assert [row.get("skipped", 0) for row in read_log(run)] == [0, 0, 1, 2, 2, 2]
    assert_same_weights(tmp_path / "1", tmp_path / "2", 1e-5)


def test_how_a_run_is_started_changes_nothing(tmp_path):
    """One process, plain and through the launcher: equal to the last bit."""
    recipe = write_recipe(tmp_path)
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert main(["train", str(recipe), f"train.output={plain}", "train.tokens=640"]) == 0
    finish(launch("gpu.yaml", recipe, run, "train.tokens=640", processes=1), run)
    assert curve(run) == curve(plain)
    assert (run / "latest/model.safetensors").read_bytes() == (plain / "latest/model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_launcher_asked_to_stop_ends_well(tmp_path, number):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    words = ["train.tokens=1e6", "train.save_every=10000"]
    started = launch("cpu.yaml", recipe, run, *words, launcher=("zoo.cli", "launch"))
    wait_for_step(run, 3, started)
    started.send_signal(number)
    assert "stopped after step" in finish(started, run)
    assert checkpoints(run) == [f"step-{len(curve(run)):08d}"]


def test_of_a_process_that_fails_its_error_is_read(tmp_path, capfd):
    script = tmp_path / "fails.py"
    script.write_text("import os, sys\nsys.exit('only here' if os.environ['RANK'] == '1' else 0)\n")
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["launch", "--config_file", str(LAUNCH / "cpu.yaml"), str(script)])
    error = capfd.readouterr().err
    assert "only here\n" in error
    assert "failed (exitcode: 1) local_rank: 1" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("file", ["cpu.yaml", ZERO3])
def test_one_of_two_asked_to_stop_stops_both(tmp_path, file):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    started = launch(file, recipe, run, "train.tokens=1e6", "train.save_every=10000")
    wait_for_step(run, 3, started)
    os.kill(workers(run)[-1], signal.SIGTERM)
    assert "stopped after step" in finish(started, run)
    assert checkpoints(run) == [f"step-{len(curve(run)):08d}"]


def test_processes_that_are_not_connected_do_not_train(tmp_path, monkeypatch, capsys):
    """Each would take itself for the only one, and all would write the same folder."""
    monkeypatch.setattr(processes, "PartialState", lambda cpu: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(write_recipe(tmp_path))]) == 1
    assert capsys.readouterr().err == "zoo: 2 processes were started, 1 are connected\n"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MIXED_PRECISION", "bf16", "mixed_precision: bf16; say train.precision in the recipe instead"),
        ("GRADIENT_CLIPPING", "2.0", "gradient_clipping: 2.0; say train.max_grad_norm in the recipe instead"),
        ("DEEPSPEED_ZERO_STAGE", "2", "zero_stage: 2; say 3 instead"),
    ],
)
def test_what_the_recipe_decides_is_not_said_by_the_launch_file(
    tmp_path, monkeypatch, capsys, variable, value, message
):
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    assert main(["train", str(write_recipe(tmp_path))]) == 1
    assert capsys.readouterr().err == f"zoo: the launch file says {message}\n"


@pytest.mark.parametrize(
    ("word", "message"), [("optimizer=muon", "Muon needs matrices"), ("compile=true", "has hooks")]
)
def test_what_does_not_go_with_zero3_is_said_at_once(tmp_path, monkeypatch, capsys, word, message):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert main(["train", str(write_recipe(tmp_path)), f"train.{word}"]) == 1
    assert message in capsys.readouterr().err

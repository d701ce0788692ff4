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
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(file: str, recipe: Path, run: Path, *words: str, processes: int = 2) -> subprocess.Popen:
    """Start the processes of a run, which note their output in `<run>.txt`."""
    starter = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / file)]
    words = ["-m", "zoo.train", str(recipe), f"train.output={run}", *words]
    with run.with_suffix(".txt").open("a") as file:
        return subprocess.Popen(
            [*starter, "--num_processes", str(processes), *words],
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


def test_one_process_and_two_give_the_same_model(tmp_path):
    """Data-parallel and sharded: losses, norms and the Hugging Face folder, with the head tied to the embedding."""
    recipe = write_recipe(tmp_path, "mamba-tiny")
    words = ["train.tokens=640", "train.save_every=3", "data.micro_batch_size=1"]
    words += ["train.learning_rate=3e-4", "train.epsilon=1e-2"]  # updates not much coarser than their sums
    assert main(["train", str(recipe), f"train.output={tmp_path / 'one'}", *words]) == 0
    for name, file in (("ddp", "cpu.yaml"), ("fsdp", "fsdp2.yaml")):
        run = tmp_path / name
        finish(launch(file, recipe, run, *words), run)
        facts = json.loads((run / "latest" / "training.json").read_text())
        assert (facts["world_size"], facts["tokens"]) == (2, 640)
        assert_same_curve(tmp_path / "one", run, 1e-5)
        assert_same_weights(tmp_path / "one", run, 1e-5)
        mine, theirs = (read_log(path)[-1]["validation"]["code"] for path in (tmp_path / "one", run))
        assert mine["tokens"] == theirs["tokens"]
        assert abs(mine["loss"] - theirs["loss"]) <= 1e-5 * mine["loss"]
        assert AutoModelForCausalLM.from_pretrained(run / "latest").config.tie_word_embeddings

    went_on = finish(launch("cpu.yaml", recipe, tmp_path / "one", *words, "train.tokens=1024"), tmp_path / "one")
    assert "it was written by 1 processes and these are 2" in went_on
    assert [row["step"] for row in read_log(tmp_path / "one")] == list(range(1, 9))
    run = tmp_path / "ddp"
    assert main(["train", str(recipe), f"train.output={run}", *words, "train.tokens=1024"]) == 0
    assert_same_curve(tmp_path / "one", run, 1e-4)


@pytest.mark.parametrize("file", ["cpu.yaml", pytest.param("fsdp2.yaml", marks=pytest.mark.slow)])
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


def test_how_a_run_is_started_changes_nothing(tmp_path):
    """One process, plain and through the launcher: equal to the last bit."""
    recipe = write_recipe(tmp_path)
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert main(["train", str(recipe), f"train.output={plain}", "train.tokens=640"]) == 0
    finish(launch("gpu.yaml", recipe, run, "train.tokens=640", processes=1), run)
    assert curve(run) == curve(plain)
    assert (run / "latest/model.safetensors").read_bytes() == (plain / "latest/model.safetensors").read_bytes()


def test_one_of_two_asked_to_stop_stops_both(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    started = launch("cpu.yaml", recipe, run, "train.tokens=1e6", "train.save_every=10000")
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


def test_precision_is_the_recipes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(["train", str(write_recipe(tmp_path))]) == 1
    assert "say train.precision in the recipe instead" in capsys.readouterr().err

"""The training run from end to end in one process, and what happens when it is interrupted or badly fed."""

import json
import math
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from training import assert_same_curve, assert_same_weights, checkpoints, curve, read_log, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from zoo.cli import main
from zoo.tasks import load_task
from zoo.train import batches, checkpoint, data, distributed, loop, sources, store
from zoo.train.config import TrainSection, load_config, to_yaml
from zoo.train.optimizer import learning_rate_schedule, make_optimizers
from zoo.train.report import RunLog
from zoo.train.store import TokenStore
from zoo.train.validation import Score


@pytest.fixture
def recipe(tmp_path) -> Path:
    return write_recipe(tmp_path)


@pytest.fixture
def train(recipe, tmp_path):
    """Runs the recipe with changes; `into` names another output."""

    def run(*words: str, into: str = "run", status: int = 0) -> Path:
        assert main(["train", str(recipe), f"train.output={tmp_path / into}", *words]) == status
        return tmp_path / into

    return run


def test_a_run_leaves_a_checkpoint_that_loads_anywhere(train, capsys):
    run = train("train.trackers=[tensorboard]", "train.sample_prompt=def", "train.keep=1")
    out = capsys.readouterr().out
    log = read_log(run)
    assert [row["step"] for row in log] == list(range(1, 21))
    assert all({"loss", "grad_norm", "lr", "tokens_per_second", "mfu"} <= set(row) for row in log)
    assert log[-1]["loss"] < log[0]["loss"]
    assert [row["step"] for row in log if "validation" in row] == [7, 14, 20]
    for name in ("loss", "learning_rate", "grad_norm"):
        assert (run / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    score = log[-1]["validation"]["code"]
    assert all(f"{score[figure]:.3f}" in out for figure in ("loss", "bits_per_byte", "accuracy"))
    assert list(run.glob("trackers/zoo/events.*"))

    facts = json.loads((run / "latest" / "training.json").read_text())
    assert (facts["step"], facts["tokens"], facts["validation"]["code"]) == (20, 2560, score)
    assert load_config(str(run / "latest" / "recipe.yaml")).train.save_every == 7
    code = (
        "import sys, zoo; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); tok = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(type(model).__name__, tok.decode(model.generate(**tok('def ', return_tensors='pt'), max_length=9)[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code, run / "latest"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("RetNetForCausalLM def ")


def test_the_validation_score_is_the_definition(train, tmp_path):
    """Every token of the held-out text predicted once, from what stands before it in its row."""
    run = train()
    folder = run / "latest"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()[:2]]
    ids = torch.tensor([i for text in texts for i in (tokenizer.eos_token_id, *tokenizer.encode(text))])
    ends = [0, 1 + len(tokenizer.encode(texts[0]))]
    nats, hits = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            x, y = ids[start : start + 32][: len(ids) - 1 - start], ids[start + 1 : start + 33]
            border = ends[1] - start
            parts = [x] if not 0 < border < len(x) else [x[:border], x[border:]]
            logits = torch.cat([model(part[None]).logits[0] for part in parts])
            nats += F.cross_entropy(logits, y, reduction="sum").item()
            hits += (logits.argmax(-1) == y).sum().item()
    score = read_log(run)[-1]["validation"]["code"]
    assert score["tokens"] == len(ids) - 1
    assert math.isclose(score["loss"], nats / score["tokens"], rel_tol=1e-5)
    assert math.isclose(
        score["bits_per_byte"], nats / math.log(2) / sum(len(text.encode()) for text in texts), rel_tol=1e-5
    )
    assert math.isclose(score["accuracy"], hits / score["tokens"], rel_tol=1e-6)


def test_auxiliary_losses_are_logged(recipe, tmp_path):
    """Without their coefficients, beside the loss, which they are part of."""
    assert main(["train", str(recipe), "model.preset=jamba-tiny", "train.tokens=256"]) == 0
    for row in read_log(tmp_path / "run"):
        assert set(row) >= {"load_balancing_loss", "router_z_loss"}


@pytest.mark.parametrize(
    "words", [(), ("model.preset=jamba-tiny", "model.overrides.router_aux_loss_coef=1.0")], ids=["plain", "experts"]
)
def test_any_split_of_a_batch_gives_the_same_update(train, words):
    """Token-normalised: rows that are padded count by their tokens. Here micro-batches; ranks are tested elsewhere."""
    # With a small rate and a large epsilon an update is not much coarser than the sums that it is made of.
    words = [*words, "train.tokens=512", "train.learning_rate=3e-4", "train.epsilon=1e-2", "train.z_loss=1e-4"]
    runs = [train(*words, f"data.micro_batch_size={rows}", into=f"run-{rows}") for rows in (4, 1, 3)]
    for other in runs[1:]:
        assert_same_curve(runs[0], other, 1e-5)
        assert_same_weights(runs[0], other, 1e-5)


def test_the_same_seed_gives_the_same_run(train):
    first, second = (train("train.tokens=640", into=name) for name in "ab")
    assert curve(first) == curve(second)
    assert curve(train("train.tokens=640", "train.seed=1", into="c")) != curve(first)


def test_a_run_goes_on_to_the_bit(train, recipe, tmp_path, monkeypatch):
    """Killed in a step, and while it writes a checkpoint; with dropout, accumulation and a source that streams.

    Shards and windows are so small that the source is still being read when the run is killed.
    """
    monkeypatch.setattr(store, "_SMALLEST_SHARD", 64)
    monkeypatch.setattr(store, "_LARGEST_SHARD", 64)
    monkeypatch.setattr(batches, "WINDOW", 4)
    monkeypatch.setattr(data, "WINDOW", 4)
    monkeypatch.setattr(sources, "_BATCH", 1)
    words = [
        "model.preset=transformer-tiny",
        "model.overrides.attention_dropout=0.1",
        "data.sources.code.streaming=true",
        "data.micro_batch_size=2",
        "train.optimizer=muon",
    ]
    whole = train(*words, f"data.cache={tmp_path / 'other'}", into="whole")
    for moment in ("_update", "save_checkpoint"):
        script = (
            "import os, sys\n"
            "from zoo.cli import main\n"
            "from zoo.train import batches, checkpoint, data, loop, sources, store\n"
            "store._SMALLEST_SHARD = store._LARGEST_SHARD = 64\n"
            "batches.WINDOW = data.WINDOW = 4\n"
            "sources._BATCH = 1\n"
            f"target = loop.Run if {moment == '_update'} else checkpoint.torch\n"
            f"name = {'_update' if moment == '_update' else 'save'!r}\n"
            "call, calls = getattr(target, name), []\n"
            "def killed(*args, **kwargs):\n"
            "    calls.append(1)\n"
            f"    if len(calls) == {9 if moment == '_update' else 3}:\n"
            "        os.kill(os.getpid(), 9)\n"
            "    return call(*args, **kwargs)\n"
            "setattr(target, name, killed)\n"
            "main(['train', *sys.argv[1:]])\n"
        )
        command = [sys.executable, "-c", script, str(recipe), f"train.output={tmp_path / 'run'}", *words]
        assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
        assert checkpoints(tmp_path / "run")
        (filled,) = (path for path in (tmp_path / "cache").glob("code-*") if "held-out" not in path.name)
        assert not TokenStore(filled, "uint16").is_complete
    assert int(checkpoints(tmp_path / "run")[-1].removeprefix("step-")) < len(curve(tmp_path / "run"))
    went_on = train(*words)
    assert curve(went_on) == curve(whole)
    assert _weights(went_on) == _weights(whole)


def _weights(run: Path) -> bytes:
    return (run / "latest" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_a_run_saves_and_ends_well(train, capsys, monkeypatch, request, number):
    before = signal.signal(number, signal.default_int_handler)  # under nohup SIGHUP would be ignored
    request.addfinalizer(lambda: signal.signal(number, before))
    step = loop.Run._step

    def asked(self):
        if self.progress.step == 8:
            os.kill(os.getpid(), number)
        return step(self)

    whole = train(into="whole")
    monkeypatch.setattr(loop.Run, "_step", asked)
    run = train()
    assert "stopped after step 9" in capsys.readouterr().out
    assert (run / "latest").resolve().name == "step-00000009"
    monkeypatch.setattr(loop.Run, "_step", step)
    assert curve(train()) == curve(whole)


@pytest.mark.parametrize("moment", ["_validate", "_save", "_describe_validation"])
def test_asked_to_stop_between_steps_a_run_takes_no_further_one(train, monkeypatch, moment):
    call, save, saved = getattr(loop.Run, moment), loop.save_checkpoint, []

    def asked(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return call(self, *args)

    monkeypatch.setattr(loop.Run, moment, asked)
    monkeypatch.setattr(loop, "save_checkpoint", lambda *args: saved.append(1) or save(*args))
    run = train("train.save_every=4")
    assert len(curve(run)) == 4
    assert checkpoints(run) == ["step-00000004"]
    assert len(saved) == 1


def test_a_step_without_finite_gradients_is_skipped_and_counted(train, monkeypatch, capsys):
    _nan_in_calls(monkeypatch, {3, 4})
    log = read_log(train())
    assert [row["grad_norm"] is None for row in log[:6]] == [False, False, True, True, False, False]
    assert [row.get("skipped", 0) for row in log[:6]] == [0, 0, 1, 2, 2, 2]
    assert json.loads((Path(train()) / "latest" / "training.json").read_text())["skipped_steps"] == 2


def test_too_many_skipped_steps_stop_the_run_and_name_the_last_checkpoint(train, monkeypatch, capsys):
    _nan_in_calls(monkeypatch, set(range(9, 100)))
    train("train.max_skipped=3", status=1)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "at step 11" in error
    assert "step-00000007" in error


def _nan_in_calls(monkeypatch, numbers):
    clip, calls = torch.nn.utils.clip_grad_norm_, iter(range(1, 1000))

    def clipped(*args, **kwargs):
        norm = clip(*args, **kwargs)
        return torch.full_like(norm, math.nan) if next(calls) in numbers else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)


def test_a_full_disk_leaves_the_checkpoint_before_whole(train, monkeypatch, capsys):
    save, calls = torch.save, []

    def full_disk(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:  # of the second checkpoint, after its model
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    run = train(status=1)
    assert "No space left on device" in capsys.readouterr().err
    assert checkpoints(run) == ["step-00000007"]
    AutoModelForCausalLM.from_pretrained(run / "latest")
    monkeypatch.setattr(checkpoint.torch, "save", save)
    train()
    assert not list(run.glob(".step*"))


def test_a_damaged_checkpoint_is_passed_over(train, capsys):
    run = train("train.keep=3")
    whole = curve(run)
    weights = run / "step-00000020" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert curve(train("train.keep=3")) == whole
    out = capsys.readouterr().out
    assert "step-00000020 is not whole" in out
    assert "going on from step-00000014" in out


def test_damage_to_any_file_is_named(train, monkeypatch):
    """In the first and the last bytes, with the size as it was, and in JSON that is none of ours."""
    monkeypatch.setattr(checkpoint, "_END", 64)
    run = train("train.tokens=256", "train.save_every=1")
    older, newest = (run / f"step-{step:08d}" for step in (1, 2))
    damages = [
        (path, damaged)
        for path, text in ((path, path.read_bytes()) for path in newest.rglob("*") if path.is_file())
        for damaged in (bytes(8) + text[8:], text[:-8] + bytes(8))
    ]
    for name in ("state.json", "digests.json"):
        damages += [(newest / "trainer" / name, text) for text in (b"null", b"[]", b"{}")]
    assert {"model.safetensors", "optimizer.pt", "random.pt", "config.json"} <= {path.name for path, _ in damages}
    for path, damaged in damages:
        said, text = [], path.read_bytes()
        path.write_bytes(damaged)
        assert checkpoint.find_checkpoint(run, said.append)[0] == older
        assert len(said) == 1
        assert str(path.relative_to(newest)) in said[0]
        path.write_bytes(text)
    folder, progress = checkpoint.find_checkpoint(run, pytest.fail)
    assert (folder, progress.step) == (newest, 2)


def test_damaged_checkpoints_never_push_out_a_whole_one(train):
    run = train("train.keep=3")
    for step in (14, 20):
        weights = run / f"step-{step:08d}" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    train("train.keep=1", "train.evaluate_every=100", "train.save_every=5", "train.tokens=1408")
    assert checkpoints(run)[-1] == "step-00000011"
    AutoModelForCausalLM.from_pretrained(run / "latest")


def test_only_damaged_checkpoints_do_not_start_anew(train, capsys):
    run = train("train.tokens=256")
    (run / "step-00000002" / "config.json").unlink()
    before = curve(run)
    train("train.tokens=512", status=1)
    assert "none of the 1 checkpoints" in capsys.readouterr().err
    assert curve(run) == before


def test_a_file_added_to_a_checkpoint_does_no_harm(train, capsys):
    (train("train.tokens=256") / "latest" / "notes.txt").write_text("mine")
    train("train.tokens=512")
    assert "going on from step-00000002" in capsys.readouterr().out


def test_a_tokenizer_as_encoders_have(train, tmp_path, tokenizer):
    """One that cuts texts, fills them up and tells segments apart: none of it gets in the way of a run or its model."""
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    for file, facts in {
        "tokenizer_config.json": {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
        "tokenizer.json": {
            "truncation": {"max_length": 8, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
            "padding": {
                "strategy": {"Fixed": 16},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<|endoftext|>",
            },
        },
    }.items():
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | facts))
    words = [f"data.tokenizer={folder}", "train.sample_prompt=def"]
    run = train(*words, "train.tokens=256")
    assert len(curve(train(*words, "train.tokens=512"))) == 4
    encoded = AutoTokenizer.from_pretrained(run / "latest")("def " * 20, return_tensors="pt")
    assert encoded["input_ids"].shape[1] > 16
    AutoModelForCausalLM.from_pretrained(run / "latest").generate(**encoded, max_new_tokens=1)


def test_a_log_that_was_cut_off_is_gone_on_with_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    log = RunLog(path, step=2)
    log.write(step=3, loss=1.0)
    log.close()
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3]
    for garbage in (b'{"step": 2, "lo', b"\0\xff", b"", b"[1]"):
        damaged = b'{"step": 1}\n' + garbage + b'\n{"step": 3}\n'
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"log\.jsonl, line 2: .* is no line of a log"):
            RunLog(path, step=3)
        assert path.read_bytes() == damaged


def test_choices_of_the_machine_are_kept_on_resume(train, monkeypatch):
    """They are not saved with a model."""
    train("model.overrides.kernels=reference", "train.tokens=256")
    kernels = []
    step = loop.Run._step
    monkeypatch.setattr(loop.Run, "_step", lambda self: kernels.append(self.raw_model.config.kernels) or step(self))
    train("model.overrides.kernels=reference", "train.tokens=384")
    assert kernels == ["reference"]


def test_rows_divide_among_processes(train, monkeypatch, capsys):
    monkeypatch.setattr(loop, "make_accelerator", lambda *args: SimpleNamespace(num_processes=3))
    train(status=1)
    assert "data.batch_size is 4, which does not divide among 3 processes" in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_named(train, capsys, monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    train("train.trackers=[wandb]", status=1)
    assert "wandb is not installed: pip install wandb" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["train.precision=bf16"], ["train.gradient_checkpointing=true"]], ids=str)
def test_options_that_do_not_change_what_is_computed(train, words):
    words = ["train.tokens=640", "train.learning_rate=1e-4", *words]
    plain, other = train(*words[:2], into="plain"), train(*words, into="other")
    assert_same_curve(plain, other, 0.05 if "bf16" in words[-1] else 1e-5)
    assert next(iter(AutoModelForCausalLM.from_pretrained(other / "latest").parameters())).dtype == torch.float32


def test_the_newest_checkpoints_and_the_best_are_kept(train, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr(loop, "validate", lambda *args: Score(next(losses), 0.0, 0.0, 1))
    run = train("train.save_every=4", "train.keep=2")
    assert checkpoints(run) == ["step-00000008", "step-00000016", "step-00000020"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.batch_size=8"], "is of another run: its data.batch_size is 4, the recipe says 8"),
        (["model.preset=mamba-tiny"], "its model.preset is 'retnet-tiny'"),
        (["train.seed=3"], "its train.seed is 0"),
        (["train.learning_rate=1e-9"], "its train.learning_rate is 0.003"),
        (["train.carry_state=true"], "its train.carry_state is False"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(train, capsys, words, message):
    train("train.tokens=256")
    train("train.tokens=256", *words, status=1)
    assert message in capsys.readouterr().err


def test_changed_data_is_noticed(train, tmp_path, capsys):
    train("train.tokens=256")
    texts = tmp_path / "texts.jsonl"
    texts.write_text(texts.read_text().replace("License", "Licence"))
    train("train.tokens=512", status=1)
    assert "the data changed since step-00000002" in capsys.readouterr().err


def test_an_output_in_use_is_refused(recipe, tmp_path, capsys):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        assert main(["train", str(recipe)]) == 1
    assert "is in use by another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.overrides.vocab_size=100"], "vocab_size is 100, the tokenizer has 300 entries"),
        (
            ["model.preset=transformer-tiny", "model.overrides.max_position_embeddings=16"],
            "sequence_length is 32, the model reads 16 tokens",
        ),
        (["data.tokenizer=no/such"], "cannot load 'no/such'"),
        (["train.schedule=cosin"], "did you mean cosine"),
        (["train.tokns=3"], "did you mean train.tokens"),
        (["data.sources.code.fils=[a]"], "did you mean data.sources.code.files"),
        (["data.sources.code.corpus=stdlib"], "must set one of corpus, dataset and task"),
        (["model.overrides.pad_token_id=3"], "it follows from the tokenizer"),
        (["train.schedule=wsd", "train.warmup_fraction=0.9"], "more than the whole run together"),
        (["train.carry_state=true", "data.isolate_documents=false"], "leave data.isolate_documents on"),
        (["data.micro_batch_size=9"], "data.micro_batch_size must be from 1 to 4, got 9"),
        (["train.tokens=many"], "train.tokens: Value 'many'"),
        (["train.seed=-1"], "train.seed must be from 0 to 4294967295, got -1"),
        ([f"train.seed={10**23}"], "train.seed must be from 0 to 4294967295"),
        (["data.sources.code.weight=inf"], "data.sources.code.weight must be from 1e-18 to 1e+18, got inf"),
        (["data.sources.code.weight=nan"], "data.sources.code.weight must be from 1e-18 to 1e+18, got nan"),
        (["data.tokenizer=words", "data.vocab_size=0"], "data.vocab_size must be from 3 to 1000000000, got 0"),
        (["data.tokenizer=words", "train.sample_prompt=' '"], "train.sample_prompt ' ' has no tokens"),
    ],
)
def test_a_run_that_cannot_start_is_one_line_and_leaves_nothing(train, tmp_path, capsys, words, message):
    train(*words, status=1)
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1]
    assert err[-1].startswith("zoo: ")
    assert not list(tmp_path.glob("run/step*"))


def test_other_files_in_the_output_stay(train, tmp_path):
    (tmp_path / "run" / "step-by-step").mkdir(parents=True)
    (tmp_path / "run" / "step-notes.txt").write_text("mine")
    run = train("train.tokens=256")
    assert {"step-by-step", "step-notes.txt"} <= {path.name for path in run.iterdir()}


def test_the_resolved_recipe_is_printed(recipe, capsys):
    assert main(["train", str(recipe), "train.seed=5", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert printed == to_yaml(load_config(str(recipe), ["train.seed=5"]))
    assert "seed: 5" in printed


def test_a_dry_run_says_what_it_will_take(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--dry-run", "--device", "H100", "--devices", "4"]) == 0
    out = capsys.readouterr().out
    model = zoo.create_model("retnet-tiny", vocab_size=300)
    assert f"{model.num_parameters():,}" in out
    assert "2,560 in 20 steps of 128" in out
    assert f"{6 * 2560 * model.num_parameters():.2e}" in out  # head and embedding are one
    assert "4 x H100" in out
    assert not (tmp_path / "run").exists()
    assert main(["train", str(recipe), "--dry-run", "--device", "H10"]) == 1
    assert "did you mean H100" in capsys.readouterr().err


# -- optimizers and schedules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_schedules_warm_up_and_end_where_they_say(schedule):
    settings = TrainSection(schedule=schedule, warmup_fraction=0.1, decay_fraction=0.25, final_fraction=0.05)
    factor = learning_rate_schedule(settings, 1000)
    assert factor(0) == pytest.approx(0.01)
    assert factor(99) == 1
    assert factor(999) == pytest.approx(0.05)
    assert all(factor(step) >= factor(step + 1) for step in range(99, 999))
    middle = {"cosine": 0.05 + 0.95 / 2, "linear": 0.05 + 0.95 / 2, "wsd": 1.0}
    assert factor(549) == pytest.approx(middle[schedule])
    if schedule == "wsd":
        assert factor(749) == 1
        assert factor(874) == pytest.approx(0.05 + 0.95 / 2, rel=1e-2)


def test_groups_are_those_that_the_plugin_declares():
    """Muon takes matrices of linear layers; decays, biases and norms do not decay; every parameter is in one group."""
    model = zoo.create_model("rwkv7-tiny", vocab_size=300)
    settings = TrainSection(optimizer="muon", learning_rate=1e-3, weight_decay=0.1)
    muon, adamw = make_optimizers(model, settings)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [(names[id(p)], group) for o in (muon, adamw) for group in o.param_groups for p in group["params"]]
    assert sorted(name for name, _ in grouped) == sorted(names.values())
    assert all(p.dim() == 2 for group in muon.param_groups for p in group["params"])
    assert not any("embed" in names[id(p)] or "head" in names[id(p)] for g in muon.param_groups for p in g["params"])
    for name, group in grouped:
        if model.get_parameter(name).dim() < 2:
            assert group["weight_decay"] == 0, name
    doubled = {name for name, group in grouped if group["lr"] == 2e-3}
    assert doubled
    assert all("w0" in name or "decay" in name for name in doubled), doubled


def test_held_out_text_is_never_trained_on(train, tmp_path):
    train("train.tokens=256")
    stores = [path for path in (tmp_path / "cache").iterdir() if path.is_dir() and not path.name.startswith("token")]
    held_out = next(path for path in stores if "held-out" in path.name)
    trained = next(path for path in stores if "held-out" not in path.name)
    texts = (tmp_path / "texts.jsonl").read_text().splitlines()
    documents = {path: TokenStore(path, "uint16").documents for path in (held_out, trained)}
    assert documents == {held_out: 2, trained: len(texts) - 2}
    assert data.cache_folder(load_config(str(tmp_path / "recipe.yaml")).data) == tmp_path / "cache"


def test_carried_states_give_what_whole_documents_give(recipe, tmp_path):
    """Truncated backpropagation: with a rate of 0 the losses are those of each document read whole, across windows."""
    words = ["train.carry_state=true", "train.learning_rate=0", "train.tokens=1280", "data.batch_size=2"]
    run = tmp_path / "run"
    assert main(["train", str(recipe), *words, "train.max_grad_norm=1e9"]) == 0
    settings = load_config(str(recipe), words)
    found = data.prepare_data(settings, say=lambda line: None, show_progress=False)
    model = AutoModelForCausalLM.from_pretrained(run / "latest").double()
    stream = found.batches.streams[0].store
    rows = -(-stream.tokens // 32)
    total = torch.zeros(20, dtype=torch.float64)
    for lane in range(2):
        first = lane * rows // 2 * 32
        begin = stream.document_start(first)
        assert (begin < first) == (lane == 1)
        ids, targets, begins = (torch.from_numpy(x) for x in stream.read(first, first + 20 * 32))
        nats = []
        for x, y in zip(ids.split(_lengths(begins)), targets.split(_lengths(begins)), strict=True):
            with torch.no_grad():
                nats.append(F.cross_entropy(model(x[None]).logits[0], y, reduction="none"))
        total += torch.cat(nats).view(20, 32).mean(1)
    for (_, loss, *_), wanted in zip(curve(run), (total / 2).tolist(), strict=True):
        assert math.isclose(loss, wanted, rel_tol=1e-5)


def _lengths(begins: torch.Tensor) -> list[int]:
    """How long the pieces of a row are, cut where documents begin."""
    borders = [0, *(i for i in begins.nonzero().flatten().tolist() if i), len(begins)]
    return [b - a for a, b in pairwise(borders)]


def test_a_carried_state_is_part_of_a_checkpoint(train, tmp_path, monkeypatch):
    words = ["train.carry_state=true", "train.tokens=1280", "train.save_every=4", "data.micro_batch_size=2"]
    whole = train(*words, into="whole")
    step = loop.Run._step

    def asked(self):
        if self.progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(loop.Run, "_step", asked)
    assert len(curve(train(*words))) == 6
    monkeypatch.setattr(loop.Run, "_step", step)
    assert curve(train(*words)) == curve(whole)


def test_a_state_that_grows_is_not_carried(train, capsys):
    train("train.carry_state=true", "model.preset=transformer-tiny", status=1)
    assert "a layer of transformer-tiny keeps more with every token" in capsys.readouterr().err


def test_a_task_is_training_data(tmp_path, capsys):
    """Words as tokens, what is asked as targets; the words of answers that stand in no text have tokens too."""
    recipe = tmp_path / "task.yaml"
    recipe.write_text(
        "model: {preset: xlstm-1-1-tiny}\n"
        "data:\n"
        "  sources: {parity: {task: parity, held_out: 20}}\n"
        "  tokenizer: words\n"
        f"  cache: {tmp_path / 'cache'}\n"
        "  sequence_length: 64\n"
        "  batch_size: 8\n"
        f"train: {{output: {tmp_path / 'run'}, tokens: 10240, sample_prompt: null, trackers: []}}\n"
    )
    assert main(["train", str(recipe)]) == 0
    log = read_log(tmp_path / "run")
    assert log[0]["loss"] < 5
    assert log[-1]["validation"]["parity"]["accuracy"] > 0.4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "latest")
    store = next(path for path in (tmp_path / "cache").glob("parity-held-out*"))
    ids, targets, begins = TokenStore(store, "uint16", 64).read(0, 64)
    ends = [*(begins.nonzero()[0][1:]), 64]
    example = next(load_task("parity").generate("test", 0))
    assert tokenizer.convert_ids_to_tokens(ids[: ends[0]]) == example.words
    for found, wanted in zip(targets[: ends[0]], example.targets, strict=True):
        assert found == (-100 if wanted is None else tokenizer.convert_tokens_to_ids(wanted))
    assert main(["train", str(recipe), "data.sources.parity.options.lenght=3", f"train.output={tmp_path / 'b'}"]) == 1
    assert "unknown option of task 'parity'" in capsys.readouterr().err
    assert main(["train", str(recipe), "data.tokenizer=bpe", f"train.output={tmp_path / 'other'}"]) == 1
    assert "use data.tokenizer=words" in capsys.readouterr().err

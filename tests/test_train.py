"""The training run from end to end on a small corpus, and what happens when it is interrupted or badly fed."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from zoo.cli import main
from zoo.evaluate import score_text
from zoo.train import config as recipes
from zoo.train import data, loop

SMALL = [
    "data.vocab_size=300",
    "data.sequence_length=32",
    "data.batch_size=4",
    "train.tokens=2560",
    "train.save_every=7",
]


@pytest.fixture
def small_corpus(monkeypatch):
    documents = [Path(__file__).read_text(), Path(data.__file__).read_text()]
    corpus = data.Corpus(documents, {"code": Path(loop.__file__).read_text()[:3000]})
    monkeypatch.setitem(data.CORPORA, "stdlib", lambda: corpus)
    return corpus


def train(tmp_path, *words) -> int:
    return main(["train", "tiny/retnet", f"train.output={tmp_path / 'run'}", *SMALL, *words])


def test_a_run_leaves_a_checkpoint_that_loads_anywhere(tmp_path, small_corpus, capsys):
    assert train(tmp_path) == 0
    run, out = tmp_path / "run", capsys.readouterr().out
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 21))
    assert set(log[0]) == {"step", "loss", "grad_norm", "lr", "tokens_per_second"}
    assert log[-1]["loss"] < log[0]["loss"]
    assert (run / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    figures = json.loads((run / "held_out.json").read_text())
    for figure in ("loss", "bits_per_byte", "unigram_entropy", "unigram_bits_per_byte"):
        assert f"{figures['held_out']['code'][figure]:.3f}" in out
    assert OmegaConf.load(run / "config.yaml").train.save_every == 7
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["latest", "step-00000020"]

    code = (
        "import sys, zoo; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); tok = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "print(type(model).__name__, tok.decode(model.generate(**tok('def ', return_tensors='pt'), max_length=9)[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code, run / "latest"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("RetNetForCausalLM def ")


def test_auxiliary_losses_are_logged(tmp_path, small_corpus):
    """Without their coefficients, beside the loss, which they are part of."""
    run = tmp_path / "run"
    assert main(["train", "tiny/jamba", f"train.output={run}", *SMALL, "train.tokens=256"]) == 0
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [set(row) >= {"load_balancing_loss", "router_z_loss"} for row in rows] == [True, True]


def test_the_same_seed_gives_the_same_run(tmp_path, small_corpus):
    logs = []
    for name in ("a", "b"):
        assert train(tmp_path / name) == 0
        rows = (tmp_path / name / "run" / "log.jsonl").read_text().splitlines()
        logs.append([(json.loads(row)["loss"], json.loads(row)["grad_norm"]) for row in rows])
    assert logs[0] == logs[1]


def test_a_run_is_not_overwritten(tmp_path, small_corpus, capsys):
    assert train(tmp_path) == 0
    assert train(tmp_path) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_ctrl_c_saves_the_step_it_comes_in(tmp_path, small_corpus, capsys, monkeypatch):
    log_line = loop._log

    def interrupted(file, **values):
        log_line(file, **values)
        if values["step"] == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_log", interrupted)
    assert train(tmp_path) == 130
    assert "the weights so far are in" in capsys.readouterr().err
    assert (tmp_path / "run" / "latest").resolve().name == "step-00000009"
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "latest")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_checkpoint(
    tmp_path, small_corpus, capsys, monkeypatch
):
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", _nan_at_the_ninth_call(clip))
    assert train(tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "at step 9" in error
    assert "step-00000007" in error


def _nan_at_the_ninth_call(clip):
    calls = iter(range(1, 100))

    def clipped(parameters, limit):
        norm = clip(parameters, limit)
        return torch.full_like(norm, math.nan) if next(calls) == 9 else norm

    return clipped


def test_a_failed_write_leaves_the_checkpoint_before_whole(tmp_path, tokenizer, monkeypatch):
    model = zoo.create_model("retnet-tiny", vocab_size=len(tokenizer))
    loop.save_checkpoint(model, tokenizer, tmp_path, 1)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        loop.save_checkpoint(model, tokenizer, tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "latest")
    AutoTokenizer.from_pretrained(tmp_path / "latest")


def test_batches_take_no_row_twice_a_pass():
    tokens = np.arange(7 * 4 + 3, dtype=np.int32)
    rows = data.into_rows(tokens, length=4, batch_size=2)
    stream = data.batches(rows, batch_size=2, seed=0)
    first_pass = torch.cat([next(stream) for _ in range(3)])
    assert len({tuple(row.tolist()) for row in first_pass}) == 6
    assert all(row[0] % 4 == 0 and (row.diff() == 1).all() for row in first_pass)
    again = data.batches(rows, batch_size=2, seed=0)
    assert torch.equal(next(again), first_pass[:2])
    with pytest.raises(ValueError, match="7 rows of 4 tokens, a batch wants 8"):
        data.into_rows(tokens, length=4, batch_size=8)


def test_a_run_that_cannot_start_leaves_nothing(tmp_path, small_corpus, capsys):
    assert train(tmp_path, "data.batch_size=100000") == 1
    assert "a batch wants 100000" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_files_in_the_output_stay(tmp_path, small_corpus):
    (tmp_path / "run" / "step-by-step").mkdir(parents=True)
    (tmp_path / "run" / "step-notes.txt").write_text("mine")
    assert train(tmp_path) == 0
    assert {"step-by-step", "step-notes.txt"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_the_standard_library_is_a_corpus():
    corpus = data.read_corpus("stdlib")
    assert len(corpus.documents) > 400
    assert sum(map(len, corpus.documents)) > 5e6
    trained_on = "".join(corpus.documents)
    for text in corpus.held_out.values():
        assert len(text) > 3e5
        assert text[1000:1500] not in trained_on


def test_score_of_a_text(tokenizer):
    """Against the definition: every token predicted once, from what its window holds."""
    model = zoo.create_model("retnet-tiny", vocab_size=len(tokenizer)).eval()
    text = Path(__file__).read_text()[:700] + " naïve ✓"
    score = score_text(model, tokenizer, text, window=64, batch_size=2)
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer.encode(text)])
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 64):
            x, y = ids[start : start + 64][: len(ids) - 1 - start], ids[start + 1 : start + 65]
            total += F.cross_entropy(model(x[None]).logits[0], y, reduction="sum").item()
    assert score.tokens == len(ids) - 1
    assert math.isclose(score.loss, total / score.tokens, rel_tol=1e-5)
    assert math.isclose(score.bits_per_byte, total / math.log(2) / len(text.encode()), rel_tol=1e-5)
    counts = torch.tensor(tokenizer.encode(text)).bincount().double()
    p = counts[counts > 0] / counts.sum()
    assert math.isclose(score.unigram_entropy, -(p * p.log()).sum().item(), rel_tol=1e-5)
    with pytest.raises(ValueError, match="no text"):
        score_text(model, tokenizer, "")


@pytest.mark.parametrize("recipe", recipes.list_recipes())
def test_every_recipe_is_valid(recipe):
    settings = recipes.load_config(recipe)
    with torch.device("meta"):
        zoo.create_model(settings.model.preset, **settings.model.overrides)

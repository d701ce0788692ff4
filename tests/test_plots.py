"""Results go into CSV files; what is drawn and tabulated of them is what they say now, in the checkout too."""

import csv
import json
from pathlib import Path

import pytest

import zoo
from zoo import charts, plots
from zoo.bench import length as bench_length
from zoo.cli import main
from zoo.layout import shelf

SCORES = (
    "model,task,setting,metric,value,stderr,documents,state_bytes,parameters,training_tokens,commit,seed,device,date\n"
)
SPEEDS = "model,parameters,pass,length,milliseconds,tokens_per_second,state_bytes\n"
MAX_BYTES = 60_000  # of a picture


def score(model: str, task: str, setting: str, value: float, state: int | str, seed: int = 0) -> str:
    return f"{model},{task},{setting},acc,{value},0.01,100,{state},1000,2000,abc,{seed},cpu,2026-01-01\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "scores.csv").write_text(
        SCORES
        + score("rnn", "recall", "pairs4", 0.9, 4096)
        + score("rnn", "recall", "pairs8", 0.5, 4096)
        + score("rnn", "recall", "pairs8", 0.7, 4096, seed=1)
        + score("attention", "recall", "pairs4", 1.0, "")
        + score("rnn", "parity", "", 1.0, 4096)
    )
    (tmp_path / "length.csv").write_text(
        SPEEDS
        + "".join(f"rnn,1000,{which},{n},1,500,4096\n" for which in ("reading", "decoding") for n in (64, 128))
        + "attention,900,reading,64,1,2500.4,8192\n"
    )
    (tmp_path / "others.csv").write_text("op,milliseconds\nscan,3\n")
    return tmp_path


def make_run(folder: Path, steps: int) -> Path:
    (folder / "latest").mkdir(parents=True)
    facts = {"step": steps, "tokens": 100 * steps, "parameters": 7, "seed": 3}
    facts |= {"data": {"sources": {"books": {}, "parity": {}}}, "commit": "abc", "device": "cpu", "date": "2026-01-01"}
    (folder / "latest" / "training.json").write_text(json.dumps(facts))
    log = [{"step": step, "loss": 10.0 - step / steps} for step in range(1, steps + 1)]
    log[0]["loss"] = None  # not finite
    log[-1]["validation"] = {"prose": {"loss": 9.5}}
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# -- rows --------------------------------------------------------------------------------------------------------------


def save_checkpoint(name: str, tokenizer, folder: Path) -> None:
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    zoo.create_model(f"{name}-tiny", vocab_size=len(tokenizer), num_hidden_layers=2, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_eval_adds_rows(tokenizer, tmp_path, capsys):
    save_checkpoint("retnet", tokenizer, tmp_path / "small" / "latest")
    (tmp_path / "small" / "latest" / "training.json").write_text('{"tokens": 5, "seed": 7}')
    save_checkpoint("transformer", tokenizer, tmp_path / "attention")
    path = tmp_path / "scores.csv"

    def evaluate(checkpoint: str, limit: int) -> None:
        words = ["--tasks", "parity", "--limit", str(limit), "--device", "cpu", "--results", str(path)]
        assert main(["eval", str(tmp_path / checkpoint), *words]) == 0, capsys.readouterr().err

    evaluate("attention", 3)
    evaluate("small/latest", 2)
    evaluate("small/latest", 4)
    rows = read(path)
    settings = ["min_length3_length40", "min_length40_length256"]
    assert [(row["model"], row["task"], row["setting"], row["metric"], row["documents"]) for row in rows] == [
        (model, "parity", setting, "acc", documents)
        for model, documents in (("attention", "3"), ("small", "4"))
        for setting in settings
    ]
    attention, small = rows[0], rows[2]
    config = zoo.create_config("retnet-tiny", num_hidden_layers=2)
    assert (small["state_bytes"], small["seed"], small["training_tokens"]) == (str(zoo.state_bytes(config)), "7", "5")
    assert (attention["state_bytes"], attention["seed"], attention["training_tokens"]) == ("", "", "")
    for row in rows:
        assert float(row["value"]) * int(row["documents"]) == pytest.approx(round(float(row["value"]) * 4), abs=1)
        assert all(row[column] for column in ("stderr", "parameters", "commit", "device", "date"))
    assert len(plots.make(tmp_path)) == 3  # a picture, and two kinds of which there are no rows


def test_rows_go_to_no_other_file(tokenizer, folder, capsys):
    save_checkpoint("retnet", tokenizer, folder / "checkpoint")
    words = ["--tasks", "parity", "--results", str(folder / "others.csv")]
    assert main(["eval", str(folder / "checkpoint"), *words]) == 1
    assert "others.csv has other columns than are written to it" in capsys.readouterr().err


def test_runs_become_curves(tmp_path):
    runs = [make_run(tmp_path / "runs" / "long", 1001), make_run(tmp_path / "runs" / "short", 3)]
    path = tmp_path / "losses.csv"
    plots.add_runs(runs, path)
    plots.add_runs(runs[1:], path)  # again, in place of the first time
    rows = read(path)
    long, short = ([row for row in rows if row["run"] == name] for name in ("long", "short"))
    assert [(row["split"], row["step"], row["tokens"], row["loss"]) for row in short] == [
        ("training", "2", "200", "9.3333"),
        ("training", "3", "300", "9.0000"),
        ("prose", "3", "300", "9.5000"),
    ]
    training = [row for row in long if row["split"] == "training"]
    assert len(training) == 100
    assert sum(float(row["loss"]) for row in training) / 100 == pytest.approx(9.5, abs=2e-3)
    assert training[-1]["tokens"] == "100100"
    assert {row["seed"] for row in rows} == {"3"}
    figure = charts.draw_losses(rows)
    assert [line.get_label() for line in figure.axes[0].lines if line.get_label()[0] != "_"] == [
        "long",
        "short",
        "held-out prose",
    ]
    assert charts.tabulate_losses(rows)[2] == ["short", "7", "300", "9.000", "9.500"]


def test_what_is_no_run_is_refused(tmp_path):
    run = make_run(tmp_path / "a" / "run", 2)
    with pytest.raises(ValueError, match="other is no training run"):
        plots.add_runs([run, tmp_path / "other"], tmp_path / "losses.csv")
    with pytest.raises(ValueError, match="2 runs have 1 names, run: rename their folders"):
        plots.add_runs([run, make_run(tmp_path / "b" / "run", 2)], tmp_path / "losses.csv")


def test_bench_length(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_length, "_LENGTHS", (8, 16))
    monkeypatch.setattr(bench_length, "_BUDGET", 0.05)
    monkeypatch.setattr(bench_length, "_SIZES", {"num_hidden_layers": 2})
    path = tmp_path / "length.csv"
    words = ["bench", "length", "--repeats", "1", "--output", str(path)]
    for name in ("transformer", "retnet"):
        assert main([*words, name]) == 0, capsys.readouterr().err
    rows = read(path)
    assert [(row["model"], row["pass"], row["length"]) for row in rows] == [
        (model, which, length)
        for model in ("retnet", "transformer")
        for length in ("8", "16")
        for which in ("reading", "decoding")
    ]
    for row in rows:
        tokens = int(row["length"]) if row["pass"] == "reading" else 1
        seconds = tokens / float(row["tokens_per_second"])
        assert 1e3 * seconds == pytest.approx(float(row["milliseconds"]), rel=0.02)
    assert main([*words, "retnett"]) == 1
    assert "unknown model 'retnett'; did you mean retnet?" in capsys.readouterr().err


# -- pictures and tables -----------------------------------------------------------------------------------------------


def test_pictures_are_drawn_once_and_stale_ones_are_found(folder):
    drawn = ["length.png", "scores_recall.png", "scores_parity.png"]
    assert plots.find_stale(folder) == drawn
    lines = plots.make(folder)
    assert lines[0].startswith("no loss curves: no CSV file in ")
    assert lines[1:] == [f"drawn: {folder / name}" for name in drawn]
    for name in drawn:
        assert (folder / name).stat().st_size < MAX_BYTES
    assert plots.find_stale(folder) == []
    assert plots.make(folder) == lines[:1]

    path = folder / "scores.csv"
    path.write_text(path.read_text().replace("0.9,", "0.8,"))
    assert plots.find_stale(folder) == ["scores_recall.png"]
    path.unlink()
    assert plots.find_stale(folder) == ["scores_parity.png", "scores_recall.png"]
    (folder / "scores_recall.png").write_bytes((folder / "length.png").read_bytes())
    (folder / "length.csv").write_text((folder / "length.csv").read_text().replace("2500.4", "2500"))
    assert plots.find_stale(folder) == ["length.png", "scores_parity.png", "scores_recall.png"]


def test_two_pictures_of_one_name_are_refused(folder):
    (folder / "scores_parity.csv").write_text((folder / "length.csv").read_text())
    with pytest.raises(ValueError, match="make a scores_parity"):
        plots.make(folder)


def test_every_row_is_in_the_picture(folder):
    shown = plots.exhibits(folder)
    recall = charts.draw_quality(shown["scores_recall"].rows)
    assert [axes.get_title() for axes in recall.axes] == ["pairs4", "pairs8"]
    points = [[bars.lines[0].get_xydata().tolist() for bars in axes.containers] for axes in recall.axes]
    assert points == [[[[4096, 0.9]]], [[[4096, 0.5]], [[4096, 0.7]]]]
    (level,) = [line for line in recall.axes[0].lines if line.get_linestyle() == "--"]
    assert level.get_ydata() == [1.0, 1.0]
    speed = charts.draw_speed(shown["length"].rows)
    drawn = {axes.get_title(): [line.get_xydata().tolist() for line in axes.lines] for axes in speed.axes}
    assert drawn == {
        "reading": [[[64, 500], [128, 500]], [[64, 2500.4]]],
        "decoding": [[[64, 500], [128, 500]], []],
    }


def test_tables_of_pages(folder):
    page = folder / "README.md"
    page.write_text(
        "# Results\n\n<!-- zoo plots scores_recall -->\nold\n<!-- end of table -->\n\n"
        "<!-- zoo plots length -->\n<!-- end of table -->\n<!-- zoo list --markdown -->\nkept\n<!-- end of table -->\n"
    )
    plots.make(folder)
    assert plots.find_stale(folder, [page]) == [str(page)]
    assert plots.make(folder, [page])[1:] == [f"filled in: {page}"]
    assert plots.find_stale(folder, [page]) == []
    assert page.read_text().splitlines()[2:] == [
        "<!-- zoo plots scores_recall -->",
        "| model | parameters | state, bytes | pairs4 | pairs8 |",
        "| --- | --- | --- | --- | --- |",
        "| rnn | 1,000 | 4,096 | 0.900 ± 0.010 | 0.500 ± 0.010, 0.700 ± 0.010 |",
        "| attention | 1,000 | grows | 1.000 ± 0.010 |  |",
        "<!-- end of table -->",
        "",
        "<!-- zoo plots length -->",
        "| model | parameters | reading, 64 | reading, 128 | decoding, 64 | decoding, 128 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| rnn | 1,000 | 500 | 500 | 500 | 500 |",
        "| attention | 900 | 2,500 |  |  |  |",
        "<!-- end of table -->",
        "<!-- zoo list --markdown -->",
        "kept",
        "<!-- end of table -->",
    ]
    page.write_text("<!-- zoo plots scores_recal -->\n<!-- end of table -->\n")
    with pytest.raises(ValueError, match="unknown table of `zoo plots` 'scores_recal'; did you mean scores_recall"):
        plots.find_stale(folder, [page])


def test_what_is_expected_is_written_by_hand(folder):
    page = folder / "README.md"
    page.write_text(
        "<!-- zoo plots scores_recall -->\n"
        "| model | expected |\n|---|---|\n| lstm | little |\n|  attention |all |\n<!-- end of table -->\n"
    )
    plots.make(folder, [page])
    lines = page.read_text().splitlines()
    assert lines[1:-1] == [
        "| model | expected | parameters | state, bytes | pairs4 | pairs8 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| rnn |  | 1,000 | 4,096 | 0.900 ± 0.010 | 0.500 ± 0.010, 0.700 ± 0.010 |",
        "| attention | all | 1,000 | grows | 1.000 ± 0.010 |  |",
        "| lstm | little |  |  |  |  |",
    ]
    assert plots.find_stale(folder, [page]) == []
    plots.make(folder, [page])
    assert page.read_text().splitlines() == lines


def test_the_command(folder, tmp_path, capsys):
    run = make_run(tmp_path / "runs" / "short", 3)
    assert main(["plots", str(folder), "--check"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("zoo: length.png, scores_recall.png, scores_parity.png: not what the CSV files in ")
    assert main(["plots", str(folder), "--runs", str(run)]) == 0
    assert str(folder / "losses_books+parity.png") in capsys.readouterr().out
    assert main(["plots", str(folder), "--check"]) == 0
    assert main(["plots", str(tmp_path / "nowhere")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_the_pictures_and_tables_of_the_checkout_are_not_stale():
    results = shelf("evals") / "results"
    assert plots.find_stale(results, plots.pages()) == [], "run `zoo plots`"
    for path in results.glob("*.png"):
        assert path.stat().st_size < MAX_BYTES, path.name

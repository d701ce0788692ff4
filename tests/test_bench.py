"""The bench: every contender computes what the op computes, rows are whole, nothing finished is lost."""

import csv
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import zoo.ops
from zoo import bench
from zoo.bench import models, pairs, results, scoring, train
from zoo.bench.workload import CPU_FORMS, known_ops, workloads_of
from zoo.cli import main

_SMALL = {"b": 2, "t": 64, "h": 2, "d": 6, "e": 5, "n": 3, "f": 7, "v": 50}


def _shrunk(op: str):
    """The workloads of an op at sizes that take no time."""
    return [
        replace(
            workload, sizes={letter: min(size, _SMALL.get(letter, size)) for letter, size in workload.sizes.items()}
        )
        for workload in workloads_of(op, "cpu")
    ]


_speedup_2_threads = bench.cpu._speedup_2_threads


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.delenv("ZOO_KERNELS", raising=False)
    monkeypatch.setattr(bench.cpu, "_BUDGET", 1e-3)
    monkeypatch.setattr(bench.cpu, "_LEAST", 1e-4)
    monkeypatch.setattr(bench.cpu, "peaks", lambda: results.Peaks(1e10, 1e11))
    monkeypatch.setattr(bench.cpu, "_speedup_2_threads", lambda *_: 1.5)


@pytest.mark.parametrize("op", known_ops())
def test_contenders_agree_and_rows_are_whole(op, tmp_path, capsys):
    output = tmp_path / "ops.csv"
    bench.run(_shrunk(op), "cpu", 1, output)
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(results.COLUMNS)
    for row in rows:
        assert row["op"] == op
        assert float(row["milliseconds"]) > 0
        assert float(row["difference"]) < 1e-3
        assert row["commit"]
        assert row["device"]
    expected = {
        (workload.size, which, contender)
        for workload in _shrunk(op)
        for contender, passes in (*workload.forms.items(), *((peer.name, peer.passes) for peer in workload.peers))
        for which in passes
        if which in workload.passes and contender != "native"  # there may be no compiler
    }
    assert expected <= {(row["size"], row["pass"], row["contender"]) for row in rows}
    assert rows[0]["size"] in capsys.readouterr().out


def test_two_threads():
    threads = torch.get_num_threads()
    with bench.cpu._one_thread():
        speedup = _speedup_2_threads(lambda: None, 1)
    assert speedup is None or speedup > 0
    assert torch.get_num_threads() == threads


def test_every_op_has_workloads():
    assert known_ops() == sorted(path.parent.name for path in Path(*zoo.ops.__path__).glob("*/reference.py"))


def test_every_target_is_measured():
    measured = {(workload.op, workload.variant) for op in known_ops() for workload in workloads_of(op, "cpu")}
    assert {key[:2] for key in results.TARGETS if key[0] in known_ops()} <= measured


def test_a_contender_that_computes_something_else_gets_no_time(tmp_path):
    workload = _shrunk("linear_scan")[0]
    (peer,) = workload.peers
    wrong = replace(peer, run=lambda **inputs: 2 * peer.run(**inputs))
    with pytest.raises(ValueError, match="transformers: no time"):
        bench.run([replace(workload, peers=(wrong,))], "cpu", 1, tmp_path / "ops.csv")
    with (tmp_path / "ops.csv").open() as file:
        times = {row["contender"]: row["milliseconds"] for row in csv.DictReader(file)}
    assert times.pop("transformers") == ""
    assert set(times) <= set(CPU_FORMS)
    assert all(times.values())


def test_what_is_finished_stays(tmp_path, monkeypatch, capsys):
    """After Ctrl-C, and rows of other ops after another run."""
    first, second = _shrunk("linear_scan")
    output = tmp_path / "ops.csv"
    bench.run([first], "cpu", 1, output)
    other = output.read_text().replace("linear_scan", "another_op")
    output.write_text(other)

    measure = bench.cpu.measure

    def interrupted(trials, *rest):
        if trials[0].inputs["b"].shape[1] == 1:
            raise KeyboardInterrupt
        return measure(trials, *rest)

    monkeypatch.setattr(bench.cpu, "measure", interrupted)
    monkeypatch.setattr(bench, "workloads_of", lambda op, device: [first, second])
    assert main(["bench", "ops", "linear_scan", "--repeats", "1", "--output", str(output)]) == 130
    assert output.read_text().startswith(other)
    assert output.read_text().count("\nlinear_scan") == other.count("\nanother_op")
    assert "forward+backward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ops", "delta_rul"], "unknown op 'delta_rul'; did you mean delta_rule?"),
        (["ops", "--repeats", "0"], "--repeats must be 1 or more, got 0"),
        (["ops", "linear_scan", "--output", "other.csv"], "other.csv has other columns"),
        (["aot", "delta_rul"], "unknown op 'delta_rul'; did you mean delta_rule?"),
        (["opps"], "opps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("op,target\n")
    assert main(["bench", *words]) == 1
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1]


@pytest.mark.parametrize("kind", ["ops", "length"])
def test_the_form_of_the_ops_is_the_zoos_choice(kind, monkeypatch, capsys):
    monkeypatch.setenv("ZOO_KERNELS", "chunked")
    assert main(["bench", kind]) == 1
    assert "ZOO_KERNELS asks for one form of every op" in capsys.readouterr().err


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "ops", "linear_scan", "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "zoo: no CUDA device\n"


def test_compiled_rows_of_other_ops_stay(tmp_path, monkeypatch, capsys):
    from zoo.bench import aot

    def compile_all(ops):
        (op,) = ops
        return [
            aot.Row(
                op, "forward", "main", "sm_90", "", "", 4, 2, "", stack=8, verdict="chunked", why="8 bytes of stack"
            )
        ]

    monkeypatch.setattr(aot.ahead_of_time, "compile_all", compile_all)
    output = tmp_path / "aot.csv"
    aot.bench_aot(["lse_scan"], output)
    aot.bench_aot(["delta_rule"], output)
    assert [line.split(",")[0] for line in output.read_text().splitlines()] == ["op", "delta_rule", "lse_scan"]
    assert "forward main: 8 bytes of stack" in capsys.readouterr().out


@pytest.mark.parametrize("name", [pair.name for pair in models.PAIRS])
def test_models_agree_and_rows_are_whole(name, tmp_path, monkeypatch, capsys):
    (pair,) = (pair for pair in models.PAIRS if pair.name == name)

    def small():
        config = pair.config()
        for name in {"num_hidden_layers", "num_blocks"} & vars(config).keys():
            setattr(config, name, {"jamba": 6, "griffin": 3}.get(pair.name, 2))  # one with attention
        return config

    config = small if pair.other == "transformers" else pair.config
    monkeypatch.setattr(models, "PAIRS", (replace(pair, config=config, piece=pair.piece and 10),))
    for constant, value in {"_ROWS": 1, "_LENGTH": 20, "_PROMPT": 4, "_NEW": 3}.items():
        monkeypatch.setattr(models, constant, value)
    monkeypatch.setattr(pairs, "_VOCABULARY", 211)
    output = tmp_path / "models.csv"
    models.bench_models([name], 1, output)
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(models.COLUMNS)
    assert [(row["pass"], row["contender"]) for row in rows] == [
        (which, contender) for which in pair.passes for contender in ("zoo", pair.other)
    ]
    for row in rows:
        assert float(row["tokens_per_second"]) > 0
        assert float(row["difference"]) < 1e-3 if pair.computes_the_same else row["difference"] == ""
        assert bool(row["target"]) == bool(row["met"])
    assert name in capsys.readouterr().out


def test_steps_of_a_recipe_are_timed(tmp_path, capsys):
    output = tmp_path / "train.csv"
    train.bench_train(["retnet"], repeats=1, output=output)
    (row,) = csv.DictReader(output.open())
    assert tuple(row) == train.COLUMNS
    assert (row["recipe"], row["tokens_a_step"]) == ("retnet", "2048")
    speed = 6 * int(row["parameters"]) * float(row["tokens_per_second"])  # the head is the embedding
    assert float(row["of_matmul_peak"]) == pytest.approx(speed / 1e11, rel=0.02)
    assert 0 < float(row["loader"]) < 0.5
    assert "retnet" in capsys.readouterr().out
    assert main(["bench", "train", "retnt"]) == 1
    assert "did you mean retnet" in capsys.readouterr().err


def test_scores_are_timed_beside_those_of_hflm(monkeypatch, tmp_path, capsys):
    for name, value in {"_CONTEXT": 60, "_BUDGET": 0.05, "_SIZES": {"num_hidden_layers": 2}}.items():
        monkeypatch.setattr(scoring, name, value)
    output = tmp_path / "eval.csv"
    assert main(["bench", "eval", "retnet", "--repeats", "1", "--output", str(output)]) == 0, capsys.readouterr().err
    rows = list(csv.DictReader(output.open()))
    assert tuple(rows[0]) == scoring.COLUMNS
    assert [(row["batch_size"], row["contender"]) for row in rows] == list(itertools.product("18", ("ZooLM", "HFLM")))
    for ours, theirs in (rows[:2], rows[2:]):
        assert float(ours["ratio"]) == pytest.approx(
            float(theirs["milliseconds"]) / float(ours["milliseconds"]), rel=0.02
        )
        assert (float(ours["ratio"]) >= 3) == (ours["met"] == "yes")
        assert float(theirs["difference"]) < 1e-3
    assert "HFLM" in capsys.readouterr().out

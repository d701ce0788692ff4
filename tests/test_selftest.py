"""`zoo selftest`: right kernels pass, a wrong one is found and fails the command."""

import importlib

import pytest
import torch

from zoo.cli import main
from zoo.ops.testing import op_names


def test_it_passes(capsys):
    assert main(["selftest", "linear_scan"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    rows = [line.split() for line in out.splitlines() if line.startswith("linear_scan")]
    assert {tuple(row[1:4]) for row in rows} >= {("real", "native", "float32"), ("complex", "chunked", "float32")}
    assert {row[6] for row in rows} == {"ok"}


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_wrong_kernel_is_found(monkeypatch, capsys, name):
    """One entry in a thousand is off by one in ten thousand."""
    kernel = importlib.import_module("zoo.ops.linear_scan.native")
    right = getattr(kernel, name)

    def wrong(*inputs):
        results = right(*inputs)
        results[0].view(-1)[::1000] *= 1.0001
        return results

    monkeypatch.setattr(kernel, name, wrong)
    assert main(["selftest", "linear_scan"]) == 1
    captured = capsys.readouterr()
    assert "wrong" in captured.out
    assert "differ from their reference" in captured.err


def test_a_kernel_that_fails_is_reported(monkeypatch, capsys):
    def fail(*inputs):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(importlib.import_module("zoo.ops.linear_scan.native"), "forward", fail)
    assert main(["selftest", "linear_scan"]) == 1
    assert "failed: RuntimeError: illegal memory access" in capsys.readouterr().out


def test_unknown_names(capsys):
    assert main(["selftest", "linear_scn"]) == 1
    assert "did you mean linear_scan" in capsys.readouterr().err
    assert main(["selftest", "--device", "cuda:99"]) == 1
    assert "no device 'cuda:99'" in capsys.readouterr().err


def test_every_op_has_what_is_wanted_of_it():
    """The forms of each op, and cases to test them on."""
    native = {"linear_scan", "selective_scan", "decay_attention", "delta_rule", "cell_scan", "short_conv"}
    triton = native - {"short_conv"} | {"lse_scan", "memory_gd"}
    assert set(op_names()) == native | triton | {"linear_cross_entropy"}
    for op in op_names():
        forms = ("reference", "chunked", *(["native"] if op in native else []), *(["triton"] if op in triton else []))
        assert importlib.import_module(f"zoo.ops.{op}").OP.forms == forms
        assert importlib.import_module(f"zoo.ops.{op}.cases").CASES

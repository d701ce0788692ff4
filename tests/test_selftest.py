"""`zoo selftest`: right kernels pass, a wrong one is found and fails the command."""

import importlib

import pytest
import torch

from zoo.cli import main


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

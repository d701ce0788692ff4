"""Liger-Kernel is used where it should be: on a GPU, where it is installed, outside of compiled graphs.

There need be no GPU: what runs on one is pretended. Triton's interpreter runs Liger's cross entropy, not its norm and
gate (it hands kernels numbers of Python, which those convert), so these two are stood in for; and so is the hyperbolic
tangent, which comes from a library of the GPU's.
"""

from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from torch.nn import functional as F

import zoo
from zoo.ops import fused, liger
from zoo.ops import linear_cross_entropy as cross_entropy_module
from zoo.ops.dispatch import Choice, use_backend


@pytest.fixture
def calls(monkeypatch):
    """Pretend that every device is a GPU with Liger-Kernel; the calls it gets, by name."""
    found = []

    def record(name, function):
        def call(*arguments):
            found.append(name)
            return function(*arguments)

        return call

    functions = SimpleNamespace(
        liger_rms_norm=record("liger_rms_norm", lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)),
        liger_swiglu=record("liger_swiglu", lambda gate, up: F.silu(gate) * up),
    )
    choose_for = liger.choose_liger
    monkeypatch.setattr(fused, "choose_fused", lambda device, dtype, kernels: choose_for("cuda", kernels))
    monkeypatch.setattr(liger, "_is_installed", lambda: True)
    monkeypatch.setattr(liger, "_functional", lambda: functions)
    return found


def test_a_model_runs_on_it(calls):
    model = zoo.create_model("transformer-tiny").eval()
    tokens = torch.ones(1, 3, dtype=torch.long)
    logits = model(tokens).logits
    layers = model.config.num_hidden_layers
    assert (calls.count("liger_rms_norm"), calls.count("liger_swiglu")) == (2 * layers + 1, layers)
    calls.clear()
    with use_backend("chunked"):
        assert torch.equal(model(tokens).logits, logits)
    assert not calls
    model.config.kernels = "reference"
    model(tokens)
    assert not calls


def test_a_compiler_fuses_by_itself(calls):
    x, weight = torch.randn(2, 8), torch.rand(8)
    y = torch.compile(fused.rms_norm, fullgraph=True)(x, weight, 1e-6)
    assert not calls
    torch.testing.assert_close(y, fused.rms_norm(x, weight, 1e-6))
    assert calls


def test_where_it_runs(monkeypatch):
    assert liger.choose_liger("cpu") == ("torch", "Liger-Kernel runs on a GPU, not on cpu")
    monkeypatch.setattr(liger, "_is_installed", lambda: False)
    assert liger.choose_liger("cuda") == ("torch", "Liger-Kernel is not installed")
    monkeypatch.setattr(liger, "_is_installed", lambda: True)
    assert liger.choose_liger("cuda").backend == "liger"
    with use_backend("reference"):
        assert liger.choose_liger("cuda") == ("torch", "'reference' was asked for")


class Number(float):
    """A number that Liger's kernel can convert in Triton's interpreter."""

    def to(self, dtype):
        return self


@pytest.mark.parametrize(("bias", "soft_cap"), [(False, None), (True, None), (True, Number(1.5))])
def test_cross_entropy_equals_ours(monkeypatch, bias, soft_cap):
    monkeypatch.setattr("liger_kernel.ops.cross_entropy.tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)
    monkeypatch.setattr(
        cross_entropy_module,
        "choose_liger",
        lambda device, kernels: Choice("torch" if kernels == "reference" else "liger", ""),
    )
    x, weight = torch.randn(12, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    inputs = [x, weight, torch.randn(50, requires_grad=True)] if bias else [x, weight]
    labels = torch.randint(0, 50, (12,))
    labels[::5] = -100

    def run(kernels):
        arguments = {"z_loss": 0.01, "soft_cap": soft_cap, "num_items": 5, "kernels": kernels}
        arguments["bias"] = inputs[2] if bias else None
        loss = cross_entropy_module.linear_cross_entropy(x, weight, labels, **arguments)
        return [loss, *torch.autograd.grad(3 * loss, inputs)]

    for found, expected in zip(run("auto"), run("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="soft_cap must be positive, got 0"):
        cross_entropy_module.linear_cross_entropy(x, weight, labels, soft_cap=0)
    labels[0] = 50
    with pytest.raises(ValueError, match="label 50 is out of range"):
        run("auto")

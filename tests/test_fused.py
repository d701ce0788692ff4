"""Norm, gates and rotations in C++: numbers and gradients of PyTorch's, and PyTorch's where C++ cannot be called."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

import zoo
from zoo.ops import native
from zoo.ops.dispatch import use_backend
from zoo.ops.fused import choose_fused, geglu, normalize, rms_norm, rotate_halves, swiglu

EPS = 1e-3
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


def plain_rms_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return y if weight is None else y * weight


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def assert_equal(function, plain, inputs: list[Tensor], dtype: torch.dtype, atol: float = 0.0) -> None:
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = function(*inputs), plain(*exact)
    weight = torch.randn_like(expected)
    found = torch.autograd.grad(y, inputs, weight.to(dtype))
    wanted = torch.autograd.grad(expected, exact, weight)
    for actual, value in zip((y, *found), (expected, *wanted), strict=True):
        assert actual.dtype == dtype
        assert (actual - value).abs().max() <= TOLERANCE[dtype] * max(value.abs().max(), atol)
    with torch.no_grad():
        assert torch.equal(function(*inputs), y)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
@pytest.mark.parametrize("shape", [(1, 7), (5, 1), (3, 4, 2, 33), (40, 512)], ids=str)
def test_rms_norm(shape, dtype, native_calls):
    x = torch.randn(shape, dtype=torch.float64)
    x[0] *= 1e-3  # where eps counts
    weight = torch.randn(shape[-1], dtype=torch.float64)
    assert_equal(lambda x, w: rms_norm(x, w, EPS), plain_rms_norm, [x, weight], dtype)
    assert_equal(lambda x: rms_norm(x, None, EPS), lambda x: plain_rms_norm(x, None), [x], dtype)
    assert native_calls.count("rms_norm_forward") == 4
    assert native_calls.count("rms_norm_backward") == 2


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
@pytest.mark.parametrize("shape", [(1, 7), (5, 1), (3, 4, 2, 33), (40, 512)], ids=str)
def test_normalize(shape, dtype, native_calls):
    x = torch.randn(shape, dtype=torch.float64)
    assert_equal(normalize, lambda x: x / x.square().sum(-1, keepdim=True).sqrt(), [x], dtype, atol=1.0)
    assert native_calls == ["normalize_forward", "normalize_backward", "normalize_forward"]


def test_nothing_has_no_direction():
    """What padding leaves: zeros stay zeros, with PyTorch's gradient."""
    x = torch.zeros(3, 40, dtype=torch.float64)
    x[1] = 1e-14  # below what counts as a length
    x.requires_grad_()
    grad = torch.randn_like(x)
    y, expected = normalize(x), F.normalize(x, dim=-1)
    assert torch.equal(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, x, grad)[0] for value in (y, expected)))


def plain_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / 2 * (1 + ((2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)).tanh()) * up


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", [(swiglu, plain_swiglu, F.silu), (geglu, plain_geglu, F.gelu)], ids=["silu", "gelu"])
def test_gates(kind, dtype, native_calls):
    function, plain, activation = kind
    gate = 8 * torch.randn(3, 41, 100, dtype=torch.float64)
    assert_equal(function, plain, [gate, torch.randn_like(gate)], dtype)
    name = function.__name__
    assert native_calls == [f"{name}_forward", f"{name}_backward", f"{name}_forward"]
    extreme = torch.tensor([0.0, 1e4, -1e4, torch.inf, torch.nan]).repeat(1000)
    assert torch.equal(function(extreme, torch.ones_like(extreme)).isfinite(), activation(extreme).isfinite())


def plain_rotation(x: Tensor, angle: Tensor) -> Tensor:
    """As complex numbers (arXiv:2104.09864, equation 13), those of a head's real parts before the imaginary ones."""
    half = angle.shape[-1]
    number = torch.complex(x[..., :half], x[..., half : 2 * half])
    turned = number * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 7, 3, 34), (3, 5, 2, 64)], ids=str)
@pytest.mark.parametrize("rows", ["one", "each"])
@pytest.mark.parametrize("rest", [0, 3])
def test_rotation(shape, rows, rest, dtype, native_calls):
    b, t, h, width = shape
    angle = torch.randn(b if rows == "each" else 1, t, width // 2, dtype=torch.float64)
    cos, sin = (x.repeat(1, 1, 2).to(dtype) for x in (angle.cos(), angle.sin()))
    x = torch.randn(b, t, h, width + rest, dtype=torch.float64)
    assert_equal(lambda x: rotate_halves(x, cos, sin), lambda x: plain_rotation(x, angle), [x], dtype)
    assert native_calls == ["rotate", "rotate_back", "rotate"]
    assert_equal(lambda x: rotate_halves(x, cos, sin, "chunked"), lambda x: plain_rotation(x, angle), [x], dtype)


@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 5, 6), (1, 5, 10), (1, 5, 3)], ids=str)
def test_angles_that_do_not_fit_are_refused(shape, native_calls):
    cos = torch.ones(shape)
    with pytest.raises(ValueError if shape[-1] % 2 else RuntimeError):
        rotate_halves(torch.randn(2, 5, 3, 8), cos, cos)
    assert not native_calls


def test_rotation_by_learned_angles_is_pytorch_s(native_calls):
    x, angle = torch.randn(2, 5, 3, 8), torch.randn(1, 5, 4, requires_grad=True)
    cos, sin = (y.repeat(1, 1, 2) for y in (angle.cos(), angle.sin()))
    found, expected = (
        torch.autograd.grad(y.square()[..., 0].sum(), angle)[0]
        for y in (rotate_halves(x, cos, sin), plain_rotation(x, angle))
    )
    torch.testing.assert_close(found, expected)
    assert not native_calls


def test_any_strides():
    x, weight = torch.randn(60, 90).t()[::2], torch.randn(60)
    torch.testing.assert_close(rms_norm(x, weight, EPS), plain_rms_norm(x, weight))
    gate = torch.randn(90, 120).t()
    up = torch.randn(120, 180)[:, ::2]
    torch.testing.assert_close(swiglu(gate, up), plain_swiglu(gate, up))
    x, angle = torch.randn(2, 4, 12, 6).transpose(1, 2), torch.randn(2, 12, 3)
    cos, sin = (y[:, :, [0, 1, 2, 0, 1, 2]] for y in (angle.cos(), angle.sin()))
    torch.testing.assert_close(rotate_halves(x, cos, sin), plain_rotation(x, angle))


def test_threads_do_not_change_the_result():
    x = torch.randn(301, 64, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(64, dtype=torch.float64, requires_grad=True)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            y = rms_norm(x, weight, EPS)
            found.append([y, *torch.autograd.grad(y.sum(), [x, weight])])
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        torch.testing.assert_close(one, three)


def test_second_derivatives():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for function in (lambda x, w: rms_norm(x, w, EPS), lambda x, w: rms_norm(x, None, EPS) * w):
        assert gradcheck(function, (x, weight))
        assert gradgradcheck(function, (x, weight))
    angle = torch.randn(1, 3, 4, dtype=torch.float64)
    heads = torch.randn(2, 3, 1, 8, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: rotate_halves(x, angle.cos().repeat(1, 1, 2), angle.sin().repeat(1, 1, 2)), heads)
    assert gradgradcheck(normalize, heads)
    gate, up = (torch.randn(4100, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (first,) = torch.autograd.grad(swiglu(gate, up).sum(), gate, create_graph=True)
    (found,) = torch.autograd.grad(first.sum(), gate)
    (first,) = torch.autograd.grad(plain_swiglu(gate, up).sum(), gate, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), gate)
    torch.testing.assert_close(found, expected)


def test_transforms_and_compilers_see_pytorch(native_calls):
    x, weight = torch.randn(4, 2000), torch.rand(2000)
    torch.testing.assert_close(vmap(lambda row: rms_norm(row, weight, EPS))(x), plain_rms_norm(x, weight))
    torch.testing.assert_close(
        grad(lambda x: swiglu(x, x).sum())(x), grad(lambda x: plain_swiglu(x, x).sum())(x), rtol=1e-5, atol=1e-5
    )
    _, tangent = jvp(lambda x: rms_norm(x, weight, EPS), (x,), (x,))
    _, expected = jvp(lambda x: plain_rms_norm(x, weight), (x,), (x,))
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-6)
    compiled = torch.compile(lambda x: swiglu(rms_norm(x, weight, EPS), x), fullgraph=True)
    torch.testing.assert_close(compiled(x), plain_swiglu(plain_rms_norm(x, weight), x), rtol=1e-5, atol=1e-5)
    assert not native_calls


def test_autocast_and_low_precision_are_pytorch_s(native_calls):
    x, weight = torch.randn(8, 1000), torch.rand(1000)
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_norm(x, weight, EPS).dtype == F.rms_norm(x, weight.shape, weight, EPS).dtype
        swiglu(x, x)
    low = x.bfloat16()
    assert torch.equal(rms_norm(low, weight.bfloat16(), EPS), F.rms_norm(low, weight.shape, weight.bfloat16(), EPS))
    assert torch.equal(swiglu(low, low), F.silu(low) * low)
    assert not native_calls


def test_the_form_asked_for_runs(native_calls, monkeypatch):
    x, weight = torch.randn(8, 1000), torch.rand(1000)
    for form in ("reference", "chunked", "triton"):
        with use_backend(form):
            rms_norm(x, weight, EPS)
            swiglu(x, x)
        rms_norm(x, weight, EPS, kernels=form)
        assert choose_fused("cpu", kernels=form) == ("torch", f"{form!r} was asked for")
    assert not native_calls
    assert choose_fused("cpu") == ("native", "the kernel for cpu")
    assert choose_fused("cpu", torch.bfloat16) == ("torch", "no C++ for bfloat16")
    assert choose_fused("mps").backend == "torch"
    monkeypatch.setattr(native, "obstacle", lambda op: "no compiler")
    assert choose_fused("cpu") == ("torch", "no compiler")
    torch.testing.assert_close(rms_norm(x, weight, EPS), plain_rms_norm(x, weight))


def test_nothing_to_compute():
    assert rms_norm(torch.empty(0, 4), torch.ones(4), EPS).shape == (0, 4)
    assert swiglu(torch.empty(0, 4), torch.empty(0, 4)).shape == (0, 4)


def test_a_model_runs_on_it(native_calls):
    model = zoo.create_model("transformer-tiny")
    model(torch.ones(2, 12, dtype=torch.long), labels=torch.ones(2, 12, dtype=torch.long)).loss.backward()
    layers = model.config.num_hidden_layers
    assert native_calls.count("rms_norm_backward") == 2 * layers + 1
    assert native_calls.count("swiglu_backward") == layers
    assert native_calls.count("rotate_back") == 2 * layers

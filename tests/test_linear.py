"""Linear layers through oneDNN and C++: the same numbers and gradients as PyTorch's, wherever they come from."""

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.nn import Linear
from zoo.ops import linear as linear_layers
from zoo.ops.dispatch import use_backend

ROWS, WIDTH, OUT = 160, 120, 130  # enough to go to oneDNN


@pytest.fixture(autouse=True)
def _preferred(monkeypatch):
    """On every processor, not on those alone where it is faster."""
    assert torch.backends.mkldnn.is_available()
    monkeypatch.setattr(linear_layers, "_outruns_mkl", lambda: True)


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN was called."""
    count = []
    original = linear_layers._Linear.apply
    monkeypatch.setattr(linear_layers._Linear, "apply", lambda *inputs: count.append(1) or original(*inputs))
    return count


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (4, ROWS // 4, WIDTH), (1, 2, ROWS // 2, WIDTH)])
def test_numbers_and_gradients(shape, has_bias, calls):
    inputs = [draw(*shape), draw(OUT, WIDTH), *([draw(OUT)] if has_bias else [])]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = linear_layers.linear(*inputs), F.linear(*exact)
    weight = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, weight)
    wanted = torch.autograd.grad(expected, exact, weight.double())
    assert len(calls) == 3
    for actual, exact_value in zip((y, *found), (expected, *wanted), strict=True):
        assert actual.shape == exact_value.shape
        assert (actual - exact_value).abs().max() <= 2e-6 * exact_value.abs().max()


def test_any_strides(calls):
    x = torch.randn(2 * WIDTH, ROWS).t()[:, ::2]
    weight = torch.randn(WIDTH, OUT).t()
    torch.testing.assert_close(linear_layers.linear(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-4)
    one_row = torch.randn(1, WIDTH).expand(ROWS, -1)
    torch.testing.assert_close(linear_layers.linear(one_row, weight), one_row @ weight.t(), rtol=1e-5, atol=1e-4)
    assert len(calls) == 2


@pytest.mark.parametrize("is_by_column", [True, False])
def test_a_large_factor_by_column(is_by_column, calls):
    """The gradient of a head's weight for one: oneDNN multiplies the other way round."""
    x = torch.randn(400, 300).t()
    weight = torch.randn(400, 60).t() if is_by_column else torch.randn(60, 400)
    y = linear_layers.linear(x, weight)
    assert y.is_contiguous()
    torch.testing.assert_close(y, x @ weight.t(), rtol=1e-5, atol=1e-4)
    assert len(calls) == 1


def test_second_derivatives(calls):
    x, weight = draw(ROWS, WIDTH), draw(OUT, WIDTH)

    def penalty(function, x, weight):
        (gradient,) = torch.autograd.grad(function(x, weight).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).mean(), (x, weight))

    found = penalty(linear_layers.linear, x, weight)
    wanted = penalty(F.linear, *(y.detach().double().requires_grad_() for y in (x, weight)))
    for actual, exact in zip(found, wanted, strict=True):
        assert (actual - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert len(calls) > 3


def test_transforms_and_compilers_see_pytorch(calls):
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(OUT, WIDTH)
    expected = F.linear(x, weight)
    torch.testing.assert_close(vmap(linear_layers.linear, (0, None))(x[None], weight)[0], expected)
    assert grad(lambda w: linear_layers.linear(x, w).sum())(weight).shape == weight.shape
    torch.testing.assert_close(jvp(lambda w: linear_layers.linear(x, w), (weight,), (weight,))[1], expected)
    compiled = torch.compile(linear_layers.linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_layers.linear(x, weight).dtype == torch.bfloat16
    for form in ("reference", "chunked", "triton"):
        with use_backend(form):
            assert torch.equal(linear_layers.linear(x, weight), expected)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_are_pytorchs(dtype, calls):
    x, weight = torch.randn(ROWS, WIDTH, dtype=dtype), torch.randn(OUT, WIDTH, dtype=dtype)
    assert torch.equal(linear_layers.linear(x, weight), F.linear(x, weight))
    assert torch.equal(linear_layers.linear(x[0].float(), weight.float()), F.linear(x[0].float(), weight.float()))
    assert not calls


def test_the_layer_trains_and_checkpoints(calls):
    layer, x = Linear(WIDTH, OUT), draw(ROWS, WIDTH)
    layer(x).pow(2).mean().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).pow(2).mean().backward()
    assert torch.equal(layer.weight.grad, expected)
    assert len(calls) == 3 + 4


def test_the_choice_has_a_reason(monkeypatch):
    assert linear_layers.choose_linear("cpu").backend == "onednn"
    assert "not on cuda" in linear_layers.choose_linear("cuda").reason
    assert "bfloat16" in linear_layers.choose_linear("cpu", torch.bfloat16).reason
    with use_backend("reference"):
        assert "asked for" in linear_layers.choose_linear("cpu").reason
    monkeypatch.setattr(linear_layers, "_outruns_mkl", lambda: False)
    assert linear_layers.choose_linear("cpu").backend == "torch"


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("width", "out"), [(1, 2**18), (17, 2**14 + 3), (512, 513), (2**18, 1)])
def test_a_single_token(width, out, has_bias, monkeypatch):
    rows = []
    original = linear_layers._multiply_row
    monkeypatch.setattr(linear_layers, "_multiply_row", lambda *inputs: rows.append(1) or original(*inputs))
    x, weight, bias = torch.randn(1, 1, width), torch.randn(out, width), torch.randn(out) if has_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    y = linear_layers.linear(x, weight, bias)
    assert y.shape == exact.shape
    assert (y - exact).abs().max() <= 1e-5 * exact.abs().max()
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(linear_layers.linear(x, weight, bias), y)
    torch.set_num_threads(threads)
    torch.testing.assert_close(linear_layers.linear(x.expand(2, 1, width)[:1], weight, bias), y)
    assert len(rows) == 3
    with use_backend("chunked"):
        linear_layers.linear(x, weight, bias)
    torch.testing.assert_close(linear_layers.linear(x, weight.t().contiguous().t(), bias), y, rtol=1e-4, atol=1e-4)
    assert linear_layers.linear(x, weight.clone().requires_grad_(), bias).grad_fn is not None
    assert len(rows) == 3 + (min(width, out) == 1)  # a vector is contiguous either way

"""Attention under a mask in C++: numbers and gradients of the equation, and PyTorch's where C++ cannot be called."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap

import zoo
from zoo.ops import native
from zoo.ops.dispatch import use_backend
from zoo.ops.masked_attention import choose_masked_attention, masked_attention

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}
SIZES = {  # b, t, s, h, g, d, masks
    "one key": (1, 8, 1, 1, 1, 1, 1),
    "tiles": (2, 64, 96, 2, 2, 32, 1),
    "remainders": (2, 33, 101, 6, 3, 33, 2),
    "one group": (3, 40, 70, 4, 1, 16, 3),
    "wide heads": (1, 9, 65, 1, 1, 130, 1),
}


def draw(b: int, t: int, s: int, h: int, g: int, d: int, masks: int, dtype=torch.float64) -> tuple[Tensor, ...]:
    """Queries, keys, values and a mask with tiles that nobody sees, others that are open, and queries that see none."""
    q, k, v = (torch.randn(b, n, heads, d, dtype=dtype) for n, heads in ((t, h), (s, g), (s, g)))
    visible = torch.rand(masks, t, s) > 0.5
    visible[:, : t // 2, s // 3 : s // 3 + 40] = False
    visible[:, t // 2 :, : s // 2 + 1] = True
    visible[:, t - 3] = False
    return q, k, v, visible


def by_equation(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, where 0/0 is 0."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1).nan_to_num(), v)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_equation(size, dtype, native_calls):
    torch.manual_seed(0)
    *inputs, visible = draw(*SIZES[size])
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = by_equation(*exact, visible)
    weight = torch.randn_like(expected)
    wanted = [expected, *torch.autograd.grad(expected, exact, weight, materialize_grads=True)]
    for kernels in ("auto", "chunked"):
        y = masked_attention(*inputs, visible, kernels)
        found = [y, *torch.autograd.grad(y, inputs, weight.to(dtype))]
        scale = max(1.0, *(x.abs().max() for x in wanted))
        for actual, value in zip(found, wanted, strict=True):
            assert actual.dtype == dtype
            assert (actual - value).abs().max() <= TOLERANCE[dtype] * scale
    assert native_calls == ["attention_forward", "attention_backward"]


def test_large_scores_stay_numbers():
    *inputs, visible = draw(1, 16, 40, 1, 1, 8, 1, torch.float32)
    inputs = [(100 * x).requires_grad_() for x in inputs]
    y = masked_attention(*inputs, visible)
    torch.testing.assert_close(y, by_equation(*inputs, visible), rtol=1e-4, atol=1e-3)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.sum(), inputs))


def test_what_nobody_sees_does_not_count():
    q, k, v, visible = draw(1, 40, 100, 2, 1, 16, 1)
    visible[:, :, 64:] = False
    expected = masked_attention(q, k, v, visible)
    k[:, 64:], v[:, 64:] = 1e9, -1e9
    assert torch.equal(masked_attention(q, k, v, visible), expected)


def test_any_strides():
    q, k, v, visible = draw(2, 20, 30, 4, 2, 8, 2)
    expected = masked_attention(q, k, v, visible)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    v, visible = v.repeat(1, 1, 1, 2)[..., :8], visible.mT.contiguous().mT
    assert torch.equal(masked_attention(q, k, v, visible), expected)


def test_threads_do_not_change_the_result():
    *inputs, visible = draw(3, 40, 70, 4, 2, 16, 1, torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            y = masked_attention(*inputs, visible)
            found.append([y, *torch.autograd.grad(y.sum(), inputs)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


@pytest.mark.parametrize("kernels", ["auto", "chunked"])
def test_shapes_that_do_not_agree_are_refused(kernels):
    q, k, v, visible = draw(3, 20, 30, 4, 2, 8, 1)
    wrong = {
        "v has shape": (q, k, v[:, 1:], visible),
        "k has shape": (q, k[1:], v[1:], visible),
        "visible has shape": (q, k, v, visible[:, :, 1:]),
        "2 masks for 3 rows": (q, k, v, visible.expand(2, -1, -1)),
        "2 groups do not divide 3 heads": (q[:, :, 1:], k, v, visible),
    }
    for message, inputs in wrong.items():
        with pytest.raises(ValueError, match=message):
            masked_attention(*inputs, kernels)


def test_no_rows():
    q, k, v, visible = draw(2, 20, 30, 4, 2, 8, 1)
    assert masked_attention(q[:0], k[:0], v[:0], visible).shape == (0, 20, 4, 8)


def test_second_derivatives():
    *inputs, visible = draw(1, 8, 5, 2, 1, 3, 1)
    inputs = [x.requires_grad_() for x in inputs]
    assert gradcheck(lambda *x: masked_attention(*x, visible), inputs)
    assert gradgradcheck(lambda *x: masked_attention(*x, visible), inputs)


def test_transforms_and_compilers_see_pytorch(native_calls):
    q, k, v, visible = draw(2, 20, 30, 4, 2, 8, 1, torch.float32)
    expected = by_equation(q, k, v, visible)
    torch.testing.assert_close(
        vmap(lambda *rows: masked_attention(*(x[None] for x in rows), visible)[0])(q, k, v), expected
    )
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the one with tangents
        torch.testing.assert_close(jvp(lambda v: masked_attention(q, k, v, visible), (v,), (v,))[1], expected)
    compiled = torch.compile(masked_attention, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, visible), expected)
    assert not native_calls


def test_the_form_asked_for_runs(native_calls, monkeypatch):
    q, k, v, visible = draw(2, 20, 30, 4, 2, 8, 1, torch.float32)
    for form in ("reference", "chunked", "triton"):
        with use_backend(form):
            masked_attention(q, k, v, visible)
        masked_attention(q, k, v, visible, kernels=form)
        assert choose_masked_attention("cpu", kernels=form) == ("torch", f"{form!r} was asked for")
    masked_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), visible)
    masked_attention(q[:, :1], k, v, visible[:, :1])  # a token: laying out the keys would cost more than it saves
    assert not native_calls
    assert choose_masked_attention("cpu") == ("native", "the kernel for cpu")
    assert choose_masked_attention("cpu", torch.bfloat16) == ("torch", "no C++ for bfloat16")
    assert choose_masked_attention("mps").backend == "torch"
    monkeypatch.setattr(native, "obstacle", lambda op: "no compiler")
    assert choose_masked_attention("cpu") == ("torch", "no compiler")


def test_a_model_runs_on_it(native_calls):
    model = zoo.create_model("titans-tiny", mixers=["titans_mac"])
    model(torch.ones(2, 12, dtype=torch.long), labels=torch.ones(2, 12, dtype=torch.long)).loss.backward()
    assert native_calls.count("attention_backward") == model.config.num_hidden_layers
    choices = {use.op: use.backend for use in zoo.kernel_report(model)}
    assert choices["masked_attention"] == "native"

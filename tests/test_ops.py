"""Every form of every op against its reference in float64: outputs, final state, gradients, at awkward lengths."""

import pytest
import torch
from torch.autograd import gradcheck

from zoo.ops.decay_attention import BACKENDS, decay_attention
from zoo.ops.dispatch import choose, use_backend

LENGTHS = [1, 2, 63, 64, 65, 200]
FAST = [name for name in BACKENDS if name != "reference"]
TOLERANCE = 1e-10


def inputs(t: int, b: int = 2, h: int = 3, d: int = 5, e: int = 7, log_decay_shape: str = "bth"):
    """Random q, k, v, log-decays from 0 down to -60, and a state, all needing gradients."""
    generator = torch.Generator().manual_seed(t)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    shape = {"bth": (b, t, h), "h": (h,)}[log_decay_shape]
    log_decay = -torch.rand(shape, dtype=torch.float64, generator=generator).pow(8) * 60
    tensors = [draw(b, t, h, d), draw(b, t, h, d), draw(b, t, h, e), log_decay, draw(b, h, d, e)]
    return [x.requires_grad_() for x in tensors]


def run(backend: str, tensors, **kwargs):
    """Outputs, final state and the gradients of a random function of both."""
    with use_backend(backend):
        y, state = decay_attention(*tensors, **kwargs)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in (y, state)]
    gradients = torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), tensors)
    return [y, state, *gradients]


def assert_equal(actual, expected):
    for index, (x, reference) in enumerate(zip(actual, expected, strict=True)):
        error = (x - reference).abs().max() / reference.abs().max().clamp(min=1e-30)
        assert error <= TOLERANCE, f"result {index}: {error:.1e}"


def random_mask(t: int) -> torch.Tensor:
    return torch.rand(2, t, generator=torch.Generator().manual_seed(t)) < 0.7


def random_segments(t: int) -> torch.Tensor:
    return (torch.rand(2, t, generator=torch.Generator().manual_seed(t)) < 0.1).cumsum(1)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("log_decay_shape", ["bth", "h"])
def test_equals_reference(backend, t, log_decay_shape):
    tensors = inputs(t, log_decay_shape=log_decay_shape)
    for kwargs in (
        {},
        {"mask": random_mask(t)},
        {"segments": random_segments(t)},
        {"mask": random_mask(t), "segments": random_segments(t)},
    ):
        assert_equal(run(backend, tensors, **kwargs), run("reference", tensors, **kwargs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("split", [1, 30, 64, 65, 199])
def test_split_and_carry(backend, split):
    tensors = inputs(200)
    segments = random_segments(200)
    q, k, v, log_decay, state = tensors
    with use_backend(backend):
        y, end = decay_attention(q, k, v, log_decay, state, segments=segments)
        parts = []
        cuts = [(slice(0, split), None), (slice(split, 200), segments[:, split] != segments[:, split - 1])]
        for part, starts_anew in cuts:
            if starts_anew is not None:  # the border between two calls is the caller's to watch
                state = state.masked_fill(starts_anew[:, None, None, None], 0.0)
            piece, state = decay_attention(
                q[:, part], k[:, part], v[:, part], log_decay[:, part], state, segments=segments[:, part]
            )
            parts.append(piece)
    assert_equal([torch.cat(parts, dim=1), state], [y, end])


def test_padding_is_not_read():
    """What stands at padding, NaN included, reaches neither outputs of real tokens, nor the state, nor gradients."""
    q, k, v, log_decay, state = inputs(70)
    mask = random_mask(70)
    expected, end = decay_attention(q, k, v, log_decay, state, mask=mask)
    dirty = [x.masked_fill(~mask[..., None, None], torch.nan) for x in (q, k, v)]
    y, dirty_end = decay_attention(*dirty, log_decay, state, mask=mask)
    assert torch.equal(dirty_end, end)
    assert torch.equal(y[mask], expected[mask])
    gradients = torch.autograd.grad(y[mask].sum(), (k, v))
    assert all((x[~mask] == 0).all() and x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("jump", [-1e3, -1e6, -torch.inf])
def test_sudden_decays_in_float32(backend, jump):
    """Now and then all is forgotten, in between next to nothing: float32 is as near to float64 as the reference is."""
    q, k, v, _, state = (x.detach() for x in inputs(300))
    log_decay = torch.full((2, 300, 3), -1e-2, dtype=torch.float64)
    log_decay[:, ::37] = jump
    with use_backend("reference"):
        expected = decay_attention(q, k, v, log_decay, state)[0]
    with use_backend(backend):
        y = decay_attention(*(x.float() for x in (q, k, v, log_decay, state)))[0]
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_reference_gradients():
    tensors = inputs(5, b=1, h=2, d=2, e=3)
    with use_backend("reference"):
        assert gradcheck(lambda *x: decay_attention(*x, segments=torch.tensor([[0, 0, 1, 1, 1]])), tensors)


def test_low_precision_inputs_keep_a_float32_state():
    tensors = [x.detach().bfloat16() for x in inputs(70)[:4]]
    y, state = decay_attention(*tensors, torch.zeros(2, 3, 5, 7))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_autocast_does_not_reach_the_state():
    tensors = [x.detach().float() for x in inputs(70)]
    expected = decay_attention(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = decay_attention(*tensors)
    assert torch.equal(y, expected[0])
    assert torch.equal(state, expected[1])


def test_shapes_that_do_not_agree_are_refused():
    q, k, v, log_decay, state = inputs(4)
    with pytest.raises(ValueError, match=r"state \(2, 3, 7, 5\)"):
        decay_attention(q, k, v, log_decay, state.mT)


def test_dispatch_says_what_it_does():
    assert choose("decay_attention", BACKENDS, "cpu").backend == "chunked"
    with use_backend("reference"):
        assert choose("decay_attention", BACKENDS, "cpu") == ("reference", "asked for by name")
        with pytest.raises(ValueError, match="'reference'"):
            choose("other", {"chunked": None}, "cpu")
    with pytest.raises(ValueError, match="did you mean chunked"), use_backend("chunkd"):
        pass

"""Decayed linear attention in C++ (`native.cpp`): float32 and float64."""

from torch import Tensor

from zoo.ops.native import call


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    bonus: Tensor | None,
    normalizer: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, end = v.new_empty(v.shape), state.new_empty(state.shape)
    q_n, end_normalizer = None, None
    if normalizer is not None:
        q_n, end_normalizer = q.new_empty(q.shape[:3]), normalizer.new_empty(normalizer.shape)
    inputs = (q, k, v, log_decay, state, bonus, normalizer, starts)
    call(*("decay_attention", "decay_attention_forward", q.dtype), *_sizes(*inputs), y, end, q_n, end_normalizer)
    if normalizer is None:
        return y, end, v.new_empty(0), state.new_empty(0)
    return y, end, q_n, end_normalizer


def backward(grads: list[Tensor], outputs: list[Tensor], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    found = [None if x is None else x.new_empty(x.shape) for x in inputs[:-1]]  # starts has none
    if inputs[6] is None:
        grads = [*grads[:2], None, None]
    call(*("decay_attention", "decay_attention_backward", inputs[0].dtype), *_sizes(*inputs), *grads, *found)
    return *found, None


def normalized_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, log_input: Tensor, state: tuple[Tensor, ...], *options: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """`normalized_decay_attention` of one token, for tensors of one dtype; `options` are its floor and eps."""
    inputs = [x.contiguous() for x in (q, k, v, log_decay, log_input, *state)]
    y, end = v.new_empty(v.shape), tuple(x.new_empty(x.shape) for x in state)
    b, _, h, d = q.shape
    call("decay_attention", "normalized_step", q.dtype, b, h, d, v.shape[-1], *inputs, *map(float, options), y, *end)
    return y, end


def _sizes(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *others: Tensor | None) -> tuple:
    """The sizes b t h d e, whether the decays are vectors, and the inputs."""
    return *q.shape, v.shape[-1], int(log_decay.dim() == 4), q, k, v, log_decay, *others

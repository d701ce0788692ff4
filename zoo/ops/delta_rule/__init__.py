"""The delta rule: a matrix state per head, of which a token takes back a part of what it reads before it writes.

    S_t = (diag(w_t) + b_t a_t^T) S_{t-1} + k_t v_t^T          y_t = S_t^T q_t          w_t = exp(log_decay_t)

S is (d e): keys to values. DeltaNet (Schlag et al., 2021, arXiv:2102.11174; Yang et al., 2024, arXiv:2406.06484),
Gated DeltaNet (Yang et al., 2024, arXiv:2412.06464), Kimi Delta Attention (Kimi Team, 2025, arXiv:2510.26692), RWKV-7
(Peng et al., 2025, arXiv:2503.14456).

Letters: b batch, t tokens, h heads, d key, e value.
"""

import torch
from torch import Tensor

from zoo.ops.checks import check_shapes
from zoo.ops.delta_rule.chunked import delta_rule_chunked
from zoo.ops.delta_rule.reference import delta_rule_reference
from zoo.ops.op import Op
from zoo.ops.packing import fill_padding, segment_starts


def _empty_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """With `a` and `b` the general form, with `beta` and a `log_decay` (b t h) the gated one."""
    shapes = {"q": "b t h d", "k": "b t h d", "v": "b t h e", "state": "b h d e", "a": "b t h d", "b": "b t h d"}
    shapes["log_decay"] = "b t h d" if log_decay.dim() == 4 and beta is None else "b t h"
    shapes |= {"beta": "b t h", "starts": "b t"}
    check_shapes(
        *("delta_rule", shapes), q=q, k=k, v=v, state=state, a=a, b=b, log_decay=log_decay, beta=beta, starts=starts
    )
    if (a is None) != (b is None) or (a is None) == (beta is None):
        raise ValueError("delta_rule wants a and b, or beta alone")
    return v.new_empty(v.shape), state.new_empty(state.shape)


OP = Op(
    "delta_rule",
    _empty_outputs,
    reference=delta_rule_reference,
    chunked=delta_rule_chunked,
    kernels=("native", "triton"),
)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence whose transition is diagonal plus rank one; differentiable in every floating input.

    RWKV-7 (arXiv:2503.14456): `q` is the receptance, `a = -kappa` and `b = kappa * iclr`, with kappa the removal key at
    length 1 and iclr the in-context learning rate, and there is a `log_decay` for each key channel.

    Whether the state stays bounded is the caller's care: it does where diag(w) + b a^T lengthens no vector.

    Args:
        q: what reads the state after the write, (b t h d). Any scale is the caller's.
        k: where it is written to, (b t h d).
        v: what is written, (b t h e).
        a: what reads the state before the write, (b t h d).
        b: where what `a` read is added, (b t h d).
        log_decay: natural log of the decay, at most 0, minus infinity allowed: one a head, (b t h), or one a key
            channel, (b t h d).
        state: S before the first token, (b h d e), in float32 (float64 where the inputs are).
        mask: (b t), False at padding: the state stays as it is there and the output is 0. None: no padding.
        segments: (b t) ids of the documents packed in a row; each starts from a state of 0, but the row's first, which
            continues `state`. None: one document a row. A NaN or an infinity in one may reach the others.
        kernels: which form runs (`zoo.ops.dispatch`).

    Returns:
        y, (b t h e) in the dtype of `v`, and S after the last token, (b h d e), in the dtype of the state.

    Raises:
        ValueError: if the shapes do not agree, or the form asked for cannot run.
    """
    dtype = v.dtype
    q, k, v, a, b, log_decay = fill_padding(mask, 0.0, q, k, v, a, b, log_decay)
    y, state = OP(q, k, v, log_decay, state, a, b, None, segment_starts(segments, mask, q), kernels=kernels)
    (y,) = fill_padding(mask, 0.0, y)
    return y.to(dtype), state


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the delta rule proper: what the key reads moves towards the value by the part beta; differentiable.

        S_t = (I - beta_t k_t k_t^T) diag(w_t) S_{t-1} + beta_t k_t v_t^T          y_t = S_t^T q_t

    Gated DeltaNet (arXiv:2412.06464, eq. 10) has a `log_decay` a head; DeltaNet (arXiv:2406.06484) has none; Kimi Delta
    Attention (arXiv:2510.26692, eq. 1) has one for each key channel and is computed in the general form, with
    `a = -w k`, `b = beta k` and `beta k` to write to. Keys are meant to have length 1; beta lies between 0 and 1, or 2
    where negative eigenvalues are wanted (Grazzi et al., 2024, arXiv:2411.12537).

    Args:
        q, k: queries and keys, (b t h d). Any scale, and normalising the keys, is the caller's.
        v: values, (b t h e).
        beta: how much of the old value is replaced, (b t h).
        log_decay: natural log of the decay, at most 0, minus infinity allowed: (b t h), (b t h d), or None for none.
        state, mask, segments, kernels: as in `delta_rule`.

    Returns:
        y, (b t h e) in the dtype of `v`, and S after the last token, (b h d e), in the dtype of the state.

    Raises:
        ValueError: if the shapes do not agree, or the form asked for cannot run.
    """
    if log_decay is None:
        log_decay = torch.zeros_like(beta)
    by_channel = log_decay.dim() == 4
    shapes = {"k": "b t h d", "v": "b t h e", "beta": "b t h", "log_decay": "b t h d" if by_channel else "b t h"}
    check_shapes("gated_delta_rule", shapes, k=k, v=v, beta=beta, log_decay=log_decay)
    dtype = v.dtype
    q, k, v, beta, log_decay = fill_padding(mask, 0.0, q, k, v, beta, log_decay)
    a = b = None
    if by_channel:
        key = k.to(state.dtype)
        a, b = -log_decay.exp() * key, beta[..., None] * key
        k, beta = b, None
    y, state = OP(q, k, v, log_decay, state, a, b, beta, segment_starts(segments, mask, q), kernels=kernels)
    (y,) = fill_padding(mask, 0.0, y)
    return y.to(dtype), state

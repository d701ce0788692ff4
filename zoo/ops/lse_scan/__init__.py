"""Log-sum-exp scan: every channel a weighted average of what it has seen, with weights given as logarithms.

    num_t = exp(w_t) num_{t-1} + exp(k_t) v_t
    den_t = exp(w_t) den_{t-1} + exp(k_t)          y_t = num_t / den_t

Aaren (Feng et al., 2024, arXiv:2405.13956; w = 0) and RWKV-4 (Peng et al., 2023, arXiv:2305.13048, eq. 16), which reads
before it writes and gives its own token the weight exp(u + k_t).

Weights of any size are carried as `exp(maximum)` times what `num` and `den` hold. `maximum` is a gauge: it changes no
average, so no form carries a gradient through it.
"""

import torch
from torch import Tensor

from zoo.ops.checks import check_shapes
from zoo.ops.lse_scan.chunked import lse_scan_chunked
from zoo.ops.lse_scan.reference import EMPTY, lse_scan_reference
from zoo.ops.op import Op
from zoo.ops.packing import fill_padding, segment_starts


def _empty_outputs(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    num: Tensor,
    den: Tensor,
    maximum: Tensor,
    bonus: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = {"k": "b t d", "v": "b t d", "num": "b d", "den": "b d", "maximum": "b d", "bonus": "d", "starts": "b t"}
    shapes["log_decay"] = "d" if log_decay.dim() == 1 else "b t d"
    tensors = {"k": k, "v": v, "num": num, "den": den, "maximum": maximum, "bonus": bonus, "starts": starts}
    check_shapes("lse_scan", shapes, log_decay=log_decay, **tensors)
    return num.new_empty(v.shape), *(num.new_empty(num.shape) for _ in range(3))


OP = Op(
    "lse_scan",
    _empty_outputs,
    reference=lse_scan_reference,
    chunked=lse_scan_chunked,
    states=("num", "den", "maximum"),
    kernels=("native", "triton"),
)


def lse_scan(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    bonus: Tensor | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Run the weighted averages over a batch of sequences; differentiable in all tensors but the maximum of the state.

    Args:
        k: the logarithm of each token's weight, (b t d), of any size; -inf is a weight of 0.
        v: what is averaged, (b t d).
        log_decay: w, the logarithm of what is kept of earlier weights at each token, <= 0: (d) or (b t d).
        state: num, den, maximum before the first token, (b d) each, in float32 (float64 where the inputs are). A
            sequence starts with num = den = 0 and a maximum of -inf or -1e38.
        mask: (b t), False at padding: the state stays as it is there and the output is 0. None: no padding.
        segments: (b t) ids of the documents packed in a row; each starts with the state of a new sequence, but the
            row's first, which continues `state`. None: one document a row. A NaN or an infinity in one may reach the
            others.
        bonus: u, (d): a token reads the state before it decays and before it writes, and itself with the weight
            exp(u + k_t). None: it reads after it has written.
        kernels: which form runs (`zoo.ops.dispatch`).

    Returns:
        The average at every token, (b t d), 0 where no weight has been seen, and the state after the last one, in the
        dtype of the state. It comes with den = 1, or 0 where no weight has been seen, however the sequence was cut.

    Raises:
        ValueError: if the shapes do not agree, or the form asked for cannot run.
    """
    num, den, maximum = state
    if mask is not None:
        (k,), (v,) = fill_padding(mask, -torch.inf, k), fill_padding(mask, 0.0, v)
        log_decay = torch.where(mask[..., None], log_decay, 0.0)
    starts = segment_starts(segments, mask, k)
    maximum = maximum.detach().clamp(min=EMPTY)
    y, num, den, maximum = OP(k, v, log_decay, num, den, maximum, bonus, starts, kernels=kernels)
    return *fill_padding(mask, 0.0, y), (num, den, maximum.detach())

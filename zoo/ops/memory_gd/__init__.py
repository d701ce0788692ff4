"""Neural memory: a small network that learns while it reads, by gradient descent with momentum and decay.

    S_t = momentum_t S_{t-1} - step_t grad |M(k_t) - v_t|^2      M_t = (1 - decay_t) M_{t-1} + S_t      y_t = M_t(q_t)

Titans (Behrouz et al., 2025, arXiv:2501.00663, eq. 8-15): M is the memory, a matrix or a network of several layers, S
its surprise. The gradient is taken at the anchor, the weights as they were at the start of the token's chunk (section
3.2), so the length of a chunk belongs to the model and changes what it computes. With momentum and decay 0 it is the
test-time training of Sun et al. (2024, arXiv:2407.04620), but for the norm and the residual in their memories.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.checks import check_shapes
from zoo.ops.dispatch import requested
from zoo.ops.memory_gd.chunked import memory_gd_chunked
from zoo.ops.memory_gd.layers import join_layers, split_layers
from zoo.ops.memory_gd.reference import memory_gd_reference
from zoo.ops.op import Op, compute_dtype
from zoo.ops.packing import check_mask, fill_padding, lay_out_chunks, segment_starts

_WIDEST = {"native": 32, "triton": 16}  # slots of a chunk; a longer one takes several pieces, which share its anchor
_WIDEST_ELSEWHERE = 64


class MemoryState(NamedTuple):
    """A memory between two tokens. Every tensor has the rows of the batch first.

    weights: M, (b h w): the matrices of its layers one after the other, each row by row.
    surprise: S, (b h w).
    anchor: the weights at the start of the open chunk, (b h w), where gradients are taken. Read only in an open chunk.
    position: how many tokens the open chunk has, (b), int64; 0 where the next token opens a chunk. As an input also
        None: 0 in every row, which is known before anything is computed, and so costs less.
    """

    weights: Tensor
    surprise: Tensor
    anchor: Tensor
    position: Tensor | None


def initial_state(initial: tuple[Tensor, ...], batch: int) -> MemoryState:
    """The state at the start of a sequence: the initial weights, no surprise.

    Args:
        initial: the matrix (h d e) of a linear memory, or those of several layers: (h d f), (h f f) ..., (h f e).
        batch: rows of the batch.

    Raises:
        ValueError: if there is no matrix, or their shapes do not agree.
    """
    shapes = _initial_shapes(initial)
    check_shapes("memory_gd", shapes, **dict(zip(shapes, initial, strict=True)))
    weights = _join_initial(initial).expand(batch, -1, -1)
    return MemoryState(weights, torch.zeros_like(weights), weights, weights.new_zeros(batch, dtype=torch.int64))


def _join_initial(initial: tuple[Tensor, ...]) -> Tensor:
    """-> (h w), in the dtype of the state."""
    return join_layers(tuple(layer.to(compute_dtype(*initial)) for layer in initial))


def _initial_shapes(initial: tuple[Tensor, ...]) -> dict[str, str]:
    if not initial:
        raise ValueError("memory_gd: a memory of 0 layers, wanted at least 1")
    sizes = ["d", *["f"] * (len(initial) - 1), "e"]
    return {f"initial[{i}]": f"h {rows} {columns}" for i, (rows, columns) in enumerate(itertools.pairwise(sizes))}


_SHAPES = {
    "q": "b t h d",
    "k": "b t h d",
    "v": "b t h e",
    "step": "b t h",
    "momentum": "b t h",
    "decay": "b t h",
    "weights": "b h w",
    "surprise": "b h w",
    "anchor": "b h w",
}


def _empty_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    momentum: Tensor,
    decay: Tensor,
    weights: Tensor,
    surprise: Tensor,
    anchor: Tensor,
    initial: Tensor | None,
    real: Tensor | None,
    refresh: Tensor | None,
    reset: Tensor | None,
    hidden: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens lie in slots, `width` of them a chunk or a part of one. `real` (b t) says which slots hold a token,
    `refresh` (b n) where the anchor moves to the weights, `reset` (b n) where the memory begins anew. None: everywhere,
    everywhere, nowhere."""
    shapes = _SHAPES | {"initial": "h w", "real": "b t", "refresh": "b n", "reset": "b n"}
    tensors = (q, k, v, step, momentum, decay, weights, surprise, anchor, initial, real, refresh, reset)
    sizes = check_shapes("memory_gd", shapes, **dict(zip(shapes, tensors, strict=True)))
    split_layers(weights, sizes["d"], sizes["e"], hidden)  # raises where there are too many or too few
    return weights.new_empty(v.shape), *(weights.new_empty(weights.shape) for _ in range(3))


OP = Op(
    "memory_gd",
    _empty_outputs,
    reference=memory_gd_reference,
    chunked=memory_gd_chunked,
    states=("weights", "surprise", "anchor", "initial"),
    kernels=("native", "triton"),
    compiled_whole=True,
)


def _form_of_deep_memory(asked: str) -> str:
    """Where two layers have a Triton kernel and more have none; `asked` is a name of `zoo.ops.dispatch.NAMES`."""
    if asked != "auto":
        raise ValueError(f"memory_gd: kernels={asked!r}, but Triton has memories of one or two layers only")
    return "chunked"


def memory_gd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    momentum: Tensor,
    decay: Tensor,
    state: MemoryState | None,
    initial: tuple[Tensor, ...],
    chunk_size: int,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    padding_behind: bool = False,
    kernels: str = "auto",
) -> tuple[Tensor, MemoryState]:
    """Let the memory learn and read it, token by token; differentiable in every floating input.

    Chunks are counted from the start of a document; padding does not count. A sequence cut into calls anywhere gives
    the same result. Where documents are packed, shapes depend on their lengths; a compiled graph has room for so many
    documents only that they have a chunk each on average, and ends in an error where there are more.

    Args:
        q, k: queries and keys, (b t h d), normalised by the caller.
        v: what the memory shall answer to the keys, (b t h e).
        step: the learning rate of each token, (b t h); the loss is a sum over the e features.
        momentum: what is kept of the surprise, (b t h), in [0, 1].
        decay: what is forgotten of the weights, (b t h), in [0, 1].
        state: of the memory before the first token, in float32 (float64 for float64 inputs); None: `initial`.
        initial: the weights at the start of a document, the matrix (h d e) of a linear memory M(k) = k W, or those of
            M(k) = silu(k W1) W2, (h d f) and (h f e), or of more layers, those between (h f f). Triton has one and two.
        chunk_size: tokens that share an anchor.
        mask: (b t), False at padding: nothing is learned there and the output is 0. None: no padding.
        segments: (b t) ids of the documents packed in a row; each starts from `initial`, no surprise and a new chunk,
            but the row's first, which continues `state`. None: one document a row.
        padding_behind: whether padding stands behind the tokens of each row only, which spares laying them out where
            the state has no position. A row of padding only then keeps the anchor it has.
        kernels: which form runs (`zoo.ops.dispatch`).

    Returns:
        The outputs, (b t h e) in the dtype of `v`, and the state after the last token.

    Raises:
        ValueError: if the shapes do not agree, a memory has no layer, `chunk_size` is less than 1, or the form asked
            for cannot run.
    """
    if chunk_size < 1:
        raise ValueError(f"memory_gd: chunk_size is {chunk_size}, wanted at least 1")
    sequences = (q, k, v, step, momentum, decay)
    asked = requested(kernels)
    kernels = OP.form_for(*sequences, *initial, *(state or ()), mask, segments, kernels=kernels)
    if kernels == "triton" and len(initial) > 2:
        kernels = _form_of_deep_memory(asked)
    state = initial_state(initial, len(q))._replace(position=None) if state is None else state
    weights, surprise, anchor, position = state
    shapes = _SHAPES | _initial_shapes(initial) | {"position": "b", "mask": "b t", "segments": "b t"}
    tensors = (*sequences, weights, surprise, anchor, *initial, position, mask, segments)
    sizes = check_shapes("memory_gd", shapes, **dict(zip(shapes, tensors, strict=True)))
    if mask is not None:
        check_mask(mask, q)
    b, t = sizes["b"], sizes["t"]
    pieces = -(-chunk_size // _WIDEST.get(kernels, _WIDEST_ELSEWHERE))
    width = min(t, -(-chunk_size // pieces))
    layout = reset = None
    at_border = position is None
    if at_border:
        position = torch.zeros(b, dtype=torch.int64, device=q.device)
    if t == 1:
        real, refresh = mask, None if at_border else position[:, None] == 0
        sequences = fill_padding(mask, 0.0, *sequences)
        position = (position + (1 if mask is None else mask[:, 0])) % chunk_size
    elif (
        at_border
        and segments is None
        and (mask is None or padding_behind)
        and (t <= chunk_size or chunk_size % width == 0)
    ):
        runs = torch.arange(-(-t // width), device=q.device)
        real, refresh = mask, None
        if chunk_size > width:
            refresh = (runs % -(-chunk_size // width) == 0).expand(b, -1)
        if mask is not None:
            refresh = mask[:, ::width] if refresh is None else refresh & mask[:, ::width]
            sequences = fill_padding(mask, 0.0, *sequences)
        position = (torch.full_like(position, t) if mask is None else mask.sum(1)) % chunk_size
    else:
        everywhere = torch.ones(b, t, dtype=torch.bool, device=q.device) if mask is None else mask
        starts = segment_starts(segments, mask, q)
        layout = lay_out_chunks(everywhere, starts, None if at_border else position, chunk_size, width)
        sequences = layout.into_slots(*sequences)
        real, refresh, reset, position = layout.real, layout.opens, layout.restarts, layout.position

    hidden = sizes.get("f", 0)
    y, *state = OP(
        *sequences,
        *(weights, surprise, anchor, None if reset is None else _join_initial(initial)),
        *(real, refresh, reset, hidden, width),
        kernels=kernels,
    )
    (y,) = fill_padding(mask, 0.0, y) if layout is None else (layout.out_of_slots(y),)
    return y.to(v.dtype), MemoryState(*state, position)

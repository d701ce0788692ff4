"""The backward of the gated delta rule in chunks, in Triton.

With the letters of `triton_gated.py` and the gradients dY and dS' of what a chunk gives,

    dX = T^T (P^T dY + until K dS')                 dS = decay dS' + Q^T (since dY) - K^T (since beta dX)

where X = beta (V - since K S) is what T is applied to. `_state_grads` walks back and leaves dX and each dS';
`_pair_grads` and `_key_grads` make of them, all chunks at once,

    d(Q K^T) = G * dY U^T      d(K K^T) = strictly lower part of -beta (G * dX U^T)        dV = beta dX
    dQ = since dY S^T + d(Q K^T) K
    dK = until U dS'^T - since beta dX S^T + d(Q K^T)^T Q + (d(K K^T) + d(K K^T)^T) K

and the gradients of beta and of the decays on the way: what goes through a decay goes to all the log-decays in it.

Letters: b batch, t tokens, h heads, d keys, e values, n chunks, c token in a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.delta_rule.triton_chunks import (
    Tiles,
    load_decays,
    load_decays_between,
    load_key_products,
    square,
)
from zoo.ops.delta_rule.triton_gated import recur
from zoo.ops.tiles import (
    load_rows,
    load_scalars,
    locate_chunk,
    matrix_rows,
    store_rows,
    store_scalars,
    token_rows,
)


def backward_gated(
    grad_y: Tensor,
    grad_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    beta: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, log_decay, state and beta."""
    tiles = Tiles.choose(q, k, v)
    inverses, reads, u, states = recur(q, k, v, log_decay, state, beta, starts, None, tiles)

    grad_x, grad_states, grad_state = torch.empty_like(u), torch.empty_like(states), torch.empty_like(state)
    tiles.launch_heads(
        *(_state_grads, q, k, log_decay, beta, starts, inverses, reads),
        *(grad_y, grad_end, grad_x, grad_states, grad_state),
        heavy=True,
    )
    grad_inverses, grad_reads, grad_v = torch.empty_like(inverses), torch.empty_like(reads), torch.empty_like(v)
    blocks = tiles.blocks(k)
    parts = k.new_empty(2, 1 + blocks, *k.shape[:3], dtype=torch.float32)  # of the gradients of log_decay and beta
    tiles.launch_chunks(
        *(_pair_grads, 1, q, k, v, log_decay, beta, starts, u),
        *(grad_y, grad_x, grad_inverses, grad_reads, grad_v, *parts[:, 0]),
        heavy=True,
    )
    grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
    tiles.launch_chunks(
        *(_key_grads, blocks, q, k, log_decay, beta, starts, u, states),
        *(grad_y, grad_x, grad_states, grad_inverses, grad_reads, grad_q, grad_k, *parts[:, 1:], parts[0, 0].numel()),
        heavy=True,
    )
    grad_log_decay, grad_beta = (x.sum(0).to(y.dtype) for x, y in zip(parts, (log_decay, beta), strict=True))
    return grad_q, grad_k, grad_v, grad_log_decay, grad_state, grad_beta


@triton.jit
def _state_grads(
    q,
    k,
    log_decay,
    beta,
    starts,
    inverses,
    reads,
    grad_y,
    grad_end,
    grad_x,
    grad_states,
    grad_state,
    t,
    h,
    d,
    e,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the last chunk to the first: dX and the gradient of the state behind it."""
    sequence, chunks = tl.program_id(0).to(tl.int64), tl.cdiv(t, CHUNK)
    key, value = tl.arange(0, KEYS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype = grad_x.dtype.element_ty
    carry = load_rows(grad_end, matrix_rows(sequence, key, d), value, e).to(tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step
        program = sequence * chunks + chunk
        tokens = token_rows(sequence, chunk * CHUNK + tl.arange(0, CHUNK), t, h)
        factor = carry.to(dtype)
        store_rows(grad_states, matrix_rows(program, key, d), value, e, factor)
        tile_k = load_rows(k, tokens, key, d).to(dtype)
        tile_y = load_rows(grad_y, tokens, value, e).to(dtype)
        since_start, until_end, decay = load_decays(log_decay, starts, sequence, chunk, t, h, CHUNK)
        tile_u = tl.dot(tile_k, factor, input_precision=PRECISION) * until_end[:, None]
        read = tl.load(square(reads, program, CHUNK))
        tile_u = tl.dot(tl.trans(read), tile_y, tile_u, input_precision=PRECISION)
        inverse = tl.load(square(inverses, program, CHUNK))
        tile_x = tl.dot(tl.trans(inverse), tile_u.to(dtype), input_precision=PRECISION)
        store_rows(grad_x, tokens, value, e, tile_x)
        tile_q = load_rows(q, tokens, key, d).to(dtype)
        seen = (tile_y * since_start[:, None]).to(dtype)
        known = (tile_x * (-load_scalars(beta, tokens) * since_start)[:, None]).to(dtype)
        carry = tl.dot(tl.trans(tile_q), seen, carry * decay, input_precision=PRECISION)
        carry = tl.dot(tl.trans(tile_k), known, carry, input_precision=PRECISION)
    store_rows(grad_state, matrix_rows(sequence, key, d), value, e, carry)


@triton.jit
def _pair_grads(
    q,
    k,
    v,
    log_decay,
    beta,
    starts,
    u,
    grad_y,
    grad_x,
    grad_inverses,
    grad_reads,
    grad_v,
    grad_log_decay,
    grad_beta,
    t,
    h,
    d,
    e,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients through the pairs of tokens of a chunk: those of K K^T and Q K^T, of v, and a part of the decays'."""
    program, sequence, chunk = locate_chunk(tl.cdiv(t, CHUNK))
    at = tl.arange(0, CHUNK)
    later = at[:, None] > at[None, :]
    tokens = token_rows(sequence, chunk * CHUNK + at, t, h)
    rate = load_scalars(beta, tokens)
    dtype = u.dtype.element_ty
    grad_rate = tl.zeros((CHUNK,), tl.float32)
    grad_kk, grad_qk = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    for first in range(0, e, BLOCK):
        value = first + tl.arange(0, BLOCK)
        tile_u = tl.trans(load_rows(u, tokens, value, e))
        tile_x = load_rows(grad_x, tokens, value, e)
        grad_kk = tl.dot(tile_x, tile_u, grad_kk, input_precision=PRECISION)
        tile_y = load_rows(grad_y, tokens, value, e).to(dtype)
        grad_qk = tl.dot(tile_y, tile_u, grad_qk, input_precision=PRECISION)
        tile_x = tile_x.to(tl.float32)
        grad_rate += tl.sum(tile_x * load_rows(v, tokens, value, e), 1)
        store_rows(grad_v, tokens, value, e, tile_x * rate[:, None])
    kk, qk = load_key_products(q, k, tokens, d, dtype, CHUNK, BLOCK, PRECISION)
    decay = load_decays_between(log_decay, starts, sequence, chunk, t, h, CHUNK)
    grad_qk *= decay
    grad_kk = tl.where(later, -grad_kk * decay, 0.0)
    tl.store(square(grad_reads, program, CHUNK), grad_qk.to(dtype))
    tl.store(square(grad_inverses, program, CHUNK), (grad_kk * rate[:, None]).to(dtype))
    kk *= grad_kk
    store_scalars(grad_beta, tokens, grad_rate + tl.sum(kk, 1))
    # a pair's decay spans the tokens behind its write up to its read
    across = tl.cumsum(grad_qk * qk + kk * rate[:, None], 0, reverse=True)
    store_scalars(grad_log_decay, tokens, tl.sum(tl.where(later, across, 0.0), 1))


@triton.jit
def _key_grads(
    q,
    k,
    log_decay,
    beta,
    starts,
    u,
    states,
    grad_y,
    grad_x,
    grad_states,
    grad_inverses,
    grad_reads,
    grad_q,
    grad_k,
    grad_log_decay,
    grad_beta,
    part,
    t,
    h,
    d,
    e,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of a block of q and k of a chunk, and through the states the other part of the decays'."""
    program, sequence, chunk = locate_chunk(tl.cdiv(t, CHUNK))
    at = tl.arange(0, CHUNK)
    tokens = token_rows(sequence, chunk * CHUNK + at, t, h)
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keys = matrix_rows(program, key, d)
    dtype = u.dtype.element_ty
    seen = tl.zeros((CHUNK, BLOCK), tl.float32)
    known = tl.zeros((CHUNK, BLOCK), tl.float32)
    written = tl.zeros((CHUNK, BLOCK), tl.float32)
    carried = 0.0
    for first in range(0, e, BLOCK):
        value = first + tl.arange(0, BLOCK)
        before, behind = load_rows(states, keys, value, e), load_rows(grad_states, keys, value, e)
        tile_y = load_rows(grad_y, tokens, value, e).to(dtype)
        seen = tl.dot(tile_y, tl.trans(before), seen, input_precision=PRECISION)
        known = tl.dot(load_rows(grad_x, tokens, value, e), tl.trans(before), known, input_precision=PRECISION)
        written = tl.dot(load_rows(u, tokens, value, e), tl.trans(behind), written, input_precision=PRECISION)
        carried += tl.sum(before.to(tl.float32) * behind.to(tl.float32))
    since_start, until_end, decay = load_decays(log_decay, starts, sequence, chunk, t, h, CHUNK)
    rate = load_scalars(beta, tokens)
    seen *= since_start[:, None]
    known *= since_start[:, None]
    written *= until_end[:, None]
    tile_q, tile_k = load_rows(q, tokens, key, d).to(dtype), load_rows(k, tokens, key, d).to(dtype)
    # decays since the start reach from it to the token, those until the end from behind the token to it
    rates = tl.sum(tile_k * known, 1)
    from_start, to_end = tl.sum(tile_q * seen, 1) - rate * rates, tl.sum(tile_k * written, 1)
    across = tl.where(at[:, None] <= at[None, :], from_start[None, :], to_end[None, :])
    block = tl.program_id(1).to(tl.int64) * part
    store_scalars(grad_log_decay + block, tokens, tl.sum(across, 1) + decay * carried)
    store_scalars(grad_beta + block, tokens, -rates)

    grad_qk, grad_kk = tl.load(square(grad_reads, program, CHUNK)), tl.load(square(grad_inverses, program, CHUNK))
    store_rows(grad_q, tokens, key, d, tl.dot(grad_qk, tile_k, seen, input_precision=PRECISION))
    written -= known * rate[:, None]
    written = tl.dot(tl.trans(grad_qk), tile_q, written, input_precision=PRECISION)
    written = tl.dot(grad_kk, tile_k, written, input_precision=PRECISION)
    written = tl.dot(tl.trans(grad_kk), tile_k, written, input_precision=PRECISION)
    store_rows(grad_k, tokens, key, d, written)

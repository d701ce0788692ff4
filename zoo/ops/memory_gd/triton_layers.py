"""A layer of the neural memory in a Triton kernel: what a chunk reads and writes, and the gradients of both.

A layer with the weights M and the surprise S has, in a chunk, the inputs x_c of its queries, and X, E (c in), (c out),
the two sides of its gradients at the keys. With G, b, a the coefficients of each token (`load_read_gates`) and g, g',
p, w, p' those of what the chunk leaves (`load_write_gates`), its outputs and what it leaves are

    y = a (x M) + b (x S) - P E      P = G * (x X^T)
    M' = w M + p S - (g X)^T E       S' = p' S - (g' X)^T E

and with the gradients dy, dM' and dS', the gradients of E and of X by what it writes, those of x by M and S, and those
of M and S, are

    dE = -g (X dM') - g' (X dS')     dX = -g (E dM'^T) - g' (E dS'^T)     dx = a (dy M^T) + b (dy S^T)
    dM = w dM' + x^T (a dy)          dS = p dM' + p' dS' + x^T (b dy)

Letters: c slot in the chunk, d|f in, f|e out units of a layer.
"""

import triton
import triton.language as tl


@triton.jit
def dot(x, y, dtype: tl.constexpr):
    """A product in the precision of the inputs, summed in float32."""
    return tl.dot(x.to(dtype), y.to(dtype), input_precision="ieee")


@triton.jit
def silu(x):
    """silu(x), its derivative and its second derivative."""
    gate = tl.sigmoid(x)
    fall = gate * (1 - gate)
    return x * gate, gate + x * fall, fall * (2 + x * (1 - 2 * gate))


@triton.jit
def read(x, weight, past, attention, errors, gates, dtype: tl.constexpr):
    """y (c out), given P (c c)."""
    _, of_past, of_weight = gates
    y = of_weight[:, None] * dot(x, weight, dtype) + of_past[:, None] * dot(x, past, dtype)
    return y - dot(attention, errors, dtype)


@triton.jit
def read_backward(x, grad, weight, past, gates, dtype: tl.constexpr):
    """The gradients of x (c in), b and a (c)."""
    _, of_past, of_weight = gates
    from_weight, from_past = dot(grad, tl.trans(weight), dtype), dot(grad, tl.trans(past), dtype)
    grad_x = of_weight[:, None] * from_weight + of_past[:, None] * from_past
    return grad_x, tl.sum(x * from_past, 1), tl.sum(x * from_weight, 1)


@triton.jit
def write(weight, past, inputs, errors, gates, dtype: tl.constexpr):
    """M' and S' (in out)."""
    of_gradients, past_of_gradients, of_past, of_weight, past_of_past = gates
    after = of_weight * weight + of_past * past - dot(tl.trans(inputs * of_gradients[:, None]), errors, dtype)
    return after, past_of_past * past - dot(tl.trans(inputs * past_of_gradients[:, None]), errors, dtype)


@triton.jit
def write_backward(x, grad_weight, grad_past, gates, dtype: tl.constexpr):
    """The gradient of E where x is X, that of X where x is E and the others are transposed."""
    of_gradients, past_of_gradients, _, _, _ = gates
    from_past = past_of_gradients[:, None] * dot(x, grad_past, dtype)
    return -of_gradients[:, None] * dot(x, grad_weight, dtype) - from_past


@triton.jit
def gates_backward(grads, inputs, errors, weight, past, grad_weight, grad_past, dtype: tl.constexpr):
    """The gradients of g, g' (c), p, w, p', added to those before."""
    of_gradients, past_of_gradients, of_past, of_weight, past_of_past = grads
    of_gradients -= tl.sum(dot(inputs, grad_weight, dtype) * errors, 1)
    past_of_gradients -= tl.sum(dot(inputs, grad_past, dtype) * errors, 1)
    of_past += tl.sum(tl.sum(past * grad_weight, 1), 0)
    of_weight += tl.sum(tl.sum(weight * grad_weight, 1), 0)
    past_of_past += tl.sum(tl.sum(past * grad_past, 1), 0)
    return of_gradients, past_of_gradients, of_past, of_weight, past_of_past


@triton.jit
def state_backward(x, grad, grad_weight, grad_past, reads, writes, dtype: tl.constexpr):
    """dM and dS (in out)."""
    _, read_of_past, read_of_weight = reads
    _, _, of_past, of_weight, past_of_past = writes
    x = tl.trans(x)
    before = of_past * grad_weight + past_of_past * grad_past + dot(x, read_of_past[:, None] * grad, dtype)
    return of_weight * grad_weight + dot(x, read_of_weight[:, None] * grad, dtype), before


@triton.jit
def hand_on(weight, past, point, opens, restarts):
    """The gradients of weights, surprise and anchor in a chunk -> those as the chunk before left them, and of the
    initial weights."""
    weight += tl.where(opens, point, 0.0)
    initial = tl.where(restarts, weight, 0.0)
    return tl.where(restarts, 0.0, weight), tl.where(restarts, 0.0, past), tl.where(opens, 0.0, point), initial

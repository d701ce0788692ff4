"""The associative memory of ARMT (Rodkin et al., 2024, arXiv:2407.04841): reading, writing, and where a layer does it.

Letters: b batch, n tokens of a run, d width, m memory tokens, k width of phi(keys).
"""

# ruff: noqa: N806
# A is a capital in the paper.

from math import sqrt

import torch
from torch import Tensor, nn
from transformers import initialization as init

from zoo.cache import State
from zoo.config import ZooConfig
from zoo.mixer import Mixer, Shared, Tokens
from zoo.modeling import Block
from zoo.nn import Linear
from zoo.ops.fused import normalize
from zoo.ops.precision import without_autocast
from zoo.segments import OpenSegment, Run

EPSILON = 1e-5
"""Added to the denominators, as in the authors' code."""


def dpfp(x: Tensor, nu: int) -> Tensor:
    """phi(x) (... 2*nu*c) of x (... c): products of [relu(x), relu(-x)] with itself rolled by 1 to nu (eq. 2)."""
    u = torch.cat([x, -x], dim=-1).relu()
    return torch.cat([u * u.roll(j, dims=-1) for j in range(1, nu + 1)], dim=-1)


class AssociativeMemory(Mixer):
    """A matrix A (b k d) of what was seen, and the sum z (b k) of the keys it was written with.

        read     q A / (q z)                              for every token
        write    A += sum beta k^T (v - k A / (k z))      for the memory tokens behind a segment
                 z += sum gamma k,  gamma = 1 - (k z) / |k|^2

    with q = phi(x W_Q), k = phi(x W_K), v = x W_V, beta = sigmoid(x w + b) (eq. 1-4). What a key already points to is
    taken out before the new value is put in, and gamma keeps its weight from counting twice. A and z are zero before
    the first segment: nothing is read, and the first write finds nothing to take out.
    """

    ops = ("linear",)

    def __init__(self, config: ZooConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        d = config.hidden_size
        self.q_proj = Linear(d, config.d_mem, bias=False)
        self.k_proj = Linear(d, config.d_mem, bias=False)
        self.v_proj = Linear(d, d, bias=False)
        self.beta_proj = Linear(d, 1)

    @staticmethod
    def memory_shapes(config: ZooConfig, layer_idx: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """A and z of a layer, as in `SegmentedStack.memory_shapes`."""
        k, d = 2 * config.dpfp_nu * config.d_mem, config.hidden_size
        parts = {"A": ((k, d), torch.float32), "z": ((k,), torch.float32)}
        if not config.use_denominator:
            del parts["z"]
        return {f"memory.{layer_idx}.{name}": part for name, part in parts.items()}

    def read(self, x: Tensor, memory: State) -> Tensor:
        """What tokens x (b n d) find in the memory, (b n d)."""
        return self._recall(self._phi(self.q_proj(x), memory), memory).to(x.dtype)

    def write(self, x: Tensor, memory: State) -> State:
        """The memory after memory tokens x (b m d), all written upon the same memory before."""
        A, *z = memory
        k, v = self._phi(self.k_proj(x), memory), self.v_proj(x).to(A.dtype)
        beta = torch.sigmoid(self.beta_proj(x).to(A.dtype))
        with without_autocast(x.device.type):  # differences of what is summed up: float32
            new = A + k.mT @ (beta * (v - self._recall(k, memory)))
            if not z:
                return (new,)
            known = (k @ z[0][..., None]) / (k.square().sum(dim=-1, keepdim=True) + EPSILON)
            gamma = (1 - known).clamp(0, 1).detach()
            return new, z[0] + (gamma * k).sum(dim=1)

    def _phi(self, x: Tensor, memory: State) -> Tensor:
        """phi of projected tokens (b n c) -> (b n k), in the dtype of the memory."""
        phi = dpfp(x.to(memory[0].dtype), self.config.dpfp_nu)
        return normalize(phi, self.config.kernels) if self.config.normalize_phi else phi

    def _recall(self, phi: Tensor, memory: State) -> Tensor:
        """phi (b n k) -> (b n d)."""
        A, *z = memory
        if z:
            phi = phi / (phi @ z[0][..., None] + EPSILON)
        return phi @ A

    def reset_parameters(self) -> None:
        """As the authors' code: as `nn.Linear` draws them, but values zero, so that nothing is written at first."""
        for linear in (self.q_proj, self.k_proj, self.beta_proj):
            init.kaiming_uniform_(linear.weight, a=sqrt(5))
        init.zeros_(self.v_proj.weight)
        bound = self.beta_proj.in_features**-0.5
        init.uniform_(self.beta_proj.bias, -bound, bound)


class MemorySegment(OpenSegment):
    """An open segment with the memories of its layers.

    Args:
        states, count, run: as of `OpenSegment`.
        memory: the memory of each layer that has one, by layer; None: all are empty.
        latest: the memory that is written upon, by layer: the initial one where a document starts in the run.
        fresh: (b n 1), True at tokens that find the initial memory, which is empty; None: nowhere.
        memory_tokens: (b m), the slots of the memory tokens to write; None: nothing is written.
    """

    def __init__(
        self,
        states: list[State] | None,
        count: int,
        run: Run,
        memory: dict[int, State] | None,
        latest: dict[int, State],
        fresh: Tensor | None,
        memory_tokens: Tensor | None,
    ):
        super().__init__(states, count, run)
        self.memory, self.latest, self.fresh, self.memory_tokens = memory, latest, fresh, memory_tokens


class MemoryLayer(nn.Module):
    """A block with an associative memory: read before it by all tokens, written behind it by the memory tokens.

    What is written is left in `shared`, under the names of the state: where FSDP shards the layer, it makes the weights
    whole for the backward of what `forward` returns, and of nothing else.
    """

    def __init__(self, block: Block, memory: AssociativeMemory):
        super().__init__()
        self.block, self.memory = block, memory

    def forward(
        self, x: Tensor, shared: Shared, tokens: Tokens, past_key_values: MemorySegment
    ) -> tuple[Tensor, Shared]:
        segment, layer = past_key_values, self.memory.layer_idx
        if segment.memory is not None:
            found = self.memory.read(x, segment.memory[layer])
            x = x + (found if segment.fresh is None else found.masked_fill(segment.fresh, 0))
        x, shared = self.block(x, shared, tokens=tokens, past_key_values=segment)
        if (places := segment.memory_tokens) is not None:
            index = places[..., None].expand(-1, -1, x.shape[-1])
            written = self.memory.write(x.gather(1, index), segment.latest[layer])
            shared = shared | dict(zip(self.memory.memory_shapes(self.memory.config, layer), written, strict=True))
        return x, shared

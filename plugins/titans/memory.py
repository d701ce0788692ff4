"""The neural long-term memory of Titans, which all its variants share (arXiv:2501.00663, section 3).

Letters: b batch, t tokens, d width, h heads, k width of a head, w all weights of a head's memory.
"""

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo.config import GroupedQueryConfig
from zoo.mixer import Tokens, choose_rows
from zoo.nn import Linear, RMSNorm, ShortConv
from zoo.ops.fused import normalize
from zoo.ops.memory_gd import MemoryState, initial_state, memory_gd
from zoo.ops.memory_gd.layers import split_layers
from zoo.ops.packing import segment_starts
from zoo.ops.precision import without_autocast

CAUSAL, PAPER = "causal", "paper"


@strict
class TitansConfig(GroupedQueryConfig):
    """Configuration of Titans.

    Args:
        num_attention_heads: heads h of the memory, each with weights of its own, and of attention.
        num_key_value_heads: heads of keys and values of attention, each for a group of queries. Default: one a head.
        head_dim: width of a head. Default, and so far the only choice: hidden_size / num_attention_heads.
        rope_theta: base of the rotary embedding in attention.
        memory_depth: layers of the memory: 1 is a matrix, 2 and more an MLP with SiLU between its layers.
        memory_expansion: width of the layers between, in widths of a head.
        chunk_size: tokens whose gradients are taken at the same weights; it changes what the model computes.
        conv_size: width of the short convolutions behind the projections of the memory.
        num_persistent_tokens: learned tokens in front of what attention (MAC), the memory (MAL) or both (MAG)
            read.
        segment_length: tokens of a segment of MAC, a multiple of `chunk_size`.
        sliding_window: tokens that attention sees in MAG and MAL, the token itself included.
        branch_gate: how MAC and MAG join attention y and memory m, both normalised: y * sigmoid(m) ("sigmoid") or
            y * m ("product").
        mac_prefix: which of a segment's retrieved tokens a token of MAC sees: those of the tokens up to itself
            ("causal"), or all of them ("paper"), which tells it of later tokens.
        train_with_leak: train with `mac_prefix="paper"` nevertheless.
    """

    model_type = "zoo_titans"
    default_mixers = ("titans_mac",)
    sizes = (
        *GroupedQueryConfig.sizes,
        *("memory_depth", "memory_expansion", "chunk_size", "conv_size", "segment_length"),
    )

    rope_theta: float | int = 10000.0
    memory_depth: int = 2
    memory_expansion: int = 2
    chunk_size: int = 16
    conv_size: int = 4
    num_persistent_tokens: int = 16
    segment_length: int = 256
    sliding_window: int = 512
    branch_gate: str = "sigmoid"
    mac_prefix: str = CAUSAL
    train_with_leak: bool = False

    def validate_architecture(self):
        if self.num_attention_heads * self.head_dim != self.hidden_size or self.head_dim % 2:
            raise ValueError(
                f"heads of an even width must fill hidden_size ({self.hidden_size}): num_attention_heads "
                f"{self.num_attention_heads} * head_dim {self.head_dim}"
            )
        if self.memory_depth > 4:
            raise ValueError(f"memory_depth is 1 to 4, got {self.memory_depth}")
        if self.num_persistent_tokens < 0:
            raise ValueError(f"num_persistent_tokens must not be negative, got {self.num_persistent_tokens}")
        if "titans_mac" in self.mixers and self.segment_length % self.chunk_size:
            raise ValueError(
                f"segment_length ({self.segment_length}) must be a multiple of chunk_size ({self.chunk_size})"
            )
        if self.branch_gate not in ("sigmoid", "product"):
            raise ValueError(f"branch_gate is 'sigmoid' or 'product', got {self.branch_gate!r}")
        if self.mac_prefix not in (CAUSAL, PAPER):
            raise ValueError(f"mac_prefix is {CAUSAL!r} or {PAPER!r}, got {self.mac_prefix!r}")


class StartState(tuple):
    """A state of a mixer with no chunk open in any row: to know that beforehand saves laying rows out."""


class LearnerState(NamedTuple):
    """What a memory that learns carries: its weights, and the last inputs of the convolutions of q, k and v."""

    memory: MemoryState
    taps: tuple[Tensor, Tensor, Tensor]


class NeuralMemory(nn.Module):
    """A memory that learns k -> v while it reads, and answers q (eq. 8-15); gates per token and head."""

    config_fields = ("num_attention_heads", "head_dim", "memory_depth", "memory_expansion", "chunk_size", "conv_size")
    ops = ("memory_gd", "short_conv")

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.config = config
        d, h = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = (Linear(d, d, bias=False) for _ in range(3))
        self.q_conv, self.k_conv, self.v_conv = (ShortConv(config, d, config.conv_size, bias=False) for _ in range(3))
        self.gates_proj = Linear(d, 3 * h)  # theta, eta, alpha
        self.initial_weights = nn.ParameterList(
            nn.Parameter(torch.empty(h, rows, columns)) for rows, columns in self.layer_shapes(config)
        )

    @staticmethod
    def layer_shapes(config: TitansConfig) -> list[tuple[int, int]]:
        """Of the matrices of one head's memory."""
        hidden = [config.head_dim * config.memory_expansion] * (config.memory_depth - 1)
        sizes = [config.head_dim, *hidden, config.head_dim]
        return list(itertools.pairwise(sizes))

    @classmethod
    def state_shapes(cls, config: TitansConfig) -> dict:
        size = sum(rows * columns for rows, columns in cls.layer_shapes(config))
        weights = ((config.num_attention_heads, size), torch.float32)
        taps = ShortConv.state_shape(config.hidden_size, config.conv_size)
        return {
            **dict.fromkeys(("weights", "surprise", "anchor"), weights),
            "position": ((), torch.long),
            **dict.fromkeys(("q_taps", "k_taps", "v_taps"), taps),
        }

    def start(self, batch: int) -> LearnerState:
        """Of `batch` rows that have read nothing: the learned weights, no surprise."""
        memory = initial_state(tuple(self.initial_weights), batch)
        taps = memory.weights.new_zeros(batch, self.config.conv_size - 1, self.config.hidden_size)
        return LearnerState(memory, (taps, taps, taps))

    @staticmethod
    def unpack(state: tuple[Tensor, ...], at_border: bool = False) -> LearnerState:
        """The tensors that `state_shapes` names; with `at_border` it is known that no row has a chunk open."""
        memory = MemoryState(*state[:3], None if at_border else state[3])
        return LearnerState(memory, tuple(state[4:7]))

    def restart(self, state: LearnerState, rows: Tensor) -> LearnerState:
        """As `start` in some rows, (b) bool, where no row has a chunk open."""
        fresh = self.start(len(rows))
        new = choose_rows(rows, (*fresh.memory[:3], *fresh.taps), (*state.memory[:3], *state.taps))
        return LearnerState(MemoryState(*new[:3], None), new[3:])

    def queries(self, x: Tensor, taps: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """x (b t d) and the last inputs of the convolution -> unit queries (b t h k), the last inputs."""
        return self._unit(self.q_proj, self.q_conv, x, taps, tokens)

    def _unit(self, proj: Linear, conv: ShortConv, x: Tensor, taps: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        x, taps = conv(proj(x), taps, tokens)
        heads = F.silu(x).unflatten(-1, (self.config.num_attention_heads, -1))
        return normalize(heads, self.config.kernels), taps

    def read(self, weights: Tensor, q: Tensor) -> Tensor:
        """M(q) without learning: weights (b h w), q (b t h k) -> (b t d)."""
        width, depth = self.config.head_dim, self.config.memory_depth
        layers = split_layers(weights, width, width, width * self.config.memory_expansion if depth > 1 else 0)
        with without_autocast(q.device.type):
            y = q.transpose(1, 2).to(weights.dtype) @ layers[0]
            for layer in layers[1:]:
                y = F.silu(y) @ layer
        return y.transpose(1, 2).flatten(2).to(q.dtype)

    def gates(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x (b t d) -> theta in (0, (1 - eta) / chunk_size), eta and alpha in (0, 1), each (b t h).

        However long momentum keeps it, a gradient then counts for 1 / chunk_size at most, and a chunk full of one key
        for 1: steps of 2 and more would overshoot further each time.
        """
        theta, eta, alpha = self.gates_proj(x).to(dtype).sigmoid().chunk(3, dim=-1)
        return theta * (1 - eta) / self.config.chunk_size, eta, alpha

    def forward(self, x: Tensor, state: LearnerState, tokens: Tokens) -> tuple[Tensor, LearnerState]:
        """Learn from x (b t d) and answer it, token by token: M_t(q_t) (b t d), and what is carried."""
        q_taps, k_taps, v_taps = state.taps
        q, q_taps = self.queries(x, q_taps, tokens)
        k, k_taps = self._unit(self.k_proj, self.k_conv, x, k_taps, tokens)
        v, v_taps = self.v_conv(self.v_proj(x), v_taps, tokens)
        v = F.silu(v).unflatten(-1, (self.config.num_attention_heads, -1)) * self.config.head_dim**-0.5
        gates = self.gates(x, state.memory.weights.dtype)
        y, memory = memory_gd(
            *(q, k, v, *gates, state.memory, tuple(self.initial_weights), self.config.chunk_size),
            *(tokens.mask, tokens.segments, True),  # padding stands behind, as `scan` has it
            kernels=self.config.kernels,
        )
        return y.flatten(2), LearnerState(memory, (q_taps, k_taps, v_taps))

    def reset_parameters(self) -> None:
        """At first a chunk full of one key is just learned, 2 theta b / (1 - eta) = 1, and half forgotten in 700."""
        for weight in self.initial_weights:  # as Glorot draws each head's
            bound = math.sqrt(6 / sum(weight.shape[1:]))
            init.uniform_(weight, -bound, bound)
        start = torch.tensor([0.5, 0.5, 0.001], device=self.gates_proj.bias.device)
        init.copy_(self.gates_proj.bias, start.logit().repeat_interleave(self.config.num_attention_heads))


class BranchGate(nn.Module):
    """Joins attention and memory (section 4): both normalised with learned weights, one the gate of the other."""

    config_fields = ("branch_gate",)

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.config = config
        self.attention_norm, self.memory_norm = RMSNorm(config), RMSNorm(config)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        """y and m, both (b t d) -> (b t d)."""
        y, m = self.attention_norm(y), self.memory_norm(m)
        return y * (m.sigmoid() if self.config.branch_gate == "sigmoid" else m)


# -- persistent memory -------------------------------------------------------------------------------------------------


class PersistentTokens(nn.Module):
    """Learned vectors in front of what attention or the memory reads, the same for every text (section 3.3)."""

    config_fields = ("num_persistent_tokens",)

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_persistent_tokens, config.hidden_size))

    def reset_parameters(self) -> None:
        init.normal_(self.weight)  # as large as the normalised tokens beside them


def prefix_documents(x: Tensor, tokens: Tokens, prefix: Tensor, chunk_size: int) -> tuple[Tensor, Tokens, Tensor]:
    """Put a prefix in front of every document packed in a row but its first, whose prefix the state has read.

    A compiled graph has room for a document in every chunk.

    Args:
        x: (b t d), with padding behind.
        tokens: of x, with segments.
        prefix: (p d).
        chunk_size: of the memory.

    Returns:
        Longer rows (b s d), their tokens, and the place in them of each token of x, (b t).
    """
    (b, t), p = x.shape[:2], len(prefix)
    starts = segment_starts(tokens.segments, tokens.mask, x)
    before = starts.cumsum(1)
    if torch.compiler.is_compiling():  # sizes of a graph cannot depend on the data
        documents = -(-t // chunk_size)
        message = f"a compiled graph takes packed documents of {chunk_size} tokens on average, these are shorter"
        torch._assert_async((before <= documents).all(), message)
    else:
        documents = int(before.max())
    size = t + p * documents
    places = torch.arange(t, device=x.device) + p * before
    offset = torch.arange(p, device=x.device)
    prefix_places = torch.where(starts[..., None], places[..., None] - p + offset, size).flatten(1)

    def spread(of_tokens: Tensor, of_prefix: Tensor) -> Tensor:
        """Values (b t) of the tokens and (b t p) of the prefix before each -> (b s), 0 where there is none."""
        row = of_tokens.new_zeros(b, size + 1).scatter(1, places, of_tokens)
        return row.scatter(1, prefix_places, of_prefix.flatten(1))[:, :size]

    everywhere = torch.ones_like(starts) if tokens.mask is None else tokens.mask
    source = spread(torch.arange(t, device=x.device).expand(b, t), (t + offset).expand(b, t, p))
    rows = torch.cat([x, prefix.to(x.dtype).expand(b, p, -1)], dim=1)
    longer = replace(
        tokens,
        positions=spread(tokens.positions.expand(b, t), (offset - p).expand(b, t, p)),
        mask=spread(everywhere, torch.ones_like(starts)[..., None].expand(b, t, p)),
        segments=spread(tokens.segments, tokens.segments[..., None].expand(b, t, p)),
        rotary=None,
    )
    return rows.gather(1, source[..., None].expand(-1, -1, x.shape[2])), longer, places

"""Attention of Titans: to persistent tokens, to a window of earlier ones or to a segment (arXiv:2501.00663, section 4).

Letters: b batch, t tokens, s slots seen, p persistent tokens, d width, h heads of queries, g of keys and values, k
width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.plugins.titans.memory import TitansConfig

from zoo.cache import State
from zoo.mixer import RecurrentMixer, Tokens, choose_rows
from zoo.nn import Linear
from zoo.ops.fused import rotate_halves
from zoo.ops.masked_attention import masked_attention
from zoo.ops.packing import reorder


class PersistentAttention(nn.Module):
    """Softmax attention with a mask of its own, in front of which persistent tokens stand that everyone sees.

    The mask is no plain triangle, so that this is `masked_attention` whatever attention implementation was asked for.
    """

    config_fields = ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta")
    ops = ("masked_attention",)

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.config = config
        d, groups = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(d, d, bias=False)
        self.k_proj = Linear(d, groups, bias=False)
        self.v_proj = Linear(d, groups, bias=False)
        self.o_proj = Linear(d, d, bias=False)

    def rotary(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary embedding (arXiv:2104.09864) at positions (b|1 t), for activations x."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        width = self.config.head_dim
        frequency = self.config.rope_theta ** -(torch.arange(0, width, 2, device=x.device, dtype=wide) / width)
        angle = (positions[..., None].to(wide) * frequency).repeat(1, 1, 2)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    def queries(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """x (b t d) -> (b t h k)."""
        return self._rotate(self._heads(self.q_proj, x), rotary)

    def keys_and_values(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x (b t d) -> two of (b t g k)."""
        return self._rotate(self._heads(self.k_proj, x), rotary), self._heads(self.v_proj, x)

    def persistent(self, prefix: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of persistent tokens (p d), for activations x (b t d): (b p g k), at positions -p to -1."""
        rotary = self.rotary(torch.arange(-len(prefix), 0, device=x.device)[None], x)
        k, v = self.keys_and_values(prefix.to(x.dtype)[None], rotary)
        return k.expand(len(x), -1, -1, -1), v.expand(len(x), -1, -1, -1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """q (b t h k), k and v (b s g k), whether each is seen (b|1 t s) -> (b t d)."""
        return self.o_proj(masked_attention(q, k, v, visible, self.config.kernels).flatten(2))

    def _heads(self, proj: Linear, x: Tensor) -> Tensor:
        return proj(x).unflatten(-1, (-1, self.config.head_dim))

    def _rotate(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return rotate_halves(x, *rotary, kernels=self.config.kernels)


class WindowAttention(PersistentAttention):
    """To the newest `config.sliding_window` tokens of a document, the token itself included."""

    config_fields = (*PersistentAttention.config_fields, "sliding_window")

    @classmethod
    def state_shapes(cls, config: TitansConfig) -> dict:
        window = (config.sliding_window - 1, 2, config.num_key_value_heads, config.head_dim)
        return {"window": (window, None), "count": ((), torch.long)}

    def scan(self, x: Tensor, state: State, tokens: Tokens, prefix: Tensor | None = None) -> tuple[Tensor, State]:
        """x (b t d), the state, the tokens, persistent tokens (p d) -> (b t d) and the state after them."""
        (window, count), t, reach = state, x.shape[1], self.config.sliding_window
        past = window.shape[1]
        rotary = self.rotary(tokens.positions, x)
        new = self.keys_and_values(x, rotary)
        slot = torch.arange(past + t, device=x.device)
        query = slot[past:, None]
        visible = (slot <= query) & (slot > query - reach) & filled(count, past + t, past)[:, None]
        if tokens.segments is not None:
            documents = torch.cat([tokens.segments[:, :1].expand(-1, past), tokens.segments], dim=1)
            visible = visible & (tokens.segments[:, :, None] == documents[:, None, :])
        seen = [window.unbind(2), new]
        if prefix is not None:
            seen = [self.persistent(prefix, x), *seen]
            visible = F.pad(visible, (len(prefix), 0), value=True)
        y = self(self.queries(x, rotary), *join(seen), visible)
        count = tokens.count_last(count, t)
        return y, (keep_newest(window, torch.stack(new, 2), token_counts(tokens), reach - 1, count), count)


def join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Keys and values of some groups of slots, each (b s ...), behind each other."""
    k, v = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    return k, v


class Windowed(RecurrentMixer):
    """A mixer with windows in its state, which have no slots as long as nothing was read."""

    def restart(self, rows: Tensor, state: State, x: Tensor) -> State:
        pairs = zip(self.initial_state(x), state, strict=True)
        initial = tuple(new if new.dim() == 1 else fill_up(new, old.shape[1]) for new, old in pairs)
        return choose_rows(rows, initial, state)


def empty_window(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A window of no slots yet, for activations x (b t d), where `state_shapes` has (s 2 g k)."""
    return x.new_zeros(x.shape[0], 0, *shape[1:])


def fill_up(window: Tensor, slots: int) -> Tensor:
    """A window (b s ...) with empty slots in front, if it has fewer than so many."""
    missing = max(0, slots - window.shape[1])
    return F.pad(window, (*[0] * (2 * window.dim() - 4), missing, 0)) if missing else window


def filled(count: Tensor, slots: int, past: int) -> Tensor:
    """Which of some slots (b slots) are not empty, where of the first `past` the last `count` (b) are filled."""
    return torch.arange(slots, device=count.device) >= past - count[:, None]


def token_counts(tokens: Tokens) -> Tensor | None:
    """How many real tokens there are in each row, (b); None: all are."""
    return None if tokens.mask is None else tokens.mask.sum(dim=1)


def keep_newest(window: Tensor, new: Tensor, lengths: Tensor | None, kept: int, count: Tensor) -> Tensor:
    """The `count` (b) newest, but at most `kept`, of the slots of a window (b s ...) and of `lengths` (b) further ones
    (b t ...), all if None, behind zeros: (b kept ...)."""
    t = new.shape[1]
    if lengths is None:
        slots = fill_up(torch.cat([window, new[:, max(0, t - kept) :]], dim=1), kept)
        newest = slots[:, slots.shape[1] - kept :]
    else:
        slots = fill_up(torch.cat([window, new], dim=1), kept + t)
        start = slots.shape[1] - t - kept
        newest = reorder(slots, start + lengths[:, None] + torch.arange(kept, device=slots.device))
    is_empty = ~filled(count, kept, kept)
    return newest.masked_fill(is_empty.view(*is_empty.shape, *[1] * (newest.dim() - 2)), 0.0)

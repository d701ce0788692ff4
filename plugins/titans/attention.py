"""Attention of Titans: to persistent tokens, to a window of earlier ones or to a segment (arXiv:2501.00663, section 4).

Letters: b batch, t tokens, s slots seen, p persistent tokens, d width, g heads of keys and values, k width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.plugins.titans.memory import TitansConfig

from zoo.cache import State
from zoo.mixer import RecurrentMixer, Tokens, choose_rows
from zoo.nn import Linear, rotate_halves
from zoo.ops.packing import reorder


class PersistentAttention(nn.Module):
    """Softmax attention with a mask of its own, in front of which persistent tokens stand that everyone sees.

    The mask is no plain triangle, so that this is PyTorch's SDPA whatever attention implementation was asked for.
    """

    config_fields = ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta")

    def __init__(self, config: TitansConfig):
        super().__init__()
        self.config = config
        d, groups = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(d, d, bias=False)
        self.k_proj = Linear(d, groups, bias=False)
        self.v_proj = Linear(d, groups, bias=False)
        self.o_proj = Linear(d, d, bias=False)

    def keys_and_values(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (b t d) at positions (b|1 t) -> (b t 2 g k)."""
        k, v = (proj(x).unflatten(-1, (-1, self.config.head_dim)) for proj in (self.k_proj, self.v_proj))
        return torch.stack([self._rotate(k, positions), v], dim=2)

    def persistent(self, prefix: Tensor, x: Tensor) -> Tensor:
        """Keys and values of persistent tokens (p d), for activations x (b t d): (b p 2 g k), at positions -p to -1."""
        places = torch.arange(-len(prefix), 0, device=x.device)[None]
        return self.keys_and_values(prefix.to(x.dtype)[None], places).expand(len(x), -1, -1, -1, -1)

    def forward(self, x: Tensor, positions: Tensor, seen: Tensor, visible: Tensor) -> Tensor:
        """x (b t d) at positions (b|1 t), keys and values (b s 2 g k), whether each is seen (b|1 t s) -> (b t d)."""
        q = self._rotate(self.q_proj(x).unflatten(-1, (-1, self.config.head_dim)), positions)
        q, k, v = (y.transpose(1, 2) for y in (q, *seen.unbind(2)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=k.shape[1] != q.shape[1])
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn the heads x (b t h k) by the rotary embedding (arXiv:2104.09864)."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        width = x.shape[-1]
        frequency = self.config.rope_theta ** -(torch.arange(0, width, 2, device=x.device, dtype=wide) / width)
        angle = (positions[..., None].to(wide) * frequency).repeat(1, 1, 2)
        return rotate_halves(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype))


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
        new = self.keys_and_values(x, tokens.positions)
        slot = torch.arange(past + t, device=x.device)
        query = slot[past:, None]
        visible = (slot <= query) & (slot > query - reach) & filled(count, past + t, past)[:, None]
        if tokens.segments is not None:
            documents = torch.cat([tokens.segments[:, :1].expand(-1, past), tokens.segments], dim=1)
            visible = visible & (tokens.segments[:, :, None] == documents[:, None, :])
        seen = torch.cat([window, new], dim=1)
        if prefix is not None:
            seen = torch.cat([self.persistent(prefix, x), seen], dim=1)
            visible = F.pad(visible, (len(prefix), 0), value=True)
        y = self(x, tokens.positions, seen, visible)
        count = tokens.count_last(count, t)
        return y, (keep_newest(window, new, token_counts(count, t, tokens), reach - 1, count), count)


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


def token_counts(count: Tensor, t: int, tokens: Tokens) -> Tensor:
    """How many of t tokens are real, (b), like `count` (b)."""
    return torch.full_like(count, t) if tokens.mask is None else tokens.mask.sum(dim=1)


def keep_newest(window: Tensor, new: Tensor, lengths: Tensor, kept: int, count: Tensor) -> Tensor:
    """The `count` (b) newest, but at most `kept`, of the slots of a window (b s ...) and `lengths` (b) further ones
    (b t ...), behind zeros: (b kept ...)."""
    slots = fill_up(torch.cat([window, new], dim=1), kept + new.shape[1])
    start = slots.shape[1] - new.shape[1] - kept
    newest = reorder(slots, start + lengths[:, None] + torch.arange(kept, device=slots.device))
    is_empty = ~filled(count, kept, kept)
    return newest.masked_fill(is_empty.view(*is_empty.shape, *[1] * (newest.dim() - 2)), 0.0)

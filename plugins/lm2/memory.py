"""The memory of LM2 (Kang et al., 2025, arXiv:2502.06049), made causal: a bank of slots that holds past segments only.

Letters: b batch, t tokens that look or are looked at, s what they look at, m slots, n tokens of a run, d width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.config import ZooConfig
from zoo.mixer import RecurrentMixer
from zoo.nn import Linear
from zoo.ops.packing import reorder


class SlotMemory(nn.Module):
    """What one block reads from a bank of slots, and what it writes to one at the end of a segment."""

    def __init__(self, config: ZooConfig):
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_memory_heads
        self.q_proj = Linear(d, d, bias=False)
        self.k_proj = Linear(d, d, bias=False)
        self.v_proj = Linear(d, d, bias=False)
        self.o_proj = Linear(d, d, bias=False)
        self.output_gate = Linear(d, d, bias=False)
        self.input_gate = Linear(d, d)
        self.forget_gate = Linear(d, d)

    def project(self, bank: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values of the slots of a bank, each (b m d)."""
        bank = bank.to(dtype)
        return self.k_proj(bank), self.v_proj(bank)

    def read(self, x: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None) -> Tensor:
        """What tokens (b t d) take from slots with these keys and values (b m d): E_mem, through the output gate.

        There is no causal mask, as the slots hold what was before the segment; `visible` (b t m) tells documents apart.
        """
        y = self._attend(self.q_proj(x), keys, values, visible)
        return torch.sigmoid(self.output_gate(y)) * self.o_proj(y)

    def write(self, bank: Tensor, x: Tensor) -> Tensor:
        """The bank (b m d) after a segment of tokens x (b t d), which every slot has looked through."""
        found = self._attend(bank.to(x.dtype), x, x)
        take, keep = (torch.sigmoid(gate(found).to(bank.dtype)) for gate in (self.input_gate, self.forget_gate))
        return take * torch.tanh(found.to(bank.dtype)) + keep * bank

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
        """Softmax attention by heads, q (b t d), k and v (b s d) -> (b t d)."""
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = None if visible is None else visible[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class KeptSegment(RecurrentMixer):
    """What a block keeps of the open segment for its memory.

    The newest tokens that it saw, from the right, for the write at the end; and the keys and values of the slots, which
    stay as they are for a segment.
    """

    @classmethod
    def state_shapes(cls, config: ZooConfig, layer_idx: int) -> dict:
        slots = (config.num_memory_slots, config.hidden_size)
        return {
            "input": ((config.segment_length - 1, config.hidden_size), None),
            "slot_keys": (slots, None),
            "slot_values": (slots, None),
        }

    def collect(self, x: Tensor, past: Tensor | None, newest: Tensor | None) -> Tensor:
        """The newest `segment_length` tokens at the end of a run x (b n d): a whole segment, if the run closes it.

        `past` are those before the run, (b segment_length-1 d); None: there are none. `newest` says where the tokens
        stand behind them, (b segment_length); None: at the end.
        """
        length = self.config.segment_length
        if past is None:
            if newest is None and x.shape[1] == length:
                return x
            past = x.new_zeros(x.shape[0], length - 1, x.shape[2])
        x = torch.cat([past, x], dim=1)
        return x[:, -length:] if newest is None else reorder(x, newest)

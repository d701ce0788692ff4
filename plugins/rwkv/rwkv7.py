"""RWKV-7 "Goose": a generalised delta rule with in-context learning rates (Peng et al., 2025, arXiv:2503.14456).

Letters: b batch, t tokens, d width, h heads, n width of a head.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init
from zoo.plugins.rwkv.modeling import RWKVConfig
from zoo.plugins.rwkv.parts import NO_DECAY, HeadNorm, LowRank, Place, TokenShift, reset_norm, reset_projections

from zoo.cache import State
from zoo.mixer import RecurrentMixer, Shared, Tokens
from zoo.nn import Linear
from zoo.ops.delta_rule import delta_rule
from zoo.ops.fused import normalize

FIRST_VALUES = "rwkv7_first_values"
"""Where the first layer of version 7 leaves its values for those above."""

_LOW_RANK = [f"{name}.{part}.weight" for name in ("decay", "iclr", "value_gate", "gate") for part in ("down", "up")]


class TimeMixing7(RecurrentMixer):
    """o_proj(g * (norm(S_t r) + (r·(bonus * k)) v)), S the delta rule's state (section 4).

    Its state is the last token and the matrices, keys to values.
    """

    ops = ("delta_rule",)
    config_fields = ("head_dim", "num_heads", "decay_rank", "iclr_rank", "value_rank", "gate_rank")
    parameter_options = {
        "decay.bias": {"lr_scale": 2.0},
        **dict.fromkeys(("shift.mu", "bonus", *_LOW_RANK), NO_DECAY),
    }

    def __init__(self, config: RWKVConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        d = config.hidden_size
        self.shift = TokenShift(config, 6)
        self.r_proj = Linear(d, d, bias=False)
        self.k_proj = Linear(d, d, bias=False)
        self.v_proj = Linear(d, d, bias=False)
        self.decay = LowRank(config, config.decay_rank, nn.Tanh)
        self.iclr = LowRank(config, config.iclr_rank)
        is_first = "rwkv7" not in config.mixers[:layer_idx]
        self.value_gate = None if is_first else LowRank(config, config.value_rank)
        self.gate = LowRank(config, config.gate_rank, nn.Sigmoid, bias=False)
        self.removal_scale = nn.Parameter(torch.empty(d))
        self.iclr_mix = nn.Parameter(torch.empty(d))
        self.bonus = nn.Parameter(torch.empty(config.num_heads, config.head_dim))
        self.norm = HeadNorm(config)
        self.o_proj = Linear(d, d, bias=False)

    @classmethod
    def state_shapes(cls, config: RWKVConfig, layer_idx: int) -> dict:
        matrix = (config.num_heads, config.head_dim, config.head_dim)
        return {"last": ((config.hidden_size,), None), "matrix": (matrix, torch.float32)}

    def scan_shared(self, x: Tensor, state: State, tokens: Tokens, shared: Shared) -> tuple[Tensor, State, Shared]:
        last, matrix = state
        heads = matrix.shape[1:3]
        (x_r, x_w, x_k, x_v, x_a, x_g), last = self.shift(x, last, tokens)
        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        if self.value_gate is None:
            shared = shared | {FIRST_VALUES: v}
        else:
            v = torch.addcmul(v, shared[FIRST_VALUES] - v, self.value_gate(x_v).sigmoid())
        log_decay = -math.exp(-0.5) * self.decay(x_w, matrix.dtype).sigmoid()
        iclr = self.iclr(x_a).sigmoid()
        removal = normalize((k * self.removal_scale).unflatten(-1, heads), self.config.kernels)
        k = torch.addcmul(k, k * (iclr - 1), self.iclr_mix)
        r, k, v, log_decay, iclr = (part.unflatten(-1, heads) for part in (r, k, v, log_decay, iclr))
        y, matrix = delta_rule(
            *(r, k, v, -removal, removal * iclr, log_decay, matrix, tokens.mask, tokens.segments),
            kernels=self.config.kernels,
        )
        y = self.norm(y) + ((r * k * self.bonus).sum(-1, keepdim=True) * v).flatten(-2)
        return self.o_proj(y * self.gate(x_g)), (last, matrix), shared

    def reset_parameters(self) -> None:
        place, n = Place(self.config, self.layer_idx), self.config.head_dim
        share, linear = place.share, place.ramp - 0.5
        exponents = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2], dtype=share.dtype) * place.fall
        init.copy_(self.shift.mu, 1 - share ** exponents[:, None])
        zigzag = (place.channel % n - (n - 1) / 2) / ((n - 1) / 2)
        zigzag = zigzag * zigzag.abs()
        init.copy_(self.decay.bias, -5.5 + 6 * place.ramp ** (1 + place.rise**0.3) + 2.5 * zigzag)
        init.copy_(self.iclr.bias, -0.19 + 0.3 * zigzag + 0.4 * linear)
        init.copy_(self.removal_scale, 0.71 - 0.1 * linear)
        init.constant_(self.iclr_mix, 1.02)
        init.constant_(self.bonus, -0.04)
        for low_rank in (self.decay, self.iclr, self.value_gate, self.gate):
            if low_rank is not None:
                rows, columns = low_rank.up.weight.T.shape
                init.zeros_(low_rank.down.weight)
                init.orthogonal_(low_rank.up.weight, gain=0.1 * max(1.0, rows / columns) ** 0.5)
        if self.value_gate is not None:
            init.copy_(self.value_gate.bias, 0.73 - 0.4 * linear)
        reset_norm(self.norm, place)
        reset_projections({self.r_proj: 1.0, self.k_proj: 0.1, self.v_proj: 1.0, self.o_proj: 0.0})

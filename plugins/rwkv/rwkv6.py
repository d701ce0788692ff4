"""RWKV-5 "Eagle" and RWKV-6 "Finch": a matrix state a head that decays by key channel (Peng et al., arXiv:2404.05892).

Letters: b batch, t tokens, d width, h heads, n width of a head, r rank.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from zoo.plugins.rwkv.modeling import RWKVConfig
from zoo.plugins.rwkv.parts import (
    NO_DECAY,
    HeadNorm,
    LowRank,
    Place,
    TokenShift,
    look_back,
    reset_norm,
    reset_projections,
)

from zoo.cache import State
from zoo.mixer import RecurrentMixer, Tokens
from zoo.nn import Linear
from zoo.ops.decay_attention import decay_attention


class TimeMixing5(RecurrentMixer):
    """Eagle, version 5.2: o_proj(silu(g) * norm(wkv)), with a learned decay exp(-exp(time_decay)) (section 4.1).

    Its state is the last token and the matrices, keys to values.
    """

    ops = ("decay_attention",)
    config_fields = ("head_dim", "num_heads")
    parameter_options = {
        "shift.mu": NO_DECAY,
        "time_decay": {**NO_DECAY, "lr_scale": 2.0},
        "bonus": NO_DECAY,
    }
    key_and_gate_gain = 1.0
    """Of their initial weights, which version 6 draws smaller."""

    def __init__(self, config: RWKVConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        d, heads = config.hidden_size, (config.num_heads, config.head_dim)
        self.k_proj = Linear(d, d, bias=False)
        self.v_proj = Linear(d, d, bias=False)
        self.r_proj = Linear(d, d, bias=False)
        self.g_proj = Linear(d, d, bias=False)
        self.bonus = nn.Parameter(torch.empty(heads))
        self.norm = HeadNorm(config)
        self.o_proj = Linear(d, d, bias=False)
        self.add_shift_and_decay(config)

    def add_shift_and_decay(self, config: RWKVConfig) -> None:
        """What version 6 makes depend on the tokens."""
        self.shift = TokenShift(config, 4, mu_of_current=True)
        self.time_decay = nn.Parameter(torch.empty(config.num_heads, config.head_dim))

    @classmethod
    def state_shapes(cls, config: RWKVConfig, layer_idx: int) -> dict:
        matrix = (config.num_heads, config.head_dim, config.head_dim)
        return {"last": ((config.hidden_size,), None), "matrix": (matrix, torch.float32)}

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        last, matrix = state
        mixed, last = self.shift(x, last, tokens)
        log_decay = -self.time_decay.to(matrix.dtype).exp()
        y, matrix = self.attend(mixed, log_decay, matrix, tokens)
        return y, (last, matrix)

    def attend(self, mixed: Tensor, log_decay: Tensor, matrix: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The inputs of key, value, receptance and gate (4 b t d) -> y (b t d), the last state (b h n n)."""
        x_k, x_v, x_r, x_g = mixed
        heads = (self.config.num_heads, self.config.head_dim)
        r, k, v = (
            proj(x).unflatten(-1, heads) for proj, x in ((self.r_proj, x_r), (self.k_proj, x_k), (self.v_proj, x_v))
        )
        y, matrix = decay_attention(
            *(r, k, v, log_decay, matrix, tokens.mask, tokens.segments),
            bonus=self.bonus,
            kernels=self.config.kernels,
        )
        return self.o_proj(self.norm(y) * F.silu(self.g_proj(x_g))), matrix

    def reset_parameters(self) -> None:
        place = Place(self.config, self.layer_idx)
        self.reset_shift_and_decay(place)
        zigzag = 0.1 * ((place.channel + 1) % 3 - 1)
        init.copy_(self.bonus, (place.rise * (1 - place.ramp) + zigzag).view_as(self.bonus))
        reset_norm(self.norm, place)
        gain = self.key_and_gate_gain
        gains = {self.r_proj: 1.0, self.k_proj: gain, self.v_proj: 1.0, self.g_proj: gain, self.o_proj: 0.0}
        reset_projections(gains)

    def reset_shift_and_decay(self, place: Place) -> None:
        init.copy_(self.shift.mu, shares(place))
        init.copy_(self.time_decay, decay_logits(place).view_as(self.time_decay))


class TimeMixing6(TimeMixing5):
    """Finch: the token shift and the decay depend on the tokens, each through a low-rank map (section 4.2)."""

    config_fields = (*TimeMixing5.config_fields, "shift_rank", "decay_rank")
    parameter_options = {
        "shift.mu": NO_DECAY,
        "shift.down.weight": NO_DECAY,
        "shift.up": NO_DECAY,
        "decay.down.weight": NO_DECAY,
        "decay.up.weight": NO_DECAY,
        "decay.bias": {"lr_scale": 2.0},
        "bonus": NO_DECAY,
    }
    key_and_gate_gain = 0.1

    def add_shift_and_decay(self, config: RWKVConfig) -> None:
        self.shift = DynamicTokenShift(config)
        self.decay = LowRank(config, config.decay_rank, nn.Tanh)

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        last, matrix = state
        (x_w, *mixed), last = self.shift(x, last, tokens)
        log_decay = -self.decay(x_w, matrix.dtype).exp()
        y, matrix = self.attend(mixed, log_decay.unflatten(-1, matrix.shape[1:3]), matrix, tokens)
        return y, (last, matrix)

    def reset_shift_and_decay(self, place: Place) -> None:
        mixed = shares(place)
        init.copy_(self.shift.mu_x, 1 - mixed[0])
        init.copy_(self.shift.mu, 1 - torch.cat([mixed[:1], mixed]))
        init.copy_(self.decay.bias, decay_logits(place))
        for down, up in ((self.shift.down.weight, self.shift.up), (self.decay.down.weight, self.decay.up.weight)):
            init.zeros_(down)
            init.uniform_(up, -0.01, 0.01)


class DynamicTokenShift(nn.Module):
    """The shift whose mu is a function of the tokens, for decay, key, value, receptance and gate (`ddlerp`)."""

    def __init__(self, config: RWKVConfig):
        super().__init__()
        d, r = config.hidden_size, config.shift_rank
        self.mu_x = nn.Parameter(torch.empty(d))
        self.down = Linear(d, 5 * r, bias=False)
        self.up = nn.Parameter(torch.empty(5, r, d))
        self.mu = nn.Parameter(torch.empty(5, d))

    def forward(self, x: Tensor, last: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """x (b t d), the last token before them (b d) -> mixed (5 b t d), the last token (b d)."""
        previous, last = look_back(x, last, tokens)
        change = previous - x
        low = self.down(torch.addcmul(x, change, self.mu_x)).tanh()
        low = low.flatten(0, 1).unflatten(-1, (5, -1)).transpose(0, 1)  # 5 b*t r
        mu = torch.baddbmm(self.mu[:, None], low, self.up).unflatten(1, x.shape[:2])
        return torch.addcmul(x, change, mu), last


def shares(place: Place) -> Tensor:
    """Initial shares of the token itself for key, value, receptance and gate, (4 d)."""
    falling = place.share**place.fall
    return torch.stack([falling, falling + 0.3 * place.rise, falling**0.5, falling**0.5])


def decay_logits(place: Place) -> Tensor:
    """Initial log of the rate at which each channel decays, (d)."""
    return -6 + 5 * place.ramp ** (0.7 + 1.3 * place.rise)
